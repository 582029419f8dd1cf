"""The suite is what it seems to be: no test hides another of the same name."""

from collections import Counter

from pgchannels.testing import ChannelLayerSuite


def test_no_test_hides_another() -> None:
    names = Counter(
        name
        for part in ChannelLayerSuite.__mro__
        for name in vars(part)
        if name.startswith("test_")
    )
    assert sum(names.values()) > 90
    assert {name for name, count in names.items() if count > 1} == set()
