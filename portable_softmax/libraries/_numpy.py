"""NumPy: a namespace of the standard itself, whose warnings are silenced and longdouble known."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from portable_softmax.libraries._library import RUNNING_SUM, Library, dtype_name

# What `numpy.errstate` sets and sets back, at a third of its cost: for a small array that is a
# twelfth of a whole call. The names are private, and without them errstate does it.
PRIVATE = ("_extobj_contextvar", "_make_extobj")


def _quiet_by_errstate(function: Callable[..., Any], *args: Any) -> Any:
    with np.errstate(all="ignore"):
        return function(*args)


def _quiet_by(config: Any) -> Callable[..., Any]:
    if not all(hasattr(config, name) for name in PRIVATE):
        return _quiet_by_errstate
    variable, ignoring = config._extobj_contextvar, config._make_extobj(all="ignore")

    def quietly(function: Callable[..., Any], *args: Any) -> Any:
        token = variable.set(ignoring)
        try:
            return function(*args)
        finally:
            variable.reset(token)

    return quietly


quietly = _quiet_by(sys.modules.get("numpy._core._ufunc_config"))

# What `add_product` multiplies at once: enough for a product to run at full speed, and small beside
# the product as a whole.
_BLOCK_BYTES = 1 << 23

_FLOAT, _INT = np.dtype(np.float64), np.dtype(np.int64)


class NumPy(Library):
    """NumPy 2 is a namespace of the standard itself: array_api_compat.numpy is slow to import."""

    gathers = True
    writes = True
    numpy_dtypes = True
    only_device = "cpu"
    small = 1 << 13

    def unwritable(self, out: Any, *inputs: Any) -> str:
        """Return why `out` cannot be written: it is read-only, or repeats itself."""
        return super().unwritable(out) if out.flags.writeable else "it is read-only; pass a copy"

    def may_share_memory(self, x: Any, y: Any) -> bool:
        """Return whether the bounds of their memory overlap."""
        return np.may_share_memory(x, y)

    def same_entries(self, x: Any, y: Any) -> bool:
        """Return whether address, dtype and strides are the same, of arrays of one shape."""
        here, there = (a.__array_interface__["data"][0] for a in (x, y))
        return bool(here == there and x.dtype == y.dtype and x.strides == y.strides)

    def strides(self, x: Any) -> Any:
        """Return the strides, None in C order."""
        return None if x.flags.c_contiguous else x.strides

    def copy(self, x: Any) -> Any:
        """Return a copy in C order."""
        return x.copy()

    def size(self, x: Any) -> int:
        """Return the number of elements."""
        size: int = x.size
        return size

    def _name(self, dtype: Any) -> str:
        dtype = np.dtype(dtype)
        if dtype.kind == "f" and dtype.itemsize > 8:  # its name depends on the platform
            return "longdouble"
        return dtype_name(dtype) if dtype.isnative else dtype_name(dtype) + " byteswapped"

    def default_float(self, x: Any) -> Any:
        """Return float64."""
        return _FLOAT

    def default_int(self, x: Any) -> Any:
        """Return int64."""
        return _INT

    def has_float64(self, x: Any) -> bool:
        """Return True."""
        return True

    def cast(self, x: Any, dtype: Any) -> Any:
        """Return `x` in `dtype`; NumPy 2.0's astype takes no scalars, which its reductions give."""
        return x if x.dtype == dtype else x.astype(dtype)

    def scalar_if_0d(self, y: Any) -> Any:
        """Return `y`, as a scalar if it is 0-d."""
        return y[()] if y.ndim == 0 else y

    def squeeze(self, x: Any, axes: tuple[int, ...]) -> Any:
        """Return `x` without these axes, by the method, which costs a third of the function."""
        return x.squeeze(axes)

    def put_along_axis(self, x: Any, index: Any, values: Any, axis: int) -> Any:
        """Write to `x`."""
        np.put_along_axis(x, index, values, axis)
        return x

    def product(self, a: Any, b: Any, out: Any = None) -> Any:
        """Return a @ b, in `out`."""
        return np.matmul(a, b, out=out)

    def add_product(self, so_far: Any, a: Any, b: Any) -> Any:
        """Add a @ b in place, in blocks of rows: NumPy's product replaces what it writes to."""
        step = max(1, _BLOCK_BYTES // max(so_far[:1].nbytes, 1))
        block = np.empty((min(step, len(so_far)), so_far.shape[1]), so_far.dtype)
        for i in range(0, len(so_far), step):
            part = so_far[i : i + step]
            part += np.matmul(a[i : i + step], b, out=block[: len(part)])
        return so_far

    def longest_sum(self, x: Any, axis: int) -> float:
        """Return no bound for the innermost axis in memory: NumPy sums pairwise there alone."""
        stride = abs(x.strides[axis])
        innermost = stride > 0 and all(
            stride < abs(other)
            for a, (other, n) in enumerate(zip(x.strides, x.shape, strict=True))
            if a != axis and n > 1
        )
        return math.inf if innermost else RUNNING_SUM

    def reads_values(self, x: Any) -> bool:
        """Return True."""
        return True

    def looks_again(self, x: Any) -> bool:
        """Return True."""
        return True

    def tracing(self, *arrays: Any) -> str:
        """Return the empty string: nothing follows NumPy's arrays."""
        return ""

    quietly = staticmethod(quietly)
    """Call a function without NumPy's warnings; the user's ``seterr`` stays as it is."""
