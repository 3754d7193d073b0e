"""``warm``: compile the Numba kernels of plain calls, so that other processes load them."""

from __future__ import annotations

import math
from importlib import import_module
from itertools import product
from time import perf_counter
from typing import Any

import numpy as np

from portable_softmax import kernels
from portable_softmax._cli.errors import CommandError
from portable_softmax._cli.report import Report
from portable_softmax.kernels._decide import public
from portable_softmax.kernels._numba import _support
from portable_softmax.kernels._request import (
    BINARY,
    DIVERGENCES,
    ENTROPIES,
    FOLD,
    LOSSES,
    OPERATIONS,
    RUNNING,
    VJPS,
    Layout,
)

__all__ = ["DTYPES", "EVERY", "LIBRARIES", "OPERATIONS", "run"]

# What can be asked for; OPERATIONS is what is compiled without being asked for.
EVERY = (*OPERATIONS, *ENTROPIES, *DIVERGENCES, *BINARY, "logmeanexp", *RUNNING)

DTYPES = ("float32", "float64", "float16")
LIBRARIES = ("numpy", "jax")  # torch takes the kernels of NumPy's arrays

# An array of each layout: rows that are long, of some vectors, and short, few classes, and classes
# that are not last, of an array that is too large to be copied with them last.
LAYOUTS = (((2, 2000), 1), ((2, 500), 1), ((2, 50), 1), ((2, 3), 1), ((2, 5, 1000), 1))


def run(
    *,
    operations: tuple[str, ...],
    dtypes: tuple[str, ...],
    libraries: tuple[str, ...],
    report: Report,
) -> dict[str, Any]:
    """Compile each operation for each library, dtype and layout, and say what was compiled."""
    if why := _support.refusal():
        raise CommandError(why)
    folders = import_module("portable_softmax.kernels._numba._folders").folders()
    if folders.written is None:
        why = "; ".join(folders.refused) or "there is no folder that can be written"
        raise CommandError(f"{why}: set NUMBA_CACHE_DIR to a folder of your own")
    calls = [
        (library, operation, dtype, layout)
        for library, operation, dtype, layout in product(libraries, operations, dtypes, LAYOUTS)
    ]
    began, before = perf_counter(), _counts()
    with report.steps("kernel", len(calls)) as step, kernels.use("numba rows"):
        for library, operation, dtype, (shape, axis) in calls:
            step(f"{operation}, {dtype}, {'x'.join(map(str, shape))}")
            _COMPILED[library](operation, np.zeros(shape, dtype), axis)
    loaded, compiled = (now - then for now, then in zip(_counts(), before, strict=True))
    seconds = perf_counter() - began
    report.line(
        f"{compiled} kernels compiled and {loaded} loaded in {seconds:.1f} s, kept in "
        f"{folders.written}"
    )
    return {
        "compiled": compiled,
        "loaded": loaded,
        "seconds": seconds,
        "folder": str(folders.written),
    }


def _call(operation: str, x: Any, axis: int) -> None:
    arrays: tuple[Any, ...] = (x,)
    if operation in (*VJPS, *DIVERGENCES, *BINARY, RUNNING[1]):
        arrays = (x, x)
    elif operation in LOSSES:
        arrays = (x, np.zeros([n for a, n in enumerate(x.shape) if a != axis], np.int64))
    along = {} if operation in BINARY else {"axis": axis}
    public(operation)(*arrays, **along)


def _make_handler(operation: str, x: Any, axis: int) -> None:
    """Compile what XLA would call; nothing of JAX is needed for that."""
    ffi, (outer, n) = import_module("portable_softmax.kernels._numba._ffi"), x.shape[: axis + 1]
    few = np.zeros((outer, *x.shape[axis + 1 :]), x.dtype)
    compute = few.astype(np.result_type(x.dtype, np.float32))
    buffers, loss = {"x": x, "out": x}, None
    if operation in (*VJPS, *DIVERGENCES, RUNNING[1]):
        buffers["second"] = x
    if operation in ("logsumexp", *ENTROPIES):
        buffers["out"] = few
    elif operation in DIVERGENCES:
        buffers["out"] = compute
    elif operation == "logmeanexp":
        operation = FOLD
        buffers |= {"out": compute, "grad": compute}
    elif operation in BINARY:
        loss = ffi.Loss(True, False, True, None, 1.0, False, False)
        labels, reduced = (np.zeros(shape, compute.dtype) for shape in (x.shape, ()))
        buffers |= {"second": labels, "out": reduced}
    elif operation in LOSSES:
        loss = ffi.Loss(True, True, False, None, 1.0, False, False)
        buffers |= {"second": few.astype(np.int32), "out": compute}
    if operation.endswith("_value_and_grad"):
        buffers["grad"] = x
    if operation == DIVERGENCES[1]:
        buffers |= {"numbers": np.zeros(1, compute.dtype), "other": x}
    layout = Layout(outer, n, math.prod(x.shape[axis + 1 :]))
    ffi.target(lambda name, address: None, operation, layout, buffers, loss)


_COMPILED = {"numpy": _call, "jax": _make_handler}


def _counts() -> tuple[int, int]:
    """Return how many kernels this process has loaded and compiled."""
    tables = import_module("portable_softmax.kernels._numba._driver").tables()
    layouts = [layout for table in tables for layout in table.values()]
    stats = [kernel.stats for layout in layouts for kernel in layout.values()]
    handlers = import_module("portable_softmax.kernels._numba._ffi").made()
    loaded = sum(handler.cache_hits for handler in handlers)
    return (
        sum(sum(s.cache_hits.values()) for s in stats) + loaded,
        sum(sum(s.cache_misses.values()) for s in stats) + len(handlers) - loaded,
    )
