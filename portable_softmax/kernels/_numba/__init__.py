"""Fused row kernels in Numba: a row is read from memory once and worked on in cache.

This module loads nothing but NumPy. The kernels behind it are compiled when an array that is
large enough to be worth it first needs them, one operation and dtype at a time.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from portable_softmax.kernels._calls import Call, LossCall, RowsCall, VjpCall
from portable_softmax.kernels._numba import _support

# Smaller arrays do not wait for a kernel to be compiled: one takes a second, once.
ENOUGH = 1 << 16
# Rows across memory are copied to a tile, which has to stay small.
LONGEST_ACROSS = 1 << 14

# What the kernels read, and as what they are handed over.
HANDED: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.uint16),
    "bfloat16": np.dtype(np.int16),
}

missing = _support.missing


def refusal(call: Call) -> str:
    """Return why a call is left to the next kernel."""
    x = call.x
    name = x.dtype.name
    if why := _options(call) or _layout_refusal(call):
        return why
    if name not in HANDED or not x.dtype.isnative:
        return f"dtype: {x.dtype}"
    if x.size < ENOUGH:
        return f"{x.size:,} elements, fewer than {ENOUGH:,}"
    return _support.refusal()


def _options(call: Call) -> str:
    if isinstance(call, RowsCall) and call.where is not None:
        return "options: where"
    if isinstance(call, LossCall):
        given = [o for o in ("where", "softcap") if getattr(call.options, o) is not None]
        if given:
            return f"options: {', '.join(given)}"
        if not call.indices:
            return "labels are a distribution"
    return ""


def _layout_refusal(call: Call) -> str:
    x = call.x
    if x.size == 0:
        return "no elements"
    arrays = (x, call.dy) if isinstance(call, VjpCall) else (x,)
    if not all(a.flags.c_contiguous and a.flags.aligned for a in arrays):
        return "not in C order"
    if isinstance(call, VjpCall) and call.dy.dtype != x.dtype:
        return f"dtypes: {x.dtype} and {call.dy.dtype}"
    labels = getattr(call, "labels", None)
    if labels is not None and not labels.dtype.isnative:
        return f"dtype of labels: {labels.dtype}"
    axes = _axes(call)
    if axes[-1] - axes[0] + 1 != len(axes):
        return "axes apart from each other"
    _, n, inner = _layout(call)
    if inner > 1 and n > LONGEST_ACROSS:
        return f"{n:,} classes along an axis that is not the last"
    return ""


def _axes(call: Any) -> list[int]:
    return sorted(call.axes) if hasattr(call, "axes") else [call.axis]


def _layout(call: Any) -> tuple[int, int, int]:
    """Return the shape as (outer, n, inner); the axes are neighbours."""
    axes, shape = _axes(call), call.x.shape
    first, last = axes[0], axes[-1]
    outer = n = inner = 1
    for a, length in enumerate(shape):
        if a < first:
            outer *= length
        elif a <= last:
            n *= length
        else:
            inner *= length
    return outer, n, inner


def _compiled() -> Any:
    return import_module("portable_softmax.kernels._numba._driver")


class _Alias:
    """The memory of a read-only array, as one that may be written.

    Numba tells their types apart and would compile everything twice. The kernels write to their
    outputs alone.
    """

    def __init__(self, x: Any) -> None:
        self.owner = x
        self.__array_interface__ = {
            "shape": x.shape,
            "typestr": x.dtype.str,
            "data": (x.__array_interface__["data"][0], False),
            "version": 3,
        }


def _handed(x: Any, layout: tuple[int, int, int]) -> Any:
    """Return an array as the kernels take it."""
    outer, n, inner = layout
    x = np.asarray(x).view(HANDED[x.dtype.name])
    x = x.reshape((outer, n) if inner == 1 else (outer * n, inner))
    return x if x.flags.writeable else np.asarray(_Alias(x))


def _row_by_row(call: RowsCall) -> Any:
    """softmax or log_softmax over the axes."""
    drive, layout, x = _compiled(), _layout(call), call.x
    out = np.empty(x.shape, call.answer)
    function = getattr(drive, call.operation)
    function(_handed(x, layout), _handed(out, layout), drive.Layout(*layout), call.temperature)
    return out


softmax = log_softmax = _row_by_row


def logsumexp(call: RowsCall) -> Any:
    """Logsumexp over the axes, kept with length 1."""
    drive, layout, x = _compiled(), _layout(call), call.x
    out = np.empty([1 if a in call.axes else n for a, n in enumerate(x.shape)], call.answer)
    flat: Any = out.view(HANDED[x.dtype.name]).reshape(-1)
    drive.logsumexp(_handed(x, layout), flat, drive.Layout(*layout))
    return out


def _from_output(call: VjpCall, **options: Any) -> Any:
    """softmax_vjp or log_softmax_vjp over the axes."""
    drive, layout, x = _compiled(), _layout(call), call.x
    out = np.empty(x.shape, call.answer)
    arrays = (_handed(a, layout) for a in (x, call.dy, out))
    getattr(drive, call.operation)(*arrays, drive.Layout(*layout), **options)
    return out


softmax_vjp = log_softmax_vjp = _from_output


def gradient_of_log_softmax(call: VjpCall) -> Any:
    """As log_softmax_vjp, but a logit of -inf passes its gradient on: no mask has left it there."""
    return _from_output(call, masked=False)


def _loss(call: LossCall) -> Any:
    """Return the reduced loss; with it the gradient if that is asked for."""
    drive, layout, x, options = _compiled(), _layout(call), call.x, call.options
    labels, ignore = _labels(call)
    positions = (*x.shape[: call.axis], *x.shape[call.axis + 1 :])
    each = np.empty(positions, call.compute) if options.reduction == "none" else None
    wants_gradient = call.operation == "cross_entropy_value_and_grad"
    grad = np.empty(x.shape, call.answer) if wants_gradient else None
    loss, weights, wrong = drive.losses(
        _handed(x, layout),
        labels,
        drive.Layout(*layout),
        drive.Loss(options.weight, ignore, options.label_smoothing, options.z_loss),
        None if each is None else each.reshape(-1),
        None if grad is None else _handed(grad, layout),
        options.reduction == "mean",
    )
    if wrong and call.check_labels:
        call.target()
    if each is None:
        if options.reduction == "mean":
            loss = loss / weights if weights else np.nan
        each = np.asarray(loss, call.compute)
    return each if grad is None else (each, grad)


cross_entropy = cross_entropy_value_and_grad = _loss


def _labels(call: LossCall) -> tuple[Any, int | None]:
    """Return the labels as int64 in the order of the rows, and what is ignored among them.

    An index that their dtype cannot hold is in none of them; an unsigned label beyond int64 has
    no class, whatever it wraps around to.
    """
    labels, ignore = call.labels, call.options.ignore_index
    limits = np.iinfo(labels.dtype)
    if ignore is not None and not limits.min <= ignore <= limits.max:
        ignore = None
    if labels.dtype == np.uint64:
        n = call.x.shape[call.axis]
        beyond = labels >= n
        if ignore is not None and ignore >= n:
            beyond &= labels != ignore
            labels = np.where(labels == ignore, np.uint64(n + 1), labels)
            ignore = n + 1
        labels = np.where(beyond, np.uint64(n), labels)
    labels = np.ascontiguousarray(labels, np.int64).reshape(-1)
    return (labels if labels.flags.writeable else labels.copy()), ignore
