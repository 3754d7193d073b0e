"""Blocks of short rows, one after the other in memory: a layout, see `_rows`.

Rows are read as in `_passes`, but all rows of a block in turn for each vector, and what their
vectors come to is reduced for as many rows at once as a vector has lanes: the i-th lane is the i-th
row's. The room lies where vectors do not cross lines of the cache; after its values it has a vector
for each row, still to be reduced.
"""

from __future__ import annotations

import math

from portable_softmax.kernels._numba._exp import (
    DOWN,
    UP,
    careful_exp_up,
    exp_up,
    exponent,
    log1p,
)
from portable_softmax.kernels._numba._horizontal import (
    are_finite,
    count_equal,
    counts,
    max_of_each,
    sum_of_all,
    sum_of_each,
)
from portable_softmax.kernels._numba._jit import function
from portable_softmax.kernels._numba._memory import ahead, either, load, store, typed
from portable_softmax.kernels._numba._passes import (
    gaps,
    gradients,
    products,
    write_gradient,
    write_log_softmax_vjp,
    write_softmax_vjp,
)
from portable_softmax.kernels._numba._rows import top
from portable_softmax.kernels._numba._values import (
    COUNT,
    FACTOR,
    GAPS,
    LOGSUMEXP,
    MAX,
    REST,
    SLOPE,
    after_values,
    values,
)
from portable_softmax.kernels._numba._vectors import (
    lanes,
    larger,
    prefetch_to_read,
    prefetch_to_write,
    read,
    splat,
    where_equal,
    where_finite,
    write,
)

# A block is as many rows as this many vectors have lanes: one pass after the other, of a single
# vector's rows each would wait for the one before.
VECTORS = 4


# --------------------------------------------------------------------------- the group


@function
def height(room, wanted):
    """How many rows a block has, known when compiling."""
    return VECTORS * lanes(room)


@function
def place(i, T, n, total):
    """Return where the i-th group begins, how many rows it has, and the number of its first."""
    return i * T * n, min(T, total - i * T), i * T


@function
def scratch(o, room, T, n):
    """Where exps go: to the result if that has the dtype of the computation."""
    return either(o, ahead(after_values(room, T), T * lanes(room)))


@function
def step(room):
    return lanes(room)


@function
def get(values, r):
    return read(values, r, None, 0.0)


@function
def put(values, r, value):
    write(values, r, value, None)


# --------------------------------------------------------------------------- passes
#
# Vector by vector, all rows in turn: nothing in the inner loops depends on the length of a row.


def _pass(body):
    """Return the pass that calls ``body(x, y, r, n, room, first, k, numbers)`` for each vector.

    `x` points to the vector of the first row of the block, and `y` to where its exps or results go.
    """

    @function
    def run(p, e, n, rows, room, numbers):
        k = n % lanes(p)
        for j in range(0, n - k, lanes(p)):
            x, y = ahead(p, j), ahead(e, j)
            for r in range(rows):
                body(x, y, r, n, room, j == 0, None, numbers)
        if k:
            x, y = ahead(p, n - k), ahead(e, n - k)
            for r in range(rows):
                body(x, y, r, n, room, n < lanes(p), k, numbers)

    return run


@function
def _unreduced(room):
    """Where the vectors of the rows are."""
    return after_values(room, height(room, 0))


@function
def _add(room, r, v, first):
    """Add a row's next vector to those before it; `first` is the same for all rows."""
    at = r * lanes(room)
    place = _unreduced(room)
    write(place, at, v if first else read(place, at, None, 0.0) + v, None)


@function
def _maximum(x, o, r, n, room, first, k, numbers):
    """It asks for the place of the result, and the next pass for the next block.

    One by one, or too many lines of the cache would be on their way.
    """
    at, place, v = r * lanes(room), _unreduced(room), read(x, r * n, k, -math.inf)
    prefetch_to_write(o, r * n, k)
    write(place, at, v if first else larger(read(place, at, None, 0.0), v), None)


@function
def _exp(x, e, r, n, room, first, k, numbers):
    m, t = numbers
    prefetch_to_read(x, r * n + height(room, 0) * n, k)
    v = exp_up(exponent(read(x, r * n, k, -math.inf), splat(x, load(m, r)), t))
    write(e, r * n, v, k)
    _add(room, r, v, first)


@function
def _careful_exp(x, e, r, n, room, first, k, numbers):
    """As `_exp`, to the last digits; those that equal the maximum are counted instead."""
    m, t, count = numbers
    prefetch_to_read(x, r * n + height(room, 0) * n, k)
    v, up = careful_exp_up(read(x, r * n, k, -math.inf), splat(x, load(m, r)), t), splat(x, UP)
    write(e, r * n, v, k)
    count_equal(count, r, v, up)
    _add(room, r, where_equal(v, up, splat(x, 0.0), v), first)


@function
def _scaled(e, o, r, n, room, first, k, numbers):
    write(o, r * n, read(e, r * n, k, 0.0) * load(numbers[0], r), k)


@function
def _scaled_twice(e, o, r, n, room, first, k, numbers):
    write(o, r * n, read(e, r * n, k, 0.0) * load(numbers[0], r) * numbers[1], k)


@function
def _log(x, o, r, n, room, first, k, numbers):
    m, t, log = numbers
    d = exponent(read(x, r * n, k, 0.0), splat(x, load(m, r)), t)
    write(o, r * n, d - load(log, r), k)


_maxima, _exps, _careful_exps, _write_scaled, _write_scaled_twice, _write_logs = map(
    _pass, (_maximum, _exp, _careful_exp, _scaled, _scaled_twice, _log)
)


@function
def _write_maxima(room, o):
    L = lanes(room)
    for r in range(0, height(room, 0), L):
        write(o, r, max_of_each(ahead(_unreduced(room), r * L)), None)


@function
def _write_sums(room, o):
    L = lanes(room)
    for r in range(0, height(room, 0), L):
        write(o, r, sum_of_each(ahead(_unreduced(room), r * L)), None)


@function
def _remainders(p, e, o, n, rows, T, room, t):
    """Write maxima and remainders; `o` is where the result will be, if there is one of that size.

    Always with care: that costs less than to find out which rows want it.
    """
    L, m, s = lanes(room), values(room, MAX, T), values(room, REST, T)
    count = values(room, COUNT, T)
    _maxima(p, o, n, rows, room, ())
    _write_maxima(room, m)
    for r in range(0, T, L):
        write(count, r, splat(room, 0.0), None)
    _careful_exps(p, e, n, rows, room, (m, t, count))
    _write_sums(room, s)
    for r in range(0, T, L):
        write(s, r, (get(s, r) + (counts(count, r) - 1.0) * UP) * DOWN, None)
        if not are_finite(get(m, r)):  # an infinity may have passed over a nan
            for i in range(r, min(r + L, rows)):
                store(m, i, top(ahead(p, i * n), n, 1))


# --------------------------------------------------------------------------- operations


@function
def fold(p, e, n, rows, T, room):
    """Write maxima and remainders; the exps go to `e` unless it is nowhere."""
    _remainders(p, e, e, n, rows, T, room, 1)


@function
def softmax(p, o, n, rows, T, room, t):
    """Write the probabilities."""
    e, m, s = scratch(o, room, T, n), values(room, MAX, T), values(room, REST, T)
    _maxima(p, o, n, rows, room, ())
    _write_maxima(room, m)
    _exps(p, e, n, rows, room, (m, t))
    _write_sums(room, s)
    for r in range(0, T, lanes(room)):
        write(s, r, splat(room, 1.0) / get(s, r), None)
    _write_scaled(e, o, n, rows, room, (s,))


@function
def log_softmax(p, o, n, rows, T, room, t):
    """Write the logarithms of the probabilities."""
    m, s = values(room, MAX, T), values(room, REST, T)
    _remainders(p, 0, o, n, rows, T, room, t)
    for r in range(0, T, lanes(room)):
        write(s, r, log1p(get(s, r)), None)
    _write_logs(p, o, n, rows, room, (m, t, s))


@function
def logsumexp(p, n, rows, T, room):
    """Write max + log1p(rest) to the values; an infinite maximum as it is."""
    _remainders(p, 0, 0, n, rows, T, room, 1)
    for r in range(0, T, lanes(room)):
        m = get(values(room, MAX, T), r)
        answer = where_finite(m, m + log1p(get(values(room, REST, T), r)), m)
        write(values(room, LOGSUMEXP, T), r, answer, None)


@function
def softmax_vjp(p, q, o, n, rows, T, room, _):
    """Write y * (dy - sum(y * dy))."""
    s = values(room, MAX, T)
    for r in range(rows):
        sums = products(ahead(p, r * n), ahead(q, r * n), n, ())
        write(_unreduced(room), r * lanes(room), sums, None)
    _write_sums(room, s)
    for r in range(rows):
        at = r * n
        write_softmax_vjp(ahead(p, at), ahead(q, at), ahead(o, at), n, (load(s, r),))


@function
def log_softmax_vjp(p, q, o, n, rows, T, room, left_out):
    """Write dy - exp(log_y) * sum(dy), `dy` counting as 0 where log_y is +-left_out."""
    s, left_out = values(room, MAX, T), typed(p, left_out)
    for r in range(rows):
        sums = gradients(ahead(p, r * n), ahead(q, r * n), n, (left_out,))
        write(_unreduced(room), r * lanes(room), sums, None)
    _write_sums(room, s)
    for r in range(rows):
        at, numbers = r * n, (left_out, load(s, r))
        write_log_softmax_vjp(ahead(p, at), ahead(q, at), ahead(o, at), n, numbers)


@function
def write_gaps(p, w, n, rows, T, room):
    """Write sum_j w_j (max - x_j) to the values."""
    for r in range(rows):
        m = load(values(room, MAX, T), r)
        store(values(room, GAPS, T), r, sum_of_all(gaps(ahead(p, r * n), w, n, (m,))))


@function
def write_sparse(e, o, n, rows, T, room):
    """Write the gradients of a loss, but for the labels, from exps: SLOPE * FACTOR * p_j."""
    a = values(room, SLOPE, T)
    for r in range(0, T, lanes(room)):
        write(a, r, get(a, r) * get(values(room, FACTOR, T), r), None)
    _write_scaled_twice(e, o, n, rows, room, (a, DOWN))


@function
def write_dense(e, o, w, share, n, rows, T, room):
    """As `write_sparse`, where each class has a share q_j = share * w_j of the target."""
    for r in range(rows):
        a, inverse = load(values(room, SLOPE, T), r), load(values(room, FACTOR, T), r)
        numbers = typed(room, 1.0), DOWN, share, a, load(values(room, REST, T), r), inverse
        write_gradient(ahead(e, r * n), w, ahead(o, r * n), n, numbers)
