"""logsumexp of weighted terms from what kernels sum of each row, and the gradients through it.

Kernels return the maximum of what counts, the sum of the weights at it, and that of the other terms
over exp(max). Rows of which a sum is not finite are left to the portable formula, with all that it
says of infinities.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from portable_softmax import portable
from portable_softmax.kernels._cuts import on_cuts
from portable_softmax.kernels._request import Request

Sums: TypeAlias = Callable[[Request, Any], tuple[Any, Any, Any]]
"""Of a request and weights, which broadcast to it: maxima, and both sums of each row."""


def answer(sums: Sums, request: Request) -> Any:
    """Return logsumexp with weights, the sign beside it if that is asked for; axes are kept."""
    dtype, signed = request.answer_dtype, request.options.return_sign
    value, sign, _, _ = parts(sums, request, signed=signed)
    value = value.astype(dtype, copy=False)
    return (value, sign.astype(dtype, copy=False)) if signed else value


def with_sign(value: Any) -> tuple[Any, Any]:
    """Return a logarithm of a sum without weights, and its sign."""
    sign = np.where(np.isnan(value), value, value > -np.inf)
    return value, sign.astype(value.dtype, copy=False)


def weights(request: Request) -> Any:
    """Return the weights, 0 where a mask leaves an entry out."""
    b, where = request.options.b, request.options.where
    return b if where is None else np.where(where, b, b.dtype.type(0))


def parts(sums: Sums, request: Request, *, signed: bool = True) -> tuple[Any, ...]:
    """Return log|s| and s/|s| as they are computed, the axes kept; or log s and None.

    Then the maxima, and the sums over exp(max), where both are finite.
    """
    b = weights(request)
    m, at, others = sums(request, b)
    s = at + others
    fit = np.isfinite(s + m)
    value, sign = np.log(np.abs(s) if signed else s), np.sign(s) if signed else None
    small = np.abs(others) < np.abs(at) / 2
    if small.any():
        c, rest = at[small], others[small]
        value[small] = np.log(np.abs(c) if signed else c) + np.log1p(rest / c)
    value += m
    if not fit.all():
        unfit = ~fit
        x, b = (_rows(a, request, unfit) for a in (request.x, b))
        found = portable.logsumexp(np, x, (1,), b=b, return_sign=signed)
        for whole, some in zip((value, sign), found, strict=True):
            if whole is not None:
                whole[unfit] = some[:, 0]
    return value, sign, m, s


def _rows(a: Any, request: Request, which: Any) -> Any:
    """Return some rows of what broadcasts to `x`, as they are computed, in two axes."""
    x, axes = request.x, request.axes
    kept = [k for k in range(x.ndim) if k not in axes]
    which = which.transpose(*kept, *axes).reshape([x.shape[k] for k in kept])
    rows = np.broadcast_to(a, x.shape).transpose(*kept, *axes)[which]
    return rows.reshape(len(rows), -1).astype(request.compute_dtype, copy=False)


def sums(request: Request, b: Any) -> tuple[Any, Any, Any]:
    """Return the sums in NumPy, in parts that stay in cache."""
    x, axes, compute = request.x, request.axes, request.compute_dtype
    b, found = np.broadcast_to(b, x.shape), np.empty((3, *request.reduced_shape()), compute)
    m, at, others = found

    def work(cut: Any) -> None:
        tile, w = x[cut].astype(compute, copy=False), b[cut]
        live = np.where(w == 0, compute.type(-np.inf), tile)
        m[cut] = top = np.maximum.reduce(live, axis=axes, keepdims=True)
        is_top = live == top
        live -= top
        np.exp(live, out=live)
        live *= w
        at[cut] = portable.total(np, w * is_top, axes)
        live[is_top] = 0.0
        others[cut] = portable.total(np, live, axes)

    on_cuts(work, x, axes, compute)
    return m, at, others


# --------------------------------------------------------------------------- gradients


def slopes(request: Request, m: Any, factor: Any, by_b: bool) -> tuple[Any, Any] | None:
    """Return b * exp(x - m) * factor, and it without the weight if that is asked for, else None.

    None alone stands for what the formula has to compute: what has no weight is far above `m`.
    """
    x, axes, compute = request.x, request.axes, request.compute_dtype
    b = np.broadcast_to(weights(request), x.shape)
    by_x = np.empty(x.shape, request.result_dtype)
    of_b = np.empty(x.shape, compute) if by_b else None
    most, fits = bound(compute), [True]

    def work(cut: Any) -> None:
        w = b[cut]
        e = x[cut].astype(compute)
        e -= m[cut]
        if not e.max() < most:
            fits[0] = False  # a weight of 0, or nearly, at what would count most
        np.exp(e, out=e)
        e *= factor[cut]
        if of_b is not None:
            of_b[cut] = e
        e *= w
        by_x[cut] = e

    on_cuts(work, x, axes, compute)
    return (by_x, seen_of(request, of_b)) if fits[0] else None


def bound(compute: Any) -> float:
    """Return how far above a maximum what has no weight may be."""
    return math.log(float(np.finfo(compute).max)) / 2


def seen_of(request: Request, by_b: Any) -> Any:
    """Return a gradient by weights, 0 where a mask leaves an entry out."""
    where = request.options.where
    if where is not None and by_b is not None:
        np.copyto(by_b, 0.0, where=~np.broadcast_to(where, by_b.shape))
    return by_b
