"""Cross-entropy of distributions over the classes, on groups of rows in any layout.

With q the distribution, Q its sum and z the weight of the squared logsumexp,

    loss   = sum_j q_j (max - x_j) + Q log1p(rest) + z Q lse^2
    grad_j = p_j Q - q_j + p_j 2 z Q lse

where a q_j of 0 counts as 0 beside an infinity. p_j Q - q_j is computed as in `_losses`.
"""

from __future__ import annotations

from portable_softmax.kernels._numba._exp import log1p
from portable_softmax.kernels._numba._jit import function
from portable_softmax.kernels._numba._memory import ahead, total, typed
from portable_softmax.kernels._numba._passes import distribution, soft_gradient
from portable_softmax.kernels._numba._values import (
    FACTOR,
    GAPS,
    INVERSE,
    LOSS,
    MAX,
    REST,
    SLOPE,
    UNIT,
    WEIGHT,
    values,
)
from portable_softmax.kernels._numba._vectors import times


def losses_of(layout):
    """Return the function that writes the losses of a group."""

    @function
    def write_losses(p, q, e, n, rows, T, workspace, z):
        """Return their sum; the exps go to `e` unless it is null."""
        maxima, losses = values(workspace, MAX, T), values(workspace, LOSS, T)
        layout.fold(p, e, e, n, rows, T, workspace, 1)
        size = layout.length(workspace, n)
        for r in range(0, rows, layout.stride(workspace)):
            x, t, m = ahead(p, r * n), ahead(q, r * n), layout.value(maxima, r)
            following = ahead(t, T * n) if layout.step(workspace) > 1 else t
            gaps, whole = distribution(x, t, following, size, m)
            layout.store_partial(workspace, T, GAPS, r, gaps)
            layout.store_rare(workspace, T, WEIGHT, r, whole)  # there is room for one partial
        layout.reduce_partials(workspace, T, GAPS)
        for r in range(0, T, layout.step(workspace)):
            m, rest = layout.get(maxima, r), layout.get(values(workspace, REST, T), r)
            u, v = layout.get(values(workspace, WEIGHT, T), r), log1p(rest)
            if z != 0:
                v = v + z * ((m + v) * (m + v))
            layout.put(losses, r, layout.get(values(workspace, GAPS, T), r) + times(u, v))
        return total(losses, rows)

    return write_losses


def gradients_of(layout):
    """Return the function that writes the gradients of a group after its losses."""

    @function
    def state_of(workspace, T, r):
        return (
            layout.value(values(workspace, WEIGHT, T), r),
            layout.value(values(workspace, SLOPE, T), r),
            layout.value(values(workspace, REST, T), r),
            layout.value(values(workspace, FACTOR, T), r),
            layout.value(values(workspace, UNIT, T), r),
            layout.value(values(workspace, INVERSE, T), r),
        )

    write = layout.writing(soft_gradient, state_of, True)

    @function
    def write_gradients(e, q, o, n, rows, T, workspace, z, scale):
        """Write them to `o` from the exps at `e`, which may be the same place."""
        one = typed(workspace, 1.0)
        for r in range(0, T, layout.step(workspace)):
            u, rest = (
                layout.get(values(workspace, WEIGHT, T), r),
                layout.get(values(workspace, REST, T), r),
            )
            squared = u - u
            if z != 0:
                lse = layout.get(values(workspace, MAX, T), r) + log1p(rest)
                squared = times(u, (z + z) * lse)
            inverse = one / layout.get(values(workspace, UNIT, T), r)
            layout.put(values(workspace, SLOPE, T), r, squared)
            layout.put(values(workspace, FACTOR, T), r, scale / (one + rest))
            layout.put(values(workspace, INVERSE, T), r, inverse)
        write(e, q, o, n, rows, T, workspace, ())

    return write_gradients
