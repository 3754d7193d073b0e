"""The copy that all times are compared with: an array is read once and written to new memory.

There are several, by one thread and by as many as there are cores. The best of them in a run, of
the same array, is what the machine can do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from bench import places
from bench.places import Place

COPY = "copy"


class Copy(NamedTuple):
    """A way to copy an array."""

    name: str
    place: Place
    call: Callable[[Any], Any]


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # not Linux


def of(around: list[Place]) -> list[Copy]:
    """Return each library's own copy, and NumPy's copies unless everything runs on a GPU."""
    found = {place.name: _own(place) for place in around}
    if not all(map(places.is_gpu, around)):
        numpy = found["numpy"].place if "numpy" in found else places.open_backend("numpy")
        found.setdefault("numpy", _own(numpy))
        if cores() > 1:
            found["threads"] = Copy(f"{COPY}, {cores()} threads", numpy, by_threads)
    return list(found.values())


def by_threads(x: np.ndarray) -> np.ndarray:
    """Copy a block of rows on each core; NumPy releases the GIL meanwhile."""
    y = np.empty_like(x)
    n = cores()
    cuts = [len(x) * i // n for i in range(n + 1)]
    blocks = [slice(*cut) for cut in pairwise(cuts)]
    list(_pool(n).map(lambda block: np.copyto(y[block], x[block]), blocks))
    return y


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _own(place: Place) -> Copy:
    return Copy(f"{COPY}, {place.name}", place, partial(places.copy, place))
