"""softmax and log_softmax with a sink, and the gradients through them, in any layout.

A row is folded as without its sink, which then joins the state: what is left to do is done once a
row. Sinks, and the share of each in the probability, are one number per row.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

from portable_softmax.kernels._numba import _operations
from portable_softmax.kernels._numba._exp import exp_up, exponent, log1p, reference_of
from portable_softmax.kernels._numba._horizontal import are_equal
from portable_softmax.kernels._numba._jit import function
from portable_softmax.kernels._numba._kernels import MODULES, leaving_out, threaded
from portable_softmax.kernels._numba._long import ratio
from portable_softmax.kernels._numba._memory import (
    ahead,
    copy,
    load,
    logits,
    pointer,
    store,
    typed,
)
from portable_softmax.kernels._numba._passes import products, products_less, write_softmax_vjp
from portable_softmax.kernels._numba._values import (
    CONSTANT,
    LOSS,
    MAX,
    REST,
    SUM,
    WEIGHT,
    values,
)
from portable_softmax.kernels._numba._vectors import (
    larger,
    where_at_least,
    where_equal,
    where_finite,
)
from portable_softmax.kernels._request import BESIDE_SINKS
from portable_softmax.portable import CONFIDENT

SHARE = LOSS  # of the sink in the probability, or its logarithm


@function
def _probability(e, _, numbers):
    factor, own, inverse = numbers
    return e * factor * own * inverse


def _softmax_of(layout: ModuleType) -> Any:
    @function
    def factor_and_inverse(workspace, T, r):
        own = layout.value(values(workspace, WEIGHT, T), r)
        return own, layout.value(values(workspace, SUM, T), r)

    write_probabilities = layout.writing(_probability, factor_and_inverse)

    @function
    def softmax(p, o, n, rows, T, workspace, t):
        """Write the probabilities beside the sinks, which are among the values.

        What exps are to be multiplied by takes the place of a sink: it is below 1 where that is the
        largest of its row.
        """
        e, sums = layout.scratch(o, workspace, T, n, 0), values(workspace, SUM, T)
        sinks, shares = values(workspace, WEIGHT, T), values(workspace, SHARE, T)
        layout.write_sums(p, e, o, n, rows, T, workspace, t)
        for r in range(0, T, layout.step(workspace)):
            m, sink = layout.get(values(workspace, MAX, T), r), layout.get(sinks, r)
            top = larger(m, sink)
            own, more = ratio(m, top, t), exp_up(sink, reference_of(top, t), t)
            inverse = typed(workspace, 1.0) / (layout.get(sums, r) * own + more)
            layout.put(sums, r, inverse)
            layout.put(shares, r, where_equal(m, -math.inf, 1.0, more * inverse))
            layout.put(sinks, r, own)
        write_probabilities(e, 0.0, o, n, rows, T, workspace, ())

    return softmax


def _log_softmax_of(layout: ModuleType) -> Any:
    @function
    def maximum_and_log(workspace, T, r):
        m = layout.value(values(workspace, MAX, T), r)
        return m, layout.value(values(workspace, REST, T), r)

    write_logs = layout.writing(_operations.log_probability, maximum_and_log)

    @function
    def log_softmax(p, o, n, rows, T, workspace, t):
        """Write the logarithms; the sink of a row is one more term of its rest, or its maximum."""
        maxima, rests = values(workspace, MAX, T), values(workspace, REST, T)
        one = typed(workspace, 1.0)
        layout.fold(p, 0, o, n, rows, T, workspace, t)
        for r in range(0, T, layout.step(workspace)):
            m, rest = layout.get(maxima, r), layout.get(rests, r)
            sink = layout.get(values(workspace, WEIGHT, T), r)
            top = larger(m, sink)
            at = reference_of(top, t)
            unit = exp_up(top, at, t)
            below = rest + exp_up(sink, at, t) / unit
            beyond = (one + rest) * (exp_up(m, at, t) / unit)
            beyond = where_equal(m, -math.inf, 0.0, beyond)
            log = log1p(where_at_least(m, sink, below, beyond))
            layout.put(maxima, r, top)
            layout.put(rests, r, log)
            layout.put(values(workspace, SHARE, T), r, exponent(sink, top, t) - log)
        write_logs(p, 0.0, o, n, rows, T, workspace, (t,))

    return log_softmax


def _row_by_row(layout: ModuleType, operation: str, body: Any, nothing: float) -> Any:
    """Return softmax or log_softmax.

    arrays = (logits, result, mask or None, sinks, shares), numbers = (the temperature,). The result
    is not where the logits are.
    """
    leave_out = leaving_out(layout, nothing)

    def work(arrays, numbers, shape, workspace, lo, hi, piece):
        p, o = pointer(arrays[0]), pointer(arrays[1])
        sinks, shares = pointer(arrays[3]), pointer(arrays[4])
        n, inner, T = shape[0], shape[1], layout.height(workspace, shape[2])
        for i in range(lo, hi):
            at, rows, first = layout.place(i, T, n, inner)
            group = logits(ahead(p, at), arrays[2], at)
            x = layout.fetch(group, 0, workspace, T, n, inner, rows)
            y = layout.target(ahead(o, at), 1, workspace, T, n)
            copy(ahead(sinks, first), values(workspace, WEIGHT, T), rows)
            body(x, y, n, rows, T, workspace, numbers[0])
            copy(values(workspace, SHARE, T), ahead(shares, first), rows)
            for r in range(rows):
                # Beside a larger sink a row of -inf only has a sum, which its exps have not.
                m = load(values(workspace, MAX, T), r)
                if m == -math.inf and load(sinks, first + r) > -math.inf:
                    number = typed(workspace, nothing)
                    for j in range(n):
                        v = load(x, layout.element(workspace, r, j, n))
                        number = v if v != v else number
                    for j in range(n):
                        store(y, layout.element(workspace, r, j, n), number)
            leave_out(group, y, n, inner, rows, workspace)
            layout.deliver(y, ahead(o, at), T, n, inner, rows)

    return threaded(f"{layout.__name__}.{operation}", work)


def _softmax_vjp_of(layout: ModuleType) -> Any:
    @function
    def softmax_vjp(p, q, o, n, rows, T, workspace, _):
        """Write y * (dy - sum(y * dy)), and that sum to the values, where the shares are.

        In a confident row less its constant c of dy, of which the sum has c * (1 - share).
        """
        size, bound = layout.length(workspace, n), typed(workspace, CONFIDENT)
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
                share = layout.value(values(workspace, SHARE, T), r)
                less = layout.whole(products_less(y, dy, size, (c,))) - c * share
                s, c = where_finite(c, less, s), where_finite(c, c, 0.0)
            write_softmax_vjp(ahead(p, at), ahead(q, at), ahead(o, at), size, (c, s))

    return softmax_vjp


def _vjp(layout: ModuleType, operation: str, body: Any, shared: bool) -> Any:
    """Return a vector-Jacobian product, and the sums that the gradient by the sink is made of.

    arrays = (output, upstream, result, shares, sums); the shares are read if it is `shared`.
    """

    def work(arrays, numbers, shape, workspace, lo, hi, piece):
        p, q, o = pointer(arrays[0]), pointer(arrays[1]), pointer(arrays[2])
        shares, sums = pointer(arrays[3]), pointer(arrays[4])
        n, inner, T = shape[0], shape[1], layout.height(workspace, shape[2])
        for i in range(lo, hi):
            at, rows, first = layout.place(i, T, n, inner)
            x = layout.fetch(ahead(p, at), 0, workspace, T, n, inner, rows)
            dy = layout.fetch(ahead(q, at), 1, workspace, T, n, inner, rows)
            y = layout.target(ahead(o, at), 0, workspace, T, n)
            if shared:
                copy(ahead(shares, first), values(workspace, SHARE, T), rows)
            body(x, dy, y, n, rows, T, workspace, numbers[0])
            copy(values(workspace, SUM, T), ahead(sums, first), rows)
            layout.deliver(y, ahead(o, at), T, n, inner, rows)

    return threaded(f"{layout.__name__}.{operation}", work)


def _kernels(layout: ModuleType) -> dict[str, Any]:
    log_vjp = _operations.log_softmax_vjp_of(layout)
    return {
        BESIDE_SINKS[0]: _row_by_row(layout, BESIDE_SINKS[0], _softmax_of(layout), 0.0),
        BESIDE_SINKS[1]: _row_by_row(layout, BESIDE_SINKS[1], _log_softmax_of(layout), -math.inf),
        BESIDE_SINKS[2]: _vjp(layout, BESIDE_SINKS[2], _softmax_vjp_of(layout), True),
        BESIDE_SINKS[3]: _vjp(layout, BESIDE_SINKS[3], log_vjp, False),
    }


LAYOUTS = {name: _kernels(layout) for name, layout in MODULES.items()}
