"""logmeanexp from the states of rows, for kernels that fold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from portable_softmax import portable
from portable_softmax.kernels._request import Request

# From this mean on, where its logarithm cancels, rows are left to the portable formula.
_NEAR_ONE = 0.75


def logmeanexp(fold: Callable[[Request], tuple[Any, Any]], request: Request) -> Any:
    """Return max + log((1 + rest) / n) of NumPy's arrays, the axes kept with length 1."""
    x, axes, where = request.x, request.axes, request.options.where
    m, rest = fold(request)
    if where is None:
        n = math.prod([x.shape[a] for a in axes])
    else:
        where = np.broadcast_to(where, x.shape)
        n = np.count_nonzero(where, axis=axes, keepdims=True)
    mean = (rest + 1.0) / n
    value = np.where(np.isinf(m), m, m + np.log(mean)).astype(m.dtype, copy=False)
    if where is not None:
        value[n == 0] = np.nan
    near = (mean >= _NEAR_ONE) & np.isfinite(m)
    if near.any():
        at, some = near.squeeze(axes), [a for a in range(x.ndim) if a not in axes]
        rows = x.transpose(*some, *axes)[at].reshape(np.count_nonzero(at), -1)
        if where is not None:
            where = where.transpose(*some, *axes)[at].reshape(rows.shape)
        rows = rows.astype(m.dtype, copy=False)
        value[near] = portable.logmeanexp(request.xp, rows, (1,), where=where)[:, 0]
    return value.astype(request.result_dtype, copy=False)
