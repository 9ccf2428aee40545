"""Signatures for ``help()`` and editors that list the keyword arguments a method passes on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from scm_runtime.inputs.arguments import DEFAULTS, BatchArguments

Function = TypeVar("Function", bound=Callable[..., Any])


def lists_arguments(kind: type[BatchArguments]) -> Callable[[Function], Function]:
    """Decorator: show the fields of ``kind`` instead of ``**arguments: Unpack[kind]``."""
    fields = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=DEFAULTS.get(name),
            annotation=getattr(annotation, "__forward_arg__", annotation),  # as it is written
        )
        for name, annotation in kind.__annotations__.items()
    ]

    def decorate(function: Function) -> Function:
        list_keywords(function, fields)
        return function

    return decorate


def list_keywords(function: Callable[..., Any], keywords: Iterable[inspect.Parameter]) -> None:
    """Show keyword arguments in a function's signature in place of ``**arguments``."""
    signature = inspect.signature(function)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    others = [parameter for parameter in keywords if parameter.name not in signature.parameters]
    function.__signature__ = signature.replace(parameters=[*own, *others])  # type: ignore[attr-defined]  # a function has any attribute
