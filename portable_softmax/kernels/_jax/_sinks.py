"""What JAX traces for softmax and log_softmax beside a sink, which is one more logit of its row.

Each function is one compiled call, as those of `_rules` are. A derivative of the probabilities is
that of a row to which the sink belongs, of whose answer its own entry is dropped.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
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
    return _answered(_softmax, 0.0, x, sink, where, scale, axes, compute).astype(answer)


@jit
def log_softmax(
    x: Any, sink: Any, where: Any, scale: Any, axes: Axes, compute: Any, answer: Any
) -> Any:
    """(x - max) / T - log1p(rest), the sink being one of the rest, or the maximum."""
    return _answered(_log_softmax, -math.inf, x, sink, where, scale, axes, compute).astype(answer)


def _answered(
    function: Any, nothing: float, x: Any, sink: Any, where: Any, scale: Any, axes: Axes,
    compute: Any,
) -> Any:  # fmt: skip
    x = x.astype(compute)
    if where is not None:
        where = mask_like(where, x.ndim)
        x, _ = masked(x, where, axes)
    rows = [1 if a in axes else n for a, n in enumerate(x.shape)]
    sink = jnp.squeeze(jnp.broadcast_to(sink.astype(compute), rows), axes)
    y = function(x, sink, scale, axes)
    return y if where is None else jnp.where(where, y, nothing)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _softmax(x: Any, sink: Any, scale: Any, axes: Axes) -> Any:
    return _softmax_and_share(x, sink, scale, axes)[0]


@_softmax.defjvp
def _softmax_jvp(axes: Axes, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x, sink, scale), (t, more, _) = primals, tangents
    y, share = _softmax_and_share(x, sink, scale, axes)
    if scale is not None:
        t, more = t * inverse_temperature(scale), more * inverse_temperature(scale)
    mean = jnp.sum(y * t, axis=axes) + share * more
    change, of_share = y * (t - spread(mean, y, axes)), share * (more - mean)
    # Nothing, as for softmax alone, whose derivative says what it is for.
    nothing = jnp.sum(change, axis=axes) + of_share
    return y, change - confident(y) * spread(nothing, y, axes)


def _softmax_and_share(x: Any, sink: Any, scale: Any, axes: Axes) -> tuple[Any, Any]:
    """Return the probabilities, and that of the sink."""
    exp, _ = exps_by(x, jnp.maximum(jnp.max(x, axis=axes), sink), scale, axes)
    terms, more = exp(x, axes), exp(sink, ())
    s = sum_of(*in_blocks(terms, axes, 0.0)) + more
    return terms / spread(s, x, axes), more / s


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _log_softmax(x: Any, sink: Any, scale: Any, axes: Axes) -> Any:
    top, rest, _ = _joined(x, sink, scale, axes)
    return shifted(x, top, scale, axes) - spread(jnp.log1p(rest), x, axes)


@_log_softmax.defjvp
def _log_softmax_jvp(axes: Axes, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x, sink, scale), (t, more, _) = primals, tangents
    top, rest, share = _joined(x, sink, scale, axes)
    y = shifted(x, top, scale, axes) - spread(jnp.log1p(rest), x, axes)
    if scale is not None:
        t, more = t * inverse_temperature(scale), more * inverse_temperature(scale)
    mean = jnp.sum(softmax_of(x, top, rest, scale, axes) * t, axis=axes) + share * more
    return y, t - spread(mean, x, axes)


def _joined(x: Any, sink: Any, scale: Any, axes: Axes) -> tuple[Any, Any, Any]:
    """Return the maximum and the rest of rows with their sinks, and the probability of these."""
    m, rest = fold(x, scale, axes)
    top = jnp.maximum(m, sink)
    if scale is None:
        exp, unit = exps_by(x, top, scale, axes)
        own, more = exp(m, ()) / unit, exp(sink, ()) / unit
    else:
        own, more = (tempered_terms(a, top, scale, ()) for a in (m, sink))
    beyond = select(m == -math.inf, jnp.zeros_like(m), (1.0 + rest) * own)
    rest = select(sink > m, beyond, rest + more)
    return top, rest, more / (1.0 + rest)
