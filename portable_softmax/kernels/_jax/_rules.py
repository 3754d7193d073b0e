"""What JAX traces for the softmax family: the fold, and a derivative where JAX's own is not best.

Each function is one compiled call, also where the user compiles nothing, and its own vmap. What an
option does to the logits is done before the fold, in JAX's operations, which bring the
derivative along.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from portable_softmax import portable
from portable_softmax.kernels._jax._fold import (
    Axes,
    base,
    compiled,
    exps,
    finite,
    fold,
    in_blocks,
    inverse_temperature,
    reference,
    select,
    shifted,
    softmax_of,
    spread,
    sum_of,
    wide,
)

jit = compiled("axes", "compute", "answer")


def masked(x: Any, where: Any, axes: Axes) -> tuple[Any, Any]:
    """Give masked entries the logit -inf, and rows without any other entry the logits 0.

    Returns the new rows and which of them have an entry at all.
    """
    some = jnp.any(jnp.broadcast_to(where, x.shape), axis=axes, keepdims=True)
    return jnp.where(some, jnp.where(where, x, -jnp.inf), 0.0), some


def mask_like(where: Any, ndim: int) -> Any:
    """Give a mask as many dimensions as the logits have."""
    return jnp.expand_dims(where, tuple(range(ndim - where.ndim)))


@jit
def softmax(x: Any, where: Any, scale: Any, axes: Axes, compute: Any, answer: Any) -> Any:
    """exp((x - max) / T) / sum(exp((x - max) / T))."""
    x = x.astype(compute)
    if where is not None:
        where = mask_like(where, x.ndim)
        x, _ = masked(x, where, axes)
    y = _softmax(x, scale, axes)
    return (y if where is None else jnp.where(where, y, 0.0)).astype(answer)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _softmax(x: Any, scale: Any, axes: Axes) -> Any:
    terms, _ = exps(x, jnp.max(x, axis=axes), scale, axes)
    return terms / spread(sum_of(*in_blocks(terms, axes, 0.0)), x, axes)


@_softmax.defjvp
def _softmax_jvp(axes: Axes, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x, scale), (t, _) = primals, tangents
    y = _softmax(x, scale, axes)
    t = t if scale is None else t * inverse_temperature(scale)  # the transpose multiplies last
    change = y * (t - spread(jnp.sum(y * t, axis=axes), y, axes))
    # Nothing, as the changes of a row sum to 0. But its transpose takes a constant off the upstream
    # gradient, which keeps the digits of a confident row: see the portable `softmax_vjp`.
    return y, change - confident(y) * spread(jnp.sum(change, axis=axes), y, axes)


@jit
def log_softmax(x: Any, where: Any, scale: Any, axes: Axes, compute: Any, answer: Any) -> Any:
    """(x - max) / T - log1p(rest)."""
    x = x.astype(compute)
    if where is not None:
        where = mask_like(where, x.ndim)
        x, _ = masked(x, where, axes)
    y = _log_softmax(x, scale, axes)
    return (y if where is None else jnp.where(where, y, -jnp.inf)).astype(answer)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _log_softmax(x: Any, scale: Any, axes: Axes) -> Any:
    m, rest = fold(x, scale, axes)
    return shifted(x, m, scale, axes) - spread(jnp.log1p(rest), x, axes)


@_log_softmax.defjvp
def _log_softmax_jvp(axes: Axes, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x, scale), (t, _) = primals, tangents
    m, rest = fold(x, scale, axes)
    y = shifted(x, m, scale, axes) - spread(jnp.log1p(rest), x, axes)
    t = t if scale is None else t * inverse_temperature(scale)
    return y, t - spread(jnp.sum(softmax_of(x, m, rest, scale, axes) * t, axis=axes), x, axes)


@jit
def logsumexp(x: Any, where: Any, axes: Axes, compute: Any, answer: Any) -> Any:
    """Max + log1p(rest), with the reduced axes kept."""
    x, some = x.astype(compute), None
    if where is not None:
        x, some = masked(x, mask_like(where, x.ndim), axes)
    y = wide(_logsumexp(x, axes), axes)
    return (y if some is None else jnp.where(some, y, -jnp.inf)).astype(answer)


@jit
def logsumexp_value_and_grad(
    x: Any, where: Any, axes: Axes, compute: Any, answer: Any
) -> tuple[Any, Any]:
    """Return the same and softmax, which is 0 in a row whose maximum is infinite."""
    x, some = x.astype(compute), None
    if where is not None:
        where = mask_like(where, x.ndim)
        x, some = masked(x, where, axes)
    y, slopes = _logsumexp_and_slopes(x, axes)
    y = wide(y, axes)
    if some is not None:
        y, slopes = jnp.where(some, y, -jnp.inf), jnp.where(where, slopes, 0.0)
    return y.astype(answer), slopes.astype(answer)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _logsumexp(x: Any, axes: Axes) -> Any:
    return _logsumexp_of(*fold(x, None, axes))


def _logsumexp_of(m: Any, rest: Any) -> Any:
    return select(lax.is_finite(m), m + jnp.log1p(rest), select(rest == rest, m, math.nan))


@_logsumexp.defjvp
def _logsumexp_jvp(axes: Axes, primals: Any, tangents: Any) -> tuple[Any, Any]:
    y, slopes = _logsumexp_and_slopes(primals[0], axes)
    return y, jnp.sum(slopes * tangents[0], axis=axes)


def _logsumexp_and_slopes(x: Any, axes: Axes) -> tuple[Any, Any]:
    m, rest = fold(x, None, axes)
    return _logsumexp_of(m, rest), _slopes_of_logsumexp(x, m, rest, axes)


def _slopes_of_logsumexp(x: Any, m: Any, rest: Any, axes: Axes) -> Any:
    """Return softmax, and 0 for a row whose maximum is infinite.

    XLA's CPU compiler makes no vectors of a select between numbers of rows that it spreads. So the
    others have a factor of 0, and no exponential that is infinite.
    """
    counts, most = ~jnp.isinf(m), math.log(float(jnp.finfo(x.dtype).max)) - 1.0
    c, power = base(x, m, axes)
    unit = jnp.exp(m - c) if power is None else jnp.exp(m - c) * power
    none = select(rest == rest, lax.full_like(rest, 0.0), math.nan)
    c, factor = select(counts, c, 0.0), select(counts, 1.0 / (unit * (1.0 + rest)), none)
    terms = jnp.exp(lax.min(x - spread(c, x, axes), lax.full_like(x, most)))
    terms = terms if power is None else terms * spread(power, x, axes)
    return terms * spread(factor, x, axes)


@jit
def softmax_vjp(y: Any, dy: Any, axes: Axes, compute: Any, answer: Any) -> Any:
    """y * (dy - sum(y*dy)), as the portable one."""
    rounding = portable.ROUNDING.get(y.dtype.name, 0.0)
    y, dy = y.astype(compute), dy.astype(compute)
    whole = jnp.sum(y, axis=axes)
    c = jnp.sum(confident(y) * dy, axis=axes)
    off = portable.off_one(float(jnp.finfo(compute).eps), rounding)
    fits = lax.is_finite(c) & (jnp.abs(whole - 1.0) <= off)
    c, whole = select(fits, c, 0.0), select(fits, whole, 0.0)
    dy = dy - spread(c, y, axes)
    s = jnp.sum(y * dy, axis=axes) + c * (whole - lax.stop_gradient(whole))
    return (y * (dy - spread(s, y, axes))).astype(answer)


def confident(y: Any) -> Any:
    """Return 1 at a confident entry of a softmax and 0 elsewhere.

    Before a sum, XLA writes the outcomes of comparisons to memory.
    """
    return jnp.floor(y + (1.0 - portable.CONFIDENT))


@jit
def log_softmax_jvp(log_y: Any, t: Any, axes: Axes, compute: Any, answer: Any) -> Any:
    """t - sum(exp(log_y) * t)."""
    log_y, t = log_y.astype(compute), t.astype(compute)
    return (t - spread(jnp.sum(jnp.exp(log_y) * t, axis=axes), t, axes)).astype(answer)


@jit
def log_softmax_pullback(log_y: Any, dy: Any, axes: Axes, compute: Any, answer: Any) -> Any:
    """dy - exp(log_y) * sum(dy), which is the transpose of `log_softmax_jvp`."""
    log_y, dy = log_y.astype(compute), dy.astype(compute)
    return (dy - jnp.exp(log_y) * spread(jnp.sum(dy, axis=axes), dy, axes)).astype(answer)


@jit
def log_softmax_vjp(log_y: Any, dy: Any, axes: Axes, compute: Any, answer: Any) -> Any:
    """dy - exp(log_y) * sum(dy), and 0 at a masked entry."""
    log_y, dy = log_y.astype(compute), dy.astype(compute)
    dy = jnp.where(jnp.isinf(log_y), 0.0, dy)
    others = jnp.sum(dy, axis=axes, keepdims=True) - dy
    return (-dy * jnp.expm1(log_y) - jnp.exp(log_y) * others).astype(answer)


@jit
def entropy(x: Any, axes: Axes, compute: Any, answer: Any) -> Any:
    """log1p(rest) + sum(p * (max - x))."""
    return _entropy(x.astype(compute), axes).astype(answer)


@jit
def entropy_value_and_grad(x: Any, axes: Axes, compute: Any, answer: Any) -> tuple[Any, Any]:
    """Return the same, and p * ((max - x) - sum(p * (max - x)))."""
    h, grad = _entropy_and_slopes(x.astype(compute), axes)
    return h.astype(answer), grad.astype(answer)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _entropy(x: Any, axes: Axes) -> Any:
    m, rest = fold(x, None, axes)
    return jnp.log1p(rest) + _mean_gap(x, m, rest, rest, axes)[0]


@_entropy.defjvp
def _entropy_jvp(axes: Axes, primals: Any, tangents: Any) -> tuple[Any, Any]:
    h, slopes = _entropy_and_slopes(primals[0], axes)
    return h, jnp.sum(slopes * tangents[0], axis=axes)


def _entropy_and_slopes(x: Any, axes: Axes) -> tuple[Any, Any]:
    m, rest = fold(x, None, axes)
    mean = _mean_gap(x, m, rest, rest, axes)[0]
    _, times_p, gaps = _mean_gap(x, m, rest, mean, axes)
    return jnp.log1p(rest) + mean, times_p(gaps - spread(mean, x, axes))


def _mean_gap(x: Any, m: Any, rest: Any, after: Any, axes: Axes) -> tuple[Any, Any, Any]:
    """Return sum(p * (max - x)), the product with p, and max - x.

    A probability that XLA would flush to 0 may have a product that is none: it is taken with the
    root of it twice.

    XLA's CPU compiler would write what this has in common with what came before, a constant too. So
    what each entry is given has passed a barrier of this call, behind `after`.
    """
    big, half = (jnp.asarray(v, x.dtype) for v in (float(jnp.finfo(x.dtype).max), 0.5))
    c, unit, power = reference(x, finite(m), big, axes)  # as the fold has it
    after, *own = map(lax.stop_gradient, (after, c, power, half))
    _, c, power, half = lax.optimization_barrier((after, *own))
    root = jnp.exp((x - spread(c, x, axes)) * half)
    # Of a logit of -inf any finite number, as its root is 0.
    gaps = lax.min(
        spread(m, x, axes) - x, lax.full_like(x, 4.0 * -math.log(jnp.finfo(x.dtype).tiny))
    )
    inverse = 1.0 / (unit * (1.0 + rest))

    def of_exps(y: Any) -> Any:
        return root * (y * spread(power, x, axes)) * root

    def times_p(y: Any) -> Any:
        return of_exps(y) * spread(inverse, x, axes)

    return sum_of(*in_blocks(of_exps(gaps), axes, 0.0)) * inverse, times_p, gaps
