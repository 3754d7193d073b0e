"""NumPy in row tiles: every pass but the first finds its tile in cache.

The portable mathematics walks an array once for each operation, which is fine in cache and slow
in memory. So the array is cut along its longest batch axis, and each piece is worked on as a
whole. `softmax` has its passes written out in place as well; the others are the portable
functions on tiles. Bytes moved: one read of the input and one write of the output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from portable_softmax import portable
from portable_softmax._typing import Namespace

Axes = tuple[int, ...]

# Half of a common 1 MB L2 cache: a tile and the temporaries of one step fit beside each other.
TILE_BYTES = 1 << 18


def softmax(
    xp: Namespace, x: Any, axes: Axes, *, where: Any, temperature: float, compute: Any, answer: Any
) -> Any:
    """Softmax over `axes`, computed in dtype `compute` and returned in dtype `answer`."""
    if where is None and x.nbytes <= TILE_BYTES and compute == x.dtype and x.flags.c_contiguous:
        return _softmax_in_place(x, axes, temperature)
    out = np.empty(x.shape, answer)
    for cut in _tiles(x, axes, compute):
        tile = x[cut].astype(compute, order="C", copy=False)
        if where is None:
            out[cut] = _softmax_in_place(tile, axes, temperature)
        else:
            out[cut] = portable.softmax(xp, tile, axes, where=where[cut], temperature=temperature)
    return out


def _softmax_in_place(x: Any, axes: Axes, temperature: float) -> Any:
    axis = axes if len(axes) > 1 else axes[0]
    # An array even where the maximum of a 1-d row is a scalar, so that `out` can be written.
    e = np.subtract(x, np.maximum.reduce(x, axis=axis, keepdims=True))
    if temperature != 1.0:
        np.divide(e, temperature, out=e)
    np.exp(e, out=e)
    # Along contiguous rows NumPy sums pairwise by itself.
    if axis == x.ndim - 1:
        s = np.add.reduce(e, axis=axis, keepdims=True)
    else:
        s = portable.total(np, e, axes)
    return np.divide(e, s, out=e)


def log_softmax(
    xp: Namespace, x: Any, axes: Axes, *, where: Any, temperature: float, compute: Any, answer: Any
) -> Any:
    """log_softmax over `axes`, computed in dtype `compute` and returned in dtype `answer`."""
    out = np.empty(x.shape, answer)
    for cut in _tiles(x, axes, compute):
        tile = x[cut].astype(compute, order="C", copy=False)
        mask = None if where is None else where[cut]
        out[cut] = portable.log_softmax(xp, tile, axes, where=mask, temperature=temperature)
    return out


def logsumexp(xp: Namespace, x: Any, axes: Axes, *, compute: Any, answer: Any) -> Any:
    """Logsumexp over `axes`, kept with length 1."""
    out = np.empty([1 if a in axes else n for a, n in enumerate(x.shape)], answer)
    for cut in _tiles(x, axes, compute):
        tile = x[cut].astype(compute, order="C", copy=False)
        out[cut] = portable.logsumexp(xp, tile, axes)[0]
    return out


def _tiles(x: Any, axes: Axes, compute: Any) -> Iterator[tuple[slice, ...]]:
    """Yield the cuts of `x` along its longest batch axis, each of about `TILE_BYTES`."""
    batch = [a for a in range(x.ndim) if a not in axes]
    if not batch or x.size == 0:
        yield (slice(None),) * x.ndim
        return
    axis = max(batch, key=lambda a: x.shape[a])
    n = x.shape[axis]
    step = max(1, TILE_BYTES * n // (x.size * compute.itemsize))
    pieces = math.ceil(n / step)
    for i in range(pieces):
        cut = slice(i * step, min((i + 1) * step, n))
        yield (*(slice(None),) * axis, cut, *(slice(None),) * (x.ndim - axis - 1))
