"""The one table of kernels, and the one place that chooses from it.

The module of a kernel is small and loads nothing but NumPy, so that it can be asked about every
call; what it needs beyond that, it imports when it is used. It holds

    missing()       what has to be installed or plugged in before it can run here; empty if nothing
    refusal(call)   why it leaves this call to the next kernel; empty if it does not

and a function of a `Call` for each of its operations, under the operation's name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any, NamedTuple

from portable_softmax import _arrays
from portable_softmax._typing import Array
from portable_softmax.kernels._calls import Call, LossCall, RowsCall, VjpCall
from portable_softmax.kernels._shortcuts import SHORTCUTS
from portable_softmax.portable import Options

ROWS = ("softmax", "log_softmax", "logsumexp")
VJPS = ("softmax_vjp", "log_softmax_vjp")
LOSSES = ("cross_entropy", "cross_entropy_value_and_grad")
OPERATIONS = (*ROWS, *VJPS, *LOSSES)

VARIABLE = "PORTABLE_SOFTMAX_KERNELS"


class Kernel(NamedTuple):
    """A fused implementation of some operations for one library."""

    name: str
    why: str
    library: str
    module: str
    operations: tuple[str, ...]
    traced: bool = False  # it takes abstract arrays too, such as those of torch.compile


# For each library the first one that takes a call has it.
TABLE = (
    Kernel(
        name="numba rows",
        why="one pass in cache",
        library="numpy",
        module="portable_softmax.kernels._numba",
        operations=OPERATIONS,
    ),
    Kernel(
        name="numba rows",
        why="one pass in cache",
        library="torch",
        module="portable_softmax.kernels._numba._tensors",
        operations=OPERATIONS,
    ),
    Kernel(
        name="numpy tiles",
        why="row tiles in cache",
        library="numpy",
        module="portable_softmax.kernels._numpy",
        operations=OPERATIONS,
    ),
    Kernel(
        name="jax rules",
        why="one pass where the values allow it",
        library="jax",
        module="portable_softmax.kernels._jax",
        operations=("log_softmax", "logsumexp", *LOSSES),
        traced=True,
    ),
    *(
        Kernel(
            name="triton rows",
            why="rows in registers, or folded as they pass by",
            library=library,
            module="portable_softmax.kernels._triton",
            operations=OPERATIONS,
            traced=library == "torch",
        )
        for library in ("torch", "cupy")
    ),
)


def _by_call() -> dict[tuple[str, str], tuple[Kernel, ...]]:
    found: dict[tuple[str, str], tuple[Kernel, ...]] = {}
    for kernel in TABLE:
        for operation in kernel.operations:
            key = kernel.library, operation
            found[key] = (*found.get(key, ()), kernel)
    return found


_BY_CALL = _by_call()


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

# The names of single kernels that are switched off.
_OFF: ContextVar[frozenset[str]] = ContextVar("portable_softmax_off", default=frozenset())

# Whether a switch was ever set: until then a small array need not look, nor does torch.compile. Not
# whether one is set now, as a task may have been started in a block that has ended.
_any_switch = bool(_FORCED_FROM_OUTSIDE)


@contextmanager
def _switched(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    global _any_switch
    _any_switch = True
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def shortcut(array: Any, operation: str) -> Callable[..., Any] | None:
    """Return the shortcut for a small array, or None where there is none, or none is wanted."""
    key = type(array), operation
    found = SHORTCUTS.get(key)
    if found is None or not _any_switch:
        return found
    if _forced():
        return None
    return _shortcut_without(key) if _any_off() else found


def _shortcut_without(key: tuple[type, str]) -> Callable[..., Any] | None:
    """Return the shortcut that a kernel offers by itself, and that is not switched off."""
    for kernel in TABLE:
        if not _is_off(kernel.name) and kernel.module in _MODULES:
            own: dict[Any, Any] = getattr(_MODULES[kernel.module], "SHORTCUTS", {})
            if key in own:
                return own[key]  # type: ignore[no-any-return]
    return None


_MODULES: dict[str, Any] = {}
_MISSING: dict[str, str] = {}


def _module(name: str) -> Any:
    found = _MODULES.get(name)
    if found is None:
        found = _MODULES[name] = import_module(name)
        for key, function in getattr(found, "SHORTCUTS", {}).items():
            SHORTCUTS.setdefault(key, function)
    return found


def _missing(name: str) -> str:
    """Return what a module misses, having loaded it."""
    found = _MISSING.get(name)
    if found is None:
        found = _MISSING[name] = _module(name).missing()
    return found


def _forced() -> str:
    return _FORCED.get()


def _is_off(name: str) -> bool:
    return name in _OFF.get()


def _any_off() -> bool:
    return bool(_OFF.get())


# What torch.compile calls while it traces, and takes the answer for a constant: it can neither
# import a module in a trace nor read a ContextVar. (This is torch.compiler.assume_constant_result,
# which would have to import torch.)
_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
_forced._dynamo_marked_constant = True  # type: ignore[attr-defined]
_is_off._dynamo_marked_constant = True  # type: ignore[attr-defined]
_any_off._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refusal(kernel: Kernel, call: Call) -> str:
    if _is_off(kernel.name):
        return "switched off by kernels.without()"
    found: str = _missing(kernel.module) or _MODULES[kernel.module].refusal(call)
    return found


def find(call: Call) -> Callable[[Any], Any] | None:
    """Return the kernel that a call takes, or None for the portable path."""
    candidates = _BY_CALL.get((_arrays.library(call.xp), call.operation))
    if candidates and not _arrays.reads_values(call.xp, call.x):
        candidates = tuple(kernel for kernel in candidates if kernel.traced)
    if not candidates or _forced():
        return None
    for kernel in candidates:
        if not _refusal(kernel, call):
            function: Callable[[Any], Any] = getattr(_MODULES[kernel.module], call.operation)
            return function
    return None


def available() -> dict[str, tuple[str, ...]]:
    """Return the kernels that can run here: name to operations.

    Examples
    --------
    >>> from portable_softmax import kernels
    >>> kernels.available()["numpy tiles"][:3]
    ('softmax', 'log_softmax', 'logsumexp')
    """
    found: dict[str, tuple[str, ...]] = {}
    for kernel in TABLE:
        if not _missing(kernel.module):
            found[kernel.name] = tuple(
                dict.fromkeys((*found.get(kernel.name, ()), *kernel.operations))
            )
    return found


def explain(operation: str, x: Array, **options: Any) -> str:
    """Return which path a call of `operation` on `x` takes, and why.

    Parameters
    ----------
    operation
        A public function's name, such as ``"softmax"``.
    x
        The array that would be passed first.
    options
        What would be passed by name, such as ``axis=0``, and `labels` of a loss: a path may
        depend on them. Labels not given are class indices.

    Raises
    ------
    ValueError
        If there is no such operation.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import kernels
    >>> kernels.explain("softmax", np.ones(3), axis=0).partition(":")[0]
    'numpy tiles'
    """
    if operation not in OPERATIONS:
        raise ValueError(
            f"operation is {operation!r}, expected one of {', '.join(map(repr, OPERATIONS))}"
        )
    call = _call(operation, x, options)
    library = _arrays.library(call.xp)
    candidates = _BY_CALL.get((library, operation), ())
    if not candidates:
        return f"portable: no kernel for {operation} on {library}"
    if forced := _FORCED.get():
        return f"portable: forced by {forced}"
    if not _arrays.reads_values(call.xp, x):
        candidates = tuple(kernel for kernel in candidates if kernel.traced)
        if not candidates:
            return "portable: traced, lazy or abstract"
    refused: list[str] = []
    for kernel in candidates:
        why = _refusal(kernel, call)
        if not why:
            return "; ".join([f"{kernel.name}: {kernel.why}", *refused])
        refused.append(f"not {kernel.name}: {why}")
    return "portable: " + "; ".join(refused)


def _call(operation: str, x: Any, options: dict[str, Any]) -> Call:
    """Return a call as the public functions make it, of arguments that they would accept."""
    xp = _arrays.namespace(x)
    compute, answer = _arrays.compute_dtype(xp, x)
    axis = options.pop("axis", None if operation == "logsumexp" else -1)
    if operation in LOSSES:
        labels = options.pop("labels", None)
        indices = labels is None or labels.ndim < x.ndim
        check = options.pop("check_labels", True)
        return LossCall(
            operation, xp, x, labels, indices, axis % x.ndim, Options(**options), check,
            compute, answer,
        )  # fmt: skip
    every = range(x.ndim) if axis is None else (axis if isinstance(axis, tuple) else (axis,))
    axes = tuple(a % x.ndim for a in every)
    if operation in VJPS:
        return VjpCall(operation, xp, x, options.pop("dy", x), axes, compute, answer)
    where, temperature = options.pop("where", None), options.pop("temperature", 1.0)
    return RowsCall(operation, xp, x, axes, where, temperature, compute, answer)


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
    with _switched(_FORCED, "kernels.portable()"):
        yield


@contextmanager
def without(name: str) -> Iterator[None]:
    """Leave one kernel's calls to the next in this block, to compare the two.

    It counts for the current thread or task only.

    Parameters
    ----------
    name
        As `available` lists it.

    Raises
    ------
    ValueError
        If there is no kernel of this name.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import kernels
    >>> with kernels.without("numpy tiles"):
    ...     print(kernels.explain("softmax", np.ones(3)).partition(":")[0])
    portable
    """
    names = tuple(dict.fromkeys(kernel.name for kernel in TABLE))
    if name not in names:
        raise ValueError(f"name is {name!r}, expected one of {', '.join(map(repr, names))}")
    with _switched(_OFF, _OFF.get() | {name}):
        yield
