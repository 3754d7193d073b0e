"""The mathematics of one tile, in place: nothing of its size is made but in scratch.

A tile has two axes, that of the classes and that of the positions; `axis` is the classes' one.
What there is one of per position keeps it, with length 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from portable_softmax import portable
from portable_softmax.kernels._numpy._layout import Buffers, chunks

# Longer sums over the first axis are halved: NumPy adds row after row there, which loses digits.
_FEW = 16


def maximum(x: Any, axis: int) -> Any:
    """Return the maximum over the classes."""
    return maximum_at(x, axis)[0]


def maximum_at(x: Any, axis: int) -> tuple[Any, Any]:
    """Return the maximum over the classes and, along rows, its place in the flat tile."""
    if axis == 0:
        return np.maximum.reduce(x, axis=0, keepdims=True), None
    # Along rows `argmax` costs a fraction of `maximum.reduce`, and finds a nan as well.
    n, c = x.shape
    at = x.argmax(axis=1)
    at += np.arange(0, n * c, c)
    return x.reshape(-1).take(at).reshape(n, 1), at


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


def mended(log_y: Any, dy: Any, s: Any) -> Any:
    """Return dy - exp(log_y) * s, with the digits of 1 - exp(log_y); s is the sum of a row's dy."""
    return -dy * np.expm1(log_y) - np.exp(log_y) * (s - dy)


class Confident(NamedTuple):
    """The entries with more than about half of their row's probability: one of a row at most."""

    at: Any
    log_y: Any
    dy: Any


def confident(log_y: Any, dy: Any) -> Confident:
    """Return the confident entries."""
    flat = np.flatnonzero(np.greater(log_y, portable.LOG_CONFIDENT, order="C"))
    at = np.unravel_index(flat, log_y.shape)
    return Confident(at, log_y[at], dy[at])


def mend(dx: Any, s: Any, of: Confident) -> None:
    """Write these entries of dy - exp(log_y) * s anew."""
    if of.at[0].size:
        dx[of.at] = mended(of.log_y, of.dy, np.broadcast_to(s, dx.shape)[of.at])


class Sums:
    """The sum of what the chunks of a tile give, pairwise, with few of them kept."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, Any]] = []  # how many chunks a sum is of, falling; and the sum

    def add(self, value: Any) -> None:
        """Add what the next chunk gave."""
        of = 1
        while self._kept and self._kept[-1][0] == of:
            value = self._kept.pop()[1] + value
            of *= 2
        self._kept.append((of, value))

    def get(self) -> Any:
        """Return the sum."""
        value = self._kept.pop()[1]
        while self._kept:
            value = self._kept.pop()[1] + value
        return value


# --------------------------------------------------------------------------- the plain form


def exps(x: Any, out: Any, axis: int, buffers: Buffers, temperature: float) -> Any:
    """Write the exps of a row up to a factor, and return their sum."""
    if temperature != 1.0:
        sums = Sums()
        for d in shifted(x, out, axis, temperature):
            np.exp(d, out=d)
            sums.add(total(d, axis, buffers))
        return sums.get()
    return _exps_from(*base(maximum(x, axis)), x, out, axis, buffers)


def exps_beside(x: Any, out: Any, axis: int, buffers: Buffers, sink: Any) -> tuple[Any, Any]:
    """Return the same beside a sink, the sum with that of the sink, and its exp."""
    m = maximum(x, axis)
    b, rounds = base(np.where(sink > m, sink, m))
    s = _exps_from(b, rounds, x, out, axis, buffers)
    more = _exps_of(b, rounds, sink)
    return s + more, more


def _exps_of(b: Any, rounds: bool, x: Any) -> Any:
    out = np.empty_like(x)
    if rounds:
        write_exps(x, b, np.empty_like(x), out, np.empty_like(x))
    else:
        np.exp(x if b is None else x - b, out=out)
    return out


def _exps_from(b: Any, rounds: bool, x: Any, out: Any, axis: int, buffers: Buffers) -> Any:
    sums = Sums()
    for cut in chunks(x, axis):
        part, e = x[cut], out[cut]
        if rounds:
            lost = buffers.take("lost", part.shape)
            write_exps(part, b, buffers.take("differences", part.shape), e, lost)
        else:
            np.exp(part if b is None else np.subtract(part, b, out=e), out=e)
        sums.add(total(e, axis, buffers))
    return sums.get()


def base(m: Any) -> tuple[Any, bool]:
    """Return what to subtract from rows with the maxima m, and whether that rounds.

    Half a unit of a difference of 64 is 32 units of its exp. So nothing is subtracted where exp(x)
    is fine, which is None where no row takes any. An integer of no more than all that are below a
    negative maximum is subtracted without rounding, and so is one near a large maximum wherever the
    exp is not 0: both are within a factor of 2 (Sterbenz, 1974). From a huge maximum it is up to
    the power of 2 above `far` away, as m - far is rounded.
    """
    far, apart = RANGES[m.dtype].far, _APART[m.dtype]
    least, most = np.minimum.reduce(m, axis=None), np.maximum.reduce(m, axis=None)
    if least > -1.0 and most <= far:
        return None, False
    rounds = most > far and bool(((m > far) & (m < apart)).any())
    return np.trunc(np.minimum(m, 0.0)) + np.ceil(np.maximum(m - far, 0.0)), rounds


def write_exps(x: Any, b: Any, d: Any, out: Any, lost: Any) -> None:
    """Write exp(x - b), with what rounding x - b lost put back; `d` and `lost` are scratch.

    For the integers of `base` that is x - (d + b), without an error of its own (Dekker, 1971).
    """
    np.subtract(x, b, out=d)
    np.add(d, b, out=lost)
    np.subtract(x, lost, out=lost)
    # Where x or d is -inf it is nan or inf, and the exp is 0.
    np.fmin(lost, 1.0, out=lost)
    np.exp(d, out=out)
    np.multiply(lost, out, out=lost)
    np.add(out, lost, out=out)


def shifted(x: Any, out: Any, axis: int, temperature: float) -> Iterator[Any]:
    """Write (x - max) / temperature, and yield each chunk of it."""
    by = portable.divisor(np, temperature, x)
    first = portable.powers_of_2(np, -max(by.exponent, 0), x)  # as the difference may overflow
    then = portable.powers_of_2(np, -min(by.exponent, 0), x)
    m = maximum(x, axis)
    for factor in first:
        m = m * factor
    for cut in chunks(x, axis):
        part, d = x[cut], out[cut]
        for factor in first:
            part = np.multiply(part, factor, out=d)
        np.subtract(part, m, out=d)
        for factor in then:
            np.multiply(d, factor, out=d)
        if by.high != 1.0:
            np.divide(d, by.high, out=d)
        yield d


class Plain(NamedTuple):
    """A tile's state from exp(x), not shifted: no difference is rounded, and no pass spent on it.

    Good where exp(max) is far from overflow and underflow, and what the maximum leaves is normal.
    """

    max: Any
    rest: Any  # sum of exp(x) without one maximum, over exp(max)
    grown: Any  # exp(max)
    total: Any  # sum of exp(x)
    unfit: Any  # the positions where the plain form is not good; None if there are none


class _Range(NamedTuple):
    far: float  # exp of the power of 2 above it, times any number of classes, is finite
    tiny: float  # the sum of fewer than 1e6 terms that underflow is nothing beside this


RANGES = {
    np.dtype(t): _Range(far, float(np.finfo(t).smallest_normal) * 1e6 / float(np.finfo(t).eps))
    for t, far in ((np.float32, 48.0), (np.float64, 500.0))
}

# Half of this is so far below it that its exp is 0 beside it.
_APART = {np.dtype(np.float32): 256.0, np.dtype(np.float64): 2048.0}

SMALLEST_NORMAL = {
    np.dtype(t): float(np.finfo(t).smallest_normal) for t in (np.float32, np.float64)
}

# Below this maximum, exp(x) of a class may underflow although its probability does not.
LOW_FOR_PROBABILITIES = -1.0


def low_for_probabilities(e: Any) -> float:
    """Return the least maximum of which each exp has its digits: any, if none of `e` underflows."""
    normal = e.item(e.argmin()) >= SMALLEST_NORMAL[e.dtype]
    return -RANGES[e.dtype].far if normal else LOW_FOR_PROBABILITIES


def plain(x: Any, out: Any, axis: int, buffers: Buffers) -> Plain:
    """Fold a tile that is not written to; `out` takes exp(x), None drops it."""
    m, at = maximum_at(x, axis)
    grown = np.exp(m)
    sums, e, cuts = Sums(), None, chunks(x, axis)
    for cut in cuts:
        part = x[cut]
        e = buffers.take("exps", part.shape) if out is None else out[cut]
        np.exp(part, out=e)
        if axis == 0:
            sums.add(total(e, axis, buffers))
        else:
            sums.add(_sum_without(e, at, cut, keep=out is not None))
    s = sums.get()
    every, rest = s if axis == 0 else s + grown, s / grown
    if axis == 0:
        rest -= 1.0
        # From 1 on, the maximum's 1 costs the rest no digits.
        if not np.minimum.reduce(rest, axis=None) >= 1.0:
            e = e if out is None and len(cuts) == 1 else out
            fine = rest >= 1.0
            others, ties = _others(x, m, e, buffers)
            s = np.where(fine, s, others)
            rest = np.where(fine, rest, others / grown + ties)
    far, tiny = RANGES[x.dtype]
    least, low = np.minimum.reduce(m, axis=None), -far
    if out is not None and not least >= LOW_FOR_PROBABILITIES:
        low = low_for_probabilities(out)
    if (
        least >= low
        and np.maximum.reduce(m, axis=None) <= far
        and np.minimum.reduce(s, axis=None) >= tiny
    ):
        return Plain(m, rest, grown, every, None)
    fit = (m >= low) & (m <= far) & (s >= tiny)
    return Plain(m, rest, grown, every, np.flatnonzero(~fit))


def _sum_without(e: Any, at: Any, cut: tuple[slice, ...], *, keep: bool) -> Any:
    """Sum along rows, the entries at flat places left out."""
    flat = e.reshape(-1)
    if len(cut) > 1:  # a chunk of a single row
        start = cut[1].start
        at = at[(at >= start) & (at < start + flat.size)] - start
    kept = flat.take(at) if keep else None
    flat.put(at, 0.0)
    s = np.add.reduce(e, axis=1, keepdims=True)
    if keep:
        flat.put(at, kept)
    return s


def _others(x: Any, m: Any, e: Any, buffers: Buffers) -> tuple[Any, Any]:
    """Sum exp(x) over the first axis without the maxima; return how many more than one there are.

    `e` is exp(x), or None to compute it once more.
    """
    sums, ties = Sums(), Sums()
    for cut in chunks(x, 0):
        part = x[cut]
        below = part < m
        others = buffers.take("others", part.shape)
        if e is None:
            np.exp(part, out=others)
            np.multiply(others, below, out=others)
        else:
            np.multiply(e[cut], below, out=others)
        sums.add(total(others, 0, buffers))
        ties.add(part.shape[0] - np.add.reduce(below, axis=0, dtype=x.dtype, keepdims=True))
    return sums.get(), ties.get() - 1.0


def near_zero(value: Any, unfit: Any) -> Any:
    """Add the logsumexps near 0 to the unfit: there max + log1p(rest) cancels."""
    small = ~(np.abs(value) >= 1.0)
    if not small.any():
        return unfit
    if unfit is not None:
        small[unfit] = True
    return np.flatnonzero(small)


# --------------------------------------------------------------------------- the precise form


def fold(x: Any, out: Any, axis: int, buffers: Buffers) -> Any:
    """Return the maximum and the rest, as `portable` folds a row into its state.

    `out` takes exp(x - max), with the rounding error of the difference put back; None drops it.
    """
    m = maximum(x, axis)
    rest = _rest(x, m, out, axis, buffers, infinities=False)
    if np.isnan(rest).any():
        rest = _rest(x, m, out, axis, buffers, infinities=True)
    # Below this the terms of a sum are subnormal numbers, on average.
    least = x.shape[axis] * SMALLEST_NORMAL[x.dtype]
    few = (rest > 0.0) & (rest < least)
    if few.any():
        at = np.flatnonzero(few)
        again = portable.fold_part(np, np.take(x, at, axis=1 - axis), (axis,))[1]
        rest.reshape(-1)[at] = again.reshape(-1)
    return m, rest


def _rest(x: Any, m: Any, out: Any, axis: int, buffers: Buffers, *, infinities: bool) -> Any:
    rests, maxima = Sums(), Sums()
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
        np.add(e, 1.0, out=e)
        np.exp(d, out=d)
        if infinities:
            # Beside an infinity the error is nan and its term 0.
            np.copyto(e, 0.0, where=d == 0.0)
        np.multiply(e, d, out=e)
        # Terms are at most 1, so the whole part of one says whether it is a maximum. A maximum is
        # left out of the sum, ties count.
        np.floor(e, out=t)
        maxima.add(total(t, axis, buffers))
        np.subtract(e, t, out=t)
        rests.add(total(t, axis, buffers))
    return rests.get() + (maxima.get() - 1.0)
