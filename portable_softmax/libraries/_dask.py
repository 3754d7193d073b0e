"""Dask: lazy, in chunks, whose reductions merge in a tree."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from portable_softmax.libraries._library import Library, numpy_dtype


class Dask(Library):
    """It has no gather, and reads no value before compute()."""

    chunked = True

    def own_dtype(self, dtype: Any) -> Any:
        """Return whatever NumPy takes for a dtype as one."""
        return numpy_dtype(dtype)

    def device(self, x: Any) -> Any:
        """Return None: chunks are where their workers are."""
        return None

    def device_type(self, x: Any) -> str:
        """Return ``"cpu"``."""
        return "cpu"

    def same_device(self, x: Any, other: Any) -> bool:
        """Return True."""
        return True

    def reduce_chunks(self, x: Any, axes: tuple[int, ...], function: Callable[..., Any]) -> Any:
        """Fold each chunk, then merge what chunks gave in a tree."""
        reduction = sys.modules["dask.array"].reduction
        return reduction(
            x, chunk=function, aggregate=function, axis=axes, keepdims=True, dtype=x.dtype
        )

    def of_whole_rows(self, x: Any, axes: tuple[int, ...], function: Callable[[Any], Any]) -> Any:
        """Return what `function` makes of `x`, in chunks that hold whole rows."""
        cut = {axis: -1 for axis in axes if len(x.chunks[axis]) > 1}
        return (x.rechunk(cut) if cut else x).map_blocks(function, dtype=x.dtype, meta=x._meta)
