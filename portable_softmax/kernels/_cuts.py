"""NumPy's arrays in parts that stay in cache, on threads; cut where they are not reduced."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

from portable_softmax import portable
from portable_softmax.kernels import _threads

Cut: TypeAlias = tuple[slice, ...]

# Half of a common 1 MB L2 cache: smaller tiles spend more on the calls, and threads on taking turns
# between them.
TILE_BYTES = 1 << 19

# From here on, threads: below it, starting them costs more than they save.
THREADED_BYTES = 1 << 20


def on_threads(
    work: Callable[[Any], None], pieces: list[Any], nbytes: int, at_most: int = sys.maxsize
) -> None:
    """Call ``work(piece)`` for each piece of an array, on threads if that is large."""
    if nbytes < THREADED_BYTES:
        for piece in pieces:
            work(piece)
    else:
        _threads.run(work, pieces, at_most=at_most)


def on_cuts(work: Callable[[Cut], None], x: Any, axes: tuple[int, ...], compute: Any) -> None:
    """Call ``work(cut)`` for each part of an array that is reduced over some axes."""
    on_threads(work, _cuts(x, axes, compute), x.nbytes)


def _cuts(x: Any, axes: tuple[int, ...], compute: Any) -> list[Cut]:
    """Return the cuts of `x` along its longest batch axis, each of about `TILE_BYTES`."""
    batch = [a for a in range(x.ndim) if a not in axes]
    if not batch or x.size == 0:
        return [(slice(None),) * x.ndim]
    axis = max(batch, key=lambda a: x.shape[a])
    n = x.shape[axis]
    step = max(1, TILE_BYTES * n // (x.size * compute.itemsize))
    before = (slice(None),) * axis
    return [(*before, cut) for cut in portable.cuts(n, step)]
