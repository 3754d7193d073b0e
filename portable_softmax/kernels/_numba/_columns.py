"""Rows that run across memory, worked on side by side: a layout, see `_rows`.

The classes of a row lie `inner` apart. A group is copied to a tile in the dtype of the computation:
as many rows as a vector has lanes become `n` consecutive vectors, one a class, and the next ones
follow. So the passes over one long row do the work, without a horizontal reduction: each lane is a
row of its own. After its values the workspace has the tiles: one, or two for two inputs and for the
gradient of a loss.
"""

from __future__ import annotations

import math

from portable_softmax.kernels._numba import _blocks
from portable_softmax.kernels._numba._compensation import added
from portable_softmax.kernels._numba._exp import exp_up, reference_of
from portable_softmax.kernels._numba._horizontal import are_finite
from portable_softmax.kernels._numba._jit import function
from portable_softmax.kernels._numba._memory import ahead, smaller, store, typed
from portable_softmax.kernels._numba._passes import RUN, exps, maxima, row_writing
from portable_softmax.kernels._numba._rows import top
from portable_softmax.kernels._numba._values import (
    MAX,
    REST,
    SUM,
    TOTAL,
    UNIT,
    after_values,
    values,
)
from portable_softmax.kernels._numba._vectors import (
    lanes,
    prefetch_to_read,
    prefetch_to_write,
    read,
    splat,
    where_equal,
    write,
)

LONG = False  # each lane is a row

# --------------------------------------------------------------------------- where rows are


@function
def height(workspace, wanted):
    return wanted


@function
def place(i, T, n, inner):
    groups = (inner + T - 1) // T
    column, outer = i % groups * T, i // groups * inner
    return outer * n + column, smaller(T, inner - column), outer + column


@function
def element(workspace, r, y, n):
    L = lanes(workspace)
    return (r // L * n + y) * L + r % L


@function
def position(r, y, n, inner):
    return y * inner + r


@function
def target(o, tile, workspace, T, n):
    return ahead(after_values(workspace, T), tile * n * T)


@function
def scratch(o, workspace, T, n, apart):
    """The tile of the result, which is always apart."""
    return o


@function
def slopes_at(workspace, T, n):
    return 0


@function
def fetch(p, tile, workspace, T, n, inner, rows):
    """Copy a group to a tile; the next group's part of each class is prefetched."""
    L, copied = lanes(workspace), target(p, tile, workspace, T, n)
    k = rows % L
    for j in range(n):
        x, y = ahead(p, j * inner), ahead(copied, j * L)
        for r in range(0, rows - k, L):
            prefetch_to_read(x, r + T, None)
            write(y, r * n, read(x, r, None, 0.0), None)
        if k:
            write(y, (rows - k) * n, read(x, rows - k, k, 0.0), None)
    return copied


@function
def deliver(written, o, T, n, inner, rows):
    """Copy a tile to its group; the place of the next one's is prefetched."""
    L = lanes(written)
    k = rows % L
    for j in range(n):
        x, y = ahead(written, j * L), ahead(o, j * inner)
        for r in range(0, rows - k, L):
            prefetch_to_write(y, r + T, None)
            write(y, r, read(x, r * n, None, 0.0), None)
        if k:
            write(y, rows - k, read(x, (rows - k) * n, None, 0.0), k)


# --------------------------------------------------------------------------- passes and values

step, get, put = _blocks.step, _blocks.get, _blocks.put
stride, value = step, get


@function
def length(workspace, n):
    return n * lanes(workspace)


@function
def source(w):
    """A weight for all lanes of a vector."""
    return (w,)


def writing(entry, values_of, own=False):
    write_row = row_writing(entry)

    @function
    def run(e, w, o, n, rows, T, workspace, constants):
        for r in range(0, rows, lanes(workspace)):
            numbers = (typed(workspace, 1.0), *values_of(workspace, T, r), *constants)
            those = ahead(w, r * n) if own else source(w)
            write_row(ahead(e, r * n), those, ahead(o, r * n), length(workspace, n), numbers)

    return run


@function
def store_partial(workspace, T, kind, r, v):
    put(values(workspace, kind, T), r, v)


store_rare = store_partial


@function
def whole(v):
    return v


most, keep = whole, put


@function
def reduce_partials(workspace, T, kind):
    """Nothing is to be reduced."""


# --------------------------------------------------------------------------- folding rows


@function
def write_sums(p, e, o, n, rows, T, workspace, t):
    size = length(workspace, n)
    for r in range(0, rows, lanes(workspace)):
        x = ahead(p, r * n)
        m = maxima(x, size)
        total, lost, _, _ = exps(x, ahead(e, r * n), 0, size, reference_of(m, t), math.inf, t)
        put(values(workspace, MAX, T), r, m)
        put(values(workspace, SUM, T), r, total + lost)


@function
def _exps_below(p, e, size, m, t):
    """The sums of the exps but for those of the maxima, how many these are, and the exp of one.

    The exps go to `e` unless it is null.
    """
    L, one, at = lanes(p), splat(p, 1.0), reference_of(m, t)
    total = lost = count = unit = zero = splat(p, 0.0)
    j = 0
    while j < size:
        s, stop = zero, smaller(j + RUN * L, size)
        while j < stop:
            x = read(p, j, None, 0.0)
            v = exp_up(x, at, t)
            write(e, j, v, None)
            s = s + where_equal(x, m, zero, v)
            count = count + where_equal(x, m, one, zero)
            unit = where_equal(x, m, v, unit)
            j += L
        total, lost = added(total, lost, s)
    return total + lost, count, unit


@function
def fold(p, e, o, n, rows, T, workspace, t):
    """As in `_rows`; each row leaves its maximum out at once, as some lane most often has to."""
    L, one, size = lanes(workspace), splat(workspace, 1.0), length(workspace, n)
    for r in range(0, rows, L):
        x, most = ahead(p, r * n), ahead(values(workspace, MAX, T), r)
        m = maxima(x, size)
        below, count, unit = _exps_below(x, ahead(e, r * n), size, m, t)
        put(most, 0, m)
        if not are_finite(m):  # an infinity may have passed over a nan
            for i in range(L):
                store(most, i, top(ahead(x, i), n, L))
        put(values(workspace, REST, T), r, (below + (count - one) * unit) / unit)
        put(values(workspace, UNIT, T), r, unit)
        put(values(workspace, TOTAL, T), r, below + count * unit)
