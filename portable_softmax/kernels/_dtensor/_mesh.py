"""How arrays lie on the devices of a mesh, and what goes between its ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from portable_softmax import _checks, libraries, portable
from portable_softmax._typing import Tensor

Axes: TypeAlias = tuple[int, ...]
Reduce: TypeAlias = Callable[[Tensor, str], Tensor]

_REDISTRIBUTE = "redistribute it first, to Shard and Replicate"


class Place(NamedTuple):
    """Where the shards of an array are."""

    mesh: Any
    placements: tuple[Any, ...]
    shape: tuple[int, ...]  # of the whole array

    def dims(self, axes: Sequence[int]) -> Axes:
        """Return the dimensions of the mesh that cut one of these axes."""
        return tuple(i for i, p in enumerate(self.placements) if p.is_shard() and p.dim in axes)

    def part(self, axis: int) -> tuple[int, int]:
        """Return where the shard of this rank begins along an axis, and its length."""
        start, n = 0, self.shape[axis]
        coordinates = self.mesh.get_coordinate()
        for i in self.dims((axis,)):
            step = -(-n // self.mesh.size(i))  # as torch.chunk cuts
            first = min(coordinates[i] * step, n)
            start, n = start + first, min(step, n - first)
        return start, n

    def along(self, axes: Sequence[int], shape: Sequence[int]) -> Place:
        """Return the place of an array whose axes are those `axes` of this one."""
        new: list[Any] = []
        for p in self.placements:
            at = axes.index(p.dim) if p.is_shard() and p.dim in axes else None
            cut = at is not None and shape[at] == self.shape[p.dim]
            new.append(Shard(at) if cut else Replicate())
        return Place(self.mesh, tuple(new), tuple(shape))

    def partly(self, dims: Axes) -> tuple[Any, ...]:
        """Return the placements of gradients to which ranks along `dims` add their parts."""
        return tuple(Partial() if i in dims else p for i, p in enumerate(self.placements))

    def holds(self, local: Tensor, placements: Any = None) -> DTensor:
        """Return the array of which each rank holds a shard."""
        strides = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        return DTensor.from_local(
            local, self.mesh, placements or self.placements, run_check=False,
            shape=self.shape, stride=tuple(strides),
        )  # fmt: skip

    def reduce(self, dims: Axes) -> Reduce:
        """Return what all-reduces a tensor over dimensions of the mesh."""
        return partial(_all_reduced, self.mesh, dims)


def place_of(name: str, x: Any, mesh: Any = None) -> Place:
    """Return where an array is; TypeError if it is no array of shards and replicas."""
    if x.device_mesh.get_coordinate() is None:
        raise TypeError(
            f"{name} is on {x.device_mesh}, which this rank is not part of: leave it out"
        )
    if any(type(p) not in (Shard, Replicate) for p in x.placements):
        raise _checks.shards(name, x, "of which this takes Shard and Replicate", _REDISTRIBUTE)
    if mesh is not None and x.device_mesh != mesh:
        raise ValueError(
            f"{name} is on the mesh {x.device_mesh}, the first array on {mesh}: distribute both "
            "over one mesh"
        )
    place = Place(x.device_mesh, tuple(x.placements), tuple(x.shape))
    if tuple(place.part(a)[1] for a in range(x.ndim)) != tuple(shard(x).shape):
        raise _checks.shards(
            name, x, "but its shards are not cut as torch.chunk does", "use distribute_tensor"
        )
    return place


def shard(x: Any) -> Tensor:
    """Return the shard of this rank, its derivative cut off."""
    with torch.no_grad():
        return x.to_local()


def constant(name: str, x: Any, place: Place, axes: Sequence[int]) -> Tensor:
    """Return the part of an array that belongs to the shard of this rank, its derivative cut off.

    Its axes are those `axes` of the array that is at `place`.
    """
    own = place_of(name, x, place.mesh)
    there = place.along(axes, own.shape)
    with torch.no_grad():
        return x.redistribute(placements=there.placements).to_local()


def _all_reduced(mesh: Any, dims: Axes, x: Tensor, op: str) -> Tensor:
    whole = [Replicate()] * mesh.ndim
    for i in dims:
        parts = [*whole[:i], Partial(op), *whole[i + 1 :]]
        x = DTensor.from_local(x, mesh, parts, run_check=False).redistribute(placements=whole)
        x = x.to_local()
    return x


def merged(
    m: Tensor,
    rest: Tensor,
    reduce: Reduce,
    *,
    temperature: float = 1.0,
    sums: Callable[[Tensor], list[Tensor]] | None = None,
) -> tuple[Tensor, ...]:
    """Return the state of whole rows from that of a shard, and sums that are made for its maximum.

    It takes two all-reduces, of maxima and of sums. An all-reduce may not see a maximum of nan, so
    that this goes as inf, and is told from it by the sums.
    """
    library = libraries.library_of(m)
    xp, inf = library.xp, math.inf
    unordered = xp.isnan(m)
    top = reduce(xp.where(unordered, inf, m), "max")
    term, is_max = portable.toward(xp, (m, rest), top, temperature)
    infinite = top == inf
    term = xp.where(infinite, xp.where(unordered, math.nan, 0.0), term)
    more = [] if sums is None else [library.cast(s, rest.dtype) for s in sums(top)]
    term, is_max, *more = reduce(xp.stack([term, is_max, *more]), "sum")
    m = xp.where(xp.isnan(term), math.nan, top)
    return m, xp.where(infinite, math.nan, term + (is_max - 1.0)), *more
