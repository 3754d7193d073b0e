"""What is compiled for short rows, worked on in blocks.

As `_on_rows`; the rows [lo, hi) begin with a block.
"""

from __future__ import annotations

from numba import njit

from portable_softmax.kernels._numba import _blocks, _losses, _many
from portable_softmax.kernels._numba._ir import ahead, copy, either, pointer
from portable_softmax.kernels._numba._store import kept
from portable_softmax.kernels._numba._vectors import aligned

function = njit(nogil=True, error_model="numpy")


@kept
@function
def softmax(x, out, t, tile, n, lo, hi):
    p, o, e = pointer(x), pointer(out), aligned(pointer(tile))
    T, f = _blocks.height(e), _blocks.behind(e)
    for i in range(lo, hi, T):
        _blocks.softmax(ahead(p, i * n), f, ahead(o, i * n), n, min(T, hi - i), e, t)


@kept
@function
def log_softmax(x, out, t, tile, n, lo, hi):
    p, o, e = pointer(x), pointer(out), aligned(pointer(tile))
    T = _blocks.height(e)
    for i in range(lo, hi, T):
        _blocks.log_softmax(ahead(p, i * n), ahead(o, i * n), n, min(T, hi - i), e, t)


@kept
@function
def logsumexp(x, out, tile, n, lo, hi):
    p, o, e = pointer(x), pointer(out), aligned(pointer(tile))
    T = _blocks.height(e)
    for i in range(lo, hi, T):
        rows = min(T, hi - i)
        _blocks.logsumexp(ahead(p, i * n), n, rows, e)
        copy(_blocks.numbers(e, 0), ahead(o, i), rows)


@kept
@function
def softmax_vjp(y, dy, out, tile, n, lo, hi):
    p, q, o, e = pointer(y), pointer(dy), pointer(out), aligned(pointer(tile))
    T = _blocks.height(e)
    for i in range(lo, hi, T):
        at, rows = i * n, min(T, hi - i)
        _blocks.softmax_vjp(ahead(p, at), ahead(q, at), ahead(o, at), n, rows, e)


@kept
@function
def log_softmax_vjp(log_y, dy, out, left_out, tile, n, lo, hi):
    p, q, o, e = pointer(log_y), pointer(dy), pointer(out), aligned(pointer(tile))
    T = _blocks.height(e)
    for i in range(lo, hi, T):
        at, rows = i * n, min(T, hi - i)
        _blocks.log_softmax_vjp(ahead(p, at), ahead(q, at), ahead(o, at), n, rows, e, left_out)


@kept
@function
def cross_entropy(x, labels, losses, w, options, flags, ignore, tile, n, lo, hi):
    """Return the sum of the losses, that of the labels' weights, and how many labels are wrong."""
    p, o, v, e = pointer(x), pointer(losses), pointer(w), aligned(pointer(tile))
    T, lane = _blocks.height(e), _blocks.numbers(e, 0)
    c = _losses.constants(v, n, options)
    sums = _losses.nothing()
    for i in range(lo, hi, T):
        rows = min(T, hi - i)
        some = labels[i : i + rows]
        weight, bad = _many.write_labels(some, rows, T, lane, v, n, flags, ignore)
        loss = _many.block_losses(ahead(p, i * n), 0, some, rows, e, v, n, c, flags, ignore)
        sums = _many.with_rows(sums, o, i, rows, loss, weight, bad, T, lane, flags)
    return _losses.total(sums)


@kept
@function
def cross_entropy_value_and_grad(
    x, labels, losses, w, options, flags, ignore, grad, tile, n, lo, hi
):
    """Write the gradient as well."""
    p, o, v, e, g = pointer(x), pointer(losses), pointer(w), aligned(pointer(tile)), pointer(grad)
    T, lane, f = _blocks.height(e), _blocks.numbers(e, 0), _blocks.behind(e)
    c = _losses.constants(v, n, options)
    sums = _losses.nothing()
    for i in range(lo, hi, T):
        rows = min(T, hi - i)
        some, at, out = labels[i : i + rows], ahead(p, i * n), ahead(g, i * n)
        weight, bad = _many.write_labels(some, rows, T, lane, v, n, flags, ignore)
        to = either(out, f)
        loss = _many.block_losses(at, to, some, rows, e, v, n, c, flags, ignore)
        _many.block_gradients(f, out, some, rows, e, v, n, c, flags, ignore)
        sums = _many.with_rows(sums, o, i, rows, loss, weight, bad, T, lane, flags)
    return _losses.total(sums)
