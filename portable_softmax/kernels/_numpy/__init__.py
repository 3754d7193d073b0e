"""NumPy in tiles: every pass but the first finds its tile in cache, on several threads.

The portable mathematics walks an array once for each operation, which is fine in cache and slow
in memory. `_layout` cuts an array into tiles; `_rows` and `_losses` work on them in place, in
scratch that is made once a thread; `_general` runs the portable functions on tiles for the rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from portable_softmax.kernels._calls import Call, LossCall, RowsCall
from portable_softmax.kernels._numpy import _general, _losses, _rows, _small
from portable_softmax.kernels._numpy._layout import layout

# What takes a small array before the call is even checked: (its type, operation) -> function.
SHORTCUTS = {(np.ndarray, name): function for name, function in _small.SHORTCUTS.items()}


def missing() -> str:
    """Return what has to be installed: nothing."""
    return ""


def refusal(call: Call) -> str:
    """Return why a call is not for tiles: every one is that reduces something."""
    return "" if getattr(call, "axes", True) else "no axis to reduce"


def softmax(call: RowsCall) -> Any:
    """Softmax over the axes."""
    return _rowwise(call, _rows.softmax)


def log_softmax(call: RowsCall) -> Any:
    """log_softmax over the axes."""
    return _rowwise(call, _rows.log_softmax)


def logsumexp(call: RowsCall) -> Any:
    """Logsumexp over the axes, kept with length 1."""
    return _rowwise(call, _rows.logsumexp)


def _rowwise(call: RowsCall, tiled: Any) -> Any:
    found = None if call.where is not None else layout(call.x, call.axes, call.compute)
    return _general.rows(call) if found is None else tiled(call, found)


def cross_entropy(call: LossCall) -> Any:
    """Return the reduced loss."""
    return _losses_of(call)[0]


def cross_entropy_value_and_grad(call: LossCall) -> tuple[Any, Any]:
    """Return the reduced loss and its gradient."""
    return _losses_of(call)


def _losses_of(call: LossCall) -> tuple[Any, Any]:
    found = layout(call.x, (call.axis,), call.compute)
    labels = _losses.labels_of(call, found)
    if found is None or labels is None:
        return _general.losses(call)
    with_grad = call.operation == "cross_entropy_value_and_grad"
    return _losses.losses(call, found, labels, with_grad=with_grad)
