"""The launch table: tile and number of warps, by what a row is.

Chosen so that no kernel spills registers, by the table in docs/triton_resources.md, and not
measured: no device has run it. Each launch is a kernel of its own, compiled when it is first
needed: hence few sizes.
"""

from __future__ import annotations

from typing import NamedTuple

# Sides of thresholds, in classes of up to four bytes each; float64 takes half of those marked *.
SHORT = (8, 32, 128, 512)  # up to the last, several rows share a program
REGISTERS = 8_192  # * up to here, a row along its classes stays in registers
COLUMN = (16, 64)  # * up to the last, a column does
LANES = (8, 64)  # columns a program
# Rows longer than this are split where fewer than SPLIT_BELOW programs would run.
SPLIT = 65_536
SPLIT_COLUMN = 2_048
SPLIT_BELOW = 128  # about the multiprocessors of a large device
PARTS = 64  # of a row that is split
LONG_TILE = 2_048  # *
COLUMN_TILE = 1_024  # *
SHORT_TILE = 2_048  # *
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
        return 128 if self.warps > 8 else 255


def launch(lead: int, other: int, classes: int, along: str, itemsize: int) -> Launch:
    """Choose the launch of `lead` x `other` positions of `classes` each."""
    share = 2 if itemsize == 8 else 1
    if along == "lead":
        return _columns(lead, other, classes, share)
    size = _fitting(SHORT, classes)
    if size:
        return Launch("registers", min(128, SHORT_TILE // share // size), size, 4)
    if classes <= REGISTERS // share:
        size = _power_of_two(classes)
        return Launch("registers", 1, size, max(4, min(16, size * share // 512)))
    if classes > SPLIT and lead * other < SPLIT_BELOW:
        return Launch("split", 1, LONG_TILE // share, 8, PARTS)
    return Launch("loop", 1, LONG_TILE // share, 8)


def _columns(lead: int, other: int, classes: int, share: int) -> Launch:
    lanes = _fitting(LANES, lead) or LANES[-1]
    sizes = COLUMN if lanes == LANES[-1] else COLUMN[-1:]
    size = _fitting(sizes, classes * share) // share
    if size:
        return Launch("registers", lanes, size, 4 if size * lanes * share <= 2048 else 8)
    tile = COLUMN_TILE // lanes // share
    if classes > SPLIT_COLUMN and -(-lead // lanes) * other < SPLIT_BELOW:
        return Launch("split", lanes, tile, 8, PARTS)
    return Launch("loop", lanes, tile, 8)


def _fitting(sizes: tuple[int, ...], n: int) -> int:
    """Return the first size that holds `n`, 0 if none does."""
    return next((size for size in sizes if n <= size), 0)


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is not below `n`."""
    return 1 << (n - 1).bit_length()
