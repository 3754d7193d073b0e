"""What JAX traces for the relatives of softmax: divergence, means and running sums.

Each function is one compiled call, as those of `_rules` are. No temperature is compiled in: it
comes as the scale that `_fold.scale_of` makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.custom_derivatives import SymbolicZero

from portable_softmax import portable
from portable_softmax.kernels._jax._fold import (
    Axes,
    compiled,
    exps,
    fold,
    in_blocks,
    inverse_temperature,
    select,
    shifted,
    spread,
    sum_of,
    tempered_terms,
    wide,
)
from portable_softmax.kernels._jax._rules import logsumexp, mask_like, masked

# --------------------------------------------------------------------------- divergence


@compiled("axes", "compute", "answer", "reduction")
def kl_divergence(
    x: Any, y: Any, scale: Any, distilled: Any, axes: Axes, compute: Any, answer: Any,
    reduction: str,
) -> Any:  # fmt: skip
    """Return the reduced divergence; `distilled` is the temperature where its square counts."""
    each = divergence(x, y, scale, axes, compute)
    return reduced(each, distilled, answer, reduction)


@compiled("axes", "compute", "answer", "reduction", "of_p", "of_q")
def kl_divergence_value_and_grad(
    x: Any, y: Any, scale: Any, distilled: Any, factor: Any, axes: Axes, compute: Any, answer: Any,
    reduction: str, of_p: Any, of_q: Any,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Return that, and the gradients times `factor`, of the dtypes `of_p` and `of_q`."""
    each, by_p, by_q = divergence_value_and_grad(x, y, scale, factor, axes, compute, of_p, of_q)
    return reduced(each, distilled, answer, reduction), by_p, by_q


@compiled("answer", "reduction")
def reduced(each: Any, distilled: Any, answer: Any, reduction: str) -> Any:
    """Return the sum or the mean of the divergences, or each; `distilled` is as above."""
    each = each if distilled is None else each * distilled * distilled
    if reduction != "none":
        # Else XLA's CPU compiler makes one operation of the rows' sums and of this one.
        each = select(each == each, each, math.nan)
        each = jnp.mean(each) if reduction == "mean" else jnp.sum(each)
    return each.astype(answer)


@compiled("axes", "compute")
def divergence(x: Any, y: Any, scale: Any, axes: Axes, compute: Any) -> Any:
    """Return sum(p * (exp(u) - 1 - u)) with u = log(q) - log(p), without the axes."""
    return _divergence(x.astype(compute), y.astype(compute), scale, axes)


@compiled("axes", "compute", "of_p", "of_q")
def divergence_value_and_grad(
    x: Any, y: Any, scale: Any, factor: Any, axes: Axes, compute: Any, of_p: Any, of_q: Any
) -> tuple[Any, Any, Any]:
    """Return the same, and `factor` times -p * (u + divergence) and q - p."""
    x, y = x.astype(compute), y.astype(compute)
    k = _divergence(x, y, scale, axes)  # the same digits as without the gradients
    x, y, k = lax.optimization_barrier((x, y, k))  # else XLA writes what both share
    _, by_p, by_q = _divergence_and_slopes(x, y, scale, axes)
    return k, (by_p * factor).astype(of_p), (by_q * factor).astype(of_q)


@compiled("axes", "compute", "of_q")
def divergence_by_q(
    x: Any, y: Any, scale: Any, factor: Any, axes: Axes, compute: Any, of_q: Any
) -> tuple[Any, Any]:
    """Return the same without what belongs to p."""
    k, _, by_q = _divergence_and_slopes(x.astype(compute), y.astype(compute), scale, axes)
    return k, (by_q * factor).astype(of_q)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _divergence(x: Any, y: Any, scale: Any, axes: Axes) -> Any:
    """Take logarithms of plain sums: what they lose counts as a logit's rounding does.

    It changes each u by the same, to which the terms are of the second order.
    """
    if 0 in x.shape:
        return jnp.sum(x + y, axis=axes)
    log_p, log_q = _plain_logs(x, scale, axes), _plain_logs(y, scale, axes)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    gone = p == 0
    u = jnp.where(gone, 0.0, log_q) - jnp.where(gone, 0.0, log_p)
    return _summed(p, q, u, axes)


def _plain_logs(x: Any, scale: Any, axes: Axes) -> Any:
    """Return (x - max) / T - log(sum(exp((x - max) / T)))."""
    d = shifted(x, lax.stop_gradient(jnp.max(x, axis=axes)), scale, axes)
    return d - spread(jnp.log(sum_of(*in_blocks(jnp.exp(d), axes, 0.0))), x, axes)


@partial(_divergence.defjvp, symbolic_zeros=True)
def _divergence_jvp(axes: Axes, primals: Any, tangents: Any) -> tuple[Any, Any]:
    x, y, scale = primals
    k, *slopes = _divergence_and_slopes(x, y, scale, axes)
    change = jnp.zeros_like(k)
    for slope, t in zip(slopes, tangents[:2], strict=True):
        if not isinstance(t, SymbolicZero):
            change = change + jnp.sum(slope * t, axis=axes)
    return k, change if scale is None else change * inverse_temperature(scale)


def _divergence_and_slopes(x: Any, y: Any, scale: Any, axes: Axes) -> tuple[Any, Any, Any]:
    """Return the divergence, and its derivatives times the temperature."""
    if 0 in x.shape:
        return jnp.sum(x + y, axis=axes), x, y
    p, q, u = _compared(x, y, scale, axes)
    k, gone = _summed(p, q, u, axes), p == 0
    by_p = jnp.where(gone, 0.0, -p * (u + spread(k, x, axes)))
    near = (jnp.abs(u) <= 1.0) & ~gone
    by_q = jnp.where(near, p * jnp.expm1(jnp.where(near, u, 0.0)), q - p)
    return k, by_p, by_q


def _compared(x: Any, y: Any, scale: Any, axes: Axes) -> tuple[Any, Any, Any]:
    """Return p, q and log(q) - log(p), which is 0 where p is."""
    (p, d_p, log_p), (q, d_q, log_q) = _state(x, scale, axes), _state(y, scale, axes)
    gone = p == 0
    u = jnp.where(gone, 0.0, d_q) - jnp.where(gone, 0.0, d_p)
    return p, q, jnp.where(gone, 0.0, u - spread(log_q - log_p, x, axes))


def _summed(p: Any, q: Any, u: Any, axes: Axes) -> Any:
    """Return the sum of p (expm1(u) - u), of q where p is 0, and of q - p (1 + u) beyond 1.

    The rounding of expm1 is one of u, which counts as one of the logits does.
    """
    terms = jnp.where(u <= 1.0, p * (jnp.expm1(u) - u), q - p * (1.0 + u))
    k = sum_of(*in_blocks(jnp.where(p == 0, q, terms), axes, 0.0))
    return select(k < 0.0, 0.0 * k, k)


def _state(x: Any, scale: Any, axes: Axes) -> tuple[Any, Any, Any]:
    """Return softmax, (x - max) / T, and log1p(rest).

    Two folds of `_fold` in one program would have XLA's CPU compiler write what they share.
    """
    m = lax.stop_gradient(jnp.max(x, axis=axes))
    d = shifted(x, m, scale, axes)
    if scale is None:
        e, back, m = jnp.exp(d), d - x, spread(m, x, axes)
        lost = (x - (d - back)) - (m + back)
        e = e * (1.0 + lax.stop_gradient(jnp.where(e > 0, lost, 0.0)))
    else:
        e = tempered_terms(x, m, scale, axes)
    whole = lax.stop_gradient(jnp.floor(e))
    rest = sum_of(*in_blocks(e - whole, axes, 0.0)) + (jnp.sum(whole, axis=axes) - 1.0)
    return e * spread(1.0 / (1.0 + rest), x, axes), d, jnp.log1p(rest)


# --------------------------------------------------------------------------- means


@compiled("axes", "compute", "answer")
def logmeanexp(x: Any, where: Any, axes: Axes, compute: Any, answer: Any) -> Any:
    """Return max + log(mean(exp(x - max))), the axes kept; where that cancels, by log1p."""
    return wide(_logmeanexp(x.astype(compute), where, axes), axes).astype(answer)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _logmeanexp(x: Any, where: Any, axes: Axes) -> Any:
    if any(x.shape[a] == 0 for a in axes):
        return jnp.sum(x, axis=axes) + math.nan
    of = x if where is None else masked(x, mask_like(where, x.ndim), axes)[0]
    m = jnp.max(of, axis=axes)
    shift = select(lax.is_finite(m), m, 0.0)
    s = sum_of(*in_blocks(jnp.exp(of - spread(shift, x, axes)), axes, 0.0))
    m = select(s == s, m, math.nan)  # see `fold`
    # Two sums of the same terms would have XLA write these.
    again, n = lax.optimization_barrier(m), _counted(x, where, axes)
    return _mean(m, s / n, n, _lost(x, again, where, axes) / n)


@_logmeanexp.defjvp
def _logmeanexp_jvp(axes: Axes, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """Multiply by softmax, and by 0 in a row whose maximum is infinite."""
    (x, where), (t, _) = primals, tangents
    y = _logmeanexp(x, where, axes)
    if any(x.shape[a] == 0 for a in axes):
        return y, jnp.sum(t, axis=axes)
    of, some = x, None
    if where is not None:
        where = mask_like(where, x.ndim)
        (of, some), t = masked(x, where, axes), jnp.where(where, t, 0.0)
    m = lax.optimization_barrier(lax.stop_gradient(jnp.max(of, axis=axes)))
    counts = ~jnp.isinf(m) | (y != y)
    terms, _ = exps(of, select(counts, m, 0.0), None, axes)
    factor = select(y == y, 1.0 / sum_of(*in_blocks(terms, axes, 0.0)), math.nan)
    factor = factor if some is None else jnp.where(jnp.squeeze(some, axes), factor, 0.0)
    slopes = select(spread(counts, x, axes), terms * spread(factor, x, axes), 0.0)
    return y, jnp.sum(slopes * t, axis=axes)


@compiled("axes", "compute", "answer")
def fold_rows(x: Any, where: Any, axes: Axes, compute: Any, answer: Any) -> tuple[Any, Any]:
    """Return maxima and rests, without the axes."""
    x = x.astype(compute)
    if where is not None:
        x, _ = masked(x, mask_like(where, x.ndim), axes)
    m, rest = fold(x, None, axes)
    m, rest = select(rest == rest, m, math.nan), select(lax.is_finite(m), rest, math.nan)
    return m.astype(answer), rest.astype(answer)


@compiled("axes", "answer")
def mean_of(m: Any, rest: Any, x: Any, where: Any, axes: Axes, answer: Any) -> Any:
    """Return logmeanexp from maxima and rests, the axes kept.

    Rows whose mean is near 1 are read once more, if there is one of them.
    """
    n = _counted(x, where, axes)
    mean = (1.0 + rest) / n

    def again(m: Any) -> Any:
        return _lost(x.astype(m.dtype), m, where, axes) / n

    some = jnp.any((mean > _NEAR) & lax.is_finite(m))
    lost = lax.cond(some, again, jnp.zeros_like, m)
    return wide(_mean(m, mean, n, lost), axes).astype(answer)


_NEAR = 0.7  # beyond it, what the mean lacks is computed by itself


def _counted(x: Any, where: Any, axes: Axes) -> Any:
    """Return how many entries of a row count."""
    if where is None:
        return math.prod(x.shape[a] for a in axes)
    where = jnp.broadcast_to(mask_like(where, x.ndim), x.shape)
    return jnp.sum(where, axis=axes)


def _lost(x: Any, m: Any, where: Any, axes: Axes) -> Any:
    """Return the sum of exp(x - max) - 1, whose terms have one sign."""
    d = x - spread(m, x, axes)
    if where is not None:
        d = jnp.where(mask_like(where, x.ndim), d, 0.0)
    return -sum_of(*in_blocks(-jnp.expm1(d), axes, 0.0))


def _mean(m: Any, mean: Any, n: Any, lost: Any) -> Any:
    """Return the maximum plus the logarithm of the mean, near 1 from what this lacks."""
    near = mean > _NEAR
    log = jnp.where(near, jnp.log1p(jnp.where(near, lost, 0.0)), jnp.log(mean))
    value = jnp.where(jnp.isinf(m), m, m + log)
    return value if isinstance(n, int) else jnp.where(n == 0, math.nan, value)


# --------------------------------------------------------------------------- weights


@compiled("axes", "compute", "answer", "with_sign")
def weighted_logsumexp(
    x: Any, b: Any, where: Any, axes: Axes, compute: Any, answer: Any, with_sign: bool
) -> Any:
    """Return log(sum(b * exp(x))), or that of its size and its sign; the axes are kept."""
    if b is None:
        return beside_sign(logsumexp(x.astype(compute), where, axes, compute, compute), answer)

    def signed(x: Any, b: Any) -> tuple[Any, Any]:
        return signed_logsumexp(x, b, axes, compute)

    return weighted_by(signed, x, b, where, axes, compute, answer, with_sign)


def beside_sign(value: Any, answer: Any) -> tuple[Any, Any]:
    """Return a logarithm and the sign of what it is of, a sum of exponentials."""
    sign = jnp.where(value == -math.inf, 0.0, jnp.where(jnp.isnan(value), value, 1.0))
    return value.astype(answer), sign.astype(answer)


def weighted_by(
    signed: Callable[[Any, Any], tuple[Any, Any]], x: Any, b: Any, where: Any, axes: Axes,
    compute: Any, answer: Any, with_sign: bool,
) -> Any:  # fmt: skip
    """Return the answer by a `signed_logsumexp` of logits and weights."""
    b, some = mask_like(b.astype(compute), x.ndim), None
    if where is not None:
        where = mask_like(where, x.ndim)
        x, some = masked(x, where, axes)
        b = jnp.where(where, b, 0.0)
    value, sign = (wide(part, axes) for part in signed(x, b))
    if not with_sign:
        value = jnp.where(sign < 0, math.nan, value)
    if some is not None:
        value, sign = jnp.where(some, value, -math.inf), jnp.where(some, sign, 0.0)
    found = value.astype(answer), sign.astype(answer)
    return found if with_sign else found[0]


def signed_logsumexp(x: Any, b: Any, axes: Axes, compute: Any) -> tuple[Any, Any]:
    """Return log|s| and the sign of s = sum(b * exp(x)), without the axes."""
    found: tuple[Any, Any] = _weighted(x.astype(compute), jnp.broadcast_to(b, x.shape), axes)
    return found


def signed_from_sums(m: Any, at_max: Any, others: Any) -> tuple[Any, Any]:
    """Return the same of rows whose sums over exp(max) are finite."""
    s = jnp.where(m == -math.inf, 0.0, at_max + others)
    small = jnp.abs(others) < jnp.abs(at_max) / 2.0
    c = jnp.where(small, at_max, 1.0)
    near = jnp.log(jnp.abs(c)) + jnp.log1p(jnp.where(small, others, 0.0) / c)
    far = jnp.log(jnp.abs(jnp.where(small | (s == 0), 1.0, s)))
    value = jnp.where(small, near, far) + jnp.where(jnp.isinf(m), 0.0, m)
    return jnp.where(s == 0, -math.inf, value), jnp.sign(s)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _weighted(x: Any, b: Any, axes: Axes) -> tuple[Any, Any]:
    """Return log|s| and the sign of s = sum(b * exp(x)), as the portable `logsumexp` does."""
    value, sign = signed_from_sums(*_weighted_sums(x, b, axes))
    # An infinite weight makes the sum infinite, but nan at a logit of -inf.
    beyond = _infinite_weights(x, b, axes)
    plain = beyond == 0
    beyond = beyond + jnp.where(value < math.inf, 0.0, sign * value)
    return jnp.where(plain, value, jnp.abs(beyond)), jnp.where(plain, sign, jnp.sign(beyond))


@partial(_weighted.defjvp, symbolic_zeros=True)
def _weighted_jvp(axes: Axes, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """Differentiate by x as b exp(x) / s; by the weights, by way of the portable formula."""
    (x, b), (t, of_b) = primals, tangents

    def portable_one(x: Any, b: Any) -> tuple[Any, Any]:
        found = portable.logsumexp(jnp, x, axes, b=b, return_sign=True)
        return jnp.squeeze(found[0], axes), jnp.squeeze(found[1], axes)

    found = _weighted(x, b, axes)
    if not isinstance(of_b, SymbolicZero):
        t = jnp.zeros_like(x) if isinstance(t, SymbolicZero) else t
        change, of_sign = jax.jvp(portable_one, primals, (t, of_b))[1]
        # XLA may drop a nan from its maximum: see `fold`.
        lost = jnp.isnan(found[0])
        others = jnp.where(lost, jnp.sum(t + of_b, axis=axes), 0.0)
        return found, (change + jnp.where(lost, math.nan, 0.0) * others, of_sign)
    live = jnp.where(b == 0, -math.inf, x)
    e = jnp.exp(live - spread(_shift(jnp.max(live, axis=axes)), x, axes))
    terms = jnp.where(b == 0, 0.0, b * e)
    s = _sum(terms, axes)
    _, at_max, others = _weighted_sums(x, b, axes)  # which have more digits where terms cancel
    s = s + lax.stop_gradient((at_max + others) - s)
    slopes = terms / spread(jnp.where(s == 0, math.inf, s), x, axes)
    plain, beyond = (
        _infinite_weights(x, b, axes) == 0,
        jnp.where(jnp.isnan(found[0]), math.nan, 0.0),
    )
    slopes = jnp.where(spread(plain, x, axes), slopes, spread(beyond, x, axes))
    return found, (jnp.sum(slopes * t, axis=axes), jnp.zeros_like(s))


def _weighted_sums(x: Any, b: Any, axes: Axes) -> tuple[Any, Any, Any]:
    """Return the maximum that counts, and the sums of b * exp(x - max) at it and elsewhere.

    Each sum has its own terms and constants, as XLA writes what two of them share. The whole part
    of an exponential says whether it is that of a maximum.
    """
    live = jnp.where(b == 0, -math.inf, x)
    m = jnp.max(live, axis=axes)
    most = float(jnp.finfo(x.dtype).max)

    def own(*values: Any) -> Any:
        arrays = (jnp.asarray(v, x.dtype) for v in values)
        found = lax.optimization_barrier((_shift(m), *arrays))
        return found[0], *(jnp.broadcast_to(v, x.shape) for v in found[1:])

    def finite(low: Any, high: Any) -> Any:
        return lax.max(lax.min(b, high), low)

    shift, low, high = own(-most, most)
    top = finite(low, high) * jnp.floor(jnp.exp(live - spread(shift, x, axes)))
    shift, low, high, one = own(-most, most, 1.0)
    e = lax.min(jnp.exp(live - spread(shift, x, axes)), one)
    return m, _sum(top, axes), _sum(finite(low, high) * (e - jnp.floor(e)), axes)


def _shift(m: Any) -> Any:
    """Return what is subtracted: beside +inf no finite entry counts."""
    most = float(jnp.finfo(m.dtype).max)
    return lax.stop_gradient(jnp.where(m == -math.inf, 0.0, jnp.where(m == math.inf, most, m)))


def _sum(x: Any, axes: Axes) -> Any:
    x, axes = in_blocks(x, axes, 0.0)
    *outer, inner = sorted(axes)
    x = jnp.sum(x, axis=inner)
    for axis in reversed(outer):
        x = jnp.sum(lax.optimization_barrier(x), axis=axis)
    return x


def _infinite_weights(x: Any, b: Any, axes: Axes) -> Any:
    """Return the sum of the weights that are infinite, nan where such a logit is not above -inf.

    It is nan as well where there is a nan that counts: see `fold`.
    """
    constants = (jnp.asarray(v, x.dtype) for v in (-math.inf, math.nan, 0.0))
    least, none, zero = (
        jnp.broadcast_to(v, x.shape) for v in lax.optimization_barrier(tuple(constants))
    )
    others = jnp.where((b == 0) | (x * b == x * b), zero, none)
    return jnp.sum(jnp.where(jnp.isinf(b), jnp.where(x > least, b, none), others), axis=axes)


# --------------------------------------------------------------------------- running sums


@compiled("axes", "compute", "answer")
def logcumsumexp(x: Any, axes: Axes, compute: Any, answer: Any) -> Any:
    """Return the logarithms of the running sums along the axis."""
    return portable.logcumsumexp(jnp, x.astype(compute), *axes).astype(answer)


@compiled("axes", "compute", "answer")
def logcumsumexp_vjp(x: Any, dy: Any, axes: Axes, compute: Any, answer: Any) -> Any:
    """Return the gradient through them."""
    x, dy = x.astype(compute), dy.astype(compute)
    return portable.logcumsumexp_vjp(jnp, x, dy, *axes).astype(answer)


logcumsumexp_pullback = logcumsumexp_vjp
