"""cubed: lazy, in chunks, within the memory that its Spec allows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from portable_softmax._typing import Namespace
from portable_softmax.libraries._library import Library
from portable_softmax.libraries._namespace import Adapted


class Cubed(Library):
    """What is made beside an array needs its Spec, which therefore stands for its device."""

    lazy = chunked = True
    numpy_dtypes = True

    def __init__(self, xp: Namespace, name: str) -> None:
        super().__init__(Adapted(sys.modules["cubed.array_api"], "spec"), name)

    def device(self, x: Any) -> Any:
        """Return the Spec."""
        return x.spec

    def device_type(self, x: Any) -> str:
        """Return ``"cpu"``."""
        return "cpu"

    def same_device(self, x: Any, other: Any) -> bool:
        """Return whether both have one Spec, as cubed asks for."""
        return bool(x.spec == other.spec)

    def adopt(self, labels: Any, logits: Any, axis: int) -> Any:
        """Return `labels`, cut as logits without a class are: cubed cannot cut those anew."""
        if type(labels) is not type(logits) or 0 not in logits.shape or 0 in labels.shape:
            return labels
        axes = [a for a in range(logits.ndim) if a != axis]
        if labels.shape != tuple(logits.shape[a] for a in axes):
            return labels
        return labels.rechunk(tuple(logits.chunksize[a] for a in axes))

    def alike(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return both in the same chunks, and each of these in the order of C."""
        y = y if y.chunks == x.chunks else y.rechunk(x.chunksize)
        x, y = (self._each_chunk(np.ascontiguousarray, a) for a in (x, y))
        return x, y

    def reduce_chunks(self, x: Any, axes: tuple[int, ...], function: Callable[..., Any]) -> Any:
        """Fold each chunk, then merge what chunks gave, a few at a time."""
        if 0 in x.shape:
            folded = function(np.empty(x.shape, x.dtype), axis=axes, keepdims=True)
            return self.xp.asarray(folded, device=x.spec)
        fold = partial(_quietly, function)
        if not axes:
            return self._each_chunk(partial(fold, axis=axes, keepdims=True), x)
        reduction = sys.modules["cubed.core.ops"].reduction
        return reduction(x, fold, combine_func=fold, axis=axes, dtype=x.dtype, keepdims=True)

    def of_whole_rows(
        self, x: Any, axes: tuple[int, ...], function: Callable[..., Any], number: Any
    ) -> Any:
        """Return what `function` makes of `x` and a number, in chunks that hold whole rows."""
        whole = tuple(n if a in axes else x.chunksize[a] for a, n in enumerate(x.shape))
        x = x if x.chunksize == whole or 0 in x.shape else x.rechunk(whole)
        return self._each_chunk(partial(_of_row, function, number), x)

    def _each_chunk(self, function: Callable[..., Any], x: Any) -> Any:
        return sys.modules["cubed"].map_blocks(function, x, dtype=x.dtype)


def _quietly(function: Callable[..., Any], chunk: Any, **kwargs: Any) -> Any:
    with np.errstate(all="ignore"):
        return function(chunk, **kwargs)


def _of_row(function: Callable[..., Any], number: Any, chunk: Any) -> Any:
    return _quietly(function, chunk, alpha=number)
