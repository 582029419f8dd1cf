"""PostgreSQL decides: may this database role, with these claims, see a row for this channel?

The policies that guard the tables then guard the sockets, too, and are written once.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from pgchannels.channels import check_channel
from pgchannels.errors import ConfigurationError, InvalidChannel
from pgchannels.web.auth.authorization import ACTIONS, Action
from pgchannels.web.errors import new_error_id

if TYPE_CHECKING:
    from sqlalchemy import TextClause
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from pgchannels.web.auth.identity import Identity

__all__ = ["RowSecurity"]

logger = logging.getLogger("pgchannels.web")

# Settings by function, so that each is a parameter: a role's name needs no quoting that could be
# wrong. The third argument makes it SET LOCAL. The timeout ends what this end no longer waits for.
_SET = text(
    "select set_config('statement_timeout', :timeout, true),"
    " set_config(:setting, :claims, true), set_config('role', :role, true)"
)
_BYPASSES = text("select rolsuper or rolbypassrls from pg_catalog.pg_roles where rolname = :role")


class RowSecurity:
    """An :data:`Authorize` that asks the database, as a role for which row-level security holds.

    ::

        RowSecurity(
            engine,
            {"subscribe": "select true from rooms where 'room:' || id = :channel"},
            role="web_user",
        )

    Each decision is a read-only transaction that is rolled back; in it the claims are the setting
    ``request.jwt.claims``, as JSON, with the user's id as ``sub`` where they have no ``sub`` of
    their own. Without an identity they are ``{}``. The answer is yes if the query returns a row
    whose first column is not null, false or 0; no if it fails, or takes too long. The log has why,
    with an ``error_id``, but no claims.

    Args:
        engine: of SQLAlchemy, on the driver asyncpg or psycopg. Its user has to be a member of the
            role.
        queries: by action, each with the parameter ``:channel``. An action without one is not
            allowed.
        role: which the queries run as. Not a superuser, no BYPASSRLS, not the owner of the tables
            (to whom policies apply only after ``alter table … force row level security``).
        setting: where policies find the claims.
        timeout: seconds for a decision, waiting for a connection included.

    Raises:
        ConfigurationError: no such action, a query without ``:channel`` or with other parameters,
            no name of a role.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        queries: Mapping[Action, str],
        *,
        role: str,
        setting: str = "request.jwt.claims",
        timeout: float = 5.0,
    ) -> None:
        # "none" is no role, but how one gets back to where one came from.
        if not role or role == "none" or "\0" in role:
            raise ConfigurationError(f"there is no role {role!r}")
        if "." not in setting:
            raise ConfigurationError(f"a setting of one's own has a dot in it, {setting!r} has not")
        if not 0 < timeout <= 3600:
            raise ConfigurationError(f"timeout is in seconds, up to 3600, not {timeout!r}")
        # The same pool. Where its connections commit by themselves, SET LOCAL would do nothing.
        self._engine = engine.execution_options(
            isolation_level="READ COMMITTED", postgresql_readonly=True
        )
        self._queries = {action: _checked(action, query) for action, query in queries.items()}
        self._role = role
        self._setting = setting
        self._timeout = timeout
        self._role_is_good = False

    async def __call__(self, identity: Identity | None, action: Action, channel: str) -> bool:
        query = self._queries.get(action)
        if query is None:
            return False
        try:
            check_channel(channel)
        except InvalidChannel:
            return False
        try:
            async with asyncio.timeout(self._timeout):
                return await self._ask(query, _claims(identity), channel)
        except Exception as error:  # noqa: BLE001 - the answer is no, whatever it is
            _log(error, action)
            return False

    async def _ask(self, query: TextClause, claims: str, channel: str) -> bool:
        async with self._engine.connect() as connection:
            transaction = await connection.begin()
            try:
                await self._check_role(connection)
                await connection.execute(
                    _SET,
                    {
                        "timeout": str(max(1, round(self._timeout * 1000))),
                        "setting": self._setting,
                        "claims": claims,
                        "role": self._role,
                    },
                )
                row = (await connection.execute(query, {"channel": channel})).first()
            finally:
                await transaction.rollback()
        # A count of 0 is a row, too, and no yes.
        return row is not None and row[0] is not None and bool(row[0] != 0)

    async def _check_role(self, connection: AsyncConnection) -> None:
        if not self._role_is_good:
            bypasses = await connection.scalar(_BYPASSES, {"role": self._role})
            if bypasses is not False:
                raise ConfigurationError(
                    f"there is no role {self._role!r}"
                    if bypasses is None
                    else f"row-level security does not hold for the role {self._role!r}"
                )
            self._role_is_good = True


def _checked(action: str, query: str) -> TextClause:
    if action not in ACTIONS:
        raise ConfigurationError(f"there is no action {action!r}")
    clause = text(query)
    if set(clause.compile().params) != {"channel"}:
        raise ConfigurationError(f"the query for {action!r} needs :channel, and no other parameter")
    return clause


def _claims(identity: Identity | None) -> str:
    claims: dict[str, Any] = {}
    if identity is not None:
        claims = {"sub": identity.user_id, **identity.claims}
    # In ASCII: neither NUL nor half a surrogate pair is then a character that a text cannot have.
    return json.dumps(claims, allow_nan=False)


def _log(error: Exception, action: Action) -> None:
    # Not the error itself: SQLAlchemy's sentence repeats the parameters, PostgreSQL's a value.
    error_id = new_error_id()
    cause = getattr(error, "orig", None) or error
    sqlstate = getattr(cause, "sqlstate", None)
    what = str(error) if isinstance(error, ConfigurationError) else type(cause).__name__
    logger.error(
        "a channel could not be authorized for %r, and is denied: %s (SQLSTATE %s, error_id %s)",
        action,
        what,
        sqlstate,
        error_id,
        extra={"error_id": error_id, "sqlstate": sqlstate, "action": action},
    )
