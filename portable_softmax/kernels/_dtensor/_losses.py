"""Cross-entropy of shards, and that of a linear layer whose logits each rank makes some of."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import Shard

from portable_softmax import _checks, libraries, portable
from portable_softmax._typing import Tensor
from portable_softmax.kernels._decide import public
from portable_softmax.kernels._dtensor._mesh import (
    Axes,
    Place,
    Reduce,
    constant,
    merged,
    place_of,
    shard,
)
from portable_softmax.kernels._dtensor._watch import watched
from portable_softmax.kernels._in_parts import Layer, Loss
from portable_softmax.kernels._request import LossOptions, Request

_ARRAYS = ("weight", "where", "sample_weight")


class _Here(NamedTuple):
    """A call as this rank sees it: of its own part of each array."""

    request: Request
    place: Place  # of the logits
    labels: Tensor
    options: LossOptions
    classes: int  # of a whole row

    @property
    def axis(self) -> int:
        """The class axis."""
        return self.request.axis

    @property
    def positions(self) -> Axes:
        """The other axes."""
        return tuple(a for a in range(len(self.place.shape)) if a != self.axis)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the logits here."""
        return tuple(self.place.part(a)[1] for a in range(len(self.place.shape)))


def _here(request: Request, place: Place, options: LossOptions) -> _Here:
    every = tuple(range(len(place.shape)))
    positions = tuple(a for a in every if a != request.axis)
    own = positions if request.indices else every
    axes: dict[str, Axes] = {"weight": (request.axis,), "sample_weight": positions}
    arrays = {}
    for name in _ARRAYS:
        value = getattr(options, name)
        if value is not None:
            at = axes.get(name, every[len(every) - value.ndim :])
            arrays[name] = constant(name, value, place, at)
    labels = constant("labels", request.labels, place, own)
    return _Here(request, place, labels, options._replace(**arrays), place.shape[request.axis])


# --------------------------------------------------------------------------- the two losses


def plain(request: Request, place: Place) -> Any:
    """cross_entropy, and its gradient if that is asked for."""
    here, compute = _here(request, place, request.options), request.compute_dtype
    wants_gradient = request.operation.endswith("_grad")
    x = watched(request.x.to_local(), request)
    if not place.dims(request.axes):
        if wants_gradient:
            x = libraries.library_of(x).cast(x, compute)  # divided before it is rounded
        found = _call(here, x, axis=request.axis)
        each, grads = (found[0], found[1:]) if wants_gradient else (found, ())
        valid, counts = _of_whole_rows(here, x)
    else:
        loss, given = _prepared(here, x)
        parts = _Logits(loss, compute if wants_gradient else request.result_dtype, here.place)
        each, valid, u, grads = _in_parts(parts, [x], given, wants_gradient)
        counts = _counts(here, u)
    value, divisor = _reduced(here, each, valid, counts)
    if not wants_gradient:
        return value
    (grad,) = (g if divisor is None else g / divisor.to(g.dtype) for g in grads)
    return value, place.holds(grad.to(request.result_dtype))


def linear(request: Request, hidden_place: Place) -> Any:
    """linear_cross_entropy, and its gradients if they are asked for."""
    hidden, (classifier, bias, options, elements) = request.x, request.options
    place = _place_of_logits(request, hidden_place)
    own = place_of("classifier", classifier, place.mesh)
    here, compute = _here(request, place, options), request.compute_dtype
    wants_gradients, last = request.operation.endswith("_grad"), hidden.ndim - 1
    classes, batch = place.dims((last,)), place.dims(here.positions)
    arrays, places = [hidden, classifier], [hidden_place, own]
    if bias is not None:
        places.append(place.along((last,), bias.shape))
        arrays.append(bias.redistribute(placements=places[2].placements))
    # What ranks add to a gradient is summed by the backward pass of `redistribute`.
    partly = [p.partly(dims) for p, dims in zip(places, (classes, batch, batch), strict=False)]
    inputs = [
        watched(a.redistribute(placements=p.placements).to_local(grad_placements=to), request)
        for a, p, to in zip(arrays, places, partly, strict=True)
    ]
    if not classes:
        if wants_gradients:
            inputs = [a.to(compute) for a in inputs]
        given = {"bias": inputs[2]} if bias is not None else {}
        tile = math.ceil(elements) * torch.finfo(compute).bits // 8
        found = _call(here, *inputs[:2], tile=tile, **given)
        each, grads = found if wants_gradients else (found, ())
        valid, counts = _of_whole_rows(here, inputs[0])
    else:
        flat, n = _flat(here), math.prod(here.shape[:-1])
        inputs[0] = inputs[0].reshape(n, hidden.shape[-1])
        loss, given_too = _prepared(flat, inputs[0], inputs[1].shape[0])
        layer = Layer(loss, bias is not None, int(elements))
        parts = _Layers(layer, place)
        each, valid, u, grads = _in_parts(parts, inputs, given_too, wants_gradients)
        counts = _counts(flat, u)
        shape = here.shape[:-1]
        each = each.reshape(*shape, 1)
        valid = None if valid is None else valid.reshape(*shape, 1)
    value, divisor = _reduced(here, each, valid, counts)
    if not wants_gradients:
        return value
    made = []
    for g, p, to, a in zip(grads, places, partly, arrays, strict=False):
        g = g if divisor is None else g / divisor.to(g.dtype)
        g = p.holds(g.reshape(shard(a).shape), to).redistribute(placements=p.placements)
        made.append(g)
    return value, portable.Gradients(*made, *(() if bias is not None else (None,)))


def _place_of_logits(request: Request, place: Place) -> Place:
    """Return where the logits would be: cut as hidden along positions, by classes as classifier."""
    hidden, classifier, last = request.x, request.options.classifier, request.x.ndim - 1
    own = place_of("classifier", classifier, place.mesh)
    cuts = place.dims((last,)), own.dims((1,))
    for name, x, cut in zip(("hidden", "classifier"), (hidden, classifier), cuts, strict=True):
        if cut:
            raise _checks.shards(
                name, x, "which cut what is multiplied", "redistribute it first, to Replicate there"
            )
    classes = own.dims((0,))
    both = set(classes) & set(place.dims(range(last)))
    if both:
        raise _checks.shards(
            "classifier", classifier,
            f"and hidden {place.placements}: both are cut along dimension {min(both)} of the mesh",
            "redistribute one of them first, to Replicate there",
        )  # fmt: skip
    shape = (*place.shape[:-1], own.shape[0])
    placements = [Shard(last) if i in classes else p for i, p in enumerate(place.placements)]
    return Place(place.mesh, tuple(placements), shape)


def _flat(here: _Here) -> _Here:
    """Return a call on one axis of positions, and the classes."""
    *batch, n = here.shape
    labels, where, sample = here.labels, here.options.where, here.options.sample_weight
    m = math.prod(batch)
    labels = labels.reshape((m,) if here.request.indices else (m, n))
    if where is not None and where.ndim > 1:
        width = where.shape[-1]
        where = (
            where.reshape(1, width)
            if all(k == 1 for k in where.shape[:-1])
            else where.expand(*batch, width).reshape(m, width)
        )
    sample = None if sample is None else sample.reshape(m)
    options = here.options._replace(where=where, sample_weight=sample)
    return here._replace(request=here.request._replace(axes=(1,)), labels=labels, options=options)


def _call(here: _Here, *arrays: Tensor, **given: Any) -> Any:
    """Return the call on the shard of this rank, with the sum of its losses or each of them."""
    request, neutral = here.request, LossOptions._field_defaults
    given |= {
        name: value
        for name, value in here.options._asdict().items()
        if isinstance(value, torch.Tensor) or value != neutral[name]
    }
    given["dtype"] = request.compute_dtype
    given["reduction"] = "none" if here.options.reduction == "none" else "sum"
    return public(request.operation)(*arrays, here.labels, check_labels=False, **given)


# --------------------------------------------------------------------------- what is reduced


def _of_whole_rows(here: _Here, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return which labels have a class, and what positions count in a mean; None for 1 each."""
    request, axis, options = here.request, here.axis, here.options
    if not request.indices:
        return None, options.sample_weight
    # As wide as the logits in shape alone.
    x = like.new_zeros((), dtype=request.compute_dtype).expand(here.shape)
    xp = libraries.namespace(x)
    target = portable.index_target(xp, x, here.labels, axis, options, request.compute_dtype)
    return target.valid, target.weight


def _counts(here: _Here, u: Tensor) -> Tensor | None:
    options = here.options
    if not here.request.indices:
        return options.sample_weight
    alone = options.weight is options.sample_weight is options.ignore_index is None
    return None if alone else u


def _reduced(
    here: _Here, each: Tensor, valid: Tensor | None, counts: Tensor | None
) -> tuple[Any, Tensor | None]:
    """Return the reduced loss of all ranks, and the divisor of its gradient or None.

    `each` is the sum of the losses here, or holds each of them.
    """
    request, place, reduction = here.request, here.place, here.options.reduction
    library = libraries.library_of(each)
    xp, dtype = library.xp, request.answer_dtype
    reads = request.check_labels and valid is not None and library.reads_values(valid)
    wrong: Any = 0 if valid is None or not reads else (~valid).sum()
    if reduction == "none":
        if valid is not None and int(wrong):
            _raise(here, valid)
        if each.ndim == len(place.shape):
            each = each.squeeze(here.axis)
        positions = tuple(place.shape[a] for a in here.positions)
        return place.along(here.positions, positions).holds(each.to(dtype)), None
    n = math.prod(here.shape[a] for a in here.positions)
    total = portable.total(xp, each, tuple(range(each.ndim))).reshape(()) if each.ndim else each
    divisor: Any = n if counts is None else portable.total(xp, counts, tuple(range(counts.ndim)))
    wide = library.wider_dtype(total)
    numbers = [torch.as_tensor(a, device=total.device) for a in (total, divisor, wrong)]
    sums = torch.stack([a.to(wide).reshape(()) for a in numbers])
    total, divisor, wrong = place.reduce(place.dims(here.positions))(sums, "sum")
    if valid is not None and reads and int(wrong):
        _raise(here, valid)
    if reduction == "mean":
        total = portable.mean(xp, total, divisor)
    loss = place.along((), ()).holds(total.to(dtype))
    return loss, portable.nothing_to_inf(xp, divisor) if reduction == "mean" else None


def _raise(here: _Here, valid: Tensor) -> None:
    """Raise for a label without a class, on each rank."""
    start = tuple(here.place.part(a)[0] for a in here.positions)
    xp, where, n = libraries.namespace(valid), here.options.where, here.classes
    if where is not None:
        where = where.expand(here.shape)
    _checks.label_values(xp, here.labels, valid, here.axis, n, where, start)
    raise IndexError(
        f"labels on another rank are outside [0, {n}), or where masks their classes out: the error "
        "of that rank names the first"
    )


# --------------------------------------------------------------------------- parts of rows


def _prepared(here: _Here, like: Tensor, n: int | None = None) -> tuple[Loss, list[Tensor]]:
    """Return the loss, and the arrays that it needs beside the logits."""
    request, place, axis, options = here.request, here.place, here.axis, here.options
    named = {"labels": here.labels}
    named |= {name: a for name in _ARRAYS if (a := getattr(options, name)) is not None}
    class_axis = request.axis if n is None else len(place.shape) - 1
    start, length = place.part(class_axis)
    if request.indices:
        named["numbers"] = torch.arange(start, start + length, device=like.device)
    where = options.where
    if where is not None and options.label_smoothing != 0.0:
        at = axis - len(here.shape if n is None else (0, 0)) + where.ndim
        # All ranks ask the whole array, so that they all add or none does.
        whole = getattr(request.options, "loss", request.options).where
        if at >= 0 and whole.shape[class_axis - len(place.shape) + whole.ndim] != 1:
            count = where.to(request.compute_dtype).sum(dim=at, keepdim=True)
            count = place.reduce(place.dims((class_axis,)))(count, "sum")
            named["count"] = torch.where(count == 0, 1.0, count)
    alone = options._replace(weight=None, where=None, sample_weight=None)
    loss = Loss(
        tuple(named), axis, request.indices, alone, max(here.classes, 1), request.compute_dtype
    )
    return loss, list(named.values())


class _Logits(NamedTuple):
    """The loss of the logits of a shard."""

    loss: Loss
    dtype: Any  # of the gradient
    place: Place

    @property
    def inputs(self) -> int:
        """How many tensors are differentiated."""
        return 1

    @property
    def reduce(self) -> Reduce:
        """All-reduces over the ranks that share rows."""
        return self.place.reduce(self.place.dims((self.loss.axis,)))

    def fold(self, *tensors: Tensor) -> Any:
        """Return the sums of the shard."""
        return self.loss.fold(*tensors)

    def gradients(self, finished: Any, upstream: Tensor, x: Tensor, *given: Tensor) -> Any:
        """Return the gradient of the shard."""
        more = self.loss.arrays(x, *given)
        return (self.loss.scaled_gradient(self.dtype, upstream, x, more, finished[1:]),)


class _Layers(NamedTuple):
    """The loss of a linear layer with the classes of a shard."""

    layer: Layer
    place: Place

    @property
    def loss(self) -> Loss:
        """The loss of the logits."""
        return self.layer.loss

    @property
    def inputs(self) -> int:
        """How many tensors are differentiated."""
        return 3 if self.layer.bias else 2

    @property
    def reduce(self) -> Reduce:
        """All-reduces over the ranks that share rows."""
        return self.place.reduce(self.place.dims((len(self.place.shape) - 1,)))

    def fold(self, *tensors: Tensor) -> Any:
        """Return the sums of the classes here."""
        return self.layer.fold(*tensors)

    def gradients(self, finished: Any, upstream: Tensor, *tensors: Tensor) -> Any:
        """Return what the classes here add to the gradients."""
        found = self.layer.gradients(finished, *tensors, upstream=upstream)
        return found[1 : 1 + self.inputs]


def _finished(parts: Any, tensors: list[Tensor]) -> tuple[tuple[Any, ...], Tensor | None]:
    """Return the losses and what their gradients need, and which labels have a class."""
    loss: Loss = parts.loss
    xp = libraries.namespace(tensors[0])
    folded = parts.fold(*tensors)
    n = len(portable.Sums._fields)
    sums, hits = portable.Sums(*folded[:n]), folded[n:]

    def more(top: Any) -> list[Any]:
        return [portable.gap_toward(xp, sums, top), sums.q, sums.u, *hits]

    m, rest, *others = merged(sums.max, sums.rest, parts.reduce, sums=more)
    whole = [m, rest, *(s.to(loss.compute) for s in others[:3]), *(h > 0 for h in others[3:])]
    names = ("labels", "sample_weight") if loss.indices else ("sample_weight",)
    given = dict(zip(loss.names, tensors[parts.inputs :], strict=True))
    own = {name: a for name, a in given.items() if name in names}
    finished = loss._replace(names=tuple(own)).finish(whole, *own.values())
    valid = None
    if loss.indices:
        counted = loss._replace(names=tuple(own))
        arrays = counted.arrays(m, *own.values())
        kept = counted.target(xp, dict(zip(own, arrays, strict=True))).counted
        valid = whole[-1] if kept is None else whole[-1] | ~kept
    return finished, valid


def _in_parts(
    parts: Any, inputs: list[Tensor], given: list[Tensor], wants_gradients: bool
) -> tuple[Tensor, Tensor | None, Tensor, Any]:
    """Return losses, which labels have a class, what positions count, and gradients or nothing."""
    if not wants_gradients:
        each, valid, u = _Loss.apply(parts, *inputs, *given)
        return each, valid, u, ()
    with torch.no_grad():
        finished, valid = _finished(parts, [*inputs, *given])
        one = torch.ones_like(finished[0])
        return finished[0], valid, finished[-1], parts.gradients(finished, one, *inputs, *given)


class _Loss(torch.autograd.Function):
    """The losses of positions, differentiable with respect to the first tensors."""

    @staticmethod
    def forward(ctx: Any, parts: Any, *tensors: Tensor) -> Any:
        finished, valid = _finished(parts, [t.detach() for t in tensors])
        each, *more = finished
        ctx.parts, ctx.given = parts, len(tensors)
        ctx.save_for_backward(*tensors, *more)
        ctx.set_materialize_grads(False)
        u = more[-1]
        ctx.mark_non_differentiable(*(t for t in (valid, u) if t is not None))
        return each, valid, u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
        saved, parts, n = ctx.saved_tensors, ctx.parts, ctx.given
        nothing = (None,) * (n - parts.inputs)
        if upstream is None:
            return None, *(None,) * parts.inputs, *nothing
        tensors = [t.detach() for t in saved[:n]]
        loss: Loss = parts.loss
        found = parts.gradients((None, *saved[n:]), upstream.to(loss.compute), *tensors)
        grads = [g.to(t.dtype) for g, t in zip(found, tensors, strict=False)]
        return None, *grads, *nothing
