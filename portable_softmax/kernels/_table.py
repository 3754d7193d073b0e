"""The one table of kernels, and the one place that chooses from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any, NamedTuple

from portable_softmax import _arrays
from portable_softmax._typing import Array, Namespace

OPERATIONS = (
    "softmax",
    "log_softmax",
    "logsumexp",
    "softmax_vjp",
    "log_softmax_vjp",
    "cross_entropy",
    "cross_entropy_value_and_grad",
)

VARIABLE = "PORTABLE_SOFTMAX_KERNELS"


class Kernel(NamedTuple):
    """A fused implementation of some operations for one library on one kind of device."""

    name: str
    why: str
    library: str
    device: str
    module: str
    operations: tuple[str, ...]


TABLE = (
    Kernel(
        name="numpy tiles",
        why="row tiles in cache",
        library="numpy",
        device="cpu",
        module="portable_softmax.kernels._numpy",
        operations=(
            "softmax",
            "log_softmax",
            "logsumexp",
            "cross_entropy",
            "cross_entropy_value_and_grad",
        ),
    ),
)

_BY_CALL = {(k.library, op): k for k in TABLE for op in k.operations}
_LOADED: dict[tuple[str, str], Callable[..., Any]] = {}


def _forced_from_outside() -> str:
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "portable"):
        raise ValueError(
            f"{VARIABLE} is {value!r}, expected 'portable' or nothing: correct or unset it"
        )
    return f"{VARIABLE}={value}" if value else ""


# What forces the portable path; empty where nothing does. The variable is read once, on import.
_FORCED_FROM_OUTSIDE = _forced_from_outside()
_FORCED: ContextVar[str] = ContextVar("portable_softmax_forced", default=_FORCED_FROM_OUTSIDE)


def find(operation: str, xp: Namespace) -> Callable[..., Any] | None:
    """Return the kernel that a call takes, or None for the portable path."""
    key = (_arrays.library(xp), operation)
    kernel = _BY_CALL.get(key)
    if kernel is None or _FORCED.get():
        return None
    found = _LOADED.get(key)
    if found is None:
        found = _LOADED[key] = getattr(import_module(kernel.module), operation)
    return found


def available() -> dict[str, tuple[str, ...]]:
    """Return the kernels that can run here: name to operations.

    Examples
    --------
    >>> from portable_softmax import kernels
    >>> kernels.available()["numpy tiles"]
    ('softmax', 'log_softmax', 'logsumexp', 'cross_entropy', 'cross_entropy_value_and_grad')
    """
    return {kernel.name: kernel.operations for kernel in TABLE}


def explain(operation: str, x: Array) -> str:
    """Return which path a call of `operation` on `x` takes, and why.

    Parameters
    ----------
    operation
        A public function's name, such as ``"softmax"``.
    x
        The array that would be passed first.

    Raises
    ------
    ValueError
        If there is no such operation.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import kernels
    >>> kernels.explain("softmax_vjp", np.ones(3))
    'portable: no kernel for softmax_vjp on numpy'
    """
    if operation not in OPERATIONS:
        raise ValueError(
            f"operation is {operation!r}, expected one of {', '.join(map(repr, OPERATIONS))}"
        )
    library = _arrays.library(_arrays.namespace(x))
    kernel = _BY_CALL.get((library, operation))
    if kernel is None:
        return f"portable: no kernel for {operation} on {library}"
    forced = _FORCED.get()
    return f"portable: forced by {forced}" if forced else f"{kernel.name}: {kernel.why}"


@contextmanager
def portable() -> Iterator[None]:
    """Take the portable path in this block, whatever kernels there are.

    It counts for the current thread or task only.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import kernels, softmax
    >>> x = np.asarray([1.0, 2.0, 3.0])
    >>> with kernels.portable():
    ...     y = softmax(x)
    >>> bool(np.allclose(y, softmax(x)))
    True
    """
    token = _FORCED.set("kernels.portable()")
    try:
        yield
    finally:
        _FORCED.reset(token)
