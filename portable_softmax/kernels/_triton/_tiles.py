"""Where a program finds its tile: rows by classes, of an array in any layout with a unit stride.

An array is seen as (other, lead, classes): a program has a block of positions along `lead`, one
along `other`, and all classes or a part of them. ALONG says which index has the stride 1, so that
the lanes of a warp read neighbours: "classes" for rows, "lead" for columns, which are read as they
lie, without a transposed copy. Sizes and strides come divided by UNIT where all of them are
multiples of the elements in 16 bytes: that lets the compiler load 16 bytes at a time. Offsets are
64 bits wide.

Long rows are worked on in parts, in a relay. First a program folds each part and publishes its
partial: it stores it, then sets the part's bit in a word that the block of rows has. A later
program of the same launch looks at that word, merges the partials, reads its part once more, from
the L2 cache, and writes it. This is the decoupled look-back of CUB (Merrill and Garland 2016) with
the fallback of Smith, Levien and Owens (2024): after LOOKS looks a program folds the missing parts
itself, so that it ends in whatever order the device runs programs.

Memory order: all threads have stored a partial (barrier) before one releases its bit, and one
acquires the word before any thread (barrier) loads partials. A part that falls back is folded by
the same instructions between the same bounds: whoever stores a partial twice stores the same bits,
and setting a bit twice changes nothing. So a program that comes late, and several programs that
look at one word or fall back for one part, do no harm, and answers do not depend on who folded.
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
def relay_role(parts, finishers, lag):
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
def part_bounds(classes, parts, part, STEP: tl.constexpr):
    """The classes of a part, in whole steps."""
    size = tl.cdiv(tl.cdiv(classes, parts), STEP) * STEP
    begin = tl.minimum(part * size, classes)
    return begin, tl.minimum(begin + size, classes)


@triton.jit
def _missing(bits, parts):
    """The bits of the parts that are not published yet, moved to the top; 0 if there are none."""
    return ~bits << (64 - parts)


@triton.jit
def lookback(published, parts, LOOKS: tl.constexpr):
    """Look at a word until it has the bits of all parts, at most LOOKS times; return its bits."""
    bits = tl.full((), 0, tl.int64)
    looks = 0
    while (looks < LOOKS) & (_missing(bits, parts) != 0):
        bits = tl.atomic_add(published, 0, sem="acquire", scope="gpu")
        looks += 1
    tl.debug_barrier()
    return bits


@triton.jit
def parts_to_fold(published, parts, part, folds, LOOKS: tl.constexpr):
    """The range of parts that a program looks through, and the bits of those it need not fold.

    One that folds has its own part; one that finishes has those not published in time.
    """
    bits = tl.full((), 0, tl.int64)
    first, last = part, part + 1
    if not folds:
        bits = lookback(published, parts, LOOKS)
        first, last = part * 0, tl.where(_missing(bits, parts) == 0, 0, parts)
    return first, last, bits


@triton.jit
def publish(published, part):
    """Tell all programs that the partial of a part can be loaded."""
    tl.debug_barrier()  # the threads of this program first
    tl.atomic_or(published, tl.full((), 1, tl.int64) << part, sem="release", scope="gpu")


@triton.jit
def store_partial(pointer, row, parts, part, value, there):
    """Store one value of the partial of each row."""
    tl.store(pointer + row * parts + part, value, mask=there)


@triton.jit
def load_partials(pointer, row, parts, there, fill, MAX_PARTS: tl.constexpr):
    """Load one value of the partials of each row, along the classes' axis."""
    p = tl.arange(0, MAX_PARTS)[None, :]
    # Not from the L1 cache, which knows of no other multiprocessor's stores.
    return tl.load(
        pointer + row * parts + p, mask=there & (p < parts), other=fill, cache_modifier=".cg"
    )
