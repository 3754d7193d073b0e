"""Cross-entropy of class indices and its gradient; smoothing and distributions are in `_general`.

Bytes moved: as in `_rows`, logits are read once for the loss alone, and read and written once with
the gradient. Ignored rows are not read. Per-position values (label, weight, loss) are few.
"""

import triton
import triton.language as tl

from portable_softmax.kernels._triton._math import log1p, rounded
from portable_softmax.kernels._triton._state import (
    exponentials,
    is_finite,
    shift_of,
    state_of,
)
from portable_softmax.kernels._triton._terms import (
    capped,
    fold_part,
    label_of,
    load_logits,
    merge_partials,
    scale_of,
    times,
    uncapped,
)
from portable_softmax.kernels._triton._tiles import (
    NOT_SPECIALIZED,
    class_offsets,
    part_bounds,
    parts_to_fold,
    positions_of,
    publish,
    relay_role,
    row_pointers,
    scalar,
    store_partial,
)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def label_weights(
    labels_ptr, weight_ptr, out_ptr, lead_count: tl.int64, lead_blocks: tl.int32,
    classes: tl.int32, l_lead: tl.int64, l_other: tl.int64, o_lead: tl.int64, o_other: tl.int64,
    ignore: tl.int64, ALONG: tl.constexpr, UNIT: tl.constexpr, IGNORING: tl.constexpr,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The weight of each label, 0 where ignored: their sum is the divisor of the mean."""
    other, lead, row_mask, lead_count, classes = positions_of(
        tl.program_id(0), lead_blocks, lead_count, classes, ROWS, UNIT, ALONG
    )
    label, _, ignored = label_of(labels_ptr, other, lead, l_other, l_lead, row_mask, classes,
                                 ignore, IGNORING)  # fmt: skip
    u = tl.where(ignored, 0.0, 1.0)
    if WEIGHTED:
        u = tl.where(ignored, 0.0, tl.load(weight_ptr + label, mask=row_mask, other=0.0))
    tl.store(out_ptr + other * o_other + lead * o_lead, u.to(out_ptr.dtype.element_ty),
             mask=row_mask)  # fmt: skip


@triton.jit
def _gradient(raw, e, factor, at_label, label, c, inside, cap, MASKED: tl.constexpr,
              CAPPED: tl.constexpr):  # fmt: skip
    """The gradient of a tile: p_j times the factor of its row, and the label's own entry."""
    g = tl.where(c == label, at_label, e * factor)
    if CAPPED:
        g = uncapped(g, raw, cap)
    if MASKED:
        g = tl.where(inside, g, 0.0)
    return g


@triton.jit
def _finish_loss(m, rest, unscale, rows, label, valid, ignored, counted, first, weight_ptr, scales,
                 out, flags_ptr, x_class, cap, z_loss, positions, ALONG: tl.constexpr,
                 UNIT: tl.constexpr, WEIGHTED: tl.constexpr, Z: tl.constexpr, CAPPED: tl.constexpr,
                 GRAD: tl.constexpr, DIVISOR: tl.constexpr, CHECK: tl.constexpr,
                 DTYPE: tl.constexpr):  # fmt: skip
    """Store each row's loss and flag; return the factor of its gradient and the label's entry.

    `unscale` is the factor of scaled exponentials.
    """
    u = tl.full((1, 1), 1.0, DTYPE)
    if WEIGHTED:
        u = tl.load(weight_ptr + label, mask=counted, other=0.0)
    x = tl.load(rows + class_offsets(label, x_class, UNIT, ALONG), mask=counted & valid, other=0.0)
    x = capped(x.to(DTYPE), cap, CAPPED)
    log = tl.where(is_finite(m), log1p(rest), float("nan"))
    lse = m + log
    value = (m - x) + log
    if Z:
        value = value + z_loss * (lse * lse)
    value = tl.where(valid, times(u, value), float("nan"))
    tl.store(out, tl.where(ignored, 0.0, value), mask=first)
    if CHECK:
        # All programs write the same 1.
        tl.store(flags_ptr + label * 0, label * 0 + 1, mask=first & ~valid & ~ignored)
    if GRAD:
        factor = scale_of(rest, scales, positions, counted, DIVISOR)
        factor = tl.where(valid & is_finite(m), factor, float("nan"))
        shift = shift_of(m, False, False)
        e = exponentials(x, shift, cap, False, False) * shift[2]
        e = tl.where(x == m, 1.0, e)  # exactly
        # p_t a - u without cancellation, and without what is added to a.
        a, at_label = u, (e * u - u) - u * rest
        if Z:
            squared = times(u, 2.0 * z_loss * lse)
            a, at_label = u + squared, at_label + e * squared
        at_label = at_label * factor
        factor = a * factor * unscale
        return tl.where(ignored, 0.0, factor), tl.where(ignored, 0.0, at_label)
    else:
        return rest, rest


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def loss(
    x_ptr, labels_ptr, where_ptr, weight_ptr, divisor_ptr, loss_ptr, grad_ptr, flags_ptr, m_ptr,
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
    CAPPED: tl.constexpr, MASKED: tl.constexpr, GRAD: tl.constexpr, DIVISOR: tl.constexpr,
    CHECK: tl.constexpr, QUICK: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
    CLASSES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The loss of each position, and with GRAD its gradient as DIVISOR says (`_terms.scale_of`).

    x and g are the logits and their gradient; w is the mask, l the labels, o the losses and d what
    the gradient is multiplied by. The first of the flags tells of labels out of range; the others
    tell, in a relay, which parts are published.
    """
    block, part, folds, exists = tl.program_id(0), 0, True, True
    if PASS == "relay":
        block, part, folds, exists = relay_role(parts, finishers, lag)
    other, lead, row_mask, lead_count, classes = positions_of(
        block, lead_blocks, lead_count, classes, ROWS, UNIT, ALONG
    )
    cap = scalar(cap, DTYPE)
    z_loss = scalar(z_loss, DTYPE)
    positions = scalar(positions, DTYPE)
    one = scalar(1.0, DTYPE)
    rows = row_pointers(x_ptr, other, lead, x_other, x_lead, UNIT, ALONG)
    where = where_ptr
    if MASKED:
        where = where_ptr + other * w_other + lead * w_lead

    label, valid, ignored = label_of(labels_ptr, other, lead, l_other, l_lead, row_mask, classes,
                                     ignore, IGNORING)  # fmt: skip
    counted = row_mask & ~ignored
    if MASKED:
        unmasked = tl.load(where + label * w_class, mask=counted, other=0).to(tl.int1)
        valid = valid & unmasked

    out = loss_ptr + other * o_other + lead * o_lead
    grads = row_pointers(grad_ptr, other, lead, g_other, g_lead, UNIT, ALONG)
    scales = divisor_ptr + other * d_other + lead * d_lead
    if PASS == "relay":
        row = other * lead_count + lead
        published = flags_ptr + 1 + block
        if exists:
            first_part, last_part, bits = parts_to_fold(published, parts, part, folds, LOOKS)
            for p in range(first_part, last_part):
                if bits >> p & 1 == 0:
                    begin, end = part_bounds(classes, parts, p, CLASSES)
                    m, rest, _ = fold_part(rows, where, counted, begin, end, x_class, w_class, one,
                                           cap, ALONG, UNIT, MASKED, False, CAPPED, QUICK, DTYPE,
                                           ROWS, CLASSES, STEPS)  # fmt: skip
                    store_partial(m_ptr, row, parts, p, m, row_mask)
                    store_partial(rest_ptr, row, parts, p, rest, row_mask)
                    publish(published, p)
            if not folds:
                begin, end = part_bounds(classes, parts, part, CLASSES)
                m, rest = merge_partials(
                    m_ptr, rest_ptr, row, parts, row_mask, one, False, MAX_PARTS
                )
                first = row_mask & ((lead * 0 + part) == 0)
                shift = shift_of(m, False, QUICK)
                factor, at_label = _finish_loss(m, rest, shift[2], rows, label, valid, ignored,
                                                counted, first, weight_ptr, scales, out, flags_ptr,
                                                x_class, cap, z_loss, positions, ALONG, UNIT,
                                                WEIGHTED, Z, CAPPED, GRAD, DIVISOR, CHECK,
                                                DTYPE)  # fmt: skip
                if GRAD:
                    for start in range(begin, end, CLASSES):
                        c = start + tl.arange(0, CLASSES)[None, :]
                        at = row_mask & (c < end)
                        raw, x, inside = load_logits(rows, where, c, w_class, at & ~ignored,
                                                     x_class, cap, UNIT, ALONG, MASKED, CAPPED,
                                                     DTYPE)  # fmt: skip
                        e = exponentials(x, shift, one, False, QUICK)
                        g = _gradient(raw, e, factor, at_label, label, c, inside, cap, MASKED,
                                      CAPPED)  # fmt: skip
                        tl.store(grads + class_offsets(c, g_class, UNIT, ALONG),
                                 rounded(g, grad_ptr.dtype.element_ty), mask=at)  # fmt: skip
    elif PASS == "loop":
        m, rest, _ = fold_part(rows, where, counted, classes * 0, classes, x_class, w_class, one,
                               cap, ALONG, UNIT, MASKED, False, CAPPED, QUICK, DTYPE, ROWS, CLASSES,
                               STEPS)  # fmt: skip
        _finish_loss(m, rest, one, rows, label, valid, ignored, counted, row_mask, weight_ptr,
                     scales, out, flags_ptr, x_class, cap, z_loss, positions, ALONG, UNIT, WEIGHTED,
                     Z, CAPPED, False, DIVISOR, CHECK, DTYPE)  # fmt: skip
    else:
        c = tl.arange(0, CLASSES)[None, :]
        at = row_mask & (c < classes)
        raw, x, inside = load_logits(rows, where, c, w_class, at & ~ignored, x_class, cap, UNIT,
                                     ALONG, MASKED, CAPPED, DTYPE)  # fmt: skip
        m, rest, e, unscale = state_of(x, one, False, QUICK)
        factor, at_label = _finish_loss(m, rest, unscale, rows, label, valid, ignored, counted,
                                        row_mask, weight_ptr, scales, out, flags_ptr, x_class, cap,
                                        z_loss, positions, ALONG, UNIT, WEIGHTED, Z, CAPPED, GRAD,
                                        DIVISOR, CHECK, DTYPE)  # fmt: skip
        if GRAD:
            g = _gradient(raw, e, factor, at_label, label, c, inside, cap, MASKED, CAPPED)
            tl.store(grads + class_offsets(c, g_class, UNIT, ALONG),
                     rounded(g, grad_ptr.dtype.element_ty), mask=at)  # fmt: skip
