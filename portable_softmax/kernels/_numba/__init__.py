"""Fused row kernels in Numba: a row is read from memory once and worked on in cache.

This module loads nothing but NumPy. The kernels behind it are compiled when an array that is
large enough to be worth it first needs them, one operation and dtype at a time.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from portable_softmax.kernels._calls import Call, RowsCall

# Smaller arrays do not wait for a kernel to be compiled: one takes a second, once.
ENOUGH = 1 << 16
# Rows across memory are copied to a tile, which has to stay small.
LONGEST_ACROSS = 1 << 14

# What the kernels read, and as what they are handed over.
HANDED = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.uint16),
    "bfloat16": np.dtype(np.int16),
}

# Operation and dtype of the kernels that are compiled.
loaded: set[tuple[str, str]] = set()
_broken = ""


def missing() -> str:
    """Return what has to be installed."""
    if find_spec("numba") is None:
        return "numba is not installed: pip install 'portable_softmax[numba]'"
    return _broken


def refusal(call: Call) -> str:
    """Return why a call is left to the next kernel."""
    x = call.x
    name = x.dtype.name
    if why := _options(call) or _layout_refusal(call):
        return why
    if name not in HANDED or not x.dtype.isnative:
        return f"dtype: {x.dtype}"
    if x.size < ENOUGH and (call.operation, name) not in loaded:
        return f"{x.size:,} elements, fewer than {ENOUGH:,}, and nothing is loaded yet"
    return _broken or _cannot_import()


def _options(call: Call) -> str:
    if isinstance(call, RowsCall) and call.where is not None:
        return "options: where"
    return ""


def _layout_refusal(call: Call) -> str:
    x = call.x
    if x.size == 0:
        return "no elements"
    if not (x.flags.c_contiguous and x.flags.aligned):
        return "not in C order"
    layout = _layout(call)
    if layout is None:
        return "axes apart from each other"
    if layout[2] > 1 and layout[1] > LONGEST_ACROSS:
        return f"{layout[1]:,} classes along an axis that is not the last"
    return ""


def _layout(call: Any) -> tuple[int, int, int] | None:
    """Return the shape as (outer, n, inner), or None where the axes are not neighbours."""
    axes = sorted(call.axes) if hasattr(call, "axes") else [call.axis]
    first, last, shape = axes[0], axes[-1], call.x.shape
    if last - first + 1 != len(axes):
        return None
    outer = n = inner = 1
    for a, length in enumerate(shape):
        if a < first:
            outer *= length
        elif a <= last:
            n *= length
        else:
            inner *= length
    return outer, n, inner


def _cannot_import() -> str:
    global _broken
    try:
        _compiled()
    except ImportError as why:  # such as a NumPy that is newer than this Numba knows
        _broken = f"numba cannot be imported: {why}"
    return _broken


def _compiled() -> Any:
    return import_module("portable_softmax.kernels._numba._drive")


class _Alias:
    """The memory of a read-only array, as an array that may be written: Numba tells their types
    apart and would compile everything twice. The kernels write to their outputs alone."""

    def __init__(self, x: Any) -> None:
        self.owner = x
        self.__array_interface__ = {
            "shape": x.shape,
            "typestr": x.dtype.str,
            "data": (x.__array_interface__["data"][0], False),
            "version": 3,
        }


def _handed(x: Any, layout: tuple[int, int, int]) -> Any:
    """Return an array as the kernels take it."""
    outer, n, inner = layout
    x = np.asarray(x).view(HANDED[x.dtype.name])
    x = x.reshape((outer, n) if inner == 1 else (outer * n, inner))
    return x if x.flags.writeable else np.asarray(_Alias(x))


def softmax(call: RowsCall) -> Any:
    """Softmax over the axes."""
    drive, layout, x = _compiled(), _layout(call), call.x
    assert layout is not None
    out = np.empty(x.shape, call.answer)
    drive.softmax(_handed(x, layout), _handed(out, layout), drive.Layout(*layout), call.temperature)
    loaded.add((call.operation, x.dtype.name))
    return out
