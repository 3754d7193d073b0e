"""NumPy in row tiles: every pass but the first finds its tile in cache.

The portable mathematics walks an array once for each operation, which is fine in cache and slow
in memory. So the array is cut along its longest batch axis, and each piece is worked on as a
whole. `softmax` has its passes written out in place as well; the others are the portable
functions on tiles. Bytes moved: one read of the input and one write of the output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from portable_softmax import portable
from portable_softmax.kernels._calls import Call, LossCall, RowsCall

Axes = tuple[int, ...]

# Half of a common 1 MB L2 cache: a tile and the temporaries of one step fit beside each other.
TILE_BYTES = 1 << 18


def missing() -> str:
    """Return what has to be installed: nothing."""
    return ""


def refusal(call: Call) -> str:
    """Return why a call is not for tiles: every one is that reduces something."""
    return "" if getattr(call, "axes", True) else "no axis to reduce"


def softmax(call: RowsCall) -> Any:
    """Softmax over the axes."""
    x, axes, compute = call.x, call.axes, call.compute
    if call.where is None and _is_one_tile(x, compute):
        return _softmax_in_place(x, axes, call.temperature)
    where = None if call.where is None else np.broadcast_to(call.where, x.shape)
    out = np.empty(x.shape, call.answer)
    for cut in _tiles(x, axes, compute):
        tile = x[cut].astype(compute, order="C", copy=False)
        if where is None:
            out[cut] = _softmax_in_place(tile, axes, call.temperature)
        else:
            out[cut] = portable.softmax(
                np, tile, axes, where=where[cut], temperature=call.temperature
            )
    return out


def _softmax_in_place(x: Any, axes: Axes, temperature: float) -> Any:
    axis = axes if len(axes) > 1 else axes[0]
    # An array even where the maximum of a 1-d row is a scalar, so that `out` can be written.
    e = np.subtract(x, np.maximum.reduce(x, axis=axis, keepdims=True))
    if temperature != 1.0:
        np.divide(e, temperature, out=e)
    np.exp(e, out=e)
    # Along contiguous rows NumPy sums pairwise by itself.
    if axis == x.ndim - 1:
        s = np.add.reduce(e, axis=axis, keepdims=True)
    else:
        s = portable.total(np, e, axes)
    return np.divide(e, s, out=e)


def log_softmax(call: RowsCall) -> Any:
    """log_softmax over the axes."""
    x, axes, compute = call.x, call.axes, call.compute
    options = {"temperature": call.temperature}
    if _is_one_tile(x, compute):
        return portable.log_softmax(np, x, axes, where=call.where, **options)
    where = None if call.where is None else np.broadcast_to(call.where, x.shape)
    out = np.empty(x.shape, call.answer)
    for cut in _tiles(x, axes, compute):
        tile = x[cut].astype(compute, order="C", copy=False)
        mask = None if where is None else where[cut]
        out[cut] = portable.log_softmax(np, tile, axes, where=mask, **options)
    return out


def logsumexp(call: RowsCall) -> Any:
    """Logsumexp over the axes, kept with length 1."""
    x, axes, compute = call.x, call.axes, call.compute
    if _is_one_tile(x, compute):
        return portable.logsumexp(np, x, axes, where=call.where)[0]
    where = None if call.where is None else np.broadcast_to(call.where, x.shape)
    out = np.empty([1 if a in axes else n for a, n in enumerate(x.shape)], call.answer)
    for cut in _tiles(x, axes, compute):
        tile = x[cut].astype(compute, order="C", copy=False)
        mask = None if where is None else where[cut]
        out[cut] = portable.logsumexp(np, tile, axes, where=mask)[0]
    return out


def cross_entropy(call: LossCall) -> Any:
    """Return the reduced loss."""
    x, axis, options, compute = call.x, call.axis, call.options, call.compute
    target = call.target()
    if _is_one_tile(x, compute):
        return portable.cross_entropy(np, x, target, axis, options)
    loss = np.empty([1 if a == axis else n for a, n in enumerate(x.shape)], compute)
    for cut, tile, *rest in _positions(x, target, axis, options, compute):
        loss[cut] = np.expand_dims(portable.cross_entropy(np, tile, *rest), axis)
    return portable.reduced(np, loss, target, axis, options.reduction).astype(call.answer)


def cross_entropy_value_and_grad(call: LossCall) -> tuple[Any, Any]:
    """Return the reduced loss and its gradient, each tile's scaled while it is in cache."""
    x, axis, options, compute = call.x, call.axis, call.options, call.compute
    target = call.target()
    if _is_one_tile(x, compute):
        return portable.cross_entropy_value_and_grad(np, x, target, axis, options)
    loss = np.empty([1 if a == axis else n for a, n in enumerate(x.shape)], compute)
    grad = np.empty(x.shape, call.answer)
    divisor = None
    if options.reduction == "mean":
        divisor = portable.nothing_to_inf(np, portable.mean_divisor(np, loss, target))
    for cut, tile, *rest in _positions(x, target, axis, options, compute):
        value, slope = portable.cross_entropy_value_and_grad(np, tile, *rest)
        loss[cut] = np.expand_dims(value, axis)
        grad[cut] = slope if divisor is None else np.divide(slope, divisor, out=slope)
    return portable.reduced(np, loss, target, axis, options.reduction).astype(call.answer), grad


def _positions(
    x: Any, target: portable.Target, axis: int, options: portable.Options, compute: Any
) -> Iterator[tuple[Any, ...]]:
    """Yield the cuts of a loss, each with the arguments of the portable function on it."""
    where = None if options.where is None else np.broadcast_to(options.where, x.shape)
    for cut in _tiles(x, (axis,), compute):
        tile = x[cut].astype(compute, order="C", copy=False)
        there = portable.Target(*(None if part is None else part[cut] for part in target))
        unreduced = options._replace(reduction="none", where=None if where is None else where[cut])
        yield cut, tile, there, axis, unreduced


def _is_one_tile(x: Any, compute: Any) -> bool:
    """Return whether `x` can be worked on as it is: small, in rows, and of the right dtype."""
    return bool(x.nbytes <= TILE_BYTES and x.dtype == compute and x.flags.c_contiguous)


def _tiles(x: Any, axes: Axes, compute: Any) -> Iterator[tuple[slice, ...]]:
    """Yield the cuts of `x` along its longest batch axis, each of about `TILE_BYTES`."""
    batch = [a for a in range(x.ndim) if a not in axes]
    if not batch or x.size == 0:
        yield (slice(None),) * x.ndim
        return
    axis = max(batch, key=lambda a: x.shape[a])
    n = x.shape[axis]
    step = max(1, TILE_BYTES * n // (x.size * compute.itemsize))
    pieces = math.ceil(n / step)
    for i in range(pieces):
        cut = slice(i * step, min((i + 1) * step, n))
        yield (*(slice(None),) * axis, cut, *(slice(None),) * (x.ndim - axis - 1))
