"""Sums of weighted exponentials and the gradients through them, in any layout.

An entry of weight 0 does not count, whatever it holds. A row is worked on at once.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

from portable_softmax.kernels._numba._compensation import added, compensated
from portable_softmax.kernels._numba._exp import exp_up, reference_of
from portable_softmax.kernels._numba._jit import function
from portable_softmax.kernels._numba._kernels import MODULES, threaded
from portable_softmax.kernels._numba._memory import ahead, copy, pointer, smaller, typed
from portable_softmax.kernels._numba._passes import RUN
from portable_softmax.kernels._numba._values import MAX, REST, WEIGHT, values
from portable_softmax.kernels._numba._vectors import (
    lanes,
    larger,
    read,
    splat,
    where_at_least,
    where_equal,
    write,
)
from portable_softmax.kernels._request import WEIGHTED


@function
def _counted(p, q, j, k):
    """A vector of logits, -inf where the weight is 0."""
    return where_equal(read(q, j, k, 0.0), 0.0, -math.inf, read(p, j, k, 0.0))


@function
def _maxima(p, q, n):
    """The maxima of what counts. A nan is passed over if a number follows it."""
    L = lanes(p)
    a = b = splat(p, -math.inf)
    j = 0
    while j + 2 * L <= n:
        a = larger(a, _counted(p, q, j, None))
        b = larger(b, _counted(p, q, j + L, None))
        j += 2 * L
    while j + L <= n:
        a = larger(a, _counted(p, q, j, None))
        j += L
    if j < n:
        b = larger(b, _counted(p, q, j, n - j))
    return larger(a, b)


@function
def _terms(x, w, m, at):
    """The weights at the maximum, and the other terms."""
    term = where_equal(w, 0.0, 0.0, w * exp_up(x, at, 1))
    return where_equal(x, m, w, 0.0), where_equal(x, m, 0.0, term)


@function
def _sums(p, q, n, m, at):
    """The sums of both."""
    L = lanes(p)
    tops = lost = others = lower = zero = splat(p, 0.0)
    j = 0
    while j + L <= n:
        s = v = zero
        stop = smaller(j + RUN * L, n) - L
        while j <= stop:
            top, term = _terms(read(p, j, None, 0.0), read(q, j, None, 0.0), m, at)
            s, v = s + top, v + term
            j += L
        (tops, lost), (others, lower) = added(tops, lost, s), added(others, lower, v)
    if j < n:
        s, v = _terms(read(p, j, n - j, -math.inf), read(q, j, n - j, 0.0), m, at)
        (tops, lost), (others, lower) = added(tops, lost, s), added(others, lower, v)
    return compensated(tops, lost), compensated(others, lower)


def _weighted(layout: ModuleType, operation: str) -> Any:
    """Return the sums of rows.

    arrays = (logits, weights, maxima, sums of weights at these, sums of the other terms). The
    weights repeat along the logits.
    """

    def work(arrays, numbers, shape, workspace, lo, hi, piece):
        p, q = pointer(arrays[0]), pointer(arrays[1])
        n, inner, T = shape[0], shape[1], layout.height(workspace, shape[2])
        maxima, tops, rests = (
            values(workspace, MAX, T),
            values(workspace, WEIGHT, T),
            values(workspace, REST, T),
        )
        size = layout.length(workspace, n)
        for i in range(lo, hi):
            at, rows, first = layout.place(i, T, n, inner)
            group = layout.fetch(ahead(p, at), 0, workspace, T, n, inner, rows)
            own = ahead(q, at % arrays[1].size)
            those = layout.fetch(own, 1, workspace, T, n, inner, rows)
            for r in range(0, rows, layout.stride(workspace)):
                x, w = ahead(group, r * n), ahead(those, r * n)
                m = layout.most(_maxima(x, w, size))
                its = reference_of(m, 1)
                top, others = _sums(x, w, size, m, its)
                layout.keep(maxima, r, m)
                layout.keep(tops, r, layout.whole(top))
                rest = layout.whole(others)
                # Where nothing counts, or -inf alone, there is no rest, if no nan is passed over.
                rest = where_equal(m, -math.inf, rest, rest / exp_up(m, its, 1))
                layout.keep(rests, r, rest)
            copy(maxima, ahead(pointer(arrays[2]), first), rows)
            copy(tops, ahead(pointer(arrays[3]), first), rows)
            copy(rests, ahead(pointer(arrays[4]), first), rows)

    return threaded(f"{layout.__name__}.{operation}", work)


# --------------------------------------------------------------------------- gradients


@function
def _write_slopes(p, q, o, d, n, m, at, factor, bound):
    """Write what is in `_slopes`; return how many logits are not below the maximum by `bound`."""
    L = lanes(p)
    beyond = splat(p, 0.0)
    for j in range(0, n - n % L, L):
        x, w = read(p, j, None, 0.0), read(q, j, None, 0.0)
        e = exp_up(x, at, 1) * factor
        write(o, j, where_equal(w, 0.0, 0.0, w * e), None)
        write(d, j, e, None)
        beyond = beyond + where_at_least(bound, x - m, 0.0, 1.0)
    k = n % L
    if k:
        j = n - k
        x, w = read(p, j, k, -math.inf), read(q, j, k, 0.0)
        e = exp_up(x, at, 1) * factor
        write(o, j, where_equal(w, 0.0, 0.0, w * e), k)
        write(d, j, e, k)
        beyond = beyond + where_at_least(bound, x - m, 0.0, 1.0)
    return beyond


def _slopes(layout: ModuleType, operation: str, by_b: bool) -> Any:
    """Return exp(x - m) times a factor, times the weight; and without it if it is `by_b`.

    arrays = (logits, weights, maxima, factors, result, numbers of what is beyond a bound, the
    result without weights or not), numbers = (the bound,). Exps of what is beyond are anything.
    """

    def work(arrays, numbers, shape, workspace, lo, hi, piece):
        p, q, o = pointer(arrays[0]), pointer(arrays[1]), pointer(arrays[4])
        n, inner, T = shape[0], shape[1], layout.height(workspace, shape[2])
        maxima, factors, counts = (
            values(workspace, MAX, T),
            values(workspace, WEIGHT, T),
            values(workspace, REST, T),
        )
        size, bound = layout.length(workspace, n), typed(workspace, numbers[0])
        for i in range(lo, hi):
            at, rows, first = layout.place(i, T, n, inner)
            group = layout.fetch(ahead(p, at), 0, workspace, T, n, inner, rows)
            own = ahead(q, at % arrays[1].size)
            those = layout.fetch(own, 1, workspace, T, n, inner, rows)
            copy(ahead(pointer(arrays[2]), first), maxima, rows)
            copy(ahead(pointer(arrays[3]), first), factors, rows)
            y = layout.target(ahead(o, at), 0, workspace, T, n)
            if by_b:
                place = ahead(pointer(arrays[6]), at)
                d = layout.target(place, 1, workspace, T, n)
            else:
                d = 0
            for r in range(0, rows, layout.stride(workspace)):
                x, w = ahead(group, r * n), ahead(those, r * n)
                m = layout.value(maxima, r)
                its = reference_of(m, 1)
                factor = layout.value(factors, r) / exp_up(m, its, 1)
                beyond = _write_slopes(
                    x, w, ahead(y, r * n), ahead(d, r * n), size, m, its, factor, bound
                )
                layout.keep(counts, r, layout.whole(beyond))
            copy(counts, ahead(pointer(arrays[5]), first), rows)
            layout.deliver(y, ahead(o, at), T, n, inner, rows)
            if by_b:
                layout.deliver(d, place, T, n, inner, rows)

    return threaded(f"{layout.__name__}.{operation}", work)


def _kernels(layout: ModuleType) -> dict[str, Any]:
    sums, slopes, both = WEIGHTED
    return {
        sums: _weighted(layout, sums),
        slopes: _slopes(layout, slopes, False),
        both: _slopes(layout, both, True),
    }


LAYOUTS = {name: _kernels(layout) for name, layout in MODULES.items()}
