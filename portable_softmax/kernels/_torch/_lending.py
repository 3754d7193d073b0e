"""The memory of CPU tensors as NumPy's arrays, and back, without a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from portable_softmax import libraries
from portable_softmax._typing import Tensor
from portable_softmax.kernels import _threads
from portable_softmax.kernels._request import Request

NUMPY = libraries.BY_TYPE[np.ndarray]

try:
    import ml_dtypes

    _BFLOAT16: Any = np.dtype(ml_dtypes.bfloat16)
except ImportError:
    _BFLOAT16 = None

COMPUTE_DTYPE = {
    "float16": np.dtype(np.float32),
    "bfloat16": np.dtype(np.float32),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


def declines(engine: Any, request: Request, asked: bool) -> str:
    """Return why a kernel on NumPy's arrays leaves a call to the next one."""
    if request.dtype == "bfloat16" and _BFLOAT16 is None:
        return "ml_dtypes, which has NumPy's bfloat16, is not installed"
    if request.operation in engine.ANY_LAYOUT:
        return ""
    if request.tracing:  # what is traced has no memory to lend
        given = [request.x] if request.dy is None else [request.x, request.dy]
        if not all(t.is_contiguous() for t in given):
            return "not in C order"
        why = engine.declines_options(request)
        return str(why or engine.declines_shape(request.x.shape, request.axes))
    return str(engine.declines(on_numpy(request), asked))


def lent(tensor: Tensor) -> Any:
    """Return a tensor's memory as an array; bfloat16 is that of ml_dtypes."""
    if tensor.dtype is torch.bfloat16:
        return tensor.detach().view(torch.int16).numpy().view(_BFLOAT16)
    return tensor.numpy(force=True) if tensor.requires_grad else tensor.numpy()


def taken(array: Any, dtype: Any) -> Tensor:
    """Return an array, or a scalar of NumPy's, as a tensor of `dtype` on the same memory."""
    if type(array) is not np.ndarray:
        array = np.asarray(array)
    if dtype is torch.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(dtype)
    return torch.from_numpy(array)


def computed(request: Request, function: Callable[..., Any], *args: Any) -> Any:
    """Return what a kernel on NumPy's arrays answers, in the threads of the tensors' library."""
    return _threads.on_team(request.library.team, NUMPY.quietly, function, *args)


def on_numpy(request: Request) -> Request:
    """Return the same call on the tensors' memory."""
    x, dy, labels = lent(request.x), request.dy, request.labels
    options = request.options
    if request.active:
        options = type(options)(*[lent(o) if isinstance(o, torch.Tensor) else o for o in options])
        if options.dtype is not None:  # no kernel takes another
            options = options._replace(dtype=COMPUTE_DTYPE[request.dtype])
    return Request(
        request.operation, NUMPY, x, request.dtype, request.axes, COMPUTE_DTYPE[request.dtype],
        x.dtype, "", options, request.active, None if dy is None else lent(dy),
        None if labels is None else lent(labels), request.indices, request.check_labels,
        None if request.out is None else lent(request.out),
    )  # fmt: skip
