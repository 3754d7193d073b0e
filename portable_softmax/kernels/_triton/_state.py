"""The state (max, rest) of rows in a tile, in registers; tiles are (rows, classes).

rest is the sum of exp(x - max) without one maximum, as in `portable._state`. A row that holds a
nan has the maximum nan, and one with an infinite maximum or nan some number as its rest: whoever
makes an answer of a state looks at the maximum. An empty state is (-inf, 0).

Exponentials are scaled, `_math.one` standing for 1, and of a row that `_math.split` has shifted: a
factor of the row makes them plain.
"""

import triton
import triton.language as tl

from portable_softmax.kernels._triton._math import (
    INTERPRETED,
    difference_error,
    divide,
    one,
    quick_exp,
    scaled_exp,
    scaled_exp_of,
    split,
)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_max(x):
    """The maximum of each row, kept with length 1: nan if there is one."""
    if INTERPRETED:  # which reduces with a function of ours at no bearable speed
        nans = tl.sum((x != x).to(tl.int32), axis=1, keep_dims=True)
        return tl.where(nans > 0, float("nan"), tl.max(x, axis=1, keep_dims=True))
    else:
        return tl.reduce(x, 1, _larger, keep_dims=True)


@triton.jit
def is_finite(x):
    """Neither an infinity nor nan."""
    return tl.abs(x) < float("inf")


@triton.jit
def shift_of(m, TEMPERED: tl.constexpr, QUICK: tl.constexpr):
    """What `exponentials` take of a maximum, and the factor that makes them exp((x - m) / T).

    Of a maximum that is not finite they take 0.
    """
    m = tl.where(is_finite(m), m, 0.0)
    unit = 1.0 / one(m)
    if TEMPERED or QUICK:
        return m, m * 0.0, unit + m * 0.0
    else:
        base, head, tail = split(m)
        return base, head, unit - unit * tail  # exp(-tail), but for tail^2 / 2


@triton.jit
def over(d, lost, temperature):
    """(d + lost) / T as a sum of two: a product with 1 / T, and its remainder (Markstein 1990)."""
    inverse = divide(1.0 + temperature * 0.0, temperature)
    quotient = d * inverse
    error = (tl.fma(-quotient, temperature + d * 0.0, d) + lost) * inverse
    return quotient, tl.where(error == error, error, 0.0)


@triton.jit
def exponentials(x, shift, temperature, TEMPERED: tl.constexpr, QUICK: tl.constexpr):
    """Of a tile below a maximum that has been split: scaled exponentials."""
    base, head, _ = shift
    if TEMPERED:
        d = x - base
        if QUICK:
            return quick_exp(d * divide(1.0 + temperature * 0.0, temperature))
        else:
            quotient, error = over(d, difference_error(x, base, d), temperature)
            return scaled_exp_of(quotient, error)
    else:
        if QUICK:
            return quick_exp(x - base)
        else:
            return scaled_exp(x, base, head)


@triton.jit
def below(x, m, temperature, TEMPERED: tl.constexpr):
    """(x - m) / T."""
    d = x - m
    if TEMPERED:
        quotient, error = over(d, difference_error(x, m, d), temperature)
        d = quotient + error
    return d


@triton.jit
def _add(a, b, c, d):
    return a + c, b + d


@triton.jit
def sums(a, b):
    """The sums of two tiles along their rows, kept with length 1: both in one exchange."""
    if INTERPRETED:
        return tl.sum(a, axis=1, keep_dims=True), tl.sum(b, axis=1, keep_dims=True)
    else:
        return tl.reduce((a, b), 1, _add, keep_dims=True)


@triton.jit
def _without_one(some, all):
    """A row's sum without one term of 1, from the sums without and with all terms of 1.

    Where there are two of these, the sum without them all has lost one too many, and the whole sum
    less one loses no digits.
    """
    return tl.where(all - some > 1.5, all - 1.0, some)


@triton.jit
def state_of(x, temperature, TEMPERED: tl.constexpr, QUICK: tl.constexpr):
    """The state of rows in a tile; their scaled exponentials, and what makes these plain."""
    m = row_max(x)
    shift = shift_of(m, TEMPERED, QUICK)
    e = exponentials(x, shift, temperature, TEMPERED, QUICK)
    some, all = sums(tl.where(x == m, 0.0, e), e)
    unit = shift[2]
    return m, _without_one(some * unit, all * unit), e, unit


@triton.jit
def merged(m, rest, temperature, TEMPERED: tl.constexpr):
    """Merge the states along a row into one, kept with length 1."""
    top = row_max(m)
    shift = shift_of(top, TEMPERED, False)
    e = exponentials(m, shift, temperature, TEMPERED, False) * shift[2]
    terms = (1.0 + rest) * e
    # A state as high as the highest gives its own rest, and is counted.
    some, all = sums(tl.where(m == top, rest, terms), terms)
    return top, _without_one(some, all)


@triton.jit
def fold(m, rest, low, xs, temperature, TEMPERED: tl.constexpr, QUICK: tl.constexpr,
         STEPS: tl.constexpr):  # fmt: skip
    """Take STEPS tiles into the state of each lane; `low` is what `rest` has lost to rounding.

    On its way through the tiles the maximum leaves behind whatever it is not: these are summed,
    the former maximum among them if it was passed, and so exactly one maximum is left out.
    """
    top = m
    others = ()
    for i in tl.static_range(STEPS):
        others = others + (tl.minimum(top, xs[i]),)
        top = _larger(top, xs[i])
    shift = shift_of(top, TEMPERED, QUICK)
    added = exponentials(others[0], shift, temperature, TEMPERED, QUICK)
    for i in tl.static_range(1, STEPS):
        added += exponentials(others[i], shift, temperature, TEMPERED, QUICK)
    added = added * shift[2]
    scale = exponentials(m, shift, temperature, TEMPERED, QUICK) * shift[2]
    # Where the maximum stays, rounding must not shrink the sum tile by tile.
    scale = tl.where(m == top, 1.0, scale)
    rest = rest * scale
    total = rest + added
    return top, total, low * scale + difference_error(rest, -added, total)
