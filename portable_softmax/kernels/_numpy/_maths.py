"""The mathematics of one tile, in place: nothing of its size is made but in scratch.

A tile has two axes, that of the classes and that of the positions; `axis` is the classes' one.
What there is one of per position keeps it, with length 1.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from portable_softmax.kernels._numpy._layout import Buffers, chunks

# Longer sums over the first axis are halved: NumPy adds row after row there, which loses digits.
_FEW = 16


def maximum(x: Any, axis: int) -> Any:
    """Return the maximum over the classes."""
    if axis == 0:
        return np.maximum.reduce(x, axis=0, keepdims=True)
    # Along rows `argmax` costs a fraction of `maximum.reduce`, and finds a nan as well.
    n, c = x.shape
    at = x.argmax(axis=1)
    at += np.arange(0, n * c, c)
    return x.reshape(-1).take(at).reshape(n, 1)


def total(x: Any, axis: int, buffers: Buffers) -> Any:
    """Return the sum over the classes, pairwise: along rows NumPy does that by itself."""
    n = x.shape[axis]
    if axis == 1 or n <= _FEW:
        return np.add.reduce(x, axis=axis, keepdims=True)
    half = n // 2
    sums = np.add(x[:half], x[half : 2 * half], out=buffers.take("sums", (half, x.shape[1])))
    if n % 2:
        sums[0] += x[-1]
    while half > _FEW:
        n, half = half, half // 2
        if n % 2:
            sums[0] += sums[n - 1]
        np.add(sums[:half], sums[half : 2 * half], out=sums[:half])
    return np.add.reduce(sums[:half], axis=0, keepdims=True)


def sum_of(sums: list[Any]) -> Any:
    """Return the sum of what the chunks of a tile gave."""
    if len(sums) == 1:
        return sums[0]
    # Along the last axis, where NumPy sums pairwise.
    return np.add.reduce(np.stack(sums, axis=-1), axis=-1)


# --------------------------------------------------------------------------- the plain form


def exps(x: Any, m: Any, out: Any, axis: int, buffers: Buffers, temperature: float = 1.0) -> Any:
    """Write exp((x - m) / temperature) and return its sum."""
    sums = []
    for cut in chunks(x, axis):
        e = np.subtract(x[cut], m, out=out[cut])
        if temperature != 1.0:
            np.divide(e, temperature, out=e)
        np.exp(e, out=e)
        sums.append(total(e, axis, buffers))
    return sum_of(sums)


def differences_and_sum(x: Any, m: Any, out: Any, axis: int, buffers: Buffers) -> Any:
    """Write x - m and return the sum of its exponentials."""
    sums = []
    for cut in chunks(x, axis):
        d = np.subtract(x[cut], m, out=out[cut])
        e = np.exp(d, out=buffers.take("exps", d.shape))
        sums.append(total(e, axis, buffers))
    return sum_of(sums)


def sum_of_exps(x: Any, m: Any, axis: int, buffers: Buffers) -> Any:
    """Return the sum of exp(x - m)."""
    sums = []
    for cut in chunks(x, axis):
        part = x[cut]
        e = np.subtract(part, m, out=buffers.take("exps", part.shape))
        np.exp(e, out=e)
        sums.append(total(e, axis, buffers))
    return sum_of(sums)


def unfit(s: Any, n: int) -> Any:
    """Return the positions whose sum of `n` terms is too small for the plain form, or is nan.

    The plain form takes the logarithm of s = sum exp(x - max) as it is. From 2 on, the maximum's
    1 costs the rest, s - 1, no digits. A difference is off by half a unit in its last place, which
    is 4u below 8. What lies further off are less than n terms of less than exp(-8), each off by
    less than 8u * exp(-8): at most 1/e of a rest of n * exp(-7). So the rest is within 6u, beside
    the errors of exp and of the sum.
    """
    bound = 1.0 + max(1.0, n * math.exp(-7.0))
    if np.minimum.reduce(s, axis=None) >= bound:
        return None
    return np.flatnonzero(~(s.reshape(-1) >= bound))


def unfit_logsumexp(s: Any, value: Any, n: int) -> Any:
    """Return what `unfit` does, and the values near 0: there max + log(s) cancels."""
    size = np.abs(value)
    if np.minimum.reduce(size) >= 1.0:
        return unfit(s, n)
    np.copyto(s.reshape(-1), 0.0, where=~(size >= 1.0))
    return unfit(s, n)


# --------------------------------------------------------------------------- the precise form


def fold(x: Any, out: Any, axis: int, buffers: Buffers, temperature: float = 1.0) -> Any:
    """Return the maximum and the rest, as `portable` folds a row into its state.

    `out` takes exp(x - max), with the rounding error of the difference put back; None drops it.
    """
    m = maximum(x, axis)
    rest = _rest(x, m, out, axis, buffers, temperature, infinities=False)
    if np.isnan(rest).any():
        rest = _rest(x, m, out, axis, buffers, temperature, infinities=True)
    return m, rest


def _rest(
    x: Any, m: Any, out: Any, axis: int, buffers: Buffers, temperature: float, *, infinities: bool
) -> Any:
    rests, maxima = [], []
    for cut in chunks(x, axis):
        part = x[cut]
        d = np.subtract(part, m, out=buffers.take("differences", part.shape))
        t = buffers.take("error", part.shape)
        e = buffers.take("exps", part.shape) if out is None else out[cut]
        # Knuth's two-sum: the error is (x - (d - t)) - (m + t), with t = d - x.
        np.subtract(d, part, out=t)
        np.subtract(d, t, out=e)
        np.subtract(part, e, out=e)
        np.add(m, t, out=t)
        np.subtract(e, t, out=e)
        if temperature != 1.0:
            np.divide(d, temperature, out=d)
            np.divide(e, temperature, out=e)
        np.add(e, 1.0, out=e)
        np.exp(d, out=d)
        if infinities:
            # Beside an infinity the error is nan and its term 0.
            np.copyto(e, 0.0, where=d == 0.0)
        np.multiply(e, d, out=e)
        # Terms are at most 1, so the whole part of one says whether it is a maximum. A maximum is
        # left out of the sum, ties count.
        np.floor(e, out=t)
        maxima.append(total(t, axis, buffers))
        np.subtract(e, t, out=t)
        rests.append(total(t, axis, buffers))
    return sum_of(rests) + (sum_of(maxima) - 1.0)
