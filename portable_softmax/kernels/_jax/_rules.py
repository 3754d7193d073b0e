"""What JAX traces: three forms of each operation, between which the values of a row decide.

With m = max x, s = sum exp(x - m) and rest = s - 1, the portable form leaves the maximum out of
the sum and puts the rounding errors of x - m back, which costs several passes. Not every
row needs that. Let t = C exp(-7).

1. A row with rest >= max(1, t) is as exact by ``m + log(s)``: the maximum's 1 costs no digits of
   a rest above it; and the terms further than 8 below the maximum, whose differences round by more
   than 4u, make up at most rest/e. XLA computes this at about the speed of memory.
2. With rest >= t the rounding errors stay small, and only the maximum has to be left out.
3. Any other row, a confident one or one with an infinity or a nan, takes the portable form.

Each row gets its own form, whatever stands beside it. A form that no row needs is not computed.

Derivatives are given (`custom_jvp`), so that no branch has to be differentiated for the first
order; they are made of JAX's operations, so that they have derivatives in turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import numpy as jnp

from portable_softmax import portable

Axes = tuple[int, ...]


def _chosen(
    x: Any, axes: Axes, formula: Callable[..., Any], exact: Callable[..., Any], *more: Any
) -> Any:
    """Return ``formula(x, m, rest, log, *more)``, or ``exact(x, *more)`` in rows of the third kind.

    Both return a tuple of arrays that have their rows where `x` has them; log is log1p(rest).
    """
    m = jax.lax.stop_gradient(jnp.max(x, axis=axes, keepdims=True))
    s = portable.total(jnp, jnp.exp(x - m), axes)
    wide = math.prod(x.shape[a] for a in axes) * math.exp(-7.0)
    plain, near = s - 1.0 >= max(1.0, wide), s - 1.0 >= wide
    case = 2 - jnp.all(near).astype(int) - jnp.all(plain).astype(int)

    def first(x: Any, *more: Any) -> Any:
        return formula(x, m, s - 1.0, jnp.log(s), *more)

    def second(x: Any, *more: Any) -> Any:
        rest, log = folded(x)
        return formula(x, m, rest, log, *more)

    def third(x: Any, *more: Any) -> Any:
        # The formula sees zeros in the rows that it is not for, so that no nan of it flows back.
        rest, log = (jnp.where(near, part, 1.0) for part in folded(jnp.where(near, x, m)))
        found = formula(jnp.where(near, x, 0.0), jnp.where(near, m, 0.0), rest, log, *more)
        others = exact(x, *more)
        return tuple(jnp.where(near, f, o) for f, o in zip(found, others, strict=True))

    def folded(x: Any) -> tuple[Any, Any]:
        exps = jnp.exp(x - m)
        is_max = jax.lax.stop_gradient(jnp.floor(exps))  # faster than to compare, under XLA
        maxima = jnp.sum(is_max, axis=axes, keepdims=True)
        rest = portable.total(jnp, exps - is_max, axes) + (maxima - 1.0)
        return jnp.where(plain, s - 1.0, rest), jnp.where(plain, jnp.log(s), jnp.log1p(rest))

    return jax.lax.switch(case, (first, second, third), x, *more)


# --------------------------------------------------------------------------- logarithms


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _logsumexp(x: Any, axes: Axes) -> Any:
    (y,) = _chosen(
        x,
        axes,
        lambda x, m, rest, log: (m + log,),
        lambda x: (portable.logsumexp(jnp, x, axes)[0],),
    )
    return y


@_logsumexp.defjvp
def _logsumexp_jvp(axes: Axes, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x,), (t,) = primals, tangents
    y = _logsumexp(x, axes)
    infinite = jnp.isinf(y)  # such a row has the derivative 0
    p = jnp.where(infinite, 0.0, jnp.exp(x - jnp.where(infinite, 0.0, y)))
    return y, portable.total(jnp, p * t, axes)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _log_softmax(x: Any, axes: Axes) -> Any:
    (y,) = _chosen(
        x,
        axes,
        lambda x, m, rest, log: ((x - m) - log,),
        lambda x: (portable.log_softmax(jnp, x, axes),),
    )
    return y


@_log_softmax.defjvp
def _log_softmax_jvp(axes: Axes, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x,), (t,) = primals, tangents
    y = _log_softmax(x, axes)
    return y, t - portable.total(jnp, jnp.exp(y) * t, axes)


# Compiled also where the user compiles nothing: one call instead of twenty.
logsumexp = jax.jit(_logsumexp, static_argnums=1)
log_softmax = jax.jit(_log_softmax, static_argnums=1)


# --------------------------------------------------------------------------- losses


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _cross_entropy(x: Any, target: portable.Target, axis: int, reduction: str) -> Any:
    def exact(x: Any, target: portable.Target) -> tuple[Any]:
        losses = portable.cross_entropy(jnp, x, target, axis, portable.Options(reduction="none"))
        return (jnp.expand_dims(losses, axis),)

    formula = partial(_losses, axis=axis)
    (losses,) = _chosen(x, (axis,), lambda *args: (formula(*args),), exact, target)
    return portable.reduced(jnp, losses, target, axis, reduction)


@_cross_entropy.defjvp
def _cross_entropy_jvp(axis: int, reduction: str, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x, target), (t, _) = primals, tangents
    loss, grad = _value_and_grad(x, target, axis, reduction)
    change = portable.total(jnp, grad * t, (axis,))
    return loss, jnp.squeeze(change, axis=axis) if reduction == "none" else jnp.sum(change)


def _value_and_grad(x: Any, target: portable.Target, axis: int, reduction: str) -> tuple[Any, Any]:
    def formula(x: Any, m: Any, rest: Any, log: Any, target: portable.Target) -> tuple[Any, Any]:
        scale = 1.0 / ((1.0 + rest) * divisor(rest, target))
        if target.valid is not None:
            scale = jnp.where(target.valid, scale, jnp.nan)
        if target.counted is not None:
            scale = jnp.where(target.counted, scale, 0.0)
        exps = jnp.exp(x - m)
        at_label = jax.lax.broadcasted_iota(target.index.dtype, x.shape, axis) == target.index
        # p - 1 at the label, as minus the sum of the others.
        grad = jnp.where(at_label, (exps - 1.0) - rest, exps) * scale
        return _losses(x, m, rest, log, target, axis=axis), grad

    def exact(x: Any, target: portable.Target) -> tuple[Any, Any]:
        options = portable.Options(reduction="none")
        losses, grad = portable.cross_entropy_value_and_grad(jnp, x, target, axis, options)
        losses = jnp.expand_dims(losses, axis)
        return losses, grad / divisor(losses, target)

    def divisor(losses: Any, target: portable.Target) -> Any:
        if reduction != "mean":
            return 1.0
        return portable.nothing_to_inf(jnp, portable.mean_divisor(jnp, losses, target))

    losses, grad = _chosen(x, (axis,), formula, exact, target)
    return portable.reduced(jnp, losses, target, axis, reduction), grad


def _losses(x: Any, m: Any, rest: Any, log: Any, target: portable.Target, *, axis: int) -> Any:
    """Return the losses of the positions, kept with length 1."""
    loss = (m - jnp.take_along_axis(x, target.index, axis=axis, mode="clip")) + log
    if target.valid is not None:
        loss = jnp.where(target.valid, loss, jnp.nan)
    if target.counted is not None:
        loss = jnp.where(target.counted, loss, 0.0)
    return loss


cross_entropy = jax.jit(_cross_entropy, static_argnums=(2, 3))
cross_entropy_value_and_grad = jax.jit(_value_and_grad, static_argnums=(2, 3))
