"""Triton kernels for CUDA tensors of torch and arrays of CuPy; one reading, one writing pass.

This file is what the table asks; the kernels are compiled when one is first used. With
TRITON_INTERPRET=1, set before triton is imported, Triton runs them with NumPy on torch's CPU
tensors: that is how they are tested. They have been compiled for three generations of devices,
and have not run on one.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from portable_softmax import _arrays
from portable_softmax.kernels._calls import Call, LossCall, RowsCall, VjpCall

DTYPES = frozenset({"float16", "bfloat16", "float32", "float64"})


def missing() -> str:
    """Return what has to be installed."""
    return "" if find_spec("triton") else "triton is not installed: pip install triton"


def refusal(call: Call) -> str:
    """Return why a call is not for these kernels."""
    return (
        _wrong_device(call.x)
        or _wrong_dtype(call)
        or _wrong_axes(call)
        or _wrong_options(call)
        or _differentiated(call)
    )


def _wrong_device(x: Any) -> str:
    device = getattr(x.device, "type", "cuda")  # CuPy has no other devices
    if device == "cuda" or (device == "cpu" and interpreted()):
        return ""
    return f"the tensor is on {device}, not on a CUDA device"


def interpreted() -> bool:
    """Return whether Triton interprets its kernels."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def _wrong_dtype(call: Call) -> str:
    for array in (call.x, getattr(call, "dy", call.x)):
        name = _arrays.dtype_name(array.dtype)
        if name not in DTYPES:
            return f"dtype {name}"
    return ""


def _wrong_axes(call: Call) -> str:
    from portable_softmax.kernels._triton._layout import refusal

    axes = (call.axis,) if isinstance(call, LossCall) else call.axes
    shape = call.x.shape
    if not axes or any(shape[a] == 0 for a in axes):
        return "no axis to reduce"
    if 0 in shape:
        return "no rows"
    return refusal(shape, axes)


# The smallest normal number: below it, dividing by a temperature would overflow or lose digits.
_SMALLEST = {"float32": 2.0**-126, "float64": 2.0**-1022}
_LARGEST = {"float32": 3.4e38, "float64": 1.7e308}


def _wrong_options(call: Call) -> str:
    if isinstance(call, RowsCall):
        name = _arrays.dtype_name(call.compute)
        if not _SMALLEST[name] <= call.temperature <= _LARGEST[name]:
            return f"a temperature of {call.temperature} leaves the range of {name}"
    return ""


def _differentiated(call: Call) -> str:
    arrays = [call.x, getattr(call, "dy", None)]
    if isinstance(call, LossCall):
        arrays += [call.labels, call.options.weight]
    if any(getattr(a, "requires_grad", False) for a in arrays):
        return "it takes a derivative"
    return ""


def softmax(call: RowsCall) -> Any:
    """Softmax over the axes."""
    from portable_softmax.kernels._triton._launch import forward

    return forward(call)


def log_softmax(call: RowsCall) -> Any:
    """log_softmax over the axes."""
    from portable_softmax.kernels._triton._launch import forward

    return forward(call)


def logsumexp(call: RowsCall) -> Any:
    """Logsumexp over the axes, kept with length 1."""
    from portable_softmax.kernels._triton._launch import forward

    return forward(call)


def softmax_vjp(call: VjpCall) -> Any:
    """Pull dy back through a softmax."""
    from portable_softmax.kernels._triton._launch import pull_back

    return pull_back(call)


def log_softmax_vjp(call: VjpCall) -> Any:
    """Pull dy back through a log_softmax."""
    from portable_softmax.kernels._triton._launch import pull_back

    return pull_back(call)


def cross_entropy(call: LossCall) -> Any:
    """Return the reduced loss."""
    from portable_softmax.kernels._triton import _launch

    return _launch.cross_entropy(call, gradient=False)[0]


def cross_entropy_value_and_grad(call: LossCall) -> tuple[Any, Any]:
    """Return the reduced loss and its gradient."""
    from portable_softmax.kernels._triton import _launch

    return _launch.cross_entropy(call, gradient=True)
