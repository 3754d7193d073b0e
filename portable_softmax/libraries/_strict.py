"""array-api-strict: the standard and nothing else, computed by NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from portable_softmax.libraries._library import RUNNING_SUM, Library, selected
from portable_softmax.libraries._numpy import quietly


class Strict(Library):
    """Its newest versions alone gather, so that it counts as one that does not."""

    def longest_sum(self, x: Any, axis: int) -> float:
        """Return that of a running sum: NumPy sums, and does not show the strides that decide."""
        return RUNNING_SUM

    def has_float64(self, x: Any) -> bool:
        """Return whether the device of `x` has it, by trying: before 2023.12 nothing tells."""
        try:
            self.xp.empty(0, dtype=self.xp.float64, device=x.device)
        except ValueError:
            return False
        return True

    def maximum(self, x: Any, y: Any) -> Any:
        """Return the greater of two entries; before 2023.12 the function is there, but raises."""
        return selected(self.xp, x >= y, x, y)

    def minimum(self, x: Any, y: Any) -> Any:
        """Return the smaller of two entries."""
        return selected(self.xp, x <= y, x, y)

    def quietly(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call ``function(*args)`` without NumPy's warnings."""
        return quietly(function, *args)
