"""Blocks of short rows, one after the other in memory.

Rows are read as `_rows` reads them, but what their vectors come to is combined for as many rows at
once as a vector has lanes: the i-th lane is the i-th row's. `room` begins with a vector for each
row of a block, still to be combined; then come the numbers of the rows, see `_many` for their
order. It lies where vectors do not cross lines of the cache.
"""

from __future__ import annotations

import math

from numba import njit

from portable_softmax.kernels._numba._across import max_of_each, sum_of_each, tallied, tally
from portable_softmax.kernels._numba._exp import DOWN, UP, exp_up, log1p
from portable_softmax.kernels._numba._ir import ahead, either, load, store
from portable_softmax.kernels._numba._rows import (
    careful_term,
    gradients,
    products,
    top,
    with_log,
    write_log_softmax_vjp,
    write_softmax_vjp,
)
from portable_softmax.kernels._numba._vectors import (
    are_finite,
    lanes,
    larger,
    over,
    part,
    product,
    put,
    put_part,
    splat,
    to_be_read,
    to_be_written,
    vector,
    where_equal,
)

function = njit(nogil=True, error_model="numpy", forceinline=True)

# A block is as many rows as this many vectors have lanes: one pass after the other, of a single
# vector's rows each would wait for the one before.
TIMES = 4
NUMBERS = 9


def rows_of_block(lanes: int) -> int:
    """Return how many rows a block has."""
    return TIMES * lanes


def size_of_room(lanes: int) -> int:
    """Return how many numbers the room takes."""
    return rows_of_block(lanes) * (lanes + NUMBERS)


@function
def height(room):
    """How many rows a block has, known when compiling."""
    return TIMES * lanes(room)


@function
def behind(room):
    """Where the room ends."""
    return ahead(room, height(room) * (lanes(room) + NUMBERS))


@function
def numbers(room, i):
    """Where the i-th number of each row is."""
    return ahead(room, height(room) * (lanes(room) + i))


@function
def combine_max(room, o):
    """Write the maximum of each row's vector."""
    L = lanes(room)
    for r in range(0, height(room), L):
        put(o, r, max_of_each(ahead(room, r * L)))


@function
def combine_sum(room, o):
    """Write the sum of each row's vector."""
    L = lanes(room)
    for r in range(0, height(room), L):
        put(o, r, sum_of_each(ahead(room, r * L)))


# --------------------------------------------------------------------------- passes
#
# Vector by vector, all rows in turn: nothing in the inner loops depends on the length of a row.


@function
def gather_max(room, r, v, first):
    """Bring a row's next vector to the largest before it; `first` is the same for all rows."""
    L = lanes(room)
    put(room, r * L, v if first else larger(vector(room, r * L), v))


@function
def gather_sum(room, r, v, first):
    """Add a row's next vector to those before it."""
    L = lanes(room)
    put(room, r * L, v if first else vector(room, r * L) + v)


@function
def tops(p, o, n, rows, room):
    """Write the maxima of each row's lanes to the room, as `_rows.tops`.

    It asks for the place of the result, and the next pass for the next block: one by one, or too
    many lines of the cache would be on their way.
    """
    L = lanes(p)
    for j in range(0, n - n % L, L):
        x, first = ahead(p, j), j == 0
        for r in range(rows):
            to_be_written(o, r * n + j)
            gather_max(room, r, vector(x, r * n), first)
    k = n % L
    if k:
        x, first = ahead(p, n - k), n < L
        for r in range(rows):
            gather_max(room, r, part(x, r * n, k, -math.inf), first)


@function
def exps(p, e, n, rows, room, m, t):
    """Write the sums of each row's lanes to the room, as `_rows.exps`."""
    L, block = lanes(p), height(room) * n
    for j in range(0, n - n % L, L):
        x, y, first = ahead(p, j), ahead(e, j), j == 0
        for r in range(rows):
            to_be_read(x, r * n + block)
            term = exp_up(over(vector(x, r * n) - splat(m, load(m, r)), t))
            put(y, r * n, term)
            gather_sum(room, r, term, first)
    k = n % L
    if k:
        x, y, first = ahead(p, n - k), ahead(e, n - k), n < L
        for r in range(rows):
            term = exp_up(over(part(x, r * n, k, -math.inf) - splat(m, load(m, r)), t))
            put_part(y, r * n, term, k)
            gather_sum(room, r, term, first)


@function
def careful_exps(p, e, n, rows, room, m, t, count):
    """As `exps`, of the terms below the maxima, each to the last digits; the others are counted."""
    L, block = lanes(p), height(room) * n
    up, zero = splat(p, UP), splat(p, 0.0)
    for r in range(0, height(room), L):
        put(count, r, zero)
    for j in range(0, n - n % L, L):
        x, y, first = ahead(p, j), ahead(e, j), j == 0
        for r in range(rows):
            to_be_read(x, r * n + block)
            term = careful_term(vector(x, r * n), splat(m, load(m, r)), t)
            put(y, r * n, term)
            tally(count, r, term, up)
            gather_sum(room, r, where_equal(term, up, zero, term), first)
    k = n % L
    if k:
        x, y, first = ahead(p, n - k), ahead(e, n - k), n < L
        for r in range(rows):
            term = careful_term(part(x, r * n, k, -math.inf), splat(m, load(m, r)), t)
            put_part(y, r * n, term, k)
            tally(count, r, term, up)
            gather_sum(room, r, where_equal(term, up, zero, term), first)


@function
def scale(e, o, n, rows, a, b):
    """Write e times each row's number times `b`, an integer for 1."""
    L = lanes(e)
    for j in range(0, n - n % L, L):
        x, y = ahead(e, j), ahead(o, j)
        for r in range(rows):
            put(y, r * n, product(vector(x, r * n) * splat(a, load(a, r)), b))
    k = n % L
    if k:
        x, y = ahead(e, n - k), ahead(o, n - k)
        for r in range(rows):
            v = part(x, r * n, k, 0.0) * splat(a, load(a, r))
            put_part(y, r * n, product(v, b), k)


@function
def logs(p, o, n, rows, m, t, log):
    """Write (x - m) / t - log."""
    L = lanes(p)
    for j in range(0, n - n % L, L):
        x, y = ahead(p, j), ahead(o, j)
        for r in range(rows):
            d = over(vector(x, r * n) - splat(m, load(m, r)), t)
            put(y, r * n, d - splat(log, load(log, r)))
    k = n % L
    if k:
        x, y = ahead(p, n - k), ahead(o, n - k)
        for r in range(rows):
            d = over(part(x, r * n, k, 0.0) - splat(m, load(m, r)), t)
            put_part(y, r * n, d - splat(log, load(log, r)), k)


@function
def remainders(p, e, o, n, rows, room, t):
    """Write maxima and remainders to the first two numbers; the exps go to `e` unless it is 0.

    `o` is where the result will be, 0 where there is none of that size.
    Always with care: that costs less than to find out which rows want it.
    """
    L, m, s, count = lanes(room), numbers(room, 0), numbers(room, 1), numbers(room, 2)
    tops(p, o, n, rows, room)
    combine_max(room, m)
    careful_exps(p, e, n, rows, room, m, t, count)
    combine_sum(room, s)
    for i in range(0, height(room), L):
        put(s, i, (vector(s, i) + (tallied(count, i) - 1.0) * UP) * DOWN)
        if not are_finite(vector(m, i)):  # an infinity may have passed over a nan
            for r in range(i, min(i + L, rows)):
                store(m, r, top(ahead(p, r * n), n))


# --------------------------------------------------------------------------- operations


@function
def softmax(p, scratch, o, n, rows, room, t):
    """Write the probabilities of rows to `o`, by way of `scratch` if `o` rounds."""
    L, e, m, s = lanes(room), either(o, scratch), numbers(room, 0), numbers(room, 1)
    tops(p, o, n, rows, room)
    combine_max(room, m)
    exps(p, e, n, rows, room, m, t)
    combine_sum(room, s)
    for i in range(0, height(room), L):
        put(s, i, 1.0 / vector(s, i))
    scale(e, o, n, rows, s, 1)


@function
def log_softmax(p, o, n, rows, room, t):
    """Write the logarithms of the probabilities to `o`."""
    remainders(p, 0, o, n, rows, room, t)
    L, m, s = lanes(room), numbers(room, 0), numbers(room, 1)
    for i in range(0, height(room), L):
        put(s, i, log1p(vector(s, i)))
    logs(p, o, n, rows, m, t, s)


@function
def logsumexp(p, n, rows, room):
    """Write the logarithms of the sums to the first numbers."""
    remainders(p, 0, 0, n, rows, room, 1)
    L, m, s = lanes(room), numbers(room, 0), numbers(room, 1)
    for i in range(0, height(room), L):
        put(m, i, with_log(vector(m, i), vector(s, i)))


@function
def softmax_vjp(p, q, o, n, rows, room):
    """Write y * (dy - sum(y * dy))."""
    L, s = lanes(room), numbers(room, 0)
    for r in range(rows):
        put(room, r * L, products(ahead(p, r * n), ahead(q, r * n), n))
    combine_sum(room, s)
    for r in range(rows):
        at = r * n
        write_softmax_vjp(ahead(p, at), ahead(q, at), ahead(o, at), n, splat(s, load(s, r)))


@function
def log_softmax_vjp(p, q, o, n, rows, room, left_out):
    """Write dy - exp(log_y) * sum(dy), `dy` counting as 0 where log_y is +-left_out."""
    L, s = lanes(room), numbers(room, 0)
    for r in range(rows):
        put(room, r * L, gradients(ahead(p, r * n), ahead(q, r * n), n, left_out))
    combine_sum(room, s)
    for r in range(rows):
        at, total = r * n, splat(s, load(s, r))
        write_log_softmax_vjp(ahead(p, at), ahead(q, at), ahead(o, at), n, left_out, total)
