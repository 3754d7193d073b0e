"""Compensated sums: what a rounded sum lost is kept beside it (Knuth's two-sum)."""

from __future__ import annotations

from portable_softmax.kernels._numba._jit import function
from portable_softmax.kernels._numba._vectors import where_finite


@function
def difference_error(a, b, d):
    """(a - b) - d for d the rounded a - b; nan beside an infinity."""
    t = d - a
    return (a - (d - t)) - (b + t)


@function
def added(total, lost, x):
    """Add x to a sum and to what its rounding lost."""
    s = total + x
    return s, lost + difference_error(total, -x, s)


@function
def compensated(total, lost):
    """The sum; an infinite one as it is."""
    return where_finite(total, total + lost, total)
