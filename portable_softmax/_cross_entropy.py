"""Cross-entropy: what a call means, its checks, then a kernel or the portable mathematics."""

from __future__ import annotations

from typing import Any

from portable_softmax import _checks, portable
from portable_softmax._typing import Array, ArrayT, Mask
from portable_softmax.kernels._decide import operation, run
from portable_softmax.kernels._request import (
    NONE_GIVEN,
    PLAIN_LOSS,
    PROBABILITIES,
    LossOptions,
    Request,
    active,
    loss_dtype,
)

__all__ = ["cross_entropy", "cross_entropy_value_and_grad"]


@operation
def cross_entropy(
    logits: ArrayT,
    labels: Array,
    /,
    *,
    axis: int = -1,
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
) -> ArrayT:
    r"""Return the cross-entropy between logits and labels.

    Let x hold the logits of one position, C classes, and t its target distribution, which is
    one-hot at y for a class index y. With class weights w, the position's own weight s, label
    smoothing e and z_loss z ::

        q_j  = s * w_j * ((1 - e) * t_j + e / C)           u = s * sum_j w_j t_j
        loss = sum_j q_j * (logsumexp(x) - x_j) + z * u * logsumexp(x)^2

    which is -log softmax(x)_y for a class index and no options. The gradient is ::

        p = softmax(x)          Q = sum_j q_j
        dloss/dx_j = p_j * (Q + 2 * z * u * logsumexp(x)) - q_j

    that is p - t without options. Everywhere x stands for ``softcap * tanh(logits / softcap)`` if
    `softcap` is given, and the gradient is then multiplied by ``1 - tanh(logits / softcap)^2``.

    Parameters
    ----------
    logits
        Array with C entries along `axis`, floating or integer: unnormalised, any real number.
    labels
        Class indices, if the dtype is an integer and there is one for each position, in the
        logits' shape without `axis`. A distribution over the classes (one-hot included), integer
        or floating, if the shape is that of the logits. Nothing is guessed from sizes.
    axis
        The class axis, an int.
    weight
        One weight for each class, of shape (C,).
    ignore_index
        Positions with this class index count neither in the loss nor in the mean, and get the
        gradient 0, whatever their logits hold. It may lie outside [0, C).
    label_smoothing
        e in [0, 1]: this much of the target is spread evenly over the classes that take part.
    z_loss
        z >= 0: penalises the square of logsumexp, which keeps logits from drifting.
    softcap
        Bounds the logits to (-softcap, softcap) before everything else; positive.
    where
        Boolean array that broadcasts to the shape of the logits. Classes where it is False take
        no part and get the gradient 0; a label there is an error like a label out of range.
    reduction
        ``"mean"``, ``"sum"`` or ``"none"``. The mean divides by the summed weight of the labels
        that count, s * w_y; for a distribution, by the sum of s, or the number of positions.
    check_labels
        Whether to raise for class indices out of range. This reads one flag from the device.
        Without it, under tracing and lazily, such a position is nan.
    dtype
        The floating dtype of the loss, one of the library's; None for that of `logits`. The loss of
        half types is computed in float32 anyway, and ``dtype=float32`` keeps it so, without a copy
        of the logits in a fused kernel. What is computed in is never narrower than `dtype`. The
        gradient keeps the dtype of the logits.
    sample_weight
        One weight s for each position, in the logits' shape without `axis`. It multiplies the loss
        of its position, and in a mean what the position counts. A position of weight 0 is ignored:
        it has no effect and no gradient, whatever its logits and its label are.

    Returns
    -------
    array
        0-d, or one loss for each position with ``reduction="none"``; of the library, device and
        floating dtype of `logits`, unless `dtype` names another. Half types are computed in float32
        and rounded once. Under ``torch.autocast`` their loss stays in float32, as torch's own do.

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
    The loss is computed as (max - x_y) + log1p(rest), rest being the sum of exp(x_j - max)
    without one maximum, so that a confident row keeps its digits.

    A row that holds nan or +inf is nan, and so is one of -inf only; its gradient is nan. A label at
    a logit of -inf has the loss inf. Another class at -inf contributes nothing and has the gradient
    0, as a coefficient q_j of 0 makes the class contribute 0 there. No other row is touched. If
    every label is ignored, or the weights sum to 0, or there is no position, the mean is nan, the
    sum 0 and the gradient 0.

    The conventions of class weights, smoothing and mean are those of torch, those of
    `sample_weight` those of scikit-learn and Keras; label smoothing: Szegedy et al. 2016; z_loss:
    Chowdhery et al. 2022 (PaLM); softcap: Bello et al. 2016.

    Probabilities passed as logits cannot be told from logits: pass what softmax would be given. Of
    probabilities p that is log(p).

    See Also
    --------
    cross_entropy_value_and_grad : the same with its gradient, for libraries without autodiff.
    log_softmax : all classes' log-probabilities, of which this picks one.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import cross_entropy
    >>> logits = np.asarray([[30.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    >>> print(cross_entropy(logits, np.asarray([0, 2]), reduction="none"))
    [1.87152459e-13 1.09861229e+00]
    >>> print(round(float(cross_entropy(logits, np.asarray([0, -1]), ignore_index=-1)), 15))
    1.87e-13
    """
    loss: ArrayT = _answer(
        "cross_entropy", logits, labels, axis, weight, ignore_index, label_smoothing,
        z_loss, softcap, where, reduction, check_labels, dtype, sample_weight,
    )  # fmt: skip
    return loss


@operation
def cross_entropy_value_and_grad(
    logits: ArrayT,
    labels: Array,
    /,
    *,
    axis: int = -1,
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
    grad_out: ArrayT | None = None,
) -> tuple[ArrayT, ArrayT]:
    r"""Return the cross-entropy and its gradient with respect to the logits.

    Let L be what `cross_entropy` returns for the same arguments; this returns ::

        (L, d sum(L) / d logits)

    with p - t, scaled by the reduction, for a class index and no options. The entry of the label
    is computed as minus the sum of the others where that keeps more digits: p - 1 is 0 for a
    confident row, its true value is not.

    Parameters
    ----------
    logits, labels, axis, weight, ignore_index, label_smoothing, z_loss, softcap, where, reduction, check_labels, dtype, sample_weight
        As in `cross_entropy`.
    grad_out
        Where the gradient is written, an array of the shape of `logits` and the dtype of the
        gradient, in any memory order: `logits` itself for one in place. For NumPy, CuPy, and torch
        where it records no gradient. After an IndexError its content is undefined, unless it is
        `logits`.

    Returns
    -------
    loss : array
        As `cross_entropy` returns it.
    grad : array
        `grad_out` if that is given. Of the shape, library, device and floating dtype of `logits`.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `cross_entropy`; for `grad_out` as `softmax` for its `out`.

    See Also
    --------
    cross_entropy : the loss alone, which torch and JAX differentiate.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import cross_entropy_value_and_grad
    >>> loss, grad = cross_entropy_value_and_grad(np.asarray([[30.0, 0.0, 0.0]]), np.asarray([0]))
    >>> print(grad)
    [[-1.87152459e-13  9.35762297e-14  9.35762297e-14]]
    """  # noqa: E501 - numpydoc wants the names on one line
    loss, grad = _answer(
        "cross_entropy_value_and_grad", logits, labels, axis, weight, ignore_index, label_smoothing,
        z_loss, softcap, where, reduction, check_labels, dtype, sample_weight, grad_out,
    )  # fmt: skip
    return loss, grad


# What SoftmaxWithLoss takes and passes on.
LOSS_OPTIONS = tuple(cross_entropy.__kwdefaults__ or ())


def _answer(
    operation: str,
    logits: Any,
    labels: Any,
    axis: Any,
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
    grad_out: Any = None,
) -> Any:
    """Check everything that can be checked without reading values, and answer."""
    library, found = _checks.array("logits", logits)
    at = _checks.one_axis(axis, logits.ndim)
    labels = library.adopt(labels, logits, at)
    _checks.companion("labels", labels, "logits", logits, library)
    indices = _checks.labels_are_indices(logits, labels, at, library)
    if library.lazy:
        _checks.chunks_of_labels(labels, logits, at, indices)
        if indices or weight is not None or label_smoothing != 0.0:
            _checks.known_length("logits", logits, at)
    compute_dtype, result_dtype = found.computed or library.compute_dtype(logits)
    options, given, more = PLAIN_LOSS, NONE_GIVEN, NONE_GIVEN
    if dtype is not None or compute_dtype is not result_dtype:
        compute_dtype, dtype, more = loss_dtype(library, logits, dtype, compute_dtype, result_dtype)
    tracing = library.tracing(logits, labels)
    if not (
        weight is ignore_index is softcap is where is dtype is sample_weight is None
        and type(label_smoothing) is type(z_loss) is float
        and label_smoothing == z_loss == 0.0
        and reduction == "mean"
    ):
        if where is not None:
            _checks.mask(where, "logits", logits, library)
        options = loss_options(
            library, "logits", logits, logits, at, indices, compute_dtype, weight, ignore_index,
            label_smoothing, z_loss, softcap, where, reduction, dtype, sample_weight,
        )  # fmt: skip
        given = (*active(options, PLAIN_LOSS), *more)
        arrays = [a for a in (weight, where, sample_weight) if a is not None]
        tracing = tracing or library.tracing(*arrays)
    if not indices:
        given = (*given, PROBABILITIES)
    if grad_out is not None:
        given_too = labels, options.weight, options.where, options.sample_weight
        _checks.output("grad_out", grad_out, "logits", logits, result_dtype, library, *given_too)
    request = Request(
        operation, library, logits, found.name, (at,), compute_dtype, result_dtype, tracing,
        options, given, None, labels, indices, check_labels, grad_out,
    )  # fmt: skip
    answer = run(request, _portable_loss)
    if type(answer) is tuple:
        loss, grad = answer
        return library.scalar_if_0d(loss), grad
    return library.scalar_if_0d(answer)


def loss_options(
    library: Any,
    of: str,
    like: Any,
    logits: Any,
    axis: int,
    indices: bool,
    compute_dtype: Any,
    weight: Any,
    ignore_index: Any,
    label_smoothing: Any,
    z_loss: Any,
    softcap: Any,
    where: Any,
    reduction: Any,
    dtype: Any,
    sample_weight: Any,
) -> LossOptions:
    """Check the options but the mask; the weights are cast to the dtype that is computed in.

    `like` is the array, named `of`, beside which weights are given.
    """
    if weight is not None:
        _checks.companion("weight", weight, of, like, library)
        _checks.class_weight(weight, logits, axis, library)
        weight = library.quietly(library.cast, weight, compute_dtype)
    if sample_weight is not None:
        _checks.companion("sample_weight", sample_weight, of, like, library)
        _checks.sample_weight(sample_weight, logits, axis, library)
        sample_weight = library.quietly(library.cast, sample_weight, compute_dtype)
    if softcap is not None:
        softcap = _checks.number("softcap", softcap, low=0.0, open_low=True)
    return LossOptions(
        weight=weight,
        ignore_index=_checks.ignore_index(ignore_index, indices),
        label_smoothing=_checks.number("label_smoothing", label_smoothing, low=0.0, high=1.0),
        z_loss=_checks.number("z_loss", z_loss, low=0.0),
        softcap=softcap,
        where=where,
        reduction=_checks.reduction(reduction),
        dtype=dtype,
        sample_weight=sample_weight,
    )


def _portable_loss(request: Request) -> Any:
    """Answer in the library's own operations."""
    library, answer_dtype = request.library, request.answer_dtype
    found = library.compiled(getattr(portable, request.operation))(
        library.xp,
        library.cast(request.x, request.compute_dtype),
        request.target(),
        request.axis,
        request.options,
    )
    if isinstance(found, tuple):
        loss, grad = found
        return library.cast(loss, answer_dtype), library.cast(grad, request.result_dtype)
    return library.cast(found, answer_dtype)
