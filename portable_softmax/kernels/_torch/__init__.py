"""torch's side of the kernels: memory lent to NumPy, derivatives, and operators to be traced.

The table names this module as the adapter of kernels on tensors; it is imported for a tensor. A
kernel either works on NumPy's arrays, and then a CPU tensor's memory is lent to it without a copy,
or takes tensors themselves (its module says so: ``TENSORS = True``). The first derivative is the
kernel's too, further ones are torch's of the portable formula, see `_autograd`.
"""

from __future__ import annotations

from typing import Any

import torch

from portable_softmax.kernels._request import Request
from portable_softmax.kernels._torch import _autograd, _gradients, _lending, _operators


def declines(engine: Any, request: Request, asked: bool) -> str:
    """Return why a call is not for a kernel; empty if it is."""
    why = "" if request.labels is None else _not_differentiated(request)
    if why:
        return why
    if engine.TENSORS:
        return str(engine.declines(request, asked))
    return _lending.declines(engine, request, asked)


def _not_differentiated(request: Request) -> str:
    """Return what requires a derivative that no kernel gives."""
    if not torch.is_grad_enabled():
        return ""
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
    if request.tracing:
        return _operators.answer(engine.__name__, request)
    if torch.is_grad_enabled() and (
        request.x.requires_grad or (request.dy is not None and request.dy.requires_grad)
    ):
        return _autograd.answer(engine, request)
    return _gradients.value(engine, request)
