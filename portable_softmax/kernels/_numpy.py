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
from portable_softmax._typing import Namespace

Axes = tuple[int, ...]

# Half of a common 1 MB L2 cache: a tile and the temporaries of one step fit beside each other.
TILE_BYTES = 1 << 18


def softmax(
    xp: Namespace, x: Any, axes: Axes, *, where: Any, temperature: float, compute: Any, answer: Any
) -> Any:
    """Softmax over `axes`, computed in dtype `compute` and returned in dtype `answer`."""
    if where is None and _is_one_tile(x, compute):
        return _softmax_in_place(x, axes, temperature)
    where = None if where is None else np.broadcast_to(where, x.shape)
    out = np.empty(x.shape, answer)
    for cut in _tiles(x, axes, compute):
        tile = x[cut].astype(compute, order="C", copy=False)
        if where is None:
            out[cut] = _softmax_in_place(tile, axes, temperature)
        else:
            out[cut] = portable.softmax(xp, tile, axes, where=where[cut], temperature=temperature)
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


def log_softmax(
    xp: Namespace, x: Any, axes: Axes, *, where: Any, temperature: float, compute: Any, answer: Any
) -> Any:
    """log_softmax over `axes`, computed in dtype `compute` and returned in dtype `answer`."""
    if _is_one_tile(x, compute):
        return portable.log_softmax(xp, x, axes, where=where, temperature=temperature)
    where = None if where is None else np.broadcast_to(where, x.shape)
    out = np.empty(x.shape, answer)
    for cut in _tiles(x, axes, compute):
        tile = x[cut].astype(compute, order="C", copy=False)
        mask = None if where is None else where[cut]
        out[cut] = portable.log_softmax(xp, tile, axes, where=mask, temperature=temperature)
    return out


def logsumexp(xp: Namespace, x: Any, axes: Axes, *, compute: Any, answer: Any) -> Any:
    """Logsumexp over `axes`, kept with length 1."""
    if _is_one_tile(x, compute):
        return portable.logsumexp(xp, x, axes)[0]
    out = np.empty([1 if a in axes else n for a, n in enumerate(x.shape)], answer)
    for cut in _tiles(x, axes, compute):
        tile = x[cut].astype(compute, order="C", copy=False)
        out[cut] = portable.logsumexp(xp, tile, axes)[0]
    return out


def cross_entropy(
    xp: Namespace,
    x: Any,
    target: portable.Target,
    axis: int,
    options: portable.Options,
    *,
    compute: Any,
    answer: Any,
) -> Any:
    """Return the reduced loss, computed in dtype `compute` and returned in dtype `answer`."""
    if _is_one_tile(x, compute):
        return portable.cross_entropy(xp, x, target, axis, options)
    loss = np.empty([1 if a == axis else n for a, n in enumerate(x.shape)], compute)
    for cut, tile, *rest in _positions(x, target, axis, options, compute):
        loss[cut] = np.expand_dims(portable.cross_entropy(xp, tile, *rest), axis)
    return portable.reduced(xp, loss, target, axis, options.reduction).astype(answer)


def cross_entropy_value_and_grad(
    xp: Namespace,
    x: Any,
    target: portable.Target,
    axis: int,
    options: portable.Options,
    *,
    compute: Any,
    answer: Any,
) -> tuple[Any, Any]:
    """Return the reduced loss and its gradient, each tile's scaled while it is in cache."""
    if _is_one_tile(x, compute):
        return portable.cross_entropy_value_and_grad(xp, x, target, axis, options)
    loss = np.empty([1 if a == axis else n for a, n in enumerate(x.shape)], compute)
    grad = np.empty(x.shape, answer)
    divisor = None
    if options.reduction == "mean":
        divisor = portable.nothing_to_inf(xp, portable.mean_divisor(xp, loss, target))
    for cut, tile, *rest in _positions(x, target, axis, options, compute):
        value, slope = portable.cross_entropy_value_and_grad(xp, tile, *rest)
        loss[cut] = np.expand_dims(value, axis)
        grad[cut] = slope if divisor is None else np.divide(slope, divisor, out=slope)
    return portable.reduced(xp, loss, target, axis, options.reduction).astype(answer), grad


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
