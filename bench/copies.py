"""The copy that everything is compared with: an array read once and written once, to fresh memory.

There are several, by one thread and by as many as there are cores. The best of them in a run, of
the same array, is what the machine can do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from portable_softmax._cli.backends import Place

COPY = "copy"


class Copy(NamedTuple):
    """One way to copy an array of a place."""

    name: str
    place: Place
    call: Callable[[Any], Any]


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # not Linux


def of(around: list[Place]) -> list[Copy]:
    """Return the copies at these places: each library's own, and NumPy's by all cores."""
    found = [Copy(f"{COPY}, {place.name}", place, _own(place)) for place in around]
    by_all = f"{COPY}, {cores()} threads"
    shared = [place for place in around if place.name == "numpy" and cores() > 1]
    return found + [Copy(by_all, place, by_threads) for place in shared]


def by_threads(x: np.ndarray) -> np.ndarray:
    """Copy a block of rows a core; NumPy lets the other threads run meanwhile."""
    y = np.empty_like(x)
    n = cores()
    cuts = [len(x) * i // n for i in range(n + 1)]
    blocks = [slice(*cut) for cut in pairwise(cuts)]
    list(_pool(n).map(lambda block: np.copyto(y[block], x[block]), blocks))
    return y


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _own(place: Place) -> Callable[[Any], Any]:
    if place.name == "dask":  # its own copy shares the memory
        return lambda x: x.map_blocks(np.copy)
    return lambda x: place.xp.asarray(x, copy=True)
