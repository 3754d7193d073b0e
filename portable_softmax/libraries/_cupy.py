"""CuPy."""

from __future__ import annotations

from typing import Any

from portable_softmax.libraries._library import Library


class CuPy(Library):
    """On CUDA devices; reading a value waits for the device."""

    gathers = True
    writes = True
    looks_at_subnormals = False  # that waits for the device
    numpy_dtypes = True

    def strides(self, x: Any) -> Any:
        """Return the strides, None in C order."""
        return None if x.flags.c_contiguous else x.strides

    def copy(self, x: Any) -> Any:
        """Return a copy in C order."""
        return x.copy()

    def product(self, a: Any, b: Any, out: Any = None) -> Any:
        """Return a @ b, in `out`."""
        return self.xp.matmul(a, b, out=out)

    def add_product(self, so_far: Any, a: Any, b: Any) -> Any:
        """Add a @ b in place."""
        so_far += self.xp.matmul(a, b)
        return so_far

    def has_float64(self, x: Any) -> bool:
        """Return True."""
        return True

    def device_type(self, x: Any) -> str:
        """Return ``"cuda"``."""
        return "cuda"
