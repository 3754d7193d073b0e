"""CuPy's arrays as kernels take them: on the array's device, on CuPy's current stream.

Triton asks torch for the current stream, or takes the default one where there is no torch: neither
is CuPy's. So a kernel is compiled first, as a launch would, and then launched on the stream by
name. This has not run on a device yet; the tests follow it with stand-ins for both libraries.
"""

from __future__ import annotations

import sys
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
    """Return the array in C order, a copy if it is not."""
    return cupy().ascontiguousarray(x)


def broadcast(x: Any, shape: tuple[int, ...]) -> Any:
    """Return a view of `shape`."""
    return cupy().broadcast_to(x, shape)


def empty_like(x: Any, dtype: Any) -> Any:
    """Return a new array with the shape and the order of the axes of `x`."""
    return cupy().empty_like(x, dtype=dtype)


def empty(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """Return a new array on the device of another."""
    with like.device:
        return cupy().empty(shape, dtype=dtype)


def zeros(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """Return a new array of zeros on the device of another."""
    with like.device:
        return cupy().zeros(shape, dtype=dtype)


def run(
    kernel: Any, grid: tuple[int, ...], arrays: tuple[Any, ...], numbers: dict[str, Any]
) -> None:
    """Launch a kernel on the device of the first array and the current stream of CuPy."""
    grid = (*grid, *(1,) * (3 - len(grid)))
    pointers = tuple(map(Pointer, arrays))
    with arrays[0].device:
        compiled = kernel.run(*pointers, grid=grid, warmup=True, **numbers)
        given = {**dict(zip(kernel.arg_names, pointers, strict=False)), **numbers}
        arguments = [given[name] for name in kernel.arg_names]
        compiled[grid](*arguments, stream=cupy().cuda.get_current_stream().ptr)
