"""softmax_vjp and log_softmax_vjp in tiles.

Bytes moved: one read of the output and of the upstream gradient, and one write of the result.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from portable_softmax.kernels._numpy import _maths
from portable_softmax.kernels._numpy._layout import Buffers, Layout, chunks
from portable_softmax.kernels._request import Request


def softmax_vjp(request: Request, layout: Layout, upstream: Layout) -> Any:
    """y * (dy - sum(y * dy))."""
    (out, answers), axis = layout.answers(request, request.result_dtype), layout.axis

    def work(_: int, piece: Any, buffers: Buffers) -> None:
        y, target = layout.read(piece, buffers), layout.view(answers, piece)
        dy = upstream.read(piece, buffers, "upstream")
        dx = target
        if layout.copies:
            dx = dy if upstream.copies else buffers.take("result", y.shape)
        sums = _maths.Sums()
        for cut in chunks(y, axis):
            part = y[cut]
            products = np.multiply(part, dy[cut], out=buffers.take("products", part.shape))
            sums.add(_maths.total(products, axis, buffers))
        np.subtract(dy, sums.get(), out=dx)
        np.multiply(y, dx, out=dx)
        layout.write(dx, target)

    layout.run(work)
    return out


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
