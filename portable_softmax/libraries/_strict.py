"""array-api-strict: the standard and nothing else, computed by NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from portable_softmax.libraries._library import Library
from portable_softmax.libraries._numpy import quietly


class Strict(Library):
    """Its newest versions alone gather, so that it counts as one that does not."""

    def sums_in_blocks(self, x: Any, axis: int) -> bool:
        """Return False: NumPy sums, and the strides that decide how are not shown."""
        return False

    def quietly(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call ``function(*args)`` without NumPy's warnings."""
        return quietly(function, *args)
