"""Rows of few classes, one after the other in memory: a layout, see `_rows`.

A vector would hold little of one row. A group is copied to a tile with a row in each lane, and
worked on as in `_columns`.
"""

from __future__ import annotations

from portable_softmax.kernels._numba import _blocks, _columns, _rows
from portable_softmax.kernels._numba._jit import function
from portable_softmax.kernels._numba._memory import ahead, load, smaller, store, typed
from portable_softmax.kernels._numba._vectors import lanes

LONG = False
place, position, slopes_at = _blocks.place, _rows.position, _columns.slopes_at
height, element, target, scratch = (
    _columns.height,
    _columns.element,
    _columns.target,
    _columns.scratch,
)
step, get, put, stride, value, length, source, writing = (
    _columns.step,
    _columns.get,
    _columns.put,
    _columns.stride,
    _columns.value,
    _columns.length,
    _columns.source,
    _columns.writing,
)
store_partial, reduce_partials = _columns.store_partial, _columns.reduce_partials
store_rare, whole = _columns.store_rare, _columns.whole
most, keep = _columns.most, _columns.keep
write_sums, fold = _columns.write_sums, _columns.fold


@function
def fetch(p, tile, workspace, T, n, inner, rows):
    """Copy a group to a tile; the last vector's other lanes are rows of zeros."""
    L, copied = lanes(workspace), target(p, tile, workspace, T, n)
    whole = rows - rows % L
    for r in range(0, whole, L):
        x, y = ahead(p, r * n), ahead(copied, r * n)
        for j in range(n):
            for i in range(L):
                store(y, j * L + i, load(x, i * n + j))
    if whole < rows:
        x, y = ahead(p, whole * n), ahead(copied, whole * n)
        for j in range(n):
            for i in range(L):
                v = load(x, i * n + j) if whole + i < rows else typed(workspace, 0.0)
                store(y, j * L + i, v)
    return copied


@function
def deliver(written, o, T, n, inner, rows):
    """Copy a tile to its group."""
    L = lanes(written)
    for r in range(0, rows, L):
        x, y = ahead(written, r * n), ahead(o, r * n)
        for i in range(smaller(L, rows - r)):
            for j in range(n):
                store(y, i * n + j, load(x, j * L + i))
