"""The launch table: pass, tile and number of warps, by what a row is.

Chosen by the resources of the kernels, listed in docs/triton_resources.md: no kernel spills
registers, a thread has 128 bytes of loads in flight, and several programs fit into a
multiprocessor. Not measured: no device has run it. Each launch compiles a kernel of its own, hence
few sizes.
"""

from __future__ import annotations

from typing import NamedTuple

# In elements of four bytes; those marked * are halved for eight bytes and doubled for two. Heavy
# kernels, which keep more than one number for each element, take half of them.
WARP = 1_024  # * elements of a warp in registers: 128 bytes per thread
SHORT = (8, 16, 32, 64, 128, 256, 512, 1_024)  # classes, up to * WARP: rows that share a warp
MANY_ROWS = 8  # rows of a warp beyond which per-position values take half of the registers
REGISTERS = {2: 8_192, 4: 8_192, 8: 2_048}  # classes in the registers of several warps
COLUMN_CLASSES = (16, 64)  # * classes of a column in registers
COLUMNS = {2: (8, 64), 4: (8, 64), 8: (8, 32)}  # columns per program
TILE = 4_096  # * elements of a step of the main loop
PART_CLASSES = 16_384  # * elements of a part in a relay
MAX_PARTS = 64  # parts of a row, one bit each of a word; longer rows have longer parts
MAX_PARTS_COLUMNS = 32  # with many columns per program
BUSY = 256  # programs that fill a device: rows that are only read then take a loop
# Programs of a relay between folding a row and finishing it: more than a large device runs at a
# time, and few enough that its L2 cache still holds what they have read.
LAG = 1_024
# Looks at a row's word before a program folds the missing parts itself. Not measured.
LOOKS = 64
SMALL_ROWS = 256  # rows per program of kernels with one entry per row
STEPS = 8  # tiles that fold together


class Launch(NamedTuple):
    """How a kernel is launched: with which pass, over which tile."""

    way: str  # "registers", "loop" or "relay"
    rows: int
    classes: int
    warps: int
    registers: int = 255  # per thread, at most
    parts: int = 1
    max_parts: int = 1  # a power of two, at least `parts`


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

    `once`: rows are read and not written. `relay`: the kernel has that pass. `heavy`: it keeps more
    than one number for each element.
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
    # Three programs of four warps fit into a multiprocessor, or two of eight; one less if heavy.
    limit = 255 if heavy else 168
    if classes <= REGISTERS[itemsize]:
        size = _power_of_two(classes)
        warps = max(1, size // warp)
        return Launch("registers", 1, size, warps, min(limit, (2_048 if heavy else 1_024) // warps))
    warps = 8 if heavy else 4
    if not relay or (once and lead * other >= BUSY):
        return Launch("loop", 1, int(TILE * tile), warps, limit)
    parts = _parts(lead * other, classes, int(PART_CLASSES * share), int(TILE * tile), MAX_PARTS)
    return Launch("relay", 1, int(TILE * tile), warps, limit, parts, MAX_PARTS)


def _columns(
    lead: int, other: int, classes: int, itemsize: int, tile: float, *, once: bool, relay: bool
) -> Launch:
    few, many = COLUMNS[itemsize]
    columns = few if lead <= few else many
    sizes = COLUMN_CLASSES if columns == many else COLUMN_CLASSES[-1:]
    size = int(_fitting(sizes, classes / tile) * tile)
    if size:
        return Launch("registers", columns, size, 4 if size <= COLUMN_CLASSES[0] * tile else 8)
    blocks = -(-lead // columns) * other
    loop = not relay or (once and blocks >= BUSY)
    parts = 1 if loop else -(-classes // (PART_CLASSES * 4 // itemsize // many))
    if blocks * min(parts, MAX_PARTS_COLUMNS) < BUSY:  # too few programs: fewer columns each
        columns = few
    step = int(TILE * tile) // (columns if tile >= 4 / itemsize else 2 * columns)
    if loop:
        return Launch("loop", columns, step, 8)
    max_parts = MAX_PARTS if columns == few else MAX_PARTS_COLUMNS
    parts = _parts(
        -(-lead // columns) * other, classes, PART_CLASSES * 4 // itemsize // many, step, max_parts
    )
    return Launch("relay", columns, step, 8, 255, parts, max_parts)


def _parts(blocks: int, classes: int, part: int, tile: int, max_parts: int) -> int:
    """Return the number of parts: of the usual size, or smaller ones to fill the device."""
    parts = -(-classes // part)
    if blocks * parts < BUSY:
        parts = max(parts, min(-(-BUSY // blocks), -(-classes // tile)))
    return min(max_parts, parts)


def _fitting(sizes: tuple[int, ...], n: float) -> int:
    """Return the first size that holds `n`, 0 if none does."""
    return next((size for size in sizes if n <= size), 0)


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()
