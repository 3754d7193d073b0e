"""Which handler of XLA's FFI a call takes, and what it is called with; see `_handlers`.

A handler is made once for each operation, layout, dtype and variant, is cached on disk as kernels
are, and stays for the life of the process.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.core.ccallback import CFunc

from portable_softmax.kernels._numba import _driver, _frame, _handlers, _jit
from portable_softmax.kernels._numba._exp import temperature
from portable_softmax.kernels._numba._losses import EACH, IGNORING, SAMPLED
from portable_softmax.kernels._numba._losses import WEIGHTED as HAS_WEIGHTS
from portable_softmax.kernels._request import (
    BESIDE_SINKS,
    BINARY,
    BY_Q,
    DIVERGENCES,
    RUNNING,
    SIGNED,
    WEIGHTED,
    Layout,
)

__all__ = ["API", "LAST_API", "ROLES", "Loss", "Target", "made", "target", "temperature"]

API, LAST_API, ROLES = _frame.API, _frame.LAST_API, _frame.ROLES


# The vector-Jacobian product of log_softmax where a logit of -inf passes its gradient on.
PULLBACK = "log_softmax_pullback"
# What XLA's derivatives and the kernels' are called.
_KERNELS = {
    PULLBACK: "log_softmax_vjp",
    "logsumexp_pullback": "logsumexp_vjp",
    "logcumsumexp_pullback": "logcumsumexp_vjp",
    SIGNED: WEIGHTED[0],
}


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


def made() -> list[Any]:
    """Return the handlers that this process has made."""
    return list(_made.values())


class Loss(NamedTuple):
    """What a plan holds of a loss."""

    indices: bool
    each: bool
    mean: bool
    ignore: int | None
    scale: float  # of the gradient
    weighted: bool  # by weights of the classes that are not all 1
    capped: bool


def target(
    register: Register,
    operation: str,
    layout: Layout,
    buffers: dict[str, Any],
    loss: Loss | None,
) -> Target:
    """Return the handler of a call; `buffers` are its arrays by their roles, and the results."""
    dtype = buffers["x"].dtype.name
    stored = np.dtype({"float16": "u2", "bfloat16": "i2"}.get(dtype, dtype))
    plan = np.zeros(_frame.WORDS, np.int64)
    named = _OF_ENTRIES if operation in BINARY else _VARIANTS
    variants = [name for role, name in named.items() if role in buffers]
    if loss is None:
        plan[_frame.FLAGS] = operation in ("softmax", "log_softmax", *BESIDE_SINKS, PULLBACK)
        operation = _KERNELS.get(operation, operation)
        # The factor of gradients stands beside the numbers of a temperature, or alone.
        factors = operation in (DIVERGENCES[1], BY_Q)
        numbers = buffers.get("numbers")
        variants += ["temperature"] * (numbers is not None and math.prod(numbers.shape) > factors)
    else:
        operation = operation if loss.indices else f"soft_{operation}"
        variants += ["softcap"] * loss.capped
        variants += ["each"] * (operation in BINARY and loss.each)
        flags = EACH * loss.each | IGNORING * (loss.ignore is not None)
        flags |= HAS_WEIGHTS * loss.weighted | SAMPLED * ("samples" in buffers)
        plan[_frame.FLAGS], plan[_frame.IGNORE] = flags, loss.ignore or 0
        plan[_frame.LENGTH], plan[_frame.MEAN] = layout.rows, loss.mean
        plan.view(np.float64)[_frame.SCALE] = loss.scale
    size = math.prod(buffers["x"].shape) * stored.itemsize
    capped = loss is not None and loss.capped
    compute = _driver.compute_dtype(stored)
    mask = buffers.get("mask")
    if operation in RUNNING:
        planned = _driver.plan_of_running(layout, size, by_xla=True)
        *shape, plan[_frame.LENGTH] = planned.shape
    elif operation in BINARY:
        planned = _driver.plan_of_entries(layout.rows, stored.itemsize, by_xla=True)
        shape = [*planned.shape]
    else:
        planned = _driver.plan(
            operation, layout, stored, compute, capped=capped, mask=mask, by_xla=True
        )
        shape = [*planned.shape]
    plan[_frame.HELPERS] = _driver.helpers(operation, planned.shape[0], size)
    plan[: _frame.PIECES + 1] = (
        *(*shape, planned.workspace),
        *(planned.step, planned.groups, planned.pieces),
    )
    for role, array in buffers.items():
        i = _frame.ROLES.index(role)
        plan[_frame.KINDS + i] = _frame.CODES[array.dtype.name]
        plan[_frame.SIZES + i] = math.prod(array.shape)
    return Target(_registered(register, operation, planned.layout, dtype, *variants), plan)


# What a kernel is compiled for, by the buffer that holds it.
_VARIANTS = {"mask": "where", "samples": "sample_weight"}
_OF_ENTRIES = {"weight": "weight", "samples": "pos_weight"}
