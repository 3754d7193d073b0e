"""Small arrays, where the calls cost more than the numbers: each formula in as few as it takes.

`logits_of` and `losses` return None for a call that is left to tiles: other options, another
layout, a label without a class. A row's values change nothing for other rows. The formulas are
those of `_maths.plain` and `_maths.fold`. What there is one of per row has one axis, and entries
are found by their place in the flat array: that costs half of what `take`, `put` and `keepdims` do.
"""

from __future__ import annotations

import math
from functools import lru_cache, reduce
from typing import Any

import numpy as np

from portable_softmax.kernels._numpy import _maths
from portable_softmax.kernels._numpy._layout import Buffers
from portable_softmax.kernels._request import Request
from portable_softmax.portable import CONFIDENT, LOG_CONFIDENT, off_one

# From about here on the usual way costs the same, for short rows and for others:
# `python -m bench speed --backend numpy --shapes 320x10,800x10,16x1000,64x1000`.
_SMALL_SHORT, SMALL = 1 << 13, 1 << 16
_SHORT, _FEW = 64, 4

_DTYPES = ("float32", "float64")

# Temperatures that numbers are divided by without leaving the range, and maxima that the least
# number less them does not leave.
_ORDINARY, _MODERATE = (2.0**-20, 2.0**20), 1e30

# Seen as unsigned, a negative label is at least the number beside it.
_UNSIGNED = {np.dtype(f"i{n}"): (np.dtype(f"u{n}"), 1 << (8 * n - 1)) for n in (1, 2, 4, 8)}

_OFF_ONE = {np.dtype(name): off_one(float(np.finfo(name).eps), 0.0) for name in _DTYPES}

# From this sum on, an exp that is subnormal belongs to a probability that is so too, or nearly.
_LOW_SUM = math.exp(_maths.LOW_FOR_PROBABILITIES)


def rows_of(request: Request) -> Any:
    """Return `x` as rows along its last axis, or None if it is not small, or not in rows."""
    x = request.x
    dims, n = x.ndim, x.shape[-1]
    if (
        x.size > (_SMALL_SHORT if n < _SHORT else SMALL)
        or request.axes != (dims - 1,)
        or request.dtype not in _DTYPES
        or not x.flags.c_contiguous
    ):
        return None
    return x if dims == 2 else x.reshape(-1, n)


def logits_of(request: Request) -> Any:
    """As `rows_of`, with -inf for what a mask leaves out; None for a call with another option."""
    if not request.active:
        return rows_of(request)
    rows = rows_of(request) if request.active == ("where",) else None
    if rows is None:
        return None
    masked = np.where(request.options.where, request.x, rows.dtype.type(-np.inf))
    return masked.reshape(rows.shape)


def tempered_logits_of(request: Request) -> Any:
    """As `logits_of`; with a temperature, what rows less their maxima are over it."""
    options, active = request.options, request.active
    if "temperature" not in active:
        return logits_of(request)
    rest = tuple(name for name in active if name != "temperature")
    if not _ORDINARY[0] <= options.temperature <= _ORDINARY[1]:
        return None
    rows = logits_of(request._replace(active=rest))
    if rows is None:
        return None
    m = maxima(rows)[1]
    if not most(np.abs(m)) <= _MODERATE:
        return None
    d = rows - m[:, None]
    d /= options.temperature
    return d


def _leave_out(request: Request, found: Any, number: float) -> None:
    """Write a number to what a mask leaves out, where it is nan with the rest of its row."""
    if request.options.where is not None:
        where = np.broadcast_to(request.options.where, request.x.shape).reshape(found.shape)
        found[np.isnan(found) & ~where] = number


def least(x: Any) -> Any:
    """Return the least entry, or a nan: of a small array in a third of the time of a reduction."""
    return x.item(x.argmin())


def most(x: Any) -> Any:
    """Return the greatest entry, or a nan."""
    return x.item(x.argmax())


@lru_cache(64)
def _starts(n: int, c: int) -> Any:
    """Return the places where n rows of c entries start in the flat array."""
    return np.arange(0, n * c, c)


def sums(x: Any) -> Any:
    """Return the sums of the rows; pairwise as those of `reduce`, in half of its time or less."""
    if 1 < x.shape[1] <= _FEW:
        return reduce(np.add, x.T)  # of a single class that would be `x` itself
    return np.add.reduceat(x.ravel(), _starts(*x.shape))


def maxima(x: Any) -> tuple[Any, Any]:
    """Return the places of the maxima in the flat array, and the maxima."""
    at = x.argmax(1)
    at += _starts(*x.shape)
    return at, x.ravel()[at]


def _rest(x: Any, at: Any, m: Any) -> tuple[Any, Any]:
    """Return the rests, and the rows to fold again."""
    e = np.exp(x)
    flat = e.ravel()
    grown = flat[at]
    flat[at] = 0.0
    s = sums(e)
    far, tiny = _maths.RANGES[x.dtype]
    unfit = None
    # A sum that is not tiny has no maximum far below 0.
    if not (least(s) >= tiny and most(m) <= far):
        unfit = np.flatnonzero(~((m <= far) & (s >= tiny)))
    return np.divide(s, grown, s), unfit


def _fold(rows: Any, out: Any = None) -> tuple[Any, Any]:
    """Return the maxima and the rests, for any logits; `out` takes exp(x - max)."""
    m, rest = _maths.fold(rows, out, 1, Buffers(rows.dtype))
    return m.ravel(), rest.ravel()


def _shifted(rows: Any) -> Any:
    """Return the exps of rows less `_maths.base`."""
    b, rounds = _maths.base(maxima(rows)[1][:, None])
    if not rounds:
        return np.exp(rows if b is None else rows - b)
    e = np.empty_like(rows)
    _maths.write_exps(rows, b, np.empty_like(rows), e, np.empty_like(rows))
    return e


def unfit_of(e: Any, s: Any) -> Any:
    """Return the rows to shift, of exps that sum to `s`; None where all are known to be fit."""
    smallest = _maths.SMALLEST_NORMAL[e.dtype]
    if most(s) < math.inf and (least(s) >= _LOW_SUM or least(e) >= smallest):
        return None
    normal = e.min(1) >= smallest
    return np.flatnonzero(~((s < math.inf) & ((s >= _LOW_SUM) | normal)))


def softmax(request: Request, rows: Any) -> Any:
    """exp(x) / sum(exp(x)), of x in the range of exp: rows beyond it are shifted."""
    e = np.exp(rows)
    s = sums(e)
    unfit = unfit_of(e, s)
    if unfit is not None and unfit.size:
        e[unfit] = some = _shifted(rows[unfit])
        s[unfit] = sums(some)
    e /= s[:, None]
    if unfit is not None:
        _leave_out(request, e, 0.0)
    return e if request.x.ndim == 2 else e.reshape(request.x.shape)


def log_softmax(request: Request, rows: Any) -> Any:
    """(x - max) - log1p(rest)."""
    at, m = maxima(rows)
    rest, unfit = _rest(rows, at, m)
    if unfit is not None:
        rest[unfit] = _fold(rows[unfit])[1]
    d = rows - m[:, None]
    d -= np.log1p(rest, rest)[:, None]
    if unfit is not None:
        _leave_out(request, d, -math.inf)
    return d if request.x.ndim == 2 else d.reshape(request.x.shape)


def logsumexp(request: Request, rows: Any) -> Any:
    """Max + log1p(rest)."""
    at, m = maxima(rows)
    rest, unfit = _rest(rows, at, m)
    value = m + np.log1p(rest, rest)
    # Near 0 the two cancel, and every error counts.
    if not least(np.abs(value, rest)) >= 1.0:
        if rows.shape[1] < _SHORT:
            near = np.flatnonzero(rest < 1.0)
            value[near] = _of_differences(rows[near], at[near] - near * rows.shape[1], m[near])
        else:
            unfit = _maths.near_zero(value, unfit)
    if unfit is not None:
        m, rest = _fold(rows[unfit])
        value[unfit] = np.where(np.isinf(m), m, m + np.log1p(rest))
    return value.reshape(*request.x.shape[:-1], 1)


def weighted_sums(request: Request, rows: Any, b: Any) -> tuple[Any, ...]:
    """Return the maxima of what counts, and the sums of weights at them and of the other terms."""
    x, shape = request.x, (*request.x.shape[:-1], 1)
    b = (b if b.shape == x.shape else np.broadcast_to(b, x.shape)).reshape(rows.shape)
    live = np.where(b == 0, rows.dtype.type(-np.inf), rows)
    m = maxima(live)[1]
    live -= m[:, None]
    tops = (live == 0) * b
    e = np.exp(live, live)
    e *= b
    e -= tops
    return tuple([a.reshape(shape) for a in (m, sums(tops), sums(e))])


def _of_differences(d: Any, at: Any, m: Any) -> Any:
    """Return max + log1p(rest) of rows, overwritten, with their maxima at the places `at`.

    Beside a maximum near 0 no difference that counts has lost much, and no exp is divided.
    """
    d -= m[:, None]
    np.exp(d, d)
    at += _starts(*d.shape)
    d.ravel()[at] = 0.0
    rest = sums(d)
    return m + np.log1p(rest, rest)


def upstream_of(request: Request) -> Any:
    """Return `dy` as rows beside `x`, or None if both are not small, or not in rows."""
    rows, dy = rows_of(request), request.dy
    if rows is None or dy.dtype != rows.dtype or not dy.flags.c_contiguous:
        return None
    return dy if dy.ndim == 2 else dy.reshape(rows.shape)


def softmax_vjp(request: Request, dy: Any) -> Any:
    """y * (dy - sum(y * dy))."""
    y = request.x.reshape(dy.shape)
    d = y * dy
    np.subtract(dy, sums(d)[:, None], d)
    d *= y
    if not most(y) <= CONFIDENT:
        at = np.flatnonzero(y > CONFIDENT)
        row, c = at // y.shape[1], dy.ravel()[at]
        y, dy = y[row], dy[row]
        fits = np.isfinite(c) & (np.abs(sums(y) - 1.0) <= _OFF_ONE[y.dtype])
        dy -= np.where(fits, c, 0.0)[:, None]
        d[row] = y * (dy - sums(y * dy)[:, None])
    return d if request.x.ndim == 2 else d.reshape(request.x.shape)


def log_softmax_vjp(request: Request, dy: Any, masked: bool) -> Any:
    """dy - exp(log_y) * sum(dy), where an entry of -inf is a masked one if any can be."""
    log_y = request.x.reshape(dy.shape)
    if masked and not np.isfinite(log_y).all():
        dy = np.where(np.isinf(log_y), 0.0, dy)
    d, s = np.exp(log_y), sums(dy)
    d *= s[:, None]
    np.subtract(dy, d, d)
    if not most(log_y) <= LOG_CONFIDENT:
        flat = log_y.ravel()
        at = (flat > LOG_CONFIDENT).nonzero()[0]
        d.ravel()[at] = _maths.mended(flat[at], dy.ravel()[at], s[at // d.shape[1]])
    return d if request.x.ndim == 2 else d.reshape(request.x.shape)


def losses(request: Request, *, with_grad: bool) -> Any:
    """Return the reduced loss, and its gradient or None."""
    labels, reduction = request.labels, request.options.reduction
    plain = not request.active or request.active == ("reduction",)
    rows = rows_of(request) if plain else None
    if rows is None or labels.dtype not in _UNSIGNED:
        return None
    n, c = rows.shape
    unsigned, negative = _UNSIGNED[labels.dtype]
    if most(labels.view(unsigned)) >= min(c, negative):
        return None
    at, m = maxima(rows)
    label = labels.ravel() + _starts(n, c)
    loss = m - rows.ravel()[label]
    grad = None
    if with_grad:
        rest, grad = _gradient(rows, at, m, label, loss, 1.0 / n if reduction == "mean" else 1.0)
    else:
        rest, unfit = _rest(rows, at, m)
        if unfit is not None:
            rest[unfit] = _fold(rows[unfit])[1]
    loss += np.log1p(rest, rest)
    if reduction == "none":
        loss = loss.reshape(labels.shape) if labels.ndim else loss[0]
    else:
        loss = np.add.reduce(loss)
        if reduction == "mean":
            loss = loss / n
    return loss, None if grad is None else grad.reshape(request.x.shape)


def folded(x: Any, at: Any, m: Any) -> tuple[Any, Any, Any, Any]:
    """Return the exps up to a factor of the row, that of its maximum, the rest, and their sum."""
    e = np.exp(x)
    flat = e.ravel()
    grown = flat[at]
    flat[at] = 0.0
    s = sums(e)
    flat[at] = grown
    (far, tiny), lowest = _maths.RANGES[x.dtype], least(m)
    low, unfit = -far, None
    if not lowest >= _maths.LOW_FOR_PROBABILITIES:
        low = _maths.low_for_probabilities(e)
    if not (least(s) >= tiny and most(m) <= far and lowest >= low):
        unfit = np.flatnonzero(~((m <= far) & (m >= low) & (s >= tiny)))
    total = s + grown
    rest = np.divide(s, grown, s)
    if unfit is not None:
        some = np.empty((unfit.size, x.shape[1]), x.dtype)
        rest[unfit] = _fold(x[unfit], some)[1]
        e[unfit] = some
        grown[unfit] = 1.0
        total[unfit] = 1.0 + rest[unfit]
    return e, grown, rest, total


def _gradient(x: Any, at: Any, m: Any, label: Any, gap: Any, scale: float) -> tuple[Any, Any]:
    """Return the rests and p - t, scaled."""
    e, grown, rest, total = folded(x, at, m)
    flat = e.ravel()
    # At the label of a confident row exp - 1 is an exact 0: minus the rest, digits and all.
    at_label = flat[label]
    at_label /= grown
    at_label[gap == 0.0] = 1.0
    at_label -= 1.0
    at_label -= rest
    at_label *= scale / (rest + 1.0)
    e *= np.divide(scale, total, total)[:, None]
    flat[label] = at_label
    return rest, e
