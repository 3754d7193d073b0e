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

from portable_softmax import libraries
from portable_softmax._typing import Namespace
from portable_softmax.libraries import constant, scalar
from portable_softmax.portable._cross_entropy import (
    EVERY,
    mean_divisor,
    nothing_to_inf,
    reduced,
)
from portable_softmax.portable._divisor import divided
from portable_softmax.portable._state import State, fold
from portable_softmax.portable._sums import total

Axes = tuple[int, ...]

# exp(u) - 1 - u = u^2 (1/2! + u/3! + u^2/4! + ...), for |u| <= 1 to the last digit of a longdouble.
_SERIES = tuple(1.0 / math.factorial(k) for k in range(2, 23))


def entropy(xp: Namespace, x: Any, axes: Axes) -> Any:
    """Return -sum(p * log(p)) of p = softmax(x), the axes kept with length 1."""
    if any(x.shape[a] == 0 for a in axes):
        return total(xp, x, axes)  # of nothing: 0
    return _entropy(xp, x, axes)[0]


def entropy_value_and_grad(xp: Namespace, x: Any, axes: Axes) -> tuple[Any, Any]:
    """Return the entropy and p * (-log(p) - entropy), where log1p(rest) cancels."""
    if any(x.shape[a] == 0 for a in axes):
        return total(xp, x, axes), x
    h, state, d, mean = _entropy(xp, x, axes)
    return h, state.exps / (1.0 + state.rest) * (d - mean)


def _entropy(xp: Namespace, x: Any, axes: Axes) -> tuple[Any, State, Any, Any]:
    """Return the entropy, the state, max - x where that counts, and the mean of it."""
    state = fold(xp, x, axes)
    gone = constant(xp, state.exps) == 0
    d = xp.where(gone, scalar(xp, 0.0, x), -state.shifted)
    mean = total(xp, state.exps * d, axes) / (1.0 + state.rest)
    return state.log + mean, state, d, mean


def kl_divergence(xp: Namespace, p_logits: Any, q_logits: Any, axis: int, options: Any) -> Any:
    """Return the reduced sum(p * (log(p) - log(q)))."""
    each, *_ = _divergence(xp, p_logits, q_logits, (axis,), options.temperature)
    return reduced(xp, _distilled(each, options), EVERY, axis, options.reduction)


def kl_divergence_value_and_grad(
    xp: Namespace, p_logits: Any, q_logits: Any, axis: int, options: Any
) -> tuple[Any, Any, Any]:
    """Return that, p * (log(p) - log(q) - each) / T and (q - p) / T, scaled as the value is."""
    t = options.temperature
    each, p, q, u = _divergence(xp, p_logits, q_logits, (axis,), t)
    gone = p == 0
    by_p = xp.where(gone, scalar(xp, 0.0, p), -p * (u + each))
    near = xp.abs(u) <= 1.0
    by_q = xp.where(near & ~gone, p * xp.expm1(xp.where(near, u, scalar(xp, 0.0, u))), q - p)
    each = _distilled(each, options)
    scale = nothing_to_inf(xp, mean_divisor(xp, each, EVERY)) if options.reduction == "mean" else 1
    slopes = (_distilled(divided(xp, slope, t), options) / scale for slope in (by_p, by_q))
    return reduced(xp, each, EVERY, axis, options.reduction), *slopes


def _distilled(x: Any, options: Any) -> Any:
    """Return x * T^2 if that is asked for; T^2 itself may leave the range."""
    return x * options.temperature * options.temperature if options.distillation else x


def _divergence(
    xp: Namespace, p_logits: Any, q_logits: Any, axes: Axes, temperature: float
) -> tuple[Any, Any, Any, Any]:
    """Return the divergences, the axes kept with length 1, p, q, and log(q) - log(p)."""
    if any(p_logits.shape[a] == 0 for a in axes):
        return total(xp, p_logits + q_logits, axes), p_logits, q_logits, p_logits
    # Sums of equal rows that lie otherwise in memory may differ in the last digit.
    p_logits, q_logits = libraries.of(xp).alike(p_logits, q_logits)
    by_p = fold(xp, p_logits, axes, temperature=temperature)
    by_q = fold(xp, q_logits, axes, temperature=temperature)
    p, q = by_p.exps / (1.0 + by_p.rest), by_q.exps / (1.0 + by_q.rest)
    zero, two = scalar(xp, 0.0, p), scalar(xp, 2.0, p)
    gone = constant(xp, p) == 0
    # Where both are -inf the difference is nan, and where p is 0 nothing depends on it.
    q_shifted = xp.where(gone, zero, by_q.shifted)
    u = (q_shifted - xp.where(gone, zero, by_p.shifted)) - (by_q.log - by_p.log)
    u = xp.where(gone, zero, u)
    # Bounds beyond what is selected, as a derivative is shared where a bound is met. They take the
    # place of `where`, which is slow where neighbours differ.
    low, high = libraries.of(xp).minimum(u, two), libraries.of(xp).maximum(u, zero)
    small = p * exp_minus_its_tangent(xp, low)
    terms = xp.where(constant(xp, u) > 1.0, q - p * (1.0 + high), small)
    return total(xp, xp.where(gone, q, terms), axes), p, q, u


def exp_minus_its_tangent(xp: Namespace, u: Any) -> Any:
    """Return exp(u) - 1 - u, for u <= 1."""
    v = libraries.of(xp).maximum(u, scalar(xp, -2.0, u))
    return xp.where(constant(xp, u) >= -1.0, v * v * beyond_its_tangent(xp, v), xp.expm1(u) - u)


def beyond_its_tangent(xp: Namespace, u: Any) -> Any:
    """Return (exp(u) - 1 - u) / u^2, right to the last digits for |u| <= 1."""
    # It is above 1/3, where terms below an eighth of eps do not count.
    *others, last = [c for c in _SERIES if c > float(xp.finfo(u.dtype).eps) / 8]
    series = scalar(xp, last, u)
    for coefficient in reversed(others):
        series = series * u + coefficient
    return series
