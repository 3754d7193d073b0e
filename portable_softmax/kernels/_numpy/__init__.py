"""NumPy in tiles: every pass but the first finds its tile in cache, on several threads.

The portable mathematics walks an array once for each operation, which is fine in cache and slow
in memory. `_layout` cuts an array into tiles, `_rows`, `_vjps` and `_losses` work on them in place
with `_maths`, in scratch that is made once a thread. `_small` has the shortcuts for small arrays,
and `_general` runs the portable functions on tiles for the rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from portable_softmax.kernels._calls import Call, LossCall, RowsCall, VjpCall
from portable_softmax.kernels._numpy import _general, _losses, _rows, _small, _vjps
from portable_softmax.kernels._numpy._layout import Layout, layout

# What takes a small array before the call is even checked: (its type, operation) -> function.
SHORTCUTS = {(np.ndarray, name): function for name, function in _small.SHORTCUTS.items()}

# From here on tiles of a vector-Jacobian product win, measured on rows of 1000:
# timeit softmax_vjp with and without kernels.portable().
_VJP_BYTES = 1 << 23


def missing() -> str:
    """Return what has to be installed: nothing."""
    return ""


def refusal(call: Call) -> str:
    """Return why a call is not for tiles."""
    if not getattr(call, "axes", True):
        return "no axis to reduce"
    if isinstance(call, VjpCall):
        both = _both(call)
        if both is None:
            return "not two blocks in memory with the axes together"
        # Three passes cost less than a transpose of two arrays.
        if call.x.nbytes < _VJP_BYTES or both[0].axis == 0:
            return "small, or not in long rows"
    return ""


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


def softmax_vjp(call: VjpCall) -> Any:
    """y * (dy - sum(y * dy))."""
    return _vjps.softmax_vjp(call, *(_both(call) or ()))


def log_softmax_vjp(call: VjpCall) -> Any:
    """dy - exp(log_y) * sum(dy)."""
    return _vjps.log_softmax_vjp(call, *(_both(call) or ()))


def _both(call: VjpCall) -> tuple[Layout, Layout] | None:
    """Return how the output and the upstream gradient are cut: alike, since their shapes are."""
    x = layout(call.x, call.axes, call.compute)
    dy = layout(call.dy, call.axes, call.compute)
    return None if x is None or dy is None else (x, dy)


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
