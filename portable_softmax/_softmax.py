"""The softmax family: what a call means, its checks, then a kernel or the portable formulas."""

from __future__ import annotations

from typing import Any, Literal, overload

from portable_softmax import _checks, portable
from portable_softmax._typing import Array, ArrayT, Axis, Mask, Namespace
from portable_softmax.kernels._decide import operation, run
from portable_softmax.kernels._request import (
    COMPLEX,
    EXTREME,
    NONE_GIVEN,
    PLAIN_ROWS,
    Request,
    RowOptions,
    active,
    answered_in,
    is_extreme,
)
from portable_softmax.libraries import Library

__all__ = ["log_softmax", "logsumexp", "softmax"]


@operation
def softmax(
    x: ArrayT,
    /,
    *,
    axis: Axis = -1,
    where: Mask | None = None,
    temperature: float = 1.0,
    dtype: Any = None,
    sink: float | Array | None = None,
    out: ArrayT | None = None,
) -> ArrayT:
    r"""Return the softmax of logits: probabilities, none negative, that sum to one.

    Let `x` hold the logits and T be the temperature; over the reduced axes ::

        y_j = exp(x_j / T) / sum_k exp(x_k / T)

    and the gradient of a loss through it, for an upstream gradient dy, is ::

        dx = y * (dy - sum(y * dy)) / T

    with a sink as well, whose own gradient is -(1 - sum(y)) * sum(y * dy) / T.

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
    dtype
        The floating dtype of the result, one of the library's; None for that of `x`. Half types
        are computed in float32 anyway, and with ``dtype=float32`` they are not rounded again. What
        is computed in is never narrower than `dtype`. The gradient keeps the dtype of `x`.
    sink
        One more logit s of every row, that gets no probability: the sum has one more term,
        exp(s / T), and the probabilities sum to less than one. A number below inf, or an array that
        broadcasts to the shape of `x` with length 1 along the reduced axes, such as one sink for
        each attention head. ``sink=0.0`` is "softmax1", which may attend to nothing.
    out
        Where the result is written, an array of the shape of `x` and the dtype of the result, in
        any memory order: `x` itself for a softmax in place. For NumPy, CuPy, and torch where it
        records no gradient.

    Returns
    -------
    array
        `out` if that is given. Of the shape, library and device of `x`, and of its dtype if that is
        floating, else of the library's default floating dtype, unless `dtype` names another. Half
        types are computed in float32 and rounded once.

    Raises
    ------
    TypeError
        If `x` is no array, or is bool, complex or of another dtype; if `where` is not boolean or
        of another library; if `temperature` is no Python number, or `dtype` no floating dtype; if
        `out` is of another library or dtype, or of one that writes to no array.
    ValueError
        If `axis` is out of range, `where` does not broadcast or lives on another device, or
        `temperature` is not positive and finite; if `sink` is a number that is nan or inf, or an
        array that does not broadcast; if `out` is of another shape or device, read-only or followed
        by torch.

    Notes
    -----
    The maximum is subtracted first, which cancels and keeps exp from overflowing. A row of -inf
    only, or one that holds +inf or nan, is nan; no other row is touched. A row that `where` masks
    out as a whole is 0, and so is a row of -inf only beside a sink that is larger. Sinks: Miller
    2023, "Attention is off by one"; Xiao et al. 2023, "Efficient streaming language models with
    attention sinks".

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
    >>> softmax(np.asarray([0.0, -1000.0]), sink=0.0)
    array([0.5, 0. ])
    >>> x = np.zeros(2)
    >>> softmax(x, out=x) is x
    True
    """
    y: ArrayT = _row_by_row("softmax", x, axis, where, temperature, dtype, sink, out)
    return y


@operation
def log_softmax(
    x: ArrayT,
    /,
    *,
    axis: Axis = -1,
    where: Mask | None = None,
    temperature: float = 1.0,
    dtype: Any = None,
    sink: float | Array | None = None,
    out: ArrayT | None = None,
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
    dtype
        The floating dtype of the result, as in `softmax`.
    sink
        One more logit of every row, a number or an array, that gets no probability, as in
        `softmax`. Its gradient is -(1 - sum(exp(y))) * sum(dy) / T.
    out
        Where the result is written, as in `softmax`.

    Returns
    -------
    array
        `out` if that is given. Of the shape, library and device of `x`, and of its dtype if that is
        floating, else of the library's default floating dtype, unless `dtype` names another.

    Raises
    ------
    TypeError, ValueError
        As `softmax`.

    Notes
    -----
    A row of -inf only, or one that holds +inf or nan, is nan. A row that `where` masks out as a
    whole is -inf, and so is a row of -inf only beside a larger sink. The rounding error of x - max
    is put back to first order (two-sum, Knuth 1969); the log1p form is that of SciPy pull request
    21597 (2024).

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
    y: ArrayT = _row_by_row("log_softmax", x, axis, where, temperature, dtype, sink, out)
    return y


@overload
def logsumexp(
    x: ArrayT,
    /,
    *,
    axis: Axis = None,
    b: None = None,
    keepdims: bool = False,
    return_sign: Literal[False] = False,
    where: Mask | None = None,
    dtype: Any = None,
) -> ArrayT: ...


@overload
def logsumexp(
    x: Array,
    /,
    *,
    axis: Axis = None,
    b: Array | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: Mask | None = None,
    dtype: Any = None,
) -> Any: ...


@operation
def logsumexp(
    x: Array,
    /,
    *,
    axis: Axis = None,
    b: Array | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: Mask | None = None,
    dtype: Any = None,
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
        Whether to return the pair ``(log|s|, s/|s|)`` instead of log s. Real input then never
        gives nan for a negative sum.
    where
        Boolean array that broadcasts to the shape of `x`. Entries where it is False take no part.
    dtype
        The floating dtype of a real result, as in `softmax`. A complex result takes none.

    Returns
    -------
    array, or a pair of arrays
        Of the library, device and floating dtype of `x`, unless `dtype` names another.

    Raises
    ------
    TypeError
        If `x` or `b` is no array, or of a dtype that has no exponential, or they belong to
        different libraries; if `dtype` is no floating dtype, or the result is complex beside it.
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
    library, found = _checks.array("x", x, complex_too=True)
    axes = _checks.axes(axis, x.ndim)
    if b is not None:
        _checks.companion("b", b, "x", x, library)
        _checks.weights("b", b, library)
        _checks.broadcastable("b", b, x.shape, "x")
    if where is not None:
        _checks.mask(where, "x", x, library)
    compute_dtype, result_dtype = found.computed or library.compute_dtype(x)
    more = NONE_GIVEN
    if b is not None and library.dtype(b.dtype).kind == "complex":
        compute_dtype = result_dtype = library.complex_dtype(compute_dtype)
        more = (COMPLEX,)
    options, given, tracing = PLAIN_ROWS, NONE_GIVEN, library.tracing(x)
    if b is not None or where is not None or return_sign or dtype is not None:
        tracing = tracing or library.tracing(*[a for a in (b, where) if a is not None])
        if dtype is not None:
            dtype = _checks.answer_dtype(dtype, library)
            _checks.real_answer(dtype, compute_dtype, library)
            compute_dtype, dtype, more = answered_in(library, dtype, compute_dtype, result_dtype)
        if b is not None and b.dtype != compute_dtype:
            b = library.quietly(library.cast, b, compute_dtype)
        options = RowOptions(where=where, b=b, return_sign=bool(return_sign), dtype=dtype)
        given = (*active(options, PLAIN_ROWS), *more)
    answer = run(
        Request(
            "logsumexp", library, x, found.name, axes, compute_dtype, result_dtype,
            tracing, options, given,
        ),
        _portable_logsumexp,
    )  # fmt: skip
    if not return_sign:
        return dropped(library, answer, axes, keepdims)
    value, sign = (dropped(library, part, axes, keepdims) for part in answer)
    return value, sign


def dropped(library: Library, y: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
    """Return a reduction without its reduced axes of length 1, unless they stay."""
    if axes and not keepdims:
        y = library.squeeze(y, axes)
    return library.scalar_if_0d(y)


# --------------------------------------------------------------------------- requests


def _row_by_row(
    operation: str, x: Any, axis: Any, where: Any, temperature: Any, dtype: Any, sink: Any, out: Any
) -> Any:
    """Check the arguments of softmax or log_softmax and answer."""
    library, found = _checks.array("x", x)
    axes = _checks.axes(axis, x.ndim)
    compute_dtype, result_dtype = found.computed or library.compute_dtype(x)
    options, given, tracing = PLAIN_ROWS, NONE_GIVEN, library.tracing(x)
    if not (where is dtype is sink is None and type(temperature) is float and temperature == 1.0):
        more = NONE_GIVEN
        if dtype is not None:
            dtype = _checks.answer_dtype(dtype, library)
            compute_dtype, dtype, more = answered_in(library, dtype, compute_dtype, result_dtype)
        if where is not None:
            _checks.mask(where, "x", x, library)
            tracing = tracing or library.tracing(where)
        if sink is not None:
            sink = _checks.sink(sink, x, axes, library)
            if not isinstance(sink, float):
                tracing = tracing or library.tracing(sink)
                if sink.dtype != compute_dtype:
                    sink = library.quietly(library.cast, sink, compute_dtype)
        if type(temperature) is not float or temperature != 1.0:
            temperature = _checks.temperature(temperature)
        options = RowOptions(where, temperature, dtype=dtype, sink=sink)
        given = (*active(options, PLAIN_ROWS), *more)
        if is_extreme(library, options.temperature, compute_dtype):
            given = (*given, EXTREME)
    if out is not None:
        answer_dtype = result_dtype if options.dtype is None else options.dtype
        arrays = where, None if isinstance(sink, float) else sink
        _checks.output("out", out, "x", x, answer_dtype, library, *arrays)
    request = Request(
        operation, library, x, found.name, axes, compute_dtype, result_dtype,
        tracing, options, given, None, None, True, True, out,
    )  # fmt: skip
    return run(request, _portable_rows)


# --------------------------------------------------------------------------- the portable path


def _portable_rows(request: Request) -> Any:
    """softmax or log_softmax."""
    options = request.options
    y = of_rows(
        request, getattr(portable, request.operation), request.x, where=options.where,
        temperature=options.temperature, sink=options.sink,
    )  # fmt: skip
    return request.library.cast(y, request.answer_dtype)


def _portable_logsumexp(request: Request) -> Any:
    """logsumexp, and the sign if it is asked for, the reduced axes kept with length 1."""
    library, options, answer_dtype = request.library, request.options, request.answer_dtype
    b = None if options.b is None else library.cast(options.b, request.compute_dtype)
    value, sign = of_rows(
        request, portable.logsumexp, request.x, b=b, where=options.where,
        return_sign=options.return_sign,
    )  # fmt: skip
    found = (value, sign) if options.return_sign else (value,)
    if library.dtype(answer_dtype).kind != "complex":
        found = tuple(library.cast(part, answer_dtype) for part in found)
    return found if options.return_sign else found[0]


def of_rows(request: Request, function: Any, *arrays: Any, **options: Any) -> Any:
    """Return what `function` makes of rows in the library's own operations.

    A reduction over no axis, such as that of a 0-d array, is one over a single entry.
    """
    library, axes = request.library, request.axes
    xp, function = library.xp, library.compiled(function)
    arrays = tuple(library.cast(a, request.compute_dtype) for a in arrays)
    if axes:
        return function(xp, *arrays, axes, **options)
    arrays = with_an_axis(xp, *arrays)
    for name in ("where", "b", "sink"):
        if hasattr(options.get(name), "ndim"):
            options[name] = xp.expand_dims(options[name], axis=-1)
    found = function(xp, *arrays, (arrays[0].ndim - 1,), **options)
    parts = [
        None if part is None else library.scalar_if_0d(xp.squeeze(part, axis=-1))
        for part in (found if type(found) is tuple else (found,))
    ]
    return tuple(parts) if type(found) is tuple else parts[0]


def with_an_axis(xp: Namespace, *arrays: Any) -> Any:
    """Return arrays with one more axis, of a single entry; None as it is."""
    return [None if a is None else xp.expand_dims(a, axis=-1) for a in arrays]
