"""softmax, log_softmax and logsumexp, and the vector-Jacobian products, in one kernel each.

Bytes moved: a row that fits into registers is read once and written once. A longer one is folded
into its state lane by lane as it passes by, and read a second time when its output is written
(logsumexp has none and reads it once). A vector-Jacobian product reads two arrays in the same way.

PASS is "registers", "loop", or for few long rows, which several programs share, first "fold", which
leaves a state for each part of a row, and then "finish", which merges them.
"""

import triton
import triton.language as tl

from portable_softmax.kernels._triton._math import divide, exp, log1p, rounded
from portable_softmax.kernels._triton._state import (
    exponentials,
    fold,
    merge,
    merged,
    rest_of,
    row_max,
    shift_of,
)
from portable_softmax.kernels._triton._tiles import (
    class_offsets,
    number,
    part,
    place,
    row_pointers,
)


@triton.jit
def load_row(rows, where, c, w_class, inside, stride, fill, U: tl.constexpr, A: tl.constexpr,
             MASKED: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """A tile in DTYPE, `fill` outside the array and where the mask is False."""
    if MASKED:
        inside = inside & tl.load(where + c.to(tl.int64) * w_class, mask=inside, other=0).to(
            tl.int1
        )
    x = tl.load(rows + class_offsets(c, stride, U, A), mask=inside, other=fill)
    return tl.where(inside, x.to(DTYPE), fill), inside


@triton.jit
def _folded(rows, where, lead_inside, begin, end, x_class, w_class, temperature,
            ALONG: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr, TEMPERED: tl.constexpr,
            DTYPE: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
            DEPTH: tl.constexpr):  # fmt: skip
    """Fold a stretch of each row, of any length.

    Each lane has a state of its own. A lane's sum is started anew every DEPTH tiles, and added to
    a sum of sums: the rounding errors of a long row would grow with its length otherwise.
    """
    m = tl.full((ROWS, CLASSES), float("-inf"), DTYPE)
    rest = tl.full((ROWS, CLASSES), -1.0, DTYPE)
    for far in range(begin, end, CLASSES * DEPTH):
        near_m = tl.full((ROWS, CLASSES), float("-inf"), DTYPE)
        near_rest = tl.full((ROWS, CLASSES), -1.0, DTYPE)
        for start in range(far, tl.minimum(far + CLASSES * DEPTH, end), CLASSES):
            c = start + tl.arange(0, CLASSES)[None, :]
            inside = lead_inside & (c < end)
            x, _ = load_row(rows, where, c, w_class, inside, x_class, float("-inf"), UNIT, ALONG,
                            MASKED, DTYPE)  # fmt: skip
            near_m, near_rest = fold(near_m, near_rest, x, temperature, TEMPERED)
        m, rest = merge(m, rest, near_m, near_rest, temperature, TEMPERED)
    return merged(m, rest, temperature, TEMPERED)


@triton.jit
def load_states(m_ptr, rest_ptr, row, lead_inside, PARTS: tl.constexpr, temperature,
                TEMPERED: tl.constexpr):  # fmt: skip
    """Merge the states that the parts of a row have left."""
    p = tl.arange(0, PARTS)[None, :]
    m = tl.load(m_ptr + row * PARTS + p, mask=lead_inside, other=float("-inf"))
    rest = tl.load(rest_ptr + row * PARTS + p, mask=lead_inside, other=-1.0)
    return merged(m, rest, temperature, TEMPERED)


@triton.jit
def _finished(x, e, shifted, m, rest, inside, OP: tl.constexpr, MASKED: tl.constexpr):
    """The output of a tile of softmax or log_softmax."""
    if OP == "softmax":
        y = e * divide(1.0 + rest * 0.0, 1.0 + rest)
    else:
        y = shifted - log1p(rest)
    y = tl.where(tl.abs(m) == float("inf"), float("nan"), y)
    if MASKED:
        if OP == "softmax":
            y = tl.where(inside, y, 0.0)
        else:
            y = tl.where(inside, y, float("-inf"))
    return y


SIZES = ["lead", "lead_blocks", "classes", "x_lead", "x_other", "x_class", "y_lead", "y_other",
         "y_class", "w_lead", "w_other", "w_class", "d_lead", "d_other", "d_class", "temperature",
         "lead_count"]  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def forward(
    x_ptr, y_ptr, where_ptr, m_ptr, rest_ptr,
    lead_count: tl.int64, lead_blocks: tl.int32, classes: tl.int32,
    x_lead: tl.int64, x_other: tl.int64, x_class: tl.int64,
    y_lead: tl.int64, y_other: tl.int64, y_class: tl.int64,
    w_lead: tl.int64, w_other: tl.int64, w_class: tl.int64,
    temperature: tl.float64,
    OP: tl.constexpr, PASS: tl.constexpr, PARTS: tl.constexpr,
    ALONG: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr, TEMPERED: tl.constexpr,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """softmax, log_softmax or logsumexp, by OP."""
    other, lead = place(lead_blocks, ROWS)
    if ALONG == "lead":
        lead_count = lead_count * UNIT
    else:
        classes = classes * UNIT
    there = lead < lead_count
    t = number(temperature, DTYPE)
    rows = row_pointers(x_ptr, other, lead, x_other, x_lead, UNIT, ALONG)
    where = where_ptr
    if MASKED:
        where = where_ptr + other * w_other + lead * w_lead
    begin, end = part(classes, PARTS, CLASSES)
    row = other * lead_count + lead
    if PASS == "registers":
        c = tl.arange(0, CLASSES)[None, :]
        x, inside = load_row(rows, where, c, w_class, there & (c < classes), x_class, float("-inf"),
                             UNIT, ALONG, MASKED, DTYPE)  # fmt: skip
        m = row_max(x)
        shifted, e = exponentials(x, shift_of(m), t, TEMPERED)
        rest = rest_of(e)
    elif PASS == "finish":
        m, rest = load_states(m_ptr, rest_ptr, row, there, PARTS, t, TEMPERED)
    else:
        m, rest = _folded(rows, where, there, begin, end, x_class, w_class, t, ALONG, UNIT, MASKED,
                          TEMPERED, DTYPE, ROWS, CLASSES, DEPTH)  # fmt: skip
    if PASS == "fold":
        tl.store(m_ptr + row * PARTS + tl.program_id(1), m, mask=there)
        tl.store(rest_ptr + row * PARTS + tl.program_id(1), rest, mask=there)
    elif OP == "logsumexp":
        y = shift_of(m) + log1p(rest)
        # The rest of a row with an infinite maximum says only whether there is a nan.
        y = tl.where((tl.abs(m) == float("inf")) & (rest == rest), m, y)
        out = y_ptr + other * y_other + lead * y_lead
        tl.store(out, rounded(y, y_ptr.dtype.element_ty), mask=there)
    else:
        out = row_pointers(y_ptr, other, lead, y_other, y_lead, UNIT, ALONG)
        if PASS == "registers":
            y = _finished(x, e, shifted, m, rest, inside, OP, MASKED)
            tl.store(out + class_offsets(c, y_class, UNIT, ALONG),
                     rounded(y, y_ptr.dtype.element_ty), mask=there & (c < classes))  # fmt: skip
        else:
            for start in range(begin, end, CLASSES):
                c = start + tl.arange(0, CLASSES)[None, :]
                at = there & (c < end)
                x, inside = load_row(rows, where, c, w_class, at, x_class, float("-inf"), UNIT,
                                     ALONG, MASKED, DTYPE)  # fmt: skip
                shifted, e = exponentials(x, shift_of(m), t, TEMPERED)
                y = _finished(x, e, shifted, m, rest, inside, OP, MASKED)
                tl.store(out + class_offsets(c, y_class, UNIT, ALONG),
                         rounded(y, y_ptr.dtype.element_ty), mask=at)  # fmt: skip


@triton.jit
def _term(y, dy, OP: tl.constexpr):
    """What is summed over a row."""
    if OP == "softmax_vjp":
        return y * dy
    else:
        # A masked entry stays at -inf for every logit: nothing flows to it, or from it.
        return tl.where(tl.abs(y) == float("inf"), 0.0, dy)


@triton.jit
def _pulled_back(y, dy, total, OP: tl.constexpr):
    if OP == "softmax_vjp":
        return y * (dy - total)
    else:
        return _term(y, dy, OP) - exp(y, 0.0) * total


@triton.jit(do_not_specialize=SIZES)
def pull_back(
    y_ptr, dy_ptr, dx_ptr, total_ptr,
    lead_count: tl.int64, lead_blocks: tl.int32, classes: tl.int32,
    x_lead: tl.int64, x_other: tl.int64, x_class: tl.int64,
    d_lead: tl.int64, d_other: tl.int64, d_class: tl.int64,
    y_lead: tl.int64, y_other: tl.int64, y_class: tl.int64,
    OP: tl.constexpr, PASS: tl.constexpr, PARTS: tl.constexpr,
    ALONG: tl.constexpr, UNIT: tl.constexpr,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """softmax_vjp or log_softmax_vjp, by OP: x_* are the strides of y, y_* those of dx."""
    other, lead = place(lead_blocks, ROWS)
    if ALONG == "lead":
        lead_count = lead_count * UNIT
    else:
        classes = classes * UNIT
    there = lead < lead_count
    rows = row_pointers(y_ptr, other, lead, x_other, x_lead, UNIT, ALONG)
    d_rows = row_pointers(dy_ptr, other, lead, d_other, d_lead, UNIT, ALONG)
    begin, end = part(classes, PARTS, CLASSES)
    row = other * lead_count + lead
    if PASS == "registers":
        c = tl.arange(0, CLASSES)[None, :]
        at = there & (c < classes)
        y, _ = load_row(rows, rows, c, 0, at, x_class, 0.0, UNIT, ALONG, False, DTYPE)
        dy, _ = load_row(d_rows, rows, c, 0, at, d_class, 0.0, UNIT, ALONG, False, DTYPE)
        total = tl.sum(_term(y, dy, OP), axis=1, keep_dims=True)
    elif PASS == "finish":
        p = tl.arange(0, PARTS)[None, :]
        total = tl.load(total_ptr + row * PARTS + p, mask=there, other=0.0)
        total = tl.sum(total, axis=1, keep_dims=True)
    else:
        lanes = tl.full((ROWS, CLASSES), 0.0, DTYPE)
        for far in range(begin, end, CLASSES * DEPTH):
            near = tl.full((ROWS, CLASSES), 0.0, DTYPE)
            for start in range(far, tl.minimum(far + CLASSES * DEPTH, end), CLASSES):
                c = start + tl.arange(0, CLASSES)[None, :]
                at = there & (c < end)
                y, _ = load_row(rows, rows, c, 0, at, x_class, 0.0, UNIT, ALONG, False, DTYPE)
                dy, _ = load_row(d_rows, rows, c, 0, at, d_class, 0.0, UNIT, ALONG, False, DTYPE)
                near += _term(y, dy, OP)
            lanes += near
        total = tl.sum(lanes, axis=1, keep_dims=True)
    if PASS == "fold":
        tl.store(total_ptr + row * PARTS + tl.program_id(1), total, mask=there)
    else:
        out = row_pointers(dx_ptr, other, lead, y_other, y_lead, UNIT, ALONG)
        if PASS == "registers":
            dx = _pulled_back(y, dy, total, OP)
            tl.store(out + class_offsets(c, y_class, UNIT, ALONG),
                     rounded(dx, dx_ptr.dtype.element_ty), mask=at)  # fmt: skip
        else:
            for start in range(begin, end, CLASSES):
                c = start + tl.arange(0, CLASSES)[None, :]
                at = there & (c < end)
                y, _ = load_row(rows, rows, c, 0, at, x_class, 0.0, UNIT, ALONG, False, DTYPE)
                dy, _ = load_row(d_rows, rows, c, 0, at, d_class, 0.0, UNIT, ALONG, False, DTYPE)
                dx = _pulled_back(y, dy, total, OP)
                tl.store(out + class_offsets(c, y_class, UNIT, ALONG),
                         rounded(dx, dx_ptr.dtype.element_ty), mask=at)  # fmt: skip
