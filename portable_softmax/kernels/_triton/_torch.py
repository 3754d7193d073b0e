"""torch's tensors as kernels take them: on the tensor's device, on its current stream."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any

import numpy as np


def torch() -> Any:
    """Return the module, which somebody has imported to make the tensor."""
    return sys.modules["torch"]


def strides(x: Any) -> tuple[int, ...]:
    """Return strides in elements."""
    return tuple(x.stride())


def bare(x: Any) -> Any:
    """Return the tensor without its history, and with the signs that its memory has."""
    return x.detach().resolve_neg()


def contiguous(x: Any) -> Any:
    """Return the tensor in C order, a copy if it is not."""
    return x.contiguous()


def broadcast(x: Any, shape: tuple[int, ...]) -> Any:
    """Return a view of `shape`."""
    return x.expand(shape)


def empty_like(x: Any, dtype: Any) -> Any:
    """Return a new tensor with the shape and the order of the axes of `x`."""
    return torch().empty_like(x, dtype=dtype)


def empty(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """Return a new tensor on the device of another."""
    return torch().empty(shape, dtype=dtype, device=like.device)


def zeros(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """Return a new tensor of zeros on the device of another."""
    return torch().zeros(shape, dtype=dtype, device=like.device)


def run(
    kernel: Any, grid: tuple[int, ...], arrays: tuple[Any, ...], numbers: dict[str, Any]
) -> None:
    """Launch a kernel on the device and the current stream of the first array.

    Triton asks torch for both.
    """
    device = arrays[0].device
    context: AbstractContextManager[Any] = (
        torch().cuda.device(device)
        if device.type == "cuda"
        # The interpreter computes with NumPy, which warns of each infinity and nan.
        else np.errstate(all="ignore")
    )
    with context:
        kernel[grid](*arrays, **numbers)
