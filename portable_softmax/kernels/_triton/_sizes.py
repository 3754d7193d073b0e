"""The launch table: tile and number of warps, by what a row is.

Chosen so that no kernel spills registers, by the table in docs/triton_resources.md, and not
measured: no device has run it.
"""

from __future__ import annotations

from typing import NamedTuple

# Sides of thresholds, in classes of up to four bytes each; float64 takes half.
SHORT = 512  # up to here, several rows share a program
REGISTERS = 8_192  # up to here, a row along its classes stays in registers
COLUMN = 64  # up to here, a column does
# Rows that are longer than this are split where fewer programs than SPLIT_BELOW would run.
SPLIT = 65_536
SPLIT_COLUMN = 2_048
SPLIT_BELOW = 128  # about the multiprocessors of a large device
PARTS = (8, 64)  # how many parts: few numbers, since each is a kernel of its own
LONG_TILE = 2_048
COLUMN_TILE = 1_024
SHORT_TILE = 2_048
LANES = (4, 16, 64)  # columns a program: few numbers, since each is a kernel of its own
SMALL_ROWS = 256  # rows a program, where there is one entry a row
DEPTH = 16  # tiles a lane adds up before it starts anew


class Launch(NamedTuple):
    """How a kernel is launched: with which pass, over which tile."""

    way: str  # "registers", "loop" or "split"
    rows: int
    classes: int
    warps: int
    parts: int = 1

    @property
    def registers(self) -> int:
        """The limit of registers a thread: left alone, the assembler takes fewer and spills."""
        return {4: 255, 8: 168}.get(self.warps, 128)


def launch(lead: int, other: int, classes: int, along: str, itemsize: int) -> Launch:
    """Choose the launch of `lead` x `other` positions of `classes` each."""
    share = 2 if itemsize == 8 else 1
    if along == "lead":
        lanes = next((n for n in LANES if lead <= n), LANES[-1])
        tile = COLUMN_TILE // lanes // share
        programs = -(-lead // lanes) * other
        if classes <= COLUMN // share:
            size = min(COLUMN // share, COLUMN // 4 if classes <= COLUMN // 4 else COLUMN)
            return Launch("registers", lanes, size, 4 if size * lanes * share <= 2048 else 8)
        if classes > SPLIT_COLUMN and programs < SPLIT_BELOW:
            return Launch("split", lanes, tile, 8, parts(classes, tile, programs))
        return Launch("loop", lanes, tile, 8)
    if classes <= SHORT:
        size = max(4, power_of_two(classes))
        return Launch("registers", min(128, SHORT_TILE // share // size), size, 4)
    if classes <= REGISTERS // share:
        size = power_of_two(classes)
        return Launch("registers", 1, size, max(4, min(16, size * share // 512)))
    tile = LONG_TILE // share
    programs = lead * other
    if classes > SPLIT and programs < SPLIT_BELOW:
        return Launch("split", 1, tile, 8, parts(classes, tile, programs))
    return Launch("loop", 1, tile, 8)


def parts(classes: int, tile: int, programs: int) -> int:
    """In how many parts to split a row: as many as fill a device, of at least one tile each."""
    few, many = PARTS
    return many if programs * few < SPLIT_BELOW and classes >= many * tile else few


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is not below `n`."""
    return 1 << max(0, n - 1).bit_length()
