"""softmax, log_softmax and logsumexp in tiles.

Bytes moved: one read of the input and one write of the output.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from portable_softmax.kernels._request import Request
from portable_softmax.kernels._numpy import _maths
from portable_softmax.kernels._numpy._layout import Buffers, Layout


def softmax(request: Request, layout: Layout) -> Any:
    """exp(x - max) / sum(exp(x - max))."""
    out = np.empty(request.x.shape, request.result_dtype)
    answers, axis = out.reshape(layout.x.shape), layout.axis

    def work(_: int, piece: Any, buffers: Buffers) -> None:
        x, target = layout.read(piece, buffers), layout.view(answers, piece)
        y = x if layout.copies else target
        s = _maths.exps(x, y, axis, buffers, request.options.temperature)
        np.divide(y, s, out=y)
        layout.write(y, target)

    layout.run(work)
    return out


def log_softmax(request: Request, layout: Layout) -> Any:
    """(x - max) - log1p(rest)."""
    out = np.empty(request.x.shape, request.result_dtype)
    answers, axis = out.reshape(layout.x.shape), layout.axis

    def precise(x: Any, y: Any, buffers: Buffers) -> None:
        m, rest = _maths.fold(x, None, axis, buffers, request.options.temperature)
        np.subtract(x, m, out=y)
        if request.options.temperature != 1.0:
            np.divide(y, request.options.temperature, out=y)
        np.subtract(y, np.log1p(rest), out=y)

    def work(_: int, piece: Any, buffers: Buffers) -> None:
        x, target = layout.read(piece, buffers), layout.view(answers, piece)
        y = x if layout.copies else target
        if request.options.temperature != 1.0:
            everything = np.arange(x.shape[1 - axis])
            layout.redo(piece, everything, y, buffers, lambda x, y: precise(x, y, buffers))
        else:
            m, rest, _, unfit = _maths.plain(x, None, axis, buffers)
            if unfit is None or unfit.size < rest.size:
                np.subtract(x, m, out=y)
                np.subtract(y, np.log1p(rest), out=y)
            if unfit is not None:
                layout.redo(piece, unfit, y, buffers, lambda x, y: precise(x, y, buffers))
        layout.write(y, target)

    layout.run(work)
    return out


def logsumexp(request: Request, layout: Layout) -> Any:
    """Max + log1p(rest); the axes are kept."""
    shape = [1 if a in request.axes else n for a, n in enumerate(request.x.shape)]
    out = np.empty(shape, request.result_dtype)
    answers, axis = out.reshape(layout.shape), layout.axis

    def work(_: int, piece: Any, buffers: Buffers) -> None:
        x = layout.read(piece, buffers)
        m, rest, _, unfit = _maths.plain(x, None, axis, buffers)
        value = (m + np.log1p(rest)).reshape(-1)
        unfit = _maths.near_zero(value, unfit)
        if unfit is not None:
            m, rest = _maths.fold(layout.again(piece, unfit, buffers, x), None, axis, buffers)
            value[unfit] = np.where(np.isinf(m), m, m + np.log1p(rest)).reshape(-1)
        layout.positions(answers, piece)[...] = value

    layout.run(work)
    return out
