"""softmax, log_softmax and logsumexp in tiles.

Bytes moved: one read of the input and one write of the output.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from portable_softmax import portable
from portable_softmax.kernels._numpy import _maths
from portable_softmax.kernels._numpy._layout import Buffers, Layout
from portable_softmax.kernels._request import Request


def softmax(request: Request, layout: Layout) -> Any:
    """exp(x) / sum(exp(x)), in the range of exp by a shift of `_maths.base`."""

    def work(x: Any, y: Any, _: Any, buffers: Buffers) -> None:
        s = _maths.exps(x, y, layout.axis, buffers, request.options.temperature)
        np.divide(y, s, out=y)

    return layout.fill(request, request.answer_dtype, work)


def log_softmax(request: Request, layout: Layout) -> Any:
    """(x - max) - log1p(rest)."""
    if request.options.temperature != 1.0:
        return _log_softmax_with_temperature(request, layout)
    axis = layout.axis

    def precise(x: Any, y: Any, buffers: Buffers) -> None:
        m, rest = _maths.fold(x, None, axis, buffers)
        np.subtract(x, m, out=y)
        np.subtract(y, np.log1p(rest), out=y)

    def work(x: Any, y: Any, piece: Any, buffers: Buffers) -> None:
        m, rest, _, _, unfit = _maths.plain(x, None, axis, buffers)
        if unfit is None or unfit.size < rest.size:
            np.subtract(x, m, out=y)
            np.subtract(y, np.log1p(rest), out=y)
        if unfit is not None:
            layout.redo(piece, unfit, y, buffers, lambda x, y: precise(x, y, buffers))

    return layout.fill(request, request.answer_dtype, work)


def _log_softmax_with_temperature(request: Request, layout: Layout) -> Any:
    """d - log(sum exp d) with d = (x - max) / temperature, and the portable form in some rows."""
    axis, temperature = layout.axis, request.options.temperature
    # From a sum of 2 on the maximum's 1 costs no digits. Of 1 + C exp(-7) at most 1/e comes from
    # below -8, where the rounding errors of d count.
    enough = 1.0 + max(1.0, layout.x.shape[1] * math.exp(-7.0))

    def precise(x: Any, y: Any) -> None:
        y[...] = portable.log_softmax(np, x, (axis,), temperature=temperature)

    def work(x: Any, y: Any, piece: Any, buffers: Buffers) -> None:
        sums = _maths.Sums()
        for d in _maths.shifted(x, y, axis, temperature):
            e = np.exp(d, out=buffers.take("exps", d.shape))
            sums.add(_maths.total(e, axis, buffers))
        s = sums.get()
        np.subtract(y, np.log(s), out=y)
        unfit = np.flatnonzero(~(s >= enough))
        if unfit.size:
            layout.redo(piece, unfit, y, buffers, precise)

    return layout.fill(request, request.answer_dtype, work)


def fold(request: Request, layout: Layout) -> Any:
    """Max and rest; the axes are kept."""
    found = [np.empty(request.reduced_shape(), layout.compute) for _ in range(2)]
    answers = [a.reshape(layout.shape) for a in found]

    def work(_: int, piece: Any, buffers: Buffers) -> None:
        m, rest = _maths.fold(layout.read(piece, buffers), None, layout.axis, buffers)
        rest = np.where(np.isfinite(m), rest, np.where(m == -np.inf, -1.0, np.nan))
        for answer, part in zip(answers, (m, rest), strict=True):
            layout.positions(answer, piece)[...] = part.reshape(-1)

    layout.run(work)
    m, rest = found
    return m, rest.astype(np.float64, copy=False)


def logsumexp(request: Request, layout: Layout) -> Any:
    """Max + log1p(rest); the axes are kept."""
    out = np.empty(request.reduced_shape(), request.answer_dtype)
    answers, axis = out.reshape(layout.shape), layout.axis

    def work(_: int, piece: Any, buffers: Buffers) -> None:
        x = layout.read(piece, buffers)
        m, rest, _, _, unfit = _maths.plain(x, None, axis, buffers)
        value = (m + np.log1p(rest)).reshape(-1)
        unfit = _maths.near_zero(value, unfit)
        if unfit is not None:
            m, rest = _maths.fold(layout.again(piece, unfit, buffers, x), None, axis, buffers)
            value[unfit] = np.where(np.isinf(m), m, m + np.log1p(rest)).reshape(-1)
        layout.positions(answers, piece)[...] = value

    layout.run(work)
    return out
