"""Cross-entropy of class indices and its gradient, row by row and in lanes.

With u the weight of the label y, e the label smoothing over n classes, z the weight of the squared
logsumexp and w_j the weights of the classes,

    loss   = u (1 - e) s_y + e/n sum_j w_j s_j + z u lse^2          s_j = (max - x_j) + log1p(rest)
    grad_j = p_j A - q_j        A = sum_j q_j + 2 z u lse           q = u (1 - e) at y, + e/n w_j

where a coefficient of 0 counts as 0 beside an infinity. The gradient is computed as
((e_j A - q_j) - q_j rest) / (1 + rest), which keeps the digits of a confident label.

`options` holds e, z, the sum of the w_j and the factor of the gradient, and `c` what `constants`
makes of them; `flags` says whether there are weights, whether some labels are ignored, and
whether every loss is asked for.
"""

from __future__ import annotations

import math

from numba import njit

from portable_softmax.kernels._numba import _lanes
from portable_softmax.kernels._numba._exp import DOWN, log1p
from portable_softmax.kernels._numba._ir import (
    ahead,
    chosen,
    either,
    load,
    plus,
    store,
    typed,
)
from portable_softmax.kernels._numba._rows import RUN, added, settled

function = njit(nogil=True, error_model="numpy")

WEIGHTED, IGNORING, EACH = 1, 2, 4


@function
def label(labels, i, w, n, flags, ignore):
    """Return a label, 0 where it does not count, its weight, nan without a class, and a code.

    The code is 0 for one that counts, 1 for an ignored one and 2 for one without a class, which
    weighs in the mean what the class 0 does.
    """
    y = labels[i]
    if flags & IGNORING and y == ignore:
        return 0, typed(w, 0.0), 1
    if y < 0 or y >= n:
        return 0, typed(w, math.nan), 2
    return y, load(w, y) if flags & WEIGHTED else typed(w, 1.0), 0


@function
def times(a, b):
    """a * b, 0 where a is 0 and b infinite."""
    return chosen(a == 0, chosen(abs(b) == math.inf, a, a * b), a * b)


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


# --------------------------------------------------------------------------- one row


@function
def loss(p, w, n, y, u, c, flags, m, rest):
    """Return the loss of a row from its maximum and remainder."""
    spread = typed(p, 0.0)
    if c[1] != 0:
        lost = spread
        for start in range(0, n, RUN):
            x, v = ahead(p, start), ahead(w, start)
            s = typed(p, 0.0)
            if flags & WEIGHTED:
                for j in range(min(RUN, n - start)):
                    s = plus(s, times(load(v, j), m - load(x, j)))
            else:
                for j in range(min(RUN, n - start)):
                    s = plus(s, m - load(x, j))
            spread, lost = added(spread, lost, s)
        spread = settled(spread, lost)
    return value(m - load(p, y), log1p(rest), spread, m, u, c)


@function
def value(gap, log, spread, m, u, c):
    """The loss from gap = max - x_y and spread = sum_j w_j (max - x_j)."""
    v = times(u * c[0], gap + log)
    if c[1] != 0:
        v += c[1] * spread + c[2] * log
    if c[3] != 0:
        lse = m + log
        v += times(u, c[3] * (lse * lse))
    return v


@function
def slope(u, m, rest, c):
    """A, which multiplies the probabilities in the gradient."""
    a = u * c[0] + c[2]
    if c[3] != 0:
        a += times(u, (c[3] + c[3]) * (m + log1p(rest)))
    return a


@function
def gradient(scratch, o, w, n, y, u, c, flags, m, rest):
    """Write the gradient to `o`, where the exps times UP are; if `o` rounds, in `scratch`."""
    e = either(o, scratch)
    down, share = typed(w, DOWN), c[1]
    a = slope(u, m, rest, c)
    inverse = c[4] / (typed(w, 1.0) + rest)
    at_label = load(e, y) * down
    q = u * c[0]
    if c[1] == 0:
        factor = a * inverse
        for j in range(n):
            store(o, j, load(e, j) * factor * down)
    elif flags & WEIGHTED:
        for j in range(n):
            part = share * load(w, j)
            store(o, j, entry(load(e, j) * down, a, part, rest, inverse))
        q += share * load(w, y)
    else:
        for j in range(n):
            store(o, j, entry(load(e, j) * down, a, share, rest, inverse))
        q += share
    store(o, y, entry(at_label, a, q, rest, inverse))


@function
def entry(e, a, q, rest, inverse):
    """p_j A - q_j, without its cancellation."""
    return ((e * a - q) - q * rest) * inverse


# --------------------------------------------------------------------------- lanes
#
# After the first five lanes, which are `_lanes`' own: u, y, the loss (before, max - x_y) and
# sum_j w_j (max - x_j).


@function
def lane_labels(labels, rows, T, lanes, w, n, flags, ignore):
    """Write the labels and their weights; return the sum of weights and how many are wrong."""
    weights, wrong = 0.0, 0
    us, ys = ahead(lanes, 5 * T), ahead(lanes, 6 * T)
    for i in range(rows):
        y, u, code = label(labels, i, w, n, flags, ignore)
        store(us, i, u)
        store(ys, i, typed(w, float(y)))
        weights += float(load(w, 0) if code == 2 else u)
        wrong += code == 2
    for i in range(rows, T):
        store(us, i, typed(w, 0.0))
        store(ys, i, typed(w, 0.0))
    return weights, wrong


@function
def lane_losses(x, e, labels, rows, T, lanes, w, n, c, flags, ignore):
    """Write the losses; the exps times UP go to `e` unless it is 0."""
    m, s, us, ys = lanes, ahead(lanes, T), ahead(lanes, 5 * T), ahead(lanes, 6 * T)
    losses, spreads = ahead(lanes, 7 * T), ahead(lanes, 8 * T)
    _lanes.fold(x, e, n, T, lanes, 1)
    for i in range(T):
        store(losses, i, load(m, i) - load(x, int(load(ys, i)) * T + i))
        store(spreads, i, typed(w, 0.0))
    if c[1] != 0:
        for j in range(n):
            row = ahead(x, j * T)
            v = load(w, j) if flags & WEIGHTED else typed(w, 1.0)
            for i in range(T):
                store(spreads, i, load(spreads, i) + times(v, load(m, i) - load(row, i)))
    for i in range(T):
        log = log1p(load(s, i))
        v = value(load(losses, i), log, load(spreads, i), load(m, i), load(us, i), c)
        store(losses, i, v)
    if flags & IGNORING:
        for i in range(rows):
            if labels[i] == ignore:
                store(losses, i, typed(w, 0.0))
    total = 0.0
    for i in range(rows):
        total = plus(total, float(load(losses, i)))
    return total


@function
def lane_gradients(e, labels, rows, T, lanes, w, n, c, flags, ignore):
    """Turn the exps times UP into the gradient."""
    m, s, us, ys = lanes, ahead(lanes, T), ahead(lanes, 5 * T), ahead(lanes, 6 * T)
    a, inverse, at_label = ahead(lanes, 2 * T), ahead(lanes, 3 * T), ahead(lanes, 4 * T)
    down, share = typed(w, DOWN), c[1]
    for i in range(T):
        rest = load(s, i)
        store(a, i, slope(load(us, i), load(m, i), rest, c))
        store(inverse, i, c[4] / (typed(w, 1.0) + rest))
    for i in range(T):
        y = int(load(ys, i))
        q = load(us, i) * c[0]
        if c[1] != 0:
            q += share * (load(w, y) if flags & WEIGHTED else typed(w, 1.0))
        term = load(e, y * T + i) * down
        store(at_label, i, entry(term, load(a, i), q, load(s, i), load(inverse, i)))
    if c[1] == 0:
        for i in range(T):
            store(a, i, load(a, i) * load(inverse, i))
        for j in range(n):
            row = ahead(e, j * T)
            for i in range(T):
                store(row, i, load(row, i) * load(a, i) * down)
    else:
        for j in range(n):
            row = ahead(e, j * T)
            q = share * (load(w, j) if flags & WEIGHTED else typed(w, 1.0))
            for i in range(T):
                term = load(row, i) * down
                store(row, i, entry(term, load(a, i), q, load(s, i), load(inverse, i)))
    for i in range(rows):
        store(e, int(load(ys, i)) * T + i, load(at_label, i))
    if flags & IGNORING:
        for i in range(rows):
            if labels[i] == ignore:
                for j in range(n):
                    store(e, j * T + i, typed(w, 0.0))
