"""One row in consecutive memory.

`p` points to it and `n` is its length; `t` is the temperature, or an integer for none. Sums are
those of 2**64 * exp(d), see `_exp`: UP and DOWN are the factor and its inverse.
"""

from __future__ import annotations

import math

from numba import njit

from portable_softmax.kernels._numba._across import across_max, across_sum
from portable_softmax.kernels._numba._exp import (
    DOWN,
    UP,
    difference_error,
    exp,
    exp_up,
    log1p,
    where_positive,
)
from portable_softmax.kernels._numba._ir import either, load, maximum, typed
from portable_softmax.kernels._numba._vectors import (
    fma,
    lanes,
    larger,
    over,
    part,
    product,
    put,
    put_part,
    splat,
    to_be_read,
    vector,
    where_equal,
    where_finite,
)

function = njit(nogil=True, error_model="numpy", forceinline=True)

# So often four vectors are added up as they come, before their sum is carried over exactly. Many
# equal terms beside a 1 are all rounded in the same direction.
RUN = 4


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
    return where_finite(total, total + lost, total)


# --------------------------------------------------------------------------- vectors of a row
#
# Each returns a vector, whose lanes are still to be combined.


@function
def tops(p, n):
    """The maxima. A nan is passed over if a number follows it: it makes the sum a nan."""
    L = lanes(p)
    a = b = c = d = splat(p, -math.inf)
    j = 0
    while j + 4 * L <= n:
        a = larger(a, vector(p, j))
        b = larger(b, vector(p, j + L))
        c = larger(c, vector(p, j + 2 * L))
        d = larger(d, vector(p, j + 3 * L))
        j += 4 * L
    while j + L <= n:
        a = larger(a, vector(p, j))
        j += L
    if j < n:
        b = larger(b, part(p, j, n - j, -math.inf))
    return larger(larger(a, b), larger(c, d))


@function
def exps(p, e, n, m, t):
    """The sums of the exps of x - m, which go to `e` unless it is 0; all times UP."""
    L = lanes(p)
    total = lost = zero = splat(p, 0.0)
    j = 0
    while j + 4 * L <= n:
        s = zero
        stop = min(j + RUN * 4 * L, n) - 4 * L
        while j <= stop:
            for k in range(0, 4 * L, L):
                to_be_read(p, n + j + k)
            e0 = exp_up(over(vector(p, j) - m, t))
            e1 = exp_up(over(vector(p, j + L) - m, t))
            e2 = exp_up(over(vector(p, j + 2 * L) - m, t))
            e3 = exp_up(over(vector(p, j + 3 * L) - m, t))
            put(e, j, e0)
            put(e, j + L, e1)
            put(e, j + 2 * L, e2)
            put(e, j + 3 * L, e3)
            s = s + ((e0 + e1) + (e2 + e3))
            j += 4 * L
        total, lost = added(total, lost, s)
    s = zero
    while j + L <= n:
        e0 = exp_up(over(vector(p, j) - m, t))
        put(e, j, e0)
        s = s + e0
        j += L
    if j < n:
        e0 = exp_up(over(part(p, j, n - j, -math.inf) - m, t))
        put_part(e, j, e0, n - j)
        s = s + e0
    total, lost = added(total, lost, s)
    return total + lost


@function
def careful_term(x, m, t):
    """exp(x - m) times UP, with what rounding the difference lost put back to first order."""
    d = x - m
    e = exp_up(over(d, t))
    return where_positive(over(d, t), fma(e, over(difference_error(x, m, d), t), e))


@function
def careful_sums(p, n, m, t):
    """The sums of the terms below the maximum, times UP, and how many equal it."""
    L = lanes(p)
    up, one = splat(p, UP), splat(p, 1.0)
    total = lost = count = zero = splat(p, 0.0)
    j = 0
    while j + L <= n:
        s = zero
        stop = min(j + RUN * L, n) - L
        while j <= stop:
            e = careful_term(vector(p, j), m, t)
            s = s + where_equal(e, up, zero, e)
            count = count + where_equal(e, up, one, zero)
            j += L
        total, lost = added(total, lost, s)
    if j < n:
        e = careful_term(part(p, j, n - j, -math.inf), m, t)
        total, lost = added(total, lost, where_equal(e, up, zero, e))
        count = count + where_equal(e, up, one, zero)
    return total + lost, count


@function
def products(p, q, n):
    """The sums of y * dy."""
    L = lanes(p)
    total = lost = zero = splat(p, 0.0)
    j = 0
    while j + L <= n:
        s = zero
        stop = min(j + RUN * L, n) - L
        while j <= stop:
            s = s + vector(p, j) * vector(q, j)
            j += L
        total, lost = added(total, lost, s)
    if j < n:
        s = part(p, j, n - j, 0.0) * part(q, j, n - j, 0.0)
        total, lost = added(total, lost, s)
    return settled(total, lost)


@function
def counted(y, dy, left_out, zero):
    """`dy`, 0 where y is +-left_out."""
    return where_equal(y, left_out, zero, where_equal(y, zero - left_out, zero, dy))


@function
def gradients(p, q, n, left_out):
    """The sums of what counts of dy."""
    L = lanes(p)
    total = lost = zero = splat(p, 0.0)
    left_out = splat(p, left_out)
    j = 0
    while j + L <= n:
        s = zero
        stop = min(j + RUN * L, n) - L
        while j <= stop:
            s = s + counted(vector(p, j), vector(q, j), left_out, zero)
            j += L
        total, lost = added(total, lost, s)
    if j < n:
        s = counted(part(p, j, n - j, 0.0), part(q, j, n - j, 0.0), left_out, zero)
        total, lost = added(total, lost, s)
    return settled(total, lost)


# --------------------------------------------------------------------------- results of a row
#
# With what is known of the row in every lane.


@function
def write_scaled(e, o, n, a, b):
    """Write e * a * b, or e * a where `b` is an integer."""
    L = lanes(e)
    j = 0
    while j + L <= n:
        put(o, j, product(vector(e, j) * a, b))
        j += L
    if j < n:
        put_part(o, j, product(part(e, j, n - j, 0.0) * a, b), n - j)


@function
def write_logs(p, o, n, m, t, log):
    """Write (x - m) / t - log."""
    L = lanes(p)
    j = 0
    while j + L <= n:
        put(o, j, over(vector(p, j) - m, t) - log)
        j += L
    if j < n:
        put_part(o, j, over(part(p, j, n - j, 0.0) - m, t) - log, n - j)


@function
def write_softmax_vjp(p, q, o, n, s):
    """Write y * (dy - s)."""
    L = lanes(p)
    j = 0
    while j + L <= n:
        put(o, j, vector(p, j) * (vector(q, j) - s))
        j += L
    if j < n:
        put_part(o, j, part(p, j, n - j, 0.0) * (part(q, j, n - j, 0.0) - s), n - j)


@function
def write_log_softmax_vjp(p, q, o, n, left_out, s):
    """Write dy - exp(log_y) * s."""
    L = lanes(p)
    zero, left_out = splat(p, 0.0), splat(p, left_out)
    j = 0
    while j + L <= n:
        y = vector(p, j)
        put(o, j, counted(y, vector(q, j), left_out, zero) - exp(y) * s)
        j += L
    if j < n:
        y = part(p, j, n - j, 0.0)
        dy = counted(y, part(q, j, n - j, 0.0), left_out, zero)
        put_part(o, j, dy - exp(y) * s, n - j)


# --------------------------------------------------------------------------- numbers of a row


@function
def top(p, n):
    """The maximum; nan if there is one."""
    m = typed(p, -math.inf)
    for j in range(n):
        m = maximum(load(p, j), m)
    return m


@function
def careful_sum(p, n, m, t):
    """Return the sum of the terms below the maximum, times UP, and how many equal it."""
    below, count = careful_sums(p, n, splat(p, m), t)
    return across_sum(below), int(across_sum(count))


@function
def careful_rest(p, n, m, t):
    """The remainder, one maximum left out, to the last digits."""
    below, count = careful_sum(p, n, m, t)
    return (below + typed(p, float(count - 1)) * typed(p, UP)) * typed(p, DOWN)


@function
def is_plenty(rest, n):
    """Whether a remainder is large enough for the plain sum of its terms; nan is not."""
    return rest >= _enough(n)


@function
def settled_fold(p, n, m, rest, t):
    """The maximum and the remainder, where the plain ones were not good enough."""
    if m - m == 0:
        return m, careful_rest(p, n, m, t)
    return top(p, n), rest  # an infinity, or a nan passed over


@function
def fold(p, e, n, t):
    """Return a row's maximum and its remainder; the exps times UP go to `e` unless it is 0."""
    m = across_max(tops(p, n))
    rest = across_sum(exps(p, e, n, splat(p, m), t)) * typed(p, DOWN) - typed(p, 1.0)
    if not is_plenty(rest, n):
        m, rest = settled_fold(p, n, m, rest, t)
    return m, rest


# --------------------------------------------------------------------------- operations


@function
def softmax(p, scratch, o, n, t):
    """Write the probabilities of a row to `o`, by way of `scratch` if `o` rounds."""
    e = either(o, scratch)
    m = splat(p, across_max(tops(p, n)))
    q = typed(p, 1.0) / across_sum(exps(p, e, n, m, t))
    write_scaled(e, o, n, splat(p, q), 1)


@function
def log_softmax(p, o, n, t):
    """Write the logarithms of the probabilities to `o`."""
    m, rest = fold(p, 0, n, t)
    write_logs(p, o, n, splat(p, m), t, splat(p, log1p(rest)))


@function
def with_log(m, rest):
    """m + log(1 + rest); an infinite maximum as it is."""
    return where_finite(m, m + log1p(rest), m)


@function
def softmax_vjp(p, q, o, n):
    """Write y * (dy - sum(y * dy))."""
    write_softmax_vjp(p, q, o, n, splat(p, across_sum(products(p, q, n))))


@function
def log_softmax_vjp(p, q, o, n, left_out):
    """Write dy - exp(log_y) * sum(dy), `dy` counting as 0 where log_y is +-left_out."""
    s = splat(p, across_sum(gradients(p, q, n, left_out)))
    write_log_softmax_vjp(p, q, o, n, left_out, s)
