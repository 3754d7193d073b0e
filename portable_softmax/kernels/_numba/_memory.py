"""Arrays as pointers, and single numbers.

Rows are read through pointers: no wrap-around of indices to check, so that loops vectorise, and
16-bit numbers become float32 as they are loaded. NumPy's float16 arrives as uint16 and bfloat16
as int16, the same bits under dtypes that Numba passes quickly. The integer 0 is the null pointer:
nothing is stored there.

Numba's `fastmath` would mark every operation of a function. Here only `plus` may be reordered, so
that compensated sums and differences stay as they are written.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

from portable_softmax.kernels._numba._jit import INLINED, function

# What a dtype is computed in.
COMPUTE = {
    types.float32: types.float32,
    types.float64: types.float64,
    types.uint16: types.float32,
    types.int16: types.float32,
}
FLOAT = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)


# --------------------------------------------------------------------------- pointers


class View(types.Type):
    """Logits that read otherwise than they are stored: `pointer` and what else it takes.

    It stands wherever a pointer to logits does, so that no pass knows of options.
    """

    def __init__(self, pointer: Any) -> None:
        self.pointer = pointer
        self.dtype = pointer.dtype
        super().__init__(name=f"{type(self).__name__}({pointer})")

    def other(self) -> Any:
        """The type of what else it takes."""
        raise TypeError("a view says what")

    def seen(self, builder: Any, number: Any, x: Any) -> Any:
        """What a number or vector of the logits reads as."""
        raise TypeError("a view says how")

    def number(self, builder: Any, other: Any) -> Any:
        """What `seen` takes of what else there is."""
        return other

    def moved(self, builder: Any, other: Any, n: Any) -> Any:
        """What else there is, n places ahead."""
        return builder.gep(other, [n]) if isinstance(self.other(), types.CPointer) else other

    def seen_and_left(self, builder: Any, other: Any, number: Any, x: Any) -> Any:
        """What a vector of the logits reads as, and what that leaves in memory: where, and what."""
        return self.seen(builder, number, x), None


class Masked(View):
    """Logits and their mask: those that it leaves out read as -inf."""

    def other(self) -> Any:
        return types.CPointer(types.uint8)


class ViewModel(models.StructModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        members = [("logits", kind.pointer), ("other", kind.other())]
        super().__init__(manager, kind, members)


register_model(Masked)(ViewModel)


def moved(builder: Any, p: Any, at: Any, n: Any) -> Any:
    """A pointer, or a view with its pointers, n places ahead."""
    if not isinstance(p, View):
        return builder.gep(at, [n])
    logits, other = (builder.extract_value(at, i) for i in range(2))
    members = moved(builder, p.pointer, logits, n), p.moved(builder, other, n)
    return struct_of(builder, at.type, members)


def stored(builder: Any, p: Any, at: Any) -> Any:
    """The pointers to what lies in memory: a view's numbers, and its mask."""
    found = []
    while isinstance(p, View):
        at, other = (builder.extract_value(at, i) for i in range(2))
        if isinstance(p, Masked):
            found.append(other)
        p = p.pointer
    return [at, *found]


@intrinsic
def _masked(typing, p, mask):
    def generate(context, builder, signature, args):
        return struct_of(builder, context.get_value_type(signature.return_type), args)

    return Masked(p)(p, mask), generate


def struct_of(builder, kind, members):
    value = ir.Constant(kind, ir.Undefined)
    for i, member in enumerate(members):
        value = builder.insert_value(value, member, i)
    return value


def logits(p, mask, at):
    """Return `p` with its part of a mask, which is repeated along the logits; None is no mask."""


@overload(logits, jit_options=INLINED)
def _logits(p, mask, at):
    if isinstance(mask, types.NoneType):
        return lambda p, mask, at: p
    return lambda p, mask, at: _masked(p, ahead(pointer(mask), at % mask.size))


@intrinsic
def left_out(typing, p, j):
    """Whether a mask leaves the j-th logit out."""

    def generate(context, builder, signature, args):
        if not isinstance(p, Masked):
            return ir.Constant(ir.IntType(1), 0)
        place = builder.gep(builder.extract_value(args[0], 1), [args[1]])
        return builder.icmp_unsigned("==", builder.load(place), ir.Constant(ir.IntType(8), 0))

    return types.boolean(p, types.intp), generate


@intrinsic
def pointer(typing, array):
    """The address of an array's first element."""

    def generate(context, builder, signature, args):
        return cgutils.create_struct_proxy(array)(context, builder, args[0]).data

    return types.CPointer(array.dtype)(array), generate


@intrinsic
def either(typing, p, scratch):
    """`p` if its numbers are those of the computation, else `scratch`, known when compiling."""
    first = COMPUTE[p.dtype] == p.dtype
    chosen = p if first else scratch
    return chosen(p, scratch), lambda context, builder, sig, args: args[0 if first else 1]


@intrinsic
def apart_from(typing, p, scratch, apart):
    """`scratch` if `apart` is not 0 and the two are of one dtype, else `p`."""
    alike = p == scratch

    def generate(context, builder, signature, args):
        wanted = builder.icmp_signed("!=", args[2], args[2].type(0))
        return builder.select(wanted, args[1], args[0]) if alike else args[0]

    return p(p, scratch, apart), generate


@intrinsic
def ahead(typing, p, n):
    """``p + n``; null stays null, and a number in place of an array of equal ones stays, too."""
    if isinstance(p, (types.Integer, types.Float)):
        return p(p, types.intp), lambda context, builder, signature, args: args[0]

    return p(p, types.intp), lambda context, builder, sig, args: moved(builder, p, *args)


@intrinsic
def smaller(typing, a, b):
    """The smaller one of two integers; compiling `min` takes longer."""

    def generate(context, builder, signature, args):
        a, b = args
        return builder.select(builder.icmp_signed("<", b, a), b, a)

    return types.intp(types.intp, types.intp), generate


@intrinsic
def aligned(typing, p):
    """The first place from `p` on where a vector takes one line of the cache, not parts of two."""

    def generate(context, builder, signature, args):
        address = builder.add(builder.ptrtoint(args[0], I64), I64(63))
        return builder.inttoptr(builder.and_(address, I64(-64)), args[0].type)

    return p(p), generate


@intrinsic
def take_next(typing, counter):
    """Add 1 to the integer at `counter`, which other threads add to as well; return it before."""

    def generate(context, builder, signature, args):
        return builder.atomic_rmw("add", args[0], I64(1), "acq_rel")

    return types.int64(counter), generate


# --------------------------------------------------------------------------- half types


def widened(builder, element, value):
    """A number or vector as it is stored in the dtype that it is computed in."""
    if element == types.uint16:
        half = builder.bitcast(value, _like(value, ir.HalfType()))
        return builder.fpext(half, _like(value, ir.FloatType()))
    if element == types.int16:
        bits = builder.shl(builder.zext(value, _like(value, I32)), _constant(value, I32, 16))
        return builder.bitcast(bits, _like(value, ir.FloatType()))
    return value


def narrowed(builder, element, value):
    """A number or vector as it is computed, rounded to the dtype that it is stored in."""
    if element == types.uint16:
        half = builder.fptrunc(value, _like(value, ir.HalfType()))
        return builder.bitcast(half, _like(value, I16))
    if element == types.int16:
        # To nearest, ties to even; a nan keeps its upper bits and stays one.
        bits = builder.bitcast(value, _like(value, I32))
        upper = builder.lshr(bits, _constant(value, I32, 16))
        odd = builder.and_(upper, _constant(value, I32, 1))
        rounded = builder.add(bits, builder.add(odd, _constant(value, I32, 0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", value, value)
        quiet = builder.or_(bits, _constant(value, I32, 0x400000))
        bits = builder.select(is_nan, quiet, rounded)
        upper = builder.lshr(bits, _constant(value, I32, 16))
        return builder.trunc(upper, _like(value, I16))
    return value


def _like(value, scalar):
    kind = value.type
    return ir.VectorType(scalar, kind.count) if isinstance(kind, ir.VectorType) else scalar


def _constant(value, scalar, number):
    kind = _like(value, scalar)
    return ir.Constant(kind, [number] * kind.count if kind is not scalar else number)


# --------------------------------------------------------------------------- numbers


@intrinsic
def load(typing, p, j):
    """``p[j]``, in the dtype of the computation; a number is an array of equal ones."""
    if isinstance(p, types.Float):
        return p(p, types.intp), lambda context, builder, signature, args: args[0]

    def number(builder, p, at, j):
        if not isinstance(p, View):
            return widened(builder, p.dtype, builder.load(builder.gep(at, [j])))
        logits, other = (builder.extract_value(at, i) for i in range(2))
        value = number(builder, p.pointer, logits, j)
        if not isinstance(p, Masked):
            return p.seen(builder, p.number(builder, other), value)
        counts = builder.load(builder.gep(other, [j]))
        counts = builder.icmp_unsigned("!=", counts, ir.Constant(counts.type, 0))
        return builder.select(counts, value, ir.Constant(value.type, -math.inf))

    def generate(context, builder, signature, args):
        return number(builder, p, *args)

    return COMPUTE[p.dtype](p, types.intp), generate


@intrinsic
def store(typing, p, j, value):
    """``p[j] = value``, rounded once."""

    def generate(context, builder, signature, args):
        builder.store(narrowed(builder, p.dtype, args[2]), builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(p, types.intp, COMPUTE[p.dtype]), generate


@function
def copy(p, o, n):
    """Copy n numbers."""
    for j in range(n):
        store(o, j, load(p, j))


@function
def fill(o, n, number):
    """Write one number n times."""
    for j in range(n):
        store(o, j, typed(o, number))


@function
def total(p, n):
    """Return the sum of n numbers, in any order."""
    s = 0.0
    for j in range(n):
        s = plus(s, float(load(p, j)))
    return s


@intrinsic
def typed(typing, p, number):
    """Return a number in the dtype that ``p[j]`` is computed in."""
    kind = COMPUTE[p.dtype]

    def generate(context, builder, signature, args):
        return context.cast(builder, args[1], types.float64, kind)

    return kind(p, types.float64), generate


@intrinsic
def plus(typing, a, b):
    """``a + b``, in any order of a sum."""

    def generate(context, builder, signature, args):
        return builder.fadd(*args, flags=("reassoc", "nsz"))

    return a(a, a), generate
