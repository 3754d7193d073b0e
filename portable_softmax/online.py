"""The softmax family over rows that come in parts: fold each, merge, finish.

A row may be too long for one array: its parts are tiles, chunks, files or the shards of other
machines. Let x hold the logits; each part is folded into the state ::

    max  = max_j x_j            rest = sum_j exp(x_j - max) - 1

the states of the parts merge into that of the row, in any order and any tree, since for m1 >= m2 ::

    merge((m1, r1), (m2, r2)) = (m1, r1 + (1 + r2) exp(m2 - m1))

and everything follows from it: logsumexp = max + log1p(rest) and so on.

A state that is the logsumexp alone merges as well, but loses the digits of a confident row, whose
logsumexp is its maximum: the loss of the label 0 in [30, 0, 0] is 1.871524593768e-13. From the
logsumexp it is 1.8829e-13 in float64, which is 0.6 % off, and 0 in float32.

The state of an array in float32 or a half type counts its rest in float64, if the library has that,
so that merging part after part costs no digit. In float64 each merge rounds: it adds up to two
units in the last place to the error of the rest, while those of earlier merges shrink with their
share of the sum. To merge many at once rounds less often.

Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"; the log1p form is that of
SciPy pull request 21597 (2024).

>>> import numpy as np
>>> from portable_softmax import online
>>> state = online.merge(online.fold(np.asarray([30.0])), online.fold(np.asarray([0.0, 0.0])))
>>> print(online.cross_entropy(state, np.asarray([30.0])))
[1.87152459e-13]
>>> lse = np.logaddexp(np.float64(30.0), np.logaddexp(0.0, 0.0))
>>> print(f"{lse - 30.0:.4e}")
1.8829e-13
"""

from __future__ import annotations

from typing import Any, NamedTuple

from portable_softmax import _checks, portable
from portable_softmax._typing import Array, ArrayT, Axis, Mask
from portable_softmax.kernels import _folding
from portable_softmax.kernels._decide import operation
from portable_softmax.libraries import Library

__all__ = [
    "State",
    "cross_entropy",
    "fold",
    "identity",
    "log_softmax",
    "logsumexp",
    "merge",
    "softmax",
]


_REMEDY = "fold arrays of one dtype, cast to it first"


class State(NamedTuple):
    """What is left of rows that were folded, a pair of arrays: `max` and `rest`.

    Both have the shape of the folded array, the reduced axes kept with length 1. `max` has the
    dtype that is computed in, which is float32 for half types, and `rest` is in float64 if the
    library has that. JAX and torch take a state apart into its arrays, as any named tuple. For
    derivatives `max` is a constant: nothing depends on what is subtracted.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import online
    >>> online.fold(np.asarray([1.0, 3.0, 3.0]))
    State(max=array([3.]), rest=array([1.13533528]))
    """

    max: Any
    """The maximum of a row; -inf if it has no entry."""
    rest: Any
    """The sum of exp(x - max) without one maximum: -1 if there is no entry, nan beside +inf."""


@operation
def fold(
    x: Array, /, *, axis: Axis = -1, where: Mask | None = None, temperature: float = 1.0
) -> State:
    r"""Fold rows, or parts of rows, into their state.

    Let `x` hold the logits and T be the temperature; over the reduced axes ::

        max = max_j x_j / T            rest = sum_j exp(x_j / T - max) - 1

    The gradient with respect to `x` of what follows from the state, for the derivative dr with
    respect to `rest`, is ``dx_j = dr * exp(x_j / T - max) / T``; `max` is a constant.

    Parameters
    ----------
    x
        Array of any shape, floating or integer.
    axis
        An int, a tuple of ints, or None for all axes.
    where
        Boolean array that broadcasts to the shape of `x`. Entries where it is False take no part.
    temperature
        T, a positive number. The state is that of x / T, which is what `softmax`, `log_softmax` and
        `cross_entropy` are to be given with it. Parts are merged by their rounded ``max / T``.

    Returns
    -------
    State
        Of the library and device of `x`, the reduced axes kept with length 1.

    Raises
    ------
    TypeError, ValueError
        As `portable_softmax.softmax`.

    Notes
    -----
    A row without an entry, and one of -inf only, is (-inf, -1), as `identity`. For a row that
    holds +inf or nan, `rest` is nan and `max` is that +inf or nan.

    See Also
    --------
    merge : the state of several parts.
    portable_softmax.logsumexp : for rows that come as a whole.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import online
    >>> online.fold(np.zeros((2, 4), np.float32)).rest
    array([[3.],
           [3.]])
    """
    library, _ = _checks.array("x", x)
    axes = _checks.axes(axis, x.ndim)
    if where is not None:
        _checks.mask(where, "x", x, library)
    if type(temperature) is not float or temperature != 1.0:
        temperature = _checks.temperature(temperature)
    arrays: list[Any] = [x, where]
    if not axes:
        arrays = [None if a is None else library.xp.expand_dims(a, axis=-1) for a in arrays]
    reduced = axes or (x.ndim,)
    m, rest = _folding.fold(library, arrays[0], arrays[1], reduced, temperature)
    if temperature != 1.0:
        m = library.quietly(portable.divided, library.xp, m, temperature)
    return State(*[m, rest] if axes else [library.squeeze(part, reduced) for part in (m, rest)])


def identity(x: Array, /, *, axis: Axis = -1) -> State:
    r"""Return the state of no entry, which merges as nothing.

    It is ``max = -inf, rest = -1``, in the shape, dtypes and device that `fold` gives the state of
    `x`, and starts a loop over parts of such arrays.

    Parameters
    ----------
    x
        Array of which the shape and the dtype count. It may have length 0 along the reduced axes.
    axis
        The axis or axes that are reduced.

    Returns
    -------
    State

    Raises
    ------
    TypeError, ValueError
        As `fold`.

    See Also
    --------
    fold : what is merged with it.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import online
    >>> online.identity(np.ones(3))
    State(max=array([-inf]), rest=array([-1.]))
    """
    library, dtype = _checks.array("x", x)
    axes = _checks.axes(axis, x.ndim)
    compute_dtype, _ = dtype.computed or library.compute_dtype(x)
    x = library.cast(x, compute_dtype)
    return State(*library.quietly(portable.of_nothing, library.xp, x, axes))


def merge(*states: State) -> State:
    r"""Merge the states of parts into that of the whole.

    Let m_i and r_i be the maximum and the rest of part i ::

        max = max_i m_i            rest = sum_i (1 + r_i) exp(m_i - max) - 1

    with one maximum left out of the sum, so that no digit of a small rest is lost. It is
    associative and commutative but for rounding, and `identity` is its neutral element. For a
    derivative dr with respect to `rest` ::

        dr_i = dr * exp(m_i - max)          dm_i = dr * (1 + r_i) exp(m_i - max)

    Parameters
    ----------
    *states
        One or more states of the same shape, dtypes, library and device.

    Returns
    -------
    State

    Raises
    ------
    TypeError
        If there is no state, or an argument is none, or they differ in library or dtype.
    ValueError
        If the shapes or devices differ.

    Notes
    -----
    The rounding error of m_i - max is put back to first order. The same states merged in the same
    order give the same bits. An infinity or nan in a part does to the row what it would do in the
    row as a whole.

    See Also
    --------
    fold : the state of a part.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import online
    >>> x = np.arange(6.0)
    >>> parts = [online.fold(part) for part in np.split(x, 3)]
    >>> float(online.logsumexp(online.merge(*parts))[0])
    5.456193316018123
    """
    if not states:
        raise TypeError("merge was given no state, expected one or more: start from identity(x)")
    library = _checks.state("states[0]", states[0], State)
    first = states[0]
    for i, other in enumerate(states[1:], 1):
        _checks.state(f"states[{i}]", other, State)
        for name, part, like in zip(State._fields, other, first, strict=True):
            _checks.companion(f"states[{i}].{name}", part, f"states[0].{name}", like, library)
            _checks.like_shape(f"states[{i}].{name}", part, f"states[0].{name}", like)
            _checks.like_dtype(f"states[{i}].{name}", part, f"states[0].{name}", like, _REMEDY)
    if len(states) == 1:
        return first
    pairs = [tuple(state) for state in states]
    merged = library.compiled(portable.merge)
    return State(*library.quietly(merged, library.xp, pairs))


def logsumexp(state: State, /) -> Any:
    r"""Return the logarithm of the sum of exponentials of a folded row.

    It is ``max + log1p(rest)``, with the derivative ``dr / (1 + rest)`` of `rest`.

    Parameters
    ----------
    state
        What `fold` or `merge` returned.

    Returns
    -------
    array
        Of the shape and dtype of ``state.max``: float32 for half types.

    Raises
    ------
    TypeError
        If `state` is no State.

    Notes
    -----
    -inf for a row without an entry and for one of -inf only; +inf for one that holds +inf; nan for
    one that holds nan.

    See Also
    --------
    portable_softmax.logsumexp : for rows that come as a whole.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import online
    >>> online.logsumexp(online.fold(np.asarray([1000.0, 1000.0])))
    array([1000.69314718])
    """
    library = _checks.state("state", state, State)
    value = library.quietly(library.compiled(portable.logsumexp_of), library.xp, *state)
    return library.scalar_if_0d(value)


def softmax(x: ArrayT, state: State, /) -> ArrayT:
    r"""Return the probabilities of a part of the rows that a state was folded from.

    For the logits `x` of the part and the state of the whole ::

        y_j = exp(x_j - max) / (1 + rest)          dx_j = dy_j * y_j
        drest = -sum_j dy_j * y_j / (1 + rest)

    Parameters
    ----------
    x
        A part of the logits, divided by the temperature if `fold` was given one.
    state
        The state of the whole, which broadcasts to the shape of `x`.

    Returns
    -------
    array
        Of the shape, library and device of `x`, and of its dtype if that is floating, else of the
        library's default floating dtype.

    Raises
    ------
    TypeError
        If `x` is no real array, `state` is no State, or they differ in library or dtype.
    ValueError
        If the state does not broadcast to the shape of `x`, or is on another device.

    Notes
    -----
    A row of -inf only, or one that holds +inf or nan, is nan. A state knows of no mask: what was
    masked out of it gets the value that its logit has among the others.

    See Also
    --------
    portable_softmax.softmax : for rows that come as a whole.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import online
    >>> x = np.asarray([1.0, 2.0, 3.0, 4.0])
    >>> state = online.merge(online.fold(x[:3]), online.fold(x[3:]))
    >>> online.softmax(x[:3], state).round(8)
    array([0.0320586 , 0.08714432, 0.23688282])
    """
    y: ArrayT = _finished(portable.softmax_of, x, state)
    return y


def log_softmax(x: ArrayT, state: State, /) -> ArrayT:
    r"""Return the log-probabilities of a part of the rows that a state was folded from.

    For the logits `x` of the part and the state of the whole ::

        y_j = (x_j - max) - log1p(rest)            dx_j = dy_j
        drest = -sum_j dy_j / (1 + rest)

    Parameters
    ----------
    x, state
        As in `softmax`.

    Returns
    -------
    array
        As `softmax` returns it.

    Raises
    ------
    TypeError, ValueError
        As `softmax`.

    Notes
    -----
    A row of -inf only, or one that holds +inf or nan, is nan.

    See Also
    --------
    portable_softmax.log_softmax : for rows that come as a whole.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import online
    >>> x = np.asarray([30.0, 0.0, 0.0])
    >>> state = online.merge(online.fold(x[1:]), online.fold(x[:1]))
    >>> print(online.log_softmax(x[:1], state))
    [-1.87152459e-13]
    """
    y: ArrayT = _finished(portable.log_softmax_of, x, state)
    return y


def _finished(function: Any, x: Any, state: State) -> Any:
    library, dtype = _checks.array("x", x)
    compute_dtype, result_dtype = dtype.computed or library.compute_dtype(x)
    _checks.state("state", state, State)
    for name, part in zip(State._fields, state, strict=True):
        _checks.companion(f"state.{name}", part, "x", x, library)
        _checks.broadcastable(f"state.{name}", part, x.shape, "x")
    x = library.cast(x, compute_dtype)
    _checks.like_dtype("state.max", state.max, "x", x, _REMEDY)
    y = library.quietly(_rounded, library, result_dtype, function, x, *state)
    return library.scalar_if_0d(y)


def _rounded(library: Library, dtype: Any, function: Any, *arrays: Any) -> Any:
    return library.cast(library.compiled(function)(library.xp, *arrays), dtype)


def cross_entropy(state: State, logit_at_label: ArrayT, /) -> ArrayT:
    r"""Return the cross-entropy of each row, from its state and the logit of its label.

    It is ``(max - x_y) + log1p(rest)`` for the logit x_y, with the derivatives ::

        dx_y = -dloss            drest = dloss / (1 + rest)

    Parameters
    ----------
    state
        The state of the whole row.
    logit_at_label
        The logit of each row's label, in the shape of ``state.max``, that is with the class axis
        kept with length 1; divided by the temperature if `fold` was given one.

    Returns
    -------
    array
        The losses, of the shape and floating dtype of `logit_at_label`.

    Raises
    ------
    TypeError
        If an argument is of the wrong type, or they differ in library or dtype.
    ValueError
        If the shapes or devices differ.

    Notes
    -----
    A row of -inf only, or one that holds +inf or nan, is nan. Through a state, the derivative with
    respect to the label's logit is p - 1 as it rounds, which is 0 for a confident row;
    `portable_softmax.cross_entropy` keeps its digits.

    See Also
    --------
    portable_softmax.cross_entropy : for rows that come as a whole, with options.
    portable_softmax.linear_cross_entropy : for logits of a linear layer, which it does not store.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import online
    >>> x, labels = np.asarray([[30.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), np.asarray([[0], [2]])
    >>> state = online.merge(online.fold(x[:, :2]), online.fold(x[:, 2:]))
    >>> online.cross_entropy(state, np.take_along_axis(x, labels, axis=1))
    array([[1.87152459e-13],
           [1.09861229e+00]])
    """
    library = _checks.state("state", state, State)
    _checks.companion("logit_at_label", logit_at_label, "state.max", state.max, library)
    _, dtype = _checks.array("logit_at_label", logit_at_label)
    _checks.like_shape("logit_at_label", logit_at_label, "state.max", state.max)
    compute_dtype, result_dtype = dtype.computed or library.compute_dtype(logit_at_label)
    at_label = library.cast(logit_at_label, compute_dtype)
    _checks.like_dtype("state.max", state.max, "logit_at_label", at_label, _REMEDY)
    function = portable.cross_entropy_of
    loss = library.quietly(_rounded, library, result_dtype, function, *state, at_label)
    found: ArrayT = library.scalar_if_0d(loss)
    return found
