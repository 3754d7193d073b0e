"""Folding rows of logits, and the terms of the loss: labels, coefficients, gradients."""

import triton
import triton.language as tl

from portable_softmax.kernels._triton._math import divide, exp, tanh
from portable_softmax.kernels._triton._state import fold, merge
from portable_softmax.kernels._triton._tiles import class_offsets, load_partials, load_row


@triton.jit
def label_of(labels_ptr, other, lead, l_other, l_lead, row_mask, classes, ignore,
             IGNORING: tl.constexpr):  # fmt: skip
    """The label (0 if out of range), whether it is in range, and whether it is ignored."""
    label = tl.load(labels_ptr + other * l_other + lead * l_lead, mask=row_mask, other=0)
    label = label.to(tl.int64)
    ignored = label != label
    if IGNORING:
        ignored = label == ignore
    valid = (label >= 0) & (label < classes)
    return tl.where(valid, label, 0), valid, ignored


@triton.jit
def times(coefficient, value):
    """coefficient * value, 0 where the coefficient is 0 and the value infinite."""
    vanishes = (coefficient == 0.0) & (tl.abs(value) == float("inf"))
    return coefficient * tl.where(vanishes, 0.0, value)


@triton.jit
def capped(x, cap, CAPPED: tl.constexpr):
    """cap * tanh(x / cap)."""
    if CAPPED:
        return cap * tanh(divide(x, cap))
    else:
        return x


@triton.jit
def load_logits(rows, where, c, w_class, at, x_class, cap, UNIT: tl.constexpr, ALONG: tl.constexpr,
                MASKED: tl.constexpr, CAPPED: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """A tile of logits before and after the softcap, -inf where masked; and the mask."""
    raw, inside = load_row(rows, where, c, w_class, at, x_class, float("-inf"), UNIT, ALONG, MASKED,
                           DTYPE)  # fmt: skip
    x = raw
    if CAPPED:
        x = tl.where(inside, capped(raw, cap, CAPPED), float("-inf"))
    return raw, x, inside


@triton.jit
def fold_part(rows, where, row_mask, begin, end, x_class, w_class, temperature, cap,
              ALONG: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr, TEMPERED: tl.constexpr,
              CAPPED: tl.constexpr, QUICK: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
              CLASSES: tl.constexpr, STEPS: tl.constexpr, COUNT: tl.constexpr = False):  # fmt: skip
    """The state of each row over the classes from `begin` to `end`.

    The main loop keeps a state in each lane, and a horizontal reduction merges the lanes. With
    COUNT also the number of unmasked classes, else 0.
    """
    LANES: tl.constexpr = CLASSES // STEPS
    m = tl.full((ROWS, LANES), float("-inf"), DTYPE)
    rest = tl.full((ROWS, LANES), 0.0, DTYPE)
    low = tl.full((ROWS, LANES), 0.0, DTYPE)
    counts = tl.full((ROWS, LANES), 0, tl.int32)
    for start in range(begin, end, CLASSES):
        xs = ()
        for i in tl.static_range(STEPS):
            c = start + i * LANES + tl.arange(0, LANES)[None, :]
            _, x, inside = load_logits(rows, where, c, w_class, row_mask & (c < end), x_class, cap,
                                       UNIT, ALONG, MASKED, CAPPED, DTYPE)  # fmt: skip
            xs = xs + (x,)
            if COUNT:
                counts += inside.to(tl.int32)
        m, rest, low = fold(m, rest, low, xs, temperature, TEMPERED, QUICK, STEPS)
    m, rest = merge(m, rest + low, temperature, TEMPERED)
    count = 0
    if COUNT:
        count = tl.sum(counts, axis=1, keep_dims=True)
    return m, rest, count


@triton.jit
def merge_partials(m_ptr, rest_ptr, row, parts, row_mask, temperature, TEMPERED: tl.constexpr,
                   MAX_PARTS: tl.constexpr):  # fmt: skip
    """The state of each row, from the partials of its parts."""
    m = load_partials(m_ptr, row, parts, row_mask, float("-inf"), MAX_PARTS)
    rest = load_partials(rest_ptr, row, parts, row_mask, 0.0, MAX_PARTS)
    return merge(m, rest, temperature, TEMPERED)


@triton.jit
def scale_of(rest, scales, positions, counted, DIVISOR: tl.constexpr):
    """The factor of each row of the gradient: that of the reduction over 1 + rest.

    DIVISOR is "none"; "count", the number of positions; "sum", the sum of weights at `scales`; or
    "given", a factor at `scales` for each position, from upstream.
    """
    factor = divide(1.0 + rest * 0.0, 1.0 + rest)
    if DIVISOR == "count":
        factor = divide(factor, positions + rest * 0.0)
    if DIVISOR == "sum":
        divisor = tl.load(scales) + rest * 0.0
        factor = divide(factor, tl.where(divisor == 0.0, float("inf"), divisor))
    if DIVISOR == "given":
        factor = factor * tl.load(scales, mask=counted, other=0.0).to(rest.dtype)
    return factor


@triton.jit
def uncapped(g, raw, cap):
    """The gradient through the softcap: times 1 - tanh^2, as 1 / cosh^2, accurate near 0."""
    s = exp(divide(-2.0 * tl.abs(raw), cap))
    return g * divide(4.0 * s, (1.0 + s) * (1.0 + s))


@triton.jit
def coefficients(t_rows, weight_ptr, label, c, t_class, inside, keep, spread, UNIT: tl.constexpr,
                 ALONG: tl.constexpr, INDEX: tl.constexpr, WEIGHTED: tl.constexpr,
                 SMOOTH: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """q_j = weight_j ((1 - smoothing) t_j + smoothing / C) of a tile, and weight_j t_j."""
    if INDEX:
        t = tl.where(c == label, 1.0, 0.0).to(DTYPE)
    else:
        t = tl.load(t_rows + class_offsets(c, t_class, UNIT, ALONG), mask=inside, other=0).to(DTYPE)
    t = tl.where(inside, t, 0.0)
    q = t
    if SMOOTH:
        q = tl.where(inside, keep * t + spread, 0.0)
    if WEIGHTED:
        w = tl.load(weight_ptr + c, mask=inside, other=0.0)
        t = tl.where(t == 0.0, 0.0, t * w)  # 0 stays 0, whatever the weight
        q = tl.where(q == 0.0, 0.0, q * w)
    return q, t


@triton.jit
def gradient(raw, e, q, a, squared, rest, factor, valid, ignored, inside, cap,
             INDEX: tl.constexpr, CAPPED: tl.constexpr, Z: tl.constexpr):  # fmt: skip
    """p_j (Q + squared) - q_j of a tile, without cancellation, times the row's factor; a is Q."""
    g = (e * a - q) - q * rest
    if Z:
        g = g + e * squared
    g = g * factor
    if INDEX:
        g = tl.where(valid, g, float("nan"))
    if CAPPED:
        g = uncapped(g, raw, cap)
    return tl.where(ignored | ~inside, 0.0, g)
