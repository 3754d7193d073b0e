"""Logits under a softcap: views that read as cap * tanh(x / cap), and as the slope of that.

The slope 1 - tanh**2 is written as 1 / cosh**2, which keeps its digits where tanh is close to 1.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from numba import types
from numba.extending import intrinsic, overload, register_model

from portable_softmax.kernels._numba._exp import DOWN, Writer
from portable_softmax.kernels._numba._jit import INLINED
from portable_softmax.kernels._numba._memory import COMPUTE, View, ViewModel, struct_of, typed
from portable_softmax.kernels._numba._vectors import converted


class _OfCap(View):
    def other(self) -> Any:
        return COMPUTE[self.dtype]


class Capped(_OfCap):
    """Logits that read as cap * tanh(x / cap)."""

    def seen(self, builder: Any, cap: Any, x: Any) -> Any:
        write = Writer(builder, x)
        ratio = builder.fmul(x, builder.fdiv(write.number(1.0), cap))
        bounded = builder.fmul(cap, write.tanh(ratio))
        # Where x / cap may underflow this is x.
        small = builder.fcmp_ordered("<", write.size(ratio), write.number(2.0**-30))
        return builder.select(small, x, bounded)


class Slopes(_OfCap):
    """Logits that read as the slope of their softcap."""

    def seen(self, builder: Any, cap: Any, x: Any) -> Any:
        write = Writer(builder, x)
        ratio = builder.fmul(write.size(x), builder.fdiv(write.number(1.0), cap))
        e = write.exp_up(builder.fmul(write.number(-2.0), ratio))
        both = write.fma(e, write.number(DOWN), write.number(1.0))
        return builder.fdiv(builder.fmul(e, write.number(4 * DOWN)), builder.fmul(both, both))


for _view in (Capped, Slopes):
    register_model(_view)(ViewModel)


def _view_of(view: Any) -> Any:
    @intrinsic
    def of(typing, p, cap):
        kind = view(p)

        def generate(context, builder, signature, args):
            number = context.cast(builder, args[1], cap, kind.other())
            return struct_of(builder, context.get_value_type(kind), (args[0], number))

        return kind(p, cap), generate

    return of


_capped, _slopes = _view_of(Capped), _view_of(Slopes)


@intrinsic
def uncapped(typing, p):
    """What is under a softcap, which does not change which logit is the largest."""
    if not isinstance(p, Capped):
        return p(p), lambda context, builder, signature, args: args[0]
    return p.pointer(p), lambda context, builder, sig, args: builder.extract_value(args[0], 0)


@intrinsic
def seen_by(typing, p, x):
    """What a number or vector of ``uncapped(p)`` reads as at `p`."""

    def generate(context, builder, signature, args):
        if not isinstance(p, Capped):
            return args[1]
        cap = builder.extract_value(args[0], 1)
        return p.seen(builder, converted(context, builder, x, p.other(), cap), args[1])

    return x(p, x), generate


def capped(p, cap):
    """Return `p` under a softcap; None is no cap."""


@overload(capped, jit_options=INLINED)
def _capped_or_not(p, cap):
    if isinstance(cap, types.NoneType):
        return lambda p, cap: p
    return lambda p, cap: _capped(p, cap)


def slopes_of(layout: ModuleType) -> Any:
    """Return the function that gives the slopes of a softcap at a group of logits."""

    def slopes(p, cap, workspace, T, n, inner, rows):
        """They lie as the exps do; without a cap they are 1."""

    @overload(slopes, jit_options=INLINED)
    def slopes_or_one(p, cap, workspace, T, n, inner, rows):
        if isinstance(cap, types.NoneType):
            return lambda p, cap, workspace, T, n, inner, rows: typed(workspace, 1.0)

        def fetched(p, cap, workspace, T, n, inner, rows):
            return _slopes(layout.fetch(p, 0, workspace, T, n, inner, rows), cap)

        return fetched

    return slopes
