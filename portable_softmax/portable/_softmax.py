"""softmax, log_softmax, logsumexp and their vector-Jacobian products, in the standard alone.

Arrays are real floating (complex for `logsumexp`), reduced axes are non-negative and not empty.
"""

from __future__ import annotations

import math
from typing import Any

from portable_softmax import libraries
from portable_softmax._typing import Namespace
from portable_softmax.libraries import cast, constant, device, scalar
from portable_softmax.portable._state import fold, from_maximum, greater, maximum
from portable_softmax.portable._sums import total

Axes = tuple[int, ...]


# --------------------------------------------------------------------------- masks


def with_axes(x: Any, ndim: int) -> Any:
    """Return an array with axes of length 1 in front, as many as are missing."""
    return x[(*(None,) * (ndim - x.ndim), ...)]


def masked(xp: Namespace, x: Any, where: Any, axes: Axes) -> tuple[Any, Any]:
    """Give masked entries the logit -inf, and rows without any other entry the logits 0.

    Returns the new row and which rows have an entry at all. What the mask hides reaches neither a
    value nor a derivative. A row of zeros keeps every derivative of an empty row finite; the caller
    overwrites its values.
    """
    where = with_axes(where, x.ndim)
    some = xp.any(where, axis=axes, keepdims=True)
    x = xp.where(where, x, scalar(xp, -math.inf, x))
    return xp.where(some, x, scalar(xp, 0.0, x)), some


# --------------------------------------------------------------------------- softmax


def softmax(
    xp: Namespace,
    x: Any,
    axes: Axes,
    *,
    where: Any = None,
    temperature: float = 1.0,
    sink: Any = None,
) -> Any:
    """exp(x - max) / sum(exp(x - max)): the common factor exp(-max) cancels.

    The sink is one more term of the sum; its axes are those of a reduction.
    """
    if where is not None:
        x, _ = masked(xp, x, where, axes)
    m = maximum(xp, x, axes)
    if sink is not None:
        sink = laid_out(xp, sink, x)
        m = greater(xp, m, constant(xp, sink))
    exps = xp.exp(from_maximum(xp, x, m, temperature))
    s, more = total(xp, exps, axes), None
    if sink is not None:
        more = xp.exp(from_maximum(xp, sink, m, temperature))
        s = s + more
    y = exps / s
    if libraries.of(xp).follows(x):
        # A term of the value 0, with which what flows back is less a constant: see `softmax_vjp`.
        whole = total(xp, y, axes)
        whole = whole if more is None else whole + more / s
        y = y - cast(xp, confident(xp, y), y.dtype) * (whole - constant(xp, whole))
    return y if where is None else xp.where(where, y, scalar(xp, 0.0, y))


def softmax_vjp(xp: Namespace, y: Any, dy: Any, axes: Axes, *, rounding: float = 0.0) -> Any:
    """y * (dy - sum(y*dy)): dx_j = sum_i dy_i y_i (delta_ij - y_j).

    A constant added to dy changes nothing where y sums to 1. Less its value at a confident entry,
    dy is 0 there, and the sum is that of the others: what 1 - y has lost is not needed.

    Derivatives are those of the formula for any y, which need not sum to 1.
    """
    zero = scalar(xp, 0.0, y)
    whole = total(xp, y, axes)
    c = total(xp, xp.where(confident(xp, y), dy, zero), axes)
    c = xp.where(sums_to_one(xp, c, whole, rounding), c, zero)
    whole = xp.where(xp.isfinite(whole), whole, zero)
    dy = dy - c
    # The derivative by y of sum(y*dy) has the whole dy, which a term of the value 0 brings back.
    return y * (dy - (total(xp, y * dy, axes) + c * (whole - constant(xp, whole))))


def softmax_vjp_sums(xp: Namespace, y: Any, dy: Any, axes: Axes) -> tuple[Any, ...]:
    """Return what a part of a row adds to the sums that `softmax_vjp_of` needs.

    They are those of y, dy and y*dy at a confident entry, and those of y and y*dy at the others.
    """
    zero, big, products = scalar(xp, 0.0, y), confident(xp, y), y * dy
    at = [xp.where(big, a, zero) for a in (y, dy, products)]
    others = [xp.where(big, zero, a) for a in (y, products)]
    return tuple(total(xp, a, axes) for a in (*at, *others))


def softmax_vjp_of(
    xp: Namespace, y: Any, dy: Any, sums: tuple[Any, ...], *, rounding: float = 0.0
) -> Any:
    """y * (dy - sum(y*dy)) of a part, as `softmax_vjp` has it, from the sums of whole rows."""
    p, c, product, rest, s = sums
    fits = sums_to_one(xp, c, p + rest, rounding) & (product == p * c)  # there is one such entry
    s = xp.where(fits, s - c * rest, s + product)
    return y * ((dy - xp.where(fits, c, scalar(xp, 0.0, c))) - s)


# Two entries above it do not sum to 1, however they are rounded.
CONFIDENT = 0.75

LOG_CONFIDENT = -0.5
"""From this logarithm of a probability on, 1 - exp(log_y) loses digits."""


def confident(xp: Namespace, y: Any) -> Any:
    """Return where an entry is confident: one of a row at most, if that is a softmax."""
    return y > scalar(xp, CONFIDENT, y)


# By the name of a dtype that is narrower than what is computed in: how far from a number, relative
# to it, its rounded value may be.
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


def sums_to_one(xp: Namespace, c: Any, whole: Any, rounding: float) -> Any:
    """Return which rows are those of a softmax, by their sums, whose `c` is finite.

    `rounding` is that of their entries where they come from a narrower dtype.
    """
    off = scalar(xp, off_one(float(xp.finfo(whole.dtype).eps), rounding), whole)
    return xp.isfinite(c) & (xp.abs(whole - scalar(xp, 1.0, whole)) <= off)


def off_one(eps: float, rounding: float) -> float:
    """Return how far from 1 rounding may leave the sum of a softmax's row.

    What its entries were divided by may be a sum of equal terms beside a 1, which a library adds up
    with errors in one direction: 17 eps were seen, in torch's sums of 100,000.
    """
    return 32.0 * eps + rounding


def softmax_jacobian(xp: Namespace, y: Any, axis: int) -> Any:
    """diag(y) - y y^T over the last two axes, the class axis moved there."""
    y = xp.permute_dims(y, (*(a for a in range(y.ndim) if a != axis), axis))
    n = y.shape[-1]
    eye = xp.eye(n, dtype=y.dtype, device=device(y))
    rows, columns = y[..., :, None], y[..., None, :]
    # y_i (1 - y_i) as y_i times the sum of the others keeps the digits of a confident row.
    others = total(xp, xp.where(eye == 1, scalar(xp, 0.0, y), columns), (y.ndim,))
    return xp.where(eye == 1, rows * others, -rows * columns)


# --------------------------------------------------------------------------- log_softmax


def log_softmax(
    xp: Namespace,
    x: Any,
    axes: Axes,
    *,
    where: Any = None,
    temperature: float = 1.0,
    sink: Any = None,
) -> Any:
    """(x - max) - log1p(rest), the sink being one more entry."""
    if where is not None:
        x, _ = masked(xp, x, where, axes)
    if sink is not None:
        sink = laid_out(xp, sink, x)
    state = fold(xp, x, axes, temperature=temperature, sink=sink)
    y = state.shifted - state.log
    return y if where is None else xp.where(where, y, scalar(xp, -math.inf, y))


def log_share_of_sink(
    xp: Namespace,
    x: Any,
    axes: Axes,
    *,
    sink: Any,
    where: Any = None,
    temperature: float = 1.0,
) -> Any:
    """Return the logarithm of what probability the sink takes, the axes kept: its own entry."""
    if where is not None:
        x, _ = masked(xp, x, where, axes)
    sink = laid_out(xp, sink, x)
    state = fold(xp, x, axes, temperature=temperature, sink=sink)
    m = greater(xp, maximum(xp, x, axes), constant(xp, sink))
    return from_maximum(xp, sink, m, temperature) - state.log


def laid_out(xp: Namespace, sink: Any, x: Any) -> Any:
    """Return the sink, a number or an array, with as many axes as `x`."""
    if isinstance(sink, int | float):
        sink = scalar(xp, sink, x)
    return with_axes(sink, x.ndim)


def log_softmax_vjp(xp: Namespace, log_y: Any, dy: Any, axes: Axes) -> Any:
    """dy - exp(log_y) * sum(dy)."""
    return log_softmax_vjp_of(xp, log_y, dy, log_softmax_vjp_sums(xp, log_y, dy, axes))


def log_softmax_vjp_sums(xp: Namespace, log_y: Any, dy: Any, axes: Axes) -> tuple[Any, ...]:
    """Return what a part of a row adds to sum(dy)."""
    return (total(xp, _unmasked(xp, log_y, dy), axes),)


def log_softmax_vjp_of(xp: Namespace, log_y: Any, dy: Any, sums: tuple[Any, ...]) -> Any:
    """dy - exp(log_y) * sum(dy), of a confident row with the digits of 1 - exp(log_y)."""
    dy, (s,) = _unmasked(xp, log_y, dy), sums
    return -dy * xp.expm1(log_y) - xp.exp(log_y) * (s - dy)


def _unmasked(xp: Namespace, log_y: Any, dy: Any) -> Any:
    # A masked entry is -inf whatever the logits are: it neither gets nor gives a gradient.
    return xp.where(xp.isinf(log_y), scalar(xp, 0.0, dy), dy)


# --------------------------------------------------------------------------- logsumexp


def logsumexp(
    xp: Namespace,
    x: Any,
    axes: Axes,
    *,
    b: Any = None,
    where: Any = None,
    return_sign: bool = False,
) -> tuple[Any, Any]:
    """Return log s of s = sum(b * exp(x)) and None, or log|s| and s/|s|; the axes are kept."""
    some = None
    if b is not None:
        b = with_axes(b, x.ndim)
    if where is not None:
        x, some = masked(xp, x, where, axes)
        if b is not None:
            b = xp.where(where, b, scalar(xp, 0.0, b))
    sign = None
    if xp.isdtype(x.dtype, "complex floating"):
        value, sign = _complex(xp, x, axes, b, return_sign)
    elif b is not None:
        value, sign = _weighted(xp, x, axes, b)
        if not return_sign:
            value = xp.where(sign < 0, scalar(xp, math.nan, value), value)
    else:
        value = _unweighted(xp, x, axes)
        if return_sign:
            zero, one = scalar(xp, 0.0, value), scalar(xp, 1.0, value)
            found = constant(xp, value)
            sign = xp.where(found == -math.inf, zero, xp.where(xp.isnan(found), found, one))
    if some is not None:
        value = xp.where(some, value, scalar(xp, -math.inf, value))
        sign = None if sign is None else xp.where(some, sign, scalar(xp, 0.0, sign))
    return value, sign if return_sign else None


def _unweighted(xp: Namespace, x: Any, axes: Axes) -> Any:
    if libraries.of(xp).chunked:
        # logsumexp merges: a chunk is read once and dropped, not kept until the maximum is known.
        return libraries.of(xp).reduce_chunks(x, axes, _logsumexp_of_a_chunk)
    m = maximum(xp, x, axes)
    infinite, zero = xp.isinf(m), scalar(xp, 0.0, m)
    # An infinite row keeps its value, and has the derivative 0: that of a row of zeros, times 0.
    state = fold(xp, xp.where(infinite, zero, x), axes, shift=xp.where(infinite, zero, m))
    return xp.where(infinite, m, state.max + xp.log1p(state.rest))


def _logsumexp_of_a_chunk(chunk: Any, axis: Axes, keepdims: bool) -> Any:
    xp = libraries.namespace(chunk)
    return libraries.of(xp).quietly(_unweighted, xp, chunk, axis)


def _weighted(xp: Namespace, x: Any, axes: Axes, b: Any) -> tuple[Any, Any]:
    infinite = xp.isinf(b)
    weights, b = b, xp.where(infinite, scalar(xp, 0.0, b), b)
    live, m, shifted = _shifted_where_it_counts(xp, x, x, axes, b)
    exps = xp.exp(shifted)
    # s = (weight at the maximum) + others; the constant 1 leaves the maximum's value, and not
    # its derivative, out of the others. In a row of -inf it would be 1 everywhere, and two sums in
    # another order not quite each other's negative.
    is_max = cast(xp, (live == m) & (m > -math.inf), exps.dtype)
    at_max = total(xp, b * is_max, axes)
    others = total(xp, b * (exps - is_max), axes)
    s = at_max + others
    one = scalar(xp, 1.0, s)
    small = xp.abs(others) < xp.abs(at_max) / 2
    c = xp.where(small, at_max, one)
    near = xp.log(xp.abs(c)) + xp.log1p(xp.where(small, others, scalar(xp, 0.0, s)) / c)
    far = xp.log(xp.abs(xp.where(small | (s == 0), one, s)))
    shift = xp.where(xp.isinf(m), scalar(xp, 0.0, m), m)
    value = xp.where(small, near, far) + shift
    value = xp.where(s == 0, scalar(xp, -math.inf, value), value)
    sign = _sign(xp, s)
    # An infinite weight makes the sum infinite, but nan at a logit of -inf and beside an infinity
    # of the other sign.
    terms = weights * xp.where(x > -math.inf, one, scalar(xp, 0.0, x))
    terms = xp.where(infinite, terms, scalar(xp, 0.0, x))
    beyond = constant(xp, xp.sum(terms, axis=axes, keepdims=True))
    plain = beyond == 0
    beyond = beyond + constant(xp, xp.where(value < math.inf, scalar(xp, 0.0, s), sign * value))
    return xp.where(plain, value, xp.abs(beyond)), xp.where(plain, sign, _sign(xp, beyond))


def _sign(xp: Namespace, s: Any) -> Any:
    one = scalar(xp, 1.0, s)
    return xp.where(s > 0, one, xp.where(s < 0, -one, constant(xp, s)))


def _complex(xp: Namespace, x: Any, axes: Axes, b: Any, return_sign: bool) -> tuple[Any, Any]:
    _, m, shifted = _shifted_where_it_counts(xp, x, xp.real(x), axes, b)
    m = xp.where(xp.isinf(m), scalar(xp, 0.0, m), m)
    exps = xp.exp(shifted)
    s = total(xp, exps if b is None else b * exps, axes)
    zero = s == 0
    if not return_sign:
        value = xp.log(xp.where(zero, scalar(xp, 1.0, s), s)) + m
        return xp.where(zero, scalar(xp, -math.inf, value), value), None
    size = xp.where(zero, scalar(xp, 1.0, m), xp.abs(s))
    value = xp.where(zero, scalar(xp, -math.inf, m), xp.log(size) + m)
    return value, s / cast(xp, size, s.dtype)


def _shifted_where_it_counts(
    xp: Namespace, x: Any, real: Any, axes: Axes, b: Any
) -> tuple[Any, Any, Any]:
    """Return the real parts that count, their maximum, and x shifted by it.

    An entry of weight 0 does not count, whatever it holds: it must neither set the maximum nor
    overflow against it. In a row whose maximum is infinite only the entries at +inf count.
    """
    minus_inf = scalar(xp, -math.inf, real)
    live = real if b is None else xp.where(b == 0, minus_inf, real)
    m = maximum(xp, live, axes)
    infinite = xp.isinf(m)
    shifted = x - xp.where(infinite, scalar(xp, 0.0, m), m)
    only_infinities = xp.where(live == math.inf, x, scalar(xp, -math.inf, x))
    shifted = xp.where(infinite, only_infinities, shifted)
    if b is not None:
        # Half the largest exponent leaves room for the derivative with respect to b.
        bound = xp.log(scalar(xp, xp.finfo(real.dtype).max, real)) / 2
        too_large = ~((xp.real(shifted) if x is not real else shifted) < bound)
        shifted = xp.where((b == 0) & too_large, scalar(xp, 0.0, shifted), shifted)
    return live, m, shifted
