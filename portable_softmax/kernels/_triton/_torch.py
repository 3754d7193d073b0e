"""torch's tensors as kernels take them: on the tensor's device, on its current stream."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from portable_softmax.libraries._torch import raw_stream


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


def signature(x: Any) -> tuple[Any, ...]:
    """Return all that tells two tensors apart for a launch: what their memory looks like."""
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0


def launcher(
    kernel: Any, grid: tuple[int, int, int], arrays: tuple[Any, ...], numbers: dict[str, Any],
    options: dict[str, Any],
) -> Callable[[tuple[Any, ...], dict[str, Any]], None]:  # fmt: skip
    """Return what launches a kernel on tensors like these, on their device and current stream.

    The kernel is compiled first, as a launch by Triton would, and taken by its handle from then
    on: that is several times faster than to let Triton find it anew for each call.
    """
    device = arrays[0].device
    if device.type != "cuda":  # the interpreter: a kernel is run, and nothing compiled
        return functools.partial(_interpreted, kernel, grid, numbers)
    cuda, index = torch().cuda, device.index
    stream_of = raw_stream()
    with cuda.device(device):
        compiled = kernel.run(*arrays, grid=grid, warmup=True, **numbers, **options)
        run = compiled[grid]

    def launch(arrays: tuple[Any, ...], scalars: dict[str, Any]) -> None:
        rest = {**numbers, **scalars}.values()  # in the order of `numbers`
        if cuda.current_device() == index:
            run(*arrays, *rest, stream=stream_of(index))
        else:
            with cuda.device(device):
                run(*arrays, *rest, stream=stream_of(index))

    return launch


def _interpreted(
    kernel: Any, grid: tuple[int, int, int], numbers: dict[str, Any], arrays: tuple[Any, ...],
    scalars: dict[str, Any],
) -> None:  # fmt: skip
    # The interpreter computes with NumPy, which warns of each infinity and nan.
    with np.errstate(all="ignore"):
        kernel[grid](*arrays, **{**numbers, **scalars})
