"""Whether a library that nobody has tested can give the right answers: one array, once per process.

A few operations of the standard, on two rows whose answers are known, show it. What they show
depends on the library and its version alone. A lazy library is asked for types and shapes only.
"""

from __future__ import annotations

from typing import Any

import array_api_compat as compat

from portable_softmax._typing import Namespace

_ROWS = [[2.0, 1.0, 0.0], [30.0, 0.0, 0.0]]
# mpmath, 20 digits.
_SOFTMAX = [
    [0.66524095577482189, 0.24472847105479765, 0.09003057317038046],
    [0.99999999999981285, 9.3576229688392989e-14, 9.3576229688392989e-14],
]
_LOGSUMEXP = [[2.4076059644443806], [30.000000000000187]]
_LOSS = [[1.4076059644443806], [30.000000000000187]]  # of the label 1


class _WrongError(Exception):
    """Why, as the end of a sentence that begins with the library's name."""


def of_rows(xp: Namespace) -> str:
    """Return why softmax and logsumexp cannot be right; empty if they are."""
    return _why(_rows, xp)


def of_labels(xp: Namespace) -> str:
    """Return why losses of class indices cannot be right; empty if they are."""
    return _why(_labels, xp)


def _why(test: Any, xp: Namespace) -> str:
    try:
        test(xp)
    except _WrongError as failed:
        return str(failed)
    except Exception as error:  # each library fails in its own way
        line = str(error).partition("\n")[0]
        return f"it raises {type(error).__name__}: {line}"
    return ""


def _rows(xp: Namespace) -> tuple[Any, Any]:
    x = xp.asarray(_ROWS)
    m = _array(xp, "max", xp.max(x, axis=(1,), keepdims=True), (2, 1))
    _equal(xp, "the maximum", m, [[2.0], [30.0]])
    exps = _array(xp, "exp", xp.exp(x - m), (2, 3))
    total = _array(xp, "sum", xp.sum(exps, axis=(1,), keepdims=True), (2, 1))
    y = _array(xp, "division", exps / total, (2, 3))
    _equal(xp, "softmax", y, _SOFTMAX)
    kept = xp.where(xp.isinf(m), xp.zeros_like(m), m)
    lse = _array(xp, "log1p", kept + xp.log1p(total - 1.0), (2, 1))
    _equal(xp, "logsumexp", lse, _LOGSUMEXP)
    return x, lse


def _labels(xp: Namespace) -> None:
    x, lse = _rows(xp)
    labels = xp.asarray([1, 1])[:, None]
    hit = _array(xp, "comparison", xp.reshape(xp.arange(3), (1, 3)) == labels, (2, 3))
    gaps = _array(xp, "where", xp.where(hit, lse - x, xp.zeros_like(x)), (2, 3))
    loss = _array(xp, "sum", xp.sum(gaps, axis=(1,), keepdims=True), (2, 1))
    _equal(xp, "cross_entropy", loss, _LOSS)


def _array(xp: Namespace, what: str, found: Any, shape: tuple[int, ...]) -> Any:
    """Return `found` if it is an array of the library and has the shape."""
    own = compat.is_array_api_obj(found) and compat.array_namespace(found).__name__ == xp.__name__
    if not own:
        cls = type(found)
        raise _WrongError(f"its {what} gives a {cls.__module__}.{cls.__qualname__}")
    if tuple(found.shape) != shape:
        raise _WrongError(f"its {what} gives the shape {tuple(found.shape)} for {shape}")
    return found


def _equal(xp: Namespace, what: str, found: Any, expected: list[list[float]]) -> None:
    gap = xp.abs(found - xp.asarray(expected))
    try:
        near = bool(xp.all(gap <= 1e-5))
    except Exception:  # lazy: nothing can be read yet
        return
    if not near:
        raise _WrongError(f"{what} by its operations is wrong")
