"""entmax and sparsemax: what a call means, its checks, then the portable mathematics."""

from __future__ import annotations

from typing import Any

from portable_softmax import _checks, portable
from portable_softmax._softmax import of_rows
from portable_softmax._typing import Array, ArrayT, Axis
from portable_softmax.kernels._decide import operation, run
from portable_softmax.kernels._request import PLAIN_ENTMAX, EntmaxOptions, Request, active

__all__ = ["entmax", "entmax_vjp", "sparsemax"]


@operation
def entmax(x: ArrayT, /, *, alpha: float | Array = 1.5, axis: Axis = -1) -> ArrayT:
    r"""Turn logits into probabilities of which many are exactly 0.

    Let `x` hold the logits and c = alpha - 1; over the reduced axes ::

        y_j = max(0, 1 + c * (x_j - max - s))^(1/c)          s such that sum_j y_j = 1

    that is the maximiser of sum(p * x) + H(p) over all probabilities p, with the Tsallis entropy
    H(p) = (1 - sum(p^alpha)) / (alpha * c). With an upstream gradient dy and g = y^(2 - alpha)
    where y is not 0, and 0 elsewhere ::

        dx = g * (dy - sum(g * dy) / sum(g))

    and with h = (g - y) / c^2 + y * log(y) / c, which is y * log(y)^2 / 2 at c = 0 ::

        dalpha = sum(dy * (g * sum(h) / sum(g) - h))

    Parameters
    ----------
    x
        Array of any shape, floating or integer.
    alpha
        A number from 1 to inf. 1 is softmax, which has no zeros; 2 is sparsemax, the nearest
        probabilities to `x`; inf is the argmax, that ties share, and whose gradient is 0. Or a 0-d
        floating array in [1, 2] of the library of `x`, such as a parameter that is trained.
    axis
        An int, a tuple of ints, or None for all axes: what the probabilities sum to one over.

    Returns
    -------
    array
        Of the shape, library and device of `x`, and of its dtype if that is floating, else of the
        library's default floating dtype. Half types are computed in float32 and rounded once.

    Raises
    ------
    TypeError
        If `x` is no array, or is bool, complex or of another dtype; if `alpha` is neither a number
        nor a floating array.
    ValueError
        If `axis` is out of range, `alpha` is below 1, or an array and not 0-d or above 2. An array
        whose value cannot be read, as it is traced, gives nan outside [1, 2].

    Notes
    -----
    The maximum is subtracted first, and s is found by Newton's method on the norm whose power the
    sum is: it is convex in s and nearly straight, so that a dozen steps are enough for any row, and
    nothing is sorted. Beyond alpha = 2 the power is steep at 0, and the least probability that is
    not 0 is found instead. Entries further than 1/c below the maximum are always 0. Dask gathers
    whole rows into a chunk.

    A row of -inf only, or one that holds +inf or nan, is nan; no other row is touched.

    entmax: Peters, Niculae & Martins 2019, "Sparse sequence-to-sequence models". sparsemax: Martins
    & Astudillo 2016, "From softmax to sparsemax". The derivative by alpha: Correia, Niculae &
    Martins 2019, "Adaptively sparse transformers". Newton's method for it is Condat's 2016, "Fast
    projection onto the simplex and the l1 ball".

    See Also
    --------
    softmax : alpha = 1.
    sparsemax : alpha = 2.
    entmax_vjp : the gradient through it, for libraries that do not differentiate.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import entmax
    >>> entmax(np.asarray([1.0, 0.5, -1.0])).round(6)
    array([0.673993, 0.326007, 0.      ])
    """
    y: ArrayT = _answer("entmax", x, axis, alpha)
    return y


@operation
def sparsemax(x: ArrayT, /, *, axis: Axis = -1) -> ArrayT:
    r"""Return the probabilities that are nearest to the logits.

    Let `x` hold the logits; over the reduced axes ::

        y_j = max(0, x_j - tau)          tau such that sum_j y_j = 1

    that is entmax with alpha = 2, the Euclidean projection of `x` to the simplex. With an upstream
    gradient dy ::

        dx_j = dy_j - (the mean of dy where y is not 0), and 0 where y_j is 0

    Parameters
    ----------
    x
        Array of any shape, floating or integer.
    axis
        An int, a tuple of ints, or None for all axes.

    Returns
    -------
    array
        As `entmax` returns it.

    Raises
    ------
    TypeError, ValueError
        As `entmax`.

    See Also
    --------
    entmax : which lies between this and softmax.
    entmax_vjp : the gradient through it, with ``alpha=2``.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import sparsemax
    >>> sparsemax(np.asarray([1.0, 0.5, -1.0]))
    array([0.75, 0.25, 0.  ])
    """
    y: ArrayT = _answer("sparsemax", x, axis, 2.0)
    return y


@operation
def entmax_vjp(y: ArrayT, dy: ArrayT, /, *, alpha: float = 1.5, axis: Axis = -1) -> ArrayT:
    r"""Return the gradient through an entmax, from its output.

    Let y = entmax(x) and dy be the gradient of a loss with respect to y; with g = y^(2 - alpha)
    where y is not 0, and 0 elsewhere, the gradient with respect to x is ::

        dx = g * (dy - sum(g * dy) / sum(g))

    Parameters
    ----------
    y
        What `entmax` or `sparsemax` returned, floating.
    dy
        Upstream gradient, an array of the shape, library and device of `y`.
    alpha
        That of the entmax, a number; 2 for sparsemax.
    axis
        The axis or axes that the entmax was taken over.

    Returns
    -------
    array
        Of the shape, library, device and dtype of `y`.

    Raises
    ------
    TypeError
        If an argument is no floating array, or they belong to different libraries.
    ValueError
        If the shapes or devices differ, `axis` is out of range, or `alpha` is below 1.

    Notes
    -----
    An entry with y = 0 gets the gradient 0, and what stands in `dy` there does not count. For an
    `alpha` of inf the gradient is 0. Beyond 2 small probabilities have large slopes; one that is
    beyond the dtype's range counts as the largest number.

    See Also
    --------
    softmax_vjp : alpha = 1.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import entmax_vjp, sparsemax
    >>> y = sparsemax(np.asarray([1.0, 0.5, -1.0]))
    >>> entmax_vjp(y, np.asarray([1.0, 0.0, 5.0]), alpha=2)
    array([ 0.5, -0.5,  0. ])
    """
    alpha = _checks.alpha(alpha)
    library, dtype = _checks.with_upstream("y", y, dy)
    axes = _checks.axes(axis, y.ndim)
    compute_dtype, result_dtype = dtype.computed or library.compute_dtype(y)
    options = EntmaxOptions(alpha)
    request = Request(
        "entmax_vjp", library, y, dtype.name, axes, compute_dtype, result_dtype,
        library.tracing(y, dy), options, active(options, PLAIN_ENTMAX), dy,
    )  # fmt: skip
    dx: ArrayT = run(request, _portable)
    return dx


def _answer(operation: str, x: Any, axis: Any, alpha: Any) -> Any:
    """Check the arguments of entmax or sparsemax and answer."""
    library, dtype = _checks.array("x", x)
    axes = _checks.axes(axis, x.ndim)
    if library.chunked:
        for a in axes:
            _checks.known_length("x", x, a)
    alpha = _checks.alpha(alpha, x, library)
    compute_dtype, result_dtype = dtype.computed or library.compute_dtype(x)
    tracing = library.tracing(x) if isinstance(alpha, float) else library.tracing(x, alpha)
    options = EntmaxOptions(alpha)
    request = Request(
        operation, library, x, dtype.name, axes, compute_dtype, result_dtype, tracing, options,
        active(options, PLAIN_ENTMAX),
    )  # fmt: skip
    return run(request, _portable)


def _portable(request: Request) -> Any:
    """Return entmax, sparsemax or the gradient through one."""
    library, x, dy, alpha = request.library, request.x, request.dy, request.options.alpha
    if dy is not None:
        y = of_rows(request, portable.entmax_vjp, x, dy, alpha=alpha)
    else:
        if not isinstance(alpha, float):
            alpha = library.cast(alpha, request.compute_dtype)
        followed = library.follows(x, alpha)
        y = of_rows(request, portable.entmax, x, alpha=alpha, followed=followed)
    return library.cast(y, request.result_dtype)
