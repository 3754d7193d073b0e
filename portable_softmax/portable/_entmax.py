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
from portable_softmax.libraries import cast, constant, differentiates, reads_values, scalar
from portable_softmax.portable._softmax import softmax, softmax_vjp
from portable_softmax.portable._state import maximum
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
        log = xp.log1p(v)
        e, slope = xp.exp(log / c), xp.exp(log * ((1.0 - c) / c))
    lost = constant(xp, w) != constant(xp, w)
    outside = xp.where(lost, w * one, zero)
    return xp.where(inside, e, outside), xp.where(inside, slope, outside)


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
    s = xp.zeros_like(maximum(xp, d, axes))
    for _ in range(_STEPS):
        step = _newton(xp, d, s, axes, c)
        further = step > s
        s = xp.where(further, step, s)
        # A row that has arrived stays, however many steps others take.
        moves = xp.any(further)
        if reads_values(xp, moves) and not bool(moves):
            break
    return s
