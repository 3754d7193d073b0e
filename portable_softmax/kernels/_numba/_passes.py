"""Passes over one row in consecutive memory: a main loop over whole vectors and a masked tail.

`p` points to the row and `n` is its length. What a pass returns is a vector before its horizontal
reduction, which `_columns` does without: there each lane is a row of its own. What is known of a
row beforehand, such as its maximum `m`, is a number or such a vector.

`at` is what exps of the row are taken of, `unit` that of the maximum, and `t` the temperature: see
`_exp`.
"""

from __future__ import annotations

import math

from numba import types
from numba.extending import overload

from portable_softmax.kernels._numba._compensation import added, compensated
from portable_softmax.kernels._numba._exp import (
    exp_up,
    exponent,
    log_softmax_vjp,
    log_softmax_vjp_of_many,
    size,
)
from portable_softmax.kernels._numba._horizontal import first_at_least, integer_at
from portable_softmax.kernels._numba._jit import INLINED, function
from portable_softmax.kernels._numba._memory import smaller
from portable_softmax.kernels._numba._vectors import (
    lanes,
    larger,
    prefetch_to_read,
    read,
    read_apart,
    splat,
    times,
    where_at_least,
    where_equal,
    write,
)

# A run is so many vectors, of exps four times as many. They are added up plainly before they go to
# the compensated sum: many equal terms beside a 1 would all be rounded in the same direction.
RUN = 4
RUN_OF_EXPS = 4 * RUN


@function
def maxima(p, n):
    """The maxima. A nan is passed over if a number follows it: it makes the sum a nan."""
    L = lanes(p)
    a = b = c = d = splat(p, -math.inf)
    j = 0
    while j + 4 * L <= n:
        a = larger(a, read(p, j, None, 0.0))
        b = larger(b, read(p, j + L, None, 0.0))
        c = larger(c, read(p, j + 2 * L, None, 0.0))
        d = larger(d, read(p, j + 3 * L, None, 0.0))
        j += 4 * L
    while j + L <= n:
        a = larger(a, read(p, j, None, 0.0))
        j += L
    if j < n:
        b = larger(b, read(p, j, n - j, -math.inf))
    return larger(larger(a, b), larger(c, d))


@function
def exps(p, e, following, n, at, unit, t):
    """The sums of the exps, and what their rounding lost; the exps go to `e` unless it is null.

    Then the sum of the last run that came to the unit, which the run of the maximum does, and where
    it begins. A later row, at `following`, is prefetched.
    """
    L = lanes(p)
    total = lost = held = begin = zero = splat(p, 0.0)
    j = 0
    while j < n:
        first, s, stop = j, zero, smaller(j + RUN_OF_EXPS * L, n)
        last = stop - 4 * L
        while j <= last:
            for k in range(0, 4 * L, L):
                prefetch_to_read(following, j + k, None)
            x0, x1 = read(p, j, None, 0.0), read(p, j + L, None, 0.0)
            x2, x3 = read(p, j + 2 * L, None, 0.0), read(p, j + 3 * L, None, 0.0)
            e0, e1 = exp_up(x0, at, t), exp_up(x1, at, t)
            e2, e3 = exp_up(x2, at, t), exp_up(x3, at, t)
            write(e, j, e0, None)
            write(e, j + L, e1, None)
            write(e, j + 2 * L, e2, None)
            write(e, j + 3 * L, e3, None)
            s = s + ((e0 + e1) + (e2 + e3))
            j += 4 * L
        while j + L <= stop:
            e0 = exp_up(read(p, j, None, 0.0), at, t)
            write(e, j, e0, None)
            s = s + e0
            j += L
        if j < stop:
            e0 = exp_up(read(p, j, n - j, -math.inf), at, t)
            write(e, j, e0, n - j)
            s = s + e0
            j = n
        total, lost = added(total, lost, s)
        held, begin = where_at_least(s, unit, s, held), where_at_least(s, unit, first, begin)
    return total, lost, held, begin


@function
def sums_below(p, n, at, unit, t):
    """The sums of the exps below that of the maximum, and how many equal it."""
    L = lanes(p)
    one = splat(p, 1.0)
    total = lost = count = zero = splat(p, 0.0)
    j = 0
    while j + L <= n:
        s = zero
        stop = smaller(j + RUN * L, n) - L
        while j <= stop:
            e = exp_up(read(p, j, None, 0.0), at, t)
            s = s + where_equal(e, unit, zero, e)
            count = count + where_equal(e, unit, one, zero)
            j += L
        total, lost = added(total, lost, s)
    if j < n:
        e = exp_up(read(p, j, n - j, -math.inf), at, t)
        total, lost = added(total, lost, where_equal(e, unit, zero, e))
        count = count + where_equal(e, unit, one, zero)
    return total + lost, count


def column(p, e, n, j, at, t):
    """The exps of p[j], p[j + L], ...: those at `e`, unless it is null; 0 from p[n] on."""


@overload(column, jit_options=INLINED)
def _column(p, e, n, j, at, t):
    if isinstance(e, types.Integer):
        return lambda p, e, n, j, at, t: exp_up(read_apart(p, j, n, -math.inf), at, t)
    return lambda p, e, n, j, at, t: read_apart(e, j, n, 0.0)


@function
def others(p, e, n, sums, at, unit, t):
    """The sums of the exps but for those equal to `unit`, in one lane at most.

    `sums` is what `exps` returned. All but the run of that lane is what its compensated sums are
    without it: the exps of the run are summed again.
    """
    total, lost, held, begin = sums
    s = (total - held) + lost
    lane = first_at_least(held, unit)
    if lane < lanes(p):
        first = integer_at(begin, lane) + lane
        for j in range(0, RUN_OF_EXPS * lanes(p), lanes(p) * lanes(p)):
            if first + j + (lanes(p) - 1) * lanes(p) < n:
                v = column(p, e, None, first + j, at, t)
            else:
                v = column(p, e, n, first + j, at, t)
            s = s + where_equal(v, unit, 0.0, v)
    return s


def sums_of(term, fill=0.0):
    """Return the pass that sums ``term(p[j], q[j], numbers)``, which is 0 where both are `fill`."""

    @function
    def sums(p, q, n, numbers):
        L = lanes(p)
        total = lost = zero = splat(p, 0.0)
        j = 0
        while j + L <= n:
            s = zero
            stop = smaller(j + RUN * L, n) - L
            while j <= stop:
                s = s + term(read(p, j, None, 0.0), read(q, j, None, 0.0), numbers)
                j += L
            total, lost = added(total, lost, s)
        if j < n:
            s = term(read(p, j, n - j, fill), read(q, j, n - j, fill), numbers)
            total, lost = added(total, lost, s)
        return compensated(total, lost)

    return sums


@function
def products(p, q, n, bound):
    """The sums of y * dy, and of dy where y is above a bound."""
    L = lanes(p)
    total = lost = above = zero = splat(p, 0.0)
    j = 0
    while j + L <= n:
        s = zero
        stop = smaller(j + RUN * L, n) - L
        while j <= stop:
            y, dy = read(p, j, None, 0.0), read(q, j, None, 0.0)
            s = s + y * dy
            above = above + where_at_least(bound, y, zero, dy)
            j += L
        total, lost = added(total, lost, s)
    if j < n:
        y, dy = read(p, j, n - j, 0.0), read(q, j, n - j, 0.0)
        total, lost = added(total, lost, y * dy)
        above = above + where_at_least(bound, y, zero, dy)
    return compensated(total, lost), above


@function
def distribution(p, q, following, n, m):
    """The sums of q * (m - x), 0 where q is, and of q. A later `q`, at `following`, is prefetched.

    What a nan would be at a q of 0 is in the sum of the exps.
    """
    L = lanes(p)
    gaps = lost = whole = lower = zero = splat(p, 0.0)
    j = 0
    while j + L <= n:
        s = v = zero
        stop = smaller(j + RUN * L, n) - L
        while j <= stop:
            prefetch_to_read(following, j, None)
            x, t = read(p, j, None, 0.0), read(q, j, None, 0.0)
            s, v = s + where_equal(t, 0.0, t, t * (m - x)), v + t
            j += L
        (gaps, lost), (whole, lower) = added(gaps, lost, s), added(whole, lower, v)
    if j < n:
        x, t = read(p, j, n - j, 0.0), read(q, j, n - j, 0.0)
        s = where_equal(t, 0.0, t, t * (m - x))
        (gaps, lost), (whole, lower) = added(gaps, lost, s), added(whole, lower, t)
    return compensated(gaps, lost), compensated(whole, lower)


def row_writing(entry):
    """Return the pass that writes ``entry(p[j], q[j], numbers)`` to `o`, which may be `p`."""

    @function
    def write_row(p, q, o, n, numbers):
        L = lanes(p)
        j = 0
        while j + L <= n:
            v = entry(read(p, j, None, 0.0), read(q, j, None, 0.0), numbers)
            write(o, j, v, None)
            j += L
        if j < n:
            v = entry(read(p, j, n - j, 0.0), read(q, j, n - j, 0.0), numbers)
            write(o, j, v, n - j)

    return write_row


@function
def counted(log_y, dy, numbers):
    """`dy`, 0 where log_y is +-left_out."""
    return where_equal(size(log_y), numbers[0], 0.0, dy)


@function
def _less_constant(y, dy, numbers):
    return y * (dy - numbers[0])


@function
def _gap(x, w, numbers):
    return times(w, numbers[0] - x)


@function
def _itself(x, _, numbers):
    return x


@function
def _softmax_vjp(y, dy, numbers):
    return y * ((dy - numbers[0]) - numbers[1])


products_less = sums_of(_less_constant)  # of y * (dy - c); numbers = (c,)
gradients = sums_of(counted)  # of what counts of dy; numbers = (left_out,)
sums = sums_of(_itself)
gaps = sums_of(_gap)  # of w_j (m - x_j); numbers = (m,)
write_softmax_vjp = row_writing(_softmax_vjp)  # y * ((dy - c) - s); numbers = (c, s)


# --------------------------------------------------------------------------- entries for layouts
#
# What `writing` of a layout takes: the first number is the factor of the exps. `inverse` is 1 over
# the sum of all exps, or over the unit where the sum of all but one is the `rest`.


@function
def probability(e, _, numbers):
    factor, inverse = numbers
    return e * factor * inverse


@function
def log_probability(x, _, numbers):
    _, m, log, t = numbers
    return exponent(x, m, t) - log


@function
def gradient_elsewhere(e, d, numbers):
    """The gradient of a loss at a class that is not the label: p A, times the slope `d`."""
    factor, a, inverse = numbers
    return e * factor * inverse * a * d


@function
def gradient_with_share(e, w, numbers):
    """The same where each class has a share of the target."""
    factor, a, rest, scale, unit, inverse, share = numbers
    return gradient_entry(_in_units(e * factor, unit, inverse), a, share * w, rest, scale)


@function
def soft_gradient(e, q, numbers):
    """The gradient where the labels are a distribution, without the cancellation of p Q - q."""
    factor, total, squared, rest, scale, unit, inverse = numbers
    p = _in_units(e * factor, unit, inverse)
    return (((p * total - q) - q * rest) + p * squared) * scale


@function
def _in_units(e, unit, inverse):
    """e / unit, an exact 1 for the maximum: what is left there of p Q - q is its rest."""
    return where_equal(e, unit, 1.0, e * inverse)


@function
def gradient_entry(p, a, q, rest, scale):
    """(p A - q (1 + rest)) * scale for the exp p of a class, without its cancellation."""
    return ((p * a - q) - q * rest) * scale


@function
def log_softmax_vjp_entry(log_y, dy, numbers):
    _, s, left_out = numbers
    return log_softmax_vjp(log_y, counted(log_y, dy, (left_out,)), s)


@function
def log_softmax_vjp_entry_of_many(log_y, dy, numbers):
    _, s, left_out = numbers
    return log_softmax_vjp_of_many(log_y, counted(log_y, dy, (left_out,)), s)
