"""Compensated sums: what a rounded sum lost is kept beside it (Knuth's two-sum)."""

from __future__ import annotations

from portable_softmax.kernels._numba._jit import function
from portable_softmax.kernels._numba._vectors import where_finite


@function
def sum_error(a, b, s):
    """(a + b) - s for s the rounded a + b; nan beside an infinity."""
    t = s - a
    return (a - (s - t)) + (b - t)


@function
def added(total, lost, x):
    """Add x to a sum and to what its rounding lost."""
    s = total + x
    return s, lost + sum_error(total, x, s)


@function
def settled(total, lost):
    """The sum; an infinite one as it is."""
    return where_finite(total, total + lost, total)
