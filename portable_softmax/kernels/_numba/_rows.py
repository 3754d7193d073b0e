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
    exp,
    exp_up,
    log1p,
    where_positive,
)
from portable_softmax.kernels._numba._ir import (
    ahead,
    chosen,
    either,
    fma,
    load,
    maximum,
    over,
    plus,
    store,
    store_if,
    typed,
)

function = njit(nogil=True, error_model="numpy")

# So many terms are summed as they come, each lane a few of them, before their sum is carried over
# exactly. Many equal terms beside a 1 are all rounded in the same direction.
RUN = 128


def enough(n: int) -> float:
    """Return the remainder from which on the plain sum of a row's terms is good enough.

    Terms below exp(-6) then make up 1/e of the remainder at most, and the differences of the others
    are off by half a unit in the last place of 8. What is lost is measured in units of log(1 +
    rest), which double at log(e): many classes may all lose alike, and have to reach that.
    """
    return max(1.0, min(2.0, n * math.exp(-4.0)), n * math.exp(-5.0))


_enough = function(enough)


@function
def added(total, lost, x):
    """Add x to a sum that carries what its rounding lost (Knuth's two-sum)."""
    s = total + x
    t = s - total
    return s, lost + ((total - (s - t)) + (x - t))


@function
def settled(total, lost):
    """The sum; an infinite one as it is."""
    return chosen(total - total == 0, total + lost, total)


@function
def top(p, n):
    """The maximum; nan if there is one."""
    m = typed(p, -math.inf)
    for j in range(n):
        m = maximum(load(p, j), m)
    return m


@function
def exps(p, e, n, m, t):
    """Return the sum of the exps of x - m, and write them to `e` unless it is 0; all times UP."""
    total = lost = typed(p, 0.0)
    for start in range(0, n, RUN):
        x = ahead(p, start)
        y = ahead(e, start)
        s = typed(p, 0.0)
        for j in range(min(RUN, n - start)):
            term = exp_up(over(load(x, j) - m, t))
            store_if(y, j, term)
            s = plus(s, term)
        total, lost = added(total, lost, s)
    return total + lost


@function
def careful_term(x, m, t):
    """exp(x - m) times UP, with what rounding the difference lost put back to first order."""
    d = x - m
    e = exp_up(over(d, t))
    return where_positive(over(d, t), fma(e, over(difference_error(x, m, d), t), e))


@function
def careful_sum(p, n, m, t):
    """Return the sum of the terms below the maximum, times UP, and how many equal it."""
    up, one, zero = typed(p, UP), typed(p, 1.0), typed(p, 0.0)
    total = lost = zero
    tops = 0
    for start in range(0, n, RUN):
        x = ahead(p, start)
        s = count = zero
        for j in range(min(RUN, n - start)):
            e = careful_term(load(x, j), m, t)
            is_top = e == up
            s = plus(s, chosen(is_top, zero, e))
            count = plus(count, chosen(is_top, one, zero))
        total, lost = added(total, lost, s)
        tops += int(count)
    return total + lost, tops


@function
def careful_rest(p, n, m, t):
    """The remainder, one maximum left out, to the last digits."""
    below, tops = careful_sum(p, n, m, t)
    return (below + typed(p, float(tops - 1)) * typed(p, UP)) * typed(p, DOWN)


@function
def is_plenty(rest, n):
    """Whether a remainder is large enough for the plain sum of its terms; nan is not."""
    return rest >= _enough(n)


@function
def fold(p, e, n, t):
    """Return a row's maximum and its remainder; the exps times UP go to `e` unless it is 0."""
    m = top(p, n)
    rest = exps(p, e, n, m, t) * typed(p, DOWN) - typed(p, 1.0)
    if not is_plenty(rest, n):
        rest = careful_rest(p, n, m, t)
    return m, rest


# --------------------------------------------------------------------------- operations


@function
def softmax(p, scratch, o, n, t):
    """Write the probabilities of a row to `o`, by way of `scratch` if `o` rounds."""
    e = either(o, scratch)
    q = typed(p, 1.0) / exps(p, e, n, top(p, n), t)
    for j in range(n):
        store(o, j, load(e, j) * q)


@function
def log_softmax(p, o, n, t):
    """Write the logarithms of the probabilities to `o`."""
    m, rest = fold(p, 0, n, t)
    log = log1p(rest)
    for j in range(n):
        store(o, j, over(load(p, j) - m, t) - log)


@function
def with_log(m, rest):
    """m + log(1 + rest); an infinite maximum as it is."""
    return chosen(m - m == 0, m + log1p(rest), m)


@function
def softmax_vjp(p, q, o, n):
    """Write y * (dy - sum(y * dy))."""
    total = lost = typed(p, 0.0)
    for start in range(0, n, RUN):
        y, dy = ahead(p, start), ahead(q, start)
        s = typed(p, 0.0)
        for j in range(min(RUN, n - start)):
            s = plus(s, load(y, j) * load(dy, j))
        total, lost = added(total, lost, s)
    s = settled(total, lost)
    for j in range(n):
        store(o, j, load(p, j) * (load(q, j) - s))


@function
def log_softmax_vjp(p, q, o, n, left_out):
    """Write dy - exp(log_y) * sum(dy), `dy` counting as 0 where log_y is +-left_out."""
    zero, limit = typed(p, 0.0), typed(p, left_out)
    total = lost = zero
    for start in range(0, n, RUN):
        y, dy = ahead(p, start), ahead(q, start)
        s = zero
        for j in range(min(RUN, n - start)):
            s = plus(s, chosen(abs(load(y, j)) == limit, zero, load(dy, j)))
        total, lost = added(total, lost, s)
    s = settled(total, lost)
    for j in range(n):
        y = load(p, j)
        dy = chosen(abs(y) == limit, zero, load(q, j))
        store(o, j, dy - exp(y) * s)
