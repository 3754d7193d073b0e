"""ndonnx: operations are written to an ONNX graph, which something else runs."""

from __future__ import annotations

from typing import Any

from portable_softmax.libraries._library import Library


class Ndonnx(Library):
    """An array has a dtype and a shape, of which lengths may be open, and no values."""

    lazy = True

    def device(self, x: Any) -> Any:
        """Return None: what runs the graph decides."""
        return None

    def device_type(self, x: Any) -> str:
        """Return ``"onnx"``."""
        return "onnx"

    def same_device(self, x: Any, other: Any) -> bool:
        """Return True."""
        return True

    def reads_values(self, x: Any) -> bool:
        """Return False, of constants too: what an argument may hold decides."""
        return False
