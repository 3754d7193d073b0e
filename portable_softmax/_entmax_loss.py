"""The loss of entmax: what a call means, its checks, then the portable mathematics."""

from __future__ import annotations

from typing import Any

from portable_softmax import _checks, portable
from portable_softmax._typing import Array, ArrayT
from portable_softmax.kernels._decide import operation, run
from portable_softmax.kernels._request import (
    PLAIN_ENTMAX_LOSS,
    EntmaxLossOptions,
    Request,
    active,
    loss_dtype,
)

__all__ = ["entmax_loss", "entmax_loss_value_and_grad"]


@operation
def entmax_loss(
    logits: ArrayT,
    labels: Array,
    /,
    *,
    alpha: float = 1.5,
    axis: int = -1,
    ignore_index: int | None = None,
    reduction: str = "mean",
    check_labels: bool = True,
    sample_weight: Array | None = None,
) -> ArrayT:
    r"""Return the Fenchel-Young loss of entmax between logits and labels.

    Let x hold the logits of one position, t its target distribution, which is one-hot at y for a
    class index y, c = alpha - 1 and p = entmax(x). With the Tsallis entropy
    H(p) = (1 - sum_j p_j^alpha) / (alpha * c) ::

        loss = sum_j (p_j - t_j) x_j + H(p) - H(t)
             = sum_j (t_j^alpha + c p_j^alpha - alpha (1 + c w_j) t_j) / (alpha c)

    where w_j = x_j - max - s, with the s of `entmax`. No term of the latter is negative. The
    gradient is ::

        dloss/dx_j = p_j - t_j

    The loss is 0 once the label is ahead of all others by 1/c. For an alpha of inf it is
    max - sum_j t_j x_j, that of the perceptron.

    Parameters
    ----------
    logits
        Array with C entries along `axis`, floating or integer.
    labels
        Class indices, if the dtype is an integer and there is one for each position, in the
        logits' shape without `axis`. Else a distribution over the classes, in the logits' shape,
        that sums to one; values are not looked at.
    alpha
        A number from 1 to inf: that of the entmax. 1 is the cross-entropy of labels, less the
        entropy of a distribution.
    axis
        The class axis, an int.
    ignore_index
        Positions with this class index count neither in the loss nor in the mean, and get the
        gradient 0, whatever their logits hold.
    reduction
        ``"mean"``, ``"sum"`` or ``"none"``. The mean divides by the number of positions that count,
        or by the sum of their weights.
    check_labels
        Whether to raise for class indices out of range. Without it, under tracing and lazily, such
        a position is nan.
    sample_weight
        One weight for each position, as in `cross_entropy`.

    Returns
    -------
    array
        0-d, or one loss for each position with ``reduction="none"``; of the library, device and
        floating dtype of `logits`. Half types are computed in float32 and rounded once. Under
        ``torch.autocast`` their loss stays in float32.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `cross_entropy` and `entmax`.

    Notes
    -----
    The loss of a class index is not negative, that of a distribution but for rounding. A label at a
    logit of -inf is inf. If every position is ignored the mean is nan, the sum 0 and the gradient
    0. Fenchel-Young losses: Blondel, Martins & Niculae 2020, "Learning with Fenchel-Young losses".

    See Also
    --------
    cross_entropy : alpha = 1, with more options and in fused kernels.
    entmax : the probabilities.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import entmax_loss
    >>> logits = np.asarray([[3.0, 0.0, 0.0], [1.0, 0.5, -1.0]])
    >>> print(entmax_loss(logits, np.asarray([0, 0]), reduction="none", alpha=2).round(6))
    [0.     0.0625]
    """
    loss: ArrayT = _answer(
        "entmax_loss", logits, labels, alpha, axis, ignore_index, reduction, check_labels,
        sample_weight,
    )  # fmt: skip
    return loss


@operation
def entmax_loss_value_and_grad(
    logits: ArrayT,
    labels: Array,
    /,
    *,
    alpha: float = 1.5,
    axis: int = -1,
    ignore_index: int | None = None,
    reduction: str = "mean",
    check_labels: bool = True,
    sample_weight: Array | None = None,
) -> tuple[ArrayT, ArrayT]:
    r"""Return the loss of entmax and its gradient with respect to the logits.

    Let L be what `entmax_loss` returns for the same arguments; this returns ::

        (L, d sum(L) / d logits)

    that is p - t, scaled by weights and reduction, with p = entmax(logits).

    Parameters
    ----------
    logits, labels, alpha, axis, ignore_index, reduction, check_labels, sample_weight
        As in `entmax_loss`.

    Returns
    -------
    loss : array
        As `entmax_loss` returns it.
    grad : array
        Of the shape, library, device and floating dtype of `logits`.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `entmax_loss`.

    See Also
    --------
    entmax_loss : the loss alone, which torch and JAX differentiate.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import entmax_loss_value_and_grad
    >>> logits, labels = np.asarray([[1.0, 0.5, -1.0]]), np.asarray([1])
    >>> print(entmax_loss_value_and_grad(logits, labels, alpha=2)[1])
    [[ 0.75 -0.75  0.  ]]
    """
    loss, grad = _answer(
        "entmax_loss_value_and_grad", logits, labels, alpha, axis, ignore_index, reduction,
        check_labels, sample_weight,
    )  # fmt: skip
    return loss, grad


def _answer(
    operation: str,
    logits: Any,
    labels: Any,
    alpha: Any,
    axis: Any,
    ignore_index: Any,
    reduction: Any,
    check_labels: bool,
    sample_weight: Any,
) -> Any:
    """Check everything that can be checked without reading values, and answer."""
    library, found = _checks.array("logits", logits)
    at = _checks.one_axis(axis, logits.ndim)
    labels = library.adopt(labels, logits, at)
    _checks.companion("labels", labels, "logits", logits, library)
    indices = _checks.labels_are_indices(logits, labels, at, library)
    if library.lazy:
        _checks.chunks_of_labels(labels, logits, at, indices)
    if library.chunked or indices:
        _checks.known_length("logits", logits, at)
    compute_dtype, result_dtype = found.computed or library.compute_dtype(logits)
    compute_dtype, dtype, more = loss_dtype(library, logits, None, compute_dtype, result_dtype)
    arrays = [logits, labels]
    if sample_weight is not None:
        _checks.companion("sample_weight", sample_weight, "logits", logits, library)
        _checks.sample_weight(sample_weight, logits, at, library)
        sample_weight = library.quietly(library.cast, sample_weight, compute_dtype)
        arrays.append(sample_weight)
    options = EntmaxLossOptions(
        alpha=_checks.alpha(alpha),
        ignore_index=_checks.ignore_index(ignore_index, indices),
        reduction=_checks.reduction(reduction),
        sample_weight=sample_weight,
        dtype=dtype,
    )
    request = Request(
        operation, library, logits, found.name, (at,), compute_dtype, result_dtype,
        library.tracing(*arrays), options, (*active(options, PLAIN_ENTMAX_LOSS), *more), None,
        labels, indices, check_labels,
    )  # fmt: skip
    answer = run(request, _portable_loss)
    if type(answer) is tuple:
        loss, grad = answer
        return library.scalar_if_0d(loss), grad
    return library.scalar_if_0d(answer)


def _portable_loss(request: Request) -> Any:
    """Answer in the library's own operations."""
    library, options = request.library, request.options
    answer = library.compiled(getattr(portable, request.operation))(
        library.xp,
        library.cast(request.x, request.compute_dtype),
        request.target(),
        request.axis,
        options.alpha,
        options.reduction,
        followed=library.follows(request.x),
    )
    if isinstance(answer, tuple):
        loss, grad = answer
        return library.cast(loss, request.answer_dtype), library.cast(grad, request.result_dtype)
    return library.cast(answer, request.answer_dtype)
