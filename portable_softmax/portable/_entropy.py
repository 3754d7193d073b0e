"""Entropy and Kullback-Leibler divergence of softmax distributions, from their logits.

Both are sums of terms that are not negative, so that nothing cancels but what the logits themselves
leave close to each other. With d_j = max - x_j, p_j = exp(-d_j) / (1 + rest) and
u_j = log q_j - log p_j,

    entropy = log1p(rest) + sum_j p_j d_j
    KL      = sum_j p_j (exp(u_j) - 1 - u_j)

The latter is sum_j p_j (log p_j - log q_j), to which sum_j (q_j - p_j) = 0 was added.
"""

from __future__ import annotations

import math
from typing import Any

from portable_softmax._typing import Namespace
from portable_softmax.libraries import constant, scalar
from portable_softmax.portable._state import fold
from portable_softmax.portable._sums import total

Axes = tuple[int, ...]

# exp(u) - 1 - u = u^2 (1/2! + u/3! + u^2/4! + ...), for |u| <= 1 to the last digit of a longdouble.
_SERIES = tuple(1.0 / math.factorial(k) for k in range(22, 1, -1))


def entropy(xp: Namespace, x: Any, axes: Axes) -> Any:
    """Return -sum(p * log(p)) of p = softmax(x), the axes kept with length 1."""
    if any(x.shape[a] == 0 for a in axes):
        return total(xp, x, axes)  # of nothing: 0
    state = fold(xp, x, axes)
    gone = constant(xp, state.exps) == 0
    d = xp.where(gone, scalar(xp, 0.0, x), -state.shifted)
    return state.log + total(xp, state.exps * d, axes) / (1.0 + state.rest)


def kl_divergence(
    xp: Namespace, p_logits: Any, q_logits: Any, axes: Axes, *, temperature: float = 1.0
) -> Any:
    """Return sum(p * (log(p) - log(q))), the axes kept with length 1."""
    if any(p_logits.shape[a] == 0 for a in axes):
        return total(xp, p_logits + q_logits, axes)
    by_p = fold(xp, p_logits, axes, temperature=temperature)
    by_q = fold(xp, q_logits, axes, temperature=temperature)
    p, q = by_p.exps / (1.0 + by_p.rest), by_q.exps / (1.0 + by_q.rest)
    zero, one = scalar(xp, 0.0, p), scalar(xp, 1.0, p)
    gone = constant(xp, p) == 0
    # Where both are -inf the difference is nan, and where p is 0 nothing depends on it.
    q_shifted = xp.where(gone, zero, by_q.shifted)
    u = (q_shifted - xp.where(gone, zero, by_p.shifted)) - (by_q.log - by_p.log)
    u = xp.where(gone, zero, u)
    large = constant(xp, u) > 1.0
    small = p * exp_minus_its_tangent(xp, xp.where(large, one, u))
    terms = xp.where(large, q - p * (1.0 + xp.where(large, u, zero)), small)
    return total(xp, xp.where(gone, q, terms), axes)


def exp_minus_its_tangent(xp: Namespace, u: Any) -> Any:
    """Return exp(u) - 1 - u, for u <= 1."""
    zero = scalar(xp, 0.0, u)
    near = xp.abs(constant(xp, u)) <= 1.0
    v = xp.where(near, u, zero)
    far = xp.where(near, zero, u)
    return xp.where(near, v * v * beyond_its_tangent(xp, v), xp.expm1(far) - far)


def beyond_its_tangent(xp: Namespace, u: Any) -> Any:
    """Return (exp(u) - 1 - u) / u^2, for |u| <= 1."""
    series = scalar(xp, 0.0, u)
    for coefficient in _SERIES:
        series = series * u + coefficient
    return series
