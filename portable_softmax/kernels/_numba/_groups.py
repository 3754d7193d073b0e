"""Groups of rows of some vectors, one after the other in memory: a layout, see `_rows`.

A pass takes one row after the other, as in `_rows`, and what they come to is reduced for as many
rows at once as a vector has lanes, as in `_blocks`. So no row waits for the maximum, the sum and
the logarithm of the one before. After its values the workspace has a vector for each row, still to
be reduced, and what `exps` returns of each.
"""

from __future__ import annotations

from portable_softmax.kernels._numba import _blocks, _rows
from portable_softmax.kernels._numba._exp import exp_up, reference_of
from portable_softmax.kernels._numba._jit import function
from portable_softmax.kernels._numba._memory import (
    ahead,
    apart_from,
    either,
    load,
    store,
    typed,
)
from portable_softmax.kernels._numba._passes import exps, maxima, others, row_writing
from portable_softmax.kernels._numba._softcap import uncapped
from portable_softmax.kernels._numba._values import (
    COUNT,
    MAX,
    REST,
    SUM,
    TOTAL,
    UNIT,
    after_values,
    values,
)
from portable_softmax.kernels._numba._vectors import lanes, read, splat, where_at_least, write

LONG = _rows.LONG
element, position, fetch = _rows.element, _rows.position, _rows.fetch
target, deliver = _rows.target, _rows.deliver
stride, length, value, source = _rows.stride, _rows.length, _rows.value, _rows.source
store_rare, whole = _rows.store_rare, _rows.whole
most, keep = _rows.most, _rows.keep
store_partial, reduce_partials = _blocks.store_partial, _blocks.reduce_partials
step, get, put, place = _blocks.step, _blocks.get, _blocks.put, _blocks.place

# How many vectors that are for each row.
SUMS = 5

LOWER = COUNT  # the sum of a row's exps without that of its maximum, while it is folded


@function
def height(workspace, wanted):
    """How many rows a group has, known when compiling."""
    return lanes(workspace)


@function
def _after_sums(workspace, T):
    return ahead(after_values(workspace, T), SUMS * T * lanes(workspace))


@function
def scratch(o, workspace, T, n, apart):
    space = _after_sums(workspace, T)
    return apart_from(either(o, space), space, apart)


@function
def slopes_at(workspace, T, n):
    return ahead(_after_sums(workspace, T), T * n)


def writing(entry, values_of, own=False):
    write_row = row_writing(entry)

    @function
    def run(e, w, o, n, rows, T, workspace, constants):
        for r in range(rows):
            at = r * n
            its = (typed(workspace, 1.0), *values_of(workspace, T, r), *constants)
            write_row(ahead(e, at), ahead(w, at if own else 0), ahead(o, at), n, its)

    return run


# --------------------------------------------------------------------------- folding rows


@function
def _write_maxima(p, n, rows, T, workspace, t):
    partials = after_values(workspace, T)
    for r in range(rows):
        write(partials, r * lanes(workspace), maxima(uncapped(ahead(p, r * n)), n), None)
    _blocks.reduce_maxima(p, T, workspace, t)
    m = get(values(workspace, MAX, T), 0)
    put(values(workspace, UNIT, T), 0, exp_up(m, reference_of(m, t), t))


@function
def _reference(workspace, T, r):
    """What `_exp.exp_up` takes of a row, and its exp of the maximum."""
    return _blocks.reference(workspace, T, r), load(values(workspace, UNIT, T), r)


@function
def _exps(p, e, n, r, T, workspace, t):
    """What `exps` returns of a row; its place in the next group is prefetched."""
    x, (at, unit) = ahead(p, r * n), _reference(workspace, T, r)
    return exps(x, ahead(e, r * n), ahead(x, T * n), n, at, unit, t)


@function
def write_sums(p, e, o, n, rows, T, workspace, t):
    _write_maxima(p, n, rows, T, workspace, t)
    for r in range(rows):
        total, lost, _, _ = _exps(p, e, n, r, T, workspace, t)
        store_partial(workspace, T, SUM, r, total + lost)
    reduce_partials(workspace, T, SUM)


@function
def _sums_of(workspace, T, r):
    """Where what `exps` returned of a row is."""
    L = lanes(workspace)
    return ahead(after_values(workspace, T), (T + 4 * r) * L)


@function
def fold(p, e, o, n, rows, T, workspace, t):
    """As in `_rows`, to the same bits."""
    _write_maxima(p, n, rows, T, workspace, t)
    for r in range(rows):
        L, kept = lanes(workspace), _sums_of(workspace, T, r)
        total, lost, held, begin = _exps(p, e, n, r, T, workspace, t)
        store_partial(workspace, T, TOTAL, r, total + lost)
        write(kept, 0, total, None)
        write(kept, L, lost, None)
        write(kept, 2 * L, held, None)
        write(kept, 3 * L, begin, None)
    reduce_partials(workspace, T, TOTAL)
    unit = get(values(workspace, UNIT, T), 0)
    put(values(workspace, REST, T), 0, (get(values(workspace, TOTAL, T), 0) - unit) / unit)
    found = False
    for r in range(rows):
        if not load(values(workspace, REST, T), r) >= 1.0:
            _leave_maximum_out(p, e, n, r, T, workspace, t)
            found = True
    if found:
        reduce_partials(workspace, T, LOWER)
        lower, rest = get(values(workspace, LOWER, T), 0), get(values(workspace, REST, T), 0)
        # Two maxima are a rest of 1, or what a rounded sum makes of it.
        apart, zero = get(values(workspace, TOTAL, T), 0) - lower, splat(workspace, 0.0)
        more = where_at_least(apart, unit + unit * 0.5, unit, zero)
        put(values(workspace, REST, T), 0, where_at_least(rest, 1.0, rest, (lower + more) / unit))


@function
def _leave_maximum_out(p, e, n, r, T, workspace, t):
    """Write the sums of the other exps, or the maximum where an infinity has passed over a nan."""
    x, m = ahead(p, r * n), load(values(workspace, MAX, T), r)
    if m - m == 0:
        L, kept = lanes(workspace), _sums_of(workspace, T, r)
        sums = (
            read(kept, 0, None, 0.0),
            read(kept, L, None, 0.0),
            read(kept, 2 * L, None, 0.0),
            read(kept, 3 * L, None, 0.0),
        )
        at, unit = _reference(workspace, T, r)
        lower = others(x, ahead(e, r * n), n, sums, at, unit, t)
        store_partial(workspace, T, LOWER, r, lower)
    else:
        store(values(workspace, MAX, T), r, _rows.top(x, n, 1))
