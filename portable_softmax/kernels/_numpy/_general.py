"""Any other call: the portable functions on tiles, every pass but the first in cache.

The array is cut along its longest batch axis, and each piece is worked on as a whole.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from portable_softmax import portable
from portable_softmax.kernels._cuts import Cut, on_cuts
from portable_softmax.kernels._request import Request


def rows(request: Request) -> Any:
    """softmax, log_softmax and logsumexp, the last with its axes kept."""
    x, axes, compute = request.x, request.axes, request.compute_dtype
    where = (
        None if request.options.where is None else np.broadcast_to(request.options.where, x.shape)
    )
    kept = request.operation != "logsumexp"
    shape = [n if kept or a not in axes else 1 for a, n in enumerate(x.shape)]
    out = np.empty(shape, request.answer_dtype) if request.out is None else request.out

    def work(cut: Cut) -> None:
        tile = x[cut].astype(compute, order="C", copy=False)
        mask = None if where is None else where[cut]
        if request.operation == "logsumexp":
            out[cut] = portable.logsumexp(np, tile, axes, where=mask)[0]
        else:
            function = getattr(portable, request.operation)
            out[cut] = function(np, tile, axes, where=mask, temperature=request.options.temperature)

    on_cuts(work, x, axes, compute)
    return out


def losses(request: Request) -> tuple[Any, Any]:
    """Return the reduced loss, and its gradient or None; a mean's is scaled while in cache."""
    x, axis, options, compute = request.x, request.axis, request.options, request.compute_dtype
    target = request.target()
    with_grad = request.operation == "cross_entropy_value_and_grad"
    where = None if options.where is None else np.broadcast_to(options.where, x.shape)
    loss = np.empty([1 if a == axis else n for a, n in enumerate(x.shape)], compute)
    grad = request.out
    if with_grad and grad is None:
        grad = np.empty(x.shape, request.result_dtype)
    divisor = None
    if options.reduction == "mean":
        divisor = portable.nothing_to_inf(np, portable.mean_divisor(np, loss, target))

    def work(cut: Cut) -> None:
        tile = x[cut].astype(compute, order="C", copy=False)
        there = portable.Target(*(None if part is None else part[cut] for part in target))
        unreduced = options._replace(reduction="none", where=None if where is None else where[cut])
        if grad is None:
            value = portable.cross_entropy(np, tile, there, axis, unreduced)
        else:
            value, slope = portable.cross_entropy_value_and_grad(np, tile, there, axis, unreduced)
            grad[cut] = slope if divisor is None else np.divide(slope, divisor, out=slope)
        loss[cut] = np.expand_dims(value, axis)

    on_cuts(work, x, (axis,), compute)
    return portable.reduced(np, loss, target, axis, options.reduction).astype(
        request.answer_dtype
    ), grad
