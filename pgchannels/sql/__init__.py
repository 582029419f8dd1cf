"""All SQL that runs in production, by name: ``queries.sql``.

The file names the schema ``pgchannels``, so that it can be pasted into psql as it stands; the
loader puts in the name that is configured. The tables and functions themselves are made by the
migrations.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

__all__ = ["in_schema", "load_queries", "statements"]

_NAME = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)
_SCHEMA = re.compile(r"\bpgchannels\b(?=\.)")
_STATEMENT = re.compile(r"""(?:\$\$.*?\$\$|--[^\n]*|'[^']*'|"[^"]*"|[^;'"])+""", re.DOTALL)


def in_schema(sql: str, schema: str) -> str:
    """Replace the schema ``pgchannels.`` in *sql* by *schema*, quoted as an identifier."""
    quoted = '"' + schema.replace('"', '""') + '"'
    return _SCHEMA.sub(lambda _: quoted, sql)


@cache
def load_queries(schema: str) -> dict[str, str]:
    """Return the queries by name, for tables in *schema*."""
    text = files("pgchannels.sql").joinpath("queries.sql").read_text(encoding="utf-8")
    _, *parts = _NAME.split(text)
    named = zip(parts[::2], parts[1::2], strict=True)
    return {name: in_schema(sql.strip().removesuffix(";"), schema) for name, sql in named}


def statements(script: str) -> list[str]:
    """Split a script at its semicolons, but those in quotes, ``$$ … $$`` and comments."""
    found = (part.strip() for part in _STATEMENT.findall(script))
    return [part for part in found if re.sub(r"--[^\n]*", "", part).strip()]
