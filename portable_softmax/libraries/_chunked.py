"""Libraries whose arrays are lazy and cut into chunks: what a kernel per chunk asks of one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from portable_softmax.libraries._library import Library


def quietly(function: Callable[..., Any], *chunks: Any, **options: Any) -> Any:
    """Call a function in a task, where documented infinities and nans raise no warnings."""
    with np.errstate(all="ignore"):
        return function(*chunks, **options)


class Chunked(Library, ABC):
    """Chunks are NumPy's arrays, one task makes one, and a reduction merges what tasks gave."""

    lazy = chunked = True
    numpy_dtypes = True

    def has_float64(self, x: Any) -> bool:
        """Return True."""
        return True

    def chunks_along(self, x: Any, axes: Sequence[int]) -> int:
        """Return how many chunks a row along `axes` is cut into."""
        return math.prod(x.numblocks[a] for a in axes)

    @abstractmethod
    def whole(self, x: Any, axis: int = 0) -> Any:
        """Return `x` in one chunk along an axis."""

    @abstractmethod
    def aligned(self, x: Any, like: Any, axes: Sequence[int]) -> Any:
        """Return `x`, whose axes are those `axes` of `like`, cut into chunks as that is."""

    @abstractmethod
    def numbers_along(self, x: Any, axis: int) -> Any:
        """Return 0, 1, ... in chunks as those of an axis of `x`."""

    @abstractmethod
    def each_chunk(
        self,
        function: Callable[..., Any],
        out: Sequence[int],
        *given: tuple[Any, Sequence[int]],
        dtype: Any,
        ones: Sequence[int] = (),
        name: str | None = None,
    ) -> Any:
        """Return ``function(*chunks)`` of the chunks that belong together, one task for each.

        A function may return a tuple of arrays; `dtype` then holds that of each. Axes have numbers:
        `out` are those of the answer, of length 1 in each chunk if they are among `ones`, and each
        array comes with its own. Of an axis that the answer does not have a function gets its
        chunks in a list.
        """

    @abstractmethod
    def merge_chunks(
        self,
        x: Any,
        axes: Sequence[int],
        merge: Callable[[list[Any]], Any],
        *,
        take: Callable[[Any], Any] | None = None,
        finish: Callable[[Any], Any] | None = None,
        keepdims: bool = True,
        dtype: Any,
    ) -> Any:
        """Merge what each chunk of `x` holds along `axes`, a few at a time.

        ``take(chunk)`` is what is merged of a chunk, and ``finish(merged)`` is the answer.
        """

    @abstractmethod
    def of_all_chunks(
        self,
        function: Callable[..., Any],
        merge: Callable[[list[Any]], Any],
        *given: tuple[Any, Sequence[int]],
        dtype: Any,
    ) -> Any:
        """Return the merge of ``function(*chunks)`` over the chunks that belong together, a number.

        The arrays come with their axes, of which the first has all that are cut.
        """
