"""torch's side of the kernels: memory lent to NumPy, derivatives, and operators to be traced.

The table names this module as the adapter of kernels on tensors. A kernel either works on NumPy's
arrays, and then a CPU tensor's memory is lent to it without a copy, or takes tensors themselves
(its module says so: ``TENSORS = True``). The first derivative is the kernel's too, further ones are
torch's of the portable formula, see `_autograd`.

torch is imported by the files beside this one, which are loaded with the first call.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from portable_softmax.kernels._request import Request
from portable_softmax.libraries import traced_as_constant


def declines(engine: Any, request: Request, asked: bool) -> str:
    """Return why a call is not for a kernel; empty if it is."""
    torch: Any = sys.modules["torch"]
    if request.labels is not None and torch.is_grad_enabled():
        if why := _not_differentiated(request):
            return why
    if engine.TENSORS:
        why = engine.declines(request, asked)
    else:
        why = _loaded().lending.declines(engine, request, asked)
    return str(why)


def _not_differentiated(request: Request) -> str:
    """Return what requires a derivative that no kernel gives."""
    if any(t is not None and t.requires_grad for t in (request.labels, request.options.weight)):
        return "labels or weights that require gradients"
    if (
        request.tracing
        and request.x.requires_grad
        and request.operation == "cross_entropy_value_and_grad"
    ):
        return "a traced gradient that is differentiated again"
    return ""


def answer(engine: Any, request: Request) -> Any:
    """Return the answer of a call, with its derivatives where torch asks for them."""
    loaded = _loaded()
    if request.tracing:
        return loaded.operators.answer(engine.__name__, request)
    if sys.modules["torch"].is_grad_enabled() and (
        request.x.requires_grad or (request.dy is not None and request.dy.requires_grad)
    ):
        return loaded.autograd.answer(engine, request)
    return loaded.gradients.value(engine, request)


class _Loaded:
    """The files that import torch."""

    def __init__(self) -> None:
        here = __name__
        self.lending = import_module(f"{here}._lending")
        self.gradients = import_module(f"{here}._gradients")
        self.autograd = import_module(f"{here}._autograd")
        self.operators = import_module(f"{here}._operators")


_LOADED: list[_Loaded] = []


@traced_as_constant
def _loaded() -> Any:
    if not _LOADED:
        _LOADED.append(_Loaded())
    return _LOADED[0]
