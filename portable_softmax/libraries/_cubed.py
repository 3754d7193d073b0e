"""cubed: lazy, in chunks, within the memory that its Spec allows.

What a task gives for a chunk is stored as one array: a state has to be one there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from portable_softmax._typing import Namespace
from portable_softmax.libraries._chunked import Chunked, quietly
from portable_softmax.libraries._namespace import Adapted

# Bytes that a task needs at most beside its chunks: what is no kernel works on tiles, one per
# thread.
_SCRATCH = (12 << 20) * (os.cpu_count() or 1)


class Cubed(Chunked):
    """What is made beside an array needs its Spec, which therefore stands for its device."""

    stores_chunks = True

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

    # ----------------------------------------------------------------------- chunks

    def whole(self, x: Any, axis: int = 0) -> Any:
        """Return `x` in one chunk along an axis."""
        return self._cut(x, {axis: x.shape[axis]})

    def aligned(self, x: Any, like: Any, axes: Sequence[int]) -> Any:
        """Return `x`, whose axes are those `axes` of `like`, cut into chunks as that is."""
        return self._cut(
            x,
            {
                i: like.chunksize[a]
                for i, a in enumerate(axes)
                if x.shape[i] == like.shape[a] != 1 and x.chunks[i] != like.chunks[a]
            },
        )

    def _cut(self, x: Any, lengths: dict[int, int]) -> Any:
        new = tuple(lengths.get(a, n) for a, n in enumerate(x.chunksize))
        return x if new == x.chunksize else x.rechunk(new)

    def numbers_along(self, x: Any, axis: int) -> Any:
        """Return 0, 1, ... in chunks as those of an axis of `x`."""
        return self.xp.arange(x.shape[axis], chunks=(x.chunksize[axis],), device=x.spec)

    def each_chunk(
        self,
        function: Callable[..., Any],
        out: Sequence[int],
        *given: tuple[Any, Sequence[int]],
        dtype: Any,
        ones: Sequence[int] = (),
        name: str | None = None,
    ) -> Any:
        """Return ``function(*chunks)``.

        Several arrays have the length 1 along an axis, along which they are stored side by side.
        """
        several = Several(None, ones[0], dtype) if isinstance(dtype, tuple) else None
        # cubed 0.27 asks the first array alone whether it has axes that the answer does not have.
        order = sorted(range(len(given)), key=lambda i: set(given[i][1]) <= set(out))
        arrays = [given[i][0] for i in order]
        stored = [a.array if isinstance(a, Several) else a for a in arrays]
        lengths = dict.fromkeys(ones, 1) | ({} if several is None else {ones[0]: len(dtype)})
        opened = [a._replace(array=None) if isinstance(a, Several) else None for a in arrays]
        made = sys.modules["cubed.core.ops"].blockwise(
            partial(_of_chunks, function, order, opened, several),
            tuple(out),
            *[part for i, a in zip(order, stored, strict=True) for part in (a, tuple(given[i][1]))],
            dtype=dtype if several is None else np.result_type(*dtype),
            adjust_chunks=lengths,
            align_arrays=False,
            extra_projected_mem=min(_SCRATCH, 6 * max(a.chunkmem for a in stored)),
        )
        return made if several is None else several._replace(array=made)

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
        """Merge what each chunk of `x` holds, of length 1 along `axes`."""
        axes = tuple(axes)
        if take is not None:
            every = range((x.array if isinstance(x, Several) else x).ndim)
            taken = partial(_as_ones, len(every), take)
            x = self.each_chunk(taken, every, (x, every), dtype=dtype, ones=axes)
        alone = not isinstance(x, Several)
        several = Several(x, axes[0], (x.dtype,)) if alone else x
        stored = several.array
        found = sys.modules["cubed.core.ops"].reduction(
            stored,
            _as_it_is,
            combine_func=partial(_merged, merge, several._replace(array=None), alone),
            axis=axes,
            combine_sizes={axes[0]: len(several.dtypes)},
            dtype=stored.dtype,
            keepdims=True,
        )
        found = found if alone else several._replace(array=found)
        if finish is not None:
            every = range(stored.ndim)
            found = self.each_chunk(finish, every, (found, every), dtype=dtype, ones=axes)
        return found if keepdims else self.squeeze(found, axes)

    def of_all_chunks(
        self,
        function: Callable[..., Any],
        merge: Callable[[list[Any]], Any],
        *given: tuple[Any, Sequence[int]],
        dtype: Any,
    ) -> Any:
        """Return the merge of ``function(*chunks)`` over the chunks that belong together."""
        axes = tuple(given[0][1])
        each = partial(_as_ones, len(axes), function)
        found = self.each_chunk(each, axes, *given, dtype=dtype, ones=axes)
        every = range(len(axes))
        return (
            self.merge_chunks(found, every, merge, keepdims=False, dtype=dtype) if axes else found
        )

    def reduce_chunks(self, x: Any, axes: tuple[int, ...], function: Callable[..., Any]) -> Any:
        """Fold each chunk, then merge what chunks gave, a few at a time."""
        if 0 in x.shape:
            folded = function(np.empty(x.shape, x.dtype), axis=axes, keepdims=True)
            return self.xp.asarray(folded, device=x.spec)
        fold = partial(quietly, function)
        if not axes:
            return self._each_chunk(partial(fold, axis=axes, keepdims=True), x)
        reduction = sys.modules["cubed.core.ops"].reduction
        return reduction(x, fold, combine_func=fold, axis=axes, dtype=x.dtype, keepdims=True)

    def entrywise(self, function: Callable[..., Any], x: Any, *others: Any) -> Any:
        """Return ``function(x, *others)``, in one task per chunk that raises no warnings."""
        elementwise = sys.modules["cubed.core.ops"].elemwise
        return elementwise(partial(quietly, function), x, *others, dtype=x.dtype)

    def of_whole_rows(
        self, x: Any, axes: tuple[int, ...], function: Callable[..., Any], number: Any
    ) -> Any:
        """Return what `function` makes of `x` and a number, in chunks that hold whole rows."""
        whole = tuple(n if a in axes else x.chunksize[a] for a, n in enumerate(x.shape))
        x = x if x.chunksize == whole or 0 in x.shape else x.rechunk(whole)
        return self._each_chunk(partial(_of_row, function, number), x)

    def _each_chunk(self, function: Callable[..., Any], x: Any) -> Any:
        return sys.modules["cubed"].map_blocks(function, x, dtype=x.dtype)


# --------------------------------------------------------------------------- what a chunk holds


class Several(NamedTuple):
    """Several arrays of one shape, stored side by side along an axis where each has length 1.

    cubed stores fields of a structured dtype as an array each, and can do so once only.
    """

    array: Any
    axis: int
    dtypes: tuple[Any, ...]

    def join(self, parts: Sequence[Any]) -> Any:
        """Return what is stored of a chunk."""
        return np.concatenate(parts, axis=self.axis, dtype=np.result_type(*self.dtypes))

    def states(self, chunk: Any) -> list[tuple[Any, ...]]:
        """Return what stands in a chunk, once or several times."""
        n = len(self.dtypes)
        each = np.split(chunk, chunk.shape[self.axis], axis=self.axis)
        for i, part in enumerate(each):
            dtype = np.dtype(self.dtypes[i % n])
            each[i] = (part if dtype.kind == "c" else part.real).astype(dtype, copy=False)
        return [tuple(each[i : i + n]) for i in range(0, len(each), n)]


def _of_chunks(
    function: Callable[..., Any],
    order: Sequence[int],
    opened: Sequence[Several | None],
    several: Several | None,
    *chunks: Any,
) -> Any:
    """Call a function with chunks that come in another order."""
    given = {
        i: chunk if kind is None else kind.states(chunk)[0]
        for i, kind, chunk in zip(order, opened, chunks, strict=True)
    }
    found = function(*[given[i] for i in range(len(order))])
    return found if several is None else several.join(found)


def _as_ones(ndim: int, function: Callable[..., Any], *chunks: Any) -> Any:
    return np.reshape(function(*chunks), (1,) * ndim)


def _as_it_is(chunk: Any, axis: Any, keepdims: bool) -> Any:
    return chunk


def _merged(
    merge: Callable[[list[Any]], Any],
    several: Several,
    alone: bool,
    chunk: Any,
    axis: Any,
    keepdims: bool,
) -> Any:
    states = several.states(chunk)
    if len(states) == 1:
        return chunk
    return merge([one for (one,) in states]) if alone else several.join(merge(states))


def _of_row(function: Callable[..., Any], number: Any, chunk: Any) -> Any:
    return quietly(function, chunk, alpha=number)
