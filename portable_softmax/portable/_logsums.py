"""Logarithms of means and of running sums of exponentials, over the state (max, rest)."""

from __future__ import annotations

import math
from typing import Any

from portable_softmax import libraries
from portable_softmax._typing import Namespace
from portable_softmax.libraries import cast, constant, scalar
from portable_softmax.portable._softmax import masked, with_axes
from portable_softmax.portable._state import fold, maximum
from portable_softmax.portable._sums import total

Axes = tuple[int, ...]


def logmeanexp(xp: Namespace, x: Any, axes: Axes, *, where: Any = None) -> Any:
    """Return log(mean(exp(x))), the axes kept with length 1.

    That is max + log(mean), where the mean of exp(x - max) is in (0, 1]. Close to 1, where the
    logarithm cancels, it is log1p of the mean of expm1(x - max), whose terms have one sign.
    """
    if any(x.shape[a] == 0 for a in axes):
        return total(xp, x, axes) + math.nan  # the mean of nothing
    zero = scalar(xp, 0.0, x)
    part = some = None
    if where is not None:
        x, some = masked(xp, x, where, axes)
        part = xp.broadcast_to(with_axes(where, x.ndim), libraries.of(xp).shape(x))
        n = total(xp, cast(xp, part, x.dtype), axes)
    elif all(libraries.of(xp).is_known(n) and n == n for n in (x.shape[a] for a in axes)):
        n = scalar(xp, float(math.prod([x.shape[a] for a in axes])), x)
    else:  # there may turn out to be none
        n = total(xp, xp.ones_like(x), axes)
        some = n > 0
    if some is not None:
        n = xp.where(some, n, scalar(xp, 1.0, n))
    m = maximum(xp, x, axes)
    infinite = xp.isinf(m)
    shift = xp.where(infinite, zero, m)
    state = fold(xp, xp.where(infinite, zero, x), axes, shift=shift)  # see `logsumexp`
    counted = ~infinite if part is None else part & ~infinite
    lost = total(xp, xp.expm1(xp.where(counted, state.shifted, zero)), axes) / n
    near = constant(xp, lost) > -0.29
    rest = xp.where(infinite, zero, state.rest)
    mean = xp.where(near, xp.log1p(xp.where(near, lost, zero)), xp.log((1.0 + rest) / n))
    value = xp.where(infinite, m, shift + mean)
    return value if some is None else xp.where(some, value, scalar(xp, math.nan, value))


def logcumsumexp(xp: Namespace, x: Any, axis: int) -> Any:
    """Return log(cumsum(exp(x)))."""
    m, rest = _beginnings(xp, x, axis)
    fixed = constant(xp, m)
    infinite = xp.isinf(fixed)
    y = xp.where(infinite, m, m + xp.log1p(xp.where(infinite, scalar(xp, 0.0, m), rest)))
    return xp.where(fixed == -math.inf, fixed, y)  # a sum of nothing has no gradient


def logcumsumexp_vjp(xp: Namespace, x: Any, dy: Any, axis: int) -> Any:
    """Return sum_{i >= j} dy_i exp(x_j - y_i), whose exponents are not above 0.

    Each round adds to the sum over the next 1, 2, 4, ... entries that over as many behind them.
    The logarithms y are not made, as their rounding would be that of the exponents.
    """
    if 0 in x.shape:
        return xp.zeros_like(x)
    own, (m, rest) = libraries.of(xp), _beginnings(xp, x, axis)
    n, step, s = x.shape[axis], 1, 1.0 + rest
    before, zero = (slice(None),) * axis, scalar(xp, 0.0, x)
    finite = ~xp.isinf(m)
    while step < n:
        first, late = (*before, slice(0, n - step), ...), (*before, slice(step, n), ...)
        both = finite[first] & (finite[late] | (m[late] > 0))
        fall = xp.where(both, xp.exp(m[first] - m[late]), zero) * (s[first] / s[late])
        end = dy[(*before, slice(n - step, n), ...)]
        dy = own.concat([dy[first] + fall * dy[late], end], axis)
        (dy,) = own.barrier(dy)
        step *= 2
    return dy * (xp.where(x == -math.inf, zero, xp.exp(x - m)) / s)


def _beginnings(xp: Namespace, x: Any, axis: int) -> tuple[Any, Any]:
    """Return the states (max, rest) of all beginnings, merged in log2(n) rounds.

    Each round merges the state of the last 1, 2, 4, ... entries with that of as many before them
    (Hillis & Steele 1986, "Data parallel algorithms"), so that no error grows with the length.
    """
    own, m, rest = libraries.of(xp), x, xp.zeros_like(x)
    n, step = x.shape[axis], 1
    before = (slice(None),) * axis
    if 0 in x.shape:  # of which cubed makes no slices
        return m, rest
    while step < n:
        first, early = (*before, slice(0, step), ...), (*before, slice(0, n - step), ...)
        late = (*before, slice(step, n), ...)
        merged_m, merged = _merged(xp, m[early], rest[early], m[late], rest[late])
        m = own.concat([m[first], merged_m], axis)
        rest = own.concat([rest[first], merged], axis)
        # XLA may take minutes to compile rounds that it tries to fuse.
        m, rest = own.barrier(m, rest)
        step *= 2
    return m, rest


def _merged(xp: Namespace, m1: Any, r1: Any, m2: Any, r2: Any) -> tuple[Any, Any]:
    """Return the state of two sets of entries."""
    first = (m1 >= m2) | xp.isnan(m1)
    high, low = xp.where(first, m1, m2), xp.where(first, m2, m1)
    r_high, r_low = xp.where(first, r1, r2), xp.where(first, r2, r1)
    # Beside an infinite maximum nothing counts, and the difference of two may be nan.
    counts = ~xp.isinf(high)
    zero = scalar(xp, 0.0, high)
    d = xp.where(counts, low, zero) - xp.where(counts, high, zero)
    return high, r_high + (1.0 + r_low) * xp.where(counts, xp.exp(d), zero)
