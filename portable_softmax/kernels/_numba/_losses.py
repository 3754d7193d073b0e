"""Cross-entropy of class indices and its gradient: of one row, and what many share with it.

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

from portable_softmax.kernels._numba import _long
from portable_softmax.kernels._numba._exp import DOWN, log1p
from portable_softmax.kernels._numba._ir import (
    ahead,
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
