"""MLX: the standard's functions without its devices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from portable_softmax._typing import Namespace
from portable_softmax.libraries._library import RUNNING_SUM, Library
from portable_softmax.libraries._namespace import Adapted

_OF_E = 5.3182377066058915e-17  # mpmath: e / mpf(math.e) - 1
_LN2_HIGH = 0.693359375  # nine bits, so that n times it is exact
_LN2_LOW = -2.1219444005469058e-4  # mpmath: log(2) - mpf(_LN2_HIGH)


class Mlx(Library):
    """Lazy, but each value can be read; memory is shared by all devices of a machine."""

    differentiates = True
    gathers = True
    looks_at_subnormals = False  # its exp takes them for 0

    def __init__(self, xp: Namespace, name: str) -> None:
        super().__init__(_Namespace(xp), name)

    def device(self, x: Any) -> Any:
        """Return None: an array is on no device, an operation is."""
        return None

    def device_type(self, x: Any) -> str:
        """Return ``"cpu"`` or ``"gpu"``, where operations run unless told otherwise."""
        return str(self.xp.default_device().type).rpartition(".")[2]

    def same_device(self, x: Any, other: Any) -> bool:
        """Return True."""
        return True

    def has_float64(self, x: Any) -> bool:
        """Return whether operations run on the CPU, which alone has it."""
        return self.device_type(x) == "cpu"

    def scalar(self, value: float, like: Any) -> Any:
        """Return a 0-d array; MLX takes no Python int beyond int64."""
        unsigned = isinstance(value, int) and value >= 2**63
        return self.xp.asarray(np.uint64(value) if unsigned else value, dtype=like.dtype)

    def default_int(self, x: Any) -> Any:
        """Return int64: that of a Python int is int32, into which labels of int64 wrap around."""
        return self.xp.int64

    def own_dtype(self, dtype: Any) -> Any:
        """Return one of MLX's own dtypes."""
        if not isinstance(dtype, self.xp.Dtype):
            raise TypeError(dtype)
        return dtype

    def longest_sum(self, x: Any, axis: int) -> float:
        """Return that of a running sum, which MLX's is along any axis."""
        return RUNNING_SUM

    def follows(self, *values: Any) -> bool:
        """Return True: an array does not tell whether `mx.grad` follows it."""
        return True

    def constant(self, x: Any) -> Any:
        """Return `x` with its derivative cut off."""
        return self.xp.stop_gradient(x)

    def reads_values(self, x: Any) -> bool:
        """Return whether the values of `x` can be computed now, which only trying shows."""
        try:
            self.xp.eval(x)
        except ValueError:  # inside of `mx.compile` or `mx.vmap`
            return False
        return True

    def tracing(self, *arrays: Any) -> str:
        """Return the empty string: to find out would compute what is still lazy."""
        return ""


class _Namespace(Adapted):
    """mlx.core, whose exp keeps the digits and whose result_type takes numbers."""

    def __init__(self, xp: Namespace) -> None:
        super().__init__(xp)
        self.bool = xp.bool_

    def result_type(self, *arrays_and_dtypes: Any) -> Any:
        """Return the dtype of the others beside a number, which has none of its own."""
        xp = self._xp
        numbers: list[Any] = []
        others: list[Any] = []
        for one in arrays_and_dtypes:
            (numbers if isinstance(one, int | float | complex) else others).append(one)
        found = xp.result_type(*others)
        if any(isinstance(a, complex) for a in numbers):
            return xp.result_type(found, xp.complex64)
        if any(isinstance(a, float) for a in numbers) and xp.issubdtype(found, xp.integer):
            raise TypeError("a float beside an integer dtype")  # as the standard has it
        return found

    def exp(self, x: Any) -> Any:
        """Return exp(x), to a unit in the last place.

        On the CPU that of MLX 0.32 is off by 60 units at -80, and computes float64 in float32.
        """
        xp = self._xp
        if x.dtype == xp.float64:
            y = xp.power(math.e, x)
            return y + y * (xp.maximum(x, -1000.0) * _OF_E)
        if x.dtype != xp.float32:
            return xp.exp(x)
        # exp(x) = 2**n exp(r), the power in two halves as either alone may overflow.
        x = xp.where(x < -104.0, xp.full((), -104.0), xp.where(x > 89.0, xp.full((), 89.0), x))
        n = xp.floor(x * (1 / math.log(2)) + 0.5)
        r = (x - n * _LN2_HIGH) - n * _LN2_LOW
        half = xp.floor(n * 0.5)
        return (1.0 + xp.expm1(r)) * xp.power(2.0, half) * xp.power(2.0, n - half)
