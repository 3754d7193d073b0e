"""Cross-entropy of class indices and its gradient: of one row, of short ones, and in lanes.

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

from portable_softmax.kernels._numba import _blocks, _lanes, _long
from portable_softmax.kernels._numba._exp import DOWN, log1p
from portable_softmax.kernels._numba._ir import (
    ahead,
    copy,
    either,
    load,
    plus,
    store,
    typed,
)
from portable_softmax.kernels._numba._long import PART
from portable_softmax.kernels._numba._rows import added, careful_term, settled, write_scaled
from portable_softmax.kernels._numba._vectors import (
    lanes,
    part,
    put,
    put_part,
    splat,
    times,
    vector,
)

function = njit(nogil=True, error_model="numpy")

WEIGHTED, IGNORING, EACH = 1, 2, 4

# So many differences are summed as they come, each lane a few of them.
RUN = 128


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


# --------------------------------------------------------------------------- sums
#
# Of the losses and of the labels' weights, each with what its rounding lost, and how many labels
# are wrong.


@function
def nothing():
    return 0.0, 0.0, 0.0, 0.0, 0


@function
def more(sums, loss, weight, wrong):
    losses, lost = added(sums[0], sums[1], loss)
    weights, less = added(sums[2], sums[3], weight)
    return losses, lost, weights, less, sums[4] + wrong


@function
def with_row(sums, o, i, loss, w, u, code, flags):
    """The sums with a row's; its loss goes to `o` if it is asked for."""
    if flags & EACH:
        store(o, i, loss)
    u = load(w, 0) if code == 2 else u
    return more(sums, float(loss), float(u), code == 2)


@function
def with_rows(sums, o, first, rows, loss, weight, wrong, T, lane, flags):
    """The sums with those of the rows of a block, whose losses are among their numbers."""
    if flags & EACH:
        copy(ahead(lane, 7 * T), ahead(o, first), rows)
    return more(sums, loss, weight, wrong)


@function
def total(sums):
    return settled(sums[0], sums[1]), settled(sums[2], sums[3]), sums[4]


# --------------------------------------------------------------------------- one row


@function
def loss(p, w, n, y, u, c, flags, m, rest):
    """Return the loss of a row from its maximum and remainder."""
    spread = spread_of(p, w, n, flags, m) if c[1] != 0 else typed(p, 0.0)
    return value(m - load(p, y), log1p(rest), spread, m, u, c)


@function
def spread_of(p, w, n, flags, m):
    """Return sum_j w_j (max - x_j)."""
    spread = lost = typed(p, 0.0)
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
    return settled(spread, lost)


@function
def value(gap, log, spread, m, u, c):
    """The loss from gap = max - x_y and spread = sum_j w_j (max - x_j)."""
    v = times(u * c[0], gap + log)
    if c[1] != 0:
        v = v + (c[1] * spread + c[2] * log)
    if c[3] != 0:
        lse = m + log
        v = v + times(u, c[3] * (lse * lse))
    return v


@function
def slope(u, m, rest, c):
    """A, which multiplies the probabilities in the gradient."""
    a = u * c[0] + c[2]
    if c[3] != 0:
        a = a + times(u, (c[3] + c[3]) * (m + log1p(rest)))
    return a


@function
def gradient(p, scratch, o, w, n, y, u, c, flags, m, rest, kept):
    """Write the gradient to `o`, where the exps times UP are; if `o` rounds, in `scratch`."""
    e, share = either(o, scratch), c[1]
    a, inverse = slope(u, m, rest, c), c[4] / (typed(w, 1.0) + rest)
    q = u * c[0]
    if share != 0:
        q += share * (load(w, y) if flags & WEIGHTED else typed(w, 1.0))
    at_label = entry(careful_term(load(p, y), m, 1) * typed(w, DOWN), a, q, rest, inverse)
    if n <= PART:
        write_entries(e, o, w, n, typed(w, 1.0), share, flags, rest, a, inverse)
    else:
        for start in range(0, n, PART):
            k, factor = min(PART, n - start), load(_long.at(kept, start), 0)
            x, g, v = ahead(e, start), ahead(o, start), ahead(w, start)
            write_entries(x, g, v, k, factor, share, flags, rest, a, inverse)
    store(o, y, at_label)


@function
def write_entries(e, o, w, n, factor, share, flags, rest, a, inverse):
    """Write the gradient as it is at every class but the label's, from exps times UP / factor."""
    L = lanes(e)
    if share == 0:
        write_scaled(e, o, n, splat(e, a * inverse * factor), splat(e, DOWN))
        return
    q, down = splat(e, share), splat(e, DOWN)
    j = 0
    while j + L <= n:
        if flags & WEIGHTED:
            q = share * vector(w, j)
        put(o, j, entry(vector(e, j) * factor * down, a, q, rest, inverse))
        j += L
    if j < n:
        if flags & WEIGHTED:
            q = share * part(w, j, n - j, 0.0)
        term = part(e, j, n - j, 0.0) * factor * down
        put_part(o, j, entry(term, a, q, rest, inverse), n - j)


@function
def entry(e, a, q, rest, inverse):
    """p_j A - q_j, without its cancellation."""
    return ((e * a - q) - q * rest) * inverse


# --------------------------------------------------------------------------- many rows
#
# Their numbers are T apart: the maxima and remainders first, which are `_blocks`' and `_lanes`',
# then the slopes A, the factors of the gradient and its entries at the labels, u, y, the losses
# (before, max - x_y) and sum_j w_j (max - x_j).


@function
def write_labels(labels, rows, T, lane, w, n, flags, ignore):
    """Write the labels and their weights; return the sum of weights and how many are wrong."""
    weights, wrong = 0.0, 0
    us, ys = ahead(lane, 5 * T), ahead(lane, 6 * T)
    if flags & (WEIGHTED | IGNORING):
        for i in range(rows):
            y, u, code = label(labels, i, w, n, flags, ignore)
            store(us, i, u)
            store(ys, i, typed(w, float(y)))
            weights += float(load(w, 0) if code == 2 else u)
            wrong += code == 2
    else:
        for i in range(rows):
            y = labels[i]
            bad = y < 0 or y >= n
            store(us, i, typed(w, math.nan if bad else 1.0))
            store(ys, i, typed(w, 0.0 if bad else float(y)))
            wrong += bad
        weights = float(rows)
    for i in range(rows, T):
        store(us, i, typed(w, 0.0))
        store(ys, i, typed(w, 0.0))
    return weights, wrong


@function
def write_losses(labels, rows, T, lane, w, c, flags, ignore):
    """Write the losses in place of max - x_y; return their sum."""
    m, s, us = lane, ahead(lane, T), ahead(lane, 5 * T)
    losses, spreads = ahead(lane, 7 * T), ahead(lane, 8 * T)
    for i in range(0, T, lanes(lane)):
        log = log1p(vector(s, i))
        v = value(vector(losses, i), log, vector(spreads, i), vector(m, i), vector(us, i), c)
        put(losses, i, v)
    if flags & IGNORING:
        for i in range(rows):
            if labels[i] == ignore:
                store(losses, i, typed(w, 0.0))
    sum_ = 0.0
    for i in range(rows):
        sum_ = plus(sum_, float(load(losses, i)))
    return sum_


@function
def write_slopes(T, lane, w, c):
    """Write the slopes and the factors of the gradient."""
    m, s, us = lane, ahead(lane, T), ahead(lane, 5 * T)
    a, inverse = ahead(lane, 2 * T), ahead(lane, 3 * T)
    for i in range(0, T, lanes(lane)):
        rest = vector(s, i)
        put(a, i, slope(vector(us, i), vector(m, i), rest, c))
        put(inverse, i, c[4] / (1.0 + rest))


# --------------------------------------------------------------------------- short rows


@function
def block_losses(p, e, labels, rows, room, w, n, c, flags, ignore):
    """Write the losses of a block; the exps times UP go to `e` unless it is 0."""
    T, L, lane = _blocks.height(room), lanes(room), _blocks.numbers(room, 0)
    at_label, ys = ahead(lane, 4 * T), ahead(lane, 6 * T)
    losses, spreads = ahead(lane, 7 * T), ahead(lane, 8 * T)
    for i in range(0, T, L):
        put(at_label, i, splat(room, 0.0))
        put(spreads, i, splat(room, 0.0))
    # Long before they are read as vectors: stores of single numbers have to reach the cache first.
    for r in range(rows):
        store(at_label, r, load(p, r * n + int(load(ys, r))))
    _blocks.remainders(p, e, e, n, rows, room, 1)
    for i in range(0, T, L):
        put(losses, i, vector(lane, i) - vector(at_label, i))
    if c[1] != 0:
        for r in range(rows):
            store(spreads, r, spread_of(ahead(p, r * n), w, n, flags, load(lane, r)))
    return write_losses(labels, rows, T, lane, w, c, flags, ignore)


@function
def block_gradients(scratch, o, labels, rows, room, w, n, c, flags, ignore):
    """Write the gradients to `o`, where the exps times UP are; if `o` rounds, in `scratch`."""
    T, L, lane, e = _blocks.height(room), lanes(room), _blocks.numbers(room, 0), either(o, scratch)
    m, s, us, ys = lane, ahead(lane, T), ahead(lane, 5 * T), ahead(lane, 6 * T)
    a, inverse, at_label = ahead(lane, 2 * T), ahead(lane, 3 * T), ahead(lane, 4 * T)
    share = c[1]
    write_slopes(T, lane, w, c)
    shares = ahead(lane, 8 * T)
    for r in range(rows if share != 0 else 0):
        u = load(w, int(load(ys, r))) if flags & WEIGHTED else typed(w, 1.0)
        store(shares, r, share * u)
    for i in range(0, T, L):
        q = vector(us, i) * c[0]
        if share != 0:
            q = q + vector(shares, i)
        term = careful_term(vector(at_label, i), vector(m, i), 1) * DOWN
        put(at_label, i, entry(term, vector(a, i), q, vector(s, i), vector(inverse, i)))
        if share == 0:
            put(a, i, vector(a, i) * vector(inverse, i))
    if share == 0:
        _blocks.scale(e, o, n, rows, a, splat(room, DOWN))
    else:
        for r in range(rows):
            x, g, rest = ahead(e, r * n), ahead(o, r * n), load(s, r)
            slope_, inverse_ = load(a, r), load(inverse, r)
            write_entries(x, g, w, n, typed(w, 1.0), share, flags, rest, slope_, inverse_)
    for r in range(rows):
        store(o, r * n + int(load(ys, r)), load(at_label, r))
    if flags & IGNORING:
        for r in range(rows):
            if labels[r] == ignore:
                for j in range(n):
                    store(o, r * n + j, typed(w, 0.0))


# --------------------------------------------------------------------------- lanes


@function
def lane_losses(x, e, labels, rows, T, lane, w, n, c, flags, ignore):
    """Write the losses; the exps times UP go to `e` unless it is 0."""
    m, ys = lane, ahead(lane, 6 * T)
    losses, spreads = ahead(lane, 7 * T), ahead(lane, 8 * T)
    _lanes.fold(x, e, n, T, lane, 1)
    for i in range(T):
        store(losses, i, load(m, i) - load(x, int(load(ys, i)) * T + i))
        store(spreads, i, typed(w, 0.0))
    if c[1] != 0:
        for j in range(n):
            row = ahead(x, j * T)
            v = load(w, j) if flags & WEIGHTED else typed(w, 1.0)
            for i in range(T):
                store(spreads, i, load(spreads, i) + times(v, load(m, i) - load(row, i)))
    return write_losses(labels, rows, T, lane, w, c, flags, ignore)


@function
def lane_gradients(e, labels, rows, T, lane, w, n, c, flags, ignore):
    """Turn the exps times UP into the gradient."""
    s, us, ys = ahead(lane, T), ahead(lane, 5 * T), ahead(lane, 6 * T)
    a, inverse, at_label = ahead(lane, 2 * T), ahead(lane, 3 * T), ahead(lane, 4 * T)
    down, share = typed(w, DOWN), c[1]
    write_slopes(T, lane, w, c)
    for i in range(T):
        y = int(load(ys, i))
        q = load(us, i) * c[0]
        if share != 0:
            q += share * (load(w, y) if flags & WEIGHTED else typed(w, 1.0))
        term = load(e, y * T + i) * down
        store(at_label, i, entry(term, load(a, i), q, load(s, i), load(inverse, i)))
    if share == 0:
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
