"""The cross-entropy of class indices, with or without its gradient, in tiles.

Bytes moved: one read of the logits and the labels, and one write of the gradient.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from portable_softmax.kernels._numpy import _maths
from portable_softmax.kernels._numpy._layout import Buffers, Layout
from portable_softmax.kernels._request import Request

# Labels are checked and counted in pieces, so that nothing of their size is made.
_LABELS = 1 << 16


def labels_of(request: Request, layout: Layout | None) -> Any:
    """Return the labels in the layout's positions, or None for what is not worked on here.

    That is a distribution, an option that changes the terms of the sum, and a label without a
    class: `Request.target` has the error for it, or the nan.
    """
    options = request.options
    plain = options.where is None and options.softcap is None
    plain = plain and options.label_smoothing == 0.0 and options.z_loss == 0.0
    if layout is None or not request.indices or not plain:
        return None
    labels = request.labels.reshape(layout.shape)
    n = layout.x.shape[1]
    if labels.min() >= 0 and labels.max() < n:
        return labels
    ignore = options.ignore_index
    if ignore is None:
        return None
    for part in _parts(labels):
        if not (((part >= 0) & (part < n)) | (part == ignore)).all():
            return None
    return labels


def _parts(labels: Any) -> list[Any]:
    flat = labels.reshape(-1)
    return [flat[i : i + _LABELS] for i in range(0, flat.size, _LABELS)]


def _samples_of(request: Request, layout: Layout) -> Any:
    """Return the weights of the positions, in the layout's."""
    sample = request.options.sample_weight
    return None if sample is None else sample.reshape(layout.shape)


def divisor_of(request: Request, labels: Any) -> float:
    """Return what a mean divides by: the weights of the labels that count, or their number."""
    weight, ignore = request.options.weight, request.options.ignore_index
    sample = request.options.sample_weight
    if weight is None and ignore is None and sample is None:
        return float(labels.size)
    sums = []
    if sample is not None:
        for part, s in zip(_parts(labels), _parts(sample), strict=True):
            kept = s != 0 if ignore is None else (s != 0) & (part != ignore)
            u = s[kept] if weight is None else s[kept] * weight[part[kept]]
            sums.append(u.sum())
        return float(np.sum(sums, dtype=request.compute_dtype))
    for part in _parts(labels):
        counted = part if ignore is None else part[part != ignore]
        sums.append(counted.size if weight is None else weight[counted].sum())
    return float(np.sum(sums, dtype=request.compute_dtype))


def losses(request: Request, layout: Layout, labels: Any, *, with_grad: bool) -> tuple[Any, Any]:
    """Return the reduced loss, and its gradient or None."""
    options, axis = request.options, layout.axis
    weight, ignore, reduction = options.weight, options.ignore_index, options.reduction
    divisor = divisor_of(request, labels) if reduction == "mean" else 1.0
    none, sums = None, np.zeros(len(layout.pieces), request.compute_dtype)
    if reduction == "none":
        none = np.empty(request.labels.shape, request.answer_dtype)
        positions = none.reshape(layout.shape)
    samples = _samples_of(request, layout)
    grad = gradients = None
    if with_grad:
        grad, gradients = layout.answers(request, request.result_dtype)

    def work(i: int, piece: Any, buffers: Buffers) -> None:
        x = layout.read(piece, buffers)
        given = layout.positions(labels, piece)
        index = given.astype(np.intp)
        ignored = None
        if ignore is not None:
            ignored = np.flatnonzero(given == ignore)  # before the cast, which wraps around
            index[ignored] = 0
        u = None if weight is None else weight[index]
        if samples is not None:
            s = layout.positions(samples, piece)
            out = s == 0 if ignored is None else (s == 0) | (given == ignore)
            ignored = np.flatnonzero(out)
            u = s.copy() if u is None else u * s
            u[ignored] = 0.0
        scale: Any = None
        if with_grad:
            scale = 1.0 / divisor if divisor else 0.0
            scale = (
                np.asarray(scale, request.compute_dtype)
                if u is None
                else u * request.compute_dtype.type(scale)
            )
            target = layout.view(gradients, piece)
            y = x if layout.copies else target
        else:
            y = None
        at_label = _Labels(index, axis)
        loss, unfit = _plain(x, y, at_label, axis, scale, buffers)
        if ignored is not None and unfit is not None:
            unfit = np.setdiff1d(unfit, ignored, assume_unique=True)
            unfit = unfit if unfit.size else None
        if unfit is not None:
            few = unfit.size < index.size
            few_labels = _Labels(index[unfit], axis) if few else at_label
            few_scale = scale if scale is None or scale.ndim == 0 else scale[unfit]

            def precise(x: Any, y: Any) -> None:
                loss[unfit] = _precise(x, y, few_labels, axis, few_scale, buffers)

            if y is not None:
                layout.redo(piece, unfit, y, buffers, precise)
            else:
                precise(layout.again(piece, unfit, buffers, x), None)
        if u is not None:
            never = (u == 0.0) & np.isinf(loss)
            loss[never] = 0.0
            loss *= u
        if ignored is not None:
            loss[ignored] = 0.0
        if none is not None:
            layout.positions(positions, piece)[...] = loss
        else:
            sums[i] = np.add.reduce(loss)
        if with_grad:
            if ignored is not None:
                y[(slice(None), ignored) if axis == 0 else ignored] = 0.0
            layout.write(y, target)

    layout.run(work)
    if none is not None:
        return none, grad
    loss = np.add.reduce(sums)
    if reduction == "mean":
        loss = (
            loss / request.compute_dtype.type(divisor)
            if divisor
            else request.compute_dtype.type(math.nan)
        )
    return loss, grad


class _Labels:
    """Where the labels' entries are in a tile."""

    def __init__(self, index: Any, axis: int) -> None:
        self._index = index
        self._axis = axis

    def _at(self, tile: Any) -> Any:
        numbers = np.arange(self._index.size)
        if self._axis == 0:
            return self._index * tile.shape[1] + numbers
        return self._index + numbers * tile.shape[1]

    def get(self, tile: Any) -> Any:
        if tile.flags.c_contiguous:
            return tile.reshape(-1).take(self._at(tile))
        return tile[self._index, np.arange(self._index.size)]

    def put(self, tile: Any, values: Any) -> None:
        if tile.flags.c_contiguous:
            tile.reshape(-1)[self._at(tile)] = values
        else:
            tile[self._index, np.arange(self._index.size)] = values


def _plain(
    x: Any, y: Any, labels: _Labels, axis: int, scale: Any, buffers: Buffers
) -> tuple[Any, Any]:
    """Return the losses and where they are not good, and write p - t, scaled, to `y`."""
    at_label = labels.get(x)
    e: Any = None
    if y is not None:
        e = buffers.take("exps", x.shape) if y is x else y
    m, rest, grown, total, unfit = _maths.plain(x, e, axis, buffers)
    gap, rest = m.reshape(-1) - at_label, rest.reshape(-1)
    if y is not None:
        factor = scale / (1.0 + rest)
        # At the label of a confident row exp - 1 is an exact 0: minus the rest, digits and all.
        at_label = np.where(gap == 0.0, 1.0, labels.get(e) / grown.reshape(-1))
        at_label -= 1.0
        at_label -= rest
        np.multiply(e, np.expand_dims(scale / total.reshape(-1), axis), out=y)
        labels.put(y, at_label * factor)
    return gap + np.log1p(rest), unfit


def _precise(
    x: Any, y: Any, labels: _Labels, axis: int, scale: Any, buffers: Buffers
) -> Any:  # fmt: skip
    """Return the losses by max and rest, and write p - t, scaled, to `y`."""
    m, rest = _maths.fold(x, y, axis, buffers)
    gap, rest = m.reshape(-1) - labels.get(x), rest.reshape(-1)
    if y is not None:
        factor = scale / (1.0 + rest)
        at_label = (labels.get(y) - 1.0) - rest
        np.multiply(y, np.expand_dims(factor, axis), out=y)
        labels.put(y, at_label * factor)
    return gap + np.log1p(rest)
