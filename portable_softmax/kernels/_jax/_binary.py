"""Cross-entropy of yes-or-no labels as JAX traces it.

With the coefficients a and b of a yes and of a no, for one entry ::

    loss = a softplus(-z) + b softplus(z)
    grad = b sigmoid(z) - a sigmoid(-z)

and softplus(z) = max(z, 0) + log1p(e) for e = exp(-|z|). What a coefficient of 0 stands at counts
as 0, whatever it is.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.custom_derivatives import SymbolicZero

from portable_softmax.kernels._jax._fold import compiled


class Form(NamedTuple):
    """What a program is compiled for."""

    reduction: str
    compute: Any
    answer: Any  # dtype of the loss
    gradient: Any  # and of its gradient


@compiled("form")
def sigmoid_cross_entropy(
    x: Any, labels: Any, weight: Any, pos_weight: Any, numbers: Any, form: Form
) -> Any:
    """Return the reduced loss; `numbers` are 1 - smoothing and smoothing / 2, or None."""
    x, *both = _prepared(x, labels, weight, pos_weight, numbers, form)
    return _reduced(_losses(x, *both), form)


@compiled("form")
def sigmoid_cross_entropy_value_and_grad(
    x: Any, labels: Any, weight: Any, pos_weight: Any, numbers: Any, form: Form
) -> tuple[Any, Any]:
    """Return the same and its gradient."""
    x, *both = _prepared(x, labels, weight, pos_weight, numbers, form)
    grad = _slopes(x, *both)
    grad = grad / x.size if form.reduction == "mean" else grad
    return _reduced(_losses(x, *both), form), grad.astype(form.gradient)


def _prepared(
    x: Any, labels: Any, weight: Any, pos_weight: Any, numbers: Any, form: Form
) -> tuple[Any, Any, Any]:
    """Return the logits, and what their two logarithms are multiplied by."""
    x, yes = x.astype(form.compute), labels.astype(form.compute)
    no = 1.0 - yes
    if numbers is not None:
        yes, no = (numbers[0] * each + numbers[1] for each in (yes, no))
    if pos_weight is not None:
        yes = _weighted(yes, pos_weight)
    if weight is not None:
        yes, no = _weighted(yes, weight), _weighted(no, weight)
    return x, yes, no


def _weighted(coefficient: Any, weight: Any) -> Any:
    """Return coefficients times their weights, 0 where they are 0, whatever the weight."""
    never = (coefficient == 0) & ~jnp.isfinite(weight)
    return coefficient * jnp.where(never, 0.0, weight)


def _reduced(each: Any, form: Form) -> Any:
    if form.reduction != "none":
        if each.size >= _LARGE:
            # Else XLA's CPU compiler makes one operation of losses and sum, and no vectors. Of a
            # small array that one operation takes less time.
            each = jnp.where(each == each, each, jnp.nan)
        each = jnp.mean(each) if form.reduction == "mean" else jnp.sum(each)
    return each.astype(form.answer)


_LARGE = 1 << 14


@jax.custom_jvp
def _losses(x: Any, yes: Any, no: Any) -> Any:
    """Return the loss of each entry."""
    log = jnp.log1p(jnp.exp(-jnp.abs(x)))
    return _counted(yes, lax.max(-x, 0.0 * yes) + log) + _counted(no, lax.max(x, 0.0 * no) + log)


def _counted(coefficient: Any, value: Any) -> Any:
    return jnp.where(coefficient == 0, 0.0, coefficient * value)


@partial(_losses.defjvp, symbolic_zeros=True)
def _losses_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    x, yes, no = primals
    parts = []
    if not isinstance(tangents[0], SymbolicZero):
        parts.append(_slopes(x, yes, no) * tangents[0])
    for coefficient, y, t in ((yes, -x, tangents[1]), (no, x, tangents[2])):
        if not isinstance(t, SymbolicZero):
            # The loss is linear in the coefficients; what does not count is as a logit of 0.
            never = (coefficient == 0) & ~jnp.isfinite(y)
            parts.append(jax.nn.softplus(jnp.where(never, 0.0, y)) * t)
    loss = _losses(x, yes, no)
    return loss, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(loss)


def _slopes(x: Any, yes: Any, no: Any) -> Any:
    """Return the gradient of each loss; its own derivative at 0 is that of the sigmoid."""
    positive = x >= 0
    e = jnp.exp(jnp.where(positive, -x, x))
    inverse = 1.0 / (1.0 + e)
    rising, falling = jnp.where(positive, 1.0, e), jnp.where(positive, e, 1.0)
    return _counted(no, rising * inverse) - _counted(yes, falling * inverse)
