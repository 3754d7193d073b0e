"""One row that is longer than the first cache holds, part after part.

A part is read from memory once: its maximum is found and its exps are taken while it is in the
first cache, relative to the largest maximum so far (Milakov & Gimelshein, 2018). Its sum is kept
with that maximum and brought to the row's at the end, so that each sum is scaled once, by a power
of two for most. There is space for three numbers a part at `factors`; the first is what its exps
are to be multiplied by at last.
"""

from __future__ import annotations

import math
from typing import Any

from portable_softmax.kernels._numba._compensation import added
from portable_softmax.kernels._numba._exp import (
    DOWN,
    exp_up,
    reference,
    reference_of,
    split,
)
from portable_softmax.kernels._numba._horizontal import max_of_all, sum_of_all
from portable_softmax.kernels._numba._jit import function
from portable_softmax.kernels._numba._memory import ahead, load, smaller, store, typed
from portable_softmax.kernels._numba._passes import exps, maxima, others
from portable_softmax.kernels._numba._softcap import seen_by, uncapped
from portable_softmax.kernels._numba._vectors import lanes, larger, product

# Classes of a part.
PART = 1 << 12

# So many vectors beyond that: two lines a multiple of 4096 bytes apart compete for their place in
# the first cache, as those of float64 parts do, and a long row took up to twice the time.
BEYOND = 18


@function
def factor_of(factors, start):
    """Where the factor of the part that begins at `start` is."""
    return ahead(factors, start // PART * 3)


@function
def space(n):
    """How many numbers the parts of a row take."""
    return 0 if n <= PART else 3 * ((n + PART - 1) // PART)


@function
def rows_ahead(p, n):
    """How many rows, or parts of a long one, to prefetch ahead: memory takes its time to answer."""
    vectors = n // lanes(p)
    return 3 if vectors <= 64 else 2 if vectors <= 256 else 1


@function
def _sum_of_exps(p, e, following, n, at, unit, t):
    """Return the sum of the exps, twice."""
    total, lost, _, _ = exps(p, e, following, n, at, unit, t)
    s = sum_of_all(total + lost)
    return s, s


@function
def _sums_of_exps(p, e, following, n, at, unit, t):
    """Return the sum of the exps, and of those that do not equal `unit`.

    The second is that of a confident row's. From twice the unit on a sum is of none, and below the
    unit it is without such an exp.
    """
    sums = exps(p, e, following, n, at, unit, t)
    s = sum_of_all(sums[0] + sums[1])
    if s >= unit and s - unit < unit:
        return s, sum_of_all(others(p, e, n, sums, at, unit, t))
    return s, s


@function
def ratio(most, m, t):
    """What exps relative to the maximum so far are multiplied by for those relative to m."""
    base, power = split(m, t)
    its_base, its_power = split(most, t)
    return product(exp_up(its_base, reference(base, power - its_power, t), t), DOWN)


def _row_sums_of(sums_of_exps: Any) -> Any:
    @function
    def row_sums(p, e, n, t, factors):
        """Return the maximum, the sum of the exps, and that of those below the maximum's.

        The exps go to `e`, but for their factors, unless it is null.
        """
        m, zero = typed(p, -math.inf), typed(p, 0.0)
        rows, beyond = rows_ahead(p, n), BEYOND * lanes(p)
        for start in range(0, n, PART):
            k, x, y = smaller(PART, n - start), ahead(p, start), ahead(e, start)
            m = larger(m, seen_by(p, max_of_all(maxima(uncapped(x), k))))
            nothing = m == -math.inf  # yet, or a nan
            most = zero if nothing else m
            at = reference_of(most, t)
            following, unit = ahead(x, rows * k + beyond), exp_up(most, at, t)
            s, lower = sums_of_exps(x, y, following, k, at, unit, t)
            if n <= PART:
                return m, s + (m - m), lower  # a row of nothing but -inf has no sum
            own = factor_of(factors, start)
            store(own, 2, lower)
            store(own, 1, s - s if nothing else s)
            store(own, 0, m)
        total = lost = lower_total = lost_of_lower = zero
        for start in range(0, n, PART):
            own = factor_of(factors, start)
            most, s = load(own, 0), load(own, 1)
            factor = zero if most == -math.inf else ratio(most, m, t)
            store(own, 0, factor)
            lower = load(own, 2) if most == m else s  # no exp of it is that of the row's maximum
            total, lost = added(total, lost, s * factor)
            lower_total, lost_of_lower = added(lower_total, lost_of_lower, lower * factor)
        return m, (total + lost) + (m - m), lower_total + lost_of_lower

    return row_sums


row_sums, row_sum = _row_sums_of(_sums_of_exps), _row_sums_of(_sum_of_exps)
