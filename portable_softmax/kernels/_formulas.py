"""The portable functions on NumPy's arrays, for small tensors: their own operations cost more.

`_decide` gives an adapter a `Formulas` in place of this module's functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from portable_softmax.kernels._request import Request

TENSORS = False  # formulas on NumPy's arrays
ANY_LAYOUT = ()


class Formulas:
    """The portable answer of a call, as each function that a kernel's module may have."""

    TENSORS, ANY_LAYOUT = TENSORS, ANY_LAYOUT

    def __init__(self, portable: Callable[[Request], Any]) -> None:
        self._portable = portable

    def __getattr__(self, operation: str) -> Callable[[Request], Any]:
        return self._portable


def missing() -> str:
    """Return what has to be installed: nothing."""
    return ""


def declines(request: Request, asked: bool) -> str:
    """Return why a call is left to the next kernel: for nothing that an array may be."""
    return ""
