"""Entropy and Kullback-Leibler divergence, and their gradients, on groups of rows in any layout.

The formulas are those of the portable mathematics: sums of terms that are not negative. A row is
worked on at once, and its exps are taken anew where they are needed: that costs less than to keep
them.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

from portable_softmax.kernels._numba._compensation import added, compensated
from portable_softmax.kernels._numba._exp import (
    divergence_slope,
    divergence_term,
    exp_up,
    exponent,
    log1p,
    reference,
    reference_of,
)
from portable_softmax.kernels._numba._jit import function
from portable_softmax.kernels._numba._kernels import MODULES, threaded
from portable_softmax.kernels._numba._memory import ahead, copy, pointer, smaller, typed
from portable_softmax.kernels._numba._passes import (
    RUN,
    maxima,
    row_writing,
    sums_below,
    sums_of,
)
from portable_softmax.kernels._numba._values import LOSS, values
from portable_softmax.kernels._numba._vectors import lanes, read, splat, times, where_equal
from portable_softmax.kernels._request import BY_Q, DIVERGENCES

# --------------------------------------------------------------------------- entropy


@function
def _sums_and_gaps(p, n, m, at, unit):
    """The sums of e (m - x) and of e but for the maximum's, and how many e equal it."""
    L = lanes(p)
    one = splat(p, 1.0)
    gaps = lost = below = lower = count = zero = splat(p, 0.0)
    j = 0
    while j + L <= n:
        s = v = zero
        stop = smaller(j + RUN * L, n) - L
        while j <= stop:
            x = read(p, j, None, 0.0)
            e = exp_up(x, at, 1)
            s, v = s + times(e, m - x), v + where_equal(e, unit, zero, e)
            count = count + where_equal(e, unit, one, zero)
            j += L
        (gaps, lost), (below, lower) = added(gaps, lost, s), added(below, lower, v)
    if j < n:
        x = read(p, j, n - j, -math.inf)
        e = exp_up(x, at, 1)
        gaps, lost = added(gaps, lost, times(e, m - x))
        below, lower = added(below, lower, where_equal(e, unit, zero, e))
        count = count + where_equal(e, unit, one, zero)
    return compensated(gaps, lost), compensated(below, lower), count


@function
def _entropy_slope(x, _, numbers):
    """p (gap - mean), where `mean` is that of the gaps to the maximum."""
    m, at, mean, inverse = numbers
    return times(exp_up(x, at, 1) * inverse, (m - x) - mean)


_write_entropy_slopes = row_writing(_entropy_slope)


def _entropy(layout: ModuleType, gradient: bool) -> Any:
    """Return the entropy; arrays = (logits, entropies, gradient or not)."""

    def work(arrays, numbers, shape, workspace, lo, hi, piece):
        p, h = pointer(arrays[0]), pointer(arrays[1])
        n, inner, T = shape[0], shape[1], layout.height(workspace, shape[2])
        one, size, found = (
            typed(workspace, 1.0),
            layout.length(workspace, n),
            values(workspace, LOSS, T),
        )
        for i in range(lo, hi):
            at, rows, first = layout.place(i, T, n, inner)
            group = layout.fetch(ahead(p, at), 0, workspace, T, n, inner, rows)
            for r in range(0, rows, layout.stride(workspace)):
                x = ahead(group, r * n)
                m = layout.most(maxima(x, size))
                its = reference_of(m, 1)
                unit = exp_up(m, its, 1)
                gaps, below, count = _sums_and_gaps(x, size, m, its, unit)
                others = layout.whole(below) + (layout.whole(count) - one) * unit
                inverse = one / (others + unit)
                mean = layout.whole(gaps) * inverse
                layout.keep(found, r, log1p(others / unit) + mean)
                if gradient:
                    o = layout.target(ahead(pointer(arrays[2]), at), 0, workspace, T, n)
                    _write_entropy_slopes(x, 0.0, ahead(o, r * n), size, (m, its, mean, inverse))
            if gradient:
                place = ahead(pointer(arrays[2]), at)
                o = layout.target(place, 0, workspace, T, n)
                layout.deliver(o, place, T, n, inner, rows)
            copy(found, ahead(h, first), rows)

    name = "entropy_value_and_grad" if gradient else "entropy"
    return threaded(f"{layout.__name__}.{name}", work)


# --------------------------------------------------------------------------- divergence


@function
def _probabilities(x, y, of_p, of_q, t):
    """p, q and log(q) - log(p), from what `_state` returns of both rows."""
    m, log, inverse, at = of_p
    other, other_log, other_inverse, other_at = of_q
    u = (exponent(y, other, t) - exponent(x, m, t)) - (other_log - log)
    return exp_up(x, at, t) * inverse, exp_up(y, other_at, t) * other_inverse, u


@function
def _divergence_term(x, y, numbers):
    p, q, u = _probabilities(x, y, *numbers)
    return divergence_term(p, q, u)


@function
def _slope_of_p(x, y, numbers):
    of_p, of_q, t, divergence, scale = numbers
    p, _, u = _probabilities(x, y, of_p, of_q, t)
    return where_equal(p, 0.0, 0.0, -p * (u + divergence)) * scale


@function
def _slope_of_q(x, y, numbers):
    of_p, of_q, t, _, scale = numbers
    p, q, u = _probabilities(x, y, of_p, of_q, t)
    return divergence_slope(p, q, u) * scale


_divergence_terms = sums_of(_divergence_term, -math.inf)
_write_slopes_of_p, _write_slopes_of_q = row_writing(_slope_of_p), row_writing(_slope_of_q)


def _state_of(layout: ModuleType) -> Any:
    @function
    def state(x, n, workspace, t):
        """A row's maximum, log1p(rest), 1 over the sum of its exps, and what these are taken of.

        That is the maximum itself: rows that a constant is added to have the same state but for it.
        """
        one = typed(workspace, 1.0)
        m = layout.most(maxima(x, n))
        at = reference(m, typed(workspace, 0.0), t)
        unit = exp_up(m, at, t)
        below, count = sums_below(x, n, at, unit, t)
        others = layout.whole(below) + (layout.whole(count) - one) * unit
        return m, log1p(others / unit), one / (others + unit), at

    return state


def _divergence(layout: ModuleType, name: str, of_p: bool, of_q: bool) -> Any:
    """Return the divergence, with gradients by p and by q or without.

    arrays = (logits of p, logits of q, divergences, gradients), numbers = ((the temperature, the
    factor of the gradients),)
    """
    state, last = _state_of(layout), 3 + of_p

    def work(arrays, numbers, shape, workspace, lo, hi, piece):
        p, q, each = pointer(arrays[0]), pointer(arrays[1]), pointer(arrays[2])
        n, inner, T = shape[0], shape[1], layout.height(workspace, shape[2])
        t, scale = numbers[0][0], typed(workspace, numbers[0][1])
        size, found = layout.length(workspace, n), values(workspace, LOSS, T)
        for i in range(lo, hi):
            at, rows, first = layout.place(i, T, n, inner)
            first_group = layout.fetch(ahead(p, at), 0, workspace, T, n, inner, rows)
            second_group = layout.fetch(ahead(q, at), 1, workspace, T, n, inner, rows)
            for r in range(0, rows, layout.stride(workspace)):
                x, y = ahead(first_group, r * n), ahead(second_group, r * n)
                both = state(x, size, workspace, t), state(y, size, workspace, t), t
                k = layout.whole(_divergence_terms(x, y, size, both))
                layout.keep(found, r, k)
                its = (*both, k, scale)
                if of_p:
                    by_p = layout.target(ahead(pointer(arrays[3]), at), 2, workspace, T, n)
                    _write_slopes_of_p(x, y, ahead(by_p, r * n), size, its)
                if of_q:
                    by_q = layout.target(ahead(pointer(arrays[last]), at), 1, workspace, T, n)
                    _write_slopes_of_q(x, y, ahead(by_q, r * n), size, its)
            if of_p:
                first_place = ahead(pointer(arrays[3]), at)
                by_p = layout.target(first_place, 2, workspace, T, n)
                layout.deliver(by_p, first_place, T, n, inner, rows)
            if of_q:
                second_place = ahead(pointer(arrays[last]), at)
                by_q = layout.target(second_place, 1, workspace, T, n)
                layout.deliver(by_q, second_place, T, n, inner, rows)
            copy(found, ahead(each, first), rows)

    return threaded(f"{layout.__name__}.{name}", work)


LAYOUTS = {
    name: {
        "entropy": _entropy(layout, False),
        "entropy_value_and_grad": _entropy(layout, True),
        **{
            operation: _divergence(layout, operation, of_p, of_q)
            for operation, of_p, of_q in (
                (DIVERGENCES[0], False, False),
                (DIVERGENCES[1], True, True),
                (BY_Q, False, True),
            )
        },
    }
    for name, layout in MODULES.items()
}
