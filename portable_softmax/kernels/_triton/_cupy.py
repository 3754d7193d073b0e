"""CuPy's arrays as kernels take them: on the array's device, on CuPy's current stream.

Triton asks torch for the current stream, or takes the default one where there is no torch: neither
is CuPy's. So a kernel is compiled first, as a launch would, and then launched on the stream by
name. This has not run on a device yet; the tests follow it with stand-ins for both libraries.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def cupy() -> Any:
    """Return the module, which somebody has imported to make the array."""
    return sys.modules["cupy"]


def missing() -> str:
    """Return why Triton finds no device here; empty if it does."""
    torch = sys.modules.get("torch")
    if torch is not None and not torch.cuda.is_available():
        return "Triton asks torch for the device, and the torch in this process has none"
    return ""


class Pointer:
    """As much of an array as Triton looks at: where it is, and its dtype."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.dtype = array.dtype

    def data_ptr(self) -> int:
        """Return the address of the first element."""
        return int(self.array.data.ptr)


def strides(x: Any) -> tuple[int, ...]:
    """Return strides in elements."""
    return tuple(s // x.itemsize for s in x.strides)


def bare(x: Any) -> Any:
    """Return the array: it has no history."""
    return x


def contiguous(x: Any) -> Any:
    """Return the array in C order, a copy on its device if it is not."""
    with x.device:
        return cupy().ascontiguousarray(x)


def broadcast(x: Any, shape: tuple[int, ...]) -> Any:
    """Return a view of `shape`."""
    return cupy().broadcast_to(x, shape)


def empty_like(x: Any, dtype: Any) -> Any:
    """Return a new array on the device of `x`, with its shape and the order of its axes."""
    with x.device:  # else CuPy makes it on the current one
        return cupy().empty_like(x, dtype=dtype)


def empty(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """Return a new array on the device of another."""
    with like.device:
        return cupy().empty(shape, dtype=dtype)


def zeros(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """Return a new array of zeros on the device of another."""
    with like.device:
        return cupy().zeros(shape, dtype=dtype)


def signature(x: Any) -> tuple[Any, ...]:
    """Return all that tells two arrays apart for a launch: what their memory looks like."""
    return x.shape, x.strides, x.dtype, x.device.id, x.data.ptr % 16 == 0


def launcher(
    kernel: Any, grid: tuple[int, int, int], arrays: tuple[Any, ...], numbers: dict[str, Any],
    options: dict[str, Any],
) -> Callable[[tuple[Any, ...], dict[str, Any]], None]:  # fmt: skip
    """Return what launches a kernel on arrays like these, on their device and CuPy's stream."""
    device, stream_of = arrays[0].device, cupy().cuda.get_current_stream
    with device:
        pointers = map(Pointer, arrays)
        compiled = kernel.run(*pointers, grid=grid, warmup=True, **numbers, **options)
        run = compiled[grid]

    def launch(arrays: tuple[Any, ...], scalars: dict[str, Any]) -> None:
        rest = {**numbers, **scalars}.values()  # in the order of `numbers`
        with device:
            run(*map(Pointer, arrays), *rest, stream=stream_of().ptr)

    return launch
