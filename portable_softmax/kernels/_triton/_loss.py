"""Cross-entropy and its gradient: the formulas of `portable._cross_entropy`, a row at a time.

Bytes moved: logits in registers are read once, and the gradient is written once. Longer rows are
read once for their state and once more for the gradient; smoothing and distributions, whose loss
is a sum over the classes, take one more reading. What a row has one of (label, weight, loss) is
small beside that.
"""

import triton
import triton.language as tl

from portable_softmax.kernels._triton._math import divide, log1p, rounded
from portable_softmax.kernels._triton._rows import load_states
from portable_softmax.kernels._triton._state import (
    exponentials,
    fold,
    merge,
    merged,
    rest_of,
    row_max,
    shift_of,
)
from portable_softmax.kernels._triton._terms import (
    capped,
    coefficients,
    label_of,
    load_logits,
    slope,
    times,
)
from portable_softmax.kernels._triton._tiles import (
    class_offsets,
    number,
    part,
    place,
    row_pointers,
)

SIZES = [
    *("lead_count", "lead_blocks", "classes", "ignore", "smoothing", "z_loss", "cap", "positions"),
    *(f"{name}_{axis}" for name in "xgtwlo" for axis in ("lead", "other", "class")),
]


@triton.jit(do_not_specialize=SIZES)
def label_weights(
    labels_ptr, weight_ptr, out_ptr, lead_count: tl.int64, lead_blocks: tl.int32,
    classes: tl.int32, l_lead: tl.int64, l_other: tl.int64, o_lead: tl.int64, o_other: tl.int64,
    ignore: tl.int64, ALONG: tl.constexpr, UNIT: tl.constexpr, IGNORING: tl.constexpr,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The weight of each label, 0 where it is ignored: a mean divides by their sum."""
    other, lead = place(lead_blocks, ROWS)
    if ALONG == "lead":
        lead_count = lead_count * UNIT
    else:
        classes = classes * UNIT
    there = lead < lead_count
    label, _, ignored = label_of(labels_ptr, other, lead, l_other, l_lead, there, classes, ignore,
                                 IGNORING)  # fmt: skip
    u = tl.where(ignored, 0.0, 1.0)
    if WEIGHTED:
        u = tl.where(ignored, 0.0, tl.load(weight_ptr + label, mask=there, other=0.0))
    tl.store(out_ptr + other * o_other + lead * o_lead, u.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=SIZES)
def loss(
    x_ptr, labels_ptr, t_ptr, where_ptr, weight_ptr, divisor_ptr, loss_ptr, grad_ptr, flag_ptr,
    m_ptr, rest_ptr,
    lead_count: tl.int64, lead_blocks: tl.int32, classes: tl.int32,
    x_lead: tl.int64, x_other: tl.int64, x_class: tl.int64,
    g_lead: tl.int64, g_other: tl.int64, g_class: tl.int64,
    t_lead: tl.int64, t_other: tl.int64, t_class: tl.int64,
    w_lead: tl.int64, w_other: tl.int64, w_class: tl.int64,
    l_lead: tl.int64, l_other: tl.int64, o_lead: tl.int64, o_other: tl.int64,
    ignore: tl.int64, smoothing: tl.float64, z_loss: tl.float64, cap: tl.float64,
    positions: tl.float64,
    PASS: tl.constexpr, PARTS: tl.constexpr, ALONG: tl.constexpr, UNIT: tl.constexpr,
    INDEX: tl.constexpr, IGNORING: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTH: tl.constexpr,
    Z: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, GRAD: tl.constexpr,
    DIVISOR: tl.constexpr, CHECK: tl.constexpr,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The loss of each position, and with GRAD its gradient; DIVISOR is "none", "count" or "sum".

    x, g and t are the logits, their gradient and a distribution; w is the mask, l the labels and o
    the losses.
    """
    PLAIN: tl.constexpr = INDEX and not SMOOTH
    other, lead = place(lead_blocks, ROWS)
    if ALONG == "lead":
        lead_count = lead_count * UNIT
    else:
        classes = classes * UNIT
    there = lead < lead_count
    cap = number(cap, DTYPE)
    z_loss = number(z_loss, DTYPE)
    one = number(1.0, DTYPE)
    rows = row_pointers(x_ptr, other, lead, x_other, x_lead, UNIT, ALONG)
    t_rows = rows
    if not INDEX:
        t_rows = row_pointers(t_ptr, other, lead, t_other, t_lead, UNIT, ALONG)
    where = where_ptr
    if MASKED:
        where = where_ptr + other * w_other + lead * w_lead

    # The label.
    label = (lead * 0).to(tl.int64)
    valid = there
    ignored = lead < 0
    u = one + (lead * 0).to(DTYPE)
    if INDEX:
        label, valid, ignored = label_of(labels_ptr, other, lead, l_other, l_lead, there, classes,
                                         ignore, IGNORING)  # fmt: skip
        if MASKED:
            unmasked = tl.load(where + label * w_class, mask=there, other=0).to(tl.int1)
            valid = valid & unmasked
        if WEIGHTED:
            u = tl.load(weight_ptr + label, mask=there, other=0.0)
        u = tl.where(ignored, 0.0, u)
        valid = valid | ignored

    # The state of the row, and how many of its classes count.
    begin, end = part(classes, PARTS, CLASSES)
    row = other * lead_count + lead
    count = tl.full((ROWS, 1), 0, tl.int32) + classes
    if PASS == "registers":
        c = tl.arange(0, CLASSES)[None, :]
        at = there & (c < classes)
        raw, x, inside = load_logits(rows, where, c, w_class, at, x_class, cap, UNIT, ALONG, MASKED,
                                     CAPPED, DTYPE)  # fmt: skip
        m = row_max(x)
        _, e = exponentials(x, shift_of(m), one, False)
        rest = rest_of(e)
        if MASKED:
            count = tl.sum(inside.to(tl.int32), axis=1, keep_dims=True)
    elif PASS == "finish":
        m, rest = load_states(m_ptr, rest_ptr, row, there, PARTS, one, False)
    else:
        m = tl.full((ROWS, CLASSES), float("-inf"), DTYPE)
        rest = tl.full((ROWS, CLASSES), -1.0, DTYPE)
        counts = tl.full((ROWS, CLASSES), 0, tl.int32)
        for far in range(begin, end, CLASSES * DEPTH):
            near_m = tl.full((ROWS, CLASSES), float("-inf"), DTYPE)
            near_rest = tl.full((ROWS, CLASSES), -1.0, DTYPE)
            for start in range(far, tl.minimum(far + CLASSES * DEPTH, end), CLASSES):
                c = start + tl.arange(0, CLASSES)[None, :]
                _, x, inside = load_logits(rows, where, c, w_class, there & (c < end), x_class, cap,
                                           UNIT, ALONG, MASKED, CAPPED, DTYPE)  # fmt: skip
                near_m, near_rest = fold(near_m, near_rest, x, one, False)
                if MASKED:
                    counts += inside.to(tl.int32)
            m, rest = merge(m, rest, near_m, near_rest, one, False)
        m, rest = merged(m, rest, one, False)
        if MASKED:
            count = tl.sum(counts, axis=1, keep_dims=True)

    if PASS == "fold":
        tl.store(m_ptr + row * PARTS + tl.program_id(1), m, mask=there)
        tl.store(rest_ptr + row * PARTS + tl.program_id(1), rest, mask=there)
    else:
        if MASKED and not INDEX:
            # Without any class there is nothing to lose; m = rest = 0 keeps everything finite.
            m = tl.where(count == 0, 0.0, m)
            rest = tl.where(count == 0, 0.0, rest)
        log = tl.where(tl.abs(m) == float("inf"), float("nan"), log1p(rest))
        lse = m + log

        # The loss.
        keep = 1.0 - number(smoothing, DTYPE)
        spread = divide(number(smoothing, DTYPE), tl.maximum(count, 1).to(DTYPE))
        a = u
        if PLAIN:
            at_label = tl.load(rows + class_offsets(label, x_class, UNIT, ALONG),
                               mask=there & valid, other=0.0).to(DTYPE)  # fmt: skip
            value = (m - capped(at_label, cap, CAPPED)) + log
            if Z:
                value = value + z_loss * (lse * lse)
            value = times(u, value)
        else:
            if PASS == "registers":
                q, t = coefficients(t_rows, weight_ptr, label, c, t_class, inside, keep, spread,
                                    UNIT, ALONG, INDEX, WEIGHTED, SMOOTH, DTYPE)  # fmt: skip
                terms = times(q, tl.where(at, (m - x) + log, 0.0))
                value = tl.sum(terms, axis=1, keep_dims=True)
                a = tl.sum(q, axis=1, keep_dims=True)
                if not INDEX:
                    u = tl.sum(t, axis=1, keep_dims=True)
            else:
                values = tl.full((ROWS, CLASSES), 0.0, DTYPE)
                qs = tl.full((ROWS, CLASSES), 0.0, DTYPE)
                ts = tl.full((ROWS, CLASSES), 0.0, DTYPE)
                for start in range(begin, end, CLASSES):
                    c = start + tl.arange(0, CLASSES)[None, :]
                    at = there & (c < end)
                    raw, x, inside = load_logits(rows, where, c, w_class, at, x_class, cap, UNIT,
                                                 ALONG, MASKED, CAPPED, DTYPE)  # fmt: skip
                    q, t = coefficients(t_rows, weight_ptr, label, c, t_class, inside, keep,
                                        spread, UNIT, ALONG, INDEX, WEIGHTED, SMOOTH,
                                        DTYPE)  # fmt: skip
                    values += times(q, tl.where(at, (m - x) + log, 0.0))
                    qs += q
                    ts += t
                value = tl.sum(values, axis=1, keep_dims=True)
                a = tl.sum(qs, axis=1, keep_dims=True)
                if not INDEX:
                    u = tl.sum(ts, axis=1, keep_dims=True)
            if Z:
                value = value + times(u, z_loss * (lse * lse))
        if INDEX:
            value = tl.where(valid, value, float("nan"))
            value = tl.where(ignored, 0.0, value)
        first = there & ((lead * 0 + tl.program_id(1)) == 0)
        tl.store(loss_ptr + other * o_other + lead * o_lead, value, mask=first)
        if CHECK:
            # Every program that finds one writes the same 1.
            tl.store(flag_ptr + lead * 0, (lead * 0 + 1).to(tl.int32),
                     mask=there & ~valid)  # fmt: skip

        if GRAD:
            if Z:
                a = a + times(u, 2.0 * z_loss * lse)
            factor = divide(one + rest * 0.0, 1.0 + rest)
            if DIVISOR == "count":
                factor = divide(factor, number(positions, DTYPE))
            if DIVISOR == "sum":
                divisor = tl.load(divisor_ptr) + one * 0.0
                factor = divide(factor, tl.where(divisor == 0.0, float("inf"), divisor))
            factor = tl.where(tl.abs(m) == float("inf"), float("nan"), factor)
            out = row_pointers(grad_ptr, other, lead, g_other, g_lead, UNIT, ALONG)
            if PASS == "registers":
                q = x
                if not PLAIN:
                    q, _ = coefficients(t_rows, weight_ptr, label, c, t_class, inside, keep,
                                        spread, UNIT, ALONG, INDEX, WEIGHTED, SMOOTH,
                                        DTYPE)  # fmt: skip
                g = slope(raw, e, q, a, u, rest, factor, label, c, valid, ignored, inside, cap,
                          INDEX, PLAIN, CAPPED)  # fmt: skip
                tl.store(out + class_offsets(c, g_class, UNIT, ALONG),
                         rounded(g, grad_ptr.dtype.element_ty), mask=at)  # fmt: skip
            else:
                for start in range(begin, end, CLASSES):
                    c = start + tl.arange(0, CLASSES)[None, :]
                    at = there & (c < end)
                    raw, x, inside = load_logits(rows, where, c, w_class, at, x_class, cap, UNIT,
                                                 ALONG, MASKED, CAPPED, DTYPE)  # fmt: skip
                    _, e = exponentials(x, shift_of(m), one, False)
                    q = x
                    if not PLAIN:
                        q, _ = coefficients(t_rows, weight_ptr, label, c, t_class, inside, keep,
                                            spread, UNIT, ALONG, INDEX, WEIGHTED, SMOOTH,
                                            DTYPE)  # fmt: skip
                    g = slope(raw, e, q, a, u, rest, factor, label, c, valid, ignored, inside, cap,
                              INDEX, PLAIN, CAPPED)  # fmt: skip
                    tl.store(out + class_offsets(c, g_class, UNIT, ALONG),
                             rounded(g, grad_ptr.dtype.element_ty), mask=at)  # fmt: skip
