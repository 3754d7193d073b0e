"""The row kernels on CPU tensors of torch: on the tensor's own memory, and under autograd.

A tensor is lent to NumPy without a copy, and the kernels of NumPy arrays run on it. This module
loads nothing; `_autograd`, which needs torch, is imported when there is a tensor.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from portable_softmax import _arrays
from portable_softmax.kernels import _numba
from portable_softmax.kernels._calls import Call, LossCall, RowsCall, VjpCall

_DTYPES = {"float32": "float32", "float64": "float64", "float16": "float32", "bfloat16": "float32"}


def missing() -> str:
    """Return what has to be installed: what the kernels of NumPy arrays need."""
    return _numba.missing()


def refusal(call: Call) -> str:
    """Return why a call stays with torch's own operations."""
    tensors = [call.x, *_companions(call)]
    if any(t.device.type != "cpu" for t in tensors):
        return "not on the CPU"
    if any(reason := unusual(t) for t in tensors):
        return reason
    if _arrays.dtype_name(call.x.dtype) not in _DTYPES:
        return f"dtype: {_arrays.dtype_name(call.x.dtype)}"
    if call.x.dtype is torch().bfloat16 and _bfloat16() is None:
        return "ml_dtypes, which has NumPy's bfloat16, is not installed"
    if mode := recording():
        return mode
    if any(t.requires_grad for t in _constants(call)) and torch().is_grad_enabled():
        return "weights that require gradients"
    return _numba.refusal(on_numpy(call))


def torch() -> Any:
    """Return torch, which somebody has imported where there is a tensor."""
    return sys.modules["torch"]


def _companions(call: Call) -> list[Any]:
    if isinstance(call, VjpCall):
        return [call.dy]
    if isinstance(call, LossCall):
        return [t for t in (call.labels, call.options.weight) if t is not None]
    return []


def _constants(call: Call) -> list[Any]:
    """Return the arguments that the kernels do not differentiate by."""
    return _companions(call) if isinstance(call, LossCall) else []


def unusual(tensor: Any) -> str:
    """Return why a tensor's memory says less than the tensor; empty where it is an ordinary one."""
    t = torch()
    if type(tensor) not in (t.Tensor, t.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.layout is not t.strided:
        return f"layout {tensor.layout}"
    if t._C._functorch.is_legacy_batchedtensor(tensor):  # of autograd.grad(is_grads_batched=True)
        return "a tensor that stands for many"
    return "a lazily negated tensor" if tensor.is_neg() else ""


def recording() -> str:
    """Return which mode watches torch's operations, of which a kernel would show it none."""
    t = torch()
    if t.jit.is_tracing():
        return "torch.jit.trace"
    if t._C._len_torch_dispatch_stack():
        return "a dispatch mode of torch"
    if t.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return ""


# --------------------------------------------------------------------------- lending


def lent(tensor: Any) -> Any:
    """Return a tensor's memory as an array of NumPy; bfloat16 is that of ml_dtypes."""
    tensor = tensor.detach()
    if tensor.dtype is not torch().bfloat16:
        return tensor.numpy()
    return tensor.view(torch().int16).numpy().view(_bfloat16())


def taken(array: Any, dtype: Any) -> Any:
    """Return an array of NumPy, or one of its scalars, as a tensor on the same memory."""
    array = np.asarray(array)
    if array.dtype.name == "bfloat16":
        return torch().from_numpy(array.view(np.int16)).view(dtype)
    tensor = torch().from_numpy(array)
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


@cache
def _bfloat16() -> Any:
    try:
        return np.dtype(import_module("ml_dtypes").bfloat16)
    except ImportError:
        return None


def on_numpy(call: Any, x: Any = None) -> Any:
    """Return the same call on the tensors' memory as NumPy arrays, of the logits `x` if given."""
    x = lent(call.x if x is None else x)
    found = call._replace(xp=np, x=x, compute=np.dtype(_DTYPES[x.dtype.name]), answer=x.dtype)
    if isinstance(call, VjpCall):
        return found._replace(dy=lent(call.dy))
    if isinstance(call, RowsCall):
        return found._replace(where=None if call.where is None else lent(call.where))
    weight, where = call.options.weight, call.options.where
    return found._replace(
        labels=None if call.labels is None else lent(call.labels),
        options=call.options._replace(
            weight=None if weight is None else lent(weight),
            where=None if where is None else lent(where),
        ),
    )


# --------------------------------------------------------------------------- operations


def _autograd() -> Any:
    return import_module("portable_softmax.kernels._numba._autograd")


def softmax(call: RowsCall) -> Any:
    """Softmax over the axes."""
    return _autograd().softmax(call)


def log_softmax(call: RowsCall) -> Any:
    """log_softmax over the axes."""
    return _autograd().log_softmax(call)


def logsumexp(call: RowsCall) -> Any:
    """Logsumexp over the axes, kept with length 1."""
    return _autograd().logsumexp(call)


def softmax_vjp(call: VjpCall) -> Any:
    """y * (dy - sum(y * dy))."""
    return _autograd().vjp(call)


def log_softmax_vjp(call: VjpCall) -> Any:
    """dy - exp(log_y) * sum(dy)."""
    return _autograd().vjp(call)


def cross_entropy(call: LossCall) -> Any:
    """Return the reduced loss."""
    return _autograd().cross_entropy(call)


def cross_entropy_value_and_grad(call: LossCall) -> tuple[Any, Any]:
    """Return the reduced loss and its gradient."""
    found: tuple[Any, Any] = _autograd().cross_entropy_value_and_grad(call)
    return found
