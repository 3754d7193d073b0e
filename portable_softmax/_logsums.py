"""Logarithms of means and of running sums: what a call means, its checks, the answer."""

from __future__ import annotations

from typing import Any

from portable_softmax import _checks, portable
from portable_softmax._softmax import dropped, of_rows
from portable_softmax._typing import ArrayT, Axis, Mask
from portable_softmax.kernels._decide import operation, run
from portable_softmax.kernels._request import (
    NONE_GIVEN,
    PLAIN_ROWS,
    Request,
    RowOptions,
    active,
)

__all__ = ["logcumsumexp", "logcumsumexp_vjp", "logmeanexp"]


@operation
def logmeanexp(
    x: ArrayT, /, *, axis: Axis = None, keepdims: bool = False, where: Mask | None = None
) -> ArrayT:
    r"""Return the logarithm of a mean of exponentials.

    Let `x` hold n exponents; over the reduced axes ::

        logmeanexp = log((1/n) sum_j exp(x_j)) = logsumexp(x) - log n

    without the cancellation of the latter where the exponents are close to each other: there it is
    max + log1p((1/n) sum_j expm1(x_j - max)), whose terms have one sign. Its gradient is that of
    logsumexp, for an upstream gradient dy ::

        dx_j = dy * exp(x_j) / sum_k exp(x_k)

    Parameters
    ----------
    x
        Array of any shape, floating or integer.
    axis
        An int, a tuple of ints, or None for all axes (the default).
    keepdims
        Whether the reduced axes stay, with length 1.
    where
        Boolean array that broadcasts to the shape of `x`. Entries where it is False take no part,
        nor do they count in n.

    Returns
    -------
    array
        Of the library, device and floating dtype of `x`, never above the maximum. Half types are
        computed in float32 and rounded once.

    Raises
    ------
    TypeError
        If `x` is no array, or is bool, complex or of another dtype; if `where` is not boolean or
        of another library.
    ValueError
        If `axis` is out of range, or `where` does not broadcast or lives on another device.

    Notes
    -----
    The mean of nothing, an empty axis or a row masked out as a whole, is nan. A row of -inf only is
    -inf, one that holds +inf is +inf, and one that holds nan is nan. Where max and the logarithm of
    the mean nearly cancel, the error is bounded by that of either.

    See Also
    --------
    logsumexp : the sum.
    softmax : what dy is multiplied by in the gradient, with the same `axis` and `where`.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import logmeanexp
    >>> print(logmeanexp(np.asarray([1000.0, 1000.0])))
    1000.0
    >>> print(f"{logmeanexp(np.asarray([0.0, -2e-20])):.1e}")
    -1.0e-20
    """
    library, dtype = _checks.array("x", x)
    axes = _checks.axes(axis, x.ndim)
    compute_dtype, result_dtype = dtype.computed or library.compute_dtype(x)
    options, given, tracing = PLAIN_ROWS, NONE_GIVEN, library.tracing(x)
    if where is not None:
        _checks.mask(where, "x", x, library)
        tracing = tracing or library.tracing(where)
        options = RowOptions(where)
        given = active(options, PLAIN_ROWS)
    request = Request(
        "logmeanexp", library, x, dtype.name, axes, compute_dtype, result_dtype,
        tracing, options, given,
    )  # fmt: skip
    y: ArrayT = dropped(library, run(request, _portable_logmeanexp), axes, keepdims)
    return y


@operation
def logcumsumexp(x: ArrayT, /, *, axis: int = -1) -> ArrayT:
    r"""Return the logarithms of the running sums of exponentials.

    Let `x` hold the exponents; along `axis` ::

        y_i = log sum_{j <= i} exp(x_j)

    and with an upstream gradient dy ::

        dx_j = sum_{i >= j} dy_i exp(x_j - y_i)

    Parameters
    ----------
    x
        Array of any shape, floating or integer.
    axis
        The axis along which the sums run, an int.

    Returns
    -------
    array
        Of the shape, library, device and floating dtype of `x`. Half types are computed in float32
        and rounded once.

    Raises
    ------
    TypeError
        If `x` is no array, or is bool, complex or of another dtype; if `axis` is no int.
    ValueError
        If `axis` is out of range, or its length is not known (Dask).

    Notes
    -----
    The states (max, rest) of all beginnings are merged in log2(n) rounds, so that the error does
    not grow with n as that of a running sum (Hillis & Steele 1986, "Data parallel algorithms").
    A kernel runs along the axis in float64 and keeps what each addition loses.
    What follows +inf is +inf, and what follows nan is nan; a beginning of -inf only is -inf.

    See Also
    --------
    logsumexp : the last of these sums.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import logcumsumexp
    >>> logcumsumexp(np.asarray([0.0, 0.0, 1000.0])).round(4)
    array([0.000e+00, 6.931e-01, 1.000e+03])
    """
    return _running("logcumsumexp", x, None, axis, _checks.array("x", x))


@operation
def logcumsumexp_vjp(x: ArrayT, dy: ArrayT, /, *, axis: int = -1) -> ArrayT:
    r"""Return the gradient through a logcumsumexp.

    Let y = logcumsumexp(x) and dy be the gradient of a loss with respect to y; the gradient with
    respect to x is ::

        dx_j = sum_{i >= j} dy_i exp(x_j - y_i)

    Parameters
    ----------
    x
        What `logcumsumexp` was taken of, floating.
    dy
        Upstream gradient, an array of the shape, library and device of `x`.
    axis
        The axis along which the sums run, an int.

    Returns
    -------
    array
        Of the shape, library, device and dtype of `x`.

    Raises
    ------
    TypeError
        If an argument is no floating array, or they belong to different libraries.
    ValueError
        If the shapes or devices differ, `axis` is out of range, or its length is not known (Dask).

    Notes
    -----
    An entry of -inf gets the gradient 0. The sums are made as those of `logcumsumexp`: no error
    grows with n.

    See Also
    --------
    softmax_vjp : the same for `softmax`.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import logcumsumexp_vjp
    >>> logcumsumexp_vjp(np.asarray([0.0, 0.0, 0.0]), np.asarray([0.0, 1.0, 0.0]))
    array([0.5, 0.5, 0. ])
    """
    return _running("logcumsumexp_vjp", x, dy, axis, _checks.with_upstream("x", x, dy))


def _running(operation: str, x: ArrayT, dy: Any, axis: Any, known: Any) -> ArrayT:
    """Check the axis of a running sum and answer; `known` is what the check of `x` returned."""
    library, dtype = known
    axes = (_checks.one_axis(axis, x.ndim),)
    _checks.known_length("x", x, axes[0])
    compute_dtype, result_dtype = dtype.computed or library.compute_dtype(x)
    request = Request(
        operation, library, x, dtype.name, axes, compute_dtype, result_dtype,
        library.tracing(x, *(() if dy is None else (dy,))), dy=dy,
    )  # fmt: skip
    y: ArrayT = run(request, _portable_running)
    return y


# --------------------------------------------------------------------------- the portable path


def _portable_logmeanexp(request: Request) -> Any:
    """Return the logarithm of the mean, the reduced axes kept with length 1."""
    y = of_rows(request, portable.logmeanexp, request.x, where=request.options.where)
    return request.library.cast(y, request.result_dtype)


def _portable_running(request: Request) -> Any:
    """Return the logarithms of the running sums, or the gradient through them."""
    library = request.library
    given = [
        library.cast(a, request.compute_dtype) for a in (request.x, request.dy) if a is not None
    ]
    function = library.compiled(getattr(portable, request.operation))
    return library.cast(function(library.xp, *given, request.axis), request.result_dtype)
