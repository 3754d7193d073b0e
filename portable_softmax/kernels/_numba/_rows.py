"""Rows one after the other in memory, worked on one by one: a layout.

A layout is a module with the functions below: `_blocks` has them for blocks of short rows and
`_columns` for rows that run across memory. `_entries` and `_losses` know rows by them alone. They
work on a group of `rows` rows of `n` classes, here one. The room of a group begins with its
per-position values, `height` apart, of the kinds that `_values` lists; the rest is the layout's.

`p` and `q` point to the group's first number, `o` to that of the result, and `e` to where exps go,
if the results are not of the dtype that is computed in.
"""

from __future__ import annotations

import math

from portable_softmax.kernels._numba import _long
from portable_softmax.kernels._numba._exp import DOWN, UP, log1p
from portable_softmax.kernels._numba._horizontal import are_at_least, max_of_all, sum_of_all
from portable_softmax.kernels._numba._jit import function
from portable_softmax.kernels._numba._long import PART
from portable_softmax.kernels._numba._memory import ahead, either, load, store, typed
from portable_softmax.kernels._numba._passes import (
    careful_sums,
    enough,
    exps,
    gaps,
    gradients,
    maxima,
    products,
    write_gradient,
    write_log_softmax_vjp,
    write_logs,
    write_scaled,
    write_scaled_twice,
    write_softmax_vjp,
)
from portable_softmax.kernels._numba._values import (
    FACTOR,
    GAPS,
    LOGSUMEXP,
    MAX,
    REST,
    SLOPE,
    after_values,
    values,
)
from portable_softmax.kernels._numba._vectors import where_finite

# --------------------------------------------------------------------------- the group


@function
def height(room, wanted):
    """How many rows a group has."""
    return 1


@function
def place(i, T, n, total):
    """Return where the i-th group begins, how many rows it has, and the number of its first."""
    return i * n, 1, i


@function
def element(room, r, y, n):
    """Where the class y of the r-th row of a group is."""
    return r * n + y


@function
def fetch(source, tile, room, T, n, inner, rows):
    """Return where a group can be read, in the dtype of the computation or not."""
    return source


@function
def target(o, tile, room, T, n):
    """Return where the result of a group can be written."""
    return o


@function
def deliver(written, o, T, n, inner, rows):
    """Bring a result to its place."""


@function
def scratch(o, room, T, n):
    """Where exps go: to the result if that has the dtype of the computation."""
    return either(o, ahead(after_values(room, T), _long.space(n)))


# Values of a group are read and written as many at once: `step`.


@function
def step(room):
    return 1


@function
def get(values, r):
    return load(values, r)


@function
def put(values, r, value):
    store(values, r, value)


# --------------------------------------------------------------------------- one row


@function
def sum_of_exps(p, e, n, t, factors):
    """Return the maximum and the sum of the exps; these go to `e`, but for the parts' factors."""
    if n > PART:
        return _long.sum_of_exps(p, e, n, t, factors)
    m = max_of_all(maxima(p, n))
    return m, sum_of_all(exps(p, e, ahead(p, n), n, m, t))


@function
def top(p, n, between):
    """The maximum of numbers that lie `between` apart; nan if one is."""
    m = typed(p, -math.inf)
    for j in range(n):
        x = load(p, j * between)
        if x > m or x != x:
            m = x
    return m


@function
def remainder(p, e, n, t, factors):
    """Return the maximum and the remainder, one maximum left out."""
    m, s = sum_of_exps(p, e, n, t, factors)
    rest = s * typed(p, DOWN) - typed(p, 1.0)
    if not are_at_least(rest, enough(n)):
        if m - m == 0:
            below, count = careful_sums(p, n, m, t)
            ones = (sum_of_all(count) - typed(p, 1.0)) * typed(p, UP)
            rest = (sum_of_all(below) + ones) * typed(p, DOWN)
        else:
            m = top(p, n, 1)  # an infinity, or a nan passed over
    return m, rest


# --------------------------------------------------------------------------- operations


@function
def fold(p, e, n, rows, T, room):
    """Write maxima and remainders; the exps go to `e` unless it is nowhere."""
    m, rest = remainder(p, e, n, 1, after_values(room, T))
    store(values(room, MAX, T), 0, m)
    store(values(room, REST, T), 0, rest)


@function
def softmax(p, o, n, rows, T, room, t):
    """Write the probabilities."""
    e, factors, one = scratch(o, room, T, n), after_values(room, T), typed(p, 1.0)
    _, s = sum_of_exps(p, e, n, t, factors)
    if n <= PART:
        write_scaled(e, 0.0, o, n, (one / s,))
    else:
        for j in range(0, n, PART):
            numbers = load(_long.factor_of(factors, j), 0), one / s
            write_scaled_twice(ahead(e, j), 0.0, ahead(o, j), min(PART, n - j), numbers)


@function
def log_softmax(p, o, n, rows, T, room, t):
    """Write the logarithms of the probabilities."""
    m, rest = remainder(p, 0, n, t, after_values(room, T))
    write_logs(p, 0.0, o, n, (m, t, log1p(rest)))


@function
def logsumexp(p, n, rows, T, room):
    """Write max + log1p(rest) to the values; an infinite maximum as it is."""
    m, rest = remainder(p, 0, n, 1, after_values(room, T))
    store(values(room, LOGSUMEXP, T), 0, where_finite(m, m + log1p(rest), m))


@function
def softmax_vjp(p, q, o, n, rows, T, room, _):
    """Write y * (dy - sum(y * dy))."""
    write_softmax_vjp(p, q, o, n, (sum_of_all(products(p, q, n, ())),))


@function
def log_softmax_vjp(p, q, o, n, rows, T, room, left_out):
    """Write dy - exp(log_y) * sum(dy), `dy` counting as 0 where log_y is +-left_out."""
    left_out = typed(p, left_out)
    s = sum_of_all(gradients(p, q, n, (left_out,)))
    write_log_softmax_vjp(p, q, o, n, (left_out, s))


@function
def write_gaps(p, w, n, rows, T, room):
    """Write sum_j w_j (max - x_j) to the values."""
    m = load(values(room, MAX, T), 0)
    store(values(room, GAPS, T), 0, sum_of_all(gaps(p, w, n, (m,))))


@function
def write_sparse(e, o, n, rows, T, room):
    """Write the gradients of a loss, but for the labels, from exps: SLOPE * FACTOR * p_j."""
    a = load(values(room, SLOPE, T), 0) * load(values(room, FACTOR, T), 0)
    factors = after_values(room, T)
    if n <= PART:
        write_scaled_twice(e, 0.0, o, n, (a, DOWN))
    else:
        for j in range(0, n, PART):
            numbers = a * load(_long.factor_of(factors, j), 0), DOWN
            write_scaled_twice(ahead(e, j), 0.0, ahead(o, j), min(PART, n - j), numbers)


@function
def write_dense(e, o, w, share, n, rows, T, room):
    """As `write_sparse`, where each class has a share q_j = share * w_j of the target."""
    a, inverse = load(values(room, SLOPE, T), 0), load(values(room, FACTOR, T), 0)
    rest, factors = load(values(room, REST, T), 0), after_values(room, T)
    if n <= PART:
        write_gradient(e, w, o, n, (typed(room, 1.0), DOWN, share, a, rest, inverse))
    else:
        for j in range(0, n, PART):
            numbers = load(_long.factor_of(factors, j), 0), DOWN, share, a, rest, inverse
            write_gradient(ahead(e, j), ahead(w, j), ahead(o, j), min(PART, n - j), numbers)
