"""Signatures with their annotations resolved, as far as that is possible."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

__all__ = ["Unresolved", "defining_namespace", "parameters", "resolve"]


class Unresolved(str):
    """The text of an annotation that names what is not there."""

    __slots__ = ()


def parameters(
    function: Callable[..., Any], namespace: Mapping[str, Any]
) -> list[inspect.Parameter]:
    """A method's parameters after ``self``, their annotations resolved or :class:`Unresolved`.

    Args:
        function: of a class, not bound.
        namespace: names besides those of the function's module: its class', and local ones.
    """
    found = list(_signature(function).parameters.values())[1:]
    return [p.replace(annotation=resolve(p.annotation, function, namespace)) for p in found]


def resolve(annotation: Any, function: Callable[..., Any], namespace: Mapping[str, Any]) -> Any:
    """What *annotation* means where *function* was written."""
    if annotation is inspect.Parameter.empty:
        return annotation
    own = inspect.unwrap(function)
    module = own.__globals__ if isinstance(own, FunctionType) else {}

    def bearer() -> None:
        """Carries the annotation to ``get_type_hints()``, which resolves what is nested too."""

    bearer.__annotations__ = {"it": annotation}
    try:
        return typing.get_type_hints(bearer, module, dict(namespace), include_extras=True)["it"]
    except NameError:
        return Unresolved(getattr(annotation, "__forward_arg__", annotation))


def defining_namespace() -> Mapping[str, Any]:
    """The local names where the class statement stands whose ``__init_subclass__`` calls this.

    Annotations are texts under ``from __future__ import annotations``, and what is defined inside
    of a function, as in a test or a factory, can be found there alone.
    """
    frame = inspect.currentframe()
    frame = frame and frame.f_back
    while frame is not None and frame.f_code.co_name == "__init_subclass__":
        frame = frame.f_back
    return {} if frame is None else frame.f_locals


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    if sys.version_info >= (3, 14):
        from annotationlib import Format

        return inspect.signature(function, annotation_format=Format.FORWARDREF)
    return inspect.signature(function)
