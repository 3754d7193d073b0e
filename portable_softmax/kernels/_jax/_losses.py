"""Cross-entropy as JAX traces it.

With the coefficients ``q_j = a * [j is the label] + c_j``, where a is one number a position and c
is an array that broadcasts to the logits, either may be missing, and with Q = a + sum_j c_j ::

    loss   = a * ((max - x_label) + log1p(rest)) + sum_j c_j ((max - x_j) + log1p(rest))
             + u * logsumexp^2
    grad_j = p_j * (Q + 2 * u * logsumexp) - q_j                   p = softmax(x)

Labels, weights and label smoothing make a and c, z_loss makes u, and `where`, `softcap` and a cast
change the logits x. Here a, u and what else there is one of a position have length 1 along `axis`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.custom_derivatives import SymbolicZero

from portable_softmax.kernels._jax._fold import base, fold, wide
from portable_softmax.kernels._jax._rules import mask_like, masked


class Form(NamedTuple):
    """What a program is compiled for."""

    axis: int
    reduction: str
    indices: bool  # class indices, or a distribution
    check: bool  # a label without a class is nan, as nobody has looked for one
    ignore_index: int | None
    compute: Any
    answer: Any  # dtype of the loss
    gradient: Any  # and of its gradient


class Numbers(NamedTuple):
    """Options that are numbers, as arrays of the compute dtype; None where they do nothing."""

    label_smoothing: Any
    z_loss: Any
    softcap: Any


class Weights(NamedTuple):
    """The weights of the classes and of the positions; None where they are 1."""

    classes: Any
    samples: Any


class Terms(NamedTuple):
    """The coefficients of the positions."""

    index: Any  # the labels, or None
    a: Any
    c: Any
    u: Any
    counted: Any  # bool; None where every position counts


@partial(jax.jit, static_argnames="form")
def cross_entropy(
    x: Any, labels: Any, weights: Weights, where: Any, numbers: Numbers, form: Form
) -> Any:
    """Return the reduced loss."""
    loss = reduced(x.astype(form.compute), labels, weights, where, numbers, form)
    return loss.astype(form.answer)


@partial(jax.jit, static_argnames="form")
def cross_entropy_value_and_grad(
    x: Any, labels: Any, weights: Weights, where: Any, numbers: Numbers, form: Form
) -> tuple[Any, Any]:
    """Return the reduced loss and its gradient."""
    loss, pull_back = jax.vjp(
        lambda x: reduced(x, labels, weights, where, numbers, form), x.astype(form.compute)
    )
    (grad,) = pull_back(jnp.ones_like(loss))
    return loss.astype(form.answer), grad.astype(form.gradient)


@partial(jax.jit, static_argnames=("shape", "axis", "ignore_index"))
def every_label_has_a_class(
    labels: Any, where: Any, shape: Any, axis: int, ignore_index: int | None
) -> Any:
    """Return whether each label is ignored, or a class of logits of this shape that takes part."""
    index, counted = indices(labels, axis, ignore_index)
    return jnp.all(_valid(index, counted, where, shape, axis))


def reduced(x: Any, labels: Any, weights: Weights, where: Any, numbers: Numbers, form: Form) -> Any:
    axis = form.axis
    where = None if where is None else mask_like(where, x.ndim)
    index = counted = valid = None
    if form.indices:
        index, counted = indices(labels, axis, form.ignore_index)
    if weights.samples is not None:
        sample = jnp.expand_dims(weights.samples.astype(x.dtype), axis)
        weights = weights._replace(samples=sample)
        counted = (sample != 0) if counted is None else counted & (sample != 0)
    if form.indices and form.check:
        valid = _valid(index, counted, where, x.shape, axis)
    x = _conditioned(x, counted, where, numbers.softcap, axis)
    terms, total = _terms(x, labels, index, counted, weights, where, numbers, axis)
    loss = _losses(x, terms, axis)
    if valid is not None:
        loss = loss * jnp.where(valid, 1.0, jnp.nan)
    if counted is not None:
        loss = jnp.where(counted, loss, 0.0)
    if form.reduction == "none":
        return jnp.squeeze(loss, axis=axis)
    if form.reduction == "sum":
        return jnp.sum(loss)
    if total is None:
        return jnp.mean(loss)
    # Smoothing may leave a loss where the weights sum to 0, which is no infinite mean.
    return jnp.where(total == 0, jnp.nan, jnp.sum(loss) / jnp.where(total == 0, jnp.inf, total))


# --------------------------------------------------------------------------- labels


def indices(labels: Any, axis: int, ignore_index: int | None) -> tuple[Any, Any]:
    """Return the labels in the default integer dtype, and which of them count."""
    labels = jnp.expand_dims(labels, axis)
    limits = jnp.iinfo(labels.dtype)
    counted = None
    # An index that the labels' dtype cannot hold matches none: comparing would wrap it around.
    if ignore_index is not None and limits.min <= ignore_index <= limits.max:
        counted = labels != jnp.asarray(ignore_index, labels.dtype)
    return labels.astype(jnp.result_type(int)), counted


def _valid(index: Any, counted: Any, where: Any, shape: Any, axis: int) -> Any:
    valid = (index >= 0) & (index < shape[axis])
    if where is not None:
        where = jnp.broadcast_to(mask_like(where, len(shape)), shape)
        valid = valid & jnp.take_along_axis(where, index, axis=axis, mode="clip")
    return valid if counted is None else valid | ~counted


def _terms(
    x: Any,
    labels: Any,
    index: Any,
    counted: Any,
    weights: Weights,
    where: Any,
    numbers: Numbers,
    axis: int,
) -> tuple[Terms, Any]:
    """Return the coefficients, and what the mean divides by if that is not their number."""
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    weight, sample = weights
    if weight is not None:
        weight = weight.astype(x.dtype)
    a = c = total = None
    if index is not None:
        a = jnp.ones((), x.dtype) if weight is None else jnp.take(weight, index, mode="clip")
        if sample is not None:
            a = a * sample
        if counted is not None:
            a = jnp.where(counted, a, 0.0)
        u = a
        if weight is not None or counted is not None:
            total = jnp.sum(a)
    else:
        c = labels.astype(x.dtype)
        c = c if where is None else jnp.where(where, c, 0.0)
        u = jnp.sum(_weighted(c, weight, shape), axis=axis, keepdims=True)
        if sample is not None:
            c = jnp.where(counted, c, 0.0)
            u, total = jnp.where(counted, u * sample, 0.0), jnp.sum(sample)
    if (smoothing := numbers.label_smoothing) is not None:
        a, c = (None if part is None else (1.0 - smoothing) * part for part in (a, c))
        if where is None:
            spread = jnp.ones(shape, x.dtype) * (smoothing / x.shape[axis])
        else:
            part = jnp.broadcast_to(where, x.shape).astype(x.dtype)
            spread = part * (smoothing / jnp.maximum(jnp.sum(part, axis=axis, keepdims=True), 1.0))
        c = spread if c is None else c + spread
    c = None if c is None else _weighted(c, weight, shape)
    if c is not None and sample is not None:
        c = jnp.where(counted & (c != 0), c * sample, 0.0)
    u = None if numbers.z_loss is None else numbers.z_loss * u
    return Terms(index, a, c, u, counted), total


def _weighted(c: Any, weight: Any, shape: Any) -> Any:
    """Multiply by the weights of the classes; 0 stays 0, whatever the weight."""
    return c if weight is None else jnp.where(c == 0, 0.0, c * jnp.reshape(weight, shape))


# --------------------------------------------------------------------------- logits


def _conditioned(x: Any, counted: Any, where: Any, softcap: Any, axis: int) -> Any:
    """Return the logits that are folded."""
    if softcap is not None:  # neither bounds nor differentiates what does not count
        for part in (where, counted):
            x = x if part is None else jnp.where(part, x, 0.0)
        x = _capped(x, softcap)
    if where is not None:
        x, _ = masked(x, where, (axis,))
    return x


@jax.custom_jvp
def _capped(x: Any, cap: Any) -> Any:
    """cap * tanh(x / cap), which is x where the cap is far away."""
    part = x / cap
    near = jnp.abs(part) > jnp.finfo(x.dtype).eps
    return jnp.where(near, cap * jnp.tanh(part), x)


@_capped.defjvp
def _capped_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    """1 - tanh^2, written as 1 / cosh^2 to keep its digits where tanh is close to 1."""
    (x, cap), (t, _) = primals, tangents
    size = jnp.where(x < 0, -x, x)  # abs, but with a second derivative at 0
    e = jnp.exp(-2.0 * (size / cap))
    return _capped(x, cap), 4.0 * e / ((1.0 + e) * (1.0 + e)) * t


# --------------------------------------------------------------------------- positions


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _losses(x: Any, terms: Terms, axis: int) -> Any:
    """Return the loss of each position."""
    m, rest = fold(x, None, (axis,))
    log = jnp.log1p(rest)
    return _summed(terms, _multiplied(x, m, log, terms, axis), wide(log, (axis,)), axis)


@partial(_losses.defjvp, symbolic_zeros=True)
def _losses_jvp(axis: int, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x, terms), (t, changes) = primals, tangents
    m, rest = fold(x, None, (axis,))
    log = jnp.log1p(rest)
    values = _multiplied(x, m, log, terms, axis)
    logs = wide(log, (axis,))
    loss = _summed(terms, values, logs, axis)
    change = jnp.zeros_like(loss)
    if not isinstance(t, SymbolicZero):
        grad = _gradient(x, m, rest, log, terms, axis)
        change = jnp.sum(grad * t, axis=axis, keepdims=True)
    # The loss is linear in the coefficients.
    a, c, u = (None if isinstance(part, SymbolicZero) else part for part in changes[1:4])
    if any(part is not None for part in (a, c, u)):
        if terms.counted is not None:  # what an ignored row holds would multiply a 0
            values = [v if v is None else jnp.where(terms.counted, v, 0.0) for v in values]
            logs = jnp.where(terms.counted, logs, 0.0)
        change = change + _summed(terms._replace(a=a, c=c, u=u), values, logs, axis)
    return loss, change


def _multiplied(x: Any, m: Any, log: Any, terms: Terms, axis: int) -> list[Any]:
    """Return what a, c and u multiply, finite where the coefficient is 0; None where it is None."""
    label = every = square = None
    if terms.a is not None:
        label = jnp.take_along_axis(x, terms.index, axis=axis, mode="clip")
        label = wide((m - jnp.squeeze(label, axis=axis)) + log, (axis,))
    m, log = wide(m, (axis,)), wide(log, (axis,))
    if terms.c is not None:
        every = m - x if _same_everywhere(terms.c, axis) else (m - x) + log
    if terms.u is not None:
        square = (m + log) * (m + log)
    return [
        v if v is None else jnp.where((coefficient == 0) & jnp.isinf(v), 0.0, v)
        for coefficient, v in zip(terms[1:4], (label, every, square), strict=True)
    ]


def _same_everywhere(c: Any, axis: int) -> bool:
    """Return whether each position has the same coefficients.

    Their sum then multiplies log, so that no sum over the classes has to wait for another: where
    they are cut, one all-reduce has both.
    """
    return all(n == 1 for a, n in enumerate(c.shape) if a != axis)


def _summed(terms: Terms, values: list[Any], log: Any, axis: int) -> Any:
    label, every, square = values
    parts = []
    if terms.a is not None:
        parts.append(terms.a * label)
    if terms.c is not None:
        parts.append(jnp.sum(terms.c * every, axis=axis, keepdims=True))
        if _same_everywhere(terms.c, axis):
            parts.append(jnp.sum(terms.c, axis=axis, keepdims=True) * log)
    if terms.u is not None:
        parts.append(terms.u * square)
    return sum(parts[1:], parts[0])


def _gradient(x: Any, m: Any, rest: Any, log: Any, terms: Terms, axis: int) -> Any:
    """p_j * A - q_j with A = Q + 2 * u * logsumexp, without its cancellation.

    With p_j = e_j / (1 + rest) this is ((e_j Q - q_j) - q_j rest + e_j (A - Q)) / (1 + rest). At
    the label of a confident row e_j Q - q_j is an exact 0, and -q_j rest is minus the sum of the
    others.
    """
    parts = m, rest, log, *base(x, m, (axis,))
    m, rest, log, c, power = (wide(part, (axis,)) for part in parts)
    unit, inverse = jnp.exp(m - c) * power, 1.0 / (1.0 + rest)
    sums = [] if terms.a is None else [terms.a]
    if terms.c is not None:
        sums.append(jnp.sum(terms.c, axis=axis, keepdims=True))
    total, more = sum(sums[1:], sums[0]), 0.0
    if terms.u is not None:
        lse = jnp.where((terms.u == 0) & jnp.isinf(m), 0.0, m + log)
        more = 2.0 * terms.u * lse

    def entry(x: Any, q: Any) -> Any:
        e = jnp.exp(x - c) * power / unit
        e = e + lax.stop_gradient(jnp.where(x == m, 1.0 - e, 0.0))  # an exact 1
        return (((e * total - q) - q * rest) + e * more) * inverse

    if terms.a is None:
        grad = entry(x, terms.c)
    else:
        label = lax.broadcasted_iota(terms.index.dtype, x.shape, axis) == terms.index
        if terms.c is None:
            logit = jnp.take_along_axis(x, terms.index, axis=axis, mode="clip")
            grad = jnp.exp(x - c) * power / (unit * (1.0 + rest)) * (total + more)
            grad = jnp.where(label, entry(logit, terms.a), grad)
        else:
            grad = entry(x, jnp.where(label, terms.c + terms.a, terms.c))
    return grad if terms.counted is None else jnp.where(terms.counted, grad, 0.0)
