"""The state (max, rest) of rows in a tile, in registers; tiles are (rows, classes).

rest is the sum of exp(x - max) without one maximum, as in `portable._state`. An empty state is
(-inf, -1): its sum is 0.
"""

import triton
import triton.language as tl

from portable_softmax.kernels._triton._math import difference_error, divide, exp


@triton.jit
def row_max(x):
    """The maximum of each row, kept with length 1; a nan is left to the sum."""
    return tl.max(tl.where(x == x, x, float("-inf")), axis=1, keep_dims=True)


@triton.jit
def shift_of(m):
    """What is subtracted: the maximum, and 0 for an infinite one, whose row is told apart later."""
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)


@triton.jit
def _tempered(gap, error, temperature):
    """Both over T; where the error is not small any more, the exponential is long 0."""
    error = divide(error, temperature)
    return divide(gap, temperature), tl.where(tl.abs(error) < 1.0, error, 0.0)


@triton.jit
def exponentials(x, shift, temperature, TEMPERED: tl.constexpr):
    """(x - shift) / T and its exponential, what rounding took from the former put back."""
    shifted = x - shift
    error = difference_error(x, shift, shifted)
    if TEMPERED:
        shifted, error = _tempered(shifted, error, temperature)
    return shifted, exp(shifted, error)


@triton.jit
def rest_of(e):
    """The sum of a row's exponentials without one maximum, kept with length 1.

    Terms are at most 1, and those that are 1 are counted apart: ties cost no digits.
    """
    tops = e == 1.0
    rest = tl.sum(tl.where(tops, 0.0, e), axis=1, keep_dims=True)
    count = tl.sum(tops.to(tl.int32), axis=1, keep_dims=True)
    return rest + (count - 1).to(e.dtype)


@triton.jit
def fold(m, rest, x, temperature, TEMPERED: tl.constexpr):
    """Merge one more entry into each state: one exponential, whichever is larger."""
    above = x > m
    gap = tl.where(above, m - x, x - m)
    low, high = tl.where(above, m, x), tl.where(above, x, m)
    error = difference_error(low, high, gap)
    gap = tl.where(x == m, 0.0, gap)  # of two infinities as well
    if TEMPERED:
        gap, error = _tempered(gap, error, temperature)
    e = exp(gap, error)
    return tl.where(above, x, m), tl.where(above, (1.0 + rest) * e, rest + e)


@triton.jit
def merge(m, rest, m2, rest2, temperature, TEMPERED: tl.constexpr):
    """Merge two states: (m1, r1 + (1 + r2) exp(m2 - m1)) for m1 >= m2."""
    above = m2 > m
    gap = tl.where(above, m - m2, m2 - m)
    low, high = tl.where(above, m, m2), tl.where(above, m2, m)
    error = difference_error(low, high, gap)
    gap = tl.where(m2 == m, 0.0, gap)
    if TEMPERED:
        gap, error = _tempered(gap, error, temperature)
    e = exp(gap, error)
    larger, smaller = tl.where(above, rest2, rest), tl.where(above, rest, rest2)
    return tl.where(above, m2, m), larger + (1.0 + smaller) * e


@triton.jit
def merged(m, rest, temperature, TEMPERED: tl.constexpr):
    """Merge the states along a row into one, kept with length 1."""
    top = tl.max(m, axis=1, keep_dims=True)
    gap = m - top
    error = difference_error(m, top, gap)
    gap = tl.where(m == top, 0.0, gap)
    if TEMPERED:
        gap, error = _tempered(gap, error, temperature)
    e = exp(gap, error)
    tops = e == 1.0
    # A state as high as the highest gives its own rest, and is counted.
    terms = tl.where(tops, rest, (1.0 + rest) * e)
    count = tl.sum(tops.to(tl.int32), axis=1, keep_dims=True)
    return top, tl.sum(terms, axis=1, keep_dims=True) + (count - 1).to(m.dtype)
