"""Compensated sums: what a rounded sum lost is kept beside it (Knuth's two-sum)."""

from __future__ import annotations

from functools import partial

from portable_softmax.kernels._numba._vectors import elementwise, if_finite


@partial(elementwise, results=2)
def added(builder, total, lost, x):
    """Add x to a sum and to what its rounding lost; nan beside an infinity."""
    s, less = builder.fadd(total, x), builder.fneg(x)
    t = builder.fsub(s, total)
    error = builder.fsub(builder.fsub(total, builder.fsub(s, t)), builder.fadd(less, t))
    return s, builder.fadd(lost, error)


@elementwise
def compensated(builder, total, lost):
    """The sum; an infinite one as it is."""
    return if_finite(builder, total, builder.fadd(total, lost), total)
