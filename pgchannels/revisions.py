"""The migrations as SQL: what each revision does, and what undoes it.

Beside each revision's script in ``migrations/versions`` stand two files: ``<name>.sql`` and
``<name>.down.sql``. Both name the schema ``pgchannels``. In the second, a line ``-- restore
pgchannels.<routine>`` stands for the definition that the newest earlier revision gave it.
"""

from __future__ import annotations

import re
from pathlib import Path

from pgchannels.bundled import bundled
from pgchannels.schema import REVISIONS
from pgchannels.sql import in_schema, statements

__all__ = ["downgrade_from", "upgrade_to"]

_RESTORE = re.compile(r"^-- restore (pgchannels\.\w+)$", re.MULTILINE)
_DEFINITION = re.compile(r"create (?:or replace )?(function|procedure) (pgchannels\.\w+)\(")


def upgrade_to(revision: str, schema: str) -> list[str]:
    """The statements that bring *schema* from the revision before to *revision*."""
    return statements(in_schema(_file(revision, ".sql"), schema))


def downgrade_from(revision: str, schema: str) -> list[str]:
    """The statements that undo *revision*."""
    script = _RESTORE.sub(
        lambda match: _definition(match[1], before=revision) + ";", _file(revision, ".down.sql")
    )
    return statements(in_schema(script, schema))


def _definition(routine: str, *, before: str) -> str:
    for revision in reversed(REVISIONS[: REVISIONS.index(before)]):
        for statement in statements(_file(revision, ".sql")):
            match = _DEFINITION.search(statement)
            if match is not None and match[2] == routine:
                return f"create or replace {match[1]} {match[2]}({statement[match.end() :]}"
    raise LookupError(f"no revision before {before} defines {routine}")


def _file(revision: str, suffix: str) -> str:
    (script,) = _versions().glob(f"{revision}_*.py")
    return script.with_suffix(suffix).read_text(encoding="utf-8")


def _versions() -> Path:
    return bundled("migrations") / "versions"
