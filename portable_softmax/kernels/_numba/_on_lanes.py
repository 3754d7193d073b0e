"""What is compiled for rows that run across memory, worked on side by side.

As `_on_rows`, but the classes of a row lie `inner` apart: arrays have the shape (outer * n,
inner), and a piece is the blocks [lo, hi) of `T` neighbours, one a lane. They are copied to a tile
for it, which has space for T * (n + LANE_NUMBERS) numbers, twice that for two inputs, softmax and
the gradient.
"""

from __future__ import annotations

from numba import njit

from portable_softmax.kernels._numba import _lanes, _losses, _many
from portable_softmax.kernels._numba._ir import ahead, copy, pointer
from portable_softmax.kernels._numba._store import kept
from portable_softmax.kernels._numba._vectors import aligned

function = njit(nogil=True, error_model="numpy")


@kept
@function
def softmax(x, out, t, tile, n, T, inner, lo, hi):
    p, o, e = pointer(x), pointer(out), aligned(pointer(tile))
    lane = ahead(e, n * T)
    f = ahead(lane, _lanes.LANE_NUMBERS * T)
    for i in range(lo, hi):
        at, rows, _ = _lanes.block(i, T, n, inner)
        _lanes.fetch(ahead(p, at), e, T, n, inner, rows)
        _lanes.softmax(e, f, n, T, lane, t)
        _lanes.deliver(f, ahead(o, at), T, n, inner, rows)


@kept
@function
def log_softmax(x, out, t, tile, n, T, inner, lo, hi):
    p, o, e = pointer(x), pointer(out), aligned(pointer(tile))
    for i in range(lo, hi):
        at, rows, _ = _lanes.block(i, T, n, inner)
        _lanes.fetch(ahead(p, at), e, T, n, inner, rows)
        _lanes.log_softmax(e, n, T, ahead(e, n * T), t)
        _lanes.deliver(e, ahead(o, at), T, n, inner, rows)


@kept
@function
def logsumexp(x, out, tile, n, T, inner, lo, hi):
    p, o, e = pointer(x), pointer(out), aligned(pointer(tile))
    lane = ahead(e, n * T)
    for i in range(lo, hi):
        at, rows, first = _lanes.block(i, T, n, inner)
        _lanes.fetch(ahead(p, at), e, T, n, inner, rows)
        _lanes.logsumexp(e, n, T, lane)
        copy(lane, ahead(o, first), rows)


@kept
@function
def softmax_vjp(y, dy, out, tile, n, T, inner, lo, hi):
    p, q, o, e = pointer(y), pointer(dy), pointer(out), aligned(pointer(tile))
    lane = ahead(e, n * T)
    f = ahead(lane, _lanes.LANE_NUMBERS * T)
    for i in range(lo, hi):
        at, rows, _ = _lanes.block(i, T, n, inner)
        _lanes.fetch(ahead(p, at), e, T, n, inner, rows)
        _lanes.fetch(ahead(q, at), f, T, n, inner, rows)
        _lanes.softmax_vjp(e, f, n, T, lane)
        _lanes.deliver(e, ahead(o, at), T, n, inner, rows)


@kept
@function
def log_softmax_vjp(log_y, dy, out, left_out, tile, n, T, inner, lo, hi):
    p, q, o, e = pointer(log_y), pointer(dy), pointer(out), aligned(pointer(tile))
    lane = ahead(e, n * T)
    f = ahead(lane, _lanes.LANE_NUMBERS * T)
    for i in range(lo, hi):
        at, rows, _ = _lanes.block(i, T, n, inner)
        _lanes.fetch(ahead(p, at), e, T, n, inner, rows)
        _lanes.fetch(ahead(q, at), f, T, n, inner, rows)
        _lanes.log_softmax_vjp(e, f, n, T, lane, left_out)
        _lanes.deliver(e, ahead(o, at), T, n, inner, rows)


@kept
@function
def cross_entropy(x, labels, losses, w, options, flags, ignore, tile, n, T, inner, lo, hi):
    """Return the sum of the losses, that of the labels' weights, and how many labels are wrong."""
    p, o, v, e = pointer(x), pointer(losses), pointer(w), aligned(pointer(tile))
    lane = ahead(e, n * T)
    c = _losses.constants(v, n, options)
    sums = _losses.nothing()
    for i in range(lo, hi):
        at, rows, first = _lanes.block(i, T, n, inner)
        _lanes.fetch(ahead(p, at), e, T, n, inner, rows)
        some = labels[first : first + rows]
        weight, bad = _many.write_labels(some, rows, T, lane, v, n, flags, ignore)
        loss = _many.lane_losses(e, 0, some, rows, T, lane, v, n, c, flags, ignore)
        sums = _many.with_rows(sums, o, first, rows, loss, weight, bad, T, lane, flags)
    return _losses.total(sums)


@kept
@function
def cross_entropy_value_and_grad(
    x, labels, losses, w, options, flags, ignore, grad, tile, n, T, inner, lo, hi
):
    """Write the gradient as well."""
    p, o, v, e, g = pointer(x), pointer(losses), pointer(w), aligned(pointer(tile)), pointer(grad)
    lane = ahead(e, n * T)
    f = ahead(lane, _lanes.LANE_NUMBERS * T)
    c = _losses.constants(v, n, options)
    sums = _losses.nothing()
    for i in range(lo, hi):
        at, rows, first = _lanes.block(i, T, n, inner)
        _lanes.fetch(ahead(p, at), e, T, n, inner, rows)
        some = labels[first : first + rows]
        weight, bad = _many.write_labels(some, rows, T, lane, v, n, flags, ignore)
        loss = _many.lane_losses(e, f, some, rows, T, lane, v, n, c, flags, ignore)
        _many.lane_gradients(f, some, rows, T, lane, v, n, c, flags, ignore)
        _lanes.deliver(f, ahead(g, at), T, n, inner, rows)
        sums = _many.with_rows(sums, o, first, rows, loss, weight, bad, T, lane, flags)
    return _losses.total(sums)
