"""Cross-entropy of yes-or-no labels: what a call means, its checks, the answer."""

from __future__ import annotations

from typing import Any

from portable_softmax import _checks, portable
from portable_softmax._softmax import with_an_axis
from portable_softmax._typing import Array, ArrayT, Mask
from portable_softmax.kernels._decide import operation, run
from portable_softmax.kernels._request import (
    PLAIN_SIGMOID,
    Request,
    SigmoidOptions,
    active,
    loss_dtype,
)

__all__ = ["sigmoid_cross_entropy", "sigmoid_cross_entropy_value_and_grad"]


@operation
def sigmoid_cross_entropy(
    logits: ArrayT,
    labels: Array | Mask,
    /,
    *,
    weight: Array | None = None,
    pos_weight: Array | None = None,
    focal_gamma: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> ArrayT:
    r"""Return the cross-entropy between logits and labels that are independently yes or no.

    Let z be a logit, p = 1 / (1 + exp(-z)) and t its label, 1 for yes and 0 for no. With weight w,
    the weight c of a yes, the focal exponent g and label smoothing e ::

        t'   = (1 - e) * t + e / 2
        loss = w * (c * t' * (1 - p)^g * softplus(-z) + (1 - t') * p^g * softplus(z))

    where softplus(z) = log(1 + exp(z)); without options that is -t log p - (1 - t) log(1 - p). The
    gradient is ::

        dloss/dz = w * ((1 - t') * p^g * (g * (1 - p) * softplus(z) + p)
                        - c * t' * (1 - p)^g * (g * p * softplus(-z) + (1 - p)))

    that is p - t without options.

    Parameters
    ----------
    logits
        Array of any shape, floating or integer.
    labels
        Array of the same shape: 0 or 1, boolean, integer or floating; or probabilities between
        them. Values are not looked at.
    weight
        One weight for each entry, or what broadcasts to the shape of the logits. An entry of weight
        0 has no effect, whatever its logit is.
    pos_weight
        c, the weight of a yes, such as the ratio of noes to yeses of a class; broadcasts to the
        shape of the logits.
    focal_gamma
        g >= 0: how much entries count less that are right already. 0 is no focal loss.
    label_smoothing
        e in [0, 1]: this much of each label is replaced by 1/2.
    reduction
        ``"mean"`` over the entries, whatever their weights, ``"sum"`` or ``"none"``.

    Returns
    -------
    array
        0-d, or of the logits' shape with ``reduction="none"``; of the library, device and floating
        dtype of `logits`. Half types are computed in float32 and rounded once. Under
        ``torch.autocast`` their loss stays in float32.

    Raises
    ------
    TypeError
        If an argument is no array or of the wrong dtype, or arrays of two libraries meet.
    ValueError
        If shapes or devices do not fit, a number is outside its range, or `reduction` is unknown.

    Notes
    -----
    Both logarithms are softplus(y) = max(y, 0) + log1p(exp(-abs(y))), powers are exponentials of
    them, and 1 - p is the sigmoid of -z: the digits of a confident logit stay. A coefficient of 0
    beside an infinite logit contributes 0; z = inf for a no, and -inf for a yes, is inf. A logit of
    nan is nan. With labels in [0, 1] and weights that are not negative, the loss is not negative.

    The mean of no entry is nan. Weights are those of torch's BCEWithLogitsLoss; the focal loss is
    that of Lin et al. (2017, "Focal loss for dense object detection"), its alpha being `weight` and
    `pos_weight`.

    See Also
    --------
    cross_entropy : one label out of several.
    sigmoid_cross_entropy_value_and_grad : the same with its gradient.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import sigmoid_cross_entropy
    >>> logits, labels = np.asarray([30.0, -40.0, 0.0]), np.asarray([1, 0, 1])
    >>> print(sigmoid_cross_entropy(logits, labels, reduction="none"))
    [9.35762297e-14 4.24835426e-18 6.93147181e-01]
    >>> print(sigmoid_cross_entropy(logits, labels, reduction="none", focal_gamma=2.0)[2].round(6))
    0.173287
    """
    loss: ArrayT = _answer(
        "sigmoid_cross_entropy", logits, labels, weight, pos_weight, focal_gamma, label_smoothing,
        reduction,
    )  # fmt: skip
    return loss


@operation
def sigmoid_cross_entropy_value_and_grad(
    logits: ArrayT,
    labels: Array | Mask,
    /,
    *,
    weight: Array | None = None,
    pos_weight: Array | None = None,
    focal_gamma: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[ArrayT, ArrayT]:
    r"""Return the cross-entropy of yes-or-no labels and its gradient with respect to the logits.

    Let L be what `sigmoid_cross_entropy` returns for the same arguments; this returns ::

        (L, d sum(L) / d logits)

    with p - t, scaled by the reduction, without options. For a yes it is computed as minus the
    sigmoid of -z: p - 1 is 0 for a confident logit, its true value is not.

    Parameters
    ----------
    logits, labels, weight, pos_weight, focal_gamma, label_smoothing, reduction
        As in `sigmoid_cross_entropy`.

    Returns
    -------
    loss : array
        As `sigmoid_cross_entropy` returns it.
    grad : array
        Of the shape, library, device and floating dtype of `logits`.

    Raises
    ------
    TypeError, ValueError
        As `sigmoid_cross_entropy`.

    See Also
    --------
    sigmoid_cross_entropy : the loss alone, which torch and JAX differentiate.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import sigmoid_cross_entropy_value_and_grad
    >>> logits, labels = np.asarray([40.0, -40.0]), np.asarray([1, 0])
    >>> print(sigmoid_cross_entropy_value_and_grad(logits, labels, reduction="sum")[1])
    [-4.24835426e-18  4.24835426e-18]
    """
    loss, grad = _answer(
        "sigmoid_cross_entropy_value_and_grad", logits, labels, weight, pos_weight, focal_gamma,
        label_smoothing, reduction,
    )  # fmt: skip
    return loss, grad


def _answer(
    operation: str,
    logits: Any,
    labels: Any,
    weight: Any,
    pos_weight: Any,
    focal_gamma: Any,
    label_smoothing: Any,
    reduction: Any,
) -> Any:
    """Check everything, without reading values, and answer."""
    library, found = _checks.array("logits", logits)
    _checks.binary_labels(labels, logits, library)
    compute_dtype, result_dtype = found.computed or library.compute_dtype(logits)
    compute_dtype, dtype, more = loss_dtype(library, logits, None, compute_dtype, result_dtype)
    weights = []
    for name, given in (("weight", weight), ("pos_weight", pos_weight)):
        if given is not None:
            _checks.companion(name, given, "logits", logits, library)
            _checks.real_weights(name, given, library)
            _checks.broadcastable(name, given, logits.shape, "logits")
            given = library.quietly(library.cast, given, compute_dtype)
        weights.append(given)
    options = SigmoidOptions(
        weight=weights[0],
        pos_weight=weights[1],
        focal_gamma=_checks.number("focal_gamma", focal_gamma, low=0.0),
        label_smoothing=_checks.number("label_smoothing", label_smoothing, low=0.0, high=1.0),
        reduction=_checks.reduction(reduction),
        dtype=dtype,
    )
    tracing = library.tracing(logits, labels, *[w for w in weights if w is not None])
    request = Request(
        operation, library, logits, found.name, (), compute_dtype, result_dtype, tracing, options,
        (*active(options, PLAIN_SIGMOID), *more), None, labels, indices=False,
    )  # fmt: skip
    answer = run(request, _portable_loss)
    if type(answer) is tuple:
        return tuple(map(library.scalar_if_0d, answer))
    return library.scalar_if_0d(answer)


def _portable_loss(request: Request) -> Any:
    """Answer in the library's own operations."""
    library, compute_dtype, options = request.library, request.compute_dtype, request.options
    x, labels, whole = request.x, request.labels, request.x.ndim > 0
    if not whole:
        x, labels, weight, pos_weight = with_an_axis(
            library.xp, x, labels, options.weight, options.pos_weight
        )
        options = options._replace(weight=weight, pos_weight=pos_weight)
    answer = library.compiled(getattr(portable, request.operation))(
        library.xp, library.cast(x, compute_dtype), library.cast(labels, compute_dtype), options
    )
    loss, *grad = answer if type(answer) is tuple else (answer,)
    if not whole and options.reduction == "none":
        loss = library.xp.squeeze(loss, axis=-1)
    loss = library.cast(loss, request.answer_dtype)
    if not grad:
        return loss
    slope = grad[0] if whole else library.xp.squeeze(grad[0], axis=-1)
    return loss, library.cast(slope, request.result_dtype)
