"""Many rows at once, one a lane: rows that run across memory.

A tile holds `n` classes of `T` rows in the dtype of the computation, class after class, T a
multiple of 16. What is not filled by a row holds what it holds: lanes do not meet.
"""

from __future__ import annotations

import math

from numba import njit

from portable_softmax.kernels._numba._exp import DOWN, UP, exp, exp_up, log1p
from portable_softmax.kernels._numba._ir import (
    ahead,
    chosen,
    load,
    maximum,
    store,
    typed,
)
from portable_softmax.kernels._numba._rows import (
    added,
    careful_term,
    is_plenty,
    settled,
    with_log,
)
from portable_softmax.kernels._numba._vectors import over

function = njit(nogil=True, error_model="numpy")

# So many classes are summed as they come.
RUN = 16


# --------------------------------------------------------------------------- in and out


@function
def block(i, T, n, inner):
    """Return where the i-th block begins, how many rows it has, and the number of its first."""
    blocks = (inner + T - 1) // T
    column = i % blocks * T
    outer = i // blocks * inner
    return outer * n + column, min(T, inner - column), outer + column


@function
def fetch(source, tile, T, n, inner, rows):
    """Copy a block to a tile."""
    for j in range(n):
        x, y = ahead(source, j * inner), ahead(tile, j * T)
        for i in range(rows):
            store(y, i, load(x, i))


@function
def deliver(tile, target, T, n, inner, rows):
    """Copy a tile to a block."""
    for j in range(n):
        x, y = ahead(tile, j * T), ahead(target, j * inner)
        for i in range(rows):
            store(y, i, load(x, i))


# --------------------------------------------------------------------------- operations
#
# `lanes` has room for LANE_NUMBERS numbers a lane: the maximum, a sum of the last classes, the sum
# and what its rounding lost, how many maxima there are, four of `_many`, and the plain remainder.

LANE_NUMBERS = 10


@function
def fill(lane, T, value):
    for i in range(T):
        store(lane, i, typed(lane, value))


@function
def tops(x, n, T, m):
    """Write the maxima to `m`."""
    fill(m, T, -math.inf)
    for j in range(n):
        c = ahead(x, j * T)
        for i in range(T):
            store(m, i, maximum(load(c, i), load(m, i)))


@function
def carry(s, total, lost, T):
    """Add `s` to the sums and clear it."""
    for i in range(T):
        a, b = added(load(total, i), load(lost, i), load(s, i))
        store(total, i, a)
        store(lost, i, b)
        store(s, i, typed(s, 0.0))


@function
def add_exps(x, e, start, stop, T, m, s, t):
    """Add the exps of some classes, times UP, to `s`; they go to `e` unless it is 0.

    Four by four: many equal terms beside a 1 would all be rounded in the same direction.
    """
    j = start
    while j + 4 <= stop:
        c, d = ahead(x, j * T), ahead(e, j * T)
        for i in range(T):
            top = load(m, i)
            e0 = exp_up(over(load(c, i) - top, t))
            e1 = exp_up(over(load(c, i + T) - top, t))
            e2 = exp_up(over(load(c, i + 2 * T) - top, t))
            e3 = exp_up(over(load(c, i + 3 * T) - top, t))
            store(d, i, e0)
            store(d, i + T, e1)
            store(d, i + 2 * T, e2)
            store(d, i + 3 * T, e3)
            store(s, i, load(s, i) + ((e0 + e1) + (e2 + e3)))
        j += 4
    while j < stop:
        c, d = ahead(x, j * T), ahead(e, j * T)
        for i in range(T):
            term = exp_up(over(load(c, i) - load(m, i), t))
            store(d, i, term)
            store(s, i, load(s, i) + term)
        j += 1


@function
def softmax(x, e, n, T, lanes, t):
    """Write the probabilities of a tile to another."""
    m, s, total, lost = lanes, ahead(lanes, T), ahead(lanes, 2 * T), ahead(lanes, 3 * T)
    tops(x, n, T, m)
    fill(s, 3 * T, 0.0)
    for start in range(0, n, RUN):
        add_exps(x, e, start, min(start + RUN, n), T, m, s, t)
        carry(s, total, lost, T)
    for i in range(T):
        store(s, i, typed(m, 1.0) / (load(total, i) + load(lost, i)))
    for j in range(n):
        c = ahead(e, j * T)
        for i in range(T):
            store(c, i, load(c, i) * load(s, i))


@function
def fold(x, e, n, T, lanes, t):
    """Write maxima and remainders to the first two lanes; exps times UP go to `e` unless it is 0.

    As `_rows.fold` for one row: with care where any row of the tile wants it.
    """
    m, s, total, lost = lanes, ahead(lanes, T), ahead(lanes, 2 * T), ahead(lanes, 3 * T)
    one = typed(m, 1.0)
    tops(x, n, T, m)
    fill(s, 3 * T, 0.0)
    for start in range(0, n, RUN):
        add_exps(x, e, start, min(start + RUN, n), T, m, s, t)
        carry(s, total, lost, T)
    small, plain = 0, ahead(lanes, 9 * T)
    for i in range(T):
        rest = (load(total, i) + load(lost, i)) * typed(m, DOWN) - one
        store(s, i, rest)
        store(plain, i, rest)
        small += not is_plenty(rest, n)
    if small:
        careful_rests(x, n, T, lanes, t)
        for i in range(T):  # a row's digits do not depend on its neighbours
            rest = load(plain, i)
            store(s, i, chosen(is_plenty(rest, n), rest, load(s, i)))


@function
def careful_rests(x, n, T, lanes, t):
    """Write the remainders, one maximum left out, to the last digits."""
    m, s, total, lost = lanes, ahead(lanes, T), ahead(lanes, 2 * T), ahead(lanes, 3 * T)
    count = ahead(lanes, 4 * T)
    up, one, zero = typed(m, UP), typed(m, 1.0), typed(m, 0.0)
    fill(s, 4 * T, 0.0)
    for start in range(0, n, RUN):
        for j in range(start, min(start + RUN, n)):
            c = ahead(x, j * T)
            for i in range(T):
                term = careful_term(load(c, i), load(m, i), t)
                is_top = term == up
                store(s, i, load(s, i) + chosen(is_top, zero, term))
                store(count, i, load(count, i) + chosen(is_top, one, zero))
        carry(s, total, lost, T)
    for i in range(T):
        rest = (load(total, i) + load(lost, i)) + (load(count, i) - one) * up
        store(s, i, rest * typed(m, DOWN))


@function
def log_softmax(x, n, T, lanes, t):
    """Turn a tile into the logarithms of its probabilities."""
    m, s = lanes, ahead(lanes, T)
    fold(x, 0, n, T, lanes, t)
    for i in range(T):
        store(s, i, log1p(load(s, i)))
    for j in range(n):
        c = ahead(x, j * T)
        for i in range(T):
            store(c, i, over(load(c, i) - load(m, i), t) - load(s, i))


@function
def logsumexp(x, n, T, lanes):
    """Write the logarithms of the sums to the first lane."""
    m, s = lanes, ahead(lanes, T)
    fold(x, 0, n, T, lanes, 1)
    for i in range(T):
        store(m, i, with_log(load(m, i), load(s, i)))


@function
def softmax_vjp(y, dy, n, T, lanes):
    """Turn y into y * (dy - sum(y * dy))."""
    s, total, lost = ahead(lanes, T), ahead(lanes, 2 * T), ahead(lanes, 3 * T)
    fill(s, 3 * T, 0.0)
    for start in range(0, n, RUN):
        for j in range(start, min(start + RUN, n)):
            a, b = ahead(y, j * T), ahead(dy, j * T)
            for i in range(T):
                store(s, i, load(s, i) + load(a, i) * load(b, i))
        carry(s, total, lost, T)
    for j in range(n):
        a, b = ahead(y, j * T), ahead(dy, j * T)
        for i in range(T):
            store(a, i, load(a, i) * (load(b, i) - settled(load(total, i), load(lost, i))))


@function
def log_softmax_vjp(log_y, dy, n, T, lanes, left_out):
    """Turn log_y into dy - exp(log_y) * sum(dy), `dy` counting as 0 where log_y is +-left_out."""
    s, total, lost = ahead(lanes, T), ahead(lanes, 2 * T), ahead(lanes, 3 * T)
    zero = typed(s, 0.0)
    fill(s, 3 * T, 0.0)
    for start in range(0, n, RUN):
        for j in range(start, min(start + RUN, n)):
            a, b = ahead(log_y, j * T), ahead(dy, j * T)
            for i in range(T):
                u = chosen(abs(load(a, i)) == typed(s, left_out), zero, load(b, i))
                store(b, i, u)
                store(s, i, load(s, i) + u)
        carry(s, total, lost, T)
    for j in range(n):
        a, b = ahead(log_y, j * T), ahead(dy, j * T)
        for i in range(T):
            store(a, i, load(b, i) - exp(load(a, i)) * settled(load(total, i), load(lost, i)))
