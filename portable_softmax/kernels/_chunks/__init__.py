"""Chunks: a call on a lazy array is answered chunk by chunk, when somebody computes.

Where a chunk holds whole rows it is a call of its own: one task, that takes the kernel which the
chunk's library takes for it (`_calls`). Where rows are cut into several chunks, each is folded into
its state, the states merge in a tree, and a second task per chunk finishes it (`_parts`, `_losses`,
`_linear`); these work on tiles that fit in cache, so that a task needs little memory beside its
chunk and its answer.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from portable_softmax import portable
from portable_softmax.kernels._chunks import _calls, _linear, _losses, _parts
from portable_softmax.kernels._request import LOSSES, ROWS, VJPS, Request

IN_PARTS = (*ROWS, *VJPS, *LOSSES)  # the operations that take a row in several chunks


def missing() -> str:
    """Return what has to be installed: nothing."""
    return ""


def declines(request: Request, asked: bool) -> str:
    """Return why a call is left to operations on whole lazy arrays."""
    library: Any = request.library
    options = request.options
    if not hasattr(options, "classifier") and not _calls.whole_rows(request):
        if request.operation not in IN_PARTS:
            return "rows in several chunks"
        if request.operation == "logsumexp" and (options.b is not None or options.return_sign):
            return "signed terms in several chunks"
        if library.dtype(request.compute_dtype).kind != "real":
            return "complex rows in several chunks"
    return ""


def _rows(request: Request) -> Any:
    library: Any = request.library
    axes, every = request.axes, _calls.every(request)
    if not _calls.whole_rows(request):
        return _parts.rows(request)
    given, dtype = _calls.numbers(request), request.answer_dtype
    if request.operation in ("softmax", "log_softmax"):
        return _calls.on_each(request, every, given, dtype=dtype)
    given["keepdims"] = True
    if not request.options.return_sign:
        return _calls.on_each(request, every, given, dtype=dtype, ones=axes)
    # The logarithm of a complex sum's absolute value is real.
    both = library.xp.finfo(dtype).dtype, dtype
    found = _calls.on_each(request, every, given, dtype=both, ones=axes)
    return tuple(
        library.each_chunk(itemgetter(i), every, (found, every), dtype=one, ones=axes)
        for i, one in enumerate(both)
    )


def _vjps(request: Request) -> Any:
    return _alike(request) if _calls.whole_rows(request) else _parts.vjps(request)


def _alike(request: Request) -> Any:
    """Return what has the shape of `x`."""
    given = _calls.numbers(request)
    if request.operation == "sparsemax":
        del given["alpha"]
    return _calls.on_each(request, _calls.every(request), given, dtype=request.result_dtype)


softmax = log_softmax = logsumexp = logmeanexp = _rows
softmax_vjp = log_softmax_vjp = _vjps
entmax = sparsemax = entmax_vjp = logcumsumexp = logcumsumexp_vjp = _alike


def entropy(request: Request) -> Any:
    """Return the entropy."""
    out, given = _calls.positions(request), _calls.numbers(request)
    return _calls.on_each(request, out, given, dtype=request.result_dtype)


def entropy_value_and_grad(request: Request) -> tuple[Any, Any]:
    """Return the entropy and its gradient."""
    library: Any = request.library
    every, given, dtype = _calls.every(request), _calls.numbers(request), request.result_dtype
    if library.stores_chunks:  # not arrays of two shapes
        grad = _calls.on_each(request, every, given, itemgetter(1), dtype=dtype)
        return entropy(request._replace(operation="entropy")), grad
    both = _calls.on_each(request, every, given, dtype=dtype)
    value = library.each_chunk(_value, _calls.positions(request), (both, every), dtype=dtype)
    return value, library.each_chunk(itemgetter(1), every, (both, every), dtype=dtype)


def _value(both: Any) -> Any:
    return _calls.chunk(both)[0]


def _loss(request: Request) -> Any:
    """Return the reduced loss, and its gradients if the operation asks for them."""
    whole = _calls.whole_rows(request)
    found = _losses.whole(request) if whole else _losses.in_parts(request)
    return found if request.operation.endswith("_grad") else found[0]


cross_entropy = entmax_loss = kl_divergence = _loss
cross_entropy_value_and_grad = entmax_loss_value_and_grad = kl_divergence_value_and_grad = _loss


def linear_cross_entropy(request: Request) -> Any:
    """Return the reduced loss."""
    return _linear.answer(request)[0]


def linear_cross_entropy_value_and_grad(request: Request) -> tuple[Any, portable.Gradients]:
    """Return the reduced loss and the gradients of its sum."""
    return _linear.answer(request)
