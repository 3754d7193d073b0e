"""softmax_vjp and log_softmax_vjp in tiles.

Bytes moved: one read of the output and of the upstream gradient, and one write of the result.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from portable_softmax import portable
from portable_softmax.kernels._numpy import _maths
from portable_softmax.kernels._numpy._layout import Buffers, Layout, chunks
from portable_softmax.kernels._request import Request

# From one confident row in so many on, a tile takes the passes that these need as a whole.
_FEW = 16


def softmax_vjp(request: Request, layout: Layout, upstream: Layout) -> Any:
    """y * (dy - sum(y * dy)), with the digits of confident rows."""
    (out, answers), axis = layout.answers(request, request.result_dtype), layout.axis
    off = request.off_one

    def work(_: int, piece: Any, buffers: Buffers) -> None:
        y, target = layout.read(piece, buffers), layout.view(answers, piece)
        dy = upstream.read(piece, buffers, "upstream")
        dx = target
        if layout.copies:
            dx = dy if upstream.copies else buffers.take("result", y.shape)
        big, found = None, 0
        if not y.max() <= portable.CONFIDENT:
            big = np.greater(y, portable.CONFIDENT, order="C")
            found = int(np.count_nonzero(big))
        if found * _FEW >= y.shape[1 - axis]:
            c = _summed(dy, big, axis, buffers)
            _write(y, dy, _constants(y, c, off, axis, buffers), dx, axis, buffers)
        else:
            some = _confident(y, dy, big, off, axis, buffers) if found else None
            _write(y, dy, None, dx, axis, buffers)
            if some is not None:
                dx[some[0]] = some[1]
        layout.write(dx, target)

    layout.run(work)
    return out


def _write(y: Any, dy: Any, c: Any, dx: Any, axis: int, buffers: Buffers) -> None:
    """Write y * ((dy - c) - sum(y * (dy - c))) to `dx`, which may be `dy`; None is no c."""
    if c is not None:
        dy = np.subtract(dy, c, out=dx)
    np.subtract(dy, _summed(y, dy, axis, buffers), out=dx)
    np.multiply(y, dx, out=dx)


def _summed(a: Any, b: Any, axis: int, buffers: Buffers) -> Any:
    """Return the sums of a * b, or of `a` where `b` is None."""
    sums = _maths.Sums()
    for cut in chunks(a, axis):
        part = a[cut]
        if b is not None:
            part = np.multiply(part, b[cut], out=buffers.take("products", part.shape))
        sums.add(_maths.total(part, axis, buffers))
    return sums.get()


def _constants(y: Any, c: Any, off: float, axis: int, buffers: Buffers) -> Any:
    """Return what is taken off the upstream gradient, 0 in rows that are not those of a softmax."""
    fits = np.isfinite(c) & (np.abs(_summed(y, None, axis, buffers) - 1.0) <= off)
    return np.where(fits, c, 0.0)


def _confident(
    y: Any, dy: Any, big: Any, off: float, axis: int, buffers: Buffers
) -> tuple[Any, Any]:
    """Return where the confident rows of a tile are, and the result for them."""
    at = np.unravel_index(np.flatnonzero(big), y.shape)
    rows = at[1 - axis]
    where = (slice(None), rows) if axis == 0 else rows
    c, y, dy = np.expand_dims(dy[at], axis), y[where], dy[where]
    _write(y, dy, _constants(y, c, off, axis, buffers), dy, axis, buffers)
    return where, dy


def log_softmax_vjp(request: Request, layout: Layout, upstream: Layout, *, masked: bool) -> Any:
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
