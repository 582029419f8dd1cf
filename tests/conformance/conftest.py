"""Assertions of the suite explain themselves as those of tests do."""

import pytest

pytest.register_assert_rewrite("pgchannels.testing")
