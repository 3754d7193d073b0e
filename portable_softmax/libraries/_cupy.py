"""CuPy."""

from __future__ import annotations

from typing import Any

from portable_softmax.libraries._library import Library


class CuPy(Library):
    """On CUDA devices; reading a value waits for the device."""

    gathers = True

    def device_type(self, x: Any) -> str:
        """Return ``"cuda"``."""
        return "cuda"
