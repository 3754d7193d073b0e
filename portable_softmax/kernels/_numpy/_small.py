"""Small arrays, where the calls cost more than the numbers: each formula in as few as it takes.

Each function takes what the public function was called with, and answers None for a call that it
leaves to the usual way: other options, another layout, an infinity or a nan in a row.

The place of the maximum is at hand, so its term is left out of the sum, as everywhere. The
rounding errors of the differences are put back only where they count: one is at most 4u below 8,
and the terms further off than that are at most 1/e of a rest of n * exp(-7).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# From about here on the usual way costs the same, for short rows and for others:
# `python -m bench speed --backend numpy --shapes 320x10,800x10,16x1000,64x1000`.
_SMALL_SHORT, _SMALL = 1 << 13, 1 << 16
_SHORT = 64

_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))

# Seen as unsigned, a negative label is too large.
_UNSIGNED = {np.dtype(f"i{n}"): np.dtype(f"u{n}") for n in (1, 2, 4, 8)}

# NumPy's annotations know `keepdims` by its name only; by its place it costs less.
_sum: Any = np.add.reduce


def _rows(x: Any, axis: Any) -> Any:
    """Return `x` as rows along its last axis, or None if it is not small, or not in rows."""
    if type(axis) is not int or not 0 < x.size <= _SMALL or x.dtype not in _DTYPES:
        return None
    if x.ndim == 0 or (axis != -1 and axis != x.ndim - 1) or not x.flags.c_contiguous:
        return None
    n = x.shape[-1]
    if n < _SHORT and x.size > _SMALL_SHORT:
        return None
    return x.reshape(-1, n)


def _maxima(x: Any) -> tuple[Any, Any]:
    """Return the places of the maxima in the flat array, and the maxima."""
    n, c = x.shape
    at = x.argmax(1)
    at += np.arange(0, n * c, c)
    return at, x.take(at).reshape(n, 1)


def _fold(x: Any, m: Any, d: Any, e: Any) -> Any:
    """Return the rest, or None beside an infinity or a nan; `e` is exp(d), 0 at the maximum."""
    rest = _sum(e, 1, None, None, True)
    if np.minimum.reduce(rest, None) >= x.shape[1] * math.exp(-7.0):
        return rest
    # Knuth's two-sum: the error of d is (x - (d - t)) - (m + t), with t = d - x.
    t = d - x
    error = d - t
    np.subtract(x, error, error)
    np.add(m, t, t)
    np.subtract(error, t, error)
    error += 1.0
    np.multiply(e, error, e)
    rest = _sum(e, 1, None, None, True)
    return rest if np.minimum.reduce(rest, None) >= 0.0 else None


def softmax(x: Any, axis: Any, temperature: Any) -> Any:
    """exp(x - max) / sum(exp(x - max))."""
    rows = _rows(x, axis)
    if rows is None or type(temperature) is not float or temperature != 1.0:
        return None
    with np.errstate(all="ignore"):
        e = rows - _maxima(rows)[1]
        np.exp(e, e)
        np.divide(e, _sum(e, 1, None, None, True), e)
    return e.reshape(x.shape)


def log_softmax(x: Any, axis: Any, temperature: Any) -> Any:
    """(x - max) - log1p(rest)."""
    rows = _rows(x, axis)
    if rows is None or type(temperature) is not float or temperature != 1.0:
        return None
    with np.errstate(all="ignore"):
        at, m = _maxima(rows)
        d = rows - m
        e = np.exp(d)
        e.put(at, 0.0)
        rest = _fold(rows, m, d, e)
        if rest is None:
            return None
        np.subtract(d, np.log1p(rest, rest), d)
    return d.reshape(x.shape)


def logsumexp(x: Any, axis: Any, keepdims: Any) -> Any:
    """Max + log1p(rest)."""
    rows = _rows(x, -1 if axis is None and x.ndim == 1 else axis)
    if rows is None or keepdims is not False:
        return None
    with np.errstate(all="ignore"):
        at, m = _maxima(rows)
        d = rows - m
        e = np.exp(d)
        e.put(at, 0.0)
        rest = _fold(rows, m, d, e)
        if rest is None:
            return None
        m += np.log1p(rest, rest)
        # Near 0 the two cancel, and every error counts.
        if not np.minimum.reduce(np.abs(m, rest), None) >= 1.0:
            return None
    return m.reshape(x.shape[:-1]) if x.ndim > 1 else m[0, 0]


def cross_entropy(x: Any, labels: Any, axis: Any, *options: Any) -> Any:
    """Return the reduced loss."""
    found = _losses(x, labels, axis, *options, with_grad=False)
    return None if found is None else found[0]


def cross_entropy_value_and_grad(x: Any, labels: Any, axis: Any, *options: Any) -> Any:
    """Return the reduced loss and its gradient."""
    return _losses(x, labels, axis, *options, with_grad=True)


def _losses(
    x: Any,
    labels: Any,
    axis: Any,
    weight: Any,
    ignore_index: Any,
    label_smoothing: Any,
    z_loss: Any,
    softcap: Any,
    where: Any,
    reduction: Any,
    check_labels: Any,
    *,
    with_grad: bool,
) -> Any:
    rows = _rows(x, axis)
    if (
        rows is None
        or type(labels) is not np.ndarray
        or labels.shape != x.shape[:-1]
        or labels.dtype not in _UNSIGNED
        or not (weight is ignore_index is softcap is where is None)
        or not (type(label_smoothing) is type(z_loss) is float)
        or label_smoothing != 0.0
        or z_loss != 0.0
        or reduction not in ("mean", "sum", "none")
    ):
        return None
    n, c = rows.shape
    if np.maximum.reduce(labels.view(_UNSIGNED[labels.dtype]), None) >= c:
        return None
    with np.errstate(all="ignore"):
        at, m = _maxima(rows)
        d = rows - m
        e = np.exp(d)
        e.put(at, 0.0)
        rest = _fold(rows, m, d, e)
        if rest is None:
            return None
        label = labels.reshape(-1) + np.arange(0, n * c, c)
        # The label's difference is the loss but for the normaliser: (max - x_label) + log1p(rest).
        loss = np.log1p(rest).reshape(-1)
        loss -= d.take(label)
        if reduction == "none":
            loss = loss.reshape(labels.shape) if labels.ndim else loss[0]
        else:
            loss = np.add.reduce(loss)
            if reduction == "mean":
                loss = loss / n
        if not with_grad:
            return loss, None
        e.put(at, 1.0)
        rest = rest.reshape(-1)
        # At the label of a confident row exp - 1 is an exact 0: minus the rest, digits and all.
        at_label = e.take(label)
        at_label -= 1.0
        at_label -= rest
        rest += 1.0
        factor = np.divide(1.0 / n if reduction == "mean" else 1.0, rest, rest)
        np.multiply(e, factor.reshape(n, 1), e)
        at_label *= factor
        e.put(label, at_label)
    return loss, e.reshape(x.shape)


SHORTCUTS = {
    "softmax": softmax,
    "log_softmax": log_softmax,
    "logsumexp": logsumexp,
    "cross_entropy": cross_entropy,
    "cross_entropy_value_and_grad": cross_entropy_value_and_grad,
}
