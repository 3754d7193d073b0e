"""What JAX traces for softmax and log_softmax beside a sink, which is one more logit of its row.

Each function is one compiled call, as those of `_rules` are. A derivative of the probabilities is
that of a row to which the sink belongs, of whose answer its own entry is dropped.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from portable_softmax.kernels._jax._fold import (
    Axes,
    exps_by,
    fold,
    in_blocks,
    inverse_temperature,
    select,
    shifted,
    softmax_of,
    spread,
    sum_of,
    tempered_terms,
)
from portable_softmax.kernels._jax._rules import confident, jit, mask_like, masked


@jit
def softmax(
    x: Any, sink: Any, where: Any, scale: Any, axes: Axes, compute: Any, answer: Any
) -> Any:
    """exp((x - max) / T) over the sum of these, that of the sink among them."""
    sink = of_rows(sink, x, axes, compute)
    return softmax_beside_sink(x, where, scale, sink, axes, compute, answer)[0]


@jit
def log_softmax(
    x: Any, sink: Any, where: Any, scale: Any, axes: Axes, compute: Any, answer: Any
) -> Any:
    """(x - max) / T - log1p(rest), the sink being one of the rest, or the maximum."""
    sink = of_rows(sink, x, axes, compute)
    return log_softmax_beside_sink(x, where, scale, sink, axes, compute, answer)[0]


def of_rows(sink: Any, x: Any, axes: Axes, compute: Any) -> Any:
    """Return a sink for each row, without the axes."""
    rows = [1 if a in axes else n for a, n in enumerate(x.shape)]
    return jnp.squeeze(jnp.broadcast_to(sink.astype(compute), rows), axes)


@jit
def softmax_beside_sink(
    x: Any, where: Any, scale: Any, sink: Any, axes: Axes, compute: Any, answer: Any
) -> tuple[Any, Any]:
    """Return the probabilities, and that of the sink of each row, which is as it is computed."""
    return _answered(_softmax, 0.0, x, where, scale, sink, axes, compute, answer)


@jit
def log_softmax_beside_sink(
    x: Any, where: Any, scale: Any, sink: Any, axes: Axes, compute: Any, answer: Any
) -> tuple[Any, Any]:
    """Return the logarithms of these."""
    return _answered(_log_softmax, -math.inf, x, where, scale, sink, axes, compute, answer)


def _answered(
    function: Any, nothing: float, x: Any, where: Any, scale: Any, sink: Any, axes: Axes,
    compute: Any, answer: Any,
) -> tuple[Any, Any]:  # fmt: skip
    x = x.astype(compute)
    if where is not None:
        where = mask_like(where, x.ndim)
        x, _ = masked(x, where, axes)
    y, share = function(x, sink, scale, axes)
    return (y if where is None else jnp.where(where, y, nothing)).astype(answer), share


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _softmax(x: Any, sink: Any, scale: Any, axes: Axes) -> tuple[Any, Any]:
    exp, _ = exps_by(x, jnp.maximum(jnp.max(x, axis=axes), sink), scale, axes)
    terms, more = exp(x, axes), exp(sink, ())
    s = sum_of(*in_blocks(terms, axes, 0.0)) + more
    return terms / spread(s, x, axes), more / s


@_softmax.defjvp
def _softmax_jvp(axes: Axes, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x, sink, scale), (t, more, _) = primals, tangents
    y, share = _softmax(x, sink, scale, axes)
    t, more = _over(scale, t, more)
    return (y, share), _softmax_change(y, share, t, more, axes)


def _softmax_change(y: Any, share: Any, t: Any, more: Any, axes: Axes) -> tuple[Any, Any]:
    """Return what changes of the logits and of the sinks change."""
    mean = jnp.sum(y * t, axis=axes) + share * more
    change, of_share = y * (t - spread(mean, y, axes)), share * (more - mean)
    # Nothing, as for softmax alone, whose derivative says what it is for.
    nothing = jnp.sum(change, axis=axes) + of_share
    return change - confident(y) * spread(nothing, y, axes), of_share


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _log_softmax(x: Any, sink: Any, scale: Any, axes: Axes) -> tuple[Any, Any]:
    top, rest, _ = _joined(x, sink, scale, axes)
    return _logarithms(x, sink, top, rest, scale, axes)


def _logarithms(
    x: Any, sink: Any, top: Any, rest: Any, scale: Any, axes: Axes
) -> tuple[Any, Any]:  # fmt: skip
    log = jnp.log1p(rest)
    return (
        shifted(x, top, scale, axes) - spread(log, x, axes),
        shifted(sink, top, scale, ()) - log,
    )


@_log_softmax.defjvp
def _log_softmax_jvp(axes: Axes, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x, sink, scale), (t, more, _) = primals, tangents
    top, rest, share = _joined(x, sink, scale, axes)
    t, more = _over(scale, t, more)
    mean = jnp.sum(softmax_of(x, top, rest, scale, axes) * t, axis=axes) + share * more
    return _logarithms(x, sink, top, rest, scale, axes), (t - spread(mean, x, axes), more - mean)


def _over(scale: Any, *changes: Any) -> tuple[Any, ...]:
    """Return changes over the temperature."""
    return changes if scale is None else tuple(t * inverse_temperature(scale) for t in changes)


def _joined(x: Any, sink: Any, scale: Any, axes: Axes) -> tuple[Any, Any, Any]:
    """Return the maximum and the rest of rows with their sinks, and the probability of these."""
    m, rest = fold(x, scale, axes)
    top = jnp.maximum(m, sink)
    if scale is None:
        exp, unit = exps_by(x, top, scale, axes)
        # Else XLA takes the exponential of a difference for a quotient of two, and rounds that.
        unit = lax.optimization_barrier(unit)
        own, more = exp(m, ()) / unit, exp(sink, ()) / unit
    else:
        own, more = (tempered_terms(a, top, scale, ()) for a in (m, sink))
    beyond = select(m == -math.inf, jnp.zeros_like(m), (1.0 + rest) * own)
    rest = select(sink > m, beyond, rest + more)
    return top, rest, more / (1.0 + select(lax.is_finite(top), rest, math.nan))


# ------------------------------------------------------------- derivatives, from the answers


@jit
def softmax_jvp_beside_sink(
    y: Any, share: Any, t: Any, more: Any, axes: Axes, compute: Any, answer: Any
) -> tuple[Any, Any]:
    """y * (t - mean), and share * (more - mean) with the mean sum(y * t) + share * more."""
    change, of_share = _softmax_change(y, share, t, more, axes)
    return change.astype(answer), of_share


@jit
def log_softmax_jvp_beside_sink(
    y: Any, share: Any, t: Any, more: Any, axes: Axes, compute: Any, answer: Any
) -> tuple[Any, Any]:
    """t - mean, and more - mean with the mean sum(exp(y) * t) + exp(share) * more."""
    mean = jnp.sum(jnp.exp(y) * t, axis=axes) + jnp.exp(share) * more
    return (t - spread(mean, y, axes)).astype(answer), more - mean


def _transposed(
    function: Any, y: Any, share: Any, of_share: Any, dy: Any, axes: Axes, compute: Any, answer: Any
) -> tuple[Any, Any]:
    """Return the transpose of such a function, with respect to logits and sinks.

    `of_share` is None where nothing depends on the shares.
    """
    of_share = jnp.zeros_like(share) if of_share is None else of_share

    def change(t: Any, more: Any) -> Any:
        return function(y, share, t, more, axes, compute, compute)

    dx, dsink = jax.linear_transpose(change, y, share)((dy.astype(compute), of_share))
    return dx.astype(answer), dsink


softmax_vjp_beside_sink = jit(partial(_transposed, softmax_jvp_beside_sink))
log_softmax_vjp_beside_sink = jit(partial(_transposed, log_softmax_jvp_beside_sink))
