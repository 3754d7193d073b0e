"""Cross-entropy as JAX traces it.

With the coefficients ``q_j = a * [j is the label] + c_j``, where a is one number per position and c
is an array that broadcasts to the logits, either may be missing, and with Q = a + sum_j c_j ::

    loss   = a * ((max - x_label) + log1p(rest)) + sum_j c_j ((max - x_j) + log1p(rest))
             + u * logsumexp^2
    grad_j = p_j * (Q + 2 * u * logsumexp) - q_j                   p = softmax(x)

Labels, weights and label smoothing make a and c, z_loss makes u, and `where`, `softcap` and a cast
change the logits x. Here a, u and what else there is one of a position have no axis of classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.custom_derivatives import SymbolicZero

from portable_softmax.kernels._jax._fold import compiled, exps, fold, select, softmax_of, spread
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

    index: Any  # the labels, each of them a class, or None
    a: Any  # None for 1, where there are labels
    c: Any
    u: Any
    counted: Any  # bool; None where every position counts


@compiled("form")
def cross_entropy(
    x: Any, labels: Any, weights: Weights, where: Any, numbers: Numbers, form: Form
) -> Any:
    """Return the reduced loss."""
    loss = reduced(x.astype(form.compute), labels, weights, where, numbers, form)
    return loss.astype(form.answer)


@compiled("form")
def cross_entropy_value_and_grad(
    x: Any, labels: Any, weights: Weights, where: Any, numbers: Numbers, form: Form
) -> tuple[Any, Any]:
    """Return the reduced loss and its gradient.

    What comes from upstream is known here, and multiplies where the gradient is made: that is one
    pass less over what is as large as the logits.
    """
    x, axis = x.astype(form.compute), form.axis
    terms, reduce = _prepared(x, labels, weights, where, numbers, form)
    x, pull_back = jax.vjp(partial(_conditioned, terms, where, numbers.softcap, axis), x)
    state, _, losses = _folded(x, terms, axis)
    loss, of_losses = jax.vjp(reduce, losses)
    (upstream,) = of_losses(jnp.ones_like(loss))
    (grad,) = pull_back(_gradient(x, state, terms, axis, upstream))
    return loss.astype(form.answer), grad.astype(form.gradient)


@partial(jax.jit, static_argnames=("shape", "axis", "ignore_index"))
def every_label_has_a_class(
    labels: Any, where: Any, shape: Any, axis: int, ignore_index: int | None
) -> Any:
    """Return whether each label is ignored, or a class of logits of this shape that takes part."""
    labels, counted = indices(labels, ignore_index)
    where = None if where is None else mask_like(where, len(shape))
    return jnp.all(_valid(labels, _nearest(labels, shape[axis]), counted, where, shape, axis))


def reduced(x: Any, labels: Any, weights: Weights, where: Any, numbers: Numbers, form: Form) -> Any:
    terms, reduce = _prepared(x, labels, weights, where, numbers, form)
    x = _conditioned(terms, where, numbers.softcap, form.axis, x)
    return reduce(_losses(x, terms, form.axis))


def _prepared(
    x: Any, labels: Any, weights: Weights, where: Any, numbers: Numbers, form: Form
) -> tuple[Terms, Callable[[Any], Any]]:
    """Return the coefficients, and what reduces the losses; of `x` only shape and dtype count."""
    axis = form.axis
    where = None if where is None else mask_like(where, x.ndim)
    index = counted = valid = None
    if form.indices:
        labels, counted = indices(labels, form.ignore_index)
        index = _nearest(labels, x.shape[axis])
    if weights.samples is not None:
        weights = weights._replace(samples=weights.samples.astype(x.dtype))
        weighs = weights.samples != 0
        counted = weighs if counted is None else counted & weighs
    if form.indices and form.check:
        valid = _valid(labels, index, counted, where, x.shape, axis)
    terms, total = _terms(x, labels, index, counted, weights, where, numbers, axis)

    def reduce(loss: Any) -> Any:
        if valid is not None:
            loss = loss * select(valid, jnp.ones_like(loss), math.nan)
        if counted is not None:
            loss = select(counted, loss, 0.0)
        if form.reduction == "none":
            return loss
        # Else XLA's CPU compiler makes one operation of the rows' sums and of this one.
        loss = select(loss == loss, loss, math.nan)
        if form.reduction == "sum":
            return jnp.sum(loss)
        if total is None:
            return jnp.mean(loss)
        # Smoothing may leave a loss where the weights sum to 0, which is no infinite mean.
        return jnp.where(total == 0, jnp.nan, jnp.sum(loss) / jnp.where(total == 0, jnp.inf, total))

    return terms, reduce


# --------------------------------------------------------------------------- labels


def indices(labels: Any, ignore_index: int | None) -> tuple[Any, Any]:
    """Return the labels in the default integer dtype, and which of them count."""
    limits = jnp.iinfo(labels.dtype)
    counted = None
    # An index that the labels' dtype cannot hold matches none: comparing would wrap it around.
    if ignore_index is not None and limits.min <= ignore_index <= limits.max:
        counted = labels != jnp.asarray(ignore_index, labels.dtype)
    return labels.astype(jnp.result_type(int)), counted


def _nearest(labels: Any, n: Any) -> Any:
    """Return the nearest class to each label, so that nothing beyond the classes is read."""
    least, last = (jnp.asarray(v, labels.dtype) for v in (0, n - 1))
    return lax.clamp(least, labels, last)


def _at(x: Any, index: Any, axis: int) -> Any:
    """Return what an array, of the logits' dimensions, holds at a class of each position."""
    positions = tuple(a for a in range(x.ndim) if a != axis)
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
        operand_batching_dims=positions,
        start_indices_batching_dims=tuple(range(x.ndim - 1)),
    )
    ones = (1,) * x.ndim
    return lax.gather(x, index[..., None], numbers, ones, mode="promise_in_bounds")


def _is_label(index: Any, x: Any, axis: int) -> Any:
    """Return which entries are those of the labels."""
    return lax.broadcasted_iota(index.dtype, x.shape, axis) == spread(index, x, (axis,))


def _put(x: Any, index: Any, values: Any, axis: int) -> Any:
    """Return an array with another value at a class of each position."""
    positions = tuple(a for a in range(x.ndim) if a != axis)
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=(),
        inserted_window_dims=(axis,),
        scatter_dims_to_operand_dims=(axis,),
        operand_batching_dims=positions,
        scatter_indices_batching_dims=tuple(range(x.ndim - 1)),
    )
    return lax.scatter(
        x, index[..., None], values, numbers, unique_indices=True, mode="promise_in_bounds"
    )


def _valid(labels: Any, index: Any, counted: Any, where: Any, shape: Any, axis: int) -> Any:
    valid = labels == index
    if where is not None:
        valid = valid & _at(jnp.broadcast_to(where, shape), index, axis)
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
        if weight is not None:
            a = jnp.take(weight, index, mode="clip")
        if sample is not None:
            a = sample if a is None else a * sample
        if counted is not None:
            a = jnp.where(counted, jnp.ones((), x.dtype) if a is None else a, 0.0)
        u = a
        if a is not None:
            total = jnp.sum(a)
    else:
        c = labels.astype(x.dtype)
        c = c if where is None else jnp.where(where, c, 0.0)
        u = jnp.sum(_weighted(c, weight, shape), axis=axis)
        if sample is not None:
            c = select(spread(counted, c, (axis,)), c, 0.0)
            u, total = select(counted, u * sample, 0.0), jnp.sum(sample)
    if (smoothing := numbers.label_smoothing) is not None:
        rest = 1.0 - smoothing
        if index is not None:
            a = rest if a is None else rest * a
        c = None if c is None else rest * c
        if where is None:
            part = jnp.broadcast_to(smoothing / x.shape[axis], shape)
        else:
            part = jnp.broadcast_to(where, x.shape).astype(x.dtype)
            part = part * (smoothing / jnp.maximum(jnp.sum(part, axis=axis, keepdims=True), 1.0))
        c = part if c is None else c + part
    c = None if c is None else _weighted(c, weight, shape)
    if c is not None and sample is not None:
        weighs = jnp.expand_dims(counted, axis)
        c = jnp.where(weighs & (c != 0), c * jnp.expand_dims(sample, axis), 0.0)
    if numbers.z_loss is not None:
        u = numbers.z_loss if u is None else numbers.z_loss * u
    return Terms(index, a, c, None if numbers.z_loss is None else u, counted), total


def _weighted(c: Any, weight: Any, shape: Any) -> Any:
    """Multiply by the weights of the classes; 0 stays 0, whatever the weight."""
    return c if weight is None else jnp.where(c == 0, 0.0, c * jnp.reshape(weight, shape))


# --------------------------------------------------------------------------- logits


def _conditioned(terms: Terms, where: Any, softcap: Any, axis: int, x: Any) -> Any:
    """Return the logits that are folded."""
    counted, where = terms.counted, None if where is None else mask_like(where, x.ndim)
    if softcap is not None:  # neither bounds nor differentiates what does not count
        if where is not None:
            x = jnp.where(where, x, 0.0)
        if counted is not None:
            x = select(spread(counted, x, (axis,)), x, 0.0)
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


class State(NamedTuple):
    """What rows come to."""

    m: Any
    rest: Any
    log: Any  # log1p(rest)


def _folded(x: Any, terms: Terms, axis: int) -> tuple[State, list[Any], Any]:
    """Return what rows come to, what the coefficients multiply, and the loss of each position."""
    m, rest = fold(x, None, (axis,))
    rest = select(lax.is_finite(m), rest, math.nan)
    state = State(m, rest, jnp.log1p(rest))
    values = _multiplied(x, state, terms, axis)
    return state, values, _summed(terms, values, state.log, axis)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _losses(x: Any, terms: Terms, axis: int) -> Any:
    """Return the loss of each position."""
    return _folded(x, terms, axis)[2]


@partial(_losses.defjvp, symbolic_zeros=True)
def _losses_jvp(axis: int, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x, terms), (t, changes) = primals, tangents
    state, values, loss = _folded(x, terms, axis)
    log = state.log
    parts = []
    if not isinstance(t, SymbolicZero):
        parts.append(jnp.sum(_gradient(x, state, terms, axis) * t, axis=axis))
    # The loss is linear in the coefficients.
    a, c, u = (None if isinstance(part, SymbolicZero) else part for part in changes[1:4])
    if any(part is not None for part in (a, c, u)):
        if terms.counted is not None:  # what an ignored row holds would multiply a 0
            label, every, square = values
            rows = label, log, square
            label, log, square = (v if v is None else select(terms.counted, v, 0.0) for v in rows)
            if every is not None:
                every = select(spread(terms.counted, x, (axis,)), every, 0.0)
            values = [label, every, square]
        index = None if a is None else terms.index
        parts.append(_summed(terms._replace(index=index, a=a, c=c, u=u), values, log, axis))
    return loss, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(loss)


def _multiplied(x: Any, state: State, terms: Terms, axis: int) -> list[Any]:
    """Return what a, c and u multiply, finite where the coefficient is 0; None where it is None."""
    (m, _, log), label, every, square = state, None, None, None
    if terms.index is not None:
        label = (m - _at(x, terms.index, axis)) + log
    if terms.c is not None:
        every = spread(m, x, (axis,)) - x
        if _same_everywhere(terms.c, axis):
            # At the maximum log alone is multiplied: an infinite weight must not meet a 0 here.
            every = jnp.where((every == 0) & jnp.isinf(terms.c), 1.0, every)
        else:
            every = every + spread(log, x, (axis,))
    if terms.u is not None:
        square = (m + log) * (m + log)
    return [
        v if coefficient is None else jnp.where((coefficient == 0) & jnp.isinf(v), 0.0, v)
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
    if terms.index is not None:
        parts.append(label if terms.a is None else terms.a * label)
    if terms.c is not None:
        parts.append(jnp.sum(terms.c * every, axis=axis))
        if _same_everywhere(terms.c, axis):
            parts.append(jnp.sum(terms.c, axis=axis) * log)
    if terms.u is not None:
        parts.append(terms.u * square)
    return sum(parts[1:], parts[0])


# Up to so many classes a select costs less than a scatter. Beside an exponential XLA's CPU compiler
# does not vectorize it: on 512 classes it doubles the time of the gradient.
_FEW = 64


def _gradient(x: Any, state: State, terms: Terms, axis: int, upstream: Any = None) -> Any:
    """p_j * A - q_j with A = Q + 2 * u * logsumexp, without its cancellation; times `upstream`.

    With p_j = e_j / (1 + rest) this is ((e_j Q - q_j) - q_j rest + e_j (A - Q)) / (1 + rest). At
    the label of a confident row e_j Q - q_j is an exact 0, and -q_j rest is minus the sum of the
    others.
    """
    (m, rest, log), axes, more = state, (axis,), None
    if terms.u is not None:
        lse = jnp.where((terms.u == 0) & jnp.isinf(m), 0.0, m + log)
        more = 2.0 * terms.u * lse
    if terms.c is None:
        a, found = terms.a, softmax_of(x, m, rest, None, axes)
        missing = jnp.expm1(_at(x, terms.index, axis) - m)  # e - 1
        own = missing - rest
        if a is not None:
            own = own * a
        if more is not None:
            own = own + (missing + 1.0) * more
            more = more + 1.0 if a is None else more + a
        elif a is not None:
            more = a
        own, n = own / (1.0 + rest), x.shape[axis]
        if upstream is not None:
            own, more = own * upstream, upstream if more is None else more * upstream
        if more is not None:
            found = found * spread(more, x, axes)
        if isinstance(n, int) and n < _FEW:
            grad = select(_is_label(terms.index, x, axis), spread(own, x, axes), found)
        else:
            grad = _put(found, terms.index, own, axis)
    else:
        e, unit = exps(x, m, None, axes)
        e = e / spread(unit, x, axes)
        highest = x == spread(m, x, axes)
        e = e + lax.stop_gradient(select(highest, 1.0 - e, 0.0))  # an exact 1
        total, q = jnp.sum(terms.c, axis=axis, keepdims=True), terms.c
        if terms.index is not None:
            a = jnp.expand_dims(jnp.broadcast_to(terms.a, m.shape), axis)
            total, q = total + a, jnp.where(_is_label(terms.index, x, axis), q + a, q)
        grad = (e * total - q) - q * spread(rest, x, axes)
        if more is not None:
            grad = grad + e * spread(more, x, axes)
        grad = grad * spread(1.0 / (1.0 + rest), x, axes)
        grad = grad if upstream is None else grad * spread(upstream, x, axes)
    counted = terms.counted
    return grad if counted is None else select(spread(counted, x, axes), grad, 0.0)
