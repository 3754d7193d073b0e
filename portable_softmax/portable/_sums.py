"""Sums whose error does not grow with the length of the axis."""

from __future__ import annotations

import math
from typing import Any

from portable_softmax import libraries
from portable_softmax._typing import Namespace
from portable_softmax.libraries import namespace


def total(xp: Namespace, x: Any, axes: tuple[int, ...]) -> Any:
    """Sum over `axes`, keeping them with length 1.

    An axis along which the library adds one entry after another, or one row otherwise than the
    next, is halved first. That is pairwise summation, with an error of log2(n) units instead of n
    (Higham 1993, "The accuracy of floating point summation"). An axis whose length is not known yet
    is left to the library.
    """
    if libraries.of(xp).chunked:
        return libraries.of(xp).reduce_chunks(x, axes, _total_of_a_chunk)
    added = 1  # one after another, along the axes together
    for axis in axes:
        if libraries.of(xp).is_known(x.shape[axis]):
            longest = libraries.of(xp).longest_sum(x, axis)
            x = _halved(xp, x, axis, max(1, longest / added))
            if longest < math.inf:
                added *= max(1, x.shape[axis])
    return xp.sum(x, axis=axes, keepdims=True)


def _total_of_a_chunk(chunk: Any, axis: tuple[int, ...], keepdims: bool) -> Any:
    return total(namespace(chunk), chunk, axis)


def _halved(xp: Namespace, x: Any, axis: int, longest: float) -> Any:
    before = (slice(None),) * axis
    n = x.shape[axis]
    while n > longest:
        half = n // 2
        folded = x[(*before, slice(0, half), ...)] + x[(*before, slice(half, 2 * half), ...)]
        if n % 2:  # the odd one out joins the next round
            folded = xp.concat([folded, x[(*before, slice(n - 1, n), ...)]], axis=axis)
        x, n = folded, half + n % 2
    return x
