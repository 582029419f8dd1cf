"""Find the directories that stand beside the package in a checkout and inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

__all__ = ["bundled"]


def bundled(name: str) -> Path:
    """The directory *name* (``"migrations"``, ``"examples"``)."""
    package = Path(__file__).parent
    packaged = package / f"_{name}"
    return packaged if packaged.is_dir() else package.parent / name
