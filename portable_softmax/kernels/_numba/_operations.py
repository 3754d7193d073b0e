"""The operations on a group of rows, in any layout.

`p` and `q` are where the group is, `o` where its result goes, and T is the height of the group.
"""

from __future__ import annotations

from portable_softmax.kernels._numba import _long
from portable_softmax.kernels._numba._exp import log1p
from portable_softmax.kernels._numba._jit import function
from portable_softmax.kernels._numba._long import PART
from portable_softmax.kernels._numba._memory import ahead, load, typed
from portable_softmax.kernels._numba._passes import (
    gradients,
    products,
    write_log_softmax_vjp,
    write_logs,
    write_probabilities,
    write_softmax_vjp,
)
from portable_softmax.kernels._numba._values import (
    LOGSUMEXP,
    MAX,
    REST,
    SUM,
    after_values,
    values,
)
from portable_softmax.kernels._numba._vectors import where_finite


def from_exps(layout, write_row):
    """Return what applies a pass to the exps of a group's r-th row, whatever parts it is cut into.

    The first of the pass's numbers is the factor that the exps have to be multiplied by.
    """
    cuts = layout.CUTS

    @function
    def run(e, q, o, n, r, T, room, numbers):
        e, o, size = ahead(e, r * n), ahead(o, r * n), layout.length(room, n)
        if cuts:
            if n > PART:
                for j in range(0, n, PART):
                    factor, k = _long.factor_of(after_values(room, T), j), min(PART, n - j)
                    own = (load(factor, 0), *numbers)
                    write_row(ahead(e, j), ahead(q, j), ahead(o, j), k, own)
                return
        write_row(e, q, o, size, (typed(room, 1.0), *numbers))

    return run


def softmax_of(layout):
    write_row = from_exps(layout, write_probabilities)

    @function
    def softmax(p, o, n, rows, T, room, t):
        e, sums = layout.scratch(o, room, T, n), values(room, SUM, T)
        layout.write_sums(p, e, o, n, rows, T, room, t)
        for r in range(0, T, layout.step(room)):
            layout.put(sums, r, typed(room, 1.0) / layout.get(sums, r))
        for r in range(0, rows, layout.stride(room)):
            write_row(e, 0.0, o, n, r, T, room, (layout.value(sums, r),))

    return softmax


def log_softmax_of(layout):
    @function
    def log_softmax(p, o, n, rows, T, room, t):
        logs = values(room, REST, T)
        layout.fold(p, 0, o, n, rows, T, room, t)
        for r in range(0, T, layout.step(room)):
            layout.put(logs, r, log1p(layout.get(logs, r)))
        for r in range(0, rows, layout.stride(room)):
            numbers = layout.value(values(room, MAX, T), r), t, layout.value(logs, r)
            at = r * n
            write_logs(ahead(p, at), 0.0, ahead(o, at), layout.length(room, n), numbers)

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
