"""The per-position values of a group of rows, kind after kind."""

from __future__ import annotations

from numba import types
from numba.extending import intrinsic

from portable_softmax.kernels._numba._jit import function
from portable_softmax.kernels._numba._memory import ahead

MAX, REST, UNIT, TOTAL, WEIGHT, LOGIT, LOSS, GAPS, SLOPE, FACTOR = range(10)
# Kinds that take the place of one that is not needed at the same time.
LOGSUMEXP, SUM, LABEL_GRADIENT, SHARE, INVERSE = MAX, REST, LOGIT, GAPS, TOTAL
CONSTANT = WEIGHT
# While a block is folded.
COUNT, BASE, MAGIC, LOWEST = SLOPE, LOSS, GAPS, FACTOR


@intrinsic
def values(typing, workspace, kind, height):
    """Where the values of a kind are: a function would be compiled for each kind."""

    def generate(context, builder, signature, args):
        return builder.gep(args[0], [builder.mul(*args[1:])])

    return workspace(workspace, types.intp, types.intp), generate


@function
def size_of_values(height):
    """How many numbers the values take, in whole lines of the cache."""
    return (10 * height + 15) // 16 * 16


@function
def after_values(workspace, height):
    """Where the values end."""
    return ahead(workspace, size_of_values(height))
