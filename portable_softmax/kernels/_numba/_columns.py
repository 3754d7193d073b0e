"""Rows that run across memory, worked on side by side: a layout, see `_rows`.

The classes of a row lie `inner` apart. A group is copied to a tile in the dtype of the computation:
as many rows as a vector has lanes become `n` consecutive vectors, one a class, and the next ones
follow. So the passes over one long row do the work, and what they return is not reduced: each lane
is a row of its own. The room has the tiles after its values: one, or two where there are two inputs
or the gradient of a loss.
"""

from __future__ import annotations

from portable_softmax.kernels._numba import _blocks
from portable_softmax.kernels._numba._exp import DOWN, UP
from portable_softmax.kernels._numba._horizontal import are_at_least, are_finite
from portable_softmax.kernels._numba._jit import function
from portable_softmax.kernels._numba._memory import ahead, store, typed
from portable_softmax.kernels._numba._passes import (
    careful_sums,
    enough,
    exps,
    maxima,
    row_writing,
)
from portable_softmax.kernels._numba._rows import top
from portable_softmax.kernels._numba._values import MAX, REST, SUM, after_values, values
from portable_softmax.kernels._numba._vectors import lanes, read, splat, where_at_least, write

# --------------------------------------------------------------------------- where rows are


@function
def height(room, wanted):
    return wanted


@function
def place(i, T, n, inner):
    groups = (inner + T - 1) // T
    column, outer = i % groups * T, i // groups * inner
    return outer * n + column, min(T, inner - column), outer + column


@function
def element(room, r, y, n):
    L = lanes(room)
    return (r // L * n + y) * L + r % L


@function
def target(o, tile, room, T, n):
    return ahead(after_values(room, T), tile * n * T)


@function
def scratch(o, room, T, n):
    return o


@function
def fetch(p, tile, room, T, n, inner, rows):
    """Copy a group to a tile."""
    L, copied = lanes(room), target(p, tile, room, T, n)
    k = rows % L
    for j in range(n):
        x, y = ahead(p, j * inner), ahead(copied, j * L)
        for r in range(0, rows - k, L):
            write(y, r * n, read(x, r, None, 0.0), None)
        if k:
            write(y, (rows - k) * n, read(x, rows - k, k, 0.0), None)
    return copied


@function
def deliver(written, o, T, n, inner, rows):
    """Copy a tile to its group."""
    L = lanes(written)
    k = rows % L
    for j in range(n):
        x, y = ahead(written, j * L), ahead(o, j * inner)
        for r in range(0, rows - k, L):
            write(y, r, read(x, r * n, None, 0.0), None)
        if k:
            write(y, rows - k, read(x, (rows - k) * n, None, 0.0), k)


# --------------------------------------------------------------------------- passes and values

step, get, put = _blocks.step, _blocks.get, _blocks.put
stride, value = step, get


@function
def length(room, n):
    return n * lanes(room)


@function
def source(w):
    """A weight for all lanes of a vector."""
    return (w,)


def writing(entry, values_of):
    write_row = row_writing(entry)

    @function
    def run(e, w, o, n, rows, T, room, constants):
        for r in range(0, rows, lanes(room)):
            numbers = (typed(room, 1.0), *values_of(room, T, r), *constants)
            write_row(ahead(e, r * n), source(w), ahead(o, r * n), length(room, n), numbers)

    return run


@function
def keep(room, T, kind, r, v):
    put(values(room, kind, T), r, v)


@function
def reduce(room, T, kind):
    """Nothing is to be reduced."""


# --------------------------------------------------------------------------- folding rows


@function
def write_sums(p, e, o, n, rows, T, room, t):
    size = length(room, n)
    for r in range(0, rows, lanes(room)):
        x = ahead(p, r * n)
        put(values(room, SUM, T), r, exps(x, ahead(e, r * n), 0, size, maxima(x, size), t))


@function
def fold(p, e, o, n, rows, T, room, t):
    """As in `_rows`, with care where the row of any lane needs it; only that row takes it."""
    L, one, size = lanes(room), splat(room, 1.0), length(room, n)
    low = splat(room, enough(n))
    for r in range(0, rows, L):
        x, most = ahead(p, r * n), ahead(values(room, MAX, T), r)
        m = maxima(x, size)
        rest = exps(x, ahead(e, r * n), 0, size, m, t) * DOWN - one
        put(most, 0, m)
        if not are_at_least(rest, low):
            below, count = careful_sums(x, size, m, t)
            rest = where_at_least(rest, low, rest, (below + (count - one) * UP) * DOWN)
            if not are_finite(m):  # an infinity may have passed over a nan
                for i in range(L):
                    store(most, i, top(ahead(x, i), n, L))
        put(values(room, REST, T), r, rest)
