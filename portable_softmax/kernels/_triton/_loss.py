"""Cross-entropy of class indices and its gradient; smoothing and distributions are in `_general`.

Bytes moved: as in `_rows`, logits are read once for the loss alone, and read and written once with
the gradient. Rows that are ignored are not read. What a row has one of (label, weight, loss) is
small beside that.
"""

import triton
import triton.language as tl

from portable_softmax.kernels._triton._math import log1p, rounded
from portable_softmax.kernels._triton._state import (
    exponentials,
    is_finite,
    merged,
    shift_of,
    state_of,
)
from portable_softmax.kernels._triton._terms import (
    capped,
    folded,
    label_of,
    load_logits,
    scale_of,
    times,
    uncapped,
)
from portable_softmax.kernels._triton._tiles import (
    class_offsets,
    load_partials,
    number,
    part_bounds,
    parts_to_fold,
    place,
    publish,
    relay_role,
    row_pointers,
    store_partial,
)

SIZES = [
    *("lead_count", "lead_blocks", "classes", "parts", "finishers", "lag"),
    *("ignore", "smoothing", "z_loss", "cap", "positions"),
    *(f"{name}_{axis}" for name in "xgtwlod" for axis in ("lead", "other", "class")),
]


@triton.jit(do_not_specialize=SIZES)
def label_weights(
    labels_ptr, weight_ptr, out_ptr, lead_count: tl.int64, lead_blocks: tl.int32,
    classes: tl.int32, l_lead: tl.int64, l_other: tl.int64, o_lead: tl.int64, o_other: tl.int64,
    ignore: tl.int64, ALONG: tl.constexpr, UNIT: tl.constexpr, IGNORING: tl.constexpr,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The weight of each label, 0 where it is ignored: a mean divides by their sum."""
    other, lead = place(tl.program_id(0), lead_blocks, ROWS)
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


@triton.jit
def _slope(raw, e, factor, at_label, label, c, inside, cap, MASKED: tl.constexpr,
           CAPPED: tl.constexpr):  # fmt: skip
    """The gradient of a tile: p_j times a factor of its row, and what its label's entry is."""
    g = tl.where(c == label, at_label, e * factor)
    if CAPPED:
        g = uncapped(g, raw, cap)
    if MASKED:
        g = tl.where(inside, g, 0.0)
    return g


@triton.jit
def _settled(m, rest, plain, rows, label, valid, ignored, counts, first, weight_ptr, scales, out,
             signals_ptr, x_class, cap, z_loss, positions, ALONG: tl.constexpr,
             UNIT: tl.constexpr, WEIGHTED: tl.constexpr, Z: tl.constexpr, CAPPED: tl.constexpr,
             GRAD: tl.constexpr, DIVISOR: tl.constexpr, CHECK: tl.constexpr,
             DTYPE: tl.constexpr):  # fmt: skip
    """Store each row's loss and flag; return the factor of its gradient, and its label's entry.

    `plain` is the factor that makes the exponentials of a row plain.
    """
    u = tl.full((1, 1), 1.0, DTYPE)
    if WEIGHTED:
        u = tl.load(weight_ptr + label, mask=counts, other=0.0)
    x = tl.load(rows + class_offsets(label, x_class, UNIT, ALONG), mask=counts & valid, other=0.0)
    x = capped(x.to(DTYPE), cap, CAPPED)
    log = tl.where(is_finite(m), log1p(rest), float("nan"))
    lse = m + log
    value = (m - x) + log
    if Z:
        value = value + z_loss * (lse * lse)
    value = tl.where(valid, times(u, value), float("nan"))
    tl.store(out, tl.where(ignored, 0.0, value), mask=first)
    if CHECK:
        # Every program that finds one writes the same 1.
        tl.store(signals_ptr + label * 0, label * 0 + 1,
                 mask=first & ~valid & ~ignored)  # fmt: skip
    if GRAD:
        a = u
        if Z:
            a = a + times(u, 2.0 * z_loss * lse)
        factor = scale_of(rest, scales, positions, counts, DIVISOR)
        factor = tl.where(valid & is_finite(m), factor, float("nan"))
        shift = shift_of(m, False, False)
        e = exponentials(x, shift, cap, False, False) * shift[2]
        e = tl.where(x == m, 1.0, e)  # as it must be, and is but for rounding
        # p_t a - u without its cancellation.
        at_label = ((e * a - u) - u * rest) * factor
        factor = a * factor * plain
        return tl.where(ignored, 0.0, factor), tl.where(ignored, 0.0, at_label)
    else:
        return rest, rest


@triton.jit(do_not_specialize=SIZES)
def loss(
    x_ptr, labels_ptr, where_ptr, weight_ptr, divisor_ptr, loss_ptr, grad_ptr, signals_ptr, m_ptr,
    rest_ptr,
    lead_count: tl.int64, lead_blocks: tl.int32, classes: tl.int32,
    parts: tl.int32, finishers: tl.int32, lag: tl.int32,
    x_lead: tl.int64, x_other: tl.int64, x_class: tl.int64,
    g_lead: tl.int64, g_other: tl.int64, g_class: tl.int64,
    w_lead: tl.int64, w_other: tl.int64, w_class: tl.int64,
    l_lead: tl.int64, l_other: tl.int64, o_lead: tl.int64, o_other: tl.int64,
    d_lead: tl.int64, d_other: tl.int64,
    ignore: tl.int64, z_loss: tl.float64, cap: tl.float64, positions: tl.float64,
    PASS: tl.constexpr, MAX_PARTS: tl.constexpr, LOOKS: tl.constexpr, ALONG: tl.constexpr,
    UNIT: tl.constexpr, IGNORING: tl.constexpr, WEIGHTED: tl.constexpr, Z: tl.constexpr,
    CAPPED: tl.constexpr, MASKED: tl.constexpr, GRAD: tl.constexpr, DIVISOR: tl.constexpr, CHECK: tl.constexpr,
    QUICK: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """The loss of each position, and with GRAD its gradient as DIVISOR says (`_terms.scale_of`).

    x and g are the logits and their gradient; w is the mask, l the labels, o the losses and d what
    the gradient is multiplied by. signals_ptr has the flag of labels out of range first.
    """
    block, part, folds, exists = tl.program_id(0), 0, True, True
    if PASS == "relay":
        block, part, folds, exists = relay_role(parts, finishers, lag)
    other, lead = place(block, lead_blocks, ROWS)
    if ALONG == "lead":
        lead_count = lead_count * UNIT
    else:
        classes = classes * UNIT
    there = lead < lead_count
    cap = number(cap, DTYPE)
    z_loss = number(z_loss, DTYPE)
    positions = number(positions, DTYPE)
    unit = number(1.0, DTYPE)
    rows = row_pointers(x_ptr, other, lead, x_other, x_lead, UNIT, ALONG)
    where = where_ptr
    if MASKED:
        where = where_ptr + other * w_other + lead * w_lead

    label, valid, ignored = label_of(labels_ptr, other, lead, l_other, l_lead, there, classes,
                                     ignore, IGNORING)  # fmt: skip
    counts = there & ~ignored
    if MASKED:
        unmasked = tl.load(where + label * w_class, mask=counts, other=0).to(tl.int1)
        valid = valid & unmasked

    out = loss_ptr + other * o_other + lead * o_lead
    grads = row_pointers(grad_ptr, other, lead, g_other, g_lead, UNIT, ALONG)
    scales = divisor_ptr + other * d_other + lead * d_lead
    if PASS == "relay":
        row = other * lead_count + lead
        published = signals_ptr + 1 + block
        first_part, last_part, bits = part * 0, part * 0, tl.full((), 0, tl.int64)
        if exists:
            first_part, last_part, bits = parts_to_fold(published, parts, part, folds, LOOKS)
        for p in range(first_part, last_part):
            if bits >> p & 1 == 0:
                begin, end = part_bounds(classes, parts, p, CLASSES)
                m, rest = folded(rows, where, counts, begin, end, x_class, w_class, unit, cap,
                                 ALONG, UNIT, MASKED, False, CAPPED, QUICK, DTYPE, ROWS, CLASSES,
                                 STEPS)  # fmt: skip
                store_partial(m_ptr, row, parts, p, m, there)
                store_partial(rest_ptr, row, parts, p, rest, there)
                publish(published, p)
        if exists & ~folds:
            begin, end = part_bounds(classes, parts, part, CLASSES)
            m, rest = merged(load_partials(m_ptr, row, parts, there, float("-inf"), MAX_PARTS),
                             load_partials(rest_ptr, row, parts, there, 0.0, MAX_PARTS), unit,
                             False)  # fmt: skip
            first = there & ((lead * 0 + part) == 0)
            shift = shift_of(m, False, QUICK)
            factor, at_label = _settled(m, rest, shift[2], rows, label, valid, ignored, counts,
                                        first, weight_ptr, scales, out, signals_ptr, x_class, cap,
                                        z_loss, positions, ALONG, UNIT, WEIGHTED, Z, CAPPED, GRAD,
                                        DIVISOR, CHECK, DTYPE)  # fmt: skip
            if GRAD:
                for start in range(begin, end, CLASSES):
                    c = start + tl.arange(0, CLASSES)[None, :]
                    at = there & (c < end)
                    raw, x, inside = load_logits(rows, where, c, w_class, at & ~ignored, x_class,
                                                 cap, UNIT, ALONG, MASKED, CAPPED,
                                                 DTYPE)  # fmt: skip
                    e = exponentials(x, shift, unit, False, QUICK)
                    g = _slope(raw, e, factor, at_label, label, c, inside, cap, MASKED, CAPPED)
                    tl.store(grads + class_offsets(c, g_class, UNIT, ALONG),
                             rounded(g, grad_ptr.dtype.element_ty), mask=at)  # fmt: skip
    elif PASS == "loop":
        m, rest = folded(rows, where, counts, classes * 0, classes, x_class, w_class, unit, cap,
                         ALONG, UNIT, MASKED, False, CAPPED, QUICK, DTYPE, ROWS, CLASSES,
                         STEPS)  # fmt: skip
        _settled(m, rest, unit, rows, label, valid, ignored, counts, there, weight_ptr, scales, out,
                 signals_ptr, x_class, cap, z_loss, positions, ALONG, UNIT, WEIGHTED, Z, CAPPED,
                 False, DIVISOR, CHECK, DTYPE)  # fmt: skip
    else:
        c = tl.arange(0, CLASSES)[None, :]
        at = there & (c < classes)
        raw, x, inside = load_logits(rows, where, c, w_class, at & ~ignored, x_class, cap, UNIT,
                                     ALONG, MASKED, CAPPED, DTYPE)  # fmt: skip
        m, rest, e, plain = state_of(x, unit, False, QUICK)
        factor, at_label = _settled(m, rest, plain, rows, label, valid, ignored, counts, there,
                                    weight_ptr, scales, out, signals_ptr, x_class, cap, z_loss,
                                    positions, ALONG, UNIT, WEIGHTED, Z, CAPPED, GRAD, DIVISOR,
                                    CHECK, DTYPE)  # fmt: skip
        if GRAD:
            g = _slope(raw, e, factor, at_label, label, c, inside, cap, MASKED, CAPPED)
            tl.store(grads + class_offsets(c, g_class, UNIT, ALONG),
                     rounded(g, grad_ptr.dtype.element_ty), mask=at)  # fmt: skip
