"""Optional dependencies: the error that names the extra to install."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["needs_extra"]


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Import optional packages in this block.

    Args:
        extra: the extra of pgchannels that has them.

    Raises:
        ModuleNotFoundError: one of them is missing. The message says what to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed: pip install 'pgchannels[{extra}]'", name=error.name
        ) from error
