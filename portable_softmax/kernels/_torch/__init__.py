"""torch's side of the kernels: memory lent to NumPy, derivatives, and operators to be traced.

The table names this module as the adapter of kernels on tensors; it is imported for a tensor. A
kernel either works on NumPy's arrays, and then a CPU tensor's memory is lent to it without a copy,
or takes tensors themselves (its module says so: ``TENSORS = True``). The first derivative is the
kernel's too, further ones are torch's of the portable formula, see `_autograd`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from portable_softmax.kernels._request import (
    BINARY,
    DIVERGENCES,
    ENTMAX_LOSSES,
    ENTROPIES,
    PARTS,
    PROBABILITIES,
    RUNNING,
    SPARSE,
    Request,
)
from portable_softmax.kernels._torch import (
    _autograd,
    _gradients,
    _lending,
    _operators,
    _sinks,
    _weighted,
)

_GRADIENTS = (ENTROPIES[1], DIVERGENCES[1], BINARY[1], ENTMAX_LOSSES[1], RUNNING[1])


def looks_at(operation: str, dtype: str, active: tuple[str, ...]) -> bool:
    """Return whether `declines` of a call that is not traced depends on more than these."""
    floats = {PROBABILITIES, "weight", "sample_weight"}  # which may require a gradient
    return (
        operation in (*SPARSE, *PARTS, *ENTMAX_LOSSES, *BINARY, *_GRADIENTS)
        or dtype == "bfloat16"
        or not floats.isdisjoint(active)
    )


def declines(engine: Any, request: Request, asked: bool) -> str:
    """Return why a call is not for a kernel; empty if it is."""
    if request.labels is not None and (why := _not_a_kernels(request)):
        return why
    if request.operation in PARTS and torch.is_grad_enabled() and request.x.requires_grad:
        return "a part of rows that is differentiated"
    if request.operation in _GRADIENTS and _is_followed(request):
        return "a gradient that is differentiated again"
    if request.operation in DIVERGENCES and request.dy.dtype is not request.x.dtype:
        return f"dtypes: {request.x.dtype} and {request.dy.dtype}"
    if request.operation in (*SPARSE, *ENTMAX_LOSSES) and (why := _not_of_numbers(request)):
        return why
    if request.tracing:
        found = [name for name in ("sink", "b", "return_sign") if name in request.active]
        if found:
            return f"compiled code with {', '.join(found)}"
    if request.tracing and not _are_numbers(request):
        return "a number that may be another one in the next call"
    if request.tracing and "dtype" in request.active and request.operation == "softmax":
        return "a gradient from an output of another dtype"
    if engine.TENSORS:
        return str(engine.declines(request, asked))
    return _lending.declines(engine, request, asked)


def _is_followed(request: Request) -> bool:
    """Return whether torch records a gradient of a call."""
    given = (request.x, request.dy, getattr(request.options, "sink", None))
    return torch.is_grad_enabled() and any(
        isinstance(t, torch.Tensor) and t.requires_grad for t in given
    )


def _are_numbers(request: Request) -> bool:
    """Return whether no option is a symbol of the compiler; operators take numbers."""
    given = [getattr(request.options, name, None) for name in request.active]
    return all(request.library.is_known(v) for v in given if isinstance(v, float))


def _not_of_numbers(request: Request) -> str:
    """Return why an entmax is torch's to follow."""
    if isinstance(request.options.alpha, torch.Tensor):
        return "an alpha in a tensor"
    if request.dy is not None and _is_followed(request):
        return "a gradient that is differentiated again"
    return ""


def _not_a_kernels(request: Request) -> str:
    """Return what no kernel differentiates, or no operator takes."""
    options = request.options
    if torch.is_grad_enabled():
        names = ("weight", "pos_weight", "sample_weight")
        coefficients = [request.labels, *[getattr(options, name, None) for name in names]]
        if any(t is not None and t.requires_grad for t in coefficients):
            return "labels or weights that require gradients"
        value_and_grad = request.operation == "cross_entropy_value_and_grad"
        if request.tracing and value_and_grad and request.x.requires_grad:
            return "a traced gradient that is differentiated again"
    ignored = getattr(options, "ignore_index", None)
    if request.tracing and ignored is not None and ignored >= 2**63:
        return "an ignore_index of 64 bits"
    return ""


def remark(engine: Any, request: Request) -> str:
    """Return what `explain` says of a call that a kernel takes; empty if nothing."""
    known = hasattr(engine, "remark") and not engine.TENSORS and not request.tracing
    return engine.remark(_lending.on_numpy(request)) if known else ""


def answer(engine: Any, request: Request) -> Any:
    """Return the answer of a call, with its derivatives where torch asks for them."""
    if request.tracing:
        return _operators.answer(engine.__name__, request)
    if "b" in request.active or "return_sign" in request.active:
        return _weighted.answer(engine, request, partial(answer, engine))
    if _is_followed(request):
        if "sink" in request.active:
            return _sinks.answer(engine, request)
        return _autograd.answer(engine, request)
    return _gradients.value(engine, request)
