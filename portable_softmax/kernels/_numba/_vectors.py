"""Vector registers as values of Numba: 64 bytes of consecutive numbers, and what is done with them.

LLVM vectorises loops over scalars as it sees fit: a short row ends in its remainder loop, and every
sum pays for a horizontal reduction. Here a row is a main loop over whole vectors and a masked tail.
A machine with narrower registers takes several for one vector.
"""

from __future__ import annotations

import math
import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

from portable_softmax.kernels._numba._memory import (
    COMPUTE,
    FLOAT,
    I32,
    I64,
    Masked,
    View,
    narrowed,
    stored,
    widened,
)

LANES = {types.float32: 16, types.float64: 8}


class Vector(types.Type):
    """As many numbers of a dtype as fill 64 bytes."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Vector({dtype})")


@register_model(Vector)
class _Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        lanes = ir.VectorType(FLOAT[kind.dtype], LANES[kind.dtype])
        super().__init__(manager, kind, lanes)


def vector_of(p: Any) -> Vector:
    """The vector that holds what `p` points to."""
    return Vector(COMPUTE[p.dtype])


def constant(scalar: Any, numbers: Any) -> Any:
    numbers = list(numbers)
    return ir.Constant(ir.VectorType(scalar, len(numbers)), numbers)


def _splat(builder: Any, value: Any, n: int) -> Any:
    kind = ir.VectorType(value.type, n)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), constant(I32, [0] * n))


def converted(context: Any, builder: Any, kind: Any, given: Any, value: Any) -> Any:
    """A value as one of `kind`: a vector as it is, and a number in every lane of one."""
    if isinstance(given, Vector):
        return value
    if not isinstance(kind, Vector):
        return context.cast(builder, value, given, kind)
    return _splat(builder, context.cast(builder, value, given, kind.dtype), LANES[kind.dtype])


@intrinsic
def lanes(typing, p):
    """How many of the numbers at `p` one vector holds, known when compiling."""
    count = LANES[COMPUTE[p.dtype]]
    return types.intp(p), lambda context, builder, sig, args: I64(count)


@intrinsic
def splat(typing, p, number):
    """A number in every lane of a vector of what `p` points to; a vector as it is."""
    kind = vector_of(p)

    def generate(context, builder, signature, args):
        return converted(context, builder, kind, number, args[1])

    return kind(p, number), generate


# --------------------------------------------------------------------------- memory


def place_of(builder: Any, p: Any, j: Any, lanes: int) -> Any:
    address = builder.gep(p, [j])
    return builder.bitcast(address, ir.VectorType(address.type.pointee, lanes).as_pointer())


def alignment(context: Any, p: Any) -> int:
    found: int = context.get_abi_alignment(context.get_data_type(p.dtype))
    return found


def call(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    """Call one of LLVM's intrinsics."""
    known = builder.module.globals.get(name)
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(known or ir.Function(builder.module, kind, name), args)


def _suffix(kind: Any) -> str:
    element = kind.element
    letter, width = ("i", element.width) if isinstance(element, ir.IntType) else ("f", 32)
    return f"v{kind.count}{letter}{64 if isinstance(element, ir.DoubleType) else width}"


def _first(builder: Any, k: Any, n: int) -> Any:
    """The mask of the first k lanes."""
    return builder.icmp_signed(
        "<", constant(I32, range(n)), _splat(builder, builder.trunc(k, I32), n)
    )


def _load(context: Any, builder: Any, p: Any, place: Any, mask: Any, fill: Any) -> Any:
    stored, align = place.type.pointee, alignment(context, p)
    if mask is None:
        return widened(builder, p.dtype, builder.load(place, align=align))
    exact = COMPUTE[p.dtype] == p.dtype
    unread = fill if exact else ir.Constant(stored, None)
    name = f"llvm.masked.load.{_suffix(stored)}.p0"
    value = call(builder, name, stored, [place, I32(align), mask, unread])
    return value if exact else builder.select(mask, widened(builder, p.dtype, value), fill)


def _store(builder: Any, place: Any, value: Any, mask: Any, align: int) -> None:
    if mask is None:
        builder.store(value, place, align=align)
        return
    name = f"llvm.masked.store.{_suffix(value.type)}.p0"
    call(builder, name, ir.VoidType(), [value, place, I32(align), mask])


def _vector(context: Any, builder: Any, p: Any, at: Any, j: Any, mask: Any, fill: Any) -> Any:
    """The vector from ``p[j]`` on; `fill` where the mask of a tail is not set."""
    n = fill.type.count
    if not isinstance(p, View):
        return _load(context, builder, p, place_of(builder, at, j, n), mask, fill)
    logits, other = (builder.extract_value(at, i) for i in range(2))
    value = _vector(context, builder, p.pointer, logits, j, mask, fill)
    if isinstance(p, Masked):
        counts = _unmasked(builder, builder.gep(other, [j]), mask, n)
        value = builder.select(counts, value, ir.Constant(value.type, [-math.inf] * n))
    else:
        number = _splat(builder, p.number(builder, other), n)
        value, left = p.seen_and_left(builder, other, number, value)
        if left is not None:
            place = place_of(builder, left[0], j, n)
            _store(builder, place, left[1], mask, 8 if n == LANES[types.float64] else 4)
    return value if mask is None else builder.select(mask, value, fill)


def _unmasked(builder: Any, place: Any, tail: Any, n: int) -> Any:
    """Which of the lanes from a place of a mask on take part."""
    place = builder.bitcast(place, ir.VectorType(ir.IntType(8), n).as_pointer())
    zeros = ir.Constant(place.type.pointee, None)
    if tail is None:
        found = builder.load(place, align=1)
    else:
        name = f"llvm.masked.load.{_suffix(zeros.type)}.p0"
        found = call(builder, name, zeros.type, [place, I32(1), tail, zeros])
    return builder.icmp_unsigned("!=", found, zeros)


@intrinsic
def read(typing, p, j, k, fill):
    """The vector from ``p[j]`` on, or its first `k` numbers and `fill` in the other lanes.

    All lanes are read where `k` is None. A number in place of the pointer `p` is one array of
    equal numbers. `p` in a tuple means a number for each vector instead of each lane.
    """
    masked = not isinstance(k, types.NoneType)
    per_vector = isinstance(p, types.BaseTuple)
    source = p[0] if per_vector else p
    kind = Vector(source) if isinstance(source, types.Float) else vector_of(source)
    n = LANES[kind.dtype]

    def generate(context, builder, signature, args):
        at, j, k_, fill_ = args
        at = builder.extract_value(at, 0) if per_vector else at
        mask = _first(builder, k_, n) if masked else None
        fill_ = converted(context, builder, kind, fill, fill_)
        if isinstance(source, types.CPointer | View) and not per_vector:
            return _vector(context, builder, p, at, j, mask, fill_)
        if isinstance(source, types.CPointer):
            at = builder.load(builder.gep(at, [builder.sdiv(j, I64(n))]))
        value = _splat(builder, at, n)
        return value if mask is None else builder.select(mask, value, fill_)

    return kind(p, types.intp, types.intp if masked else k, fill), generate


@intrinsic
def read_apart(typing, p, j, bound, fill):
    """``p[j]``, ``p[j + L]``, ... in the L lanes of a vector; `fill` from ``p[n]`` on.

    All of them are there where `n` is None.
    """
    kind = vector_of(p)
    L = LANES[kind.dtype]

    def numbers(builder, at, places):
        value = ir.Constant(ir.VectorType(at.type.pointee, L), ir.Undefined)
        for i, place in enumerate(places):
            value = builder.insert_element(value, builder.load(builder.gep(at, [place])), I32(i))
        return value

    def logits(builder, p, at, places):
        if not isinstance(p, View):
            return widened(builder, p.dtype, numbers(builder, at, places))
        at, other = (builder.extract_value(at, i) for i in range(2))
        value = logits(builder, p.pointer, at, places)
        if not isinstance(p, Masked):
            return p.seen(builder, _splat(builder, p.number(builder, other), L), value)
        counts = numbers(builder, other, places)
        counts = builder.icmp_unsigned("!=", counts, ir.Constant(counts.type, None))
        return builder.select(counts, value, ir.Constant(value.type, [-math.inf] * L))

    def generate(context, builder, signature, args):
        at, j, n, fill_ = args
        places = [builder.add(j, I64(i * L)) for i in range(L)]
        if isinstance(bound, types.NoneType):
            return logits(builder, p, at, places)
        every = builder.add(_splat(builder, j, L), constant(I64, range(0, L * L, L)))
        mask = builder.icmp_signed("<", every, _splat(builder, n, L))
        places = [builder.select(builder.icmp_signed("<", k, n), k, I64(0)) for k in places]
        fill_ = converted(context, builder, kind, fill, fill_)
        return builder.select(mask, logits(builder, p, at, places), fill_)

    return kind(p, types.intp, bound, fill), generate


@intrinsic
def write(typing, p, j, value, k):
    """Store a vector from ``p[j]`` on, or its first `k` numbers, each rounded once.

    All lanes are stored where `k` is None, and nothing where `p` is null.
    """
    masked = not isinstance(k, types.NoneType)
    k_type = types.intp if masked else k
    if isinstance(p, types.Integer):
        return types.void(p, types.intp, value, k_type), nothing

    def generate(context, builder, signature, args):
        p_, j, value, k = args
        n = value.type.count
        mask = _first(builder, k, n) if masked else None
        value, place = narrowed(builder, p.dtype, value), place_of(builder, p_, j, n)
        _store(builder, place, value, mask, alignment(context, p))
        return context.get_dummy_value()

    return types.void(p, types.intp, vector_of(p), k_type), generate


def nothing(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Generate nothing."""
    return context.get_dummy_value()


def _prefetching(is_write: int) -> Any:
    @intrinsic
    def prefetch(typing, p, j, k):
        if isinstance(p, types.Number) or not isinstance(k, types.NoneType):
            return types.void(p, types.intp, k), nothing

        def generate(context, builder, signature, args):
            numbers = [I32(k) for k in (is_write, 3, 1)]  # to the first cache, as data
            for at in stored(builder, p, args[0]):
                place = builder.bitcast(builder.gep(at, [args[1]]), ir.IntType(8).as_pointer())
                call(builder, "llvm.prefetch.p0", ir.VoidType(), [place, *numbers])
            return context.get_dummy_value()

        return types.void(p, types.intp, k), generate

    return prefetch


# Ask for the line of the cache around ``p[j]``, to be read or to be written; it may lie anywhere.
# Nothing if `p` is null or a number for all of them, or in a masked tail, where `k` is not None.
prefetch_to_read, prefetch_to_write = _prefetching(0), _prefetching(1)


# --------------------------------------------------------------------------- arithmetic


def elementwise(generate: Any, results: int = 1) -> Any:
    """An intrinsic of up to four numbers or vectors of one dtype; a number meets every lane.

    It returns a tuple where there are several results.
    """

    def typed(*given: Any) -> Any:
        kind = next((a for a in given if isinstance(a, Vector)), given[0])
        result = kind if results == 1 else types.UniTuple(kind, results)

        def instructions(context, builder, signature, args):
            pairs = zip(given, args, strict=True)
            found = generate(builder, *(converted(context, builder, kind, *p) for p in pairs))
            return found if results == 1 else context.make_tuple(builder, result, found)

        return result(*given), instructions

    by_count = {
        2: lambda typing, a: typed(a),
        3: lambda typing, a, b: typed(a, b),
        4: lambda typing, a, b, c: typed(a, b, c),
        5: lambda typing, a, b, c, d: typed(a, b, c, d),
    }
    found = by_count[generate.__code__.co_argcount]
    found.__name__ = generate.__name__
    return intrinsic(found)


@elementwise
def product(builder, a, b):
    """``a * b`` in the dtype of `a`."""
    return builder.fmul(a, b)


def _operator(symbol: Any, name: str) -> None:
    """Let an operator take vectors, or a vector and a number, without compiling a function."""

    @type_callable(symbol)
    def typed(context):
        def result(*given):
            return next((a for a in given if isinstance(a, Vector)), None)

        return (lambda a: result(a)) if symbol is operator.neg else (lambda a, b: result(a, b))

    def instructions(context, builder, signature, args):
        kind, pairs = signature.return_type, zip(signature.args, args, strict=True)
        operands = (converted(context, builder, kind, *pair) for pair in pairs)
        return getattr(builder, name)(*operands)

    if symbol is operator.neg:
        lower_builtin(symbol, Vector)(instructions)
        return
    for given in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(symbol, *given)(instructions)


for _symbol, _name in (
    (operator.neg, "fneg"),
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _operator(_symbol, _name)


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Write a * b + c, rounded once."""
    if not isinstance(a.type, ir.VectorType):
        return builder.fma(a, b, c)
    return call(builder, f"llvm.fma.{_suffix(a.type)}", a.type, [a, b, c])


@elementwise
def times(builder, a, b):
    """``a * b``, 0 where `a` is 0 and `b` infinite."""
    zero = ir.Constant(a.type, None)
    # The difference of an infinity to itself is a nan, that of a nan is as well.
    difference = builder.fcmp_unordered("uno", builder.fsub(b, b), zero)
    infinite = builder.and_(difference, builder.fcmp_ordered("ord", b, zero))
    left_out = builder.and_(builder.fcmp_ordered("==", a, zero), infinite)
    return builder.select(left_out, a, builder.fmul(a, b))


def greater(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@elementwise
def larger(builder, a, b):
    """The larger one, `b` where either is nan: one instruction."""
    return greater(builder, a, b)


def if_finite(builder: Any, a: Any, finite: Any, other: Any) -> Any:
    difference = builder.fsub(a, a)
    return builder.select(builder.fcmp_ordered("ord", difference, difference), finite, other)


@elementwise
def where_finite(builder, a, finite, other):
    """`finite` where `a` is, else `other`."""
    return if_finite(builder, a, finite, other)


@elementwise
def where_equal(builder, a, b, same, other):
    """`same` where a == b, else `other`."""
    return builder.select(builder.fcmp_ordered("==", a, b), same, other)


@elementwise
def where_at_least(builder, a, b, value, other):
    """`value` where a >= b, else `other`."""
    return builder.select(builder.fcmp_ordered(">=", a, b), value, other)
