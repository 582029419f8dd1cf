"""Functions and the handlers of what they raise, bound to each other by a decorator."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterable
from functools import wraps
from inspect import (
    isasyncgenfunction,
    isawaitable,
    iscoroutinefunction,
    isgeneratorfunction,
)
from typing import Any, ParamSpec, TypeAlias, TypeVar, overload

from pgchannels.errors import ConfigurationError
from pgchannels.web.connection import Connection
from pgchannels.web.errors import SocketError

__all__ = ["ahandle", "handle"]

P = ParamSpec("P")
R = TypeVar("R")
H = TypeVar("H")

Kinds: TypeAlias = type[Exception] | tuple[type[Exception], ...]


def handle(
    exceptions: Kinds, handler: Callable[[Any], H]
) -> Callable[[Callable[P, R]], Callable[P, R | H]]:
    """Have *handler* handle what a function raises; what it returns, the function returns.

    ::

        @handle(KeyError, lambda error: None)
        def price(article: str) -> Decimal | None:
            return PRICES[article]

    Args:
        exceptions: a subclass of ``Exception``, or several as a tuple.
        handler: is called with the exception. It may raise it again, or another one.

    Raises:
        ConfigurationError: *exceptions* are none; or the function, or the handler, is one to be
            awaited: see :func:`ahandle`.
    """
    kinds = _checked(exceptions, handler)
    if iscoroutinefunction(handler):
        raise ConfigurationError(f"handle() cannot await {handler!r}; use ahandle()")

    def decorate(function: Callable[P, R]) -> Callable[P, R | H]:
        if iscoroutinefunction(function):
            raise ConfigurationError(f"{function!r} is a coroutine function; use ahandle()")
        _check_no_generator(function)

        @wraps(function)
        def handled(*args: P.args, **kwargs: P.kwargs) -> R | H:
            try:
                return function(*args, **kwargs)
            except kinds as error:
                _give_connection(error, args, kwargs)
                return handler(error)

        return handled

    return decorate


@overload
def ahandle(
    exceptions: Kinds, handler: Callable[[Any], Coroutine[Any, Any, H]]
) -> Callable[[Callable[P, Awaitable[R]]], Callable[P, Coroutine[Any, Any, R | H]]]: ...


@overload
def ahandle(
    exceptions: Kinds, handler: Callable[[Any], H]
) -> Callable[[Callable[P, Awaitable[R]]], Callable[P, Coroutine[Any, Any, R | H]]]: ...


def ahandle(
    exceptions: Kinds, handler: Callable[[Any], Any]
) -> Callable[[Callable[P, Awaitable[Any]]], Callable[P, Coroutine[Any, Any, Any]]]:
    """Have *handler* handle what a coroutine function raises. As :func:`handle`.

    ::

        async def on_invalid(error: InvalidOrder) -> None:
            await error.connection.send_json({"type": "order.refused", "why": error.detail})


        class Orders(JsonConsumer):
            @receives("order.place")
            @ahandle(InvalidOrder, on_invalid)
            async def place(self, order: Order) -> None: ...

    A :class:`~pgchannels.web.errors.SocketError` has its ``connection``: the consumer whose method
    it is, or the connection among the function's arguments. A cancellation is no ``Exception``, and
    is never handled.

    Args:
        exceptions: a subclass of ``Exception``, or several as a tuple.
        handler: a function or a coroutine function.

    Raises:
        ConfigurationError: *exceptions* are none; or the function is not one to be awaited.
    """
    kinds = _checked(exceptions, handler)

    def decorate(function: Callable[P, Awaitable[Any]]) -> Callable[P, Coroutine[Any, Any, Any]]:
        if not iscoroutinefunction(function):
            _check_no_generator(function)
            raise ConfigurationError(f"{function!r} is no coroutine function; use handle()")

        @wraps(function)
        async def handled(*args: P.args, **kwargs: P.kwargs) -> Any:
            try:
                return await function(*args, **kwargs)
            except kinds as error:
                _give_connection(error, args, kwargs)
                result = handler(error)
                return await result if isawaitable(result) else result

        return handled

    return decorate


def _checked(exceptions: Kinds, handler: object) -> tuple[type[Exception], ...]:
    kinds = exceptions if isinstance(exceptions, tuple) else (exceptions,)
    given: tuple[object, ...] = kinds  # they may be anything
    if not given or not all(
        isinstance(kind, type) and issubclass(kind, Exception) for kind in given
    ):
        # A BaseException ends a task or the process. Who handles that keeps it alive.
        raise ConfigurationError(f"expected subclasses of Exception, not {exceptions!r}")
    if not callable(handler):
        raise ConfigurationError(f"the handler cannot be called: {handler!r}")
    return kinds


def _check_no_generator(function: object) -> None:
    if isgeneratorfunction(function) or isasyncgenfunction(function):
        raise ConfigurationError(f"{function!r} is a generator: it raises when it is iterated over")


def _give_connection(error: Exception, args: Iterable[object], kwargs: dict[str, Any]) -> None:
    if isinstance(error, SocketError) and error.connection is None:
        given = (*args, *kwargs.values())
        error.connection = next((each for each in given if isinstance(each, Connection)), None)
