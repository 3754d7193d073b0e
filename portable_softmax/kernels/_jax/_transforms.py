"""The derivatives of the primitive `rows`, their transposes, and its rule for vmap."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import numpy as jnp
from jax.interpreters import ad, batching

from portable_softmax.kernels._jax import _fold, _losses
from portable_softmax.kernels._jax._call import (
    CHANGES_BESIDE_SINKS,
    Arrays,
    Call,
    by_xla,
    of_rows,
    rows,
)
from portable_softmax.kernels._request import (
    BESIDE_SINKS,
    BINARY,
    BY_Q,
    DIVERGENCES,
    ENTROPIES,
    WITH_SLOPES,
)

# Derivatives, which are linear in the last of their arrays, and the transpose of each.
_TRANSPOSE = {
    "softmax_vjp": "softmax_vjp",
    "log_softmax_jvp": "log_softmax_pullback",
    "logsumexp_jvp": "logsumexp_pullback",
    "cross_entropy_jvp": "cross_entropy_pullback",
    "logcumsumexp_jvp": "logcumsumexp_pullback",
}


def _vmap(leaves: Arrays, axes: Arrays, *, call: Call) -> tuple[list[Any], list[int]]:
    own, mask = of_rows(call)
    size = next(a.shape[i] for a, i in zip(leaves, axes, strict=True) if i is not None)
    if any(axis is not None and i not in own for i, axis in enumerate(axes)):
        found = jax.vmap(partial(by_xla, call=call), in_axes=tuple(axes))(*leaves)
        return found, [0] * len(found)
    ndim = leaves[0].ndim + (axes[0] is None)

    def batched(i: int, a: Any, axis: int | None) -> Any:
        if i not in own:
            return a
        a = jnp.expand_dims(a, 0) if axis is None else jnp.moveaxis(a, axis, 0)
        if i == mask:
            return jnp.expand_dims(a, tuple(range(1, 1 + ndim - a.ndim)))
        return jnp.broadcast_to(a, (size, *a.shape[1:])) if axis is None else a

    leaves = tuple(batched(i, a, axes[i]) for i, a in enumerate(leaves))
    found = rows.bind(*leaves, call=call._replace(batch=call.batch + 1))
    return found, [0] * len(found)


batching.primitive_batchers[rows] = _vmap


def _jvp(primals: Arrays, tangents: Arrays, *, call: Call) -> tuple[list[Any], list[Any]]:
    moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]
    if call.operation == DIVERGENCES[0] and max(moving) < 2:
        return _divergence_jvp(primals, [tangents[i] for i in moving], moving, call)
    if call.operation in BESIDE_SINKS[:2] and primals[0].dtype == call.compute:
        return _jvp_beside_sink(primals, tangents, call)
    x, rule = primals[0], _FIRST.get(call.operation)
    if x.dtype != call.compute:
        rule = _OF_LOGITS.get(call.operation)
    if rule is not None and moving == [0]:
        found, change = rule(primals, counted(tangents[0], primals, call), call)
        return [found], [change]

    def some(*moved: Any) -> list[Any]:
        every = list(primals)
        for i, value in zip(moving, moved, strict=True):
            every[i] = value
        return by_xla(*every, call=call)

    found, changes = jax.jvp(some, [primals[i] for i in moving], [tangents[i] for i in moving])
    return found, changes


ad.primitive_jvps[rows] = _jvp


def counted(t: Any, leaves: Arrays, call: Call) -> Any:
    """Return a change of the logits, 0 where a mask leaves them out: it may be infinite there."""
    where = call.where(leaves)
    return t if where is None else jnp.where(where, t, 0.0)


def _softmax_jvp(leaves: Arrays, t: Any, call: Call) -> tuple[Any, Any]:
    (y,) = rows.bind(*leaves, call=call._replace(kept=True))
    change = _linear("softmax_vjp", (y,), t, call)
    return y, _over_temperature(change, call.arrays(leaves)[2])


def _log_softmax_jvp(leaves: Arrays, t: Any, call: Call) -> tuple[Any, Any]:
    (y,) = rows.bind(*leaves, call=call._replace(kept=True))
    change = _linear("log_softmax_jvp", (y,), t, call)
    where = call.where(leaves)
    change = change if where is None else jnp.where(where, change, 0.0)
    return y, _over_temperature(change, call.arrays(leaves)[2])


def _linear(operation: str, arrays: Arrays, t: Any, call: Call) -> Any:
    """Return a derivative, a function that is linear in `t`."""
    leaves, tree = jax.tree.flatten(((*arrays, t), None))
    (found,) = rows.bind(*leaves, call=call._replace(operation=operation, tree=tree))
    return found


def _jvp_beside_sink(
    leaves: Arrays, tangents: Arrays, call: Call
) -> tuple[list[Any], list[Any]]:  # fmt: skip
    """Return a derivative that is linear in the changes of the logits and of the sinks."""
    y, share = rows.bind(*leaves, call=call)
    arrays, _ = jax.tree.unflatten(call.tree, tangents)
    x, _, scale, sink = call.arrays(leaves)
    t, more = (
        jnp.zeros_like(a) if type(change) is ad.Zero else change
        for a, change in ((x, arrays[0]), (sink, arrays[3]))
    )
    found, tree = jax.tree.flatten(((y, share, counted(t, leaves, call), more), None))
    change, of_share = rows.bind(
        *found, call=call._replace(operation=_CHANGES[call.operation], tree=tree)
    )
    where = call.where(leaves)
    change = change if where is None else jnp.where(where, change, 0.0)
    return [y, share], [_over_temperature(a, scale) for a in (change, of_share)]


_CHANGES = dict(zip(BESIDE_SINKS[:2], CHANGES_BESIDE_SINKS, strict=True))


def _transposed(cotangents: list[Any], *leaves: Any, call: Call) -> list[Any]:
    """Transpose such a function."""
    if call.operation in CHANGES_BESIDE_SINKS:
        return _transposed_beside_sink(cotangents, leaves, call)
    (ct,), t = cotangents, leaves[-1]
    if type(ct) is not ad.Zero:
        *arrays, _ = call.arrays(leaves)
        ct = _linear(_TRANSPOSE[call.operation], tuple(arrays), ct, call)
    return [*[None] * (len(leaves) - 1), ad.Zero(t.aval) if type(ct) is ad.Zero else ct]


ad.primitive_transposes[rows] = _transposed


def _transposed_beside_sink(cotangents: list[Any], leaves: Arrays, call: Call) -> list[Any]:
    dy, of_share = cotangents
    y, share, *changes = call.arrays(leaves)
    if type(dy) is ad.Zero and type(of_share) is ad.Zero:
        found = [ad.Zero(a.aval) if ad.is_undefined_primal(a) else None for a in changes]
        return [None, None, *found]
    dy = jnp.zeros_like(y) if type(dy) is ad.Zero else dy
    of_share = None if type(of_share) is ad.Zero else of_share
    operation = call.operation.replace("_jvp_", "_vjp_")
    arrays, tree = jax.tree.flatten(((y, share, of_share, dy), None))
    found = rows.bind(*arrays, call=call._replace(operation=operation, tree=tree))
    found = [a if ad.is_undefined_primal(b) else None for a, b in zip(found, changes, strict=True)]
    return [None, None, *found]


def _over_temperature(change: Any, scale: Any) -> Any:
    return change if scale is None else change * _fold.inverse_temperature(scale)


def jvp_of_logits(leaves: Arrays, t: Any, call: Call) -> tuple[Any, Any]:
    """Start from the logits again, so that a gradient of a half type is rounded once."""
    (y,) = rows.bind(*leaves, call=call)
    return y, _linear(f"{call.operation}_jvp", call.arrays(leaves), t, call)


def _loss_jvp(leaves: Arrays, t: Any, call: Call) -> tuple[Any, Any]:
    """Make the gradient beside the loss."""
    loss, grad = rows.bind(*leaves, call=call._replace(operation="cross_entropy_value_and_grad"))
    _, labels, weights, _, _ = call.arrays(leaves)
    (axis,) = call.axes
    parts = []  # an ignored row takes no upstream gradient
    if call.form.ignore_index is not None:
        parts.append(_losses.indices(labels, call.form.ignore_index)[1])
    if weights.samples is not None:
        parts.append(weights.samples != 0)
    for counted in parts:
        t = t if counted is None else jnp.where(jnp.expand_dims(counted, axis), t, 0.0)
    axes = call.axes if call.form.reduction == "none" else range(call.batch, t.ndim)
    return loss, jnp.sum(grad * t, axis=tuple(axes)).astype(loss.dtype)


def _logsumexp_jvp(leaves: Arrays, t: Any, call: Call) -> tuple[Any, Any]:
    """Make the slopes beside logsumexp where they are multiplied from the cache by both threads.

    XLA goes to its threads for the product: for a small array that takes longer than the slopes.
    """
    if not _SMALL < leaves[0].size * leaves[0].dtype.itemsize <= _CACHED:
        return jvp_of_logits(leaves, t, call)
    y, slopes = rows.bind(*leaves, call=call._replace(operation=WITH_SLOPES))
    return y, jnp.sum(slopes * t, axis=call.axes, keepdims=True)


_SMALL, _CACHED = 1 << 19, 1 << 26  # bytes


def _entropy_jvp(leaves: Arrays, t: Any, call: Call) -> tuple[Any, Any]:
    """Make the slopes beside the entropy, in the dtype of the computation."""
    axes, compute, answer = call.static
    of_slopes = call._replace(operation=ENTROPIES[1], static=(axes, compute, compute))
    h, slopes = rows.bind(leaves[0].astype(compute), call=of_slopes)
    change = jnp.sum(slopes * t.astype(compute), axis=call.axes)
    return h.astype(answer), change.astype(answer)


def _jvp_of_entries(leaves: Arrays, t: Any, call: Call) -> tuple[Any, Any]:
    """Make the gradient beside the loss, in the dtype of the computation."""
    (x, *others), form, compute = leaves, call.form, call.compute
    of_slopes = call._replace(operation=BINARY[1], static=(form._replace(gradient=compute),))
    loss, slopes = rows.bind(x.astype(compute), *others, call=of_slopes)
    change = slopes * t.astype(compute)
    if form.reduction != "none":
        change = jnp.sum(change, axis=tuple(range(call.batch, x.ndim)))
    return loss, change.astype(loss.dtype)


def _divergence_jvp(
    leaves: Arrays, t: list[Any], moving: list[int], call: Call
) -> tuple[list[Any], list[Any]]:
    """Make the slopes beside the divergence, in the dtype of the computation."""
    x, y, scale = call.arrays(leaves)
    axes, compute = call.static
    numbers = call.numbers(leaves)
    factor = jnp.ones((), compute) if scale is None else _fold.inverse_temperature(scale)
    numbers = jnp.stack([factor]) if numbers is None else jnp.append(numbers, factor)
    found = ((x.astype(compute), y.astype(compute), scale, factor), numbers)
    slopes, tree = jax.tree.flatten(found)
    # Of q alone, as of a student's logits, which are all that a distillation differentiates.
    operation, n = (BY_Q, 2) if moving == [1] else (DIVERGENCES[1], 3)
    of_slopes = call._replace(operation=operation, tree=tree, static=(axes, *[compute] * n))
    k, *by = rows.bind(*slopes, call=of_slopes)
    by = by if moving != [0] else by[:1]
    parts = [
        jnp.sum(slope * one.astype(compute), axis=call.axes)
        for slope, one in zip(by, t, strict=True)
    ]
    return [k], [sum(parts[1:], parts[0])]


_OF_LOGITS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "logsumexp": jvp_of_logits,
    "cross_entropy": jvp_of_logits,
    "logcumsumexp": jvp_of_logits,
    "entropy": _entropy_jvp,
    BINARY[0]: _jvp_of_entries,
}
_FIRST = {
    **_OF_LOGITS,
    "softmax": _softmax_jvp,
    "log_softmax": _log_softmax_jvp,
    "logsumexp": _logsumexp_jvp,
    "cross_entropy": _loss_jvp,
}
