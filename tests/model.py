"""The documented formulas in NumPy's extended precision, row by row: fast enough for hypothesis.

It shares no code with the package, and knows nothing of shifts: a row is small enough to be
summed as it stands, once its maximum is subtracted.
"""

from __future__ import annotations

import numpy as np

WIDE = np.longdouble


def logsumexp_row(x):
    x = np.asarray(x, WIDE)
    m = x.max() if x.size else WIDE(-np.inf)
    if not np.isfinite(m):
        return m
    with np.errstate(all="ignore"):
        return m + np.log(np.exp(x - m).sum())


def cross_entropy_row(x, t, *, weight, smoothing, z_loss, softcap, mask):
    """Return the loss of one position and its gradient, for a target distribution t."""
    x, t, w = (np.asarray(a, WIDE) for a in (x, t, weight))
    with np.errstate(all="ignore"):
        inner = softcap * np.tanh(x / softcap) if softcap else x
        lse = logsumexp_row(inner[mask]) if not np.isinf(inner[mask]).all() else WIDE(np.nan)
        if np.isposinf(inner[mask]).any():
            lse = WIDE(np.nan)
        q = np.where(mask, w * ((1 - WIDE(smoothing)) * t + WIDE(smoothing) / mask.sum()), 0)
        u = (w * t)[mask].sum()
        gap = lse - inner
        loss = sum((q[j] * gap[j] for j in np.flatnonzero(mask) if q[j] != 0), WIDE(0))
        if np.isnan(lse):  # a nan, an infinity or nothing but -inf makes the row nan
            loss = lse
        if u != 0 and z_loss:
            loss = loss + WIDE(z_loss) * u * lse**2
        grad = np.exp(inner - lse) * (q.sum() + 2 * WIDE(z_loss) * u * lse) - q
        if softcap:
            grad = grad * (1 - np.tanh(x / softcap) ** 2)
        return loss, np.where(mask, grad, 0)
