"""The end of a session's transaction, and the events in which an application may publish there.

In ``after_commit`` the transaction is over, and a message that is added to the session would wait
in it for another one, or be dropped when it is closed. So messages that are published there, or in
``after_transaction_end``, are gathered, and go out in a transaction of their own as soon as the
session has given its connection back. In a rollback there is nothing to publish them with.

A savepoint's end is none of this: the transaction that it belongs to is still open.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.session import SessionTransactionState

from pgchannels.errors import ConfigurationError
from pgchannels.records import Outgoing

__all__ = ["begun", "committed", "ended", "gather", "is_committed", "is_connecting"]

# In Session.info: the newest transaction, if it is still there. A reference would be a cycle.
_TRANSACTION = "pgchannels.transaction"
# … it has been committed.
_COMMITTED = "pgchannels.committed"
# … messages that were published after its commit. It is there until the transaction has ended.
_LATE = "pgchannels.late"

_ROLLED_BACK = (
    "this session's transaction has been rolled back, and so would be what is published in it. "
    "Publish after rollback() has returned, or in a session of its own: "
    "with Session.begin() as other: publish(other, …)"
)
_PREPARED = (
    "this session's transaction is being committed, and takes no more messages. Publish before "
    "commit() or prepare(); of SQLAlchemy's events, before_commit is the last"
)


def begun(session: Session, transaction: SessionTransaction) -> None:
    """*session* has begun a transaction, or a savepoint or another part of one."""
    if transaction.parent is None:
        session.info[_TRANSACTION] = ref(transaction)
        session.info.pop(_COMMITTED, None)


def committed(session: Session) -> list[Outgoing]:
    """The transaction of *session* has been committed; return the messages gathered since."""
    session.info[_COMMITTED] = True
    late: list[Outgoing] = session.info.setdefault(_LATE, [])
    return late


def ended(session: Session) -> list[Outgoing] | None:
    """The transaction of *session* has ended; return the messages gathered since its commit.

    None: it was not committed.
    """
    late: list[Outgoing] | None = session.info.pop(_LATE, None)
    return late


def is_committed(session: Session) -> bool:
    """Whether *session* has been committed just now, and calls the events of that.

    Raises:
        ConfigurationError: it is being rolled back, or commits and takes no more messages.
    """
    transaction: Any = session._transaction  # noqa: SLF001
    if transaction is not None:
        match transaction._state:  # noqa: SLF001
            case SessionTransactionState.COMMITTED:
                return not transaction.nested
            case SessionTransactionState.PREPARED if transaction.parent is None:
                raise ConfigurationError(_PREPARED)
            case SessionTransactionState.DEACTIVE:
                raise ConfigurationError(_ROLLED_BACK)
        return False
    last: Any = session.info.get(_TRANSACTION, _nothing)()
    # A function that changes the transaction's state is at work: we are called by one of the events
    # at the end of it. These come in any order, so no listener of ours could tell.
    if last is None or last._current_fn is None:  # noqa: SLF001
        return False
    if _COMMITTED not in session.info:
        raise ConfigurationError(_ROLLED_BACK)
    return True


def is_connecting(session: Session) -> bool:
    """Whether this is ``after_begin``, in which *session* cannot be asked for its connection."""
    transaction = session._transaction  # noqa: SLF001
    return transaction is not None and not transaction.is_active


def gather(session: Session, message: Outgoing) -> bool:
    """Keep *message* until the transaction of *session*, now committed, has ended.

    False: it has, so there is nothing to wait for.
    """
    if _LATE not in session.info and not session.in_transaction():
        return False
    session.info.setdefault(_LATE, []).append(message)
    return True


def _nothing() -> None:
    """Stand for a reference to what is no more."""
