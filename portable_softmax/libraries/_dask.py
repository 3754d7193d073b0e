"""Dask: lazy, in chunks, whose reductions merge in a tree."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from portable_softmax.libraries._chunked import Chunked, quietly


class Dask(Chunked):
    """It has no gather, and reads no value before compute()."""

    only_device = "cpu"  # chunks are where their workers are
    made_of_arrays = True

    def made_of(self, x: Any) -> type:
        """Return the class of the chunks."""
        return type(x._meta)

    def adopt(self, labels: Any, logits: Any, axis: int) -> Any:
        """Return `labels`, those of NumPy in chunks as the logits have."""
        if type(labels) is not np.ndarray:
            return labels
        whole = labels.ndim == logits.ndim
        chunks = tuple(c for a, c in enumerate(logits.chunks) if whole or a != axis)
        fits = tuple(map(sum, chunks)) == labels.shape
        return self.xp.from_array(labels, chunks=chunks if fits else -1)

    def whole(self, x: Any, axis: int = 0) -> Any:
        """Return `x` in one chunk along an axis."""
        return x if x.numblocks[axis] == 1 else x.rechunk({axis: -1})

    def aligned(self, x: Any, like: Any, axes: Sequence[int]) -> Any:
        """Return `x`, whose axes are those `axes` of `like`, cut into chunks as that is."""
        new = {
            i: like.chunks[a]
            for i, a in enumerate(axes)
            # Of unknown lengths, which are nan, the chunks must correspond already.
            if x.shape[i] == like.shape[a] != 1 and x.chunks[i] != like.chunks[a]
        }
        return x.rechunk(new) if new else x

    def squeeze(self, x: Any, axes: tuple[int, ...]) -> Any:
        """Return `x` without these axes of length 1, in the tasks that made it."""
        every = range(x.ndim)
        kept = [a for a in every if a not in axes]
        return self.each_chunk(partial(_squeezed, axes), kept, (x, every), dtype=x.dtype)

    def concat(self, arrays: Sequence[Any], axis: int) -> Any:
        """Return arrays one after another along an axis; others may have an unknown length."""
        return self.xp.concat(arrays, axis=axis, allow_unknown_chunksizes=True)

    def numbers_along(self, x: Any, axis: int) -> Any:
        """Return 0, 1, ... in chunks as those of an axis of `x`."""
        return self.xp.arange(x.shape[axis], chunks=(x.chunks[axis],))

    def each_chunk(
        self,
        function: Callable[..., Any],
        out: Sequence[int],
        *given: tuple[Any, Sequence[int]],
        dtype: Any,
        ones: Sequence[int] = (),
        new: dict[int, Any] | None = None,
        name: str | None = None,
    ) -> Any:
        """Return ``function(*chunks)``; `new` axes that no array has come with their length."""
        dtype = dtype[0] if isinstance(dtype, tuple) else dtype
        like = given[-1][0]._meta.real  # to cast complex numbers to real ones would warn
        meta = sys.modules["dask.array.utils"].meta_from_array(like, ndim=len(out), dtype=dtype)
        parts = [part for array, axes in given for part in (array, tuple(axes))]
        return sys.modules["dask.array"].blockwise(
            function,
            tuple(out),
            *parts,
            dtype=dtype,
            meta=meta,
            adjust_chunks=dict.fromkeys(ones, 1),
            new_axes=new,
            token=name,
        )

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
        """Merge the chunks of `x`, whatever they hold, in a tree."""
        dtype = dtype[0] if isinstance(dtype, tuple) else dtype
        meta = sys.modules["dask.array.utils"].meta_from_array(
            x._meta, ndim=x.ndim if keepdims else x.ndim - len(axes), dtype=dtype
        )
        return sys.modules["dask.array"].reduction(
            x, chunk=partial(_taken, take), combine=partial(_merged, merge, None),
            aggregate=partial(_merged, merge, finish), axis=tuple(axes), keepdims=keepdims,
            concatenate=False, split_every=dict.fromkeys(axes, 8), dtype=dtype, meta=meta,
        )  # fmt: skip

    def of_all_chunks(
        self,
        function: Callable[..., Any],
        merge: Callable[[list[Any]], Any],
        *given: tuple[Any, Sequence[int]],
        dtype: Any,
    ) -> Any:
        """Return the merge of ``function(*chunks)`` over the chunks that belong together.

        They are small: a task has eight of them, where `reduction` begins with one.
        """
        first, axes = given[0]
        token = sys.modules["dask.base"].tokenize(function, merge, [(a.name, n) for a, n in given])
        name = f"counted-{token}"
        cells = [dict(zip(axes, index, strict=True)) for index in np.ndindex(*first.numblocks)]
        level: list[Any] = [
            [(a.name, *(cell.get(axis, 0) for axis in own)) for a, own in given] for cell in cells
        ]
        graph: dict[Any, Any] = {}
        task: tuple[Any, ...] = (_merge_of_each, function, merge)
        depth = 0
        while len(level) > 8:
            groups = [level[i : i + 8] for i in range(0, len(level), 8)]
            level = [(name, depth, i) for i in range(len(groups))]
            graph |= {key: (*task, group) for key, group in zip(level, groups, strict=True)}
            task, depth = (merge,), depth + 1
        graph[(name,)] = (*task, level)
        graphs = sys.modules["dask.highlevelgraph"].HighLevelGraph
        graph = graphs.from_collections(name, graph, dependencies=[a for a, _ in given])
        meta = sys.modules["dask.array.utils"].meta_from_array(first._meta, ndim=0, dtype=dtype)
        return sys.modules["dask.array"].Array(graph, name, (), meta=meta)

    def reduce_chunks(self, x: Any, axes: tuple[int, ...], function: Callable[..., Any]) -> Any:
        """Fold each chunk, then merge what chunks gave in a tree."""
        reduction, fold = sys.modules["dask.array"].reduction, partial(quietly, function)
        return reduction(x, chunk=fold, aggregate=fold, axis=axes, keepdims=True, dtype=x.dtype)

    def entrywise(self, function: Callable[..., Any], x: Any, *others: Any) -> Any:
        """Return ``function(x, *others)``, in one task per chunk that raises no warnings."""
        elementwise = sys.modules["dask.array"].core.elemwise
        return elementwise(partial(quietly, function), x, *others, dtype=x.dtype)

    def alike(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return both in the same chunks, and each of these as a new array lies in memory."""
        axes = tuple(range(x.ndim))
        _, both = sys.modules["dask.array"].unify_chunks(x, axes, y, axes)
        x, y = (a.map_blocks(_in_order, dtype=a.dtype, meta=a._meta) for a in both)
        return x, y

    def of_whole_rows(
        self, x: Any, axes: tuple[int, ...], function: Callable[..., Any], number: Any
    ) -> Any:
        """Return what `function` makes of `x` and a number, in chunks that hold whole rows."""
        cut = {axis: -1 for axis in axes if len(x.chunks[axis]) > 1}
        x = x.rechunk(cut) if cut else x
        return x.map_blocks(partial(quietly, function), number, dtype=x.dtype, meta=x._meta)


def _in_order(chunk: Any) -> Any:
    return chunk.reshape(-1).reshape(chunk.shape)


def _taken(take: Callable[[Any], Any] | None, chunk: Any, axis: Any, keepdims: bool) -> Any:
    return chunk if take is None else take(chunk)


def _squeezed(axes: tuple[int, ...], chunk: Any) -> Any:
    while isinstance(chunk, list):  # those along axes that the answer does not have
        (chunk,) = chunk
    return chunk.reshape([n for a, n in enumerate(chunk.shape) if a not in axes])


def _merge_of_each(function: Any, merge: Any, groups: list[list[Any]]) -> Any:
    return merge([function(*chunks) for chunks in groups])


def _merged(merge: Any, finish: Any, parts: Any, axis: Any, keepdims: bool) -> Any:
    found = merge(list(_flat(parts)))
    return found if finish is None else finish(found)


def _flat(parts: Any) -> Iterator[Any]:
    for part in parts if isinstance(parts, list) else [parts]:
        if isinstance(part, list):
            yield from _flat(part)
        else:
            yield part
