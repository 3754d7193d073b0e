"""The state (max, rest) of rows in a tile, in registers; tiles are (rows, classes).

rest is the sum of exp(x - max) over all entries but one maximum, as in `portable._state`. The
maximum of a row with a nan is nan. Where the maximum is not finite, rest is unspecified: results
are selected by the maximum. An empty state is (-inf, 0).

Exponentials are scaled by `_math.exp_scale`, and by the small factor that `_math.split` leaves to
the row; `unscale` undoes both.
"""

import triton
import triton.language as tl

from portable_softmax.kernels._triton._math import (
    INTERPRETED,
    difference_error,
    divide,
    exp_scale,
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
    """The maximum of each row, nan if it has one, with the reduced axis kept."""
    if INTERPRETED:  # its tl.reduce is too slow
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
    """The shift for `exponentials`: base, head, and the factor `unscale` of the row.

    A maximum that is not finite is replaced by 0.
    """
    m = tl.where(is_finite(m), m, 0.0)
    unscale = 1.0 / exp_scale(m)
    if TEMPERED or QUICK:
        return m, m * 0.0, unscale + m * 0.0
    else:
        base, head, tail = split(m)
        return base, head, unscale - unscale * tail  # exp(-tail) up to tail^2 / 2


@triton.jit
def over(d, lost, temperature):
    """(d + lost) / T as quotient + error: d times 1 / T and its remainder (Markstein 1990)."""
    t, low = temperature
    inverse = divide(1.0 + t * 0.0, t)
    quotient = d * inverse
    error = (tl.fma(-quotient, t + d * 0.0, d) - quotient * low + lost) * inverse
    return quotient, tl.where(is_finite(quotient) & (error == error), error, 0.0)


@triton.jit
def difference_over(x, base, temperature):
    """(x - base) / T as quotient + error; halves keep the difference from overflowing."""
    half, half_base = x * 0.5, base * 0.5
    d = half - half_base
    halved = (temperature[0] * 0.5, temperature[1] * 0.5)
    return over(d, difference_error(half, half_base, d), halved)


@triton.jit
def exponentials(x, shift, temperature, TEMPERED: tl.constexpr, QUICK: tl.constexpr):
    """Scaled exponentials of a tile, with the shift of its row maximum."""
    base, head, _ = shift
    if TEMPERED:
        if QUICK:
            return quick_exp((x - base) * divide(1.0 + temperature[0] * 0.0, temperature[0]))
        else:
            quotient, error = difference_over(x, base, temperature)
            return scaled_exp_of(quotient, error)
    else:
        if QUICK:
            return quick_exp(x - base)
        else:
            return scaled_exp(x, base, head)


@triton.jit
def below(x, m, temperature, TEMPERED: tl.constexpr):
    """(x - m) / T."""
    if TEMPERED:
        quotient, error = difference_over(x, m, temperature)
        return quotient + error
    else:
        return x - m


@triton.jit
def _add(a, b, c, d):
    return a + c, b + d


@triton.jit
def sums(a, b):
    """The row sums of two tiles, in one horizontal reduction, with the reduced axis kept."""
    if INTERPRETED:
        return tl.sum(a, axis=1, keep_dims=True), tl.sum(b, axis=1, keep_dims=True)
    else:
        return tl.reduce((a, b), 1, _add, keep_dims=True)


@triton.jit
def _without_one(some, total):
    """A row's sum without one term of 1, from the sums without and with all terms of 1.

    With two or more such terms the first sum lacks too many, and total - 1 cancels no digits.
    """
    return tl.where(total - some > 1.5, total - 1.0, some)


@triton.jit
def state_of(x, temperature, TEMPERED: tl.constexpr, QUICK: tl.constexpr):
    """The state of rows in a tile, their scaled exponentials, and the factor to unscale them."""
    m = row_max(x)
    shift = shift_of(m, TEMPERED, QUICK)
    e = exponentials(x, shift, temperature, TEMPERED, QUICK)
    some, total = sums(tl.where(x == m, 0.0, e), e)
    unscale = shift[2]
    return m, _without_one(some * unscale, total * unscale), e, unscale


@triton.jit
def merge(m, rest, temperature, TEMPERED: tl.constexpr):
    """Merge the states along a row into one, with the reduced axis kept."""
    top = row_max(m)
    shift = shift_of(top, TEMPERED, False)
    e = exponentials(m, shift, temperature, TEMPERED, False) * shift[2]
    terms = (1.0 + rest) * e
    # A state with the row's maximum adds its own rest to the first sum.
    some, total = sums(tl.where(m == top, rest, terms), terms)
    return top, _without_one(some, total)


@triton.jit
def fold(m, rest, low, xs, temperature, TEMPERED: tl.constexpr, QUICK: tl.constexpr,
         STEPS: tl.constexpr):  # fmt: skip
    """Fold STEPS tiles into the state of each lane; `low` is the compensation of `rest`.

    The running maximum displaces the smaller of each pair, which is summed: the former maximum too
    if a later entry exceeds it, so exactly one maximum is left out of the sum.
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
    # Exactly 1 where the maximum stays: else rounding shrinks the sum with every tile.
    scale = tl.where(m == top, 1.0, scale)
    rest = rest * scale
    total = rest + added
    return top, total, low * scale + difference_error(rest, -added, total)
