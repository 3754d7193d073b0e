"""Vector registers as values of Numba: 64 bytes of consecutive numbers, and what is done with them.

Loops over scalars are vectorised by LLVM as it sees fit: a short row ends in its remainder loop,
and every sum is added up across the lanes again and again. Here a row is its vectors and a last
part of one, in so many words. A machine with narrower registers takes several for one vector.

What is not filled by a row's last part is 0, or what `part` is told; it is never stored.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

from portable_softmax.kernels._numba._ir import COMPUTE, FLOAT, narrowed, nothing, widened

LANES = {types.float32: 16, types.float64: 8}
_I1, _I32 = ir.IntType(1), ir.IntType(32)


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
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), constant(_I32, [0] * n))


def as_vector(context: Any, builder: Any, kind: Any, given: Any, value: Any) -> Any:
    """A vector as it is, and a number in every lane."""
    if isinstance(given, Vector):
        return value
    return _splat(builder, context.cast(builder, value, given, kind.dtype), LANES[kind.dtype])


# --------------------------------------------------------------------------- memory


@intrinsic
def lanes(typing, p):
    """How many of the numbers at `p` one vector holds, known when compiling."""
    count = LANES[COMPUTE[p.dtype]]
    return types.intp(p), lambda context, builder, sig, args: ir.Constant(ir.IntType(64), count)


@intrinsic
def aligned(typing, p):
    """The first place from `p` on where a vector takes one line of the cache, not parts of two."""

    def generate(context, builder, signature, args):
        (p,) = args
        whole = ir.IntType(64)
        address = builder.add(builder.ptrtoint(p, whole), ir.Constant(whole, 63))
        return builder.inttoptr(builder.and_(address, ir.Constant(whole, -64)), p.type)

    return p(p), generate


def place_of(builder: Any, p: Any, j: Any, lanes: int) -> Any:
    address = builder.gep(p, [j])
    return builder.bitcast(address, ir.VectorType(address.type.pointee, lanes).as_pointer())


def alignment(context: Any, p: Any) -> int:
    found: int = context.get_abi_alignment(context.get_data_type(p.dtype))
    return found


def _first(builder: Any, k: Any, n: int) -> Any:
    """The mask of the first k lanes."""
    k = builder.trunc(k, _I32)
    return builder.icmp_signed("<", constant(_I32, range(n)), _splat(builder, k, n))


def _masked(builder: Any, name: str, value: Any, place: Any, kind: Any, args: list[Any]) -> Any:
    function = ir.FunctionType(kind, [a.type for a in args])
    lanes, element = value.count, value.element
    width = element.width if isinstance(element, ir.IntType) else {"float": 32, "double": 64}[
        str(element)
    ]  # fmt: skip
    suffix = f"v{lanes}{'i' if isinstance(element, ir.IntType) else 'f'}{width}"
    name = f"llvm.masked.{name}.{suffix}.p0"
    known = builder.module.globals.get(name)
    callee = known or ir.Function(builder.module, function, name)
    return builder.call(callee, args)


@intrinsic
def vector(typing, p, j):
    """The numbers from ``p[j]`` on."""
    kind = vector_of(p)

    def generate(context, builder, signature, args):
        place = place_of(builder, *args, LANES[kind.dtype])
        value = builder.load(place, align=alignment(context, p))
        return widened(builder, p.dtype, value)

    return kind(p, types.intp), generate


@intrinsic
def part(typing, p, j, k, rest):
    """The k numbers from ``p[j]`` on, and `rest` in the other lanes."""
    kind = vector_of(p)

    def generate(context, builder, signature, args):
        at, j, k, rest = args
        n = LANES[kind.dtype]
        place, mask = place_of(builder, at, j, n), _first(builder, k, n)
        rest = as_vector(context, builder, kind, types.float64, rest)
        stored = place.type.pointee
        unread = rest if COMPUTE[p.dtype] == p.dtype else ir.Constant(stored, None)
        align = ir.Constant(_I32, alignment(context, p))
        value = _masked(builder, "load", stored, place, stored, [place, align, mask, unread])
        if unread is rest:
            return value
        return builder.select(mask, widened(builder, p.dtype, value), rest)

    return kind(p, types.intp, types.intp, types.float64), generate


@intrinsic
def put(typing, p, j, value):
    """Store a vector from ``p[j]`` on, each number rounded once; nothing if `p` is an integer."""
    if isinstance(p, types.Integer):
        return types.void(p, types.intp, value), nothing

    def generate(context, builder, signature, args):
        at, j, value = args
        place = place_of(builder, at, j, value.type.count)
        builder.store(narrowed(builder, p.dtype, value), place, align=alignment(context, p))
        return context.get_dummy_value()

    return types.void(p, types.intp, vector_of(p)), generate


@intrinsic
def put_part(typing, p, j, value, k):
    """Store the first k numbers of a vector."""
    if isinstance(p, types.Integer):
        return types.void(p, types.intp, value, types.intp), nothing

    def generate(context, builder, signature, args):
        at, j, value, k = args
        n = value.type.count
        place, mask = place_of(builder, at, j, n), _first(builder, k, n)
        value = narrowed(builder, p.dtype, value)
        align = ir.Constant(_I32, alignment(context, p))
        arguments = [value, place, align, mask]
        _masked(builder, "store", value.type, place, ir.VoidType(), arguments)
        return context.get_dummy_value()

    return types.void(p, types.intp, vector_of(p), types.intp), generate


def _prefetching(write: int) -> Any:
    @intrinsic
    def prefetch(typing, p, j):
        if isinstance(p, types.Integer):
            return types.void(p, types.intp), nothing

        def generate(context, builder, signature, args):
            place = builder.bitcast(builder.gep(args[0], [args[1]]), ir.IntType(8).as_pointer())
            name = "llvm.prefetch.p0"
            numbers = [ir.Constant(_I32, k) for k in (write, 3, 1)]  # to the first cache, as data
            kind = ir.FunctionType(ir.VoidType(), [place.type] + [_I32] * 3)
            known = builder.module.globals.get(name)
            builder.call(known or ir.Function(builder.module, kind, name), [place, *numbers])
            return context.get_dummy_value()

        return types.void(p, types.intp), generate

    return prefetch


# Ask for the line of the cache around ``p[j]``, to be read or to be written; it may lie anywhere.
# Nothing if `p` is an integer.
to_be_read, to_be_written = _prefetching(0), _prefetching(1)


# --------------------------------------------------------------------------- numbers


@intrinsic
def splat(typing, p, number):
    """A number in every lane of a vector of what `p` points to."""
    kind = vector_of(p)

    def generate(context, builder, signature, args):
        return as_vector(context, builder, kind, number, args[1])

    return kind(p, number), generate


def _operator(symbol: Any, name: str) -> None:
    @intrinsic
    def instruction(typing, a, b):
        kind = a if isinstance(a, Vector) else b

        def generate(context, builder, signature, args):
            both = zip((a, b), args, strict=True)
            return getattr(builder, name)(
                *(as_vector(context, builder, kind, *given) for given in both)
            )

        return kind(a, b), generate

    @overload(symbol)
    def choose(a, b):
        if isinstance(a, Vector) or isinstance(b, Vector):
            return lambda a, b: instruction(a, b)
        return None


for _symbol, _name in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _operator(_symbol, _name)


@intrinsic
def over(typing, a, t):
    """``a / t``, for numbers too; an integer `t` stands for 1 and costs nothing."""
    if isinstance(t, types.Integer):
        return a(a, t), lambda context, builder, signature, args: args[0]

    def generate(context, builder, signature, args):
        if isinstance(a, Vector):
            return builder.fdiv(args[0], as_vector(context, builder, a, t, args[1]))
        return builder.fdiv(args[0], context.cast(builder, args[1], t, a))

    return a(a, t), generate


@intrinsic
def product(typing, a, b):
    """``a * b`` for a vector; an integer `b` stands for 1 and costs nothing."""
    if isinstance(b, types.Integer):
        return a(a, b), lambda context, builder, signature, args: args[0]
    return a(a, b), lambda context, builder, signature, args: builder.fmul(*args)


@intrinsic
def times(typing, a, b):
    """``a * b``, 0 where `a` is 0 and `b` infinite; for numbers too."""

    def generate(context, builder, signature, args):
        a, b = args
        zero = ir.Constant(a.type, None)
        left_out = builder.and_(
            builder.fcmp_ordered("==", a, zero),
            # The difference of an infinity to itself is a nan, that of a nan is as well.
            builder.and_(
                builder.fcmp_unordered("uno", builder.fsub(b, b), zero),
                builder.fcmp_ordered("ord", b, zero),
            ),
        )
        return builder.select(left_out, a, builder.fmul(a, b))

    return a(a, a), generate


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Write a * b + c, rounded once."""
    if not isinstance(a.type, ir.VectorType):
        return builder.fma(a, b, c)
    name = f"llvm.fma.v{a.type.count}f{32 if isinstance(a.type.element, ir.FloatType) else 64}"
    kind = ir.FunctionType(a.type, [a.type] * 3)
    known = builder.module.globals.get(name)
    return builder.call(known or ir.Function(builder.module, kind, name), (a, b, c))


@intrinsic
def fma(typing, a, b, c):
    """``a * b + c``, rounded once, for numbers too."""
    return a(a, a, a), lambda context, builder, signature, args: fused(builder, *args)


def greater(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@intrinsic
def larger(typing, a, b):
    """The larger one, `b` where either is nan: one instruction."""
    return a(a, a), lambda context, builder, signature, args: greater(builder, *args)


@intrinsic
def where_finite(typing, a, finite, other):
    """`finite` where `a` is, else `other`, for numbers too."""

    def generate(context, builder, signature, args):
        a, *values = args
        difference = builder.fsub(a, a)
        return builder.select(builder.fcmp_ordered("ord", difference, difference), *values)

    return a(a, a, a), generate


@intrinsic
def where_equal(typing, a, b, same, other):
    """`same` where a == b, else `other`."""

    def generate(context, builder, signature, args):
        a, b, *values = args
        return builder.select(builder.fcmp_ordered("==", a, b), *values)

    return a(a, a, a, a), generate


@intrinsic
def are_finite(typing, a):
    """Whether all lanes are."""

    def generate(context, builder, signature, args):
        difference = builder.fsub(args[0], args[0])
        found = bits(builder, builder.fcmp_unordered("uno", difference, difference))
        return builder.icmp_unsigned("==", found, ir.Constant(found.type, 0))

    return types.boolean(a), generate


def bits(builder: Any, mask: Any) -> Any:
    return builder.bitcast(mask, ir.IntType(mask.type.count))
