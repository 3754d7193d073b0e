"""entmax: probabilities that are exactly 0 from some distance below the maximum on.

With c = alpha - 1, d_j = x_j - max, and the power that becomes exp(w) as c goes to 0,

    p_j = e(d_j - s)        e(w) = max(0, 1 + c w)^(1/c)        s such that sum_j p_j = 1

The threshold is tau = c (max + s) - 1. Written in s nothing cancels for a small c, and s is
log(sum exp(d)) at c = 0. For c > 1 the power is steep where it leaves 0: there the least
probability that is not 0 is the unknown. No entry is sorted.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from portable_softmax import libraries
from portable_softmax._typing import Namespace
from portable_softmax.libraries import cast, constant, namespace, scalar
from portable_softmax.portable._cross_entropy import (
    Target,
    classes,
    mean_divisor,
    nothing_to_inf,
    pick,
    reduced,
)
from portable_softmax.portable._entropy import beyond_its_tangent, exp_minus_its_tangent
from portable_softmax.portable._softmax import softmax, softmax_vjp
from portable_softmax.portable._state import fold, maximum
from portable_softmax.portable._sums import total

Axes = tuple[int, ...]

# Newton's steps at most: of rows with up to 100 000 entries of every kind, the worst took 12.
_STEPS = 20
# For alpha > 2, at most: cuts of the range of the smallest entry, and Newton's steps.
_CUTS, _SHARP_STEPS = 80, 60
# From here on 1/c is 0 beside the logarithm of any number: entmax is the argmax.
_ARGMAX = 2.0**100
# A c below this one changes no digit; an array's c may be 0, which nothing may be divided by.
_LEAST = 2.0**-70


def entmax(xp: Namespace, x: Any, axes: Axes, *, alpha: Any = 1.5, followed: bool = True) -> Any:
    """Return the probabilities. An alpha that is an array lies in [1, 2]."""
    if _is(alpha, 1.0) or any(x.shape[a] == 0 for a in axes):
        return softmax(xp, x, axes)
    p, w = _solved(xp, x, axes, alpha)
    return _followed(xp, p, w, x, axes, alpha)[0] if followed else p


def entmax_vjp(xp: Namespace, y: Any, dy: Any, axes: Axes, *, alpha: Any = 1.5) -> Any:
    """Return g * (dy - sum(g * dy) / sum(g)) with g = y^(2 - alpha) where y is not 0."""
    if _is(alpha, 1.0):
        return softmax_vjp(xp, y, dy, axes)
    zero = scalar(xp, 0.0, y)
    if isinstance(alpha, float) and alpha >= _ARGMAX:
        return 0.0 * xp.where(y == 0, zero, dy)
    g, centred = _centred(xp, y, dy, axes, alpha)
    return xp.where(y == 0, zero, g * centred)


def _centred(xp: Namespace, y: Any, dy: Any, axes: Axes, alpha: Any) -> tuple[Any, Any]:
    """Return g and dy - sum(g * dy) / sum(g); what stands in dy where y is 0 is in no sum."""
    zero, one, inside = scalar(xp, 0.0, y), scalar(xp, 1.0, y), y > 0
    safe = xp.where(inside, y, one)
    some = xp.where(y == 0, zero, dy)
    steep = isinstance(alpha, float) and alpha > 2.0
    if _is(alpha, 2.0) or (steep and alpha >= _ARGMAX):  # of which ties have equal shares
        g = xp.ones_like(y)
    elif _is(alpha, 1.5):
        g = xp.sqrt(safe)
    else:
        log = (2.0 - alpha) * xp.log(safe)
        most = maximum(xp, xp.where(inside, log, zero), axes) if steep else 0.0
        g = xp.exp(log - most)
    g = xp.where(inside, g, xp.where(xp.isnan(y), y, zero))
    if steep:
        # Small probabilities have large slopes. Nothing cancels once the upstream gradient at the
        # largest ones is subtracted, which changes nothing else.
        first = cast(xp, g > 0.99, y.dtype)
        first = total(xp, first * some, axes) / total(xp, first, axes)
        dy, some = dy - first, some - first
    weight = total(xp, g, axes)
    dy = dy - total(xp, g * some, axes) / xp.where(weight == 0, one, weight)
    if steep and alpha < _ARGMAX:
        # A slope beyond the range becomes the largest number: 0 times infinity is nan.
        end = scalar(xp, math.log(float(xp.finfo(y.dtype).max)) - 1.0, y)
        g = xp.where(inside, xp.exp(xp.where(log < end, log, end)), g)
    return g, dy


# --------------------------------------------------------------------------- derivatives


def _followed(xp: Namespace, p: Any, w: Any, x: Any, axes: Axes, alpha: Any) -> tuple[Any, Any]:
    """Return p and w as torch and JAX differentiate them twice.

    The values are constants, and what follows them a step of the midpoint rule, of length 0.
    """
    zero, fixed = scalar(xp, 0.0, x), constant(xp, x)
    finite = xp.isfinite(fixed)
    dx = xp.where(finite, x, zero) - xp.where(finite, fixed, zero)
    at = half = dalpha = None
    if not isinstance(alpha, float):
        at = constant(xp, alpha)
        dalpha = alpha - at
        half = at + 0.5 * dalpha
    middle = p + 0.5 * _motion(xp, p, dx, axes, alpha if at is None else at, dalpha)
    alpha = alpha if half is None else half
    _, dw = _centred(xp, middle, dx, axes, alpha)
    return p + _motion(xp, middle, dx, axes, alpha, dalpha), w + dw


def _motion(xp: Namespace, p: Any, dx: Any, axes: Axes, alpha: Any, dalpha: Any) -> Any:
    """Return how p moves with x and alpha: its Jacobian is symmetric."""
    moved = entmax_vjp(xp, p, dx, axes, alpha=alpha)
    if dalpha is None:
        return moved
    # With l = log p and v = -c l it is h - g sum(h) / sum(g), h = -p l^2 (exp(v) - 1 - v) / v^2,
    # whose quotient is a series where v is small.
    zero, one, c = scalar(xp, 0.0, p), scalar(xp, 1.0, p), alpha - 1.0
    inside = p > 0
    log = xp.log(xp.where(inside, p, one))
    v = -c * log
    near = constant(xp, v) <= 1.0
    by = xp.where(near, one, c * c)
    far = (xp.exp(xp.where(near, zero, v + log)) - p * (1.0 + v)) / by
    h = xp.where(near, p * log * log * beyond_its_tangent(xp, xp.where(near, v, zero)), far)
    g = xp.where(inside, xp.exp((1.0 - c) * log), zero)
    return moved + dalpha * (g * (total(xp, h, axes) / total(xp, g, axes)) - h)


# --------------------------------------------------------------------------- the threshold


def _is(alpha: Any, value: float) -> bool:
    """Return whether an alpha is this number; an array may be any."""
    return isinstance(alpha, float) and alpha == value


def _solved(xp: Namespace, x: Any, axes: Axes, alpha: Any) -> tuple[Any, Any]:
    """Return the probabilities and w = d - s, both constants."""
    if libraries.of(xp).chunked:  # in whole rows, as the graph of the steps would be large
        both = (partial(_part_of_rows, part=i, axes=axes) for i in (0, 1))
        p, w = (libraries.of(xp).of_whole_rows(x, axes, function, alpha) for function in both)
        return p, w
    x = constant(xp, x)
    d = x - maximum(xp, x, axes)
    if isinstance(alpha, float):
        if alpha >= _ARGMAX:
            ties = cast(xp, d == 0, d.dtype)
            count = total(xp, ties, axes)
            # XLA takes 0 / 0 for 0 where it knows that the first one is a 0 or a 1.
            return xp.where(count == 0, scalar(xp, math.nan, d), ties / count), d
        if alpha > 2.0:
            return _sharp(xp, x, d, axes, alpha - 1.0)
        c = alpha - 1.0
    else:
        alpha = constant(xp, alpha)
        least = scalar(xp, _LEAST, alpha)
        c = xp.where(alpha - 1.0 > least, alpha - 1.0, least)
    w = d - _from_the_left(xp, d, axes, c)
    p, slope = _power(xp, w, c)
    # The sum is not 1 yet by what the threshold is off and what many small entries were rounded by.
    # A last step of the threshold mends both: a large entry would take a share that is not its own.
    wide = cast(xp, p, libraries.of(xp).wider_dtype(p))
    left_over = cast(xp, 1.0 - total(xp, wide, axes), p.dtype)
    share = slope / total(xp, slope, axes)
    p = p + left_over * xp.where(p > 0, share, scalar(xp, 0.0, p))  # all nan where the sum is nan
    p = xp.where(p < 0, scalar(xp, 0.0, p), p)
    if not isinstance(alpha, float):
        p = xp.where((alpha >= 1.0) & (alpha <= 2.0), p, scalar(xp, math.nan, p))
    return p, w


def _part_of_rows(x: Any, alpha: Any, *, part: int, axes: Axes) -> Any:
    """Return one of the two that `_solved` returns."""
    return _solved(namespace(x), x, axes, alpha)[part]


def _power(xp: Namespace, w: Any, c: Any) -> tuple[Any, Any]:
    """Return e(w) and its derivative e(w)^(1 - c), both 0 outside the support."""
    zero, one = scalar(xp, 0.0, w), scalar(xp, 1.0, w)
    inside = w * c > -1.0
    v = c * xp.where(inside, w, zero)
    if _is(c, 1.0):
        e, slope = 1.0 + v, xp.ones_like(v)
    elif _is(c, 0.5):
        slope = 1.0 + v
        e = slope * slope
    else:
        log = _log_of_1_plus(xp, v)
        e, slope = xp.exp(log / c), xp.exp(log * ((1.0 - c) / c))
    outside = xp.where(w != w, w * one, zero)
    return xp.where(inside, e, outside), xp.where(inside, slope, outside)


def _log_of_1_plus(xp: Namespace, v: Any) -> Any:
    """Return log1p(v) for v <= 0: far from 0 some libraries' logarithm is better at it."""
    zero = scalar(xp, 0.0, v)
    near = constant(xp, v) > -0.29
    far = xp.log(1.0 + xp.where(near, zero, v))
    return xp.where(near, xp.log1p(xp.where(near, v, zero)), far)


def _newton(xp: Namespace, d: Any, s: Any, axes: Axes, c: Any) -> Any:
    """Return a step of Newton's method, on the norm whose power the sum is.

    The norm sum(p)^c is convex in s, and nearly a straight line. Of n equal entries it is one, and
    the first step is the last; as c goes to 0 it is so for any row.
    """
    p, slope = _power(xp, d - s, c)
    sum_p, sum_slope = total(xp, p, axes), total(xp, slope, axes)
    return s - sum_p * xp.expm1(-c * xp.log(sum_p)) / (c * sum_slope)


def _from_the_left(xp: Namespace, d: Any, axes: Axes, c: Any) -> Any:
    """Return s by Newton's method from 0: every step goes right and none too far."""

    def step(s: Any) -> tuple[Any, Any]:
        moved = _newton(xp, d, s, axes, c)
        further = moved > s
        # A row that has arrived stays, however many steps others take.
        return xp.where(further, moved, s), xp.any(further)

    return libraries.of(xp).iterate(step, xp.zeros_like(maximum(xp, d, axes)), _STEPS)


def _sharp(xp: Namespace, x: Any, d: Any, axes: Axes, c: float) -> tuple[Any, Any]:
    """Return the probabilities and w for c > 1, by the least probability that is not 0.

    With b its entry they are (p_b^c + c (x_j - x_b))^(1/c), where nothing cancels, and their sum is
    convex in p_b.
    """
    zero, one = scalar(xp, 0.0, d), scalar(xp, 1.0, d)
    depth = -d

    def root(v: Any) -> Any:
        positive = v > 0
        power = xp.sqrt if c == 2.0 else (lambda v: xp.exp(xp.log(v) / c))
        return xp.where(positive, power(xp.where(positive, v, one)), zero)

    def cut(ends: Any) -> tuple[Any, Any]:
        # All entries up to `above` are in, as the sum is below 1 if the last of them has no
        # probability; all from `below` on are out. The cut is the geometric mean between them.
        above, below = ends
        between = (depth > above) & (depth < below)
        first = -maximum(xp, xp.where(between, -depth, scalar(xp, -1.0 / c, d)), axes)
        last = maximum(xp, xp.where(between, depth, zero), axes)
        at = xp.sqrt(first) * xp.sqrt(last)
        at = xp.where(at > last, last, xp.where(at < first, first, at))
        within = total(xp, root(c * (at - depth)), axes) < 1.0
        some = last > 0
        above = xp.where(some & within, at, above)
        return (above, xp.where(some & ~within, at, below)), xp.any(some)

    nothing = xp.zeros_like(maximum(xp, d, axes))
    above, _ = libraries.of(xp).iterate(cut, (nothing, nothing + 1.0 / c), _CUTS)
    inside = depth <= above
    x_b = -maximum(xp, xp.where(inside, -x, scalar(xp, -math.inf, x)), axes)
    r = c * xp.where(inside, x - x_b, zero)
    least = inside & (r == 0)

    def probabilities(p_b: Any) -> Any:
        p = xp.exp(xp.log(xp.exp(c * xp.log(p_b)) + xp.where(least, one, r)) / c)
        return xp.where(least, p_b, xp.where(inside, p, zero))

    def step(p_b: Any) -> tuple[Any, Any]:
        p = probabilities(p_b)
        slope = xp.where(inside, xp.exp((c - 1.0) * xp.log(p_b / xp.where(inside, p, one))), zero)
        moved = p_b - (total(xp, p, axes) - 1.0) / total(xp, slope, axes)
        further = (moved < p_b) & (moved > 0)
        return xp.where(further, moved, p_b), xp.any(further)

    # None has it in a row that holds nan or whose maximum is infinite: that becomes nan.
    start = one / total(xp, cast(xp, least, d.dtype), axes)
    p_b = libraries.of(xp).iterate(step, start, _SHARP_STEPS)
    p = probabilities(p_b)
    return p / total(xp, p, axes), xp.expm1(c * xp.log(p_b)) / c + (x - x_b)


# --------------------------------------------------------------------------- the loss


def entmax_loss(
    xp: Namespace,
    x: Any,
    target: Target,
    axis: int,
    alpha: float,
    reduction: str,
    *,
    followed: bool = True,
) -> Any:
    """Return the reduced Fenchel-Young loss."""
    loss, _, _ = _losses(xp, x, target, axis, alpha, followed)
    return reduced(xp, loss, target, axis, reduction)


def entmax_loss_value_and_grad(
    xp: Namespace,
    x: Any,
    target: Target,
    axis: int,
    alpha: float,
    reduction: str,
    *,
    followed: bool = True,
) -> tuple[Any, Any]:
    """Return the reduced loss and the gradient of its sum, p - t."""
    loss, p, t = _losses(xp, x, target, axis, alpha, followed)
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


def _losses(
    xp: Namespace, x: Any, target: Target, axis: int, alpha: float, followed: bool
) -> tuple[Any, Any, Any]:
    """Return the loss of each position, the probabilities, and the target's."""
    zero, one, axes = scalar(xp, 0.0, x), scalar(xp, 1.0, x), (axis,)
    if target.counted is not None:
        x = xp.where(target.counted, x, zero)
    linear = alpha == 1.0 or alpha >= _ARGMAX  # in w
    if alpha == 1.0:
        state = fold(xp, x, axes)
        w = state.shifted - state.log
        p = powers = xp.exp(w)
    else:
        p, w = _solved(xp, x, axes, alpha)
        if followed:
            p, w = _followed(xp, p, w, x, axes, alpha)
        z = 1.0 if linear else 1.0 + (alpha - 1.0) * xp.where(p > 0, w, zero)
        powers = xp.where(p == 0, zero, p * z)  # p^alpha
    if target.index is None:
        t = target.distribution
        if target.counted is not None:
            t = xp.where(target.counted, t, zero)
        loss = total(xp, _terms(xp, t, w, powers, alpha), axes)
    else:
        label = classes(xp, x, axis) == target.index
        t = xp.where(label, one, zero)
        loss = -pick(xp, w, target.index, axis, x)
        if not linear:
            others = total(xp, xp.where(label, zero, powers), axes)
            loss = _term_of_the_label(xp, -loss, alpha) + others / alpha
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
    c, zero = alpha - 1.0, scalar(xp, 0.0, w)
    inside = constant(xp, w) * c > -1.0
    log = _log_of_1_plus(xp, c * xp.where(inside, w, zero))
    q = alpha / c
    near = exp_minus_its_tangent(xp, q * log) - q * exp_minus_its_tangent(xp, log)
    return xp.where(inside, near / alpha, -xp.where(inside, zero, w) - 1.0 / alpha)


def _terms(xp: Namespace, t: Any, w: Any, powers: Any, alpha: float) -> Any:
    """Return (t^alpha + c p^alpha - alpha (1 + c w) t) / (alpha c), none of which is negative."""
    c, zero, one = alpha - 1.0, scalar(xp, 0.0, w), scalar(xp, 1.0, w)
    none = t == 0
    if alpha >= _ARGMAX:
        return t * -xp.where(none, zero, w)
    log_t = xp.log(xp.where(none, one, t))
    growth = log_t if c == 0.0 else xp.expm1(c * log_t) / c
    named = t * (growth / alpha - xp.where(none, zero, w)) + (powers - t) / alpha
    return xp.where(none, powers / alpha, named)
