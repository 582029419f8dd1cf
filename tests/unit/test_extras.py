"""Optional dependencies that are not installed: the error says what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
sys.modules[sys.argv[2]] = None
try:
    __import__(sys.argv[1])
except ModuleNotFoundError as error:
    print(error.name, "|", error)
"""


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [
        ("pgchannels.web.metrics", "prometheus_client", "metrics"),
        ("pgchannels.telemetry", "opentelemetry", "otel"),
    ],
)
def test_the_error_names_the_extra(module: str, missing: str, extra: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, module, missing], capture_output=True, text=True, check=True
    )
    name, said = done.stdout.strip().split(" | ")
    assert name == missing
    assert said == f"{missing} is not installed: pip install 'pgchannels[{extra}]'"
