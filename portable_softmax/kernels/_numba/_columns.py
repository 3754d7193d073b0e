"""Rows that run across memory, worked on side by side: a layout, see `_rows`.

The classes of a row lie `inner` apart. A group is copied to a tile in the dtype of the computation:
as many rows as a vector has lanes become `n` consecutive vectors, one a class, and the next ones
follow. So the passes over one long row do the work, and what they return is not reduced: each lane
is a row of its own. The room has the tiles after its values: one, or two where there are two inputs
or the gradient of a loss.
"""

from __future__ import annotations

from portable_softmax.kernels._numba._blocks import get, put
from portable_softmax.kernels._numba._exp import DOWN, UP, log1p
from portable_softmax.kernels._numba._horizontal import are_at_least, are_finite
from portable_softmax.kernels._numba._jit import function
from portable_softmax.kernels._numba._memory import ahead, store, typed
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
from portable_softmax.kernels._numba._rows import top
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
from portable_softmax.kernels._numba._vectors import (
    lanes,
    read,
    splat,
    where_at_least,
    where_finite,
    write,
)


@function
def height(room, wanted):
    """How many rows a group has."""
    return wanted


@function
def place(i, T, n, inner):
    """Return where the i-th group begins, how many rows it has, and the number of its first."""
    groups = (inner + T - 1) // T
    column, outer = i % groups * T, i // groups * inner
    return outer * n + column, min(T, inner - column), outer + column


@function
def element(room, r, y, n):
    """Where the class y of the r-th row of a group is."""
    L = lanes(room)
    return (r // L * n + y) * L + r % L


@function
def target(o, tile, room, T, n):
    """Return where the result of a group can be written, and its exps."""
    return ahead(after_values(room, T), tile * n * T)


@function
def scratch(o, room, T, n):
    return o


@function
def fetch(source, tile, room, T, n, inner, rows):
    """Copy a group to a tile, and return where that is."""
    L, copied = lanes(room), target(source, tile, room, T, n)
    k = rows % L
    for j in range(n):
        x, y = ahead(source, j * inner), ahead(copied, j * L)
        for r in range(0, rows - k, L):
            write(y, r * n, read(x, r, None, 0.0), None)
        if k:
            write(y, (rows - k) * n, read(x, rows - k, k, 0.0), None)
    return copied


@function
def deliver(written, o, T, n, inner, rows):
    """Bring a result to its place."""
    L = lanes(written)
    k = rows % L
    for j in range(n):
        x, y = ahead(written, j * L), ahead(o, j * inner)
        for r in range(0, rows - k, L):
            write(y, r, read(x, r * n, None, 0.0), None)
        if k:
            write(y, rows - k, read(x, (rows - k) * n, None, 0.0), k)


# --------------------------------------------------------------------------- as many as lanes


@function
def _remainder(p, e, n, t):
    """Return maxima and remainders, each lane's as if it were alone."""
    L, one = lanes(p), splat(p, 1.0)
    m = maxima(p, n * L)
    rest = exps(p, e, 0, n * L, m, t) * DOWN - one
    if not are_at_least(rest, enough(n)):
        below, count = careful_sums(p, n * L, m, t)
        careful = (below + (count - one) * UP) * DOWN
        rest = where_at_least(rest, splat(p, enough(n)), rest, careful)
    return m, rest


@function
def _mend(p, n, m):
    """Put maxima that an infinity took from a nan right: see `maxima`."""
    L = lanes(p)
    for r in range(L if not are_finite(get(m, 0)) else 0):
        store(m, r, top(ahead(p, r), n, L))


# --------------------------------------------------------------------------- operations


@function
def fold(p, e, n, rows, T, room):
    """Write maxima and remainders; the exps go to `e` unless it is nowhere."""
    for r in range(0, rows, lanes(p)):
        own = ahead(values(room, MAX, T), r)
        m, rest = _remainder(ahead(p, r * n), ahead(e, r * n), n, 1)
        put(own, 0, m)
        put(values(room, REST, T), r, rest)
        _mend(ahead(p, r * n), n, own)


@function
def softmax(p, o, n, rows, T, room, t):
    """Write the probabilities."""
    size = n * lanes(p)
    for at in range(0, rows * n, size):
        x, y = ahead(p, at), ahead(o, at)
        s = exps(x, y, 0, size, maxima(x, size), t)
        write_scaled(y, 0.0, y, size, (splat(p, 1.0) / s,))


@function
def log_softmax(p, o, n, rows, T, room, t):
    """Write the logarithms of the probabilities."""
    size = n * lanes(p)
    for at in range(0, rows * n, size):
        m, rest = _remainder(ahead(p, at), 0, n, t)
        write_logs(ahead(p, at), 0.0, ahead(o, at), size, (m, t, log1p(rest)))


@function
def logsumexp(p, n, rows, T, room):
    """Write max + log1p(rest) to the values; an infinite maximum as it is."""
    fold(p, 0, n, rows, T, room)
    for r in range(0, rows, lanes(p)):
        m = get(values(room, MAX, T), r)
        answer = where_finite(m, m + log1p(get(values(room, REST, T), r)), m)
        put(values(room, LOGSUMEXP, T), r, answer)


@function
def softmax_vjp(p, q, o, n, rows, T, room, _):
    """Write y * (dy - sum(y * dy))."""
    size = n * lanes(p)
    for at in range(0, rows * n, size):
        x, y = ahead(p, at), ahead(q, at)
        write_softmax_vjp(x, y, ahead(o, at), size, (products(x, y, size, ()),))


@function
def log_softmax_vjp(p, q, o, n, rows, T, room, left_out):
    """Write dy - exp(log_y) * sum(dy), `dy` counting as 0 where log_y is +-left_out."""
    size, left_out = n * lanes(p), typed(p, left_out)
    for at in range(0, rows * n, size):
        x, y = ahead(p, at), ahead(q, at)
        numbers = left_out, gradients(x, y, size, (left_out,))
        write_log_softmax_vjp(x, y, ahead(o, at), size, numbers)


@function
def write_gaps(p, w, n, rows, T, room):
    """Write sum_j w_j (max - x_j) to the values."""
    size = n * lanes(p)
    for r in range(0, rows, lanes(p)):
        m = get(values(room, MAX, T), r)
        put(values(room, GAPS, T), r, gaps(ahead(p, r * n), (w,), size, (m,)))


@function
def write_sparse(e, o, n, rows, T, room):
    """Write the gradients of a loss, but for the labels, from exps: SLOPE * FACTOR * p_j."""
    size = n * lanes(e)
    for r in range(0, rows, lanes(e)):
        a = get(values(room, SLOPE, T), r) * get(values(room, FACTOR, T), r)
        write_scaled_twice(ahead(e, r * n), 0.0, ahead(o, r * n), size, (a, DOWN))


@function
def write_dense(e, o, w, share, n, rows, T, room):
    """As `write_sparse`, where each class has a share q_j = share * w_j of the target."""
    size = n * lanes(e)
    for r in range(0, rows, lanes(e)):
        a, inverse = get(values(room, SLOPE, T), r), get(values(room, FACTOR, T), r)
        numbers = typed(room, 1.0), DOWN, share, a, get(values(room, REST, T), r), inverse
        write_gradient(ahead(e, r * n), (w,), ahead(o, r * n), size, numbers)
