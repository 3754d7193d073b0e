"""softmax, log_softmax and logsumexp, and the vector-Jacobian products, in one kernel each.

Bytes moved: a row that fits into registers is read once and written once. Longer rows go through
a relay (`_tiles`), which reads memory once, the L2 cache once, and writes once. logsumexp only
reads, once, in a loop, or in a relay if there are few rows. A vector-Jacobian product reads two
arrays in the same way.

PASS is "registers", "loop" or "relay". QUICK: the result dtype has half precision.
"""

import triton
import triton.language as tl

from portable_softmax.kernels._triton._math import divide, exp, expm1, log1p, rounded
from portable_softmax.kernels._triton._state import (
    below,
    exponentials,
    is_finite,
    shift_of,
    state_of,
)
from portable_softmax.kernels._triton._terms import fold_part, merge_partials
from portable_softmax.kernels._triton._tiles import (
    NOT_SPECIALIZED,
    class_offsets,
    in_two_parts,
    load_partials,
    load_row,
    part_bounds,
    parts_to_fold,
    positions_of,
    publish,
    relay_role,
    row_pointers,
    scalar,
    store_partial,
)
from portable_softmax.portable import CONFIDENT as _CONFIDENT

CONFIDENT = tl.constexpr(_CONFIDENT)


@triton.jit
def _row_factor(m, rest, unscale, dy, OP: tl.constexpr):
    """The per-position value of the output: a factor, or for log_softmax the log to subtract."""
    if OP == "log_softmax":
        return tl.where(is_finite(m), log1p(rest), float("nan"))
    else:
        factor = divide(unscale, 1.0 + rest)
        factor = tl.where(is_finite(m), factor, float("nan"))
        if OP == "logsumexp_vjp":
            # The gradient of an infinite logsumexp is 0.
            factor = tl.where(tl.abs(m) == float("inf"), 0.0, dy * factor)
        return factor


@triton.jit
def _outputs(x, m, e, factor, inside, temperature, OP: tl.constexpr, MASKED: tl.constexpr,
             TEMPERED: tl.constexpr):  # fmt: skip
    """The output of a tile."""
    if OP == "log_softmax":
        y = below(x, m, temperature, TEMPERED) - factor
        if MASKED:
            y = tl.where(inside, y, float("-inf"))
    else:
        y = e * factor
        if OP == "logsumexp_vjp":
            y = tl.where(factor == 0.0, 0.0, y)
        if MASKED:
            y = tl.where(inside, y, 0.0)
    return y


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def forward(
    x_ptr, y_ptr, where_ptr, dy_ptr, m_ptr, rest_ptr, flags_ptr,
    lead_count: tl.int64, lead_blocks: tl.int32, classes: tl.int32,
    parts: tl.int32, finishers: tl.int32, lag: tl.int32,
    x_lead: tl.int64, x_other: tl.int64, x_class: tl.int64,
    y_lead: tl.int64, y_other: tl.int64, y_class: tl.int64,
    w_lead: tl.int64, w_other: tl.int64, w_class: tl.int64,
    d_lead: tl.int64, d_other: tl.int64,
    temperature: tl.float64,
    OP: tl.constexpr, PASS: tl.constexpr, MAX_PARTS: tl.constexpr, LOOKS: tl.constexpr,
    ALONG: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr, TEMPERED: tl.constexpr,
    QUICK: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """softmax, log_softmax, logsumexp or logsumexp_vjp, by OP."""
    block, part, folds, exists = tl.program_id(0), 0, True, True
    if PASS == "relay":
        block, part, folds, exists = relay_role(parts, finishers, lag)
    other, lead, row_mask, lead_count, classes = positions_of(
        block, lead_blocks, lead_count, classes, ROWS, UNIT, ALONG
    )
    t = in_two_parts(temperature, DTYPE)
    rows = row_pointers(x_ptr, other, lead, x_other, x_lead, UNIT, ALONG)
    where = where_ptr
    if MASKED:
        where = where_ptr + other * w_other + lead * w_lead
    row = other * lead_count + lead
    dy = t[0] * 0.0
    if OP == "logsumexp_vjp":
        dy = tl.load(dy_ptr + other * d_other + lead * d_lead, mask=row_mask, other=0.0).to(DTYPE)
    if OP == "logsumexp":
        out = y_ptr + other * y_other + lead * y_lead
    else:
        out = row_pointers(y_ptr, other, lead, y_other, y_lead, UNIT, ALONG)

    if PASS == "registers":
        c = tl.arange(0, CLASSES)[None, :]
        x, inside = load_row(rows, where, c, w_class, row_mask & (c < classes), x_class,
                             float("-inf"), UNIT, ALONG, MASKED, DTYPE)  # fmt: skip
        m, rest, e, unscale = state_of(x, t, TEMPERED, QUICK)
        if OP == "logsumexp":
            tl.store(out, rounded(_logsumexp(m, rest), y_ptr.dtype.element_ty), mask=row_mask)
        else:
            factor = _row_factor(m, rest, unscale, dy, OP)
            y = _outputs(x, m, e, factor, inside, t, OP, MASKED, TEMPERED)
            tl.store(out + class_offsets(c, y_class, UNIT, ALONG),
                     rounded(y, y_ptr.dtype.element_ty), mask=row_mask & (c < classes))  # fmt: skip
    elif PASS == "loop":
        m, rest, _ = fold_part(rows, where, row_mask, classes * 0, classes, x_class, w_class, t,
                               t[0], ALONG, UNIT, MASKED, TEMPERED, False, QUICK, DTYPE, ROWS,
                               CLASSES, STEPS)  # fmt: skip
        tl.store(out, rounded(_logsumexp(m, rest), y_ptr.dtype.element_ty), mask=row_mask)
    elif exists:
        published = flags_ptr + block
        first, last, bits = parts_to_fold(published, parts, part, folds, LOOKS)
        for p in range(first, last):
            if bits >> p & 1 == 0:
                begin, end = part_bounds(classes, parts, p, CLASSES)
                m, rest, _ = fold_part(rows, where, row_mask, begin, end, x_class, w_class, t,
                                       t[0], ALONG, UNIT, MASKED, TEMPERED, False, QUICK, DTYPE,
                                       ROWS, CLASSES, STEPS)  # fmt: skip
                store_partial(m_ptr, row, parts, p, m, row_mask)
                store_partial(rest_ptr, row, parts, p, rest, row_mask)
                publish(published, p)
        if not folds:
            m, rest = merge_partials(m_ptr, rest_ptr, row, parts, row_mask, t, TEMPERED, MAX_PARTS)
            if OP == "logsumexp":
                tl.store(out, rounded(_logsumexp(m, rest), y_ptr.dtype.element_ty), mask=row_mask)
            else:
                begin, end = part_bounds(classes, parts, part, CLASSES)
                shift = shift_of(m, TEMPERED, QUICK)
                factor = _row_factor(m, rest, shift[2], dy, OP)
                for start in range(begin, end, CLASSES):
                    c = start + tl.arange(0, CLASSES)[None, :]
                    at = row_mask & (c < end)
                    x, inside = load_row(rows, where, c, w_class, at, x_class, float("-inf"), UNIT,
                                         ALONG, MASKED, DTYPE)  # fmt: skip
                    e = exponentials(x, shift, t, TEMPERED, QUICK)
                    y = _outputs(x, m, e, factor, inside, t, OP, MASKED, TEMPERED)
                    tl.store(out + class_offsets(c, y_class, UNIT, ALONG),
                             rounded(y, y_ptr.dtype.element_ty), mask=at)  # fmt: skip


@triton.jit
def _logsumexp(m, rest):
    """The logsumexp of a state."""
    return tl.where(is_finite(m), m + log1p(rest), m)


@triton.jit
def _vjp_term(y, dy, OP: tl.constexpr):
    """The terms of the sum over a row."""
    if OP == "log_softmax_gradient":  # of logits without a mask
        return dy
    else:
        # A masked entry is -inf for all logits: it has no gradient and adds none.
        return tl.where(tl.abs(y) == float("inf"), 0.0, dy)


@triton.jit
def _sum_terms(rows, d_rows, row_mask, begin, end, x_class, d_class, OP: tl.constexpr,
               ALONG: tl.constexpr, UNIT: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
               CLASSES: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    """The sums of the terms of a part of each row, of which only softmax_vjp has five."""
    LANES: tl.constexpr = CLASSES // STEPS
    zero = tl.full((ROWS, LANES), 0.0, DTYPE)
    ps, cs, products, rest, lanes = zero, zero, zero, zero, zero
    for start in range(begin, end, CLASSES):
        rests, terms = zero, zero
        for i in tl.static_range(STEPS):
            c = start + i * LANES + tl.arange(0, LANES)[None, :]
            at = row_mask & (c < end)
            y, _ = load_row(rows, rows, c, 0, at, x_class, 0.0, UNIT, ALONG, False, DTYPE)
            dy, _ = load_row(d_rows, rows, c, 0, at, d_class, 0.0, UNIT, ALONG, False, DTYPE)
            if OP == "softmax_vjp":
                p, c, product, others, more = _softmax_terms(y, dy)
                ps, cs, products, rests = ps + p, cs + c, products + product, rests + others
                terms += more
            else:
                terms += _vjp_term(y, dy, OP)
        rest, lanes = rest + rests, lanes + terms
    return (
        _sum(ps), _sum(cs), _sum(products), _sum(rest), _sum(lanes),
    )  # fmt: skip


@triton.jit
def _sum(terms):
    return tl.sum(terms, axis=1, keep_dims=True)


@triton.jit
def _softmax_terms(y, dy):
    """The terms of the sums of softmax_vjp, as the portable code has them."""
    big, zero = y > CONFIDENT, y * 0.0
    product = y * dy
    return (
        tl.where(big, y, zero), tl.where(big, dy, zero), tl.where(big, product, zero),
        tl.where(big, zero, y), tl.where(big, zero, product),
    )  # fmt: skip


@triton.jit
def _centre(p, c, product, rest, s, OFF: tl.constexpr):
    """What is taken off dy, and the sum of y times what is left."""
    fits = (tl.abs(p + rest - 1.0) <= OFF) & is_finite(c) & (product == p * c)
    return tl.where(fits, c, 0.0), tl.where(fits, s - c * rest, s + product)


@triton.jit
def _vjp(y, dy, total, inverse, OP: tl.constexpr, TEMPERED: tl.constexpr):
    if OP == "softmax_vjp":
        dx = y * (dy - total)
    else:
        dy = _vjp_term(y, dy, OP)
        # As dy - exp(y) * total, with the digits that 1 - exp(y) has near y = 0.
        dx = -dy * expm1(y) - exp(y) * (total - dy)
    if TEMPERED:
        dx = dx * inverse
    return dx


@triton.jit
def _merged(sums_ptr, row, i: tl.constexpr, parts, row_mask, MAX_PARTS: tl.constexpr):
    """The i-th sum of whole rows."""
    return _sum(load_partials(sums_ptr, row * 5 + i, parts, row_mask, 0.0, MAX_PARTS))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def pull_back(
    y_ptr, dy_ptr, dx_ptr, total_ptr, flags_ptr,
    lead_count: tl.int64, lead_blocks: tl.int32, classes: tl.int32,
    parts: tl.int32, finishers: tl.int32, lag: tl.int32,
    x_lead: tl.int64, x_other: tl.int64, x_class: tl.int64,
    d_lead: tl.int64, d_other: tl.int64, d_class: tl.int64,
    y_lead: tl.int64, y_other: tl.int64, y_class: tl.int64,
    temperature: tl.float64,
    OP: tl.constexpr, PASS: tl.constexpr, MAX_PARTS: tl.constexpr, LOOKS: tl.constexpr,
    ALONG: tl.constexpr, UNIT: tl.constexpr, TEMPERED: tl.constexpr,
    OFF: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """softmax_vjp or log_softmax_vjp, by OP, over T; x_* are the strides of y, y_* those of dx.

    OFF is how far from 1 the sum of a softmax may be.
    """
    NUMBERS: tl.constexpr = 5 if OP == "softmax_vjp" else 1
    block, part, folds, exists = tl.program_id(0), 0, True, True
    if PASS == "relay":
        block, part, folds, exists = relay_role(parts, finishers, lag)
    other, lead, row_mask, lead_count, classes = positions_of(
        block, lead_blocks, lead_count, classes, ROWS, UNIT, ALONG
    )
    t = scalar(temperature, DTYPE)
    inverse = divide(1.0 + t * 0.0, t)
    rows = row_pointers(y_ptr, other, lead, x_other, x_lead, UNIT, ALONG)
    d_rows = row_pointers(dy_ptr, other, lead, d_other, d_lead, UNIT, ALONG)
    out = row_pointers(dx_ptr, other, lead, y_other, y_lead, UNIT, ALONG)
    row = other * lead_count + lead
    if PASS == "registers":
        c = tl.arange(0, CLASSES)[None, :]
        at = row_mask & (c < classes)
        y, _ = load_row(rows, rows, c, 0, at, x_class, 0.0, UNIT, ALONG, False, DTYPE)
        dy, _ = load_row(d_rows, rows, c, 0, at, d_class, 0.0, UNIT, ALONG, False, DTYPE)
        if OP == "softmax_vjp":
            less = _sum(tl.where(y > CONFIDENT, dy, 0.0))
            fits = (tl.abs(_sum(y) - 1.0) <= OFF) & is_finite(less)
            dy = dy - tl.where(fits, less, 0.0)
            total = _sum(y * dy)
        else:
            total = _sum(_vjp_term(y, dy, OP))
        dx = _vjp(y, dy, total, inverse, OP, TEMPERED)
        tl.store(out + class_offsets(c, y_class, UNIT, ALONG), rounded(dx, dx_ptr.dtype.element_ty),
                 mask=at)  # fmt: skip
    elif exists:
        published = flags_ptr + block
        first, last, bits = parts_to_fold(published, parts, part, folds, LOOKS)
        for p in range(first, last):
            if bits >> p & 1 == 0:
                begin, end = part_bounds(classes, parts, p, CLASSES)
                sums = _sum_terms(rows, d_rows, row_mask, begin, end, x_class, d_class, OP, ALONG,
                                  UNIT, DTYPE, ROWS, CLASSES, STEPS)  # fmt: skip
                for i in tl.static_range(5 - NUMBERS, 5):
                    store_partial(total_ptr, row * 5 + i, parts, p, sums[i], row_mask)
                publish(published, p)
        if not folds:
            begin, end = part_bounds(classes, parts, part, CLASSES)
            total = _merged(total_ptr, row, 4, parts, row_mask, MAX_PARTS)
            less = total * 0.0
            if OP == "softmax_vjp":
                less, total = _centre(
                    _merged(total_ptr, row, 0, parts, row_mask, MAX_PARTS),
                    _merged(total_ptr, row, 1, parts, row_mask, MAX_PARTS),
                    _merged(total_ptr, row, 2, parts, row_mask, MAX_PARTS),
                    _merged(total_ptr, row, 3, parts, row_mask, MAX_PARTS), total, OFF,
                )  # fmt: skip
            for start in range(begin, end, CLASSES):
                c = start + tl.arange(0, CLASSES)[None, :]
                at = row_mask & (c < end)
                y, _ = load_row(rows, rows, c, 0, at, x_class, 0.0, UNIT, ALONG, False, DTYPE)
                dy, _ = load_row(d_rows, rows, c, 0, at, d_class, 0.0, UNIT, ALONG, False, DTYPE)
                if OP == "softmax_vjp":
                    dy = dy - less
                dx = _vjp(y, dy, total, inverse, OP, TEMPERED)
                tl.store(out + class_offsets(c, y_class, UNIT, ALONG),
                         rounded(dx, dx_ptr.dtype.element_ty), mask=at)  # fmt: skip
