"""Tiles of rows by classes, of an array in any layout with a unit stride; the relay of long rows.

An array is seen as (other, lead, classes): a program has a block of positions along `lead`, one
position along `other`, and all classes or a part of them. ALONG names the index with stride 1, for
coalesced loads: "classes" for rows, "lead" for columns, which need no transposed copy. Sizes and
strides are divided by UNIT, the number of elements in 16 bytes, where all are multiples of it: that
lets the compiler load 16 bytes at a time. Offsets have 64 bits.

Long rows are split into parts. In a relay, one program folds each part and publishes its partial:
it stores the partial, then sets the part's bit in the word of its block of rows. A later program of
the same launch polls that word, merges the partials, reads its part again, from the L2 cache, and
writes the output. This is decoupled look-back (Merrill and Garland 2016) with decoupled fallback
(Smith, Levien and Owens 2024): after LOOKS looks a program folds the missing parts itself, so that
it ends in whatever order the device runs programs.

Memory order: all threads have stored the partial (barrier) before one thread releases the bit; one
thread acquires the word before any thread (barrier) loads partials. Inputs do not change during a
launch, and the fallback runs the same instructions between the same bounds: a partial that is
stored twice has the same bits, and setting a bit twice changes nothing. So a late program is
benign, so are several that poll the same word or fold the same part, and no bit of the result
depends on which program folded what.
"""

import triton
import triton.language as tl

# Arguments whose values do not select a compiled kernel.
NOT_SPECIALIZED = [
    *("lead_count", "lead_blocks", "classes", "parts", "finishers", "lag"),
    *("temperature", "ignore", "smoothing", "z_loss", "cap", "positions"),
    *(f"{name}_{axis}" for name in "xygtwlod" for axis in ("lead", "other", "class")),
]


@triton.jit
def positions_of(block, lead_blocks, lead_count, classes, ROWS: tl.constexpr, UNIT: tl.constexpr,
                 ALONG: tl.constexpr):  # fmt: skip
    """The block's position along `other`, those along `lead` as a column, and their mask.

    Also the number of positions and of classes, which the arguments give divided by UNIT.
    """
    if ALONG == "lead":
        lead_count = lead_count * UNIT
    else:
        classes = classes * UNIT
    other = block * 0
    if block >= lead_blocks:  # the comparison is cheaper than the division
        other = block // lead_blocks
    lead = (block - other * lead_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lead = lead[:, None]
    return other.to(tl.int64), lead, lead < lead_count, lead_count, classes


@triton.jit
def row_pointers(
    pointer, other, lead, other_stride, lead_stride, UNIT: tl.constexpr, ALONG: tl.constexpr
):
    """Pointers to the first class of each row."""
    pointer = pointer + other * other_stride * UNIT
    if ALONG == "lead":
        return pointer + lead
    else:
        return pointer + lead * lead_stride * UNIT


@triton.jit
def class_offsets(c, class_stride, UNIT: tl.constexpr, ALONG: tl.constexpr):
    """Offsets of classes from the first one."""
    if ALONG == "lead":
        return c.to(tl.int64) * class_stride * UNIT
    else:
        return c


@triton.jit
def load_row(rows, where, c, w_class, inside, stride, fill, U: tl.constexpr, A: tl.constexpr,
             MASKED: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """A tile in the compute dtype, `fill` where the mask is False; and the mask with `where`."""
    if MASKED:
        inside = inside & tl.load(where + c.to(tl.int64) * w_class, mask=inside, other=0).to(
            tl.int1
        )
    x = tl.load(rows + class_offsets(c, stride, U, A), mask=inside, other=fill)
    return x.to(DTYPE), inside


@triton.jit
def scalar(value, DTYPE: tl.constexpr):
    """A float argument in the compute dtype; the interpreter passes a Python float."""
    return (tl.full((1, 1), 0.0, DTYPE) + value).to(DTYPE)


@triton.jit
def in_two_parts(value, DTYPE: tl.constexpr):
    """A float argument as the compute dtype has it, and what that leaves of it."""
    wide = scalar(value, tl.float64)
    high = wide.to(DTYPE)
    return high, (wide - high.to(tl.float64)).to(DTYPE)


@triton.jit
def relay_role(parts, finishers, lag):
    """The block and the part of a program in a relay, whether it folds or finishes, if it exists.

    The programs that fold a block are followed by those that finish the block `lag` blocks before,
    which then seldom wait. The first finishers and the last folders have no block: their number is
    clamped and `exists` is False.
    """
    program = tl.program_id(0)
    round_number = program // (parts + finishers)
    index = program % (parts + finishers)
    folds = index < parts
    block = tl.where(folds, round_number, round_number - lag)
    part = tl.where(folds, index, index - parts)
    last = tl.num_programs(0) // (parts + finishers) - lag - 1
    exists = (block >= 0) & (block <= last)
    return tl.minimum(tl.maximum(block, 0), last), part, folds, exists


@triton.jit
def part_bounds(classes, parts, part, STEP: tl.constexpr):
    """The first class of a part, a multiple of STEP, and the end of the part."""
    size = tl.cdiv(tl.cdiv(classes, parts), STEP) * STEP
    begin = tl.minimum(part * size, classes)
    return begin, tl.minimum(begin + size, classes)


@triton.jit
def _missing(bits, parts):
    """The bits of the unpublished parts, shifted to the top of the word; 0 if there are none."""
    return ~bits << (64 - parts)


@triton.jit
def lookback(published, parts, LOOKS: tl.constexpr):
    """Poll a word, at most LOOKS times, until the bits of all parts are set; return its bits."""
    bits = tl.full((), 0, tl.int64)
    looks = 0
    while (looks < LOOKS) & (_missing(bits, parts) != 0):
        bits = tl.atomic_add(published, 0, sem="acquire", scope="gpu")
        looks += 1
    tl.debug_barrier()
    return bits


@triton.jit
def parts_to_fold(published, parts, part, folds, LOOKS: tl.constexpr):
    """The range of parts that a program goes through, and the bits of those that it skips.

    A program that folds has its own part; one that finishes folds those not published in time.
    """
    bits = tl.full((), 0, tl.int64)
    first, last = part, part + 1
    if not folds:
        bits = lookback(published, parts, LOOKS)
        first, last = part * 0, tl.where(_missing(bits, parts) == 0, 0, parts)
    return first, last, bits


@triton.jit
def publish(published, part):
    """Set a part's bit: other programs can load its partial."""
    tl.debug_barrier()  # all threads have stored theirs
    tl.atomic_or(published, tl.full((), 1, tl.int64) << part, sem="release", scope="gpu")


@triton.jit
def store_partial(pointer, row, parts, part, value, row_mask):
    """Store one number of the partial of each row."""
    tl.store(pointer + row * parts + part, value, mask=row_mask)


@triton.jit
def load_partials(pointer, row, parts, row_mask, fill, MAX_PARTS: tl.constexpr):
    """Load one number of all partials of each row, along the classes' axis."""
    # Triton 3.7 lets every thread load the whole of a tile that has fewer entries than threads.
    SIZE: tl.constexpr = MAX_PARTS if row.shape[0] > 1 else 4 * MAX_PARTS
    p = tl.arange(0, SIZE)[None, :]
    # From L2: the L1 cache does not see the stores of other multiprocessors.
    return tl.load(
        pointer + row * parts + p, mask=row_mask & (p < parts), other=fill, cache_modifier=".cg"
    )
