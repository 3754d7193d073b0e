"""Triton kernels for CUDA tensors of torch and arrays of CuPy; one reading, one writing pass.

This file is what the table asks; the kernels are compiled when one is first used. With
TRITON_INTERPRET=1, set before triton is imported, Triton runs them with NumPy on torch's CPU
tensors: that is how they are tested. They have been compiled for three generations of devices,
and have not run on one.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from portable_softmax import libraries, portable
from portable_softmax.kernels._request import Request
from portable_softmax.kernels._triton import _cupy, _layout

TENSORS = True  # kernels on tensors themselves
OLDEST = (3, 7)
# A class is counted with 32 bits, in steps that must not overflow; a row's offset has 64.
MANY = 2**31 - 2**20


def missing() -> str:
    """Return what has to be installed."""
    try:
        installed = version("triton")
    except PackageNotFoundError:
        return "triton is not installed: pip install triton"
    if tuple(map(int, installed.split(".")[:2])) < OLDEST:
        return f"triton {installed} is older than {'.'.join(map(str, OLDEST))}"
    return ""


def declines(request: Request, asked: bool) -> str:
    """Return why a call is not for these kernels."""
    return _WRONG_DEVICE[request.library.name]() or _wrong_axes(request) or _out_of_range(request)


def _not_nvidia() -> str:
    return "the device is not NVIDIA's" if sys.modules["torch"].version.hip else ""


# What there may be against the devices of a library, by its name in the table.
_WRONG_DEVICE = {"cupy": _cupy.missing, "torch": _not_nvidia}


def _wrong_axes(request: Request) -> str:
    shape = request.x.shape
    classes = 1
    for a in request.axes:  # torch.compile traces no math.prod of its sizes
        classes *= shape[a]
    if classes >= MANY:
        return "too many classes for 32 bits"
    return _layout.refusal(shape, request.axes)


def _out_of_range(request: Request) -> str:
    if "softcap" not in request.active:
        return ""
    cap, most = request.options.softcap, 2.0 ** portable.ordinary(request.xp, request.compute_dtype)
    if 1 / most <= cap <= most:
        return ""
    return f"a softcap of {cap}, beyond the range of {libraries.dtype_name(request.compute_dtype)}"


# --------------------------------------------------------------------------- the operations


def _compiled() -> Any:
    return import_module("portable_softmax.kernels._triton._launch")


def softmax(request: Request) -> Any:
    """Softmax, log_softmax or logsumexp over the axes; those of the last are kept."""
    return _compiled().forward(request)


log_softmax = logsumexp = softmax


def softmax_vjp(request: Request) -> Any:
    """Pull dy back through a softmax or log_softmax."""
    return _compiled().pull_back(request)


log_softmax_vjp = softmax_vjp


def cross_entropy(request: Request) -> Any:
    """Return the reduced loss, and for cross_entropy_value_and_grad the gradient."""
    wanted = request.operation == "cross_entropy_value_and_grad"
    launch = _compiled()
    loss, grad, weights = launch.losses(request, gradient=wanted)
    value = request.library.cast(launch.reduced(request, loss, weights), request.result_dtype)
    return (value, grad) if wanted else value


cross_entropy_value_and_grad = cross_entropy


def gradient(request: Request, dy: Any) -> Any:
    """Return the gradient with respect to the logits of a tensor, for dy of the answer's shape.

    `request.x` is the output of softmax and of log_softmax, if that is of no half type, and the
    logits of all others.
    """
    launch, operation, options = _compiled(), request.operation, request.options
    if operation == "cross_entropy":
        return launch.losses(request, gradient=True, upstream=dy)[1]
    if operation == "logsumexp":
        return launch.forward(request, dy)
    where, y = options.where, request.x
    if where is not None:
        dy = request.xp.where(where, dy, 0.0)
    if operation == "log_softmax" and request.dtype in ("float16", "bfloat16"):
        y = launch.forward(request._replace(result_dtype=request.compute_dtype))
    vjp = request._replace(operation=f"{operation}_vjp", x=y, dy=dy)
    dx = launch.pull_back(vjp, masked=False)
    return dx if where is None else request.xp.where(where, dx, 0.0)
