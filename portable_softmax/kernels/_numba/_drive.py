"""Cuts arrays into pieces and runs the compiled kernels on them, on as many threads as are free.

The arrays are NumPy's, C-contiguous, of shape (rows, n) or (outer * n, inner) as `_on_rows` and
`_on_lanes` have them, and of a dtype that they know: float16 is handed over as uint16 and bfloat16
as int16. They may be views of any library's memory.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import typeof

from portable_softmax.kernels import _threads
from portable_softmax.kernels._numba import (
    _blocks,
    _lanes,
    _long,
    _losses,
    _on_blocks,
    _on_lanes,
    _on_rows,
    for_rows,
)

# Rows across memory, side by side: a tile of them stays in the second cache.
ACROSS, FEW_ACROSS = 64, 16
TILE = 1 << 18
# So many bytes are one piece of work, and fewer than twice as many are left to one thread: to wake
# another takes as long as half a piece (`python -m bench threads`).
PIECE = 1 << 21


class Layout(NamedTuple):
    """How rows lie in memory."""

    outer: int
    n: int
    inner: int

    @property
    def rows(self) -> int:
        return self.outer * self.inner


class Plan(NamedTuple):
    """How they are worked on."""

    entries: Any  # the module of what is compiled for it
    shape: tuple[int, ...]  # as it is told
    tile: tuple[int, Any]  # length and dtype
    pieces: list[tuple[int, int]]


def plan(layout: Layout, dtype: Any, tiles: int = 1) -> Plan:
    """Choose between rows one by one, in blocks and side by side, and cut the work."""
    outer, n, inner = layout
    compute = compute_dtype(dtype)
    shape: tuple[int, ...] = (n,)
    if inner == 1:
        short = for_rows(n, dtype.itemsize) == "blocks"
        entries = _on_blocks if short else _on_rows
        block, tile = tile_for_rows(short, n, compute, dtype == compute)
        units, size = outer, n
    else:
        T = ACROSS if n * ACROSS * compute.itemsize <= TILE else FEW_ACROSS
        T = min(T, -(-inner // 16) * 16)
        entries, block, shape = _on_lanes, 1, (n, T, inner)
        units, size = outer * -(-inner // T), n * min(T, inner)
        tile = T * (n + _lanes.LANE_NUMBERS) * tiles + 16
    step = -(-max(1, PIECE // (size * dtype.itemsize)) // block) * block
    if units < 2 * step:
        step = units
    pieces = [(i, min(i + step, units)) for i in range(0, units, step)]
    return Plan(entries, shape, (tile, compute), pieces)


def compute_dtype(dtype: Any) -> Any:
    """Return what an array of a dtype is computed in."""
    return np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)


def tile_for_rows(short: bool, n: int, compute: Any, exact: bool) -> tuple[int, int]:
    """Return how many rows are worked on at once, and the size of a tile for them.

    `exact` tells that the result has the dtype of the computation.
    """
    lanes = 64 // compute.itemsize
    rows = _blocks.rows_of_block(lanes) if short else 1
    size = _blocks.size_of_room(lanes) + lanes if short else _long.room(n)
    return rows, size + (0 if exact else rows * n)


def run(
    operation: str,
    arrays: tuple[Any, ...],
    numbers: tuple[Any, ...],
    layout: Layout,
    tiles: int = 1,
) -> list[Any]:
    """Run a compiled function on every piece; return what it returned for each."""
    entries, shape, (size, compute), pieces = plan(layout, arrays[0].dtype, tiles)
    entry = getattr(entries, operation)
    if len(pieces) == 1:
        return [entry(*arrays, *numbers, np.empty(size, compute), *shape, *pieces[0])]
    answers: list[Any] = [None] * len(pieces)

    def work(at: int) -> None:
        answers[at] = entry(*arrays, *numbers, np.empty(size, compute), *shape, *pieces[at])

    load(entry, (*arrays, *numbers, np.empty(0, compute), *shape, 0, 0))
    _threads.run(work, range(len(pieces)))
    return answers


def load(entry: Any, example: tuple[Any, ...]) -> None:
    """Compile a function for arguments like these, or take it from disk."""
    signature = tuple(typeof(a) for a in example)
    if signature not in entry.overloads:
        entry.compile(signature)


def softmax(x: Any, out: Any, layout: Layout, temperature: float = 1.0) -> None:
    """One read of the array and one write of its size."""
    t = 1 if temperature == 1.0 else temperature
    run("softmax", (x, out), (t,), layout, tiles=2)


def log_softmax(x: Any, out: Any, layout: Layout, temperature: float = 1.0) -> None:
    """One read and one write."""
    t = 1 if temperature == 1.0 else temperature
    run("log_softmax", (x, out), (t,), layout)


def logsumexp(x: Any, out: Any, layout: Layout) -> None:
    """One read."""
    run("logsumexp", (x, out), (), layout)


def softmax_vjp(y: Any, dy: Any, out: Any, layout: Layout) -> None:
    """Two reads and one write."""
    run("softmax_vjp", (y, dy, out), (), layout, tiles=2)


def log_softmax_vjp(log_y: Any, dy: Any, out: Any, layout: Layout, masked: bool = True) -> None:
    """Two reads and one write. What a mask left at -inf passes no gradient on; a logit does."""
    left_out = math.inf if masked else math.nan  # which nothing is equal to
    run("log_softmax_vjp", (log_y, dy, out), (left_out,), layout, tiles=2)


class Loss(NamedTuple):
    """The options of a loss, as the kernels read them."""

    weight: Any  # of the computation's dtype, or None
    ignore: int | None
    smoothing: float
    z: float


def losses(
    x: Any, labels: Any, layout: Layout, loss: Loss, each: Any, grad: Any, mean: bool
) -> tuple[float, float, int]:
    """Return the sum of the losses, that of the labels' weights, and how many labels are wrong.

    `labels` are int64, in the order of the rows. Every loss goes to `each` and the gradient of
    the sum, or of the mean, to `grad`, unless they are None. One read of the logits, and a write
    of the gradient's size.
    """
    compute = compute_dtype(x.dtype)
    weighted = loss.weight is not None
    w = np.ascontiguousarray(loss.weight) if weighted else np.ones(1, compute)
    w = w if w.flags.writeable else w.copy()
    flags = _losses.WEIGHTED * weighted | _losses.IGNORING * (loss.ignore is not None)
    ignore = 0 if loss.ignore is None else loss.ignore
    scale = 1.0
    if mean and grad is not None:
        divisor = float(layout.rows)
        if flags:
            load(_on_rows.scan, (labels, w, layout.n, flags, ignore))
            divisor = _on_rows.scan(labels, w, layout.n, flags, ignore)[1]
        scale = 1.0 / divisor if divisor else 0.0
    # Without smoothing no class but the label's counts, whatever its weight.
    classes = 0.0
    if loss.smoothing:
        classes = float(np.sum(w, dtype=np.float64)) if weighted else float(layout.n)
    options = np.asarray([loss.smoothing, loss.z, classes, scale])
    if each is None:
        each = np.empty(1, compute)
    else:
        flags |= _losses.EACH
    arrays, numbers = (x, labels, each, w, options), (flags, ignore)
    if grad is None:
        parts = run("cross_entropy", arrays, numbers, layout)
    else:
        parts = run("cross_entropy_value_and_grad", arrays, (*numbers, grad), layout, 2)
    return _sum([p[0] for p in parts]), _sum([p[1] for p in parts]), sum(p[2] for p in parts)


def _sum(parts: list[float]) -> float:
    try:
        return math.fsum(parts)
    except (ValueError, OverflowError):  # infinities of both signs, or one on the way
        return sum(parts)
