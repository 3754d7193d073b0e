"""softmax, log_softmax and logsumexp in tiles.

Bytes moved: one read of the input and one write of the output.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from portable_softmax.kernels._calls import RowsCall
from portable_softmax.kernels._numpy import _maths
from portable_softmax.kernels._numpy._layout import Buffers, Layout


def softmax(call: RowsCall, layout: Layout) -> Any:
    """exp(x - max) / sum(exp(x - max))."""
    out = np.empty(call.x.shape, call.answer)
    answers, axis = out.reshape(layout.x.shape), layout.axis

    def work(_: int, piece: Any, buffers: Buffers) -> None:
        x, target = layout.read(piece, buffers), layout.view(answers, piece)
        y = x if layout.copies else target
        s = _maths.exps(x, _maths.maximum(x, axis), y, axis, buffers, call.temperature)
        np.divide(y, s, out=y)
        if layout.copies:
            np.copyto(target, y, casting="unsafe")

    layout.run(work)
    return out


def log_softmax(call: RowsCall, layout: Layout) -> Any:
    """(x - max) - log(sum), or precisely where that would lose digits."""
    out = np.empty(call.x.shape, call.answer)
    answers, axis, n = out.reshape(layout.x.shape), layout.axis, layout.x.shape[1]

    def precise(x: Any, y: Any, buffers: Buffers) -> None:
        m, rest = _maths.fold(x, None, axis, buffers, call.temperature)
        np.subtract(x, m, out=y)
        if call.temperature != 1.0:
            np.divide(y, call.temperature, out=y)
        np.subtract(y, np.log1p(rest), out=y)

    def work(_: int, piece: Any, buffers: Buffers) -> None:
        x, target = layout.read(piece, buffers), layout.view(answers, piece)
        y = x if layout.copies else target
        if call.temperature != 1.0:
            everything = np.arange(x.shape[1 - axis])
            layout.redo(piece, everything, y, buffers, lambda x, y: precise(x, y, buffers))
        else:
            s = _maths.differences_and_sum(x, _maths.maximum(x, axis), y, axis, buffers)
            unfit = _maths.unfit(s, n)
            if unfit is None or unfit.size < s.size:
                np.subtract(y, np.log(s), out=y)
            if unfit is not None:
                layout.redo(piece, unfit, y, buffers, lambda x, y: precise(x, y, buffers))
        if layout.copies:
            np.copyto(target, y, casting="unsafe")

    layout.run(work)
    return out


def logsumexp(call: RowsCall, layout: Layout) -> Any:
    """Max + log(sum), or precisely where that would lose digits; the axes are kept."""
    shape = [1 if a in call.axes else n for a, n in enumerate(call.x.shape)]
    out = np.empty(shape, call.answer)
    answers, axis, n = out.reshape(layout.shape), layout.axis, layout.x.shape[1]

    def work(_: int, piece: Any, buffers: Buffers) -> None:
        x = layout.read(piece, buffers)
        m = _maths.maximum(x, axis)
        s = _maths.sum_of_exps(x, m, axis, buffers)
        value = (m + np.log(s)).reshape(-1)
        unfit = _maths.unfit_logsumexp(s, value, n)
        if unfit is not None:
            m, rest = _maths.fold(layout.again(piece, unfit, buffers), None, axis, buffers)
            value[unfit] = np.where(np.isinf(m), m, m + np.log1p(rest)).reshape(-1)
        layout.positions(answers, piece)[...] = value

    layout.run(work)
    return out
