"""What torch.compile leaves alone, at no cost where nobody compiles."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")


def untraced(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """``function``, which torch.compile neither traces nor looks into.

    ``torch.compiler.disable`` itself imports the compiler, for a second or two of the processor:
    here that is left to whoever compiles.
    """

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        return _disabled(function)(*args, **kwargs)

    return call


def _disabled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    there: dict[str, Any] = function.__dict__
    if "untraced" not in there:
        there["untraced"] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    found: Callable[_P, _T] = there["untraced"]
    return found
