"""Cross-entropy of independent yes-or-no labels and its gradient, entry by entry.

With the logit z, the label t, w the entry's weight and c that of a yes,

    loss = a softplus(-z) + b softplus(z)        a = w c t,  b = w (1 - t)
    grad = b sigmoid(z) - a sigmoid(-z)

and softplus(z) = max(z, 0) + log1p(e) for e = exp(-|z|). What a coefficient of 0 stands at counts
as 0, whatever it is.
"""

from __future__ import annotations

from numba import types
from numba.extending import overload

from portable_softmax.kernels._numba._compensation import added, compensated
from portable_softmax.kernels._numba._exp import DOWN, exp_up, log1p, reference, size
from portable_softmax.kernels._numba._horizontal import sum_of_all
from portable_softmax.kernels._numba._jit import INLINED, function
from portable_softmax.kernels._numba._kernels import threaded
from portable_softmax.kernels._numba._memory import ahead, pointer, smaller, store, typed
from portable_softmax.kernels._numba._vectors import (
    lanes,
    larger,
    read,
    splat,
    where_at_least,
    where_equal,
    write,
)

CHUNK = 1 << 12  # entries of a group


@function
def _counted(coefficient, value):
    return where_equal(coefficient, 0.0, coefficient, coefficient * value)


def _weighted(coefficient, weights, j, k):
    """The coefficients times their weights, None for none."""


@overload(_weighted, jit_options=INLINED)
def _(coefficient, weights, j, k):
    if isinstance(weights, types.NoneType):
        return lambda coefficient, weights, j, k: coefficient
    return lambda coefficient, weights, j, k: _counted(coefficient, read(weights, j, k, 0.0))


def _part(array, at):
    """Where a part of an array begins, null or None where there is none."""


@overload(_part, jit_options=INLINED)
def _(array, at):
    if isinstance(array, types.NoneType):
        return lambda array, at: None
    return lambda array, at: ahead(pointer(array), at)


def _written(array, at):
    """Where a part of an array is written, null if there is none."""


@overload(_written, jit_options=INLINED)
def _(array, at):
    if isinstance(array, types.NoneType):
        return lambda array, at: 0
    return lambda array, at: ahead(pointer(array), at)


@function
def _entries(p, labels, weights, yeses, losses, grads, j, k, numbers):
    """Write the losses and gradients of a vector of entries, and return the former."""
    kept, half, scale = numbers
    z, t, zero = read(p, j, k, 0.0), read(labels, j, k, 0.0), typed(p, 0.0)
    yes, no = kept * t + half, kept * (1.0 - t) + half
    yes = _weighted(_weighted(yes, yeses, j, k), weights, j, k)
    no = _weighted(no, weights, j, k)
    e = exp_up(-size(z), reference(zero, zero, 1), 1) * DOWN
    log, inverse = log1p(e), 1.0 / (1.0 + e)
    loss = _counted(yes, larger(-z, zero) + log) + _counted(no, larger(z, zero) + log)
    write(losses, j, loss, k)
    rising, falling = where_at_least(z, zero, 1.0, e), where_at_least(zero, z, 1.0, e)
    write(grads, j, (_counted(no, rising * inverse) - _counted(yes, falling * inverse)) * scale, k)
    return loss


def _work(arrays, numbers, shape, workspace, lo, hi, piece):
    """Work on groups of entries.

    arrays = (logits, labels, weights, weights of a yes, losses, gradients, sums), where the last
    is one for each piece, and those that there are not None; numbers = ((1 - smoothing,
    smoothing / 2, the factor of the gradient),).
    """
    kept, half, scale = numbers[0]
    its = typed(workspace, kept), typed(workspace, half), typed(workspace, scale)
    L = lanes(workspace)
    total = lost = splat(workspace, 0.0)
    for i in range(lo, hi):
        at = i * CHUNK
        n = smaller(CHUNK, shape[0] - at)
        p, t = ahead(pointer(arrays[0]), at), ahead(pointer(arrays[1]), at)
        w, c = _part(arrays[2], at), _part(arrays[3], at)
        losses, grads = _written(arrays[4], at), _written(arrays[5], at)
        j = 0
        while j + L <= n:
            total, lost = added(total, lost, _entries(p, t, w, c, losses, grads, j, None, its))
            j += L
        if j < n:
            loss = _entries(p, t, w, c, losses, grads, j, n - j, its)
            there = read(typed(workspace, 1.0), j, n - j, 0.0)
            total, lost = added(total, lost, _counted(there, loss))
    store(pointer(arrays[6]), piece, float(sum_of_all(compensated(total, lost))))


LAYOUTS = {"rows": {"sigmoid_cross_entropy": threaded("entries.sigmoid_cross_entropy", _work)}}
