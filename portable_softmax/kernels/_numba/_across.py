"""What becomes of the lanes of vectors: one number of all, one of each row, or a count of some."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from portable_softmax.kernels._numba._ir import FLOAT
from portable_softmax.kernels._numba._vectors import (
    LANES,
    alignment,
    bits,
    constant,
    greater,
    place_of,
    vector_of,
)

_I32 = ir.IntType(32)


# --------------------------------------------------------------------------- tallies
#
# As many 32-bit integers as a vector has lanes, in the place of a vector.


@intrinsic
def tally(typing, p, i, a, b):
    """Add to the i-th integer at `p` how many lanes are equal; count on the scalar side."""

    def generate(context, builder, signature, args):
        p, i, a, b = args
        place = builder.gep(builder.bitcast(p, _I32.as_pointer()), [i])
        found = bits(builder, builder.fcmp_ordered("==", a, b))
        count = builder.zext(builder.ctpop(found), _I32)
        builder.store(builder.add(builder.load(place), count), place)
        return context.get_dummy_value()

    return types.void(p, types.intp, a, b), generate


@intrinsic
def tallied(typing, p, i):
    """The integers at `p` from the i-th on, as a vector."""
    kind = vector_of(p)

    def generate(context, builder, signature, args):
        p, i = args
        n = LANES[kind.dtype]
        first = builder.gep(builder.bitcast(p, _I32.as_pointer()), [i])
        place = builder.bitcast(first, ir.VectorType(_I32, n).as_pointer())
        integers = builder.load(place, align=4)
        return builder.sitofp(integers, ir.VectorType(FLOAT[kind.dtype], n))

    return kind(p, types.intp), generate


# --------------------------------------------------------------------------- across lanes


def _across(combine: Any) -> Any:
    """Return the function that combines all lanes, neighbours in halves."""

    @intrinsic
    def across(typing, a):
        def generate(context, builder, signature, args):
            (value,) = args
            while (n := value.type.count) > 1:
                low = constant(_I32, range(n // 2))
                high = constant(_I32, range(n // 2, n))
                nothing = ir.Constant(value.type, ir.Undefined)
                value = combine(
                    builder,
                    builder.shuffle_vector(value, nothing, low),
                    builder.shuffle_vector(value, nothing, high),
                )
            return builder.extract_element(value, ir.Constant(_I32, 0))

        return a.dtype(a), generate

    return across


def _of_each(combine: Any) -> Any:
    """Return the function that combines the lanes of each of as many vectors as a vector has lanes.

    They lie in memory, one after the other; the i-th number of the result is that of the i-th.
    Halves of pairs are combined, so that a vector holds two, then four, ... of them.
    """

    @intrinsic
    def of_each(typing, p):
        kind = vector_of(p)
        n = LANES[kind.dtype]

        def generate(context, builder, signature, args):
            def at(i):
                index = ir.Constant(ir.IntType(64), i * n)
                place = place_of(builder, args[0], index, n)
                return builder.load(place, align=alignment(context, p))

            def combined(first, step):
                """Those that are `step` apart, from the first on."""
                if step == n:
                    return at(first)
                x, y = combined(first, 2 * step), combined(first + step, 2 * step)
                low = [k if not k & step else n + k - step for k in range(n)]
                high = [k + step if not k & step else n + k for k in range(n)]
                return combine(
                    builder,
                    builder.shuffle_vector(x, y, constant(_I32, low)),
                    builder.shuffle_vector(x, y, constant(_I32, high)),
                )

            return combined(0, 1)

        return kind(p), generate

    return of_each


def _sum(builder: Any, a: Any, b: Any) -> Any:
    return builder.fadd(a, b)


across_max, across_sum = _across(greater), _across(_sum)
max_of_each, sum_of_each = _of_each(greater), _of_each(_sum)
