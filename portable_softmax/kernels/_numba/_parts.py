"""What is compiled for a part of a row: the entries [lo, hi) of row `i`, for few and long rows.

Maxima and sums of the parts are put together outside, then every part is read again.
"""

from __future__ import annotations

from numba import njit

from portable_softmax.kernels._numba import _rows
from portable_softmax.kernels._numba._across import across_sum
from portable_softmax.kernels._numba._exp import DOWN, exp_up
from portable_softmax.kernels._numba._ir import ahead, load, pointer, store, typed
from portable_softmax.kernels._numba._store import kept
from portable_softmax.kernels._numba._vectors import over, splat

function = njit(nogil=True, error_model="numpy")


@kept
@function
def top(x, i, lo, hi):
    """Return the maximum."""
    return float(_rows.top(ahead(pointer(x), i * x.shape[1] + lo), hi - lo))


@kept
@function
def plain(x, t, m, i, lo, hi):
    """Return the sum of exp(x - m)."""
    p = ahead(pointer(x), i * x.shape[1] + lo)
    return float(across_sum(_rows.exps(p, 0, hi - lo, splat(p, m), t))) * DOWN


@kept
@function
def careful(x, t, m, i, lo, hi):
    """Return the same sum without its maxima, to the last digits, and how many these are."""
    p = ahead(pointer(x), i * x.shape[1] + lo)
    below, tops = _rows.careful_sum(p, hi - lo, typed(p, m), t)
    return float(below) * DOWN, tops


@kept
@function
def exps(x, out, t, m, factor, i, lo, hi):
    """Write exp(x - m) * factor."""
    at = i * x.shape[1] + lo
    p, o = ahead(pointer(x), at), ahead(pointer(out), at)
    m, factor, down = typed(p, m), typed(p, factor), typed(p, DOWN)
    for j in range(hi - lo):
        store(o, j, exp_up(over(load(p, j) - m, t)) * factor * down)


@kept
@function
def logs(x, out, t, m, log, i, lo, hi):
    """Write (x - m) - log."""
    at = i * x.shape[1] + lo
    p, o = ahead(pointer(x), at), ahead(pointer(out), at)
    _rows.write_logs(p, o, hi - lo, splat(p, m), t, splat(p, log))
