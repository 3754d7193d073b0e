"""entmax: probabilities that are exactly 0 from some distance below the maximum on.

With c = alpha - 1, d_j = x_j - max, and the power that becomes exp(w) as c goes to 0,

    p_j = e(d_j - s)        e(w) = max(0, 1 + c w)^(1/c)        s such that sum_j p_j = 1

The threshold is tau = c (max + s) - 1. Written in s nothing cancels for a small c, and s is
log(sum exp(d)) at c = 0. No entry is sorted.
"""

from __future__ import annotations

import math
from typing import Any

from portable_softmax._typing import Namespace
from portable_softmax.libraries import cast, constant, differentiates, iterate, scalar
from portable_softmax.portable._cross_entropy import (
    Target,
    classes,
    mean_divisor,
    nothing_to_inf,
    pick,
    reduced,
)
from portable_softmax.portable._entropy import exp_minus_its_tangent
from portable_softmax.portable._softmax import softmax, softmax_vjp
from portable_softmax.portable._state import fold, maximum
from portable_softmax.portable._sums import total

Axes = tuple[int, ...]

# Newton's steps at most: of rows with up to 100 000 entries of every kind, the worst took 12.
_STEPS = 20


def entmax(xp: Namespace, x: Any, axes: Axes, *, alpha: float = 1.5) -> Any:
    """Return the probabilities."""
    if alpha == 1.0 or any(x.shape[a] == 0 for a in axes):
        return softmax(xp, x, axes)
    d = x - maximum(xp, x, axes)
    if alpha == math.inf:
        at_max = d == 0
        ties = cast(xp, constant(xp, at_max), d.dtype)
        count = total(xp, ties, axes)  # none in a row with nan, or with an infinite maximum
        p = xp.where(
            count == 0,
            scalar(xp, math.nan, d),
            ties / xp.where(count == 0, scalar(xp, 1.0, d), count),
        )
        return p + 0.0 * xp.where(at_max, d, scalar(xp, 0.0, d))  # has a derivative, which is 0
    p, _ = _solved(xp, d, axes, alpha)
    return p


def entmax_vjp(xp: Namespace, y: Any, dy: Any, axes: Axes, *, alpha: float = 1.5) -> Any:
    """Return s * (dy - sum(s * dy) / sum(s)) with s = y^(2 - alpha) where y is not 0."""
    if alpha == 1.0:
        return softmax_vjp(xp, y, dy, axes)
    zero, one = scalar(xp, 0.0, y), scalar(xp, 1.0, y)
    if alpha == math.inf:
        return xp.zeros_like(y)
    inside = y > 0
    safe = xp.where(inside, y, one)
    if alpha == 2.0:
        s = one
    elif alpha == 1.5:
        s = xp.sqrt(safe)
    else:
        s = xp.exp((2.0 - alpha) * xp.log(safe))
    s = xp.where(inside, s, xp.where(xp.isnan(y), y, zero))
    dy = xp.where(y == 0, zero, dy)  # what stands there does not count
    weight = total(xp, s, axes)
    weight = xp.where(weight == 0, one, weight)
    return xp.where(y == 0, zero, s * (dy - total(xp, s * dy, axes) / weight))


# --------------------------------------------------------------------------- the threshold


def _power(xp: Namespace, w: Any, c: float) -> tuple[Any, Any]:
    """Return e(w) and its derivative e(w)^(1 - c), both 0 outside the support."""
    zero, one = scalar(xp, 0.0, w), scalar(xp, 1.0, w)
    inside = constant(xp, w) * c > -1.0
    v = c * xp.where(inside, w, zero)
    if c == 1.0:
        e, slope = 1.0 + v, xp.ones_like(v)
    elif c == 0.5:
        slope = 1.0 + v
        e = slope * slope
    else:
        log = _log_of_1_plus(xp, v)
        e, slope = xp.exp(log / c), xp.exp(log * ((1.0 - c) / c))
    lost = constant(xp, w) != constant(xp, w)
    outside = xp.where(lost, w * one, zero)
    return xp.where(inside, e, outside), xp.where(inside, slope, outside)


def _log_of_1_plus(xp: Namespace, v: Any) -> Any:
    """Return log1p(v) for v <= 0: far from 0 some libraries' logarithm is better at it."""
    zero = scalar(xp, 0.0, v)
    near = constant(xp, v) > -0.29
    far = xp.log(1.0 + xp.where(near, zero, v))
    return xp.where(near, xp.log1p(xp.where(near, v, zero)), far)


def _newton(xp: Namespace, d: Any, s: Any, axes: Axes, c: float) -> Any:
    """Return a step of Newton's method, on the norm whose power the sum is.

    The norm sum(p)^c is convex in s, and nearly a straight line. Of n equal entries it is one, and
    the first step is the last; as c goes to 0 it is so for any row.
    """
    p, slope = _power(xp, d - s, c)
    sum_p, sum_slope = total(xp, p, axes), total(xp, slope, axes)
    return s - sum_p * xp.expm1(-c * xp.log(sum_p)) / (c * sum_slope)


def _solved(xp: Namespace, d: Any, axes: Axes, alpha: float) -> tuple[Any, Any]:
    """Return the probabilities and w = d - s; torch and JAX differentiate both twice."""
    c = alpha - 1.0
    fixed = constant(xp, d)
    s = constant(xp, _from_the_left(xp, fixed, axes, c))
    if differentiates(xp):
        # Each of Newton's steps doubles the order to which the derivatives are right. At the
        # solution it leaves the value alone, up to rounding.
        moved = _newton(xp, d, _newton(xp, d, s, axes, c), axes, c)
        s = s + (moved - constant(xp, moved))
    w = d - s
    p, _ = _power(xp, w, c)
    # What rounding has left over is shared; it has no derivative.
    return p / constant(xp, total(xp, p, axes)), w


def _from_the_left(xp: Namespace, d: Any, axes: Axes, c: float) -> Any:
    """Return s by Newton's method from 0: every step goes right and none too far."""

    def step(s: Any) -> tuple[Any, Any]:
        moved = _newton(xp, d, s, axes, c)
        further = moved > s
        # A row that has arrived stays, however many steps others take.
        return xp.where(further, moved, s), xp.any(further)

    return iterate(xp, step, xp.zeros_like(maximum(xp, d, axes)), _STEPS)


# --------------------------------------------------------------------------- the loss


def entmax_loss(
    xp: Namespace, x: Any, target: Target, axis: int, alpha: float, reduction: str
) -> Any:
    """Return the reduced Fenchel-Young loss."""
    loss, _, _ = _losses(xp, x, target, axis, alpha)
    return reduced(xp, loss, target, axis, reduction)


def entmax_loss_value_and_grad(
    xp: Namespace, x: Any, target: Target, axis: int, alpha: float, reduction: str
) -> tuple[Any, Any]:
    """Return the reduced loss and the gradient of its sum, p - t."""
    loss, p, t = _losses(xp, x, target, axis, alpha)
    grad = p - t
    if target.weight is not None:
        grad = grad * target.weight
    if reduction == "mean":
        grad = grad / nothing_to_inf(xp, mean_divisor(xp, loss, target))
    if target.valid is not None:
        grad = xp.where(target.valid, grad, scalar(xp, math.nan, grad))
    if target.counted is not None:
        grad = xp.where(target.counted, grad, scalar(xp, 0.0, grad))
    return reduced(xp, loss, target, axis, reduction), grad


def _losses(xp: Namespace, x: Any, target: Target, axis: int, alpha: float) -> tuple[Any, Any, Any]:
    """Return the loss of each position, the probabilities, and the target's."""
    zero, one, axes = scalar(xp, 0.0, x), scalar(xp, 1.0, x), (axis,)
    if target.counted is not None:
        x = xp.where(target.counted, x, zero)
    if alpha == 1.0:
        state = fold(xp, x, axes)
        w = state.shifted - state.log
        p = xp.exp(w)
        powers = p
    else:
        p, w = _solved(xp, x - maximum(xp, x, axes), axes, alpha)
        inside = constant(xp, p) > 0
        powers = p * (1.0 + (alpha - 1.0) * xp.where(inside, w, zero))  # p^alpha
        powers = xp.where(constant(xp, p) == 0, zero, powers)
    if target.index is None:
        t = target.distribution
        if target.counted is not None:
            t = xp.where(target.counted, t, zero)
        loss = total(xp, _terms(xp, t, w, powers, alpha), axes)
    else:
        label = classes(xp, x, axis) == target.index
        t = xp.where(label, one, zero)
        at_label = pick(xp, w, target.index, axis, x)
        others = total(xp, xp.where(label, zero, powers), axes)
        loss = _term_of_the_label(xp, at_label, alpha) + others / alpha
        if alpha == 1.0:
            loss = -at_label
    if target.valid is not None:
        loss = loss * xp.where(target.valid, one, scalar(xp, math.nan, loss))
    if target.weight is not None:
        loss = loss * target.weight
    if target.counted is not None:
        loss = xp.where(target.counted, loss, zero)
    return loss, p, t


def _term_of_the_label(xp: Namespace, w: Any, alpha: float) -> Any:
    """Return (1 + c p^alpha - alpha (1 + c w)) / (alpha c), which is not negative.

    With l = log1p(c w), q = alpha / c and f(u) = exp(u) - 1 - u it is (f(q l) - q f(l)) / alpha.
    """
    c = alpha - 1.0
    if c == 0.0:
        return w
    zero = scalar(xp, 0.0, w)
    inside = constant(xp, w) * c > -1.0
    log = _log_of_1_plus(xp, c * xp.where(inside, w, zero))
    q = alpha / c
    near = exp_minus_its_tangent(xp, q * log) - q * exp_minus_its_tangent(xp, log)
    return xp.where(inside, near / alpha, -xp.where(inside, zero, w) - 1.0 / alpha)


def _terms(xp: Namespace, t: Any, w: Any, powers: Any, alpha: float) -> Any:
    """Return (t^alpha + c p^alpha - alpha (1 + c w) t) / (alpha c), none of which is negative."""
    c, zero, one = alpha - 1.0, scalar(xp, 0.0, w), scalar(xp, 1.0, w)
    none = t == 0
    log_t = xp.log(xp.where(none, one, t))
    growth = log_t if c == 0.0 else xp.expm1(c * log_t) / c
    named = t * (growth / alpha - xp.where(none, zero, w)) + (powers - t) / alpha
    return xp.where(none, powers / alpha, named)
