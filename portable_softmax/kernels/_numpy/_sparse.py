"""entmax, sparsemax and the gradient through them, on the entries that may have a probability.

Those further than 1/(alpha - 1) below the maximum have none: one pass finds the maximum and one the
others, which are packed side by side. Then the portable functions take a few entries per row.

Bytes moved: two reads of the input, the second in cache, and a write of the output's entries that
are not 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from portable_softmax import portable
from portable_softmax.kernels._cuts import TILE_BYTES, on_threads
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


def entmax_loss(request: Request) -> Any:
    """Return the reduced loss of class indices; with it the gradient if that is asked for.

    It is made of the entries near the maximum and the label's.
    """
    x, options, axis, compute = request.x, request.options, request.axis, request.compute_dtype
    c = options.alpha - 1.0
    reach = compute.type(1.0 / c if c > 0.0 else math.inf)
    target = request.target()
    of_rows = [None if part is None else part.reshape(-1, 1) for part in target]
    rows = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
    with_grad = request.operation == "entmax_loss_value_and_grad"
    loss = np.empty(len(rows), compute)
    grad = np.zeros(rows.shape, request.result_dtype) if with_grad else None
    divisor = 1.0
    if options.reduction == "mean":
        there = np.empty_like(loss, shape=[n for a, n in enumerate(x.shape) if a != axis])
        divisor = portable.nothing_to_inf(np, portable.mean_divisor(np, there, target))

    def one(piece: slice) -> None:
        tile = rows[piece].astype(compute, order="C", copy=False)
        its = portable.Target(*[None if part is None else part[piece] for part in of_rows])
        m = tile.max(axis=1, keepdims=True)
        mask = tile > np.nextafter(m - reach, compute.type(-math.inf))
        np.put_along_axis(mask, its.index, True, axis=1)
        whole = ~np.isfinite(m) if its.valid is None else ~(np.isfinite(m) & its.valid)
        mask[whole[:, 0]] = True  # whose gradient is nan in every entry
        for part in _parts(mask):
            index = part.places(its.index, tile.shape[1])
            those = portable.Target(index, *[
                None if a is None else a[part.rows] for a in its[1:]
            ])  # fmt: skip
            values, slopes = portable.entmax_loss_value_and_grad(
                np, part.packed(tile, compute.type(-math.inf)), those, 1, options.alpha, "none",
                followed=False,
            )  # fmt: skip
            loss[piece][part.rows] = values
            if grad is not None:
                part.unpack(slopes / divisor, grad[piece])

    step = max(1, TILE_BYTES // (rows.shape[1] * compute.itemsize))
    on_threads(one, portable.cuts(len(rows), step), x.nbytes)
    shape = [1 if a == axis else n for a, n in enumerate(x.shape)]
    value = portable.reduced(np, loss.reshape(shape), target, axis, options.reduction)
    value = np.asarray(value).astype(request.answer_dtype, copy=False)
    if grad is None:
        return value
    there = np.moveaxis(grad.reshape(np.moveaxis(x, axis, -1).shape), -1, axis)
    return value, np.ascontiguousarray(there)


entmax_loss_value_and_grad = entmax_loss


def _pack(
    mask: Any,
    function: Callable[..., Any],
    arrays: tuple[Any, ...],
    fills: tuple[Any, ...],
    out: Any,
) -> None:
    """Write what `function` makes of the entries in a mask, which stand first in shorter rows."""
    for part in _parts(mask):
        packed = (part.packed(*pair) for pair in zip(arrays, fills, strict=True))
        part.unpack(function(*packed), out)


class _Part(NamedTuple):
    """Rows that are packed to one length, and where their entries come from and go to."""

    rows: Any
    width: int
    at: Any  # in the flat array; None for whole rows
    slot: Any  # in the flat packed one

    def packed(self, array: Any, fill: Any) -> Any:
        """Return the rows, `fill` where they are shorter."""
        if self.at is None:
            return array[self.rows]
        some = np.full(len(self.rows) * self.width, fill)
        some[self.slot] = array.reshape(-1)[self.at]
        return some.reshape(-1, self.width)

    def unpack(self, values: Any, out: Any) -> None:
        """Write the entries of packed rows to where they come from."""
        if self.at is None:
            out[self.rows] = values
        else:
            out.reshape(-1)[self.at] = values.reshape(-1)[self.slot]

    def places(self, index: Any, n: int) -> Any:
        """Return where an entry of each row, one that is packed, stands there."""
        if self.at is None:
            return index[self.rows]
        found = np.searchsorted(self.at, self.rows * n + index[self.rows, 0])
        return (self.slot[found] % self.width)[:, None]


def _parts(mask: Any) -> Iterator[_Part]:
    """Yield the rows of a mask by the length that they are packed to.

    That is the next power of two, or their own if it is not half of it: it depends on the row
    alone, and so do the sums.
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
            yield _Part(which, n, None, None)
            continue
        these = slice(None) if len(which) == count else (widths == width)[row]
        place = np.empty(count, np.intp)
        place[which] = np.arange(len(which)) * width
        yield _Part(which, width, flat[these], place[row[these]] + within[these])


def _widths(counts: Any, n: int) -> Any:
    """Return the lengths that rows are packed to."""
    _, exponent = np.frexp(np.maximum(counts, 8) - 0.5)
    widths = np.left_shift(1, exponent)
    return np.where(2 * widths > n, n, widths)
