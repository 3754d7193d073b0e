"""Small arrays in C order, last axis, no options: straight to a kernel that is loaded already.

Each function takes what the public one takes and answers None for every call that it leaves to the
usual way; that way gives the same bits, and raises what there is to raise. None of NumPy's
functions runs on the values, so nothing can warn.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from portable_softmax.kernels._numba import _entries, _lanes
from portable_softmax.kernels._numba._drive import LANES, SHORT
from portable_softmax.kernels._shortcuts import SHORTCUTS

# Larger ones do not notice the checks of the usual way.
MOST = 1 << 15

# The dtypes whose kernels are loaded, by operation.
ready: dict[str, set[Any]] = {}


def register(operation: str, dtype: Any) -> None:
    """Take small arrays of a dtype from now on: its kernel is loaded."""
    if operation in _FUNCTIONS and dtype in (np.float32, np.float64):
        ready.setdefault(operation, set()).add(dtype)
        SHORTCUTS[np.ndarray, operation] = _FUNCTIONS[operation]


def _tile(rows: int, n: int, dtype: Any, tiles: int = 1) -> tuple[Any, int]:
    """Return scratch memory and how many rows lie side by side in it, as `_drive.plan` does."""
    if n * dtype.itemsize >= SHORT:
        return np.empty(1, dtype), 0
    T = LANES if rows > LANES - 16 else (rows + 15) // 16 * 16
    return np.empty(T * (n + _lanes.LANE_NUMBERS) * tiles, dtype), T


def _fits(x: Any, operation: str) -> bool:
    return x.dtype in ready[operation] and x.ndim == 2 and x.flags.carray and 0 < x.size <= MOST


def softmax(x: Any, axis: Any, temperature: Any) -> Any:
    """As the public function, or None."""
    return _row_by_row(_entries.softmax, "softmax", x, axis, temperature)


def log_softmax(x: Any, axis: Any, temperature: Any) -> Any:
    """As the public function, or None."""
    return _row_by_row(_entries.log_softmax, "log_softmax", x, axis, temperature)


def _row_by_row(entry: Any, operation: str, x: Any, axis: Any, temperature: Any) -> Any:
    if not (
        type(axis) is int
        and (axis == -1 or axis == 1)
        and type(temperature) is float
        and temperature == 1.0
        and _fits(x, operation)
    ):
        return None
    rows, n = x.shape
    out = np.empty_like(x)
    tile, T = _tile(rows, n, x.dtype, 2)
    entry(x, out, 1, tile, T, n, 1, 0, rows)
    return out


def logsumexp(x: Any, axis: Any, keepdims: Any) -> Any:
    """As the public function, or None."""
    if not (
        type(axis) is int
        and (axis == -1 or axis == 1)
        and keepdims is False
        and _fits(x, "logsumexp")
    ):
        return None
    rows, n = x.shape
    out = np.empty(rows, x.dtype)
    tile, T = _tile(rows, n, x.dtype)
    _entries.logsumexp(x, out, tile, T, n, 1, 0, rows)
    return out


_ONE = {np.dtype(t): np.ones(1, t) for t in (np.float32, np.float64)}
_PLAIN = np.asarray([0.0, 0.0, 1.0, 1.0])
_scaled: dict[int, Any] = {}


def _loss(entry: Any, operation: str, gradient: bool) -> Any:
    def function(
        x: Any, labels: Any, axis: Any, weight: Any, ignore_index: Any, label_smoothing: Any,
        z_loss: Any, softcap: Any, where: Any, reduction: Any, check_labels: Any,
    ) -> Any:  # fmt: skip
        """As the public function, or None."""
        if not (
            weight is None
            and ignore_index is None
            and softcap is None
            and where is None
            and type(axis) is int
            and (axis == -1 or axis == 1)
            and type(label_smoothing) is float
            and label_smoothing == 0.0
            and type(z_loss) is float
            and z_loss == 0.0
            and type(reduction) is str
            and type(labels) is np.ndarray
            and labels.dtype == np.int64
            and labels.ndim == 1
            and labels.flags.carray
            and _fits(x, operation)
        ):
            return None
        rows, n = x.shape
        if labels.shape[0] != rows:
            return None
        dtype = x.dtype
        each, flags, options = _ONE[dtype], 0, _PLAIN
        if reduction == "none":
            each, flags = np.empty(rows, dtype), 4
        elif reduction == "mean":
            options = _mean_of(rows) if gradient else _PLAIN
        elif reduction != "sum":
            return None
        tile, T = _tile(rows, n, dtype, 1 + gradient)
        numbers = tile, T, n, 1, 0, rows
        if gradient:
            grad = np.empty_like(x)
            loss, _, wrong = entry(x, labels, each, _ONE[dtype], options, flags, 0, grad, *numbers)
        else:
            loss, _, wrong = entry(x, labels, each, _ONE[dtype], options, flags, 0, *numbers)
        if wrong:
            return None
        if flags == 0:
            each = dtype.type(loss / rows if reduction == "mean" else loss)
        return (each, grad) if gradient else each

    return function


def _mean_of(rows: int) -> Any:
    """Return the options of a mean's gradient."""
    found = _scaled.get(rows)
    if found is None:
        if len(_scaled) > 1000:
            _scaled.clear()
        found = _scaled[rows] = np.asarray([0.0, 0.0, 1.0, 1.0 / rows])
    return found


_FUNCTIONS = {
    "softmax": softmax,
    "log_softmax": log_softmax,
    "logsumexp": logsumexp,
    "cross_entropy": _loss(_entries.cross_entropy, "cross_entropy", False),
    "cross_entropy_value_and_grad": _loss(
        _entries.cross_entropy_value_and_grad, "cross_entropy_value_and_grad", True
    ),
}
