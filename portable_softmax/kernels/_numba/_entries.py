"""What is compiled: one function for each operation, on pieces of two-dimensional arrays.

`x` holds rows of `n` classes. With `inner` = 1 they lie in memory one after the other, `x` has
the shape (rows, n) and a piece is the rows [lo, hi). Otherwise the classes of a row lie `inner`
apart, `x` has the shape (outer * n, inner) and a piece is the blocks [lo, hi) of `T` neighbours.
Rows are worked on `T` at a time, one a lane, or one by one if `T` is 0.

All arrays are C-contiguous. `tile` holds T * (n + 5) numbers of the computation; without lanes a
row, if the array has another dtype.
"""

from __future__ import annotations

from numba import njit

from portable_softmax.kernels._numba import _lanes, _rows
from portable_softmax.kernels._numba._ir import ahead, either, pointer
from portable_softmax.kernels._numba._store import kept

function = njit(nogil=True, error_model="numpy")


@kept
@function
def softmax(x, out, t, tile, T, n, inner, lo, hi):
    p, o, e = pointer(x), pointer(out), pointer(tile)
    if T == 0:
        for i in range(lo, hi):
            row = ahead(o, i * n)
            _rows.softmax(ahead(p, i * n), either(row, e), row, n, t)
        return
    step = T if inner == 1 else 1
    for i in range(lo, hi, step):
        at, rows = _lanes.block(i, hi, T, n, inner)
        _lanes.fetch(ahead(p, at), e, T, n, inner, rows)
        _lanes.softmax(e, n, T, ahead(e, n * T), t)
        _lanes.deliver(e, ahead(o, at), T, n, inner, rows)
