"""Rows one after the other in memory, worked on one by one: a layout.

A layout is a module with the names below: `_groups` has them for rows of some vectors, `_blocks`
for blocks of short rows, `_columns` for rows that run across memory. `_operations` and `_losses`
know rows by these names alone. They work on a group of `rows` rows of `n` classes, here one, in a
workspace that begins with the per-position values of the group, see `_values`; what follows is the
layout's.
"""

from __future__ import annotations

import math

from portable_softmax.kernels._numba import _long
from portable_softmax.kernels._numba._exp import exp_up, reference_of
from portable_softmax.kernels._numba._horizontal import (
    are_at_least,
    are_equal,
    max_of_all,
    sum_of_all,
)
from portable_softmax.kernels._numba._jit import function
from portable_softmax.kernels._numba._long import PART
from portable_softmax.kernels._numba._memory import (
    ahead,
    apart_from,
    either,
    load,
    smaller,
    store,
    typed,
)
from portable_softmax.kernels._numba._passes import row_writing
from portable_softmax.kernels._numba._values import (
    MAX,
    REST,
    SUM,
    TOTAL,
    UNIT,
    after_values,
    values,
)

# Whether rows have so many vectors that few of these have a confident class.
LONG = True

# --------------------------------------------------------------------------- where rows are


@function
def height(workspace, wanted):
    """How many rows a group has."""
    return 1


@function
def place(i, T, n, inner):
    """Where the i-th group begins, how many rows it has, and the number of its first."""
    return i * n, 1, i


@function
def element(workspace, r, y, n):
    """Where the class y of the r-th row of a group is."""
    return r * n + y


@function
def position(r, y, n, inner):
    """Where it is in memory, from where the group begins."""
    return r * n + y


@function
def fetch(p, tile, workspace, T, n, inner, rows):
    """Where a group at `p` can be read."""
    return p


@function
def target(o, tile, workspace, T, n):
    """Where the result of a group at `o` can be written."""
    return o


@function
def deliver(written, o, T, n, inner, rows):
    """Bring a result to its place."""


@function
def scratch(o, workspace, T, n, apart):
    """Where exps go: to the result if that has the dtype of the computation, and is not `apart`.

    It has to be where the result replaces logits that are read after their exps.
    """
    space = ahead(after_values(workspace, T), _long.space(n))
    return apart_from(either(o, space), space, apart)


@function
def slopes_at(workspace, T, n):
    """Where the slopes of a softcap go, null where logits are read in another order than exps."""
    return ahead(after_values(workspace, T), _long.space(n) + n)


# --------------------------------------------------------------------------- passes and values
#
# A pass of `_passes` works on `stride` rows at once, on `length` numbers. `value` reads what it is
# told of them. What it returns goes to `store_partial`, and `reduce_partials` leaves the values of
# all rows; `store_rare` and `whole` are for few of them. To compute with values, `get` and `put`
# move `step` of them at once.


@function
def stride(workspace):
    return 1


@function
def length(workspace, n):
    return n


value, get, put = load, load, store


@function
def source(w):
    """What a pass reads the weights of the classes from."""
    return w


def writing(entry, values_of, own=False):
    """Return what writes ``entry(e[j], w[j], numbers)`` for each class of each row of a group.

    `w` is one array for all rows, or lies as `e` does where each row has its `own`. The numbers
    are the factor that exps have to be multiplied by, which only cut rows need, what
    ``values_of(workspace, T, r)`` says of the row, and constants.
    """
    write_row = row_writing(entry)

    @function
    def run(e, w, o, n, rows, T, workspace, constants):
        numbers = values_of(workspace, T, 0) + constants
        if n <= PART:
            write_row(e, w, o, n, (typed(workspace, 1.0), *numbers))
            return
        for j in range(0, n, PART):
            factor = load(_long.factor_of(after_values(workspace, T), j), 0)
            k = smaller(PART, n - j)
            write_row(ahead(e, j), ahead(w, j), ahead(o, j), k, (factor, *numbers))

    return run


@function
def store_partial(workspace, T, kind, r, v):
    store(values(workspace, kind, T), r, sum_of_all(v))


@function
def store_rare(workspace, T, kind, r, v):
    """Store what needs no `reduce_partials`; it is quick where all lanes are 0."""
    whole = typed(workspace, 0.0) if are_equal(v, 0.0) else sum_of_all(v)
    store(values(workspace, kind, T), r, whole)


@function
def whole(v):
    """What a pass returned, as `value` reads it."""
    return sum_of_all(v)


@function
def most(v):
    """The maximum of what a pass returned, as `value` reads it."""
    return max_of_all(v)


keep = store  # a value of as many rows as a pass works on


@function
def reduce_partials(workspace, T, kind):
    """Nothing is left to reduce."""


@function
def step(workspace):
    return 1


# --------------------------------------------------------------------------- folding a row


@function
def top(p, n, between):
    """The maximum of numbers that lie `between` apart; nan if one is."""
    m = typed(p, -math.inf)
    for j in range(n):
        x = load(p, j * between)
        if x > m or x != x:
            m = x
    return m


@function
def write_sums(p, e, o, n, rows, T, workspace, t):
    """Write maxima and the sums of the exps, which go to `e`; `o` is where the result will be.

    An infinite maximum may have passed over a nan.
    """
    m, s, _ = _long.row_sum(p, e, n, t, after_values(workspace, T))
    store(values(workspace, MAX, T), 0, m)
    store(values(workspace, SUM, T), 0, s)


@function
def fold(p, e, o, n, rows, T, workspace, t):
    """Write maxima and remainders, one maximum left out; the exps go to `e` unless it is null.

    The sums of all exps are written as well, and the unit that they are in. `o` is where the result
    will be, if there is one of that size. From a remainder of 1 on, the maximum costs the sum no
    digits.
    """
    m, s, lower = _long.row_sums(p, e, n, t, after_values(workspace, T))
    unit = exp_up(m, reference_of(m, t), t)
    rest = (s - unit) / unit
    if not are_at_least(rest, 1.0):
        if m - m == 0:
            # Two maxima are a rest of 1, or what a rounded sum makes of it.
            others = unit if s - lower > unit + unit / 2 else typed(p, 0.0)
            rest = (lower + others) / unit
        else:
            m = top(p, n, 1)  # an infinity, or a nan passed over
    store(values(workspace, MAX, T), 0, m)
    store(values(workspace, REST, T), 0, rest)
    store(values(workspace, UNIT, T), 0, unit)
    store(values(workspace, TOTAL, T), 0, s)
