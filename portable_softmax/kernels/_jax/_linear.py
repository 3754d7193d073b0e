"""A linear layer with a loss as JAX traces it: a scan over tiles of positions.

With a sum or a mean the gradients are made beside the loss wherever a derivative is asked for, in
forward mode: the derivative is linear in the tangents, so that reverse mode needs no more than the
gradients, and the logits are made once. With a loss for each position they are made again in the
backward pass (`jax.checkpoint`), as are those of derivatives with respect to labels and weights.

Shapes are fixed, so that positions which do not count cannot be dropped. They go to the last tiles,
and a tile of them alone is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.custom_derivatives import SymbolicZero

from portable_softmax.kernels._jax import _losses
from portable_softmax.libraries._jax import like_others


class Layer(NamedTuple):
    """What is differentiated."""

    hidden: Any  # (N, H)
    classifier: Any  # (C, H)
    bias: Any  # (C,), or None


class Rest(NamedTuple):
    """The other arrays."""

    labels: Any  # (N,), or (N, C)
    weights: _losses.Weights
    where: Any  # (C,), or with one row, or N of them
    numbers: _losses.Numbers


class Form(NamedTuple):
    """What a program is compiled for."""

    loss: _losses.Form  # of a tile: a loss for each of its positions
    reduction: str
    height: int  # positions of a tile


@partial(jax.jit, static_argnames="form")
def linear_cross_entropy(layer: Layer, rest: Rest, form: Form) -> Any:
    """Return the reduced loss; with ``reduction="none"``, of shape (N,)."""
    layer, rest = _sound(layer, rest, form)
    if form.reduction == "none":
        return _each(layer, rest, form)
    loss = _sum(layer, rest, form)
    return loss if form.reduction == "sum" else _mean(loss, _divisor(layer, rest, form))


@partial(jax.jit, static_argnames="form")
def linear_cross_entropy_value_and_grad(layer: Layer, rest: Rest, form: Form) -> tuple[Any, Layer]:
    """Return the reduced loss and the gradients of its sum."""
    layer, rest = _sound(layer, rest, form)
    losses, grads = _with_gradients(layer, rest, form)
    if form.reduction == "none":
        return losses, grads
    if form.reduction == "sum":
        return jnp.sum(losses), grads
    divisor = _divisor(layer, rest, form)
    by = jnp.where(divisor == 0, jnp.inf, divisor)
    return _mean(jnp.sum(losses), divisor), jax.tree.map(lambda g: g / by, grads)


def _mean(total: Any, divisor: Any) -> Any:
    # Smoothing may leave a loss where the weights sum to 0, which is no infinite mean.
    return jnp.where(divisor == 0, jnp.nan, total / jnp.where(divisor == 0, jnp.inf, divisor))


def _divisor(layer: Layer, rest: Rest, form: Form) -> Any:
    """Return the weights of the labels that count, or the number of positions."""
    dtype = form.loss.compute
    if not form.loss.indices and rest.weights.samples is None:
        return jnp.asarray(layer.hidden.shape[0], dtype)
    weight, sample = rest.weights
    counted = _counted(rest, form)
    each = jnp.ones(layer.hidden.shape[0], dtype)
    if form.loss.indices and weight is not None:
        index, _ = _losses.indices(rest.labels, None)
        each = jnp.take(weight.astype(dtype), index, mode="clip")
    if sample is not None:
        each = each * sample.astype(dtype)
    return jnp.sum(each if counted is None else jnp.where(counted, each, 0.0))


def _counted(rest: Rest, form: Form) -> Any:
    """Return which positions are neither ignored nor of weight 0, None where every one counts."""
    counted, sample = None, rest.weights.samples
    if form.loss.indices:
        _, counted = _losses.indices(rest.labels, form.loss.ignore_index)
    if sample is not None:
        weighs = sample != 0
        counted = weighs if counted is None else counted & weighs
    return counted


def _sound(layer: Layer, rest: Rest, form: Form) -> tuple[Layer, Rest]:
    """Put 0 in place of what is left out, as 0 times nan would be nan."""
    hidden, classifier, bias = layer
    counted = _counted(rest, form)
    if counted is not None:
        hidden = jnp.where(counted[:, None], hidden, 0)
    where = rest.where
    if where is not None and where.shape[-1] == classifier.shape[0]:
        if where.ndim == 2 and where.shape[0] == 1:
            where = where[0]
        if where.ndim == 1:
            classifier = jnp.where(where[:, None], classifier, 0)
            bias = None if bias is None else jnp.where(where, bias, 0)
    return Layer(hidden, classifier, bias), rest._replace(where=where)


# --------------------------------------------------------------------------- tiles


class _Tile(NamedTuple):
    hidden: Any
    labels: Any
    samples: Any
    where: Any  # None where it is the same for every tile
    live: Any  # which positions count, and do not fill the last tile; None in a single one


class _Tiles(NamedTuple):
    """The positions in tiles, along a new first axis."""

    parts: _Tile
    order: Any  # of the positions in them; None if it is theirs
    positions: int

    def step(self, function: Any, nothing: Any, sums: Any, part: _Tile) -> Any:
        """Return ``function(sums, part)`` of a scan, or `nothing` where no position counts.

        What is the same for all tiles stays within the branch, where JAX would otherwise make it
        once and keep it: masks and constants as large as a tile.
        """
        if part.live is None:
            return function(sums, part)
        return lax.cond(jnp.any(part.live), function, nothing, sums, part)

    def back(self, found: Any) -> Any:
        """Return what there is of each position in a tile, as the positions were."""
        found = jnp.reshape(found, (-1, *found.shape[2:]))[: self.positions]
        if self.order is None:
            return found
        return jnp.zeros_like(found).at[self.order].set(found, unique_indices=True)


def _tiles(layer: Layer, rest: Rest, form: Form) -> _Tiles:
    """Return the tiles, the last one filled up; positions that do not count go last."""
    n, height = layer.hidden.shape[0], form.height
    counted = _counted(rest, form) if height < n else None
    order = None if counted is None else jnp.argsort(~counted)
    short = -n % height

    def cut(a: Any) -> Any:
        a = a if order is None else a[order]
        if short:
            a = jnp.pad(a, [(0, short)] + [(0, 0)] * (a.ndim - 1))
        return jnp.reshape(a, (-1, height, *a.shape[1:]))

    live = jnp.ones(n, bool) if counted is None else counted
    live = cut(live) if height < n else None
    where = rest.where if _has_rows(rest) else None
    samples, where = (None if a is None else cut(a) for a in (rest.weights.samples, where))
    return _Tiles(_Tile(cut(layer.hidden), cut(rest.labels), samples, where, live), order, n)


def _has_rows(rest: Rest) -> bool:
    return rest.where is not None and rest.where.ndim == 2 and rest.where.shape[0] != 1


_product = partial(jnp.einsum, precision="highest")  # of any axes, without a transposed copy

# So many entries of the classifier's gradient are added at once, as XLA makes a product before it
# adds it.
_BLOCK = 1 << 22


def _add_product(so_far: Any, g: Any, hidden: Any) -> Any:
    """Return so_far + g^T hidden."""
    classes, step = len(so_far), max(1, _BLOCK // max(hidden.shape[1], 1))

    def add(so_far: Any, start: Any, length: int) -> Any:
        part = lax.dynamic_slice_in_dim(g, start, length, axis=1)
        new = lax.dynamic_slice_in_dim(so_far, start, length) + _product("nc,nh->ch", part, hidden)
        return lax.dynamic_update_slice_in_dim(so_far, new, start, axis=0)

    if classes <= step:
        return so_far + _product("nc,nh->ch", g, hidden)
    whole, rest = divmod(classes, step)
    so_far = lax.fori_loop(0, whole, lambda i, so_far: add(so_far, i * step, step), so_far)
    return add(so_far, whole * step, rest) if rest else so_far


def _logits(hidden: Any, layer: Layer, dtype: Any) -> Any:
    x = _product("nh,ch->nc", hidden.astype(dtype), layer.classifier.astype(dtype))
    return x if layer.bias is None else x + layer.bias.astype(dtype)


def _zeros(layer: Layer, rest: Rest, dtype: Any) -> Callable[[Any], Any]:
    """Return the function that makes zeros which may differ wherever the arrays do."""
    return lambda shape: like_others(0.0, shape, dtype, (layer, rest))


def _losses_of(x: Any, tile: _Tile, rest: Rest, form: Form) -> Any:
    where = rest.where if tile.where is None else tile.where
    if tile.live is not None:
        x = jnp.where(tile.live[:, None], x, 0.0)
    weights = rest.weights._replace(samples=tile.samples)
    loss = _losses.reduced(x, tile.labels, weights, where, rest.numbers, form.loss)
    return loss if tile.live is None else jnp.where(tile.live, loss, 0.0)


def _each(layer: Layer, rest: Rest, form: Form) -> Any:
    """Return the losses, whose derivatives are JAX's of the scan: it keeps no logits."""
    tiles, dtype = _tiles(layer, rest, form), form.loss.compute
    zeros = _zeros(layer, rest, dtype)

    @jax.checkpoint
    def losses(layer: Layer, rest: Rest, tile: _Tile) -> Any:
        return _losses_of(_logits(tile.hidden, layer, dtype), tile, rest, form)

    def step(_: None, tile: _Tile) -> Any:
        return None, losses(layer, rest, tile)

    def nothing(_: None, tile: _Tile) -> Any:
        return None, zeros(form.height)

    _, found = lax.scan(partial(tiles.step, step, nothing), None, tiles.parts)
    return tiles.back(found)


def _with_gradients(layer: Layer, rest: Rest, form: Form) -> tuple[Any, Layer]:
    """Return the losses and the gradients of their sum, from three products for each tile."""
    dtype, tiles = form.loss.compute, _tiles(layer, rest, form)
    zeros = _zeros(layer, rest, dtype)

    def step(sums: tuple[Any, Any], tile: _Tile) -> Any:
        d_classifier, d_bias = sums
        x = _logits(tile.hidden, layer, dtype)
        loss, pull_back = jax.vjp(lambda x: _losses_of(x, tile, rest, form), x)
        (g,) = pull_back(jnp.ones_like(loss))
        d_hidden = _product("nc,ch->nh", g, layer.classifier.astype(dtype))
        d_classifier = _add_product(d_classifier, g, tile.hidden.astype(dtype))
        if d_bias is not None:
            d_bias = d_bias + jnp.sum(g, axis=0)
        return (d_classifier, d_bias), (loss, d_hidden)

    def nothing(sums: tuple[Any, Any], tile: _Tile) -> Any:
        return sums, (zeros(form.height), zeros(tile.hidden.shape))

    start = zeros(layer.classifier.shape), None if layer.bias is None else zeros(layer.bias.shape)
    scanned = partial(tiles.step, step, nothing)
    sums, (losses, d_hidden) = lax.scan(scanned, start, tiles.parts)
    return tiles.back(losses), Layer(tiles.back(d_hidden), *sums)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _sum(layer: Layer, rest: Rest, form: Form) -> Any:
    return jnp.sum(_each(layer, rest, form))


@partial(_sum.defjvp, symbolic_zeros=True)
def _sum_jvp(form: Form, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (layer, rest), (changes, others) = primals, tangents
    if not all(isinstance(t, SymbolicZero) for t in jax.tree.leaves(others, is_leaf=_is_zero)):
        value: tuple[Any, Any] = jax.jvp(
            lambda layer, rest: jnp.sum(_each(layer, rest, form)), primals, _materialized(tangents)
        )
        return value
    losses, grads = _with_gradients(layer, rest, form)
    change = jnp.zeros((), form.loss.compute)
    for grad, t in zip(grads, changes, strict=True):
        if grad is not None and not isinstance(t, SymbolicZero):
            change = change + jnp.sum(grad * t.astype(grad.dtype))
    return jnp.sum(losses), change


def _is_zero(t: Any) -> bool:
    return isinstance(t, SymbolicZero)


def _materialized(tangents: Any) -> Any:
    return jax.tree.map(
        lambda t: jnp.zeros(t.shape, t.dtype) if _is_zero(t) else t, tangents, is_leaf=_is_zero
    )
