"""One row in consecutive memory, longer than the lanes of a vector register.

`p` points to it and `n` is its length; `t` is the temperature, or an integer for none. Sums are
those of 2**64 * exp(d), see `_exp`: UP and DOWN are the factor and its inverse.
"""

from __future__ import annotations

import math

from numba import njit

from portable_softmax.kernels._numba._exp import (
    DOWN,
    UP,
    difference_error,
    exp_up,
    where_positive,
)
from portable_softmax.kernels._numba._ir import ahead, load, maximum, over, plus, store, typed

function = njit(nogil=True, error_model="numpy")

# So many terms are summed as they come, each lane a few of them: sums of sums lose no digits.
RUN = 512

# Below this share of the row's length, or below 1, a remainder is summed again with care. Above it
# the terms below exp(-8) make up 1/e of the remainder at most, so the rounding errors of the
# differences, half a unit in the last place of 8, move it by less than 6 units; and with it the
# loss, whose 8 units may be as small as those of log(2).
CARE = math.exp(-7.0)


@function
def added(total, lost, x):
    """Add x to a sum that carries what its rounding lost (Knuth's two-sum)."""
    s = total + x
    t = s - total
    return s, lost + ((total - (s - t)) + (x - t))


@function
def top(p, n):
    """The maximum; nan if there is one."""
    m = typed(p, -math.inf)
    for j in range(n):
        m = maximum(load(p, j), m)
    return m


@function
def exps_into(p, e, n, m, t):
    """Write the exps of x - m to `e` and return their sum, all with the factor UP."""
    total = lost = typed(p, 0.0)
    for start in range(0, n, RUN):
        x, y = ahead(p, start), ahead(e, start)
        s = typed(p, 0.0)
        for j in range(min(RUN, n - start)):
            term = exp_up(over(load(x, j) - m, t))
            store(y, j, term)
            s = plus(s, term)
        total, lost = added(total, lost, s)
    return total + lost


@function
def softmax(p, e, o, n, t):
    """Write the probabilities of a row to `o`, by way of `e`, which may be `o`."""
    q = typed(p, 1.0) / exps_into(p, e, n, top(p, n), t)
    for j in range(n):
        store(o, j, load(e, j) * q)
