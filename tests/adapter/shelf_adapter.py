"""What differs between shelf and the standard: a package of its own, unknown to both sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from portable_softmax.kernels import Kernel
from portable_softmax.libraries import Library


class Shelf(Library):
    """shelf's arrays have no attribute `device`, and their sums along any axis are NumPy's."""

    only_device = "cpu"  # no function of shelf takes a device
    kernels = (
        Kernel(
            name="shelf rows",
            why="NumPy's kernels on the same memory",
            library="shelf",
            module="shelf_kernels",
            operations=("softmax",),
            dtypes=("float32", "float64"),
        ),
    )

    def longest_sum(self, x: Any, axis: int) -> float:
        """Return the length up to which a running sum keeps its digits."""
        return 16

    def quietly(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call ``function(*args)`` without NumPy's warnings."""
        with np.errstate(all="ignore"):
            return function(*args)
