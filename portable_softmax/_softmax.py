"""The softmax family: what a call means, its checks, then a kernel or the portable mathematics."""

from __future__ import annotations

from typing import Any

from portable_softmax import _arrays, _checks, portable
from portable_softmax._typing import Array, ArrayT, Axis, Namespace
from portable_softmax.kernels._calls import RowsCall, VjpCall
from portable_softmax.kernels._table import find, shortcut

__all__ = [
    "log_softmax",
    "log_softmax_vjp",
    "logsumexp",
    "softmax",
    "softmax_jacobian",
    "softmax_vjp",
]


def softmax(
    x: ArrayT, /, *, axis: Axis = -1, where: Array | None = None, temperature: float = 1.0
) -> ArrayT:
    r"""Turn logits into probabilities that are positive and sum to one.

    Let `x` hold the logits and T be the temperature; over the reduced axes ::

        y_j = exp(x_j / T) / sum_k exp(x_k / T)

    and the gradient of a loss through it, for an upstream gradient dy, is ::

        dx = y * (dy - sum(y * dy)) / T

    Parameters
    ----------
    x
        Array of any shape, floating or integer.
    axis
        An int, a tuple of ints, or None for all axes: what the probabilities sum to one over.
    where
        Boolean array that broadcasts to the shape of `x`. Entries where it is False take no part:
        their probability and their gradient are 0.
    temperature
        T, a positive number. Large values flatten the distribution, small ones sharpen it.

    Returns
    -------
    array
        Of the shape, library and device of `x`, and of its dtype if that is floating, else of the
        library's default floating dtype. Half types are computed in float32 and rounded once.

    Raises
    ------
    TypeError
        If `x` is no array, or is bool, complex or of another dtype; if `where` is not boolean or
        of another library; if `temperature` is no Python number.
    ValueError
        If `axis` is out of range, `where` does not broadcast or lives on another device, or
        `temperature` is not positive and finite.

    Notes
    -----
    The maximum is subtracted first, which cancels and keeps exp from overflowing. A row of -inf
    only, or one that holds +inf or nan, is nan; no other row is touched. A row that `where` masks
    out as a whole is 0.

    See Also
    --------
    log_softmax : its logarithm, which keeps digits where the probability underflows.
    softmax_vjp : the gradient through it, for libraries that do not differentiate.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import softmax
    >>> softmax(np.asarray([1.0, 2.0, 3.0, 4.0])).round(8)
    array([0.0320586 , 0.08714432, 0.23688282, 0.64391426])
    >>> softmax(np.asarray([1.0, 2.0, 9.0]), where=np.asarray([True, True, False])).round(4)
    array([0.2689, 0.7311, 0.    ])
    """
    if where is None and (quick := shortcut(x, "softmax")):
        y: ArrayT | None = quick(x, axis, temperature)
        if y is not None:
            return y
    return _rowwise("softmax", x, axis, where, temperature)


def log_softmax(
    x: ArrayT, /, *, axis: Axis = -1, where: Array | None = None, temperature: float = 1.0
) -> ArrayT:
    r"""Return the logarithms of the softmax probabilities, to the last digits.

    Let `x` hold the logits and T be the temperature; over the reduced axes ::

        y_j = x_j / T - log sum_k exp(x_k / T) = (x_j - max) / T - log1p(rest)

    where rest is the sum of exp((x_k - max) / T) without one maximum, so that the entry of a
    confident row keeps its digits. With an upstream gradient dy ::

        dx = (dy - exp(y) * sum(dy)) / T

    Parameters
    ----------
    x
        Array of any shape, floating or integer.
    axis
        An int, a tuple of ints, or None for all axes.
    where
        Boolean array that broadcasts to the shape of `x`. Entries where it is False take no part:
        they are -inf, and their gradient is 0.
    temperature
        T, a positive number.

    Returns
    -------
    array
        Of the shape, library and device of `x`, and of its dtype if that is floating, else of the
        library's default floating dtype.

    Raises
    ------
    TypeError, ValueError
        As `softmax`.

    Notes
    -----
    A row of -inf only, or one that holds +inf or nan, is nan. A row that `where` masks out as a
    whole is -inf. The rounding error of x - max is put back to first order (two-sum, Knuth 1969);
    the log1p form is that of SciPy pull request 21597 (2024).

    See Also
    --------
    softmax : the probabilities themselves.
    logsumexp : the normaliser alone.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import log_softmax
    >>> print(f"{log_softmax(np.asarray([30.0, 0.0, 0.0]))[0]:.12e}")
    -1.871524593768e-13
    """
    if where is None and (quick := shortcut(x, "log_softmax")):
        y: ArrayT | None = quick(x, axis, temperature)
        if y is not None:
            return y
    return _rowwise("log_softmax", x, axis, where, temperature)


def logsumexp(
    x: ArrayT,
    /,
    *,
    axis: Axis = None,
    b: Array | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: Array | None = None,
) -> Any:
    r"""Return the logarithm of a sum of exponentials.

    Let `x` hold the exponents and `b` optional weights; over the reduced axes ::

        s = sum_j b_j exp(x_j)          logsumexp = log s

    computed as max + log1p(rest). Its gradient is the softmax: for an upstream gradient dy ::

        dx_j = dy * b_j exp(x_j) / s          db_j = dy * exp(x_j) / s

    Parameters
    ----------
    x
        Array of any shape, floating, complex or integer.
    axis
        An int, a tuple of ints, or None for all axes (the default, as SciPy's).
    b
        Weights, an array that broadcasts to the shape of `x`, negative and zero entries allowed.
        What stands in `x` at a weight of zero does not count, infinities and nan included.
    keepdims
        Whether the reduced axes stay, with length 1.
    return_sign
        Whether to return the pair (log|s|, s/|s|) instead of log s. Real input then never gives
        nan for a negative sum.
    where
        Boolean array that broadcasts to the shape of `x`. Entries where it is False take no part.

    Returns
    -------
    array, or a pair of arrays
        Of the library, device and floating dtype of `x`.

    Raises
    ------
    TypeError
        If `x` or `b` is no array, or of a dtype that has no exponential, or they belong to
        different libraries.
    ValueError
        If `axis` is out of range, or `b` or `where` does not broadcast to the shape of `x`.

    Notes
    -----
    An empty sum, a row of -inf only and a row masked out as a whole are -inf (sign 0). A row that
    holds +inf is +inf; one that holds nan is nan. A negative sum is nan without `return_sign`. For
    complex input the imaginary part of the result is in (-pi, pi].

    See Also
    --------
    log_softmax : x - logsumexp(x), without the cancellation.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import logsumexp
    >>> print(logsumexp(np.asarray([1000.0, 1000.0])))
    1000.6931471805599
    >>> value, sign = logsumexp(
    ...     np.asarray([1.0, 2.0]), b=np.asarray([1.0, -1.0]), return_sign=True
    ... )
    >>> print(round(float(value), 6), sign)
    1.541325 -1.0
    """
    if b is None and where is None and not return_sign and (quick := shortcut(x, "logsumexp")):
        found: ArrayT | None = quick(x, axis, keepdims)
        if found is not None:
            return found
    xp = _checks.array("x", x, complex_too=True)
    axes = _checks.axes(axis, x.ndim)
    if b is not None:
        _checks.companion("b", b, "x", x, xp)
        _checks.weights("b", b, xp)
        _checks.broadcastable("b", b, x.shape, "x")
    if where is not None:
        _checks.mask(where, "x", x, xp)
    compute, answer = _arrays.compute_dtype(xp, x)
    kind = _arrays.kind(xp, compute)
    if b is not None and _arrays.kind(xp, b.dtype) == "complex":
        kind = "complex"
        compute = answer = _arrays.complex_dtype(xp, compute)
    with _arrays.quiet(xp):
        value, sign = _logsumexp(xp, x, axes, b, where, return_sign, kind, compute, answer)
    if not keepdims and axes:
        value = xp.squeeze(value, axis=axes)
        sign = None if sign is None else xp.squeeze(sign, axis=axes)
    value = _arrays.scalar_if_0d(xp, value)
    return (value, _arrays.scalar_if_0d(xp, sign)) if return_sign else value


def _logsumexp(
    xp: Namespace,
    x: Any,
    axes: tuple[int, ...],
    b: Any,
    where: Any,
    return_sign: bool,
    kind: str,
    compute: Any,
    answer: Any,
) -> tuple[Any, Any]:
    if b is None and not return_sign and kind == "real" and _reduces(x, axes):
        call = RowsCall("logsumexp", xp, x, axes, where, 1.0, compute, answer)
        if kernel := find(call):
            return kernel(call), None
    x, b, where, axes, added = _with_an_axis(xp, x, b, where, axes)
    x = _arrays.cast(xp, x, compute)
    if b is not None:
        b = _arrays.cast(xp, b, compute)
    value, sign = portable.logsumexp(xp, x, axes, b=b, where=where, return_sign=return_sign)
    if kind == "real":
        value = _arrays.cast(xp, value, answer)
        sign = None if sign is None else _arrays.cast(xp, sign, answer)
    if added:
        value = xp.squeeze(value, axis=-1)
        sign = None if sign is None else xp.squeeze(sign, axis=-1)
    return value, sign


def softmax_vjp(y: ArrayT, dy: ArrayT, /, *, axis: Axis = -1) -> ArrayT:
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

    Returns
    -------
    array
        Of the shape, library, device and dtype of `y`.

    Raises
    ------
    TypeError
        If an argument is no floating array, or they belong to different libraries.
    ValueError
        If the shapes or devices differ, or `axis` is out of range.

    Notes
    -----
    Masked entries and rows have y = 0 and so get the gradient 0. For a softmax with a temperature
    divide the result by it.

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
    return _vjp("softmax_vjp", "y", y, dy, axis)


def log_softmax_vjp(log_y: ArrayT, dy: ArrayT, /, *, axis: Axis = -1) -> ArrayT:
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

    Returns
    -------
    array
        Of the shape, library, device and dtype of `log_y`.

    Raises
    ------
    TypeError, ValueError
        As `softmax_vjp`.

    Notes
    -----
    An entry at -inf was masked out: it gets the gradient 0, and what stands in `dy` there does not
    count. For a log_softmax with a temperature divide the result by it.

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
    return _vjp("log_softmax_vjp", "log_y", log_y, dy, axis)


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
    xp = _checks.array("y", y)
    _checks.floating("y", y, xp)
    at = _checks.one_axis(axis, y.ndim)
    _checks.known_length("y", y, at)
    compute, answer = _arrays.compute_dtype(xp, y)
    with _arrays.quiet(xp):
        jacobian = portable.softmax_jacobian(xp, _arrays.cast(xp, y, compute), at)
        answered: ArrayT = _arrays.cast(xp, jacobian, answer)
    return answered


# --------------------------------------------------------------------------- shared steps


def _rowwise(operation: str, x: ArrayT, axis: Axis, where: Any, temperature: Any) -> ArrayT:
    """Check the arguments of softmax or log_softmax, then take its kernel or portable form."""
    xp = _checks.array("x", x)
    axes = _checks.axes(axis, x.ndim)
    if where is not None:
        _checks.mask(where, "x", x, xp)
    if type(temperature) is not float or temperature != 1.0:
        temperature = _checks.temperature(temperature)
    compute, answer = _arrays.compute_dtype(xp, x)
    call = RowsCall(operation, xp, x, axes, where, temperature, compute, answer)
    kernel = find(call) if _reduces(x, axes) else None
    y: ArrayT
    with _arrays.quiet(xp):
        if kernel is not None:
            y = kernel(call)
            return y
        at_least_1d, _, where, axes, added = _with_an_axis(xp, x, None, where, axes)
        y = getattr(portable, operation)(
            xp,
            _arrays.cast(xp, at_least_1d, compute),
            axes,
            where=where,
            temperature=temperature,
        )
        if added:
            y = _arrays.scalar_if_0d(xp, xp.squeeze(y, axis=-1))
        y = _arrays.cast(xp, y, answer)
    return y


def _reduces(x: Any, axes: tuple[int, ...]) -> bool:
    """Return whether there is anything to reduce, so that a kernel may be asked."""
    return bool(axes) and all(x.shape[a] != 0 for a in axes)


def _with_an_axis(
    xp: Namespace, x: Any, b: Any, where: Any, axes: tuple[int, ...]
) -> tuple[Any, Any, Any, tuple[int, ...], bool]:
    """Turn a reduction over no axis, such as that of a 0-d array, into one over a single entry."""
    if axes:
        return x, b, where, axes, False
    b = None if b is None else xp.expand_dims(b, axis=-1)
    where = None if where is None else xp.expand_dims(where, axis=-1)
    return xp.expand_dims(x, axis=-1), b, where, (x.ndim,), True


def _vjp(operation: str, name: str, y: ArrayT, dy: Array, axis: Axis) -> ArrayT:
    """Check the arguments of a vector-Jacobian product, then take its kernel or portable form."""
    xp = _checks.array(name, y)
    _checks.floating(name, y, xp)
    _checks.companion("dy", dy, name, y, xp)
    _checks.floating("dy", dy, xp)
    _checks.like_shape("dy", dy, name, y)
    axes = _checks.axes(axis, y.ndim)
    compute, answer = _arrays.compute_dtype(xp, y)
    call = VjpCall(operation, xp, y, dy, axes, compute, answer)
    kernel = find(call) if axes else None
    dx: ArrayT
    with _arrays.quiet(xp):
        if kernel is not None:
            dx = kernel(call)
            return dx
        out, upstream, _, axes, added = _with_an_axis(xp, y, dy, None, axes)
        dx = getattr(portable, operation)(
            xp, _arrays.cast(xp, out, compute), _arrays.cast(xp, upstream, compute), axes
        )
        if added:
            dx = _arrays.scalar_if_0d(xp, xp.squeeze(dx, axis=-1))
        dx = _arrays.cast(xp, dx, answer)
    return dx
