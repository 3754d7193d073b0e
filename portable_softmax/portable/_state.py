"""The one state that everything is folded into: the maximum, and the rest without it.

    max  = max_j x_j            rest = sum_j exp(x_j - max)  -  1        (one maximum left out)

so that ``logsumexp = max + log1p(rest)`` keeps the digits of a confident row, whose rest is far
below the spacing of numbers near one (the log1p form: SciPy pull request 21597, 2024; the state as
a fold: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from portable_softmax import libraries
from portable_softmax._typing import Namespace
from portable_softmax.libraries import constant, device, namespace, scalar
from portable_softmax.portable._divisor import (
    Divisor,
    divisor,
    ordinary,
    quotient_error,
    times_power_of_2,
)
from portable_softmax.portable._sums import total


class State(NamedTuple):
    """A folded row: every field but `shifted` and `exps` has the reduced axes with length 1."""

    max: Any  # what was subtracted: the row's maximum, a constant for every derivative
    rest: Any  # sum of exps without one maximum
    log: Any  # log1p(rest)
    shifted: Any  # (x - max) / temperature, rounded
    exps: Any  # exp of that, with the rounding error put back


def maximum(xp: Namespace, x: Any, axes: tuple[int, ...]) -> Any:
    """Return the maximum over `axes`, kept with length 1, as a constant.

    Shifting a row changes nothing in exact arithmetic, so the shift needs no derivative.
    """
    if libraries.of(xp).chunked:
        return libraries.of(xp).reduce_chunks(x, axes, _maximum_of_a_chunk)
    if 0 in x.shape:
        shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
        return xp.full(shape, -math.inf, dtype=x.dtype, device=device(x))
    return constant(xp, xp.max(x, axis=axes, keepdims=True))


def _maximum_of_a_chunk(chunk: Any, axis: tuple[int, ...], keepdims: bool) -> Any:
    return maximum(namespace(chunk), chunk, axis)


def fold(
    xp: Namespace,
    x: Any,
    axes: tuple[int, ...],
    *,
    shift: Any = None,
    temperature: float = 1.0,
    attach: Callable[[Any], Any] | None = None,
    sink: Any = None,
) -> State:
    """Fold `x` over `axes` into its state.

    Parameters
    ----------
    shift
        What to subtract, where that is not the maximum.
    sink
        One more entry of every row, that has no place in `shifted` and `exps`.
    attach
        Gives the shifted row another way to be differentiated, without changing its value.
    """
    by = divisor(xp, temperature, x)
    x = times_power_of_2(xp, x, -max(by.exponent, 0))  # first, as the difference may overflow
    m = maximum(xp, x, axes) if shift is None else shift
    if sink is not None:
        sink = times_power_of_2(xp, sink, -max(by.exponent, 0))
        m = greater(xp, m, constant(xp, sink))
    shifted, exps = exponentials(xp, x, m, by, attach)
    # The value of one maximum is left out of the sum, its derivative is not: subtracting the
    # constant 1 keeps both right, to every order and at ties, where masking the entry would not.
    # Terms are at most 1, so the whole part of one says whether it is a maximum.
    is_max = xp.floor(constant(xp, exps))
    rest, maxima = total(xp, exps - is_max, axes), xp.sum(is_max, axis=axes, keepdims=True)
    if sink is not None:
        _, exp_of_sink = exponentials(xp, sink, m, by)
        is_max = xp.floor(constant(xp, exp_of_sink))
        rest, maxima = rest + (exp_of_sink - is_max), maxima + is_max
    rest = rest + (maxima - 1)
    if libraries.of(xp).looks_again(rest):
        n = math.prod([x.shape[a] for a in axes])
        value = constant(xp, rest)
        # Below this the terms of a sum are subnormal numbers, on average.
        few = value < n * float(xp.finfo(x.dtype).smallest_normal)
        if xp.any(few) and xp.any(few & (value > 0)):
            again = _sum_of_subnormals(xp, x, m, by, axes)
            if sink is not None:
                again = again + _sum_of_subnormals(xp, sink, m, by, axes)
            few = few & (value > 0)
            rest = rest + xp.where(few, again - value, scalar(xp, 0.0, value))
    return State(m, rest, xp.log1p(rest), shifted, exps)


def greater(xp: Namespace, m: Any, other: Any) -> Any:
    """Return the greater of two, and nan where `m` is."""
    return xp.where((m >= other) | xp.isnan(m), m, other)


def from_maximum(xp: Namespace, x: Any, m: Any, temperature: float) -> Any:
    """Return (x - m) / temperature."""
    by = divisor(xp, temperature, x)
    # First, as the difference may overflow.
    x, m = (times_power_of_2(xp, part, -max(by.exponent, 0)) for part in (x, m))
    difference = times_power_of_2(xp, x - m, -min(by.exponent, 0))
    return difference if by.high == 1.0 else difference / by.high


def _sum_of_subnormals(xp: Namespace, x: Any, m: Any, by: Divisor, axes: tuple[int, ...]) -> Any:
    """Return the sum of the exponentials that are far below the maximum's, as a constant.

    Each may be a subnormal number, of few digits, where their sum is a normal one. exp(d) as the
    square of exp(d / 2), times a power of 2 for the sum, keeps its digits.
    """
    shifted, error = _differences(xp, constant(xp, x), m, by, None)
    exponent = ordinary(xp, x.dtype)
    root = xp.exp(0.5 * shifted)
    terms = (2.0**exponent * root) * root * (1.0 + error)
    below = (shifted < -1.0) & (root > 0)  # beside an infinity the error is nan
    terms = xp.where(below, terms, scalar(xp, 0.0, terms))
    return total(xp, terms, axes) * 2.0**-exponent


def exponentials(
    xp: Namespace, x: Any, m: Any, by: Divisor, attach: Callable[[Any], Any] | None = None
) -> tuple[Any, Any]:
    """Return (x - m) / temperature, and exp of that with the rounding error put back."""
    shifted, error = _differences(xp, x, m, by, attach)
    exps = xp.exp(shifted)
    # exps + exps * error would be the same, but XLA flushes a subnormal product to 0. Beside an
    # infinity the error is nan and its term 0.
    error = xp.where(constant(xp, exps) > 0, error, scalar(xp, 0.0, error))
    return shifted, exps * (1.0 + error)


def _differences(
    xp: Namespace, x: Any, m: Any, by: Divisor, attach: Callable[[Any], Any] | None
) -> tuple[Any, Any]:
    """Return (x - m) / temperature, and what its rounding lost."""
    difference = x - m
    error = difference_error(xp, x, m, difference)
    shifted = times_power_of_2(xp, difference, -min(by.exponent, 0))
    error = times_power_of_2(xp, error, -min(by.exponent, 0))
    if attach is not None:
        shifted = attach(shifted)
    if by.high != 1.0:
        quotient = shifted / by.high
        error = error / by.high + quotient_error(xp, shifted, quotient, by)
        shifted = quotient
    return shifted, error


def difference_error(xp: Namespace, x: Any, m: Any, difference: Any) -> Any:
    """Return ``(x - m) - fl(x - m)``, exactly where all are finite (Knuth's two-sum, TAOCP 4.2.2).

    A confident row's rest is one exponential of a large difference: half a unit lost in a
    difference of 64 is 32 units lost in the loss. This puts them back to first order.
    """
    own = libraries.of(xp)
    return own.entrywise(_lost, own.constant(x), m, own.constant(difference))


def _lost(x: Any, m: Any, difference: Any) -> Any:
    t = difference - x
    return (x - (difference - t)) - (m + t)
