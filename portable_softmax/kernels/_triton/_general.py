"""Cross-entropy with label smoothing or a distribution as labels, and its gradient.

The loss is a sum over the classes. Bytes moved: rows in registers are read once, and the gradient
is written once. Longer rows are read three times: for the state, the loss and the gradient.
"""

import triton
import triton.language as tl

from portable_softmax.kernels._triton._math import divide, log1p, rounded
from portable_softmax.kernels._triton._state import (
    exponentials,
    is_finite,
    shift_of,
    state_of,
)
from portable_softmax.kernels._triton._terms import (
    coefficients,
    fold_part,
    gradient,
    label_of,
    load_logits,
    scale_of,
    times,
)
from portable_softmax.kernels._triton._tiles import (
    NOT_SPECIALIZED,
    class_offsets,
    positions_of,
    row_pointers,
    scalar,
)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def general(
    x_ptr, labels_ptr, t_ptr, where_ptr, weight_ptr, divisor_ptr, loss_ptr, grad_ptr, flags_ptr,
    lead_count: tl.int64, lead_blocks: tl.int32, classes: tl.int32,
    x_lead: tl.int64, x_other: tl.int64, x_class: tl.int64,
    g_lead: tl.int64, g_other: tl.int64, g_class: tl.int64,
    t_lead: tl.int64, t_other: tl.int64, t_class: tl.int64,
    w_lead: tl.int64, w_other: tl.int64, w_class: tl.int64,
    l_lead: tl.int64, l_other: tl.int64, o_lead: tl.int64, o_other: tl.int64,
    d_lead: tl.int64, d_other: tl.int64,
    ignore: tl.int64, smoothing: tl.float64, z_loss: tl.float64, cap: tl.float64,
    positions: tl.float64,
    PASS: tl.constexpr, ALONG: tl.constexpr, UNIT: tl.constexpr,
    INDEX: tl.constexpr, IGNORING: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTH: tl.constexpr,
    Z: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, GRAD: tl.constexpr,
    DIVISOR: tl.constexpr, CHECK: tl.constexpr, QUICK: tl.constexpr,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The loss of each position, and with GRAD its gradient: the arguments are those of `loss`.

    t is a distribution. PASS is "registers" or "loop".
    """
    other, lead, row_mask, lead_count, classes = positions_of(
        tl.program_id(0), lead_blocks, lead_count, classes, ROWS, UNIT, ALONG
    )
    cap = scalar(cap, DTYPE)
    z_loss = scalar(z_loss, DTYPE)
    positions = scalar(positions, DTYPE)
    one = scalar(1.0, DTYPE)
    rows = row_pointers(x_ptr, other, lead, x_other, x_lead, UNIT, ALONG)
    t_rows = rows
    if not INDEX:
        t_rows = row_pointers(t_ptr, other, lead, t_other, t_lead, UNIT, ALONG)
    where = where_ptr
    if MASKED:
        where = where_ptr + other * w_other + lead * w_lead

    # The label.
    label = (lead * 0).to(tl.int64)
    valid = row_mask
    ignored = lead < 0
    u = one + (lead * 0).to(DTYPE)
    if INDEX:
        label, valid, ignored = label_of(labels_ptr, other, lead, l_other, l_lead, row_mask,
                                         classes, ignore, IGNORING)  # fmt: skip
        if MASKED:
            unmasked = tl.load(where + label * w_class, mask=row_mask, other=0).to(tl.int1)
            valid = valid & unmasked
        if WEIGHTED:
            u = tl.load(weight_ptr + label, mask=row_mask, other=0.0)
        u = tl.where(ignored, 0.0, u)
        valid = valid | ignored
    counted = row_mask & ~ignored

    # The state of the row, and the number of its unmasked classes.
    c = tl.arange(0, CLASSES)[None, :]
    at = counted & (c < classes)
    count = tl.full((ROWS, 1), 0, tl.int32) + classes
    if PASS == "registers":
        raw, x, inside = load_logits(rows, where, c, w_class, at, x_class, cap, UNIT, ALONG, MASKED,
                                     CAPPED, DTYPE)  # fmt: skip
        m, rest, e, _ = state_of(x, one, False, QUICK)
        if MASKED:
            count = tl.sum(inside.to(tl.int32), axis=1, keep_dims=True)
    else:
        m, rest, found = fold_part(rows, where, counted, classes * 0, classes, x_class, w_class,
                                   one, cap, ALONG, UNIT, MASKED, False, CAPPED, QUICK, DTYPE, ROWS,
                                   CLASSES, STEPS, MASKED)  # fmt: skip
        if MASKED:
            count = found
    if MASKED and not INDEX:
        # A row without any class has loss 0; m = rest = 0 keeps everything finite.
        m = tl.where(count == 0, 0.0, m)
        rest = tl.where(count == 0, 0.0, rest)
    log = tl.where(is_finite(m), log1p(rest), float("nan"))
    lse = m + log

    # The loss: sum_j q_j ((m - x_j) + log).
    keep = 1.0 - scalar(smoothing, DTYPE)
    spread = divide(scalar(smoothing, DTYPE), tl.maximum(count, 1).to(DTYPE))
    if PASS == "registers":
        q, t = coefficients(t_rows, weight_ptr, label, c, t_class, inside, keep, spread, UNIT,
                            ALONG, INDEX, WEIGHTED, SMOOTH, DTYPE)  # fmt: skip
        value = tl.sum(times(q, tl.where(at, (m - x) + log, 0.0)), axis=1, keep_dims=True)
        a = tl.sum(q, axis=1, keep_dims=True)
        if not INDEX:
            u = tl.sum(t, axis=1, keep_dims=True)
    else:
        values = tl.full((ROWS, CLASSES), 0.0, DTYPE)
        qs = tl.full((ROWS, CLASSES), 0.0, DTYPE)
        ts = tl.full((ROWS, CLASSES), 0.0, DTYPE)
        for start in range(0, classes, CLASSES):
            c = start + tl.arange(0, CLASSES)[None, :]
            at = counted & (c < classes)
            raw, x, inside = load_logits(rows, where, c, w_class, at, x_class, cap, UNIT, ALONG,
                                         MASKED, CAPPED, DTYPE)  # fmt: skip
            q, t = coefficients(t_rows, weight_ptr, label, c, t_class, inside, keep, spread, UNIT,
                                ALONG, INDEX, WEIGHTED, SMOOTH, DTYPE)  # fmt: skip
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
    tl.store(loss_ptr + other * o_other + lead * o_lead, value, mask=row_mask)
    if CHECK:
        # All programs write the same 1.
        tl.store(flags_ptr + lead * 0, lead.to(tl.int64) * 0 + 1, mask=row_mask & ~valid)

    if GRAD:
        squared = u
        if Z:
            squared = times(u, 2.0 * z_loss * lse)
        scales = divisor_ptr + other * d_other + lead * d_lead
        factor = scale_of(rest, scales, positions, counted, DIVISOR)
        factor = tl.where(is_finite(m), factor, float("nan"))
        shift = shift_of(m, False, QUICK)
        out = row_pointers(grad_ptr, other, lead, g_other, g_lead, UNIT, ALONG)
        if PASS == "registers":
            e = tl.where(x == m, 1.0, e * shift[2])
            g = gradient(raw, e, q, a, squared, rest, factor, valid, ignored, inside, cap,
                         INDEX, CAPPED, Z)  # fmt: skip
            tl.store(out + class_offsets(c, g_class, UNIT, ALONG),
                     rounded(g, grad_ptr.dtype.element_ty),
                     mask=row_mask & (c < classes))  # fmt: skip
        else:
            for start in range(0, classes, CLASSES):
                c = start + tl.arange(0, CLASSES)[None, :]
                at = row_mask & (c < classes)
                raw, x, inside = load_logits(rows, where, c, w_class, at & ~ignored, x_class, cap,
                                             UNIT, ALONG, MASKED, CAPPED, DTYPE)  # fmt: skip
                e = exponentials(x, shift, one, False, QUICK) * shift[2]
                e = tl.where(x == m, 1.0, e)  # exactly
                q, _ = coefficients(t_rows, weight_ptr, label, c, t_class, inside, keep, spread,
                                    UNIT, ALONG, INDEX, WEIGHTED, SMOOTH, DTYPE)  # fmt: skip
                g = gradient(raw, e, q, a, squared, rest, factor, valid, ignored, inside, cap,
                             INDEX, CAPPED, Z)  # fmt: skip
                tl.store(out + class_offsets(c, g_class, UNIT, ALONG),
                         rounded(g, grad_ptr.dtype.element_ty), mask=at)  # fmt: skip
