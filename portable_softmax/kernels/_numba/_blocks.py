"""Blocks of short rows, one after the other in memory: a layout, see `_rows`.

The passes here take all rows of a block in turn for each vector. The horizontal reduction is then
that of as many rows at once as a vector has lanes: the i-th lane is the i-th row's. After its
values the workspace has a vector for each row, still to be reduced.
"""

from __future__ import annotations

import math

from portable_softmax.kernels._numba import _rows
from portable_softmax.kernels._numba._exp import exp_up, reference_of
from portable_softmax.kernels._numba._horizontal import (
    are_finite,
    count_equal,
    counts,
    max_of_each,
    sum_of_each,
)
from portable_softmax.kernels._numba._jit import function
from portable_softmax.kernels._numba._memory import (
    ahead,
    apart_from,
    either,
    load,
    smaller,
    store,
    typed,
)
from portable_softmax.kernels._numba._softcap import seen_by, uncapped
from portable_softmax.kernels._numba._values import (
    BASE,
    COUNT,
    LOWEST,
    MAGIC,
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
    larger,
    prefetch_to_read,
    prefetch_to_write,
    read,
    splat,
    where_equal,
    write,
)

# A block is as many rows as this many vectors have lanes: one pass after the other, of a single
# vector's rows each would wait for the one before.
VECTORS = 4

# --------------------------------------------------------------------------- where rows are

LONG = False
element, position, fetch = _rows.element, _rows.position, _rows.fetch
target, deliver = _rows.target, _rows.deliver


@function
def height(workspace, wanted):
    """How many rows a block has, known when compiling."""
    return VECTORS * lanes(workspace)


@function
def place(i, T, n, inner):
    return i * T * n, smaller(T, inner - i * T), i * T


@function
def scratch(o, workspace, T, n, apart):
    space = ahead(after_values(workspace, T), T * lanes(workspace))
    return apart_from(either(o, space), space, apart)


@function
def slopes_at(workspace, T, n):
    return ahead(after_values(workspace, T), T * (lanes(workspace) + n))


# --------------------------------------------------------------------------- passes and values
#
# Vector by vector, all rows in turn: nothing in the inner loops depends on the length of a row.


def _pass(body):
    """Return the pass that calls ``body(x, y, j, r, n, vectors, k, numbers)`` for each vector.

    `x` is where that of the block's first row is, `y` where its exps or results go; those of the
    r-th row are r * n further. `vectors` is where what the rows come to is.
    """

    @function
    def run(p, e, n, rows, workspace, numbers):
        k, vectors = n % lanes(p), after_values(workspace, height(workspace, 0))
        for j in range(0, n - k, lanes(p)):
            x, y = ahead(p, j), ahead(e, j)
            for r in range(rows):
                body(x, y, j, r, n, vectors, None, numbers)
        if k:
            x, y = ahead(p, n - k), ahead(e, n - k)
            for r in range(rows):
                body(x, y, n - k, r, n, vectors, k, numbers)

    return run


stride, length, value, source = _rows.stride, _rows.length, _rows.value, _rows.source
store_rare, whole = _rows.store_rare, _rows.whole
most, keep = _rows.most, _rows.keep


def writing(entry, values_of, own=False):
    @_pass
    @function
    def write_all(x, y, j, r, n, vectors, k, numbers):
        w, workspace, constants = numbers
        its = (typed(workspace, 1.0), *values_of(workspace, height(workspace, 0), r), *constants)
        at = r * n + j if own else j
        if own:  # nothing has prefetched these arrays for the next block
            prefetch_to_read(x, r * n + height(workspace, 0) * n, k)
            prefetch_to_read(w, at + height(workspace, 0) * n, k)
        write(y, r * n, entry(read(x, r * n, k, 0.0), read(w, at, k, 0.0), its), k)

    @function
    def run(e, w, o, n, rows, T, workspace, constants):
        write_all(e, o, n, rows, workspace, (w, workspace, constants))

    return run


@function
def store_partial(workspace, T, kind, r, v):
    write(after_values(workspace, T), r * lanes(workspace), v, None)


@function
def reduce_partials(workspace, T, kind):
    """Add up the lanes of each row's vector."""
    L = lanes(workspace)
    for r in range(0, T, L):
        put(values(workspace, kind, T), r, sum_of_each(ahead(after_values(workspace, T), r * L)))


@function
def step(workspace):
    return lanes(workspace)


@function
def get(those, r):
    return read(those, r, None, 0.0)


@function
def put(those, r, v):
    write(those, r, v, None)


# --------------------------------------------------------------------------- folding rows


@function
def _add(vectors, j, r, v):
    """Add a row's vector at j to those before it."""
    at = r * lanes(vectors)
    put(vectors, at, v if j == 0 else get(vectors, at) + v)


@_pass
@function
def _maxima(x, o, j, r, n, vectors, k, numbers):
    """The place of the result is prefetched here, the next block in the next pass.

    Both at once would be too many lines of the cache.
    """
    at, v = r * lanes(x), read(x, r * n, k, -math.inf)
    prefetch_to_write(o, r * n, k)
    put(vectors, at, v if j == 0 else larger(get(vectors, at), v))


@function
def reference(workspace, T, r):
    """What `_exp.exp_up` takes of a row, as `reduce_maxima` has left it."""
    return (
        load(values(workspace, BASE, T), r),
        load(values(workspace, MAGIC, T), r),
        load(values(workspace, LOWEST, T), r),
    )


@_pass
@function
def _exps(x, e, j, r, n, vectors, k, numbers):
    workspace, t = numbers
    prefetch_to_read(x, r * n + height(x, 0) * n, k)
    v = exp_up(read(x, r * n, k, -math.inf), reference(workspace, height(workspace, 0), r), t)
    write(e, r * n, v, k)
    _add(vectors, j, r, v)


@_pass
@function
def _exps_below(x, e, j, r, n, vectors, k, numbers):
    """As `_exps`, but those that equal that of the maximum are counted instead of added."""
    workspace, t = numbers
    T = height(workspace, 0)
    unit = splat(x, load(values(workspace, UNIT, T), r))
    prefetch_to_read(x, r * n + height(x, 0) * n, k)
    v = exp_up(read(x, r * n, k, -math.inf), reference(workspace, height(workspace, 0), r), t)
    write(e, r * n, v, k)
    count_equal(values(workspace, COUNT, T), r, v, unit)
    _add(vectors, j, r, where_equal(v, unit, splat(x, 0.0), v))


@function
def reduce_maxima(p, T, workspace, t):
    """Write the maxima of the rows' vectors, and what exps are taken of."""
    L = lanes(workspace)
    for r in range(0, T, L):
        m = seen_by(p, max_of_each(ahead(after_values(workspace, T), r * L)))
        base, magic, lowest = reference_of(m, t)
        put(values(workspace, MAX, T), r, m)
        put(values(workspace, BASE, T), r, base)
        put(values(workspace, MAGIC, T), r, magic)
        put(values(workspace, LOWEST, T), r, lowest)


@function
def _write_maxima(p, o, n, rows, T, workspace, t):
    _maxima(uncapped(p), o, n, rows, workspace, ())
    reduce_maxima(p, T, workspace, t)


@function
def write_sums(p, e, o, n, rows, T, workspace, t):
    _write_maxima(p, o, n, rows, T, workspace, t)
    _exps(p, e, n, rows, workspace, (workspace, t))
    reduce_partials(workspace, T, SUM)


@function
def fold(p, e, o, n, rows, T, workspace, t):
    """As in `_rows`, the maximum always left out: that costs less than to look who needs it."""
    L, m, s, count = (
        lanes(workspace),
        values(workspace, MAX, T),
        values(workspace, REST, T),
        values(workspace, COUNT, T),
    )
    _write_maxima(p, o, n, rows, T, workspace, t)
    for r in range(0, T, L):
        top = get(m, r)
        put(values(workspace, UNIT, T), r, exp_up(top, reference_of(top, t), t))
        put(count, r, splat(workspace, 0.0))
    _exps_below(p, e, n, rows, workspace, (workspace, t))
    reduce_partials(workspace, T, REST)
    for r in range(0, T, L):
        unit = get(values(workspace, UNIT, T), r)
        others = get(s, r) + (counts(count, r) - 1.0) * unit
        put(values(workspace, TOTAL, T), r, others + unit)
        put(s, r, others / unit)
        if not are_finite(get(m, r)):  # an infinity may have passed over a nan
            for i in range(r, smaller(r + L, rows)):
                store(m, i, _rows.top(ahead(p, i * n), n, 1))
