"""The cross-entropy of a linear layer, whose logits are never stored: checks, then tiles."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from portable_softmax import _checks, portable
from portable_softmax._cross_entropy import loss_options
from portable_softmax._typing import Array, ArrayT, Mask
from portable_softmax.kernels._decide import operation, run
from portable_softmax.kernels._request import (
    PLAIN_LOSS,
    PROBABILITIES,
    LinearOptions,
    Request,
    active,
    loss_dtype,
)
from portable_softmax.libraries import Library

__all__ = ["linear_cross_entropy", "linear_cross_entropy_value_and_grad"]


@operation
def linear_cross_entropy(
    hidden: ArrayT,
    classifier: ArrayT,
    labels: Array,
    /,
    *,
    bias: ArrayT | None = None,
    weight: Array | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    where: Mask | None = None,
    reduction: str = "mean",
    check_labels: bool = True,
    dtype: Any = None,
    sample_weight: Array | None = None,
    tile: int | None = None,
) -> ArrayT:
    r"""Return the cross-entropy of the logits of a linear layer, without storing the logits.

    Let h hold the hidden vectors, W the classifier and b the bias; this is ::

        cross_entropy(h @ W.T + b, labels)

    with the same options and the same semantics, row by row, while at most two tiles of logits
    exist. With g the gradient of `cross_entropy` with respect to the logits ::

        dh = g W          dW = g^T h          db = sum of g over the positions

    Parameters
    ----------
    hidden
        Array of shape (..., H), floating: a vector for each position.
    classifier
        Array of shape (C, H) and of the dtype of `hidden`: a vector for each class.
    labels
        Class indices of shape (...), integer, or a distribution of shape (..., C).
    bias
        Array of shape (C,) and of the dtype of `hidden`.
    weight, ignore_index, label_smoothing, z_loss, softcap, reduction, check_labels, sample_weight
        As in `cross_entropy`. Where labels and weights can be read, a position with an ignored
        label or of weight 0 costs no product. JAX, which compiles for shapes alone, puts such
        positions last and skips the tiles that hold no other.
    where
        Boolean array that broadcasts to the shape of the logits, (..., C). Classes where it is
        False take no part, whatever the classifier holds for them: the padding of a vocabulary has
        the shape (C,).
    dtype
        The floating dtype of the loss, one of the library's; None for that of `hidden`. What is
        multiplied and summed in is never narrower. Gradients keep the dtype of `hidden`.
    tile
        The largest number of bytes of a tile of logits. It holds the logits of some positions, or
        if a single position needs more, of some classes. Without it, 64 MiB, or 32 in
        JAX, whose products copy a tile.

    Returns
    -------
    array
        0-d, or one loss for each position with ``reduction="none"``; of the library, device and
        dtype of `hidden`, unless `dtype` names another. Half types are multiplied and summed in
        float32 and rounded once. Under ``torch.autocast`` their loss stays in float32.

    Raises
    ------
    TypeError
        If an argument is no array or of the wrong dtype, or arrays of two libraries meet; if
        `dtype` is no floating dtype.
    ValueError
        If shapes or devices do not fit, a number is outside its range, `reduction` is unknown, or
        `ignore_index` is given with a distribution.
    IndexError
        If a class index is outside [0, C) and not `ignore_index`, or masked out by `where`.

    Notes
    -----
    The products are those of the library, and the rows between them take the kernel that
    `cross_entropy` takes. The hidden vector of an ignored position may hold infinities and nans:
    its gradient is 0, and it adds nothing to the others. torch differentiates: the gradients are
    made together with the loss, so that the logits are made once. The first backward pass gives
    them away; one more, through a retained graph, makes the logits again, as does each with
    ``reduction="none"``. JAX does the same in a scan, and torch.compile calls it as one operator,
    from 65,536 logits on. Derivatives of higher order, and those of torch.func, keep the logits.
    Dask multiplies its own chunks.

    The tiles of logits: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models";
    Hsu et al. 2024 (Liger Kernel).

    See Also
    --------
    cross_entropy : for logits that are there.
    online.merge : what joins the classes of a row that is longer than a tile.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import linear_cross_entropy
    >>> hidden, classifier = np.asarray([[1.0, 2.0], [0.0, 1.0]]), np.eye(3, 2)
    >>> loss = linear_cross_entropy(hidden, classifier, np.asarray([1, 0]))
    >>> print(round(float(loss), 6))
    0.979525
    """
    loss, _ = _answer(
        "linear_cross_entropy", hidden, classifier, labels, bias, weight, ignore_index,
        label_smoothing, z_loss, softcap, where, reduction, check_labels, dtype, sample_weight,
        tile,
    )  # fmt: skip
    found: ArrayT = loss
    return found


@operation
def linear_cross_entropy_value_and_grad(
    hidden: ArrayT,
    classifier: ArrayT,
    labels: Array,
    /,
    *,
    bias: ArrayT | None = None,
    weight: Array | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    where: Mask | None = None,
    reduction: str = "mean",
    check_labels: bool = True,
    dtype: Any = None,
    sample_weight: Array | None = None,
    tile: int | None = None,
) -> tuple[ArrayT, tuple[ArrayT, ArrayT, ArrayT | None]]:
    r"""Return the cross-entropy of a linear layer and its gradients.

    Let L be what `linear_cross_entropy` returns for the same arguments; this returns ::

        (L, (d sum(L) / d hidden, d sum(L) / d classifier, d sum(L) / d bias))

    from three products for each tile: the logits, and what their gradient g means for the hidden
    vectors, ``g W``, and for the classifier, ``g^T h``. The gradient of the bias is None without
    a bias.

    Parameters
    ----------
    hidden, classifier, labels, bias, weight, ignore_index, label_smoothing, z_loss, softcap, where, reduction, check_labels, dtype, sample_weight, tile
        As in `linear_cross_entropy`.

    Returns
    -------
    loss : array
        As `linear_cross_entropy` returns it.
    gradients : tuple of arrays
        Of the shapes, library, device and dtype of `hidden`, `classifier` and `bias`.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `linear_cross_entropy`.

    See Also
    --------
    linear_cross_entropy : the loss alone, which torch and JAX differentiate.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import linear_cross_entropy_value_and_grad
    >>> hidden, classifier = np.asarray([[1.0, 2.0]]), np.zeros((2, 2))
    >>> loss, (d_hidden, d_classifier, d_bias) = linear_cross_entropy_value_and_grad(
    ...     hidden, classifier, np.asarray([1])
    ... )
    >>> print(d_classifier)
    [[ 0.5  1. ]
     [-0.5 -1. ]]
    """  # noqa: E501 - numpydoc wants the names on one line
    loss, grads = _answer(
        "linear_cross_entropy_value_and_grad", hidden, classifier, labels, bias, weight,
        ignore_index, label_smoothing, z_loss, softcap, where, reduction, check_labels, dtype,
        sample_weight, tile,
    )  # fmt: skip
    return loss, grads


class _Logits(NamedTuple):
    """What the checks ask of logits, which are not there."""

    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)


def _answer(
    operation: str,
    hidden: Any,
    classifier: Any,
    labels: Any,
    bias: Any,
    weight: Any,
    ignore_index: Any,
    label_smoothing: Any,
    z_loss: Any,
    softcap: Any,
    where: Any,
    reduction: Any,
    check_labels: bool,
    dtype: Any,
    sample_weight: Any,
    tile: Any,
) -> Any:
    """Check everything that can be checked without reading values, and answer."""
    library, found = _checks.array("hidden", hidden)
    _checks.floating("hidden", hidden, library)
    for name, array in (("classifier", classifier), ("bias", bias)):
        if name == "classifier" or array is not None:
            _checks.companion(name, array, "hidden", hidden, library)
            _checks.like_dtype(name, array, "hidden", hidden, "cast one of them first")
    _checks.layer(hidden, classifier, bias)
    _checks.companion("labels", labels, "hidden", hidden, library)
    logits = _Logits((*hidden.shape[:-1], classifier.shape[0]))
    axis = logits.ndim - 1
    indices = _checks.labels_are_indices(logits, labels, axis, library)
    if library.lazy:
        _checks.chunks_correspond("labels", labels, "hidden", hidden, range(axis))
        if not library.chunked:
            _checks.known_length("classifier", classifier, 0)
    assert found.computed is not None  # it is floating
    compute_dtype, dtype, more = loss_dtype(library, hidden, dtype, *found.computed)
    result_dtype = found.computed[1]
    if where is not None:
        _checks.companion("where", where, "hidden", hidden, library)
        _checks.mask_of_shape(where, "the logits", logits.shape, library)
        where = library.xp.reshape(where, (1,)) if where.ndim == 0 else where
    options = loss_options(
        library, "hidden", hidden, logits, axis, indices, compute_dtype, weight, ignore_index,
        label_smoothing, z_loss, softcap, where, reduction, dtype, sample_weight,
    )  # fmt: skip
    size = library.xp.finfo(compute_dtype).bits // 8
    elements = max(1, (library.tile if tile is None else _checks.tile(tile)) // size)
    given = (*active(options, PLAIN_LOSS), *more)
    arrays = (hidden, classifier, bias, labels, options.weight, where, options.sample_weight)
    request = Request(
        operation, library, hidden, found.name, (hidden.ndim - 1,), compute_dtype, result_dtype,
        library.tracing(*[a for a in arrays if a is not None]),
        LinearOptions(classifier, bias, options, elements),
        given if indices else (*given, PROBABILITIES), None, labels, indices, check_labels,
    )  # fmt: skip
    answer = run(request, _portable)
    return library.quietly(_finished, request, answer)


def _finished(request: Request, answer: Any) -> Any:
    """Return the loss and its gradients, or None, in their shapes and dtypes."""
    library, hidden = request.library, request.x
    loss, grads = answer if isinstance(answer, tuple) else (answer, None)
    if request.options.loss.reduction == "none" and hidden.ndim != 2:
        loss = library.xp.reshape(loss, library.shape(hidden)[:-1])
    loss = library.scalar_if_0d(library.cast(loss, request.answer_dtype))
    if grads is None:
        return loss, None
    found = [None if g is None else library.cast(g, request.result_dtype) for g in grads]
    if hidden.ndim != 2:
        found[0] = library.xp.reshape(found[0], library.shape(hidden))
    return loss, tuple(found)


def _portable(request: Request) -> Any:
    """Answer in the library's own operations."""
    library, elements = request.library, request.options.elements
    problem = request.linear()
    request.check_labels_of_linear(problem)
    if not _has_tiles(library, problem):
        elements = math.inf
    function = library.compiled(getattr(portable, request.operation))
    return function(library.xp, problem, elements)


def _has_tiles(library: Library, problem: portable.Linear) -> bool:
    """Return whether an array is cut here, and not by its library or by a compiler."""
    lengths = problem.positions, problem.classes
    return not library.chunked and all(library.is_known(n) for n in lengths)
