"""`softmax`, `log_softmax` and `logsumexp` with the arguments of `scipy.special`.

All axes are reduced by default, and lists and numbers are arrays of NumPy, as in SciPy. What
differs on purpose: arrays of bool and masked arrays are refused, and so are complex ones but in
`logsumexp`; integers are promoted before anything is subtracted; half types are computed in
float32; confident rows keep their digits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from portable_softmax import _softmax, libraries
from portable_softmax._typing import Axis
from portable_softmax.compat._arguments import as_array, is_array

__all__ = ["log_softmax", "logsumexp", "softmax"]


def softmax(x: Any, axis: Axis = None) -> Any:
    """Return the softmax over all axes, or those named.

    The arguments are those of ``scipy.special.softmax``, the answer is that of
    `portable_softmax.softmax`.

    Examples
    --------
    >>> from portable_softmax.compat import scipy_special
    >>> scipy_special.softmax([[0, 0], [0, 0]])
    array([[0.25, 0.25],
           [0.25, 0.25]])
    """
    return _softmax.softmax(as_array(x), axis=axis)


def log_softmax(x: Any, axis: Axis = None) -> Any:
    """Return the logarithm of the softmax over all axes, or those named.

    The arguments are those of ``scipy.special.log_softmax``, the answer is that of
    `portable_softmax.log_softmax`.

    Examples
    --------
    >>> from portable_softmax.compat import scipy_special
    >>> print(scipy_special.log_softmax([30.0, 0.0, 0.0])[0])
    -1.8715245937...e-13
    """
    return _softmax.log_softmax(as_array(x), axis=axis)


def logsumexp(
    a: Any,
    axis: Axis = None,
    b: Any = None,
    keepdims: bool = False,
    return_sign: bool = False,
) -> Any:
    """Return the logarithm of a sum of exponentials with weights `b`.

    The arguments are those of ``scipy.special.logsumexp``, the answer is that of
    `portable_softmax.logsumexp`. As in SciPy, `a` and `b` are broadcast against each other and
    promoted to one dtype.

    Examples
    --------
    >>> from portable_softmax.compat import scipy_special
    >>> print(scipy_special.logsumexp([1000.0, 1000.0], b=[1.0, 2.0]))
    1001.0986122886682
    """
    if b is None:
        a = as_array(a)
    else:
        a, b = _promoted(a, b)
    return _softmax.logsumexp(a, axis=axis, b=b, keepdims=keepdims, return_sign=return_sign)


def _promoted(a: Any, b: Any) -> tuple[Any, Any]:
    """Return exponents and weights as arrays of one library, one dtype and one shape."""
    if not (is_array(a) or is_array(b)):
        a = as_array(a)
    like = a if is_array(a) else b
    library = libraries.library_of(like)
    xp, device = library.xp, library.device(like)
    # A number has no dtype of its own: it takes that of the array beside it.
    a, b = (
        x if is_array(x) or isinstance(x, int | float | complex) else xp.asarray(x, device=device)
        for x in (a, b)
    )
    try:
        dtype = xp.result_type(a, b)
    except TypeError:  # the standard leaves open what an integer and a float make
        floats = (x for x in (a, b) if not _is_integer(library, x))
        dtype = xp.result_type(library.default_float(like), *floats)
    cast = partial(library.quietly, library.cast)
    new = partial(library.quietly, partial(xp.asarray, dtype=dtype, device=device))
    a, b = (cast(x, dtype) if is_array(x) else new(x) for x in (a, b))
    if a.shape != b.shape:
        a, b = xp.broadcast_arrays(a, b)
    return a, b


def _is_integer(library: libraries.Library, x: Any) -> bool:
    return isinstance(x, int) if not is_array(x) else library.dtype(x.dtype).kind == "integer"
