"""Sums whose error does not grow with the length of the axis."""

from __future__ import annotations

from typing import Any

from portable_softmax.libraries import is_chunked, namespace, reduce_chunks
from portable_softmax._typing import Namespace

# A plain running sum of n equal terms is off by about n/16 units in the last place (measured on
# NumPy, axis 0, float32); below this length that stays under one unit.
_SHORT = 16


def total(xp: Namespace, x: Any, axes: tuple[int, ...]) -> Any:
    """Sum over `axes`, keeping them with length 1.

    Along the last axis every library already sums in blocks. Along any other axis NumPy adds row
    after row, which loses digits in long columns, so these are halved first: pairwise summation,
    with an error of log2(n) units instead of n (Higham 1993, "The accuracy of floating point
    summation").
    """
    if is_chunked(xp):
        return reduce_chunks(xp, x, axes, _total_of_a_chunk)
    for axis in axes:
        if axis != x.ndim - 1:
            x = _halved(xp, x, axis)
    return xp.sum(x, axis=axes, keepdims=True)


def _total_of_a_chunk(chunk: Any, axis: tuple[int, ...], keepdims: bool) -> Any:
    return total(namespace(chunk), chunk, axis)


def _halved(xp: Namespace, x: Any, axis: int) -> Any:
    before = (slice(None),) * axis
    n = x.shape[axis]
    while n > _SHORT:
        half = n // 2
        folded = x[(*before, slice(0, half), ...)] + x[(*before, slice(half, 2 * half), ...)]
        if n % 2:  # the odd one out joins the next round
            folded = xp.concat([folded, x[(*before, slice(n - 1, n), ...)]], axis=axis)
        x, n = folded, half + n % 2
    return x
