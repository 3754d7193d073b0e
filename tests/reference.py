"""Exact answers: the documented formulas in 250 digits, sharing no code with the package."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from mpmath import mp, mpf

mp.dps = 250  # x - logsumexp(x) of a row with margin 300 cancels 130 of them


def exact(values) -> list:
    return [mpf(float(v)) for v in values]


def logsumexp(row: Sequence) -> mpf:
    return mp.log(mp.fsum(mp.exp(v) for v in row))


def softmax(row: Sequence) -> list:
    s = mp.fsum(mp.exp(v) for v in row)
    return [mp.exp(v) / s for v in row]


def log_softmax(row: Sequence) -> list:
    lse = logsumexp(row)
    return [v - lse for v in row]


def cross_entropy_row(x, t, w, e, z, cap, mask):
    """Return loss and gradient of one position, from the formulas in the docstring.

    `t` is the target distribution, `w` the class weights, `e` the label smoothing, `z` the weight
    of the squared logsumexp, `cap` the softcap or None, `mask` which classes take part.
    """
    n = len(x)
    inside = [j for j in range(n) if mask[j]]
    capped = [cap * mp.tanh(v / cap) if cap else v for v in x]
    lse = logsumexp([capped[j] for j in inside])
    q = {j: w[j] * ((1 - e) * t[j] + e / len(inside)) for j in inside}
    u = mp.fsum(w[j] * t[j] for j in inside)
    loss = mp.fsum(q[j] * (lse - capped[j]) for j in inside) + z * u * lse**2
    total = mp.fsum(q.values())
    grad = [mpf(0)] * n
    for j in inside:
        p = mp.exp(capped[j] - lse)
        grad[j] = p * (total + 2 * z * u * lse) - q[j]
        if cap:
            grad[j] *= 1 - mp.tanh(x[j] / cap) ** 2
    return loss, grad


def ulps(actual: np.ndarray, expected: Sequence) -> float:
    """Return the largest error in units in the last place of `actual`'s dtype; inf for a nan."""
    worst = 0.0
    for a, e in zip(np.ravel(actual), expected, strict=True):
        nearest = np.asarray(float(e), dtype=np.asarray(actual).dtype)
        unit = float(np.spacing(np.abs(nearest)))
        error = 0.0 if float(a) == e else float(abs(mpf(float(a)) - e) / unit)
        worst = error if error >= worst else worst if error < worst else math.inf
    return worst
