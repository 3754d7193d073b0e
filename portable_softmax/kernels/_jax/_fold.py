"""Fold rows into (max, rest) in the form that XLA compiles best: arithmetic, and no branch.

XLA sums a row at the speed of memory where the terms are plain arithmetic on the logits. A
comparison or a select among them makes its CPU compiler write an array of the logits' size first,
and so does a subexpression that two sums share. So what has to depend on an entry is made by
minimum and maximum, and an array is written only where that has been seen to take no longer: half
the differences of rows within a block, with marks at maxima, and the terms over a temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

Axes = tuple[int, ...]

# A call within a program is a part of it from its tracing on: its lowering sees what has made its
# arrays. Since JAX 0.12 that is no longer what `inline=True` means.
_EARLY = jax.Inline.JAX_EARLY if hasattr(jax, "Inline") else True


def compiled(*static: str) -> Callable[[Any], Any]:
    """Return a decorator: one compiled program for an eager call, and for the named arguments."""
    return partial(jax.jit, static_argnames=static, inline=_EARLY)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def fold(x: Any, scale: Any, axes: Axes) -> tuple[Any, Any]:
    """Return the maximum, and the rest of the rows over the temperature; no reduced axes.

    The maximum, that of x, is a constant for every derivative: nothing depends on what is
    subtracted. The rest is nan in a row that has one, whose maximum may be a number, and else -2
    beside an infinite maximum: its log1p is nan. `scale` is that of `scale_of`.
    """
    x, axes = in_blocks(x, axes)
    m = jnp.max(x, axis=axes)
    # XLA on a CPU may drop a nan from maxima and minima (openxla/xla 21461). Beside a finite number
    # the sum of the terms is nan in rows that have one, and in no other.
    shift = finite(m)
    if scale is None:
        terms, maxima = _sums(x, shift, axes)
    else:
        terms, maxima = _tempered_sums(x, m, shift, scale, axes)
    return m, select(lax.is_finite(m) | (terms != terms), terms + (maxima - 1.0), -2.0)


def finite(m: Any) -> Any:
    """Return the nearest number that is finite."""
    most = float(jnp.finfo(m.dtype).max)
    return lax.clamp(jnp.asarray(-most, m.dtype), m, jnp.asarray(most, m.dtype))


def _sums(x: Any, m: Any, axes: Axes) -> tuple[Any, Any]:
    """Return the sum of the terms that are no maximum, and how many there are that are one.

    Where a scan is differentiated in reverse and then forward, JAX drops the rule of `fold` and
    differentiates this instead: it is right, as then the maximum is no constant either.
    """
    big = jnp.asarray(jnp.finfo(x.dtype).max, x.dtype)
    c, unit, power = reference(x, m, big, axes)
    n = lax.stop_gradient(m)
    *outer, inner = sorted(axes)
    if outer:
        rest, maxima = _sums_of_blocks(x, n, c, power, big, axes)
    else:
        rest, maxima = _sums_of_short_rows(x, n, c, power, inner)
    return rest / unit, maxima


def _sums_of_short_rows(x: Any, n: Any, c: Any, power: Any, axis: int) -> tuple[Any, Any]:
    """Return both from half the differences, which are written: below all others at a maximum.

    What is written may depend on an entry at no cost. The mark's exponential is 0, and a sum of
    marks is exact: what else there is in it is less than its last digit.
    """
    n, c = lax.optimization_barrier((n, c))  # else XLA writes what is spread twice
    half = (x - spread(c, x, (axis,))) * 0.5
    half = select(half < _NOTHING, lax.full_like(x, _NOTHING), half)
    half = select(x == spread(n, x, (axis,)), lax.full_like(x, _MAXIMUM), half)
    root = jnp.exp(half)
    rest = jnp.sum(root * spread(power, x, (axis,)) * root, axis=axis)
    return rest, jnp.sum(lax.stop_gradient(half), axis=axis) / _MAXIMUM


# Half a difference that has no exponential, and the mark of a maximum.
_NOTHING, _MAXIMUM = -(2.0**14), -(2.0**100)


def _sums_of_blocks(x: Any, n: Any, c: Any, power: Any, big: Any, axes: Axes) -> tuple[Any, Any]:
    """Return both from long rows, of which nothing is written, their maxima being found twice."""
    *first, inner = sorted(axes)
    outer = tuple(first)

    def others(n: Any, power: Any, big: Any) -> Any:
        found = lax.min((spread(n, x, axes) - x) * big, spread(power, x, axes))
        return lax.stop_gradient(found)

    n = lax.optimization_barrier(n)  # else XLA writes what is spread twice
    root = jnp.exp((x - spread(c, x, axes)) * 0.5)
    rest = sum_of(root * others(n, power, big) * root, axes)
    # The two sums are no one operation, and would have XLA write what they share.
    sums = apart(jnp.sum(others(*lax.optimization_barrier((n, power, big))), axis=inner))
    maxima = x.shape[inner] - sums / spread(power, sums, outer)
    return rest, jnp.sum(maxima, axis=outer)


def _tempered_sums(x: Any, m: Any, shift: Any, scale: Any, axes: Axes) -> tuple[Any, Any]:
    """Return the same over the temperature.

    A term takes so many operations that it is best written: once, and -1 for each maximum.
    """
    # Else XLA writes what is spread here and by the caller.
    m, shift = lax.optimization_barrier((m, shift))
    terms = tempered_terms(x, shift, scale, axes)
    entries = select(x == spread(m, x, axes), lax.full_like(x, -1.0), terms)
    # As twice the smaller of an entry and 0, but for a nan.
    found = lax.stop_gradient(entries)
    maxima = sum_of(lax.abs(found) - found, axes) * 0.5
    terms = sum_of(lax.max(entries, lax.full_like(x, 0.0)), axes)
    return terms + (maxima - maxima), maxima


@fold.defjvp
def _fold_jvp(axes: Axes, primals: Any, tangents: Any) -> Any:
    (x, scale), (t, _) = primals, tangents
    m, rest = fold(x, scale, axes)
    terms, unit = exps(x, m, scale, axes)
    finite = lax.is_finite(m)  # another row has the derivative 0
    change = select(spread(finite, x, axes), terms * t, 0.0)
    change = jnp.sum(change, axis=axes) / select(finite, unit, 1.0)
    change = change if scale is None else change * inverse_temperature(scale)
    return (m, rest), (jnp.zeros_like(m), change)


def exps(x: Any, m: Any, scale: Any, axes: Axes) -> tuple[Any, Any]:
    """Return exp((x - max) / temperature) times a number of the row, and that number."""
    exp, unit = exps_by(x, m, scale, axes)
    return exp(x, axes), unit


def exps_by(x: Any, m: Any, scale: Any, axes: Axes) -> tuple[Callable[[Any, Axes], Any], Any]:
    """Return the function that returns them, of the rows or of what lacks their axes."""
    if scale is not None:
        return lambda x, axes: jnp.exp(shifted(x, m, scale, axes)), jnp.ones_like(m)
    c, power = base(x, m, axes)

    def exp(x: Any, axes: Axes) -> Any:
        terms = jnp.exp(x - spread(c, x, axes))
        return terms if power is None else terms * spread(power, x, axes)

    unit = jnp.exp(m - c)
    return exp, unit if power is None else unit * power


def reference(x: Any, m: Any, big: Any, axes: Axes) -> tuple[Any, Any, Any]:
    """Return c, exp(max - c) * power and the power, for roots of a row's exponentials.

    exp(x - max) is exp((x - c) / 2) squared, times the power, over the second of these numbers.

    A confident row's rest is one exponential of a large difference. Let L be the largest one that
    counts, beyond which an exponential underflows. Below 0 the integer c below the maximum makes
    x - c as good as exact. From 2L on the maximum itself does, as each x that counts is within a
    factor of 2 of it (Sterbenz). In between twice the maximum's distance from L does. There the
    exponential of x - c may leave the range of the dtype, but that of (x - c) / 2 doesn't. The
    power of 2 keeps the sum in range, and where XLA would flush terms to 0 of which a sum of many
    is not, it is large.
    """
    info = jnp.finfo(x.dtype)
    limit, bits = -math.log(float(info.tiny)), _count(x, axes).bit_length()
    between = jnp.ceil((m - limit) * 32.0) * 0.0625
    c = lax.stop_gradient(jnp.maximum(jnp.floor(jnp.minimum(m, 0.0)), jnp.minimum(m, between)))
    gap = m - c
    power = jnp.minimum((40.0 - gap) * big, 2.0**40)
    # XLA would make one operation of two constant bounds, which its fast library does not have.
    least = lax.optimization_barrier(jnp.asarray(2.0**-bits, x.dtype))
    power = lax.stop_gradient(lax.max(power, jnp.broadcast_to(least, m.shape)))
    return c, jnp.exp(gap) * power, power


def _count(x: Any, axes: Axes) -> int:
    """Return how many entries a row has, or a bound."""
    return max(math.prod(n if isinstance(n := x.shape[a], int) else 1 << 31 for a in axes), 1)


def softmax_of(x: Any, m: Any, rest: Any, scale: Any, axes: Axes) -> Any:
    """Return exp((x - max) / temperature) / (1 + rest)."""
    terms, unit = exps(x, m, scale, axes)
    rest = select(lax.is_finite(m), rest, math.nan)
    return terms * spread(1.0 / (unit * (1.0 + rest)), x, axes)


def base(x: Any, m: Any, axes: Axes) -> tuple[Any, Any]:
    """Return c and a power of 2: exp(x - c) * power is as good as if x - c were not rounded.

    Half a unit lost in a difference of 64 is 32 units of its exponential. So c is 0 for a maximum
    that is neither negative nor so large that a sum leaves the range, and else an integer: beside
    that each x that counts is negative as well, or large, or at most 8 below it. XLA divides by a
    sum as it multiplies by its inverse, which it takes for 0 where that is subnormal. A long row's
    sum would need a larger c, and have such x further below; there the power keeps it in range.
    None is 1. From a large maximum on c is as large, since from a huge one no smaller number is
    within the range of the exponential.
    """
    count = _count(x, axes)
    bits = count.bit_length() if count > _BLOCK else 0
    far = -math.log(float(jnp.finfo(x.dtype).tiny)) - 1.01 - (0.0 if bits else math.log(count))
    c = jnp.maximum(m - far, 0.0) + jnp.maximum(m - 4.0 * far, 0.0)
    c = jnp.floor(lax.min(m, c))
    return c, select(m - c > far - bits, lax.full_like(m, 2.0**-bits), 1.0) if bits else None


def shifted(x: Any, m: Any, scale: Any, axes: Axes) -> Any:
    """Return (x - max) / temperature."""
    if scale is None:
        return x - spread(m, x, axes)
    d = x * scale[2] - spread(m * scale[2], x, axes)
    # Else the product and what is subtracted from it may become one operation for some rows only.
    return select(d < jnp.inf, d * (scale[0] + scale[1]), d)


def scale_of(temperature: float, dtype: Any) -> Any:
    """Return 1 / temperature as ``(high + low) * step``; None for 1.

    `high` has half the digits, so that its product with half of a difference's digits is exact, and
    `low` the others. A logit times `step`, a power of 2, keeps differences from overflowing; a high
    temperature takes a smaller one, as XLA would flush a subnormal `low` to 0.
    """
    if temperature == 1.0:
        return None
    step = Fraction(1, 4 if temperature < 2.0**60 else 2**64)
    exact = 1 / (Fraction(temperature) * step)
    unit = Fraction(2) ** (math.frexp(float(exact))[1] - np.finfo(dtype).nmant // 2)
    high = round(exact / unit) * unit
    return np.asarray([float(high), float(exact - high), float(step)], dtype)


def inverse_temperature(scale: Any) -> Any:
    """Return 1 / temperature."""
    return (scale[0] + scale[1]) * scale[2]


def tempered_terms(x: Any, m: Any, scale: Any, axes: Axes) -> Any:
    """Return exp((x - max) / temperature), the errors of difference and product put back.

    With half the digits of each, the product is exact. What is left over is a sum of small parts,
    right whether or not the compiler contracts it, and its exponential is a short series. The
    difference's error is that of Knuth's two-sum.
    """
    high, low, step = scale
    x, m = x * step, spread(m * step, x, axes)
    d = x - m
    back = d - x
    error = (x - (d - back)) - (m + back)
    d_high = half_of_its_digits(d)
    left = d_high * low + ((d - d_high) + error) * (high + low)
    left = select(jnp.abs(left) < 1.0, left, 0.0)  # it is larger beside an infinity only
    # A factor, as XLA would flush a subnormal correction to 0.
    return jnp.exp(d_high * high) * (1.0 + left * (1.0 + left / 2.0 * (1.0 + left / 3.0)))


def half_of_its_digits(x: Any) -> Any:
    """Round to half the digits of the dtype: the product of two such numbers is exact."""
    info = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, info.nexp, info.nmant // 2)


# A sum of n terms, added one after the other, is off by up to n/16 units in the last place.
_BLOCK = 512


def in_blocks(x: Any, axes: Axes, neutral: float = -math.inf) -> tuple[Any, Axes]:
    """Split long axes into blocks, each an axis: a view where the length has good divisors."""
    shape: list[Any] = []
    found: list[int] = []
    for axis, n in enumerate(x.shape):
        parts = [n]
        if axis in axes and isinstance(n, int):  # not symbolic
            while parts[0] > _BLOCK:
                part = next(d for d in range(_BLOCK, 0, -1) if parts[0] % d == 0)
                if part < _BLOCK // 32:
                    short = -n % _BLOCK
                    x = jnp.pad(
                        x,
                        [(0, short if a == axis else 0) for a in range(x.ndim)],
                        constant_values=neutral,
                    )
                    parts = [n + short]
                    part = _BLOCK
                parts[:1] = [parts[0] // part, part]
        if axis in axes:
            found += range(len(shape), len(shape) + len(parts))
        shape += parts
    return (x, axes) if len(shape) == x.ndim else (jnp.reshape(x, shape), tuple(found))


def sum_of(x: Any, axes: Axes) -> Any:
    """Sum what is not negative over one axis after the other."""
    *outer, inner = sorted(axes)
    x = jnp.sum(x, axis=inner)
    for axis in reversed(outer):
        x = jnp.sum(apart(x), axis=axis)
    return x


def apart(x: Any) -> Any:
    """Return what is not negative as it is, between two sums that XLA would merge into one."""
    return select(x < 0.0, lax.full_like(x, 0.0), x)


def wide(rows: Any, axes: Axes) -> Any:
    """Give the reduced axes back to what there is one of a row, with the length 1."""
    return jnp.expand_dims(rows, axes)


def spread(rows: Any, x: Any, axes: Axes) -> Any:
    """Give each entry of x what there is one of a row: in one instruction, as `wide` needs four."""
    return lax.broadcast_in_dim(rows, x.shape, [a for a in range(x.ndim) if a not in axes])


def select(which: Any, yes: Any, no: Any) -> Any:
    """`jnp.where` of one shape, which a program has no function for; `no` may be a number."""
    return lax.select(which, yes, lax.full_like(yes, no) if isinstance(no, float) else no)
