"""Logarithms of running sums of exponentials, and the gradient through them.

Each lane of a vector is a row, and all is computed in float64. The state of a beginning is

    base, top, unit = exp(top - base), rest = sum of exp(x_j - base) but for one maximum `top`

and the logarithm of the sum is top + log1p(rest / unit). The base follows the maximum only where
that has risen by more than 1: so a long rise does not multiply the sum, and with it the errors, at
each step. What the sum loses by rounding is kept beside it.

With E_j = exp(x_j - base) and S_i = rest_i + unit_i, the gradient is E_j times the sum of
dy_i / S_i over all i >= j: there is no logarithm in it. Where the base changes, what lies behind is
multiplied by the `fall` exp(base before - base behind). A row is worked on in parts, forwards, and
for the gradient then backwards, from the states that the parts began with.

Where rows are few and long, one is cut into as many runs as there are lanes. Each is summed by
itself first; then the state before each is known.
"""

from __future__ import annotations

import math

from portable_softmax.kernels._numba._compensation import added, compensated
from portable_softmax.kernels._numba._exp import DOWN, exp_up, plus_log1p, reference
from portable_softmax.kernels._numba._jit import function
from portable_softmax.kernels._numba._kernels import threaded
from portable_softmax.kernels._numba._memory import ahead, load, pointer, smaller, store, typed
from portable_softmax.kernels._numba._vectors import (
    lanes,
    read,
    splat,
    where_at_least,
    where_equal,
    write,
)

PART = 512  # entries of a row
STATE = 5  # vectors

# --------------------------------------------------------------------------- where rows are


@function
def _place(i, L, shape):
    """Where the i-th group begins, how many lanes it has, and how far apart they and entries are.

    A lane has `run` entries: n, or fewer where a group is a single row.
    """
    n, inner, outer, run = shape
    if run < n:
        return i // inner * n * inner + i % inner, L, run * inner, inner
    if inner == 1:
        return i * L * n, smaller(L, outer - i * L), n, 1
    groups = (inner + L - 1) // L
    column = i % groups * L
    return i // groups * inner * n + column, smaller(L, inner - column), 1, inner


@function
def _lanes_at(j, rows, n, run):
    """How many lanes have a j-th entry; the last runs of a row may be shorter."""
    return rows if run == n else smaller(rows, (n - j + run - 1) // run)


@function
def _fetch(p, tile, first, count, place, n, run, nothing):
    """Copy entries of a group to a tile, from the first on; there may be none in the last lanes."""
    L = lanes(tile)
    _, rows, apart, step = place
    p = ahead(p, first * step)
    if _lanes_at(first + count - 1, rows, n, run) == L:
        for j in range(count):
            for r in range(L):
                store(tile, j * L + r, float(load(p, r * apart + j * step)))
        return
    for j in range(count):
        there = _lanes_at(first + j, rows, n, run)
        for r in range(L):
            x = float(load(p, r * apart + j * step)) if r < there else nothing
            store(tile, j * L + r, x)


@function
def _deliver(tile, o, first, count, place, n, run):
    """Copy a tile to where its entries are."""
    L = lanes(tile)
    _, rows, apart, step = place
    o = ahead(o, first * step)
    if _lanes_at(first + count - 1, rows, n, run) == L:
        for j in range(count):
            for r in range(L):
                store(o, r * apart + j * step, typed(o, load(tile, j * L + r)))
        return
    for j in range(count):
        for r in range(_lanes_at(first + j, rows, n, run)):
            store(o, r * apart + j * step, typed(o, load(tile, j * L + r)))


# --------------------------------------------------------------------------- states


@function
def _nothing(p):
    """The state of no entries."""
    lowest, zero = splat(p, -math.inf), splat(p, 0.0)
    return lowest, lowest, splat(p, 1.0), zero, zero


@function
def _advanced(state, x, at):
    """The state with one more entry, the exp of this and the fall before it."""
    base, top, unit, rest, lost = state
    d = where_equal(x, base, 0.0, x - base)  # 0 of two infinities
    e = exp_up(where_at_least(1.0, d, d, -d), at, 1) * DOWN
    more, less = added(rest, lost, where_at_least(top, x, e, unit))
    sum_before = (rest + unit) + lost
    unit = where_at_least(1.0, d, where_at_least(top, x, unit, e), 1.0)
    rest = where_at_least(1.0, d, more, sum_before * e)
    lost = where_at_least(1.0, d, less, 0.0)
    top = where_at_least(top, x, top, x)
    base = where_at_least(1.0, d, base, x)
    return (base, top, unit, rest, lost), e, d


@function
def _logarithms(tile, count, state, at):
    """Write the logarithms of the running sums over the entries, and return the last state."""
    L = lanes(tile)
    for j in range(0, count * L, L):
        state, _, _ = _advanced(state, read(tile, j, None, 0.0), at)
        _, top, unit, rest, lost = state
        write(tile, j, plus_log1p(top, compensated(rest, lost) / unit), None)
    return state


@function
def _passed(tile, count, state, at):
    """The state behind the entries."""
    for j in range(0, count * lanes(tile), lanes(tile)):
        state, _, _ = _advanced(state, read(tile, j, None, 0.0), at)
    return state


@function
def _terms(tile, upstream, falls, count, state, at):
    """Write what the gradient is made of over entries and upstream: exps and dy / S, and falls."""
    L = lanes(tile)
    for j in range(0, count * L, L):
        x = read(tile, j, None, 0.0)
        state, e, d = _advanced(state, x, at)
        base, _, unit, rest, lost = state
        write(upstream, j, read(upstream, j, None, 0.0) / ((rest + unit) + lost), None)
        write(falls, j, where_at_least(1.0, d, 1.0, e), None)
        e = where_equal(x, base, (x - x) + 1.0, e)  # nan at +inf
        write(tile, j, where_equal(x, -math.inf, 0.0, e), None)


@function
def _slopes(tile, upstream, falls, count, behind, lost):
    """Write the gradient over the exps; `behind` is the sum that follows, returned for the next."""
    L = lanes(tile)
    for i in range(count):
        j = (count - 1 - i) * L
        behind, lost = added(behind, lost, read(upstream, j, None, 0.0))
        write(tile, j, read(tile, j, None, 0.0) * compensated(behind, lost), None)
        fall = read(falls, j, None, 0.0)
        behind, lost = behind * fall, lost * fall
    return behind, lost


@function
def _keep(p, state):
    """Write a state."""
    L = lanes(p)
    base, top, unit, rest, lost = state
    write(p, 0, base, None)
    write(p, L, top, None)
    write(p, 2 * L, unit, None)
    write(p, 3 * L, rest, None)
    write(p, 4 * L, lost, None)


@function
def _found(p):
    """Read a state."""
    L = lanes(p)
    base, top, unit = read(p, 0, None, 0.0), read(p, L, None, 0.0), read(p, 2 * L, None, 0.0)
    return base, top, unit, read(p, 3 * L, None, 0.0), read(p, 4 * L, None, 0.0)


# --------------------------------------------------------------------------- runs of a row


@function
def _fall(before, behind, at):
    """exp(before - behind), 1 of two infinities."""
    return exp_up(0.0 if before == behind else before - behind, at, 1) * DOWN


@function
def _before(p, at):
    """Put the state of all runs before it in the place of each run's."""
    L = lanes(p)
    m, sum_of = -math.inf, 0.0
    for i in range(L):
        top = load(p, L + i)
        rest = (load(p, 3 * L + i) + load(p, 4 * L + i)) / load(p, 2 * L + i)
        store(p, i, m)
        store(p, L + i, m)
        store(p, 2 * L + i, 1.0)
        store(p, 3 * L + i, sum_of)
        store(p, 4 * L + i, 0.0)
        if m >= top:
            sum_of = sum_of + (1.0 + rest) * _fall(top, m, at)
        else:
            sum_of = rest + (1.0 + sum_of) * _fall(m, top, at)
            m = top


@function
def _behind(p, bases, ends, at):
    """Put what follows each run in the place of what the gradient sums over it."""
    L = lanes(p)
    following = 0.0
    for back in range(L):
        i = L - 1 - back
        base, end = load(bases, i), load(ends, i)
        following = following * _fall(end, load(bases, i + 1), at) if back else 0.0
        own = load(p, i)
        store(p, i, following)
        following = own + following * _fall(base, end, at)


# --------------------------------------------------------------------------- groups of rows


@function
def _begun(p, place, n, run, workspace, states, at):
    """Write the states that the lanes of a group begin with."""
    state = _nothing(workspace)
    if run < n:
        for j in range(0, run, PART):
            count = smaller(PART, run - j)
            _fetch(p, workspace, j, count, place, n, run, -math.inf)
            state = _passed(workspace, count, state, at)
    _keep(states, state)
    if run < n:
        _before(states, at)


def _running(arrays, numbers, shape, workspace, lo, hi, piece):
    """Write the logarithms; arrays = (x, result), shape = (n, inner, outer, entries of a lane)."""
    n, run, L = shape[0], shape[3], lanes(workspace)
    at = reference(typed(workspace, 0.0), typed(workspace, 0.0), 1)
    states = ahead(workspace, smaller(PART, run) * L)
    for i in range(lo, hi):
        place = _place(i, L, shape)
        p, o = ahead(pointer(arrays[0]), place[0]), ahead(pointer(arrays[1]), place[0])
        _begun(p, place, n, run, workspace, states, at)
        state = _found(states)
        for j in range(0, run, PART):
            count = smaller(PART, run - j)
            _fetch(p, workspace, j, count, place, n, run, -math.inf)
            state = _logarithms(workspace, count, state, at)
            _deliver(workspace, o, j, count, place, n, run)


def _running_vjp(arrays, numbers, shape, workspace, lo, hi, piece):
    """Write the gradient; arrays = (x, dy, result), shape as above."""
    n, run, L = shape[0], shape[3], lanes(workspace)
    at = reference(typed(workspace, 0.0), typed(workspace, 0.0), 1)
    size, parts = smaller(PART, run) * L, (run + PART - 1) // PART
    upstream, falls = ahead(workspace, size), ahead(workspace, 2 * size)
    states = ahead(workspace, 3 * size)
    ends = ahead(states, parts * STATE * L)
    for i in range(lo, hi):
        place = _place(i, L, shape)
        p, q = ahead(pointer(arrays[0]), place[0]), ahead(pointer(arrays[1]), place[0])
        o = ahead(pointer(arrays[2]), place[0])
        _begun(p, place, n, run, workspace, states, at)
        state = _found(states)
        for k in range(parts if run < n else parts - 1):
            count = smaller(PART, run - k * PART)
            _fetch(p, workspace, k * PART, count, place, n, run, -math.inf)
            state = _passed(workspace, count, state, at)
            _keep(ahead(states, (k + 1) * STATE * L), state)
        behind = lost = splat(workspace, 0.0)
        for last in range(0 if run < n else 1, 2):  # the first time for the sums of the runs
            for back in range(parts):
                j = (parts - 1 - back) * PART
                count = smaller(PART, run - j)
                _fetch(p, workspace, j, count, place, n, run, -math.inf)
                _fetch(q, upstream, j, count, place, n, run, 0.0)
                state = _found(ahead(states, (parts - 1 - back) * STATE * L))
                _terms(workspace, upstream, falls, count, state, at)
                behind, lost = _slopes(workspace, upstream, falls, count, behind, lost)
                if last:
                    _deliver(workspace, o, j, count, place, n, run)
            if not last:
                write(falls, 0, compensated(behind, lost), None)
                _behind(falls, states, ends, at)
                behind, lost = read(falls, 0, None, 0.0), splat(workspace, 0.0)


LAYOUTS = {
    "rows": {
        "logcumsumexp": threaded("running.logcumsumexp", _running),
        "logcumsumexp_vjp": threaded("running.logcumsumexp_vjp", _running_vjp),
    }
}
