"""entmax, sparsemax and the gradient through them, on the entries that may have a probability.

Those further than 1/(alpha - 1) below the maximum have none: one pass finds the maximum and one the
others, which are packed side by side. Then the portable functions take a few entries per row.

Bytes moved: two reads of the input, the second in cache, and a write of the output's entries that
are not 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from portable_softmax import portable
from portable_softmax.kernels._numpy._layout import TILE_BYTES, on_threads
from portable_softmax.kernels._request import Request

# Shorter rows are not worth packing: timeit sparsemax on rows of 128 to 1024.
_PACKED = 256


def entmax(request: Request) -> Any:
    """Probabilities of which many are exactly 0."""
    alpha, compute = request.options.alpha, request.compute_dtype
    c = float(alpha) - 1.0
    reach = compute.type(1.0 / c if c > 0.0 else math.inf)

    def by_formula(x: Any) -> Any:
        return portable.entmax(np, x, (1,), alpha=alpha, followed=False)

    def work(x: Any, y: Any) -> None:
        if x.shape[1] < _PACKED or reach == math.inf:
            y[...] = by_formula(x)
            return
        m = x.max(axis=1)
        # One number below: no rounding leaves out an entry.
        least = np.nextafter(m - reach, compute.type(-math.inf))
        _pack(x > least[:, None], by_formula, (x,), (compute.type(-math.inf),), y)
        y[~np.isfinite(m)] = math.nan

    return _row_by_row(request, (request.x,), work)


def entmax_vjp(request: Request) -> Any:
    """g * (dy - sum(g * dy) / sum(g)), of the entries that are not 0."""
    zero = request.compute_dtype.type(0)

    def by_formula(y: Any, dy: Any) -> Any:
        return portable.entmax_vjp(np, y, dy, (1,), alpha=request.options.alpha)

    def work(y: Any, dy: Any, dx: Any) -> None:
        if y.shape[1] < _PACKED:
            dx[...] = by_formula(y, dy)
        else:
            _pack(y != 0, by_formula, (y, dy), (zero, zero), dx)

    return _row_by_row(request, (request.x, request.dy), work)


def _row_by_row(request: Request, arrays: tuple[Any, ...], work: Callable[..., None]) -> Any:
    """Return what `work` writes of tiles of rows, the classes last, into zeros."""
    axes, shape, compute = request.axes, request.x.shape, request.compute_dtype
    last = tuple(range(len(shape) - len(axes), len(shape)))
    n = math.prod(shape[a] for a in axes)
    rows = [np.moveaxis(a, axes, last).reshape(-1, n) for a in arrays]
    out = np.zeros(rows[0].shape, request.result_dtype)

    def one(piece: slice) -> None:
        tiles = [a[piece].astype(compute, order="C", copy=False) for a in rows]
        work(*tiles, out[piece])

    step = max(1, TILE_BYTES // (n * compute.itemsize))
    on_threads(one, portable.cuts(len(out), step), request.x.nbytes)
    kept = [length for a, length in enumerate(shape) if a not in axes]
    there = out.reshape(*kept, *(shape[a] for a in axes))
    return np.ascontiguousarray(np.moveaxis(there, last, axes))


def _pack(
    mask: Any,
    function: Callable[..., Any],
    arrays: tuple[Any, ...],
    fills: tuple[Any, ...],
    out: Any,
) -> None:
    """Write what `function` makes of the entries in a mask, which stand first in shorter rows.

    The length of a row's is the next power of two, or its own if that is not half of it: it depends
    on the row alone, and so do the sums.
    """
    count, n = mask.shape
    flat = np.flatnonzero(mask)
    row = flat // n
    counts = np.bincount(row, minlength=count)
    widths = _widths(counts, n)
    within = np.arange(len(flat)) - (np.cumsum(counts) - counts)[row]
    for width in np.unique(widths).tolist():
        which = np.flatnonzero(widths == width)
        if width == n:
            out[which] = function(*(a[which] for a in arrays))
            continue
        these = slice(None) if len(which) == count else (widths == width)[row]
        at = flat[these]
        place = np.empty(count, np.intp)
        place[which] = np.arange(len(which)) * width
        slot = place[row[these]] + within[these]
        packed = []
        for array, fill in zip(arrays, fills, strict=True):
            some = np.full(len(which) * width, fill)
            some[slot] = array.reshape(-1)[at]
            packed.append(some.reshape(-1, width))
        out.reshape(-1)[at] = function(*packed).reshape(-1)[slot]


def _widths(counts: Any, n: int) -> Any:
    """Return the lengths that rows are packed to."""
    _, exponent = np.frexp(np.maximum(counts, 8) - 0.5)
    widths = np.left_shift(1, exponent)
    return np.where(2 * widths > n, n, widths)
