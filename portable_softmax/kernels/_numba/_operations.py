"""The operations on a group of rows, in any layout.

`p` and `q` are where the group is, `o` where its result goes, and T is the height of the group.
"""

from __future__ import annotations

from portable_softmax.kernels._numba._exp import log1p
from portable_softmax.kernels._numba._jit import function
from portable_softmax.kernels._numba._memory import ahead, typed
from portable_softmax.kernels._numba._passes import (
    gradients,
    log_probability,
    probability,
    products,
    write_log_softmax_vjp,
    write_softmax_vjp,
)
from portable_softmax.kernels._numba._values import LOGSUMEXP, MAX, REST, SUM, values
from portable_softmax.kernels._numba._vectors import where_finite


def softmax_of(layout):
    @function
    def inverse_sum(room, T, r):
        return (layout.value(values(room, SUM, T), r),)

    write_probabilities = layout.writing(probability, inverse_sum)

    @function
    def softmax(p, o, n, rows, T, room, t):
        e, sums = layout.scratch(o, room, T, n), values(room, SUM, T)
        layout.write_sums(p, e, o, n, rows, T, room, t)
        for r in range(0, T, layout.step(room)):
            layout.put(sums, r, typed(room, 1.0) / layout.get(sums, r))
        write_probabilities(e, 0.0, o, n, rows, T, room, ())

    return softmax


def log_softmax_of(layout):
    @function
    def maximum_and_log(room, T, r):
        return layout.value(values(room, MAX, T), r), layout.value(values(room, REST, T), r)

    write_logs = layout.writing(log_probability, maximum_and_log)

    @function
    def log_softmax(p, o, n, rows, T, room, t):
        logs = values(room, REST, T)
        layout.fold(p, 0, o, n, rows, T, room, t)
        for r in range(0, T, layout.step(room)):
            layout.put(logs, r, log1p(layout.get(logs, r)))
        write_logs(p, 0.0, o, n, rows, T, room, (t,))

    return log_softmax


def logsumexp_of(layout):
    @function
    def logsumexp(p, n, rows, T, room):
        """Write max + log1p(rest) to the values; an infinite maximum as it is."""
        layout.fold(p, 0, 0, n, rows, T, room, 1)
        for r in range(0, T, layout.step(room)):
            m, rest = layout.get(values(room, MAX, T), r), layout.get(values(room, REST, T), r)
            layout.put(values(room, LOGSUMEXP, T), r, where_finite(m, m + log1p(rest), m))

    return logsumexp


def softmax_vjp_of(layout):
    @function
    def softmax_vjp(p, q, o, n, rows, T, room, _):
        """Write y * (dy - sum(y * dy))."""
        size = layout.length(room, n)
        for r in range(0, rows, layout.stride(room)):
            at = r * n
            layout.keep(room, T, SUM, r, products(ahead(p, at), ahead(q, at), size, ()))
        layout.reduce(room, T, SUM)
        for r in range(0, rows, layout.stride(room)):
            at, s = r * n, layout.value(values(room, SUM, T), r)
            write_softmax_vjp(ahead(p, at), ahead(q, at), ahead(o, at), size, (s,))

    return softmax_vjp


def log_softmax_vjp_of(layout):
    @function
    def log_softmax_vjp(p, q, o, n, rows, T, room, left_out):
        """Write dy - exp(log_y) * sum(dy), `dy` counting as 0 where log_y is +-left_out."""
        size, left_out = layout.length(room, n), typed(room, left_out)
        for r in range(0, rows, layout.stride(room)):
            at = r * n
            layout.keep(room, T, SUM, r, gradients(ahead(p, at), ahead(q, at), size, (left_out,)))
        layout.reduce(room, T, SUM)
        for r in range(0, rows, layout.stride(room)):
            at, numbers = r * n, (left_out, layout.value(values(room, SUM, T), r))
            write_log_softmax_vjp(ahead(p, at), ahead(q, at), ahead(o, at), size, numbers)

    return log_softmax_vjp
