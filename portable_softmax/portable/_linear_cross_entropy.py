"""The cross-entropy of `hidden @ classifier.T + bias` in tiles: its logits are never all there.

With the logits x of a tile of positions and the gradient g of their losses ::

    x = h W^T + b          dh = g W          dW = sum over tiles of g^T h          db = sum of g

The loss and g of a tile of whole rows are those of `_cross_entropy`. Where a row of logits is
longer than a tile, its classes are folded tile by tile (`_loss_in_parts`), and g follows in a
second pass over the tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from portable_softmax import libraries
from portable_softmax._typing import Namespace
from portable_softmax.libraries import cast, device, scalar
from portable_softmax.portable._cross_entropy import (
    Options,
    Target,
    counted_positions,
    cross_entropy,
    cross_entropy_value_and_grad,
    distribution_target,
    index_target,
    mean_divisor,
    nothing_to_inf,
    pick,
    reduced,
    weighted_target,
)
from portable_softmax.portable._loss_in_parts import (
    Part,
    finished_loss,
    fold_part_of_loss,
    gradient_of_part,
    merge_losses,
    part_of_loss,
)
from portable_softmax.portable._sums import total


class Linear(NamedTuple):
    """A linear layer and what its outputs are compared with, positions along the first axis."""

    hidden: Any  # (N, H)
    classifier: Any  # (C, H)
    bias: Any  # (C,), or None
    labels: Any  # (N,) class indices, or (N, C) a distribution
    indices: bool
    # `where` has the shape (C,), (1, C), (N, C), (1, 1) or (N, 1), and `sample_weight` (N,)
    options: Options
    dtype: Any  # what is computed in

    @property
    def positions(self) -> int:
        """N."""
        n: int = self.hidden.shape[0]
        return n

    @property
    def classes(self) -> int:
        """C."""
        n: int = self.classifier.shape[0]
        return n


class Gradients(NamedTuple):
    """With respect to hidden, classifier and bias."""

    hidden: Any
    classifier: Any
    bias: Any


def cuts(n: int, step: int) -> list[slice]:
    """Return the slices of n entries, `step` of them each."""
    return [slice(i, min(i + step, n)) for i in range(0, n, step)] or [slice(0, 0)]


def tiles(problem: Linear, elements: int) -> tuple[int, int]:
    """Return how many positions and classes there are in a tile of so many logits."""
    n = max(problem.classes, 1)
    return max(1, elements // n), max(1, min(n, elements))


def at_positions(problem: Linear, rows: Any) -> Linear:
    """Return the part of a problem at some positions."""
    where, sample = problem.options.where, problem.options.sample_weight
    if where is not None and where.ndim == 2 and where.shape[0] != 1:
        where = where[rows, :]
    sample = None if sample is None else sample[rows]
    labels = problem.labels[rows] if problem.indices else problem.labels[rows, :]
    return problem._replace(
        hidden=problem.hidden[rows, :],
        labels=labels,
        options=problem.options._replace(where=where, sample_weight=sample),
    )


def target_of(xp: Namespace, x: Any, problem: Linear) -> Target:
    """Return what the labels of a tile of whole rows ask for."""
    if problem.indices:
        return index_target(xp, x, problem.labels, 1, problem.options, problem.dtype)
    return distribution_target(cast(xp, problem.labels, problem.dtype), 1, problem.options)


def kept_positions(xp: Namespace, problem: Linear) -> Any:
    """Return which positions are neither ignored nor of weight 0, None where every one counts."""
    options = problem.options
    return counted_positions(xp, problem.labels, options.ignore_index, options.sample_weight)


def sound(xp: Namespace, problem: Linear) -> Linear:
    """Return the problem with 0 in place of what is left out, as 0 times nan would be nan.

    That is the hidden vector of an ignored position, and the weights of a class that no position
    takes.
    """
    options = problem.options
    zero = scalar(xp, 0.0, problem.hidden)
    kept = kept_positions(xp, problem)
    if kept is not None:
        problem = problem._replace(hidden=xp.where(kept[:, None], problem.hidden, zero))
    taken = classes_taken(options.where, problem.classes)
    if taken is not None:
        problem = problem._replace(
            classifier=xp.where(taken[:, None], problem.classifier, zero),
            bias=None if problem.bias is None else xp.where(taken, problem.bias, zero),
        )
    return problem


def classes_taken(where: Any, classes: int) -> Any:
    """Return which classes take part, None if that differs between positions or is all of them."""
    if where is None or where.shape[-1] != classes:
        return None
    if where.ndim == 2:
        return where[0, :] if where.shape[0] == 1 else None
    return where


# --------------------------------------------------------------------------- the public pair


def linear_cross_entropy(xp: Namespace, problem: Linear, elements: float) -> Any:
    """Return the reduced loss; with ``reduction="none"``, of shape (N,)."""
    loss, weight, _ = _run(xp, problem, elements, with_gradients=False)
    return finished(xp, loss, weight, problem.options.reduction)


def linear_cross_entropy_value_and_grad(
    xp: Namespace, problem: Linear, elements: int
) -> tuple[Any, Gradients]:
    """Return the reduced loss and the gradients of its sum."""
    loss, weight, grads = _run(xp, problem, elements, with_gradients=True)
    reduction = problem.options.reduction
    if reduction == "mean":
        divisor = nothing_to_inf(xp, mean_divisor(xp, loss, _weights(weight)))
        grads = Gradients(*[None if g is None else g / divisor for g in grads])
    return finished(xp, loss, weight, reduction), grads


def finished(xp: Namespace, loss: Any, weight: Any, reduction: str) -> Any:
    """Reduce losses and weights of shape (N, 1)."""
    return reduced(xp, loss, _weights(weight), 1, reduction)


def _weights(weight: Any) -> Target:
    return Target(None, None, None, None, weight)


def _run(
    xp: Namespace, problem: Linear, elements: float, *, with_gradients: bool
) -> tuple[Any, Any, Gradients]:
    """Return losses, the labels' weights or None, and the gradients of the sum of the losses."""
    problem = sound(xp, problem)
    width, parts = problem.classes, [problem]
    if elements != math.inf:
        height, width = tiles(problem, int(elements))
        parts = [at_positions(problem, rows) for rows in cuts(problem.positions, height)]
    losses, weights, d_hidden = [], [], []
    d_classifier = d_bias = None
    for part in parts:
        if width < problem.classes:
            loss, weight, grads = _long_rows(xp, part, width, with_gradients=with_gradients)
        else:
            loss, weight, grads = _whole_rows(xp, part, with_gradients=with_gradients)
        losses.append(loss)
        weights.append(weight)
        if grads is not None:
            d_hidden.append(grads.hidden)
            d_classifier = _sum(d_classifier, grads.classifier)
            d_bias = _sum(d_bias, grads.bias)
    return (
        _joined(xp, losses),
        None if weights[0] is None else _joined(xp, weights),
        Gradients(_joined(xp, d_hidden) if d_hidden else None, d_classifier, d_bias),
    )


def _joined(xp: Namespace, parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=0)


def _sum(so_far: Any, more: Any) -> Any:
    return more if so_far is None else so_far + more


def logits_of(xp: Namespace, problem: Linear, classes: Any = None) -> Any:
    """Return the logits of the positions, or those of some classes."""
    classifier, bias = problem.classifier, problem.bias
    if classes is not None:
        classifier = classifier[classes, :]
        bias = None if bias is None else bias[classes]
    x = libraries.of(xp).product(
        cast(xp, problem.hidden, problem.dtype),
        xp.matrix_transpose(cast(xp, classifier, problem.dtype)),
    )
    return x if bias is None else x + cast(xp, bias, problem.dtype)


def gradients_of(xp: Namespace, problem: Linear, g: Any, classes: Any = None) -> Gradients:
    """Return what the gradient with respect to the logits adds to the others."""
    classifier = problem.classifier if classes is None else problem.classifier[classes, :]
    product = libraries.of(xp).product
    return Gradients(
        product(g, cast(xp, classifier, problem.dtype)),
        product(xp.matrix_transpose(g), cast(xp, problem.hidden, problem.dtype)),
        None if problem.bias is None else xp.squeeze(total(xp, g, (0,)), axis=0),
    )


def _whole_rows(
    xp: Namespace, problem: Linear, *, with_gradients: bool
) -> tuple[Any, Any, Gradients | None]:
    x = logits_of(xp, problem)
    target, options = target_of(xp, x, problem), problem.options._replace(reduction="none")
    if not with_gradients:
        return cross_entropy(xp, x, target, 1, options)[:, None], target.weight, None
    loss, g = cross_entropy_value_and_grad(xp, x, target, 1, options)
    return loss[:, None], target.weight, gradients_of(xp, problem, g)


def _long_rows(
    xp: Namespace, problem: Linear, width: int, *, with_gradients: bool
) -> tuple[Any, Any, Gradients | None]:
    if not with_gradients:
        return *by_classes(xp, problem, width), None
    parts: list[Gradients] = []

    def take(classes: slice, g: Any) -> None:
        parts.append(gradients_of(xp, problem, g, classes))

    loss, weight = by_classes(xp, problem, width, take)
    d_hidden = parts[0].hidden
    for part in parts[1:]:
        d_hidden = d_hidden + part.hidden
    d_classifier = _joined(xp, [part.classifier for part in parts])
    d_bias = None if problem.bias is None else _joined(xp, [part.bias for part in parts])
    return loss, weight, Gradients(d_hidden, d_classifier, d_bias)


# --------------------------------------------------------------------------- tiles of a row


def by_classes(
    xp: Namespace,
    problem: Linear,
    width: int,
    take: Callable[[slice, Any], None] | None = None,
) -> tuple[Any, Any]:
    """Return losses and the labels' weights of positions whose rows are long.

    ``take(classes, g)`` is given the gradients with respect to the logits of some classes.
    """
    labels = label_target(xp, problem)
    count = _count(xp, problem)
    sums, all_cuts = None, cuts(problem.classes, width)
    for classes in all_cuts:
        part = fold_part_of_loss(xp, _tile(xp, problem, labels, classes, count))
        sums = part if sums is None else merge_losses(xp, [sums, part])
    assert sums is not None
    loss, a = finished_loss(xp, sums, labels, problem.options)
    if take is not None:
        for classes in all_cuts:
            tile = _tile(xp, problem, labels, classes, count)
            take(classes, gradient_of_part(xp, tile, sums, a, problem.options, labels.counted))
    return loss, labels.weight


def label_target(xp: Namespace, problem: Linear) -> Target:
    """Return the labels as a target, without logits of their shape."""
    options, n = problem.options, problem.classes
    if not problem.indices:
        return distribution_target(problem.labels, 1, options)
    labels = problem.labels[:, None]
    index = cast(xp, labels, libraries.of(xp).default_int(problem.hidden))
    valid = (index >= 0) & (index < n)
    index = xp.where(valid, index, xp.zeros_like(index))
    flat = xp.reshape(index, (-1,))
    if options.where is not None:
        valid = valid & _at_label(xp, options.where, flat)
    weight = None
    if options.weight is not None:
        weight = _taken(xp, options.weight, flat)
    return weighted_target(xp, labels, index, valid, weight, 1, options, problem.dtype)


def _at_label(xp: Namespace, where: Any, index: Any) -> Any:
    """Return where[..., index] of each position."""
    if where.shape[-1] == 1:
        return where if where.ndim == 2 else where[None, :]
    if where.ndim == 1 or where.shape[0] == 1:
        return _taken(xp, xp.reshape(where, (-1,)), index)
    return pick(xp, where, index[:, None], 1, where)


def _taken(xp: Namespace, values: Any, index: Any) -> Any:
    """Return values[index] in a column; 0 where there are no classes."""
    if values.shape[0] == 0:
        return xp.zeros_like(index, dtype=values.dtype)[:, None]
    return xp.take(values, index, axis=0)[:, None]


def _count(xp: Namespace, problem: Linear) -> Any:
    """Return the number of classes that take part."""
    where = problem.options.where
    if where is None or where.shape[-1] == 1:
        return problem.classes
    n = xp.sum(cast(xp, where, problem.dtype), axis=-1, keepdims=True)
    return xp.where(n == 0, scalar(xp, 1.0, n), n)


def _tile(xp: Namespace, problem: Linear, labels: Target, classes: slice, count: Any) -> Part:
    x, options = logits_of(xp, problem, classes), problem.options
    mask, weight = options.where, options.weight
    if mask is not None and mask.shape[-1] != 1:
        mask = mask[..., classes]
    if labels.index is None:
        there = cast(xp, labels.distribution[:, classes], problem.dtype)
    else:
        dtype = labels.index.dtype
        there = xp.arange(classes.start, classes.stop, dtype=dtype, device=device(x))
    weight = None if weight is None else weight[classes]
    return part_of_loss(xp, x, there, labels, mask, weight, count, options)
