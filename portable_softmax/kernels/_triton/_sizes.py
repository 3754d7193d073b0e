"""The launch table: pass, tile and number of warps, by what a row is.

Chosen by what a kernel takes of a device, which docs/triton_resources.md lists: no kernel spills
registers, a thread loads 128 bytes at once, and several programs fit into a multiprocessor, so that
one loads while another computes. Not measured: no device has run it. Each launch is a kernel of
its own, compiled when it is first needed: hence few sizes.
"""

from __future__ import annotations

from typing import NamedTuple

# In elements of four bytes; those marked * are halved for eight bytes and doubled for two. A heavy
# kernel, which keeps more than one number for each, has half of them.
WARP = 1_024  # * that a warp holds in registers: 128 bytes a thread
SHORT = (8, 16, 32, 64, 128, 256, 512, 1_024)  # classes, up to * WARP: some rows share a warp
MANY_ROWS = 8  # beyond, what each row has of its own needs half of the registers
REGISTERS = {2: 8_192, 4: 8_192, 8: 2_048}  # classes that stay in registers, by several warps
COLUMN = (16, 64)  # * classes of a column that stay there
LANES = {2: (8, 64), 4: (8, 64), 8: (8, 32)}  # columns a program
TILE = 4_096  # * of a longer row, or of columns, at a time
PART = 16_384  # * of a row that goes through a relay, or of columns
MAX_PARTS = 64  # of a row, as many as the bits of a word; beyond, parts are longer
MAX_PARTS_COLUMNS = 32  # parts, where there are many columns a program
BUSY = 256  # programs that keep a device busy: then what is read only once goes in a loop
# Programs of a relay between the reading of a row and its writing: more than run at a time on a
# large device, and few enough that its L2 cache keeps what they have read.
LAG = 1_024
# Looks for the parts of a row before a program folds those missing: about as long as folding one.
LOOKS = 64
SMALL_ROWS = 256  # rows a program, where there is one entry a row
STEPS = 8  # loads of a thread that fold together


class Launch(NamedTuple):
    """How a kernel is launched: with which pass, over which tile."""

    way: str  # "registers", "loop" or "relay"
    rows: int
    classes: int
    warps: int
    registers: int = 255  # the limit of a thread
    parts: int = 1
    max_parts: int = 1  # a power of two that is no less than `parts`


def launch(
    lead: int,
    other: int,
    classes: int,
    along: str,
    itemsize: int,
    *,
    once: bool,
    relay: bool,
    heavy: bool,
) -> Launch:
    """Choose the launch of `lead` x `other` positions of `classes` each.

    `once`: nothing is written that is as long as a row. `relay`: the kernel has one. `heavy`: it
    keeps more than one number for each that it loads.
    """
    share = {2: 2.0, 4: 1.0, 8: 0.5}[itemsize]
    tile = share / 2 if heavy else share
    if along == "lead":
        return _columns(lead, other, classes, itemsize, tile, once=once, relay=relay)
    warp = int(WARP * tile)
    size = _fitting(SHORT, classes)
    if 0 < size <= warp:
        rows = warp // size
        return Launch("registers", rows if rows < MANY_ROWS else rows // 2, size, 1)
    # Three programs of four warps fit into a multiprocessor, or two of eight; of a heavy kernel one
    # less.
    limit = 255 if heavy else 168
    if classes <= REGISTERS[itemsize]:
        size = _power_of_two(classes)
        warps = max(1, size // warp)
        return Launch("registers", 1, size, warps, min(limit, (2_048 if heavy else 1_024) // warps))
    warps = 8 if heavy else 4
    if not relay or (once and lead * other >= BUSY):
        return Launch("loop", 1, int(TILE * tile), warps, limit)
    parts = _parts(lead * other, classes, int(PART * share), int(TILE * tile), MAX_PARTS)
    return Launch("relay", 1, int(TILE * tile), warps, limit, parts, MAX_PARTS)


def _columns(
    lead: int, other: int, classes: int, itemsize: int, tile: float, *, once: bool, relay: bool
) -> Launch:
    few, many = LANES[itemsize]
    lanes = few if lead <= few else many
    sizes = COLUMN if lanes == many else COLUMN[-1:]
    size = int(_fitting(sizes, classes / tile) * tile)
    if size:
        return Launch("registers", lanes, size, 4 if size <= COLUMN[0] * tile else 8)
    blocks = -(-lead // lanes) * other
    loop = not relay or (once and blocks >= BUSY)
    parts = 1 if loop else -(-classes // (PART * 4 // itemsize // many))
    if blocks * min(parts, MAX_PARTS_COLUMNS) < BUSY:  # too few programs: narrower ones
        lanes = few
    step = int(TILE * tile) // (lanes if tile >= 4 / itemsize else 2 * lanes)
    if loop:
        return Launch("loop", lanes, step, 8)
    max_parts = MAX_PARTS if lanes == few else MAX_PARTS_COLUMNS
    parts = _parts(
        -(-lead // lanes) * other, classes, PART * 4 // itemsize // many, step, max_parts
    )
    return Launch("relay", lanes, step, 8, 255, parts, max_parts)


def _parts(blocks: int, classes: int, part: int, tile: int, max_parts: int) -> int:
    """Return the number of parts: of their usual size, or more where few programs would run."""
    parts = -(-classes // part)
    if blocks * parts < BUSY:
        parts = max(parts, min(-(-BUSY // blocks), -(-classes // tile)))
    return min(max_parts, parts)


def _fitting(sizes: tuple[int, ...], n: float) -> int:
    """Return the first size that holds `n`, 0 if none does."""
    return next((size for size in sizes if n <= size), 0)


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is not below `n`."""
    return 1 << (n - 1).bit_length()
