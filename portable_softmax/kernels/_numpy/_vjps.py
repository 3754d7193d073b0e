"""softmax_vjp and log_softmax_vjp in tiles.

Bytes moved: one read of the output and of the upstream gradient, and one write of the result.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from portable_softmax import portable
from portable_softmax.kernels._numpy import _maths
from portable_softmax.kernels._numpy._layout import TILE_BYTES, Buffers, Layout, chunks
from portable_softmax.kernels._request import Request

# From one confident row in so many on, a tile takes the passes that these need as a whole.
_FEW = 16


def softmax_vjp(request: Request, layout: Layout, upstream: Layout) -> Any:
    """y * (dy - sum(y * dy)), with the digits of confident rows."""
    (out, answers), axis = layout.answers(request, request.result_dtype), layout.axis
    off = portable.off_one(float(np.finfo(layout.compute).eps), request.rounding)

    def work(_: int, piece: Any, buffers: Buffers) -> None:
        y, target = layout.read(piece, buffers), layout.view(answers, piece)
        dy = upstream.read(piece, buffers, "upstream")
        rows, c = _maths.confident_rows(y, dy, axis)
        dx = target
        if layout.copies:
            own = upstream.copies and not rows.size
            dx = dy if own else buffers.take("result", y.shape)
        few = rows.size * _FEW < y.shape[1 - axis]
        if few:
            _of_tile(y, dy, None, dx, axis, buffers)
            if rows.size:
                _again(y, dy, rows, c, off, dx, axis, buffers)
        else:
            every = np.zeros(y.shape[1 - axis], y.dtype)
            every[rows] = c
            _of_tile(y, dy, _constants(y, every, off, axis, buffers), dx, axis, buffers)
        layout.write(dx, target)

    layout.run(work)
    return out


def _of_tile(y: Any, dy: Any, c: Any, dx: Any, axis: int, buffers: Buffers) -> None:
    """Write y * ((dy - c) - sum(y * (dy - c))) to `dx`, which may be `dy`; None is no c."""
    if c is not None:
        dy = np.subtract(dy, c, out=dx)
    sums = _maths.Sums()
    for cut in chunks(y, axis):
        part = y[cut]
        products = np.multiply(part, dy[cut], out=buffers.take("products", part.shape))
        sums.add(_maths.total(products, axis, buffers))
    np.subtract(dy, sums.get(), out=dx)
    np.multiply(y, dx, out=dx)


def _constants(y: Any, c: Any, off: float, axis: int, buffers: Buffers) -> Any:
    """Return what is taken off the upstream gradient, 0 in rows that are not those of a softmax."""
    sums = _maths.Sums()
    for cut in chunks(y, axis):
        sums.add(_maths.total(y[cut], axis, buffers))
    c = np.expand_dims(c, axis)
    return np.where(np.isfinite(c) & (np.abs(sums.get() - 1.0) <= off), c, 0.0)


def _again(
    y: Any, dy: Any, rows: Any, c: Any, off: float, dx: Any, axis: int, buffers: Buffers
) -> None:
    """Write the confident rows of a tile anew, so many at once as are the size of a tile."""
    step = max(1, TILE_BYTES // (y.shape[axis] * y.itemsize))
    for start in range(0, rows.size, step):
        some = rows[start : start + step]
        at = (slice(None), some) if axis == 0 else some
        shape = (y.shape[0], some.size) if axis == 0 else (some.size, y.shape[1])
        part, of = (
            np.take(a, some, 1 - axis, out=buffers.take(name, shape), mode="clip")
            for name, a in (("confident", y), ("its upstream", dy))
        )
        less = _constants(part, c[start : start + step], off, axis, buffers)
        _of_tile(part, of, less, of, axis, buffers)
        dx[at] = of


def log_softmax_vjp(
    request: Request, layout: Layout, upstream: Layout, *, masked: bool = True
) -> Any:
    """dy - exp(log_y) * sum(dy), and if entries are masked where log_y is not -inf."""
    axis = layout.axis

    def work(log_y: Any, dx: Any, piece: Any, buffers: Buffers) -> None:
        dy = upstream.read(piece, buffers, "upstream")
        if masked and not (log_y.min() > -math.inf and log_y.max() < math.inf):
            # A masked entry stays at -inf for every logit: nothing flows to it, or from it.
            kept = buffers.take("kept", dy.shape)
            np.copyto(kept, dy)
            np.copyto(kept, 0.0, where=np.isinf(log_y))
            dy = kept
        sums = _maths.Sums()
        for cut in chunks(dy, axis):
            sums.add(_maths.total(dy[cut], axis, buffers))
        s = sums.get()
        confident = _maths.confident(log_y, dy)  # before `dx`, which may be either, is written
        np.exp(log_y, out=dx)
        np.multiply(dx, s, out=dx)
        np.subtract(dy, dx, out=dx)
        _maths.mend(dx, s, confident)

    return layout.fill(request, request.result_dtype, work)
