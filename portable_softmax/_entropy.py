"""Entropy and divergence of softmax distributions: what a call means, its checks, the answer."""

from __future__ import annotations

from typing import Any

from portable_softmax import _checks, portable
from portable_softmax._softmax import of_rows
from portable_softmax._typing import Array, ArrayT, Axis
from portable_softmax.kernels._decide import operation, run
from portable_softmax.kernels._request import (
    EXTREME,
    PLAIN_DIVERGENCE,
    DivergenceOptions,
    Request,
    active,
    is_extreme,
    loss_dtype,
)

__all__ = [
    "entropy",
    "entropy_value_and_grad",
    "kl_divergence",
    "kl_divergence_value_and_grad",
]


@operation
def entropy(logits: ArrayT, /, *, axis: Axis = -1) -> ArrayT:
    r"""Return the entropy of a softmax distribution, in nats, from its logits.

    Let x hold the logits and p = softmax(x); over the reduced axes ::

        H = -sum_j p_j log p_j = log1p(rest) + sum_j p_j (max - x_j)

    where rest is the sum of exp(x_j - max) without one maximum. No term is negative, so that a
    confident row keeps its digits. With an upstream gradient dH ::

        dx_j = dH * p_j * (-log p_j - H)

    Parameters
    ----------
    logits
        Array of any shape, floating or integer.
    axis
        An int, a tuple of ints, or None for all axes: what the probabilities sum to one over.

    Returns
    -------
    array
        In the shape of `logits` without the reduced axes, of the library, device and floating dtype
        of `logits`, and between 0 and log of the number of entries. Half types are computed in
        float32 and rounded once.

    Raises
    ------
    TypeError
        If `logits` is no array, or is bool, complex or of another dtype.
    ValueError
        If `axis` is out of range.

    Notes
    -----
    A probability of 0, as that of a logit of -inf, contributes 0 and has the gradient 0. A row of
    -inf only, or one that holds +inf or nan, is nan. An empty sum is 0. The entropy is Shannon's
    (1948, "A mathematical theory of communication").

    See Also
    --------
    kl_divergence : how far one distribution is from another.
    cross_entropy : of probabilities as labels; with labels softmax(x) this is its value.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import entropy
    >>> print(entropy(np.asarray([[0.0, 0.0], [0.0, -40.0]])))
    [6.93147181e-01 1.74182524e-16]
    """
    h: ArrayT = _entropy("entropy", logits, axis)
    return h


@operation
def entropy_value_and_grad(logits: ArrayT, /, *, axis: Axis = -1) -> tuple[ArrayT, ArrayT]:
    r"""Return the entropy of a softmax distribution and its gradient.

    Let H be what `entropy` returns for the same arguments; this returns ::

        (H, d sum(H) / d logits)

    whose entries are p_j * ((max - x_j) - sum_k p_k (max - x_k)).

    Parameters
    ----------
    logits, axis
        As in `entropy`.

    Returns
    -------
    value : array
        As `entropy` returns it.
    grad : array
        Of the shape, library, device and floating dtype of `logits`.

    Raises
    ------
    TypeError, ValueError
        As `entropy`.

    See Also
    --------
    entropy : the value alone, which torch and JAX differentiate.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import entropy_value_and_grad
    >>> print(entropy_value_and_grad(np.asarray([0.0, -40.0]))[1])
    [-1.6993417e-16  1.6993417e-16]
    """
    h, grad = _entropy("entropy_value_and_grad", logits, axis)
    return h, grad


@operation
def kl_divergence(
    logits_p: ArrayT,
    logits_q: Array,
    /,
    *,
    axis: int = -1,
    temperature: float = 1.0,
    distillation: bool = False,
    reduction: str = "mean",
) -> ArrayT:
    r"""Return the Kullback-Leibler divergence of two softmax distributions, from their logits.

    Let T be the temperature, p = softmax(logits_p / T) and q = softmax(logits_q / T); for one
    position ::

        KL(p || q) = sum_j p_j (log p_j - log q_j) = sum_j p_j (exp(u_j) - 1 - u_j)

    with u_j = log q_j - log p_j. No term of the latter is negative. The gradients are ::

        dKL/dlogits_p_j = p_j * (-u_j - KL) / T          dKL/dlogits_q_j = (q_j - p_j) / T

    Parameters
    ----------
    logits_p
        Array with C entries along `axis`, floating or integer: the logits of the distribution that
        is taken for true, such as a teacher's.
    logits_q
        Array of the same shape, library and device, of any such dtype: a student's.
    axis
        The class axis, an int.
    temperature
        T, a positive number, for both.
    distillation
        Whether to multiply by T^2, which keeps the gradient's size when T changes (Hinton, Vinyals
        & Dean 2015, "Distilling the knowledge in a neural network").
    reduction
        ``"mean"`` over the positions (torch calls that batchmean), ``"sum"`` or ``"none"``.

    Returns
    -------
    array
        0-d, or one divergence for each position with ``reduction="none"``; of the library, device
        and floating dtype of `logits_p`. It is computed in the wider precision of both, half types
        in float32. Under ``torch.autocast`` that of half types stays in float32.

    Raises
    ------
    TypeError
        If an argument is no array or of the wrong dtype, or they belong to two libraries; if
        `temperature` is no Python number.
    ValueError
        If shapes or devices differ, `axis` is out of range, `temperature` is not positive, or
        `reduction` is unknown.

    Notes
    -----
    It is never negative. With u the unit roundoff of what is computed in, D the largest
    ``|log p_j|`` or ``|log q_j|`` that counts, ``e = 4 u (1 + D)`` and K the divergence, the error
    is at most ``8 u K + e sqrt(2 K) + e^2 / 2``: what is after 8 u K counts where p and q are close
    to each other.

    Where p is 0, as at a logit of -inf, the term is 0, and so is the gradient with respect to
    `logits_p`; a q of 0 beside it is no infinity. Where q is 0 and p is not, the divergence is inf.
    A row of -inf only, or one that holds +inf or nan, is nan. With no classes the divergence is 0;
    the mean over no positions is nan. The divergence is that of Kullback & Leibler (1951, "On
    information and sufficiency").

    See Also
    --------
    cross_entropy : the same but for the entropy of p, with probabilities as labels.
    entropy : of one distribution.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import kl_divergence
    >>> x, y = np.asarray([[1.0, 2.0, 3.0]]), np.asarray([[1.0, 2.0, 3.0000001]])
    >>> print(kl_divergence(x, x), f"{kl_divergence(x, y):.4e}")
    0.0 1.1135e-15
    """
    k: ArrayT = _divergence(
        "kl_divergence", logits_p, logits_q, axis, temperature, distillation, reduction
    )
    return k


@operation
def kl_divergence_value_and_grad(
    logits_p: ArrayT,
    logits_q: Array,
    /,
    *,
    axis: int = -1,
    temperature: float = 1.0,
    distillation: bool = False,
    reduction: str = "mean",
) -> tuple[ArrayT, tuple[ArrayT, Array]]:
    r"""Return the divergence of two softmax distributions and its gradients.

    Let K be what `kl_divergence` returns for the same arguments; this returns ::

        (K, (d sum(K) / d logits_p, d sum(K) / d logits_q))

    Where q is near p, q - p is computed as p * expm1(log q - log p).

    Parameters
    ----------
    logits_p, logits_q, axis, temperature, distillation, reduction
        As in `kl_divergence`.

    Returns
    -------
    value : array
        As `kl_divergence` returns it.
    grads : pair of arrays
        Each of the shape, library, device and floating dtype of its logits.

    Raises
    ------
    TypeError, ValueError
        As `kl_divergence`.

    Notes
    -----
    Where the divergence is inf the gradient with respect to `logits_p` is no number.

    See Also
    --------
    kl_divergence : the value alone, which torch and JAX differentiate.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import kl_divergence_value_and_grad
    >>> x, y = np.asarray([[0.0, 0.0]]), np.asarray([[0.0, 2.0]])
    >>> value, (by_p, by_q) = kl_divergence_value_and_grad(x, y)
    >>> print(round(float(value), 6), by_q.round(6))
    0.433781 [[-0.380797  0.380797]]
    """
    k, by_p, by_q = _divergence(
        "kl_divergence_value_and_grad", logits_p, logits_q, axis, temperature, distillation,
        reduction,
    )  # fmt: skip
    return k, (by_p, by_q)


# --------------------------------------------------------------------------- requests


def _entropy(operation: str, logits: Any, axis: Any) -> Any:
    """Check the arguments of the entropy and answer, with the gradient or without."""
    library, dtype = _checks.array("logits", logits)
    axes = _checks.axes(axis, logits.ndim)
    compute_dtype, result_dtype = dtype.computed or library.compute_dtype(logits)
    request = Request(
        operation, library, logits, dtype.name, axes, compute_dtype, result_dtype,
        library.tracing(logits),
    )  # fmt: skip
    answer = run(request, _portable_entropy)
    if type(answer) is tuple:
        return tuple(map(library.scalar_if_0d, answer))
    return library.scalar_if_0d(answer)


def _divergence(
    operation: str,
    logits_p: Any,
    logits_q: Any,
    axis: Any,
    temperature: Any,
    distillation: Any,
    reduction: Any,
) -> Any:
    """Check the arguments of the divergence and answer, with the gradients or without."""
    library, dtype = _checks.array("logits_p", logits_p)
    _checks.companion("logits_q", logits_q, "logits_p", logits_p, library)
    _, other = _checks.array("logits_q", logits_q)
    _checks.like_shape("logits_q", logits_q, "logits_p", logits_p)
    at = _checks.one_axis(axis, logits_p.ndim)
    compute_dtype, result_dtype = dtype.computed or library.compute_dtype(logits_p)
    compute_dtype, answer, more = loss_dtype(library, logits_p, None, compute_dtype, result_dtype)
    of_q, _ = other.computed or library.compute_dtype(logits_q)
    if library.xp.finfo(of_q).bits > library.xp.finfo(compute_dtype).bits:
        compute_dtype = of_q
    options = DivergenceOptions(
        temperature=_checks.temperature(temperature),
        distillation=bool(distillation),
        reduction=_checks.reduction(reduction),
        dtype=answer,
    )
    given = (*active(options, PLAIN_DIVERGENCE), *more)
    if is_extreme(library, options.temperature, compute_dtype):
        given = (*given, EXTREME)
    request = Request(
        operation, library, logits_p, dtype.name, (at,), compute_dtype, result_dtype,
        library.tracing(logits_p, logits_q), options, given, logits_q,
    )  # fmt: skip
    answer = run(request, _portable_divergence)
    if type(answer) is tuple:
        return library.scalar_if_0d(answer[0]), *answer[1:]
    return library.scalar_if_0d(answer)


# --------------------------------------------------------------------------- the portable path


def _portable_entropy(request: Request) -> Any:
    """Return the entropy, and the gradient if it is asked for."""
    library, axes = request.library, request.axes
    answer = of_rows(request, getattr(portable, request.operation), request.x)
    parts = answer if type(answer) is tuple else (answer,)
    h, *grad = (library.cast(part, request.result_dtype) for part in parts)
    h = library.squeeze(h, axes) if axes else h
    return (h, *grad) if grad else h


def _portable_divergence(request: Request) -> Any:
    """Return the reduced divergence, and the gradients if they are asked for."""
    library, compute_dtype, p, q = request.library, request.compute_dtype, request.x, request.dy
    answer = library.compiled(getattr(portable, request.operation))(
        library.xp,
        library.cast(p, compute_dtype),
        library.cast(q, compute_dtype),
        request.axis,
        request.options,
    )
    if type(answer) is not tuple:
        return library.cast(answer, request.answer_dtype)
    dtypes = request.answer_dtype, request.result_dtype, library.compute_dtype(q)[1]
    return tuple(map(library.cast, answer, dtypes))
