"""The instructions that the kernels are written in, each with the flags it may bear and no other.

Numba's `fastmath` marks every operation of a function. Here only `plus` may be reordered, so sums
run on all lanes, while differences whose rounding error is put back stay as they are written.

Rows are read through pointers: no wrap-around of indices to check, so that loops vectorise, and
16-bit numbers become float32 as they are loaded. NumPy's float16 arrives as uint16 and bfloat16
as int16, the same bits under dtypes that Numba passes quickly.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np import arrayobj

# What a dtype is computed in.
COMPUTE = {
    types.float32: types.float32,
    types.float64: types.float64,
    types.uint16: types.float32,
    types.int16: types.float32,
}
_FLOAT = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
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


def _widened(builder, element, value):
    if element == types.uint16:
        return builder.fpext(
            builder.bitcast(value, _like(value, ir.HalfType())), _like(value, ir.FloatType())
        )
    if element == types.int16:
        bits = builder.shl(builder.zext(value, _like(value, _I32)), _many(value, _I32, 16))
        return builder.bitcast(bits, _like(value, ir.FloatType()))
    return value


def _narrowed(builder, element, value):
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


@intrinsic
def load(typing, p, j):
    """``p[j]``, in the dtype of the computation."""

    def generate(context, builder, signature, args):
        return _widened(builder, p.dtype, builder.load(builder.gep(args[0], [args[1]])))

    return COMPUTE[p.dtype](p, types.intp), generate


@intrinsic
def store(typing, p, j, value):
    """``p[j] = value``, rounded once."""

    def generate(context, builder, signature, args):
        builder.store(_narrowed(builder, p.dtype, args[2]), builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(p, types.intp, COMPUTE[p.dtype]), generate


@intrinsic
def store_if(typing, p, j, value):
    """``p[j] = value``, or nothing where `p` is an integer."""
    if isinstance(p, types.Integer):
        nothing = lambda context, builder, signature, args: context.get_dummy_value()  # noqa: E731
        return types.void(p, types.intp, value), nothing

    def generate(context, builder, signature, args):
        builder.store(_narrowed(builder, p.dtype, args[2]), builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(p, types.intp, COMPUTE[p.dtype]), generate


# --------------------------------------------------------------------------- tiles


def _transpose(n: int) -> Any:
    """Return the function that copies a square of n rows and columns, rows to columns."""

    @intrinsic
    def transpose(typing, source, step, target, target_step):
        a, b = source.dtype, target.dtype

        def generate(context, builder, signature, args):
            source, step, target, target_step = args

            def at(p, stride, i, element):
                lanes = ir.VectorType(context.get_data_type(element), n).as_pointer()
                index = builder.mul(stride, ir.Constant(stride.type, i))
                return builder.bitcast(builder.gep(p, [index]), lanes)

            def alignment(element):
                return context.get_abi_alignment(context.get_data_type(element))

            rows = []
            for i in range(n):
                row = builder.load(at(source, step, i, a), align=alignment(a))
                rows.append(_widened(builder, a, row))
            # log2(n) rounds: each exchanges halves of pairs of rows that are `half` apart.
            half = n // 2
            while half:
                low = [k if not k & half else n + k - half for k in range(n)]
                high = [k + half if not k & half else n + k for k in range(n)]
                for i in range(n):
                    if not i & half:
                        pair = rows[i], rows[i + half]
                        rows[i], rows[i + half] = (
                            _shuffled(builder, *pair, m) for m in (low, high)
                        )
                half //= 2
            for i in range(n):
                value = _narrowed(builder, b, rows[i])
                builder.store(value, at(target, target_step, i, b), align=alignment(b))
            return context.get_dummy_value()

        return types.void(source, types.intp, target, types.intp), generate

    return transpose


transpose4, transpose8 = _transpose(4), _transpose(8)


def _shuffled(builder, x, y, mask):
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(mask)), mask))


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
        kind = _FLOAT[a]
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
def over(typing, a, t):
    """``a / t``; an integer `t` stands for 1 and costs nothing."""
    if isinstance(t, types.Integer):
        return a(a, t), lambda context, builder, signature, args: args[0]

    def generate(context, builder, signature, args):
        return builder.fdiv(args[0], context.cast(builder, args[1], t, a))

    return a(a, t), generate


@intrinsic
def fma(typing, a, b, c):
    """``a * b + c``, rounded once."""
    return a(a, a, a), lambda context, builder, signature, args: builder.fma(*args)


@intrinsic
def chosen(typing, condition, a, b):
    """`a` where the condition holds, else `b`, without a branch."""

    def generate(context, builder, signature, args):
        return builder.select(*args)

    return a(types.boolean, a, a), generate
