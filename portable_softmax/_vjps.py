"""The vector-Jacobian products of softmax and log_softmax, and the Jacobian itself."""

from __future__ import annotations

from typing import Any

from portable_softmax import _checks, portable
from portable_softmax._softmax import of_rows
from portable_softmax._typing import Array, ArrayT, Axis
from portable_softmax.kernels._decide import operation, run
from portable_softmax.kernels._request import NONE_GIVEN, PLAIN_ROWS, Request

__all__ = ["log_softmax_vjp", "softmax_jacobian", "softmax_vjp"]


@operation
def softmax_vjp(y: ArrayT, dy: ArrayT, /, *, axis: Axis = -1, out: ArrayT | None = None) -> ArrayT:
    r"""Return the gradient through a softmax, from its output.

    Let y = softmax(x) and dy be the gradient of a loss with respect to y; the gradient with
    respect to x is ::

        dx = y * (dy - sum(y * dy))

    which is ``dy @ J`` with the Jacobian ``J = diag(y) - y y^T``, without forming it. It is linear
    in dy, and its own gradient with respect to y is ``ddx * (dy - sum(y*dy)) - dy * sum(y*ddx)``.

    Parameters
    ----------
    y
        What `softmax` returned, floating.
    dy
        Upstream gradient, an array of the shape, library and device of `y`.
    axis
        The axis or axes that the softmax was taken over.
    out
        Where the result is written, as in `softmax`; `y` or `dy` itself for one in place.

    Returns
    -------
    array
        `out` if that is given. Of the shape, library, device and dtype of `y`.

    Raises
    ------
    TypeError
        If an argument is no floating array, or they belong to different libraries; for `out` as
        in `softmax`.
    ValueError
        If the shapes or devices differ, or `axis` is out of range; for `out` as in `softmax`.

    Notes
    -----
    Masked entries and rows have y = 0 and so get the gradient 0. For a softmax with a temperature
    divide the result by it.

    Where y rounds to 1 it has not kept 1 - y, which is the sum of the others. A row with an entry c
    above 3/4 that sums to 1, but for rounding, is taken for one that does: as a constant of dy then
    changes nothing, its digits are kept by ::

        dx = y * ((dy - dy_c) - sum(y * (dy - dy_c)))

    So a sink that has less than the rounding of y is taken for none. The gradient with respect to y
    is that of the first formula.

    See Also
    --------
    softmax_jacobian : the matrix itself.
    log_softmax_vjp : the same for `log_softmax`.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import softmax, softmax_vjp
    >>> y = softmax(np.asarray([0.0, 0.0]))
    >>> softmax_vjp(y, np.asarray([1.0, 0.0]))
    array([ 0.25, -0.25])
    """
    return _vjp("softmax_vjp", "y", y, dy, axis, out)


@operation
def log_softmax_vjp(
    log_y: ArrayT, dy: ArrayT, /, *, axis: Axis = -1, out: ArrayT | None = None
) -> ArrayT:
    r"""Return the gradient through a log_softmax, from its output.

    Let log_y = log_softmax(x) and dy be the gradient of a loss with respect to it; the gradient
    with respect to x is ::

        dx = dy - exp(log_y) * sum(dy)

    Parameters
    ----------
    log_y
        What `log_softmax` returned, floating.
    dy
        Upstream gradient, an array of the shape, library and device of `log_y`.
    axis
        The axis or axes that the log_softmax was taken over.
    out
        Where the result is written, as in `softmax`; `log_y` or `dy` itself for one in place.

    Returns
    -------
    array
        `out` if that is given. Of the shape, library, device and dtype of `log_y`.

    Raises
    ------
    TypeError, ValueError
        As `softmax_vjp`.

    Notes
    -----
    An entry at -inf was masked out: it gets the gradient 0, and what stands in `dy` there does not
    count. For a log_softmax with a temperature divide the result by it. A confident row keeps its
    digits: 1 - y is -expm1(log_y).

    See Also
    --------
    softmax_vjp : the same for `softmax`.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import log_softmax, log_softmax_vjp
    >>> log_y = log_softmax(np.asarray([0.0, 0.0]))
    >>> log_softmax_vjp(log_y, np.asarray([1.0, 0.0]))
    array([ 0.5, -0.5])
    """
    return _vjp("log_softmax_vjp", "log_y", log_y, dy, axis, out)


@operation
def softmax_jacobian(y: ArrayT, /, *, axis: int = -1) -> ArrayT:
    r"""Return the Jacobian of a softmax, from its output.

    Let y = softmax(x); the Jacobian has the entries ::

        J_ij = dy_i / dx_j = y_i (delta_ij - y_j)          J = diag(y) - y y^T

    It is symmetric and its rows sum to zero. `softmax_vjp` multiplies with it without forming it.

    Parameters
    ----------
    y
        What `softmax` returned, floating, with C entries along `axis`.
    axis
        The axis that the softmax was taken over, an int.

    Returns
    -------
    array
        Of the library, device and dtype of `y`: its batch axes in their order, then two of
        length C.

    Raises
    ------
    TypeError
        If `y` is no floating array or `axis` no int.
    ValueError
        If `axis` is out of range.

    Notes
    -----
    On the diagonal 1 - y_i is summed from the other probabilities, which keeps the digits of a
    confident row.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import softmax, softmax_jacobian
    >>> softmax_jacobian(softmax(np.asarray([0.0, 0.0])))
    array([[ 0.25, -0.25],
           [-0.25,  0.25]])
    """
    library, dtype = _checks.array("y", y)
    _checks.floating("y", y, library)
    axes = (_checks.one_axis(axis, y.ndim),)
    _checks.known_length("y", y, axes[0])
    compute_dtype, result_dtype = dtype.computed or library.compute_dtype(y)
    request = Request(
        "softmax_jacobian", library, y, dtype.name, axes, compute_dtype, result_dtype,
        library.tracing(y),
    )  # fmt: skip
    jacobian: ArrayT = run(request, _portable_jacobian)
    return jacobian


def _vjp(operation: str, name: str, y: ArrayT, dy: Array, axis: Axis, out: Any) -> ArrayT:
    """Check the arguments of a vector-Jacobian product and answer."""
    library, dtype = _checks.with_upstream(name, y, dy)
    axes = _checks.axes(axis, y.ndim)
    compute_dtype, result_dtype = dtype.computed or library.compute_dtype(y)
    if out is not None:
        _checks.output("out", out, name, y, result_dtype, library, dy)
    request = Request(
        operation, library, y, dtype.name, axes, compute_dtype, result_dtype,
        library.tracing(y, dy), PLAIN_ROWS, NONE_GIVEN, dy, None, True, True, out,
    )  # fmt: skip
    dx: ArrayT = run(request, _portable_vjp)
    return dx


def _portable_vjp(request: Request) -> Any:
    """softmax_vjp or log_softmax_vjp."""
    given = {"rounding": request.rounding} if request.operation == "softmax_vjp" else {}
    dx = of_rows(request, getattr(portable, request.operation), request.x, request.dy, **given)
    return request.library.cast(dx, request.result_dtype)


def _portable_jacobian(request: Request) -> Any:
    """softmax_jacobian."""
    library = request.library
    y = library.cast(request.x, request.compute_dtype)
    jacobian = library.compiled(portable.softmax_jacobian)(library.xp, y, request.axes[0])
    return library.cast(jacobian, request.result_dtype)
