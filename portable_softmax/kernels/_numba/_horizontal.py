"""Horizontal reductions: one number of all lanes, one of each row's vector, or a count of some."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from portable_softmax.kernels._numba._memory import FLOAT, I32, I64
from portable_softmax.kernels._numba._vectors import (
    LANES,
    alignment,
    constant,
    converted,
    greater,
    place_of,
    vector_of,
)


def _bits(builder: Any, mask: Any) -> Any:
    """A mask of lanes as an integer."""
    return builder.bitcast(mask, ir.IntType(mask.type.count))


def _all(builder: Any, mask: Any) -> Any:
    if not isinstance(mask.type, ir.VectorType):
        return mask
    every = ir.Constant(ir.IntType(mask.type.count), -1)
    return builder.icmp_unsigned("==", _bits(builder, mask), every)


@intrinsic
def are_finite(typing, a):
    """Whether a number, or every lane of a vector, is finite."""

    def generate(context, builder, signature, args):
        difference = builder.fsub(args[0], args[0])
        return _all(builder, builder.fcmp_ordered("ord", difference, difference))

    return types.boolean(a), generate


def _are(sign: str) -> Any:
    """Return whether a number, or every lane of a vector, is so to `b`; a nan is not."""

    @intrinsic
    def are(typing, a, b):
        def generate(context, builder, signature, args):
            other = converted(context, builder, a, b, args[1])
            return _all(builder, builder.fcmp_ordered(sign, args[0], other))

        return types.boolean(a, b), generate

    return are


are_at_least, are_equal = _are(">="), _are("==")


# --------------------------------------------------------------------------- single lanes


@intrinsic
def first_at_least(typing, a, b):
    """The first lane that is; the number of lanes if none is."""

    def generate(context, builder, signature, args):
        found = builder.fcmp_ordered(">=", args[0], converted(context, builder, a, b, args[1]))
        first = builder.cttz(_bits(builder, found), ir.Constant(ir.IntType(1), 0))
        return builder.zext(first, I64)

    return types.intp(a, b), generate


@intrinsic
def integer_at(typing, a, lane):
    """The number in a lane, which is an integer."""

    def generate(context, builder, signature, args):
        return builder.fptosi(builder.extract_element(args[0], builder.trunc(args[1], I32)), I64)

    return types.intp(a, lane), generate


# --------------------------------------------------------------------------- counts
#
# As many 32-bit integers as a vector has lanes, in the place of a vector.


@intrinsic
def count_equal(typing, p, i, a, b):
    """Add to the i-th integer at `p` how many lanes are equal; count on the scalar side."""

    def generate(context, builder, signature, args):
        p, i, a, b = args
        place = builder.gep(builder.bitcast(p, I32.as_pointer()), [i])
        found = _bits(builder, builder.fcmp_ordered("==", a, b))
        count = builder.zext(builder.ctpop(found), I32)
        builder.store(builder.add(builder.load(place), count), place)
        return context.get_dummy_value()

    return types.void(p, types.intp, a, b), generate


@intrinsic
def counts(typing, p, i):
    """The integers at `p` from the i-th on, as a vector."""
    kind = vector_of(p)

    def generate(context, builder, signature, args):
        p, i = args
        n = LANES[kind.dtype]
        first = builder.gep(builder.bitcast(p, I32.as_pointer()), [i])
        integers = builder.load(builder.bitcast(first, ir.VectorType(I32, n).as_pointer()), align=4)
        return builder.sitofp(integers, ir.VectorType(FLOAT[kind.dtype], n))

    return kind(p, types.intp), generate


# --------------------------------------------------------------------------- reductions


def _of_all(combine: Any) -> Any:
    """Return the reduction of a vector's lanes, its halves first."""

    @intrinsic
    def of_all(typing, a):
        def generate(context, builder, signature, args):
            (value,) = args
            while (n := value.type.count) > 1:
                low, high = constant(I32, range(n // 2)), constant(I32, range(n // 2, n))
                nothing = ir.Constant(value.type, ir.Undefined)
                value = combine(
                    builder,
                    builder.shuffle_vector(value, nothing, low),
                    builder.shuffle_vector(value, nothing, high),
                )
            return builder.extract_element(value, I32(0))

        return a.dtype(a), generate

    return of_all


def _of_each(combine: Any) -> Any:
    """Return the reduction of each of as many vectors as a vector has lanes.

    They lie in memory, one after the other; the i-th number of the result is that of the i-th.
    Halves of pairs are combined, so that a vector holds two, then four, ... of them.
    """

    @intrinsic
    def of_each(typing, p):
        kind = vector_of(p)
        n = LANES[kind.dtype]

        def generate(context, builder, signature, args):
            def combined(first, step):
                """Those that are `step` apart, from the first on."""
                if step == n:
                    place = place_of(builder, args[0], I64(first * n), n)
                    return builder.load(place, align=alignment(context, p))
                x, y = combined(first, 2 * step), combined(first + step, 2 * step)
                low = [k if not k & step else n + k - step for k in range(n)]
                high = [k + step if not k & step else n + k for k in range(n)]
                return combine(
                    builder,
                    builder.shuffle_vector(x, y, constant(I32, low)),
                    builder.shuffle_vector(x, y, constant(I32, high)),
                )

            return combined(0, 1)

        return kind(p), generate

    return of_each


def _sum(builder: Any, a: Any, b: Any) -> Any:
    return builder.fadd(a, b)


max_of_all, sum_of_all = _of_all(greater), _of_all(_sum)
max_of_each, sum_of_each = _of_each(greater), _of_each(_sum)
