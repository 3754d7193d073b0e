"""What is compiled: one function for each operation, on pieces of two-dimensional arrays.

`x` holds rows of `n` classes. With `inner` = 1 they lie in memory one after the other, `x` has
the shape (rows, n) and a piece is the rows [lo, hi). Otherwise the classes of a row lie `inner`
apart, `x` has the shape (outer * n, inner) and a piece is the blocks [lo, hi) of `T` neighbours.
Rows are worked on `T` at a time, one a lane, or one by one if `T` is 0.

All arrays are C-contiguous. `tile` holds T * (n + LANE_NUMBERS) numbers of the computation, twice
that for two inputs, softmax and the gradient; without lanes a row, if the array has another dtype.
"""

from __future__ import annotations

from numba import njit

from portable_softmax.kernels._numba import _lanes, _losses, _rows
from portable_softmax.kernels._numba._ir import ahead, either, load, pointer, store
from portable_softmax.kernels._numba._store import kept

function = njit(nogil=True, error_model="numpy")


@kept
@function
def softmax(x, out, t, tile, T, n, inner, lo, hi):
    p, o, e = pointer(x), pointer(out), pointer(tile)
    if T == 0:
        for i in range(lo, hi):
            _rows.softmax(ahead(p, i * n), e, ahead(o, i * n), n, t)
        return
    step = T if inner == 1 else 1
    lanes = ahead(e, n * T)
    f = ahead(lanes, _lanes.LANE_NUMBERS * T)
    for i in range(lo, hi, step):
        at, rows = _lanes.block(i, hi, T, n, inner)
        _lanes.fetch(ahead(p, at), e, T, n, inner, rows)
        _lanes.softmax(e, f, n, T, lanes, t)
        _lanes.deliver(f, ahead(o, at), T, n, inner, rows)


@kept
@function
def log_softmax(x, out, t, tile, T, n, inner, lo, hi):
    p, o, e = pointer(x), pointer(out), pointer(tile)
    if T == 0:
        for i in range(lo, hi):
            _rows.log_softmax(ahead(p, i * n), ahead(o, i * n), n, t)
        return
    step = T if inner == 1 else 1
    for i in range(lo, hi, step):
        at, rows = _lanes.block(i, hi, T, n, inner)
        _lanes.fetch(ahead(p, at), e, T, n, inner, rows)
        _lanes.log_softmax(e, n, T, ahead(e, n * T), t)
        _lanes.deliver(e, ahead(o, at), T, n, inner, rows)


@kept
@function
def logsumexp(x, out, tile, T, n, inner, lo, hi):
    p, o, e = pointer(x), pointer(out), pointer(tile)
    if T == 0:
        for i in range(lo, hi):
            m, rest = _rows.fold(ahead(p, i * n), 0, n, 1)
            store(o, i, _rows.with_log(m, rest))
        return
    step = T if inner == 1 else 1
    for i in range(lo, hi, step):
        at, rows = _lanes.block(i, hi, T, n, inner)
        _lanes.fetch(ahead(p, at), e, T, n, inner, rows)
        lanes = ahead(e, n * T)
        _lanes.logsumexp(e, n, T, lanes)
        first = ahead(o, _lanes.first_row(i, T, inner))
        for k in range(rows):
            store(first, k, load(lanes, k))


@kept
@function
def softmax_vjp(y, dy, out, tile, T, n, inner, lo, hi):
    p, q, o, e = pointer(y), pointer(dy), pointer(out), pointer(tile)
    if T == 0:
        for i in range(lo, hi):
            _rows.softmax_vjp(ahead(p, i * n), ahead(q, i * n), ahead(o, i * n), n)
        return
    step = T if inner == 1 else 1
    lanes = ahead(e, n * T)
    f = ahead(lanes, _lanes.LANE_NUMBERS * T)
    for i in range(lo, hi, step):
        at, rows = _lanes.block(i, hi, T, n, inner)
        _lanes.fetch(ahead(p, at), e, T, n, inner, rows)
        _lanes.fetch(ahead(q, at), f, T, n, inner, rows)
        _lanes.softmax_vjp(e, f, n, T, lanes)
        _lanes.deliver(e, ahead(o, at), T, n, inner, rows)


@kept
@function
def log_softmax_vjp(log_y, dy, out, left_out, tile, T, n, inner, lo, hi):
    p, q, o, e = pointer(log_y), pointer(dy), pointer(out), pointer(tile)
    if T == 0:
        for i in range(lo, hi):
            _rows.log_softmax_vjp(ahead(p, i * n), ahead(q, i * n), ahead(o, i * n), n, left_out)
        return
    step = T if inner == 1 else 1
    lanes = ahead(e, n * T)
    f = ahead(lanes, _lanes.LANE_NUMBERS * T)
    for i in range(lo, hi, step):
        at, rows = _lanes.block(i, hi, T, n, inner)
        _lanes.fetch(ahead(p, at), e, T, n, inner, rows)
        _lanes.fetch(ahead(q, at), f, T, n, inner, rows)
        _lanes.log_softmax_vjp(e, f, n, T, lanes, left_out)
        _lanes.deliver(e, ahead(o, at), T, n, inner, rows)


@kept
@function
def cross_entropy(x, labels, losses, w, options, flags, ignore, tile, T, n, inner, lo, hi):
    """Return the sum of the losses, that of the labels' weights, and how many labels are wrong."""
    p, o, v, e = pointer(x), pointer(losses), pointer(w), pointer(tile)
    total, lost, weights, more, wrong = 0.0, 0.0, 0.0, 0.0, 0
    c = _losses.constants(v, n, options)
    if T == 0:
        for i in range(lo, hi):
            y, u, code = _losses.label(labels, i, v, n, flags, ignore)
            loss = u
            if code != 1:
                row = ahead(p, i * n)
                m, rest = _rows.fold(row, 0, n, 1)
                loss = _losses.loss(row, v, n, y, u, c, flags, m, rest)
            total, lost = _rows.added(total, lost, float(loss))
            u = load(v, 0) if code == 2 else u
            weights, more = _rows.added(weights, more, float(u))
            wrong += code == 2
            if flags & _losses.EACH:
                store(o, i, loss)
        return _rows.settled(total, lost), _rows.settled(weights, more), wrong
    step = T if inner == 1 else 1
    lanes = ahead(e, n * T)
    for i in range(lo, hi, step):
        at, rows = _lanes.block(i, hi, T, n, inner)
        first = _lanes.first_row(i, T, inner)
        _lanes.fetch(ahead(p, at), e, T, n, inner, rows)
        some = labels[first : first + rows]
        weight, bad = _losses.lane_labels(some, rows, T, lanes, v, n, flags, ignore)
        loss = _losses.lane_losses(e, 0, some, rows, T, lanes, v, n, c, flags, ignore)
        total, lost = _rows.added(total, lost, loss)
        weights, more = _rows.added(weights, more, weight)
        wrong += bad
        if flags & _losses.EACH:
            for k in range(rows):
                store(o, first + k, load(lanes, 7 * T + k))
    return _rows.settled(total, lost), _rows.settled(weights, more), wrong


@kept
@function
def cross_entropy_value_and_grad(
    x, labels, losses, w, options, flags, ignore, grad, tile, T, n, inner, lo, hi
):
    """Write the gradient as well."""
    p, o, v, e, g = pointer(x), pointer(losses), pointer(w), pointer(tile), pointer(grad)
    total, lost, weights, more, wrong = 0.0, 0.0, 0.0, 0.0, 0
    c = _losses.constants(v, n, options)
    if T == 0:
        for i in range(lo, hi):
            y, u, code = _losses.label(labels, i, v, n, flags, ignore)
            loss, out = u, ahead(g, i * n)
            if code == 1:
                for j in range(n):
                    store(out, j, u)
            else:
                row = ahead(p, i * n)
                m, rest = _rows.fold(row, either(out, e), n, 1)
                loss = _losses.loss(row, v, n, y, u, c, flags, m, rest)
                _losses.gradient(e, out, v, n, y, u, c, flags, m, rest)
            total, lost = _rows.added(total, lost, float(loss))
            u = load(v, 0) if code == 2 else u
            weights, more = _rows.added(weights, more, float(u))
            wrong += code == 2
            if flags & _losses.EACH:
                store(o, i, loss)
        return _rows.settled(total, lost), _rows.settled(weights, more), wrong
    step = T if inner == 1 else 1
    lanes = ahead(e, n * T)
    f = ahead(lanes, _lanes.LANE_NUMBERS * T)
    for i in range(lo, hi, step):
        at, rows = _lanes.block(i, hi, T, n, inner)
        first = _lanes.first_row(i, T, inner)
        _lanes.fetch(ahead(p, at), e, T, n, inner, rows)
        some = labels[first : first + rows]
        weight, bad = _losses.lane_labels(some, rows, T, lanes, v, n, flags, ignore)
        loss = _losses.lane_losses(e, f, some, rows, T, lanes, v, n, c, flags, ignore)
        _losses.lane_gradients(f, some, rows, T, lanes, v, n, c, flags, ignore)
        _lanes.deliver(f, ahead(g, at), T, n, inner, rows)
        total, lost = _rows.added(total, lost, loss)
        weights, more = _rows.added(weights, more, weight)
        wrong += bad
        if flags & _losses.EACH:
            for k in range(rows):
                store(o, first + k, load(lanes, 7 * T + k))
    return _rows.settled(total, lost), _rows.settled(weights, more), wrong


@kept
@function
def scan(labels, w, n, flags, ignore):
    """Return the sum of the labels' weights, and how many labels are wrong."""
    v = pointer(w)
    weights, more, wrong = 0.0, 0.0, 0
    for i in range(labels.shape[0]):
        _, u, code = _losses.label(labels, i, v, n, flags, ignore)
        u = load(v, 0) if code == 2 else u
        weights, more = _rows.added(weights, more, float(u))
        wrong += code == 2
    return _rows.settled(weights, more), wrong
