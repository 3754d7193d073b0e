"""The measured speeds as text."""

from __future__ import annotations

import math
from typing import Any

from bench.speed import OURS, PEER, Row

HEADINGS = (
    "operation", "shape", "dtype", "provider", "min", "median", "GB/s", "of copy", "/ ours",
)  # fmt: skip


LEGEND = (
    "GB/s of the bytes that must move, in the fastest round: softmax, log_softmax and the gradient "
    "read and write the array once, logsumexp and the loss read it once; with `+backward` the "
    "upstream gradient is read and its own written as well. `of copy` is the share of what the "
    "fastest copy of the same array, by one thread or by all, reached in the same run. `/ ours` is "
    "the time in units of our first path's. Each call has run before it is timed."
)


def cells(rows: list[Row]) -> list[list[str]]:
    """Return the rows as text."""
    ours: dict[Any, float] = {}
    for row in rows:
        if row.role == OURS:
            ours.setdefault((row.operation, row.shape, row.dtype), row.min_s)
    lines = []
    for row in rows:
        what = row.operation, row.shape, row.dtype
        numbers = (
            [row.problem, "", "", "", ""]
            if row.problem
            else [
                duration(row.min_s),
                duration(row.median_s),
                f"{row.gb_per_s:6.2f}",
                f"{row.share_of_copy:5.0%}",
                f"{row.min_s / ours.get(what, math.nan):5.2f}",
            ]
        )
        name = row.provider
        if row.role == PEER and row.path:
            name += f" ({row.path})"
        lines.append([row.operation, shape(row.shape), row.dtype, name, *numbers])
    return lines


def shape(numbers: tuple[int, int]) -> str:
    return "x".join(map(str, numbers))


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:9.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:9.2f} ms"
