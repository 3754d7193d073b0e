"""ndonnx: operations are written to an ONNX graph, which something else runs."""

from __future__ import annotations

from typing import Any

from portable_softmax.libraries._library import RUNNING_SUM, Library


class Ndonnx(Library):
    """An array has a dtype and a shape, of which lengths may be open, and no values."""

    lazy = True  # of constants too: what an argument may hold decides
    only_device = "onnx"  # what runs the graph decides where

    def longest_sum(self, x: Any, axis: int) -> float:
        """Return that of a running sum: ONNX Runtime's is one, in a few lanes, along any axis."""
        return RUNNING_SUM
