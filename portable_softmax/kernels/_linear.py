"""A linear layer with a loss, tile by tile: the library's products, and row kernels between them.

A tile's logits are in memory that every tile uses again, and on a CPU their gradient is written
over them: new memory costs more there than the rows do. The loss of a tile of rows is a call of its
own, so that it takes the kernel that such a call takes, whatever the library. Gradients are summed
in place, in the dtype of the computation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from portable_softmax import portable
from portable_softmax.kernels._decide import run
from portable_softmax.kernels._request import PLAIN_LOSS, PROBABILITIES, Request, active
from portable_softmax.libraries import Library

TENSORS = True  # an adapter hands over a library's own arrays

# So many classes are cast at once, where the classifier is not in the dtype of the computation.
_CLASSES = 4096


def missing() -> str:
    """Return what has to be installed: nothing."""
    return ""


def declines(request: Request, asked: bool) -> str:
    """Return the empty string: what is declared is taken."""
    return ""


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    classifier: bool
    bias: bool


def linear_cross_entropy(request: Request) -> Any:
    """Return the reduced loss."""
    return answer(request, Wanted(False, False, False))[0]


def linear_cross_entropy_value_and_grad(request: Request) -> tuple[Any, portable.Gradients]:
    """Return the reduced loss and the gradients."""
    return answer(request, Wanted(True, True, request.options.bias is not None))


def answer(
    request: Request, wanted: Wanted, upstream: Any = None
) -> tuple[Any, portable.Gradients]:
    """Return the reduced loss and the gradients of its sum, None where one is not wanted.

    `upstream` multiplies the gradient of each position, of which there is then one.
    """
    library, xp = request.library, request.xp
    problem = request.linear()
    request.check_labels_of_linear(problem)
    dtype, reduction = problem.dtype, problem.options.reduction
    weight = portable.label_target(xp, problem).weight
    problem = problem._replace(classifier=_without_garbage(xp, problem))
    kept = _kept(library, problem)
    n = problem.positions if kept is None else kept.shape[0]
    device = library.device(problem.hidden)
    # The first tile writes the classifier's gradient, and the others add to it.
    makes = xp.zeros, xp.empty if n else xp.zeros, xp.zeros
    layer = problem.hidden, problem.classifier, problem.bias
    grads = portable.Gradients(
        *[
            make(like.shape, dtype=dtype, device=device) if want else None
            for want, like, make in zip(wanted, layer, makes, strict=True)
        ]
    )
    losses = xp.zeros((problem.positions, 1), dtype=dtype, device=device)
    divisor = None
    if reduction == "mean":
        divisor = portable.nothing_to_inf(xp, portable.mean_divisor(xp, losses, _of(weight)))
    height, width = portable.tiles(problem, int(request.options.elements))
    memory = None
    if width == problem.classes:
        memory = xp.empty((min(height, n), width), dtype=dtype, device=device)
    for rows in portable.cuts(n, height) if n else ():
        at = rows if kept is None else kept[rows]
        part = portable.at_positions(problem, at)
        part = part._replace(hidden=library.cast(part.hidden, dtype))
        scale = None if upstream is None else upstream[at][:, None]
        adds = _Adds(library, part, grads, at, scale, divisor, first=rows.start == 0)
        if memory is None:
            loss, _ = portable.by_classes(xp, part, width, adds if any(wanted) else None)
        else:
            x = _logits(library, part, memory[: part.positions, :])
            out = x if any(wanted) and library.device_type(x) == "cpu" else None
            loss, g = _rows(request, part, x, out, with_gradient=any(wanted))
            if g is not None:
                adds(slice(0, width), g)
                del g  # before the next one is made
            loss = loss[:, None]
        losses[at, :] = loss
    if divisor is not None:
        for grad in (grads.hidden, grads.bias):
            if grad is not None:
                grad /= divisor
    return portable.finished(xp, losses, weight, reduction), grads


def _of(weight: Any) -> portable.Target:
    return portable.Target(None, None, None, None, weight)


def _kept(library: Library, problem: portable.Linear) -> Any:
    """Return the positions that count, None if they all do."""
    counted = portable.kept_positions(library.xp, problem)
    if counted is None or bool(library.xp.all(counted)):
        return None
    return library.xp.nonzero(counted)[0]


def _without_garbage(xp: Any, problem: portable.Linear) -> Any:
    """Return the classifier with 0 for infinities and nans of classes that no position takes.

    A padded vocabulary may hold anything, and 0 times nan would be nan.
    """
    classifier = problem.classifier
    taken = portable.classes_taken(problem.options.where, problem.classes)
    if taken is None:
        return classifier
    left = xp.nonzero(~taken)[0]
    if bool(xp.all(xp.isfinite(xp.take(classifier, left, axis=0)))):
        return classifier
    return xp.where(taken[:, None], classifier, xp.zeros_like(classifier[:1, :1]))


def _blocks(problem: portable.Linear) -> list[slice]:
    """Return the classes that are cast at once: all of them where there is nothing to cast."""
    n = problem.classes
    return portable.cuts(n, max(n, 1) if problem.classifier.dtype == problem.dtype else _CLASSES)


def _logits(library: Library, problem: portable.Linear, out: Any) -> Any:
    """Write the logits to `out`; each library of this kernel writes a product where it is told."""
    xp, dtype = library.xp, problem.dtype
    blocks = _blocks(problem)
    for classes in blocks:
        classifier = library.cast(problem.classifier[classes, :], dtype)
        to = out if len(blocks) == 1 else out[:, classes]
        library.product(problem.hidden, xp.matrix_transpose(classifier), to)
    if problem.bias is not None:
        out += library.cast(problem.bias, dtype)
    return out


class _Adds:
    """Adds what a gradient with respect to some logits means for the other gradients."""

    def __init__(
        self,
        library: Library,
        problem: portable.Linear,
        grads: portable.Gradients,
        at: Any,
        scale: Any,
        divisor: Any,
        *,
        first: bool,
    ) -> None:
        self._library = library
        self._problem = problem
        self._grads = grads
        self._at = at
        self._scale = scale
        self._first = first
        # The classifier's gradient of a mean: it is the largest, and so divided before it is made.
        self._hidden = problem.hidden if divisor is None else problem.hidden / divisor

    def __call__(self, classes: slice, g: Any) -> None:
        library, problem, grads = self._library, self._problem, self._grads
        xp, dtype = library.xp, problem.dtype
        if self._scale is not None:
            g *= self._scale
        if grads.hidden is not None:
            d_hidden = 0.0
            for block in _blocks(problem):
                start, stop = max(block.start, classes.start), min(block.stop, classes.stop)
                if start < stop:
                    part = g[:, start - classes.start : stop - classes.start]
                    weights = library.cast(problem.classifier[start:stop, :], dtype)
                    d_hidden = d_hidden + library.product(part, weights)
            grads.hidden[self._at, :] += d_hidden
        if grads.classifier is not None:
            to, factors = grads.classifier[classes, :], (xp.matrix_transpose(g), self._hidden)
            if self._first:
                library.product(*factors, to)
            else:
                library.add_product(to, *factors)
        if grads.bias is not None:
            grads.bias[classes] += xp.squeeze(portable.total(xp, g, (0,)), axis=0)


def _rows(
    request: Request, problem: portable.Linear, x: Any, out: Any, *, with_gradient: bool
) -> tuple[Any, Any]:
    """Return the losses of a tile of rows and their gradient, by the kernel that takes them.

    The gradient is in the memory of `out`, unless that is None.
    """
    options = problem.options._replace(reduction="none", dtype=None)
    given = active(options, PLAIN_LOSS)
    if not request.indices:
        given = (*given, PROBABILITIES)
    dtype, library = problem.dtype, request.library
    rows = Request(
        "cross_entropy_value_and_grad" if with_gradient else "cross_entropy", library, x,
        library.dtype(dtype).name, (1,), dtype, dtype, "", options, given, None, problem.labels,
        request.indices, False, out,
    )  # fmt: skip
    found = run(rows, _portable)
    return found if with_gradient else (found, None)


def _portable(request: Request) -> Any:
    function = getattr(portable, request.operation)
    return function(request.xp, request.x, request.target(), request.axis, request.options)
