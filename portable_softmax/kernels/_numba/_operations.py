"""The operations on a group of rows, in any layout.

`p` and `q` are where the group is, `o` where its result goes, and T is the height of the group.
"""

from __future__ import annotations

import math

from portable_softmax.kernels._numba._exp import log1p, plus_log1p
from portable_softmax.kernels._numba._horizontal import are_equal
from portable_softmax.kernels._numba._jit import function
from portable_softmax.kernels._numba._memory import ahead, typed
from portable_softmax.kernels._numba._passes import (
    gradients,
    log_probability,
    log_softmax_vjp_entry,
    log_softmax_vjp_entry_of_many,
    probability,
    products,
    products_less,
    sums,
    write_softmax_vjp,
)
from portable_softmax.kernels._numba._values import (
    CONSTANT,
    INVERSE,
    LOGSUMEXP,
    LOSS,
    MAX,
    REST,
    SUM,
    TOTAL,
    WEIGHT,
    values,
)
from portable_softmax.kernels._numba._vectors import where_at_least, where_equal, where_finite
from portable_softmax.portable import CONFIDENT


def softmax_of(layout):
    @function
    def inverse_sum(workspace, T, r):
        return (layout.value(values(workspace, SUM, T), r),)

    write_probabilities = layout.writing(probability, inverse_sum)

    @function
    def softmax(p, o, n, rows, T, workspace, t):
        e, sums = layout.scratch(o, workspace, T, n, 0), values(workspace, SUM, T)
        layout.write_sums(p, e, o, n, rows, T, workspace, t)
        for r in range(0, T, layout.step(workspace)):
            layout.put(sums, r, typed(workspace, 1.0) / layout.get(sums, r))
        write_probabilities(e, 0.0, o, n, rows, T, workspace, ())

    return softmax


def log_softmax_of(layout):
    @function
    def maximum_and_log(workspace, T, r):
        return layout.value(values(workspace, MAX, T), r), layout.value(
            values(workspace, REST, T), r
        )

    write_logs = layout.writing(log_probability, maximum_and_log)

    @function
    def log_softmax(p, o, n, rows, T, workspace, t):
        logs = values(workspace, REST, T)
        layout.fold(p, 0, o, n, rows, T, workspace, t)
        for r in range(0, T, layout.step(workspace)):
            layout.put(logs, r, log1p(layout.get(logs, r)))
        write_logs(p, 0.0, o, n, rows, T, workspace, (t,))

    return log_softmax


def fold_of(layout):
    @function
    def fold(p, n, rows, T, workspace, t):
        """Write the state of rows to the values: (-inf, -1) of nothing, a nan with what is nan."""
        layout.fold(p, 0, 0, n, rows, T, workspace, t)
        maxima, rests = values(workspace, MAX, T), values(workspace, REST, T)
        for r in range(0, T, layout.step(workspace)):
            m, rest = layout.get(maxima, r), layout.get(rests, r)
            of_infinity = where_equal(m, -math.inf, -1.0, math.nan)
            layout.put(maxima, r, where_finite(m, where_finite(rest, m, math.nan), m))
            layout.put(rests, r, where_finite(m, rest, of_infinity))

    return fold


def logsumexp_of(layout):
    @function
    def logsumexp(p, n, rows, T, workspace):
        """Write max + log1p(rest) to the values; an infinite maximum as it is."""
        layout.fold(p, 0, 0, n, rows, T, workspace, 1)
        for r in range(0, T, layout.step(workspace)):
            m, rest = (
                layout.get(values(workspace, MAX, T), r),
                layout.get(values(workspace, REST, T), r),
            )
            layout.put(values(workspace, LOGSUMEXP, T), r, where_finite(m, plus_log1p(m, rest), m))

    return logsumexp


def logsumexp_vjp_of(layout):
    @function
    def share_of_upstream(workspace, T, r):
        return (layout.value(values(workspace, SUM, T), r),)

    write_probabilities = layout.writing(probability, share_of_upstream)

    @function
    def logsumexp_vjp(p, o, n, rows, T, workspace):
        """Write softmax times the upstream gradients, which are among the values."""
        e, sums = layout.scratch(o, workspace, T, n, 0), values(workspace, SUM, T)
        layout.write_sums(p, e, o, n, rows, T, workspace, 1)
        for r in range(0, T, layout.step(workspace)):
            dy = layout.get(values(workspace, WEIGHT, T), r)
            layout.put(sums, r, dy / layout.get(sums, r))
        write_probabilities(e, 0.0, o, n, rows, T, workspace, ())

    return logsumexp_vjp


def logsumexp_value_and_grad_of(layout):
    @function
    def inverse_sum(workspace, T, r):
        return (layout.value(values(workspace, INVERSE, T), r),)

    write_probabilities = layout.writing(probability, inverse_sum)

    @function
    def logsumexp_value_and_grad(p, o, n, rows, T, workspace):
        """Write the answers to the values, as losses, and softmax to `o`."""
        e = layout.scratch(o, workspace, T, n, 0)
        layout.fold(p, e, e, n, rows, T, workspace, 1)
        for r in range(0, T, layout.step(workspace)):
            m, rest = (
                layout.get(values(workspace, MAX, T), r),
                layout.get(values(workspace, REST, T), r),
            )
            total = layout.get(values(workspace, TOTAL, T), r)
            layout.put(values(workspace, LOSS, T), r, where_finite(m, plus_log1p(m, rest), m))
            layout.put(values(workspace, INVERSE, T), r, typed(workspace, 1.0) / total)
        write_probabilities(e, 0.0, o, n, rows, T, workspace, ())

    return logsumexp_value_and_grad


def softmax_vjp_of(layout):
    @function
    def softmax_vjp(p, q, o, n, rows, T, workspace, off):
        """Write y * (dy - sum(y * dy)), less a constant of dy in a confident row: see portable.

        `off` is how far from 1 the sum of a softmax may be.
        """
        size, off = layout.length(workspace, n), typed(workspace, off)
        zero, one = typed(workspace, 0.0), typed(workspace, 1.0)
        bound = typed(workspace, CONFIDENT)
        for r in range(0, rows, layout.stride(workspace)):
            at = r * n
            s, c = products(ahead(p, at), ahead(q, at), size, bound)
            layout.store_partial(workspace, T, SUM, r, s)
            layout.store_rare(workspace, T, CONSTANT, r, c)
        layout.reduce_partials(workspace, T, SUM)
        for r in range(0, rows, layout.stride(workspace)):
            at, s = r * n, layout.value(values(workspace, SUM, T), r)
            c = layout.value(values(workspace, CONSTANT, T), r)
            if not are_equal(c, 0.0):
                y, dy = ahead(p, at), ahead(q, at)
                beyond = layout.whole(sums(y, dy, size, ())) - one
                less = layout.whole(products_less(y, dy, size, (c,)))
                fits = where_at_least(off, beyond, where_at_least(beyond, -off, one, zero), zero)
                fits = where_finite(c, fits, zero)
                s, c = where_equal(fits, one, less, s), where_equal(fits, one, c, zero)
            write_softmax_vjp(ahead(p, at), ahead(q, at), ahead(o, at), size, (c, s))

    return softmax_vjp


def log_softmax_vjp_of(layout):
    @function
    def sum_of_upstream(workspace, T, r):
        return (layout.value(values(workspace, SUM, T), r),)

    entry = log_softmax_vjp_entry_of_many if layout.LONG else log_softmax_vjp_entry
    write_vjp = layout.writing(entry, sum_of_upstream, own=True)

    @function
    def log_softmax_vjp(p, q, o, n, rows, T, workspace, left_out):
        """Write dy - exp(log_y) * sum(dy), `dy` counting as 0 where log_y is +-left_out."""
        size, left_out = layout.length(workspace, n), typed(workspace, left_out)
        for r in range(0, rows, layout.stride(workspace)):
            at = r * n
            layout.store_partial(
                workspace, T, SUM, r, gradients(ahead(p, at), ahead(q, at), size, (left_out,))
            )
        layout.reduce_partials(workspace, T, SUM)
        write_vjp(p, q, o, n, rows, T, workspace, (left_out,))

    return log_softmax_vjp
