"""Cross-entropy of chunks: of whole rows in one call per chunk, of parts of rows by their sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter, mul, truediv
from typing import Any

import numpy as np

from portable_softmax import libraries, portable
from portable_softmax.kernels._chunks import _calls
from portable_softmax.kernels._chunks._calls import Axes, Placed
from portable_softmax.kernels._in_parts import Loss, merged, state_dtypes
from portable_softmax.kernels._request import LOSSES, PLAIN_LOSS, LossOptions, Request


def whole(request: Request) -> tuple[Any, ...]:
    """Return the reduced loss, and its gradients if they are asked for, of chunks of whole rows."""
    library: Any = request.library
    x, every, reduction = request.x, _calls.every(request), request.options.reduction
    compute, answers = request.compute_dtype, [request.result_dtype]
    wants_gradients, mean = request.operation.endswith("_grad"), reduction == "mean"
    given, casts = _calls.numbers(request), mean and wants_gradients
    counts = request
    if request.labels is None:  # two arrays of logits
        options = PLAIN_LOSS._replace(reduction=reduction)
        counts = request._replace(labels=x, indices=False, options=options)
        answers.append(library.compute_dtype(request.dy)[1])
    else:
        given["check_labels"] = False
    if reduction != "none":  # the sum of a mean is in the dtype of the computation
        given["reduction"] = "sum"
        if request.operation in LOSSES:
            given["dtype"] = compute
        else:
            casts = True
    elif not wants_gradients:
        out = _calls.positions(request)
        return (_calls.on_each(request, out, given, dtype=request.answer_dtype),)
    places, divisor = _calls.arrays(request), divisor_of(counts)
    names = [name for name, *_ in places]
    pairs = [(divisor, ()), (x, every), *[place[1:] for place in places]]

    def on_each(operation: str, taken: Any, **more: Any) -> Any:
        call = _calls.call_of(operation, names, given)
        if mean and request.indices and operation == "cross_entropy_value_and_grad":
            function = partial(_weighted, taken, call, compute, request.axis)
        else:
            function = partial(_answers, taken, call, casts, mean, compute, answers)
        return library.each_chunk(function, every, *pairs, **more)

    if library.stores_chunks:  # no arrays of two shapes: each of them is a call of its own
        alone = request.operation.removesuffix("_value_and_grad")
        ones = request.axes if reduction == "none" else every
        taken = partial(_loss_of_shape, x.ndim, request.axis)
        losses = on_each(alone, taken, dtype=(compute,), ones=ones)
    else:
        losses = on_each(request.operation, tuple, dtype=request.result_dtype)
    grads = [
        on_each(request.operation, itemgetter(i), dtype=answer)
        if library.stores_chunks
        else library.each_chunk(itemgetter(i), every, (losses, every), dtype=answer)
        for i, answer in enumerate(answers if wants_gradients else (), 1)
    ]
    return value(request, losses, divisor), *grads


def _loss_of_shape(ndim: int, axis: int, found: Sequence[Any]) -> tuple[Any]:
    """Return the loss with as many axes as the logits have."""
    loss = found[0]
    xp = libraries.namespace(loss)
    return (xp.expand_dims(loss, axis=axis) if loss.ndim else xp.reshape(loss, (1,) * ndim),)


def _weighted(
    taken: Callable[[list[Any]], Any], call: _calls.Call, compute: Any, axis: int, divisor: Any,
    x: Any, *arrays: Any,
) -> Any:  # fmt: skip
    """Return what is taken of a chunk's loss, and of its gradient of the mean of all chunks.

    The divisor goes into the weights of the classes, by which every kernel multiplies as it writes:
    a division of its own would read and write the gradient once more.
    """
    library, given = libraries.library_of(x), dict(zip(call.names, arrays, strict=True))
    xp, divisor = library.xp, library.cast(divisor, compute)
    if "weight" in given:
        weight = library.cast(_calls.chunk(given["weight"]), compute)
    else:
        weight = xp.ones((x.shape[axis],), dtype=compute, device=library.device(x))
    count = library.quietly(portable.nothing_to_inf, xp, divisor)
    given["weight"] = library.quietly(truediv, weight, count)
    loss, grad = call._replace(names=tuple(given))(x, *given.values())
    return taken([library.quietly(mul, loss, divisor), grad])


def _answers(
    taken: Callable[[list[Any]], Any], call: _calls.Call, casts: bool, mean: bool, compute: Any,
    answers: list[Any], divisor: Any, x: Any, *arrays: Any,
) -> Any:  # fmt: skip
    """Return what is taken of a chunk's loss and gradients, divided before they are rounded."""
    library = libraries.library_of(x)
    found = call(library.cast(x, compute) if casts else x, *arrays)
    if not isinstance(found, tuple):
        return taken([found])
    loss, grads = found
    grads = grads if isinstance(grads, tuple) else (grads,)
    if mean:
        divisor = library.cast(divisor, compute)
        divisor = library.quietly(portable.nothing_to_inf, library.xp, divisor)
    rounded = []
    for grad, answer in zip(grads, answers, strict=True):
        if mean:
            grad /= divisor
        rounded.append(library.cast(grad, answer))
    return taken([loss, *rounded])


# --------------------------------------------------------------------------- reductions


def value(request: Request, losses: Any, divisor: Any) -> Any:
    """Return the reduced loss of chunks that hold it first, of positions or summed."""
    library: Any = request.library
    answer, compute, every = request.answer_dtype, request.compute_dtype, _calls.every(request)
    if request.options.reduction == "none":
        take = partial(_of_positions, len(every), request.axis, answer)
        return library.each_chunk(take, _calls.positions(request), (losses, every), dtype=answer)
    total = library.merge_chunks(
        losses, every, _calls.added, take=_summed, keepdims=False, dtype=compute
    )
    finish = partial(_finished, request.options.reduction == "mean", answer)
    return library.each_chunk(finish, (), (total, ()), (divisor, ()), dtype=answer)


def _of_positions(ndim: int, axis: int, dtype: Any, losses: Any) -> Any:
    """Return losses without the class axis, which those of parts still have."""
    loss = _calls.chunk(losses)[0]
    library = libraries.library_of(loss)
    return library.cast(library.squeeze(loss, (axis,)) if loss.ndim == ndim else loss, dtype)


def _summed(losses: Any) -> Any:
    loss = losses[0]
    xp = libraries.namespace(loss)
    return xp.reshape(portable.total(xp, loss, tuple(range(loss.ndim))), ()) if loss.ndim else loss


def _finished(mean: bool, dtype: Any, total: Any, divisor: Any) -> Any:
    library = libraries.library_of(total)
    if mean:
        divisor = library.cast(divisor, total.dtype)
        total = library.quietly(portable.mean, library.xp, total, divisor)
    return library.cast(library.xp.asarray(total), dtype)


def divisor_of(request: Request) -> Any:
    """Return the divisor of a mean, a lazy number; of other reductions, any number."""
    library: Any = request.library
    options, labels, positions = request.options, request.labels, _calls.positions(request)
    n, compute = math.prod(request.x.shape[a] for a in positions), request.compute_dtype
    sample, weight = options.sample_weight, options.weight if request.indices else None
    weighted = not (sample is weight is options.ignore_index is None)
    if options.reduction != "mean" or (n == n and not weighted):
        n = n if n == n else 1
        return library.xp.asarray(n, dtype=compute, device=library.device(request.x))
    places: Placed = []
    if request.indices or sample is None:
        own = positions if request.indices else _calls.every(request)
        places.append(("labels", library.aligned(labels, request.x, own), own))
    if sample is not None:
        places.append(("sample", library.aligned(sample, request.x, positions), positions))
    if weight is not None:
        places.append(("weight", library.whole(weight), request.axes))
    kind = tuple(p[0] for p in places), request.axis, request.indices, options.ignore_index, compute
    found = library.of_all_chunks(
        partial(_counted, *kind), _calls.added, *[place[1:] for place in places], dtype=compute
    )
    # A distribution counts its positions in each chunk of a row.
    in_rows = places[0][2] != positions
    return found / library.chunks_along(places[0][1], request.axes) if in_rows else found


def _counted(
    names: tuple[str, ...], axis: int, indices: bool, ignore: int | None, compute: Any, *arrays: Any
) -> Any:
    """Return what the positions of a chunk count in a mean."""
    given = dict(zip(names, map(_calls.chunk, arrays), strict=True))
    labels: Any
    labels, sample, weight = (given.get(name) for name in ("labels", "sample", "weight"))
    library: Any = libraries.library_of(labels if sample is None else sample)
    xp, each = library.xp, sample
    if indices:
        n = 1 if weight is None else weight.shape[0]
        x = xp.broadcast_to(
            xp.zeros((1,), dtype=compute), (*labels.shape[:axis], n, *labels.shape[axis:])
        )
        options = LossOptions(weight=weight, ignore_index=ignore, sample_weight=sample)
        each = library.quietly(portable.index_target, xp, x, labels, axis, options, compute).weight
    if each is None:
        shape = labels.shape if indices else (*labels.shape[:axis], *labels.shape[axis + 1 :])
        return xp.asarray(math.prod(shape), dtype=compute)
    return _summed((library.cast(each, compute),))


# --------------------------------------------------------------------------- parts of rows


def prepared(request: Request) -> tuple[Loss, list[tuple[Any, Axes]]]:
    """Return the loss, and the arrays that it needs beside the logits, with their axes."""
    library: Any = request.library
    xp, x, axis, options = library.xp, request.x, request.axis, request.options
    places = [(name or "labels", *rest) for name, *rest in _calls.arrays(request)]
    if request.indices:
        places.append(("numbers", library.numbers_along(x, axis), (axis,)))
    where = options.where
    if where is not None and options.label_smoothing != 0.0:
        at = axis - x.ndim + where.ndim
        if at >= 0 and where.shape[at] != 1:
            count = xp.sum(xp.astype(where, request.compute_dtype), axis=at, keepdims=True)
            own = _calls.every(request)[x.ndim - count.ndim :]
            count = library.aligned(xp.where(count == 0, library.scalar(1.0, count), count), x, own)
            places.append(("count", count, own))
    plain = options._replace(weight=None, where=None, sample_weight=None)
    n = x.shape[axis]
    n = max(n, 1) if n == n else 1  # it is known where it counts
    names = tuple(place[0] for place in places)
    loss = Loss(names, axis, request.indices, plain, n, request.compute_dtype)
    return loss, [place[1:] for place in places]


def sums_dtypes(loss: Loss) -> tuple[Any, ...]:
    """Return the dtypes of what a part of a row gives: its sums, and whether it has the label."""
    compute = loss.compute
    return *state_dtypes(compute), compute, compute, compute, *([np.dtype(bool)] * loss.indices)


def finished(request: Request, loss: Loss, given: list[tuple[Any, Axes]], folded: Any) -> Any:
    """Return the losses of positions, and what gradients need, from the sums of chunks."""
    library: Any = request.library
    every, axes, compute = _calls.every(request), request.axes, request.compute_dtype
    dtypes = sums_dtypes(loss)
    sums = library.merge_chunks(folded, axes, merged, dtype=dtypes)
    names = ("labels", "sample_weight") if request.indices else ("sample_weight",)
    own = {name: place for name, place in zip(loss.names, given, strict=True) if name in names}
    finish = loss._replace(names=tuple(own)).finish
    dtypes = compute, compute, *dtypes[: len(portable.Sums._fields)]
    return library.each_chunk(finish, every, (sums, every), *own.values(), dtype=dtypes, ones=axes)


def in_parts(request: Request) -> tuple[Any, Any]:
    """Return the reduced loss, and its gradient or None, where chunks hold parts of rows."""
    library: Any = request.library
    every, dtype = _calls.every(request), request.result_dtype
    loss, given = prepared(request)
    source = request.x, every
    folded = library.each_chunk(
        loss.fold, every, source, *given, dtype=sums_dtypes(loss), ones=request.axes
    )
    losses, divisor = finished(request, loss, given, folded), divisor_of(request)
    found = value(request, losses, divisor)
    if request.operation == "cross_entropy":
        return found, None
    return found, library.each_chunk(
        partial(loss.gradient, dtype), every, (divisor, ()), source, (losses, every), *given,
        dtype=dtype,
    )  # fmt: skip
