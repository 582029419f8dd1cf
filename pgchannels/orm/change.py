"""What has happened to an object, as the callables of ``@publishes`` see it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeAlias, TypeVar

__all__ = ["Change", "Operation"]

T = TypeVar("T")

Operation: TypeAlias = Literal["insert", "update", "delete"]


@dataclass(frozen=True)
class Change(Generic[T]):
    """One row that a flush has inserted, updated or deleted.

    Names are those of mapped column attributes. In a test of a callable of your own, make one:
    ``Change(order, "update", frozenset({"status"}), {"status": "open"})``.
    """

    object: T
    """The object, with all the values that it was flushed with, keys and defaults too."""
    operation: Operation
    changed: frozenset[str]
    """Which attributes have other values than before. All that have a value on insert, none on
    delete."""
    former: Mapping[str, Any]
    """Former values of those that have changed, as far as they are known. For a delete: values in
    the row of attributes that were set and never flushed."""

    def old(self, name: str) -> Any:
        """The value of the attribute *name* before this change; of a deleted object, the row's.

        What has not changed is what it was.

        Raises:
            LookupError: it is not known. An insert has no former values; and an attribute that was
                set while it was expired or deferred was never read, unless ``changed=`` or a
                channel's template names it.
        """
        if self.operation == "insert":
            raise LookupError(f"{name!r} has no former value: the object has just been inserted")
        if name in self.former:
            return self.former[name]
        if name in self.changed:
            raise LookupError(
                f"the former value of {name!r} is not known: it was set without being loaded. "
                "Name it in changed=, and it will be read in time"
            )
        return getattr(self.object, name)
