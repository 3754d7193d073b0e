"""One row that is longer than the first cache holds, part after part.

A part is read from memory once: its maximum is found and its exps are taken while it is in the
first cache, relative to the largest maximum so far (Milakov & Gimelshein, 2018). Its sum is kept
with that maximum and brought to the row's at the end, so that each sum is scaled once. `kept` has
space for KEPT numbers a part.
"""

from __future__ import annotations

import math

from numba import njit

from portable_softmax.kernels._numba._across import across_max, across_sum
from portable_softmax.kernels._numba._exp import DOWN, exp, log1p
from portable_softmax.kernels._numba._ir import ahead, either, load, store, typed
from portable_softmax.kernels._numba._rows import (
    added,
    exps,
    is_plenty,
    settled_fold,
    tops,
    write_logs,
    write_scaled,
)
from portable_softmax.kernels._numba._vectors import larger, over, splat

function = njit(nogil=True, error_model="numpy")

# Classes of a part.
PART = 1 << 12
KEPT = 2


def room(n: int) -> int:
    """Return how many numbers are kept of a row."""
    return KEPT * -(-n // PART)


@function
def total(p, e, n, t, kept):
    """Return the maximum and the sum of the exps times UP.

    What a part's exps, which go to `e` unless it is 0, have to be multiplied by, is kept.
    """
    m, zero = typed(p, -math.inf), typed(p, 0.0)
    for start in range(0, n, PART):
        k, x, y, own = min(PART, n - start), ahead(p, start), ahead(e, start), at(kept, start)
        m = larger(m, across_max(tops(x, k)))
        if m == -math.inf:  # nothing yet, or a nan
            s = across_sum(exps(x, y, k, splat(p, 0.0), t))
            store(own, 1, s - s)
        else:
            store(own, 1, across_sum(exps(x, y, k, splat(p, m), t)))
        store(own, 0, m)
    total = lost = zero
    for start in range(0, n, PART):
        own = at(kept, start)
        base = load(own, 0)
        factor = zero if base == -math.inf else exp(over(base - m, t))
        store(own, 0, factor)
        total, lost = added(total, lost, load(own, 1) * factor)
    # A row of nothing but -inf has no sum.
    return m, (total + lost) + (m - m)


@function
def at(kept, start):
    """Where the numbers of a part are."""
    return ahead(kept, start // PART * KEPT)


@function
def fold(p, e, n, t, kept):
    """As `_rows.fold`, but for the factors of the exps in `e`."""
    m, s = total(p, e, n, t, kept)
    rest = s * typed(p, DOWN) - typed(p, 1.0)
    if not is_plenty(rest, n):
        m, rest = settled_fold(p, n, m, rest, t)
    return m, rest


@function
def softmax(p, scratch, o, n, t, kept):
    """As `_rows.softmax`."""
    e = either(o, scratch)
    _, s = total(p, e, n, t, kept)
    q = splat(p, typed(p, 1.0) / s)
    for start in range(0, n, PART):
        k, factor = min(PART, n - start), splat(p, load(at(kept, start), 0))
        write_scaled(ahead(e, start), ahead(o, start), k, factor, q)


@function
def log_softmax(p, o, n, t, kept):
    """As `_rows.log_softmax`."""
    m, rest = fold(p, 0, n, t, kept)
    write_logs(p, o, n, splat(p, m), t, splat(p, log1p(rest)))
