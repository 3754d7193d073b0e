"""What is compiled for rows that lie in memory one after the other and are worked on one by one.

One function for each operation, on the rows [lo, hi) of arrays of shape (rows, n). All arrays are
C-contiguous. `tile` has the computation's dtype and the size that `_drive` gives it. `_on_blocks`
has the same functions for short rows, and `_on_lanes` for rows that run across memory.
"""

from __future__ import annotations

from numba import njit

from portable_softmax.kernels._numba import _long, _losses, _rows
from portable_softmax.kernels._numba._ir import ahead, either, pointer, store
from portable_softmax.kernels._numba._long import KEPT, PART
from portable_softmax.kernels._numba._store import kept

function = njit(nogil=True, error_model="numpy")


@function
def behind(tile, n):
    """Where the tile has space for a row."""
    return ahead(pointer(tile), 0 if n <= PART else KEPT * ((n + PART - 1) // PART))


@function
def fold(p, e, n, parts):
    """Return a row's maximum and its remainder."""
    if n <= PART:
        return _rows.fold(p, e, n, 1)
    return _long.fold(p, e, n, 1, parts)


@kept
@function
def softmax(x, out, t, tile, n, lo, hi):
    p, o, parts, e = pointer(x), pointer(out), pointer(tile), behind(tile, n)
    for i in range(lo, hi):
        if n <= PART:
            _rows.softmax(ahead(p, i * n), e, ahead(o, i * n), n, t)
        else:
            _long.softmax(ahead(p, i * n), e, ahead(o, i * n), n, t, parts)


@kept
@function
def log_softmax(x, out, t, tile, n, lo, hi):
    p, o, parts = pointer(x), pointer(out), pointer(tile)
    for i in range(lo, hi):
        if n <= PART:
            _rows.log_softmax(ahead(p, i * n), ahead(o, i * n), n, t)
        else:
            _long.log_softmax(ahead(p, i * n), ahead(o, i * n), n, t, parts)


@kept
@function
def logsumexp(x, out, tile, n, lo, hi):
    p, o, parts = pointer(x), pointer(out), pointer(tile)
    for i in range(lo, hi):
        m, rest = fold(ahead(p, i * n), 0, n, parts)
        store(o, i, _rows.with_log(m, rest))


@kept
@function
def softmax_vjp(y, dy, out, tile, n, lo, hi):
    p, q, o = pointer(y), pointer(dy), pointer(out)
    for i in range(lo, hi):
        _rows.softmax_vjp(ahead(p, i * n), ahead(q, i * n), ahead(o, i * n), n)


@kept
@function
def log_softmax_vjp(log_y, dy, out, left_out, tile, n, lo, hi):
    p, q, o = pointer(log_y), pointer(dy), pointer(out)
    for i in range(lo, hi):
        _rows.log_softmax_vjp(ahead(p, i * n), ahead(q, i * n), ahead(o, i * n), n, left_out)


@kept
@function
def cross_entropy(x, labels, losses, w, options, flags, ignore, tile, n, lo, hi):
    """Return the sum of the losses, that of the labels' weights, and how many labels are wrong."""
    p, o, v, parts = pointer(x), pointer(losses), pointer(w), pointer(tile)
    c = _losses.constants(v, n, options)
    sums = _losses.nothing()
    for i in range(lo, hi):
        y, u, code = _losses.label(labels, i, v, n, flags, ignore)
        loss = u
        if code != 1:
            row = ahead(p, i * n)
            m, rest = fold(row, 0, n, parts)
            loss = _losses.loss(row, v, n, y, u, c, flags, m, rest)
        sums = _losses.with_row(sums, o, i, loss, v, u, code, flags)
    return _losses.total(sums)


@kept
@function
def cross_entropy_value_and_grad(
    x, labels, losses, w, options, flags, ignore, grad, tile, n, lo, hi
):
    """Write the gradient as well."""
    p, o, v, g = pointer(x), pointer(losses), pointer(w), pointer(grad)
    parts, e = pointer(tile), behind(tile, n)
    c = _losses.constants(v, n, options)
    sums = _losses.nothing()
    for i in range(lo, hi):
        y, u, code = _losses.label(labels, i, v, n, flags, ignore)
        loss, out = u, ahead(g, i * n)
        if code == 1:
            for j in range(n):
                store(out, j, u)
        else:
            row = ahead(p, i * n)
            m, rest = fold(row, either(out, e), n, parts)
            loss = _losses.loss(row, v, n, y, u, c, flags, m, rest)
            _losses.gradient(row, e, out, v, n, y, u, c, flags, m, rest, parts)
        sums = _losses.with_row(sums, o, i, loss, v, u, code, flags)
    return _losses.total(sums)


@kept
@function
def scan(labels, w, n, flags, ignore):
    """Return the sum of the labels' weights, and how many labels are wrong."""
    v = pointer(w)
    sums = _losses.nothing()
    for i in range(labels.shape[0]):
        _, u, code = _losses.label(labels, i, v, n, flags, ignore)
        sums = _losses.with_row(sums, v, i, u, v, u, code, 0)
    return _losses.total(sums)
