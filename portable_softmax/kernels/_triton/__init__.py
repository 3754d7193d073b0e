"""Triton kernels for CUDA tensors of torch and arrays of CuPy; one reading, one writing pass.

This file is what the table asks; the kernels are compiled when one is first used. With
TRITON_INTERPRET=1, set before triton is imported, Triton runs them with NumPy on torch's CPU
tensors: that is how they are tested. They have been compiled for three generations of devices,
and have not run on one.
"""

from __future__ import annotations

import math
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from portable_softmax import libraries
from portable_softmax.kernels._calls import Call, LossCall, RowsCall, VjpCall
from portable_softmax.kernels._triton import _cupy, _layout

# As Triton reads it, when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
OLDEST = (3, 9)
# A class is counted with 32 bits, in steps that must not overflow; a row's offset has 64.
MANY = 2**31 - 2**20
# Tensors that are what their memory says; a subclass may mean something else.
TENSORS = frozenset({"Tensor", "Parameter", "FakeTensor", "FunctionalTensor"})
DTYPES = frozenset({"float16", "bfloat16", "float32", "float64"})


def missing() -> str:
    """Return what has to be installed."""
    try:
        installed = version("triton")
    except PackageNotFoundError:
        return "triton is not installed: pip install triton"
    if tuple(map(int, installed.split(".")[:2])) < OLDEST:
        # An older fma takes a Python number in float32, and the tests show what else is not right.
        return f"triton {installed} is older than {'.'.join(map(str, OLDEST))}"
    return ""


def refusal(call: Call) -> str:
    """Return why a call is not for these kernels."""
    return (
        _wrong_device(call)
        or _wrong_dtype(call)
        or _wrong_axes(call)
        or _wrong_options(call)
        or _transformed(call)
    )


def _wrong_device(call: Call) -> str:
    if libraries.library(call.xp) == "cupy":
        return _cupy.missing()
    device, torch = call.x.device.type, sys.modules["torch"]
    if not (device == "cuda" or (device == "cpu" and INTERPRETED)):
        return f"the tensor is on {device}, not on a CUDA device"
    if torch.version.hip:
        return "the device is not NVIDIA's"
    if call.x.layout != torch.strided or type(call.x).__name__ not in TENSORS:
        return "the tensor is none of plain memory"
    return ""


def _wrong_dtype(call: Call) -> str:
    for array in (call.x, getattr(call, "dy", call.x)):
        name = libraries.dtype_name(array.dtype)
        if name not in DTYPES:
            return f"dtype {name}"
    return ""


def _wrong_axes(call: Call) -> str:
    axes = (call.axis,) if isinstance(call, LossCall) else call.axes
    shape = call.x.shape
    if not axes or any(shape[a] == 0 for a in axes):
        return "no axis to reduce"
    if 0 in shape:
        return "no rows"
    classes = 1
    for a in axes:  # torch.compile traces no math.prod of its sizes
        classes *= shape[a]
    if classes >= MANY:
        return "too many classes for 32 bits"
    return _layout.refusal(shape, axes)


# The smallest normal number: below it, dividing by a temperature would overflow or lose digits.
_SMALLEST = {"float32": 2.0**-126, "float64": 2.0**-1022}
_LARGEST = {"float32": 3.4e38, "float64": 1.7e308}


def _wrong_options(call: Call) -> str:
    if isinstance(call, RowsCall):
        name = libraries.dtype_name(call.compute)
        if not _SMALLEST[name] <= call.temperature <= _LARGEST[name]:
            return f"a temperature of {call.temperature} leaves the range of {name}"
    return ""


# --------------------------------------------------------------------------- derivatives, tracing


def _transform() -> str:
    torch = sys.modules["torch"]
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a functional transform"
    if torch.autograd.forward_ad._current_level >= 0:
        return "inside forward-mode differentiation"
    return ""


# torch.compile enters a transform for real where it traces one: it takes the answer of the moment.
_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _transformed(call: Call) -> str:
    """Return why torch's transforms and derivatives leave a call to the portable path."""
    if libraries.library(call.xp) != "torch":
        return ""
    if transform := _transform():
        return transform
    if isinstance(call, LossCall) and sys.modules["torch"].is_grad_enabled():
        options = call.options
        if any(a is not None and a.requires_grad for a in (call.labels, options.weight)):
            return "it differentiates with respect to labels or weights"
        if call.x.requires_grad and call.operation == "cross_entropy_value_and_grad":
            return "it differentiates through a gradient"
    return ""


def _as_operator(call: Call) -> bool:
    """Return whether torch has to know of a call: to differentiate it, or to trace it."""
    if libraries.library(call.xp) != "torch":
        return False
    if not libraries.reads_values(call.xp, call.x):
        return True
    arrays = (call.x, getattr(call, "dy", call.x))
    return any(a.requires_grad for a in arrays) and sys.modules["torch"].is_grad_enabled()


# --------------------------------------------------------------------------- the operations


def softmax(call: RowsCall) -> Any:
    """Softmax, log_softmax or logsumexp over the axes; those of the last are kept."""
    if _as_operator(call):
        from portable_softmax.kernels._triton._operators import rows

        return rows(call.x, list(call.axes), call.where, call.temperature, call.operation)
    from portable_softmax.kernels._triton._launch import forward

    return forward(call)


log_softmax = logsumexp = softmax


def softmax_vjp(call: VjpCall) -> Any:
    """Pull dy back through a softmax or log_softmax."""
    if _as_operator(call):
        from portable_softmax.kernels._triton._operators import pull_back

        return pull_back(call.x, call.dy, list(call.axes), 1.0, call.operation)
    from portable_softmax.kernels._triton._launch import pull_back as launched

    return launched(call)


log_softmax_vjp = softmax_vjp


def cross_entropy(call: LossCall) -> Any:
    """Return the reduced loss, and for cross_entropy_value_and_grad the gradient."""
    from portable_softmax.kernels._triton._launch import losses, reduced

    wanted = call.operation == "cross_entropy_value_and_grad"
    if _as_operator(call):
        loss, grad, weights = _operator_losses(call, wanted)
        if wanted and call.options.reduction == "mean":
            divisor = loss.numel() if weights is None else weights.sum()
            if weights is not None:
                divisor = call.xp.where(divisor == 0, math.inf, divisor)
            grad = grad / divisor
    else:
        loss, grad, weights = losses(call, gradient=wanted)
    value = reduced(call, loss, weights)
    return (value, grad) if wanted else value


cross_entropy_value_and_grad = cross_entropy


def _operator_losses(call: LossCall, gradient: bool) -> tuple[Any, Any, Any]:
    from portable_softmax.kernels._triton._operators import losses

    options = call.options
    # What is traced has no labels to look at: one without a class gives nan.
    check = call.check_labels and libraries.reads_values(call.xp, call.x)
    loss, grad, weights = losses(
        call.x, call.labels, call.axis, options.weight, options.ignore_index,
        options.label_smoothing, options.z_loss, options.softcap, options.where, call.indices,
        check, gradient,
    )  # fmt: skip
    weighs = call.indices and (options.weight is not None or options.ignore_index is not None)
    return loss, grad, weights if weighs else None
