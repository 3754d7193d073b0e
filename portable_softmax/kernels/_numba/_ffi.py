"""Which handler of XLA's FFI a call takes, and what it is called with; see `_handlers`.

A handler is made once for each operation, layout and dtype, is cached on disk as kernels are, and
stays for the life of the process.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.core.ccallback import CFunc

from portable_softmax.kernels._numba import _driver, _handlers, _jit
from portable_softmax.kernels._numba._losses import EACH, IGNORING

API = _handlers.API


class Target(NamedTuple):
    """A handler, and what it is to be called with."""

    name: str
    plan: Any


Register = Callable[[str, int], None]  # of a handler's name and address

_made: dict[str, Any] = {}
_lock = threading.Lock()


def _forget_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_lock)


def _compiled(name: str, *parts: str) -> Any:
    """Return a handler, compiled or from the cache; nothing ever frees it.

    XLA's threads may be in it while the interpreter ends.
    """
    handle: Any = _handlers.handler(name, *parts)  # type: ignore[no-untyped-call]
    made: Any = CFunc(handle, ((types.int64,), types.int64), {}, {"error_model": "numpy"})
    if (files := _jit.kept(handle, name)) is not None:
        made._cache = files
    made.compile()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
    return made


def _registered(register: Register, *parts: str) -> str:
    """Return the name that a handler is registered under, once."""
    name = ".".join(("ffi", *parts))
    with _lock:
        if name not in _made:
            made = _compiled(name, *parts)
            register(f"portable_softmax.{name}", made.address)
            _made[name] = made
    return f"portable_softmax.{name}"


class Loss(NamedTuple):
    """What a plan holds of a loss."""

    each: bool
    mean: bool
    ignore: int | None
    scale: float  # of the gradient


def target(
    register: Register,
    operation: str,
    dtype: str,
    layout: tuple[int, int, int],
    sizes: list[int],
    loss: Loss | None,
) -> Target:
    """Return the handler of a call; `sizes` are the elements of its buffers."""
    stored = np.dtype({"float16": "u2", "bfloat16": "i2"}.get(dtype, dtype))
    compute = _driver.compute_dtype(stored)
    flat = _driver.Layout(*layout)
    planned = _driver.plan(operation, flat, stored, compute)
    kind = next(name for name, found in _handlers.LAYOUTS.items() if found is planned.kernels)
    plan = np.zeros(_handlers.WORDS, np.int64)
    plan[: _handlers.PIECES + 1] = (
        *(*planned.shape, planned.workspace),
        *(planned.step, planned.groups, planned.pieces),
    )
    if loss is None:
        plan[_handlers.FLAGS] = operation in ("softmax", "log_softmax")
    else:
        plan[_handlers.FLAGS] = EACH * loss.each | IGNORING * (loss.ignore is not None)
        plan[_handlers.IGNORE] = loss.ignore or 0
        plan[_handlers.LENGTH], plan[_handlers.MEAN] = flat.rows, loss.mean
        plan.view(np.float64)[_handlers.SCALE] = loss.scale
    plan[_handlers.SIZES : _handlers.SIZES + len(sizes)] = sizes
    return Target(_registered(register, operation, kind, dtype), plan)
