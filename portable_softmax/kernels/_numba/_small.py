"""Small arrays in C order, last axis, no options: straight to a kernel that is loaded already.

Small is what one thread works on in one piece. Short rows, too, take what is loaded for longer ones
where nothing is for them; not the other way around, as blocks add up short rows only without loss.
Each function takes what the public one takes and answers None for every call that it leaves to the
usual way, which raises what there is to raise. None of NumPy's functions runs on the values, so
nothing can warn.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from portable_softmax.kernels._numba import SHORT, _on_blocks, _on_rows
from portable_softmax.kernels._numba._drive import PIECE, tile_for_rows
from portable_softmax.kernels._numba._losses import EACH
from portable_softmax.kernels._shortcuts import SHORTCUTS

# By operation and dtype: what is compiled for longer rows and for short ones, None where nothing is
# yet, each with what makes a tile for it.
ready: dict[str, dict[Any, list[Any]]] = {}


def register(operation: str, layout: str, dtype: Any) -> None:
    """Take small arrays of a dtype from now on: a kernel is loaded."""
    if operation not in FUNCTIONS or dtype not in (np.float32, np.float64):
        return
    short = layout == "blocks"
    entry = getattr(_on_blocks if short else _on_rows, operation)
    found = entry, lambda n: np.empty(tile_for_rows(short, n, dtype, True)[1], dtype)
    if short:  # of the same size for all
        _, size = tile_for_rows(True, 0, dtype, True)
        found = entry, lambda n: np.empty(size, dtype)
    ready.setdefault(operation, {}).setdefault(dtype, [None, None])[short] = found
    SHORTCUTS[np.ndarray, operation] = FUNCTIONS[operation]


def _ready(x: Any, operation: str) -> Any:
    """Return what is compiled for an array and what makes a tile; None if it takes none."""
    found = ready[operation].get(x.dtype)
    if found is None or x.ndim != 2 or not x.flags.carray or not 0 < x.nbytes < 2 * PIECE:
        return None
    rows, blocks = found
    return (x.shape[1] * x.itemsize < SHORT and blocks) or rows


def softmax(x: Any, axis: Any, temperature: Any) -> Any:
    """As the public function, or None."""
    return _row_by_row("softmax", x, axis, temperature)


def log_softmax(x: Any, axis: Any, temperature: Any) -> Any:
    """As the public function, or None."""
    return _row_by_row("log_softmax", x, axis, temperature)


def _row_by_row(operation: str, x: Any, axis: Any, temperature: Any) -> Any:
    if not (
        type(axis) is int
        and (axis == -1 or axis == 1)
        and type(temperature) is float
        and temperature == 1.0
        and (found := _ready(x, operation))
    ):
        return None
    entry, tile = found
    rows, n = x.shape
    out = np.empty_like(x)
    entry(x, out, 1, tile(n), n, 0, rows)
    return out


def logsumexp(x: Any, axis: Any, keepdims: Any) -> Any:
    """As the public function, or None."""
    if not (
        type(axis) is int
        and (axis == -1 or axis == 1)
        and keepdims is False
        and (found := _ready(x, "logsumexp"))
    ):
        return None
    entry, tile = found
    rows, n = x.shape
    out = np.empty(rows, x.dtype)
    entry(x, out, tile(n), n, 0, rows)
    return out


_ONE = {np.dtype(t): np.ones(1, t) for t in (np.float32, np.float64)}
_PLAIN = np.asarray([0.0, 0.0, 1.0, 1.0])
_scaled: dict[int, Any] = {}


def _loss(operation: str, gradient: bool) -> Any:
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
            and (found := _ready(x, operation))
        ):
            return None
        entry, tile = found
        rows, n = x.shape
        if labels.shape[0] != rows:
            return None
        dtype = x.dtype
        each, flags, options = _ONE[dtype], 0, _PLAIN
        if reduction == "none":
            each, flags = np.empty(rows, dtype), EACH
        elif reduction == "mean":
            options = _mean_of(rows) if gradient else _PLAIN
        elif reduction != "sum":
            return None
        numbers = tile(n), n, 0, rows
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


FUNCTIONS = {
    "softmax": softmax,
    "log_softmax": log_softmax,
    "logsumexp": logsumexp,
    "cross_entropy": _loss("cross_entropy", False),
    "cross_entropy_value_and_grad": _loss("cross_entropy_value_and_grad", True),
}
