"""A linear layer with a loss, of chunks: positions and classes may both be cut.

Where the classifier is in one chunk, each chunk of positions is a call of its own. Else each pair
of chunks makes its logits in tiles, twice if there are gradients, and they are never all there. The
axes are 0 for positions, 1 for classes and 2 for what is multiplied.
"""

from __future__ import annotations

from functools import partial
from operator import itemgetter
from typing import Any

from portable_softmax import libraries, portable
from portable_softmax.kernels._chunks import _calls, _losses
from portable_softmax.kernels._in_parts import Layer
from portable_softmax.kernels._request import Request


def answer(request: Request) -> tuple[Any, Any]:
    """Return the reduced loss, and the gradients of its sum or None."""
    library: Any = request.library
    problem, compute = request.linear(), request.compute_dtype
    hidden, classifier = library.whole(problem.hidden, 1), library.whole(problem.classifier, 1)
    source: list[tuple[Any, _calls.Axes]] = [(hidden, (0, 2)), (classifier, (1, 2))]
    # Never computed: it says how logits would be cut.
    logits = library.each_chunk(_never, (0, 1), *source, dtype=compute)
    rows = request._replace(
        operation="cross_entropy", x=logits, axes=(1,), labels=problem.labels,
        options=problem.options,
    )  # fmt: skip
    bias = problem.bias is not None
    if bias:
        source.append((library.aligned(problem.bias, logits, (1,)), (1,)))
    wants_gradients = request.operation == "linear_cross_entropy_value_and_grad"
    divisor = _losses.divisor_of(rows)
    if _calls.whole_rows(rows):
        places = _calls.arrays(rows)
        mean = problem.options.reduction == "mean"
        given = {
            **_calls.numbers(rows), "check_labels": False, "dtype": compute,
            "tile": request.options.elements * library.xp.finfo(compute).bits // 8,
        } | ({"reduction": "sum"} if mean else {})  # fmt: skip
        del given["axis"]
        names = ["", *(["bias"] if bias else []), *[place[0] for place in places]]
        call = partial(_call, _calls.call_of(request.operation, names, given), compute, len(source))
        found = library.each_chunk(
            call, (0, 1), *source, *[place[1:] for place in places], dtype=compute
        )
        losses = found
    else:
        loss, pairs = _losses.prepared(rows)
        layer = Layer(loss, bias, int(request.options.elements))
        folded = library.each_chunk(
            partial(_of_chunks, layer.fold),
            (0, 1),
            *source,
            *pairs,
            dtype=_losses.sums_dtypes(loss),
            ones=(1,),
        )
        losses = _losses.finished(rows, loss, pairs, folded)
        if wants_gradients:
            found = library.each_chunk(
                partial(_of_chunks, layer.gradients),
                (0, 1),
                (losses, (0, 1)),
                *source,
                *pairs,
                dtype=compute,
            )
    value = _losses.value(rows, losses, divisor)
    if not wants_gradients:
        return value, None
    scaled = partial(_scaled, problem.options.reduction == "mean")
    grads = []
    for i, over in ((1, 1), (2, 0), (3, 0))[: 3 if bias else 2]:
        total = library.merge_chunks(
            found, (over,), _calls.added, take=itemgetter(i), keepdims=False, dtype=compute
        )
        own, new = (1 - over,), {} if i == 3 else {2: hidden.shape[1]}
        grads.append(
            library.each_chunk(
                scaled, (*own, *new), (divisor, ()), (total, own), dtype=compute, new=new
            )
        )
    return value, portable.Gradients(*grads, *(() if bias else (None,)))


def _of_chunks(function: Any, *arrays: Any) -> Any:
    return function(*map(_calls.chunk, arrays))


def _never(*chunks: Any) -> Any:
    raise AssertionError("the logits of a linear layer are not stored")


def _scaled(mean: bool, divisor: Any, grad: Any) -> Any:
    if not mean:
        return grad
    library = libraries.library_of(grad)
    divisor = library.cast(divisor, grad.dtype)
    return grad / library.quietly(portable.nothing_to_inf, library.xp, divisor)


def _call(call: _calls.Call, compute: Any, n: int, *arrays: Any) -> tuple[Any, ...]:
    """Return the loss of a chunk of positions, and gradients in the dtype of the computation."""
    arrays = tuple(map(_calls.chunk, arrays))
    library = libraries.library_of(arrays[0])
    hidden, *others = (*(library.cast(a, compute) for a in arrays[:n]), *arrays[n:])
    found = call(hidden, *others)
    return (found[0], *found[1]) if isinstance(found, tuple) else (found, None)
