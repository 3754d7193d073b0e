"""The instructions that the kernels are written in, each with the flags it may bear and no other.

Numba's `fastmath` marks every operation of a function. Here only `plus` may be reordered, so sums
run on all lanes, while differences whose rounding error is put back stay as they are written.

Rows are read through pointers: no wrap-around of indices to check, so that loops vectorise, and
16-bit numbers become float32 as they are loaded. NumPy's float16 arrives as uint16 and bfloat16
as int16, the same bits under dtypes that Numba passes quickly.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numba.np import arrayobj

# What a dtype is computed in.
COMPUTE = {
    types.float32: types.float32,
    types.float64: types.float64,
    types.uint16: types.float32,
    types.int16: types.float32,
}
FLOAT = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
_I16, _I32 = ir.IntType(16), ir.IntType(32)


# --------------------------------------------------------------------------- memory


@intrinsic
def pointer(typing, array):
    """The address of an array's first element."""

    def generate(context, builder, signature, args):
        return arrayobj.make_array(array)(context, builder, args[0]).data

    return types.CPointer(array.dtype)(array), generate


@intrinsic
def either(typing, row, scratch):
    """`row` if its numbers are those of the computation, else `scratch`, known when compiling."""
    first = COMPUTE[row.dtype] == row.dtype
    chosen = row if first else scratch
    return chosen(row, scratch), lambda context, builder, sig, args: args[0 if first else 1]


@intrinsic
def ahead(typing, p, n):
    """``p + n``; the integer 0 stands for nowhere and stays 0."""
    if isinstance(p, types.Integer):
        return p(p, types.intp), lambda context, builder, signature, args: args[0]

    def generate(context, builder, signature, args):
        return builder.gep(args[0], [args[1]])

    return p(p, types.intp), generate


def widened(builder, element, value):
    if element == types.uint16:
        return builder.fpext(
            builder.bitcast(value, _like(value, ir.HalfType())), _like(value, ir.FloatType())
        )
    if element == types.int16:
        bits = builder.shl(builder.zext(value, _like(value, _I32)), _many(value, _I32, 16))
        return builder.bitcast(bits, _like(value, ir.FloatType()))
    return value


def narrowed(builder, element, value):
    if element == types.uint16:
        return builder.bitcast(
            builder.fptrunc(value, _like(value, ir.HalfType())), _like(value, _I16)
        )
    if element == types.int16:
        # To nearest, ties to even; a nan keeps its upper bits and stays one.
        bits = builder.bitcast(value, _like(value, _I32))
        odd = builder.and_(builder.lshr(bits, _many(value, _I32, 16)), _many(value, _I32, 1))
        rounded = builder.add(bits, builder.add(odd, _many(value, _I32, 0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", value, value)
        quiet = builder.or_(bits, _many(value, _I32, 0x400000))
        bits = builder.select(is_nan, quiet, rounded)
        return builder.trunc(builder.lshr(bits, _many(value, _I32, 16)), _like(value, _I16))
    return value


def _like(value, scalar):
    """The type of `scalar`, with as many lanes as `value` has."""
    kind = value.type
    return ir.VectorType(scalar, kind.count) if isinstance(kind, ir.VectorType) else scalar


def _many(value, scalar, number):
    kind = _like(value, scalar)
    return ir.Constant(kind, [number] * kind.count if kind is not scalar else number)


def nothing(context, builder, signature, args):
    """Generate nothing: what is done where a pointer is the integer 0."""
    return context.get_dummy_value()


@intrinsic
def load(typing, p, j):
    """``p[j]``, in the dtype of the computation."""

    def generate(context, builder, signature, args):
        return widened(builder, p.dtype, builder.load(builder.gep(args[0], [args[1]])))

    return COMPUTE[p.dtype](p, types.intp), generate


@intrinsic
def store(typing, p, j, value):
    """``p[j] = value``, rounded once; nothing where `p` is an integer."""
    if isinstance(p, types.Integer):
        return types.void(p, types.intp, value), nothing

    def generate(context, builder, signature, args):
        builder.store(narrowed(builder, p.dtype, args[2]), builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(p, types.intp, COMPUTE[p.dtype]), generate


@njit(nogil=True, error_model="numpy")
def copy(p, o, n):
    """Copy n numbers."""
    for j in range(n):
        store(o, j, load(p, j))


# --------------------------------------------------------------------------- numbers


@intrinsic
def typed(typing, p, number):
    """Return a number in the dtype that ``p[j]`` is computed in."""
    kind = COMPUTE[p.dtype]

    def generate(context, builder, signature, args):
        return context.cast(builder, args[1], types.float64, kind)

    return kind(p, types.float64), generate


@intrinsic
def maximum(typing, a, b):
    """The larger one, nan if either is."""

    def generate(context, builder, signature, args):
        kind = FLOAT[a]
        function = builder.module.declare_intrinsic(
            "llvm.maximum", [kind], ir.FunctionType(kind, [kind, kind])
        )
        return builder.call(function, args)

    return a(a, a), generate


@intrinsic
def plus(typing, a, b):
    """``a + b``, in any order of a sum."""

    def generate(context, builder, signature, args):
        return builder.fadd(*args, flags=("reassoc", "nsz"))

    return a(a, a), generate


@intrinsic
def chosen(typing, condition, a, b):
    """`a` where the condition holds, else `b`, without a branch."""

    def generate(context, builder, signature, args):
        return builder.select(*args)

    return a(types.boolean, a, a), generate
