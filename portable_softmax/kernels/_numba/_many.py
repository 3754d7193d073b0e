"""Losses of many rows and their gradients, in blocks of short rows and in lanes: see `_losses`.

The numbers of the rows are T apart: the maxima and remainders first, which are `_blocks`' and
`_lanes`', then the slopes A, the factors of the gradient and its entries at the labels (before, the
logits there), u, y, the losses (before, max - x_y) and sum_j w_j (max - x_j).
"""

from __future__ import annotations

import math

from numba import njit

from portable_softmax.kernels._numba import _blocks, _lanes
from portable_softmax.kernels._numba._exp import DOWN, log1p
from portable_softmax.kernels._numba._ir import ahead, copy, either, load, plus, store, typed
from portable_softmax.kernels._numba._losses import (
    EACH,
    IGNORING,
    WEIGHTED,
    entry,
    label,
    more,
    slope,
    spread_of,
    value,
    write_entries,
)
from portable_softmax.kernels._numba._rows import careful_term
from portable_softmax.kernels._numba._vectors import lanes, put, splat, times, vector

function = njit(nogil=True, error_model="numpy")


@function
def with_rows(sums, o, first, rows, loss, weight, wrong, T, lane, flags):
    """The sums with those of the rows of a block, whose losses are among their numbers."""
    if flags & EACH:
        copy(ahead(lane, 7 * T), ahead(o, first), rows)
    return more(sums, loss, weight, wrong)


@function
def write_labels(labels, rows, T, lane, w, n, flags, ignore):
    """Write the labels and their weights; return the sum of weights and how many are wrong."""
    weights, wrong = 0.0, 0
    us, ys = ahead(lane, 5 * T), ahead(lane, 6 * T)
    if flags & (WEIGHTED | IGNORING):
        for i in range(rows):
            y, u, code = label(labels, i, w, n, flags, ignore)
            store(us, i, u)
            store(ys, i, typed(w, float(y)))
            weights += float(load(w, 0) if code == 2 else u)
            wrong += code == 2
    else:
        for i in range(rows):
            y = labels[i]
            bad = y < 0 or y >= n
            store(us, i, typed(w, math.nan if bad else 1.0))
            store(ys, i, typed(w, 0.0 if bad else float(y)))
            wrong += bad
        weights = float(rows)
    for i in range(rows, T):
        store(us, i, typed(w, 0.0))
        store(ys, i, typed(w, 0.0))
    return weights, wrong


@function
def write_losses(labels, rows, T, lane, w, c, flags, ignore):
    """Write the losses in place of max - x_y; return their sum."""
    m, s, us = lane, ahead(lane, T), ahead(lane, 5 * T)
    losses, spreads = ahead(lane, 7 * T), ahead(lane, 8 * T)
    for i in range(0, T, lanes(lane)):
        log = log1p(vector(s, i))
        v = value(vector(losses, i), log, vector(spreads, i), vector(m, i), vector(us, i), c)
        put(losses, i, v)
    if flags & IGNORING:
        for i in range(rows):
            if labels[i] == ignore:
                store(losses, i, typed(w, 0.0))
    sum_ = 0.0
    for i in range(rows):
        sum_ = plus(sum_, float(load(losses, i)))
    return sum_


@function
def write_slopes(T, lane, w, c):
    """Write the slopes and the factors of the gradient."""
    m, s, us = lane, ahead(lane, T), ahead(lane, 5 * T)
    a, inverse = ahead(lane, 2 * T), ahead(lane, 3 * T)
    for i in range(0, T, lanes(lane)):
        rest = vector(s, i)
        put(a, i, slope(vector(us, i), vector(m, i), rest, c))
        put(inverse, i, c[4] / (1.0 + rest))


# --------------------------------------------------------------------------- short rows


@function
def block_losses(p, e, labels, rows, room, w, n, c, flags, ignore):
    """Write the losses of a block; the exps times UP go to `e` unless it is 0."""
    T, L, lane = _blocks.height(room), lanes(room), _blocks.numbers(room, 0)
    at_label, ys = ahead(lane, 4 * T), ahead(lane, 6 * T)
    losses, spreads = ahead(lane, 7 * T), ahead(lane, 8 * T)
    for i in range(0, T, L):
        put(at_label, i, splat(room, 0.0))
        put(spreads, i, splat(room, 0.0))
    # Long before they are read as vectors: stores of single numbers have to reach the cache first.
    for r in range(rows):
        store(at_label, r, load(p, r * n + int(load(ys, r))))
    _blocks.remainders(p, e, e, n, rows, room, 1)
    for i in range(0, T, L):
        put(losses, i, vector(lane, i) - vector(at_label, i))
    if c[1] != 0:
        for r in range(rows):
            store(spreads, r, spread_of(ahead(p, r * n), w, n, flags, load(lane, r)))
    return write_losses(labels, rows, T, lane, w, c, flags, ignore)


@function
def block_gradients(scratch, o, labels, rows, room, w, n, c, flags, ignore):
    """Write the gradients to `o`, where the exps times UP are; if `o` rounds, in `scratch`."""
    T, L, lane, e = _blocks.height(room), lanes(room), _blocks.numbers(room, 0), either(o, scratch)
    m, s, us, ys = lane, ahead(lane, T), ahead(lane, 5 * T), ahead(lane, 6 * T)
    a, inverse, at_label = ahead(lane, 2 * T), ahead(lane, 3 * T), ahead(lane, 4 * T)
    share = c[1]
    write_slopes(T, lane, w, c)
    shares = ahead(lane, 8 * T)
    for r in range(rows if share != 0 else 0):
        u = load(w, int(load(ys, r))) if flags & WEIGHTED else typed(w, 1.0)
        store(shares, r, share * u)
    for i in range(0, T, L):
        q = vector(us, i) * c[0]
        if share != 0:
            q = q + vector(shares, i)
        term = careful_term(vector(at_label, i), vector(m, i), 1) * DOWN
        put(at_label, i, entry(term, vector(a, i), q, vector(s, i), vector(inverse, i)))
        if share == 0:
            put(a, i, vector(a, i) * vector(inverse, i))
    if share == 0:
        _blocks.scale(e, o, n, rows, a, splat(room, DOWN))
    else:
        for r in range(rows):
            x, g, rest = ahead(e, r * n), ahead(o, r * n), load(s, r)
            slope_, inverse_ = load(a, r), load(inverse, r)
            write_entries(x, g, w, n, typed(w, 1.0), share, flags, rest, slope_, inverse_)
    for r in range(rows):
        store(o, r * n + int(load(ys, r)), load(at_label, r))
    if flags & IGNORING:
        for r in range(rows):
            if labels[r] == ignore:
                for j in range(n):
                    store(o, r * n + j, typed(w, 0.0))


# --------------------------------------------------------------------------- lanes


@function
def lane_losses(x, e, labels, rows, T, lane, w, n, c, flags, ignore):
    """Write the losses; the exps times UP go to `e` unless it is 0."""
    m, ys = lane, ahead(lane, 6 * T)
    losses, spreads = ahead(lane, 7 * T), ahead(lane, 8 * T)
    _lanes.fold(x, e, n, T, lane, 1)
    for i in range(T):
        store(losses, i, load(m, i) - load(x, int(load(ys, i)) * T + i))
        store(spreads, i, typed(w, 0.0))
    if c[1] != 0:
        for j in range(n):
            row = ahead(x, j * T)
            v = load(w, j) if flags & WEIGHTED else typed(w, 1.0)
            for i in range(T):
                store(spreads, i, load(spreads, i) + times(v, load(m, i) - load(row, i)))
    return write_losses(labels, rows, T, lane, w, c, flags, ignore)


@function
def lane_gradients(e, labels, rows, T, lane, w, n, c, flags, ignore):
    """Turn the exps times UP into the gradient."""
    s, us, ys = ahead(lane, T), ahead(lane, 5 * T), ahead(lane, 6 * T)
    a, inverse, at_label = ahead(lane, 2 * T), ahead(lane, 3 * T), ahead(lane, 4 * T)
    down, share = typed(w, DOWN), c[1]
    write_slopes(T, lane, w, c)
    for i in range(T):
        y = int(load(ys, i))
        q = load(us, i) * c[0]
        if share != 0:
            q += share * (load(w, y) if flags & WEIGHTED else typed(w, 1.0))
        term = load(e, y * T + i) * down
        store(at_label, i, entry(term, load(a, i), q, load(s, i), load(inverse, i)))
    if share == 0:
        for i in range(T):
            store(a, i, load(a, i) * load(inverse, i))
        for j in range(n):
            row = ahead(e, j * T)
            for i in range(T):
                store(row, i, load(row, i) * load(a, i) * down)
    else:
        for j in range(n):
            row = ahead(e, j * T)
            q = share * (load(w, j) if flags & WEIGHTED else typed(w, 1.0))
            for i in range(T):
                term = load(row, i) * down
                store(row, i, entry(term, load(a, i), q, load(s, i), load(inverse, i)))
    for i in range(rows):
        store(e, int(load(ys, i)) * T + i, load(at_label, i))
    if flags & IGNORING:
        for i in range(rows):
            if labels[i] == ignore:
                for j in range(n):
                    store(e, j * T + i, typed(w, 0.0))
