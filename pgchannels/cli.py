"""The ``pgchannels`` command: what comes out of it, and with which exit code.

The commands themselves are in `pgchannels.commands`. Results go to stdout, errors to stderr, as one
line each. The exit code is 0 for success; 1 if it could not be done, or if what was checked is not
so; 2 if it was asked for in a way that cannot work; 128 and the signal's number if it was ended by
one.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from pgchannels.errors import (
    ConfigurationError,
    InvalidMessage,
    InvalidPosition,
    PGChannelsError,
    SchemaError,
    UnknownPosition,
)
from pgchannels.lines import discard_output

__all__ = ["main"]


def main() -> None:
    """Run the command line. Always leaves by ``SystemExit``."""
    try:
        from pgchannels.commands import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("typer", "rich"):
            raise
        _fail(f"{missing} is not installed: pip install 'pgchannels[cli]'", 2)
    try:
        app(prog_name="pgchannels")
    except (SchemaError, UnknownPosition) as error:
        # The state of a database, rather than of what was asked for.
        _fail(error, 1)
    except (ConfigurationError, InvalidMessage, InvalidPosition) as error:
        _fail(error, 2)
    except PGChannelsError as error:
        _fail(error, 1)
    except OSError as error:
        # Of the output, as a rule: no space left on the device. What the interpreter could flush
        # at its end would fail again.
        discard_output()
        _fail(error.strerror or error, 1)


def _fail(reason: object, code: int) -> NoReturn:
    line = " ".join(str(reason).split()) or type(reason).__name__
    print(f"pgchannels: {line}", file=sys.stderr)
    sys.exit(code)
