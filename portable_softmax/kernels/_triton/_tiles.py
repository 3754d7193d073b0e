"""Where a program finds its tile: rows by classes, of an array in any layout with a unit stride.

An array is seen as (other, lead, classes): a program has a block of positions along `lead`, one
along `other`, and all classes or a part of them. ALONG says which index has the stride 1, so that
the lanes of a warp read neighbours: "classes" for rows, "lead" for columns, which are read as they
lie, without a transposed copy. Sizes and strides come divided by UNIT where all of them are
multiples of the elements in 16 bytes: that lets the compiler load 16 bytes at a time. Offsets are
64 bits wide.

Long rows are worked on in parts, in a relay. First each part is folded by a program, which leaves
a state and signals. A later program of the same launch waits for the signals of its row, merges
the states, reads its part once more, from the L2 cache, and writes it. A program waits only for
programs with lower numbers, as CUB's decoupled look-back does (Merrill and Garland 2016), so that
some program can always go on; run one after another, as by the interpreter, none ever waits.
"""

import triton
import triton.language as tl


@triton.jit
def place(block, lead_blocks, ROWS: tl.constexpr):
    """A block's position along `other`, and its positions along `lead`, as a column."""
    other = block * 0
    if block >= lead_blocks:  # a division takes longer than finding out that there is none
        other = block // lead_blocks
    lead = (block - other * lead_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return other.to(tl.int64), lead[:, None]


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
def load_row(rows, where, c, w_class, inside, stride, fill, U: tl.constexpr, A: tl.constexpr,
             MASKED: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """A tile in DTYPE, `fill` outside the array and where the mask is False."""
    if MASKED:
        inside = inside & tl.load(where + c.to(tl.int64) * w_class, mask=inside, other=0).to(
            tl.int1
        )
    x = tl.load(rows + class_offsets(c, stride, U, A), mask=inside, other=fill)
    return x.to(DTYPE), inside


@triton.jit
def number(value, DTYPE: tl.constexpr):
    """A Python float in DTYPE: an argument has 64 bits, or when interpreted no bits yet."""
    return (tl.full((1, 1), 0.0, DTYPE) + value).to(DTYPE)


@triton.jit
def turn(parts, finishers, lag):
    """The block that a program of a relay works on, its part of it, and whether it folds it.

    After the programs that fold a block come those that finish the block `lag` blocks before, so
    that they need not wait long. The first and last programs have no block, and another's number.
    """
    program = tl.program_id(0)
    leg = program // (parts + finishers)
    at = program % (parts + finishers)
    folds = at < parts
    block = tl.where(folds, leg, leg - lag)
    part = tl.where(folds, at, at - parts)
    last = tl.num_programs(0) // (parts + finishers) - lag - 1
    exists = (block >= 0) & (block <= last)
    return tl.minimum(tl.maximum(block, 0), last), part, folds, exists


@triton.jit
def stretch(classes, parts, part, STEP: tl.constexpr):
    """The classes of a part, in whole steps."""
    size = tl.cdiv(tl.cdiv(classes, parts), STEP) * STEP
    begin = tl.minimum(part * size, classes)
    return begin, tl.minimum(begin + size, classes)


@triton.jit
def signal(pointer):
    """Tell all programs that what this one has stored can be read."""
    tl.debug_barrier()  # the threads of this program first
    tl.atomic_add(pointer, 1, sem="release", scope="gpu")


@triton.jit
def wait(pointer, count):
    """Wait for a number of signals."""
    while tl.atomic_add(pointer, 0, sem="acquire", scope="gpu") < count:
        pass
    tl.debug_barrier()


@triton.jit
def leave(pointer, row, parts, part, value, there):
    """Store what a program has found of its part of each row."""
    tl.store(pointer + row * parts + part, value, mask=there)


@triton.jit
def found(pointer, row, parts, there, fill, MOST: tl.constexpr):
    """Load what the parts of each row have left, along the classes' axis."""
    p = tl.arange(0, MOST)[None, :]
    # Not from the L1 cache, which knows of no other multiprocessor's stores.
    return tl.load(
        pointer + row * parts + p, mask=there & (p < parts), other=fill, cache_modifier=".cg"
    )
