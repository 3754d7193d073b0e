"""Cross-entropy of class indices and its gradient, on groups of rows in any layout.

With u the weight of the label y, e the label smoothing over n classes, z the weight of the squared
logsumexp and w_j the weights of the classes,

    loss   = u (1 - e) s_y + e/n sum_j w_j s_j + z u lse^2          s_j = (max - x_j) + log1p(rest)
    grad_j = p_j A - q_j        A = sum_j q_j + 2 z u lse           q = u (1 - e) at y, + e/n w_j

where a coefficient of 0 counts as 0 beside an infinity. The gradient is computed as
((e_j A - q_j) - q_j rest) / (1 + rest), which keeps the digits of a confident label, and there
without 2 z u lse, which is added to it.

`options` holds e, z, the sum of the w_j and the factor of the gradient, and `c` what `constants`
makes of them; `flags` says whether there are weights, whether some labels are ignored, and
whether every loss is asked for. What is computed for each row is a number or a vector of several
rows, as the layout has it.
"""

from __future__ import annotations

import math

from numba import types
from numba.extending import overload

from portable_softmax.kernels._numba._compensation import added
from portable_softmax.kernels._numba._exp import exp_up, log1p, reference_of
from portable_softmax.kernels._numba._jit import INLINED, function
from portable_softmax.kernels._numba._memory import ahead, fill, load, store, total, typed
from portable_softmax.kernels._numba._passes import (
    gaps,
    gradient_elsewhere,
    gradient_entry,
    gradient_with_share,
)
from portable_softmax.kernels._numba._values import (
    FACTOR,
    GAPS,
    INVERSE,
    LABEL_GRADIENT,
    LOGIT,
    LOSS,
    MAX,
    REST,
    SHARE,
    SLOPE,
    TOTAL,
    UNIT,
    WEIGHT,
    values,
)
from portable_softmax.kernels._numba._vectors import times

WEIGHTED, IGNORING, EACH, SAMPLED, OVER = 1, 2, 4, 8, 16


@function
def constants(w, n, options):
    """Return 1 - e, e/n, e/n sum_j w_j, z and the factor of the gradient."""
    share = options[0] / n
    return (
        typed(w, 1.0 - options[0]),
        typed(w, share),
        typed(w, share * options[2]),
        typed(w, options[1]),
        typed(w, options[3]),
    )


# --------------------------------------------------------------------------- sums and labels


@function
def no_sum():
    """Return a sum and what its rounding lost."""
    return 0.0, 0.0


@function
def with_term(total, x):
    return added(total[0], total[1], x)


@function
def class_of(y, n):
    """Return a label, 0 where it names no class."""
    return y if 0 <= y < n else 0


def own_weight(samples, i, u):
    """Return u times the i-th position's own weight; `samples` is None where there are none."""


@overload(own_weight, jit_options=INLINED)
def _own_weight(samples, i, u):
    if isinstance(samples, types.NoneType):
        return lambda samples, i, u: u
    return lambda samples, i, u: u * samples[i]


@function
def weight_of(y, w, samples, i, n, flags, ignore):
    """Return the weight of the i-th label, which is y, and what it counts in the mean.

    The weight is 0 where it is ignored and nan without a class; that counts what the class 0 does.
    """
    if flags & IGNORING and y == ignore:
        return typed(w, 0.0), 0.0
    u = load(w, class_of(y, n)) if flags & WEIGHTED else typed(w, 1.0)
    u = own_weight(samples, i, u)
    return (u if 0 <= y < n else typed(w, math.nan)), float(u)


@function
def write_weights(labels, rows, T, workspace, w, samples, first, n, flags, ignore):
    """Write the labels' weights; return their sum, how many are wrong and how many ignored."""
    us = values(workspace, WEIGHT, T)
    total, wrong, ignored = 0.0, 0, 0
    if flags & (WEIGHTED | IGNORING | SAMPLED):
        for r in range(rows):
            u, counted = weight_of(labels[r], w, samples, first + r, n, flags, ignore)
            store(us, r, u)
            total += counted
            wrong += not 0 <= labels[r] < n
    else:
        total = float(rows)
        for r in range(rows):
            missing = not 0 <= labels[r] < n
            store(us, r, typed(w, math.nan if missing else 1.0))
            wrong += missing
    if flags & IGNORING:
        for r in range(rows):
            if labels[r] == ignore:
                ignored += 1
                wrong -= not 0 <= ignore < n
    fill(ahead(us, rows), T - rows, 0.0)
    return total, wrong, ignored


# --------------------------------------------------------------------------- losses


@function
def value(gap, log, spread, m, u, c):
    """The loss from gap = max - x_y and spread = sum_j w_j (max - x_j)."""
    v = times(u * c[0], gap + log)
    if c[1] != 0:
        smoothed = c[2] * log
        if abs(c[2]) != math.inf:  # else an infinite weight may have met a 0 in the spread
            smoothed = c[1] * spread + c[2] * log
        v = v + smoothed
    if c[3] != 0:
        lse = m + log
        v = v + times(u, c[3] * (lse * lse))
    return v


@function
def slope_of_square(u, m, rest, c):
    """2 z u lse."""
    return times(u, (c[3] + c[3]) * (m + log1p(rest)))


def losses_of(layout):
    """Return the function that writes the losses of a group."""

    @function
    def write_gaps(p, w, n, rows, T, workspace):
        for r in range(0, rows, layout.stride(workspace)):
            m, size = layout.value(values(workspace, MAX, T), r), layout.length(workspace, n)
            v = gaps(ahead(p, r * n), layout.source(w), size, (m,))
            layout.store_partial(workspace, T, GAPS, r, v)
        layout.reduce_partials(workspace, T, GAPS)

    @function
    def write_logits(p, labels, rows, workspace, logits, n):
        for r in range(rows):
            store(logits, r, load(p, layout.element(workspace, r, class_of(labels[r], n), n)))

    @function
    def write_losses(p, e, labels, rows, T, workspace, w, n, c, flags, ignore):
        """Return their sum; the exps go to `e` unless it is null."""
        logits, losses = values(workspace, LOGIT, T), values(workspace, LOSS, T)
        # Numbers that are stored one by one and read as vectors have to reach the cache in between;
        # of a single row the fold brings the logit itself to the cache.
        early = layout.step(workspace) > 1
        if early:
            write_logits(p, labels, rows, workspace, logits, n)
        layout.fold(p, e, e, n, rows, T, workspace, 1)
        if not early:
            write_logits(p, labels, rows, workspace, logits, n)
        if c[1] != 0:
            write_gaps(p, w, n, rows, T, workspace)
        for r in range(0, T, layout.step(workspace)):
            m, rest = (
                layout.get(values(workspace, MAX, T), r),
                layout.get(values(workspace, REST, T), r),
            )
            u, gap = layout.get(values(workspace, WEIGHT, T), r), m - layout.get(logits, r)
            spread = layout.get(values(workspace, GAPS, T), r)
            layout.put(losses, r, value(gap, log1p(rest), spread, m, u, c))
        if flags & IGNORING:
            for r in range(rows):
                if labels[r] == ignore:
                    store(losses, r, typed(w, 0.0))
        return total(losses, rows)

    return write_losses


def gradients_of(layout):
    """Return the function that writes the gradients of a group after its losses."""

    @function
    def slope_of(workspace, T, r):
        return (
            layout.value(values(workspace, SLOPE, T), r),
            layout.value(values(workspace, INVERSE, T), r),
        )

    @function
    def state_of(workspace, T, r):
        a, rest = (
            layout.value(values(workspace, SLOPE, T), r),
            layout.value(values(workspace, REST, T), r),
        )
        return (
            a,
            rest,
            layout.value(values(workspace, FACTOR, T), r),
            layout.value(values(workspace, UNIT, T), r),
            layout.value(values(workspace, INVERSE, T), r),
        )

    write_elsewhere = layout.writing(gradient_elsewhere, slope_of, True)
    write_with_share = layout.writing(gradient_with_share, state_of)

    @function
    def write_gradients(e, o, labels, slopes, rows, T, workspace, w, n, c, flags):
        """Write them to `o` from the exps at `e`, which may be the same place.

        `slopes` are those of what was done to the logits, 1 where nothing was.
        """
        one, share, shares = typed(w, 1.0), c[1], values(workspace, SHARE, T)
        if share != 0:
            for r in range(rows):
                store(shares, r, share * load(w, class_of(labels[r], n)))
        for r in range(0, T, layout.step(workspace)):
            m, rest = (
                layout.get(values(workspace, MAX, T), r),
                layout.get(values(workspace, REST, T), r),
            )
            u = layout.get(values(workspace, WEIGHT, T), r)
            a, factor, q = u * c[0] + c[2], c[4] / (one + rest), u * c[0]
            if share != 0:
                q = q + layout.get(shares, r)
            unit, logit = (
                layout.get(values(workspace, UNIT, T), r),
                layout.get(values(workspace, LOGIT, T), r),
            )
            term = exp_up(logit, reference_of(m, 1), 1) / unit
            at_label = gradient_entry(term, a, q, rest, factor)
            if c[3] != 0:
                squared = slope_of_square(u, m, rest, c)
                at_label = at_label + term * squared * factor
                a = a + squared
            layout.put(values(workspace, LABEL_GRADIENT, T), r, at_label)
            sum_or_unit = unit if share != 0 else layout.get(values(workspace, TOTAL, T), r)
            layout.put(values(workspace, SLOPE, T), r, a if share != 0 else a * c[4])
            layout.put(values(workspace, INVERSE, T), r, one / sum_or_unit)
            layout.put(values(workspace, FACTOR, T), r, factor)
        if share == 0:
            write_elsewhere(e, slopes, o, n, rows, T, workspace, ())
        else:
            write_with_share(e, w, o, n, rows, T, workspace, (share,))
        for r in range(rows):
            at = layout.element(workspace, r, class_of(labels[r], n), n)
            store(o, at, load(values(workspace, LABEL_GRADIENT, T), r) * load(slopes, at))

    return write_gradients


def zeros_of(layout):
    """Return the function that writes the gradients of ignored rows."""

    @function
    def write_zeros(o, labels, rows, workspace, n, flags, ignore):
        if flags & IGNORING:
            for r in range(rows):
                if labels[r] == ignore:
                    for j in range(n):
                        store(o, layout.element(workspace, r, j, n), typed(workspace, 0.0))

    return write_zeros
