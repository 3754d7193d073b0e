"""Logits under a softcap: views that read as cap * tanh(x / cap), and as the slope of that.

The slopes are left in memory as the logits are read, where these lie as the exps do.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from numba import types
from numba.extending import intrinsic, overload, register_model

from portable_softmax.kernels._numba._exp import Writer
from portable_softmax.kernels._numba._jit import INLINED
from portable_softmax.kernels._numba._memory import COMPUTE, View, ViewModel, struct_of, typed
from portable_softmax.kernels._numba._vectors import converted


class _OfCap(View):
    def other(self) -> Any:
        return COMPUTE[self.dtype]


class Capped(_OfCap):
    """Logits that read as cap * tanh(x / cap)."""

    def seen(self, builder: Any, number: Any, x: Any) -> Any:
        return builder.fmul(number, _tanh_and_slope(builder, number, x)[0])


class Recorded(Capped):
    """The same, of which each vector that is read leaves its slopes in memory.

    They have most of their arithmetic in common.
    """

    def other(self) -> Any:
        return types.Tuple((COMPUTE[self.dtype], types.CPointer(COMPUTE[self.dtype])))

    def number(self, builder: Any, other: Any) -> Any:
        return builder.extract_value(other, 0)

    def moved(self, builder: Any, other: Any, n: Any) -> Any:
        return builder.insert_value(other, builder.gep(builder.extract_value(other, 1), [n]), 1)

    def seen_and_left(self, builder: Any, other: Any, number: Any, x: Any) -> Any:
        y, slope = _tanh_and_slope(builder, number, x)
        return builder.fmul(number, y), (builder.extract_value(other, 1), slope)


class Slopes(_OfCap):
    """Logits that read as the slope of their softcap."""

    def seen(self, builder: Any, number: Any, x: Any) -> Any:
        return _tanh_and_slope(builder, number, x)[1]


def _tanh_and_slope(builder: Any, cap: Any, x: Any) -> tuple[Any, Any]:
    """A nan has a slope of 0: a mask may leave it out, and the exp of one that counts is nan."""
    write = Writer(builder, x)
    found: tuple[Any, Any] = write.tanh_and_slope(
        builder.fmul(x, builder.fdiv(write.number(1.0), cap))
    )
    return found


for _view in (Capped, Recorded, Slopes):
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


_capped, sloped = _view_of(Capped), _view_of(Slopes)


@intrinsic
def _recorded(typing, p, cap, place):
    kind = Recorded(p)

    def generate(context, builder, signature, args):
        at, given, place_ = args
        number = context.cast(builder, given, cap, COMPUTE[p.dtype])
        other = struct_of(builder, context.get_value_type(kind.other()), (number, place_))
        return struct_of(builder, context.get_value_type(kind), (at, other))

    return kind(p, cap, place), generate


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
        cap = p.number(builder, builder.extract_value(args[0], 1))
        return p.seen(builder, converted(context, builder, x, COMPUTE[p.dtype], cap), args[1])

    return x(p, x), generate


def capped(p, cap, place):
    """Return `p` under a softcap; None is no cap. The slopes go to `place` unless that is null."""


@overload(capped, jit_options=INLINED)
def _capped_or_not(p, cap, place):
    if isinstance(cap, types.NoneType):
        return lambda p, cap, place: p
    if isinstance(place, types.Integer):
        return lambda p, cap, place: _capped(p, cap)
    return lambda p, cap, place: _recorded(p, cap, place)


def slopes_of(layout: ModuleType) -> Any:
    """Return the function that gives the slopes of a softcap at a group of logits."""

    def slopes(p, cap, place, workspace, T, n, inner, rows):
        """They lie as the exps do; without a cap they are 1."""

    @overload(slopes, jit_options=INLINED)
    def slopes_or_one(p, cap, place, workspace, T, n, inner, rows):
        if isinstance(cap, types.NoneType):
            return lambda p, cap, place, workspace, T, n, inner, rows: typed(workspace, 1.0)
        if not isinstance(place, types.Integer):
            return lambda p, cap, place, workspace, T, n, inner, rows: place

        def fetched(p, cap, place, workspace, T, n, inner, rows):
            return sloped(layout.fetch(p, 0, workspace, T, n, inner, rows), cap)

        return fetched

    return slopes
