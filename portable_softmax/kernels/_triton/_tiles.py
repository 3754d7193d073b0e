"""Where a program finds its tile: rows by classes, of an array in any layout with a unit stride.

An array is seen as (other, lead, classes): a program has some positions along `lead`, one along
`other`, and all classes or a part of them. ALONG says which index has the stride 1, so that the
lanes of a warp read neighbours: "classes" for rows, "lead" for columns, which are read as they
lie, without a transposed copy. Sizes and strides come divided by UNIT where all of them are
multiples of the elements in 16 bytes: that lets the compiler load 16 bytes at a time. Offsets are
64 bits wide.
"""

import triton
import triton.language as tl


@triton.jit
def place(lead_blocks, ROWS: tl.constexpr):
    """The program's position along `other`, and its positions along `lead`, as a column."""
    program = tl.program_id(0)
    other = (program // lead_blocks).to(tl.int64)
    lead = (program % lead_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return other, lead[:, None]


@triton.jit
def row_pointers(
    pointer, other, lead, other_stride, lead_stride, UNIT: tl.constexpr, ALONG: tl.constexpr
):
    """The first class of each row."""
    pointer = pointer + other * other_stride * UNIT
    if ALONG == "lead":
        return pointer + lead
    else:
        return pointer + lead * lead_stride * UNIT


@triton.jit
def class_offsets(c, class_stride, UNIT: tl.constexpr, ALONG: tl.constexpr):
    """How far a class is from the first."""
    if ALONG == "lead":
        return c.to(tl.int64) * class_stride * UNIT
    else:
        return c


@triton.jit
def part(classes, PARTS: tl.constexpr, STEP: tl.constexpr):
    """The classes that are this program's: all, or its one of several parts, in whole tiles."""
    if PARTS == 1:
        return classes * 0, classes
    else:
        size = tl.cdiv(tl.cdiv(classes, PARTS), STEP) * STEP
        begin = tl.minimum(tl.program_id(1) * size, classes)
        return begin, tl.minimum(begin + size, classes)


@triton.jit
def number(value, DTYPE: tl.constexpr):
    """A Python float in DTYPE: an argument has 64 bits, or when interpreted no bits yet."""
    return (tl.full((1, 1), 0.0, DTYPE) + value).to(DTYPE)
