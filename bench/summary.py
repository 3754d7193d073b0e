"""All cells in a few lines: ours in units of the best peer, of SciPy, of torch, and of the copy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from bench import tables
from bench.peers import SCIPY, TORCH, TORCH_COMPILED
from bench.places import np_dtype
from bench.speed import OURS, PEER, Row

# Peers with columns of their own.
NAMED = SCIPY, TORCH, TORCH_COMPILED
# Bytes; below this the overhead of a call dominates.
LARGE = 10**6


class Ratio(NamedTuple):
    """Our time in units of another's, in one cell."""

    value: float
    row: Row


class Line(NamedTuple):
    """One path of ours on arrays of one size and dtype."""

    size: str
    dtype: str
    path: str
    best: list[Ratio]
    """Against the fastest peer of each cell."""
    named: dict[str, list[Ratio]]
    """Against one peer, where it offers the operation."""
    copy: list[float]
    """The time of ours in units of the copy's for the same number of bytes."""


def is_large(row: Row) -> bool:
    return math.prod(row.shape) * np_dtype(row.dtype).itemsize >= LARGE


def lines(rows: Iterable[Row]) -> list[Line]:
    """Return a line for each size, dtype and path of ours."""
    cells: dict[tuple[str, tuple[int, int], str], list[Row]] = {}
    for row in rows:
        if not row.problem:
            cells.setdefault((row.operation, row.shape, row.dtype), []).append(row)
    found: dict[tuple[str, str, str], Line] = {}
    for cell in cells.values():
        peers = {row.provider: row.min_s for row in cell if row.role == PEER}
        for row in cell:
            if row.role != OURS:
                continue
            key = "large" if is_large(row) else "small", row.dtype, row.provider
            line = found.setdefault(key, Line(*key, [], {name: [] for name in NAMED}, []))
            if peers:
                line.best.append(Ratio(row.min_s / min(peers.values()), row))
            for name, ratios in line.named.items():
                if name in peers and (name != TORCH_COMPILED or "compiled" in row.provider):
                    ratios.append(Ratio(row.min_s / peers[name], row))
            line.copy.append(1 / row.share_of_copy)
    return sorted(found.values(), key=lambda line: line[:2])


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


LEGEND = (
    "Geometric means of our time in units of the peer's (below 1 ours is faster) over the cells "
    "that both have; `worst` is the largest. `copy` is the time that the fastest copy takes for as "
    "many bytes. Small arrays have less than 1 MB."
)


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Return headings and text; a peer that shares no cell with ours has no columns."""
    all_lines = lines(rows)
    named = [n for n in NAMED if any(line.named[n] for line in all_lines)]
    headings = ["arrays", "dtype", "path", "cells", "/ best peer", "worst"]
    headings += [heading for name in named for heading in (f"/ {name}", "worst")]
    texts = []
    for line in all_lines:
        text = [line.size, line.dtype, line.path, str(len(line.copy)), *_mean_and_worst(line.best)]
        for name in named:
            text += _mean_and_worst(line.named[name])
        texts.append([*text, f"{geometric_mean(line.copy):.2f}"])
    return [*headings, "/ copy"], texts


def _mean_and_worst(ratios: list[Ratio]) -> list[str]:
    if not ratios:
        return ["", ""]
    worst = max(ratios, key=lambda ratio: ratio.value)
    where = f"{worst.row.operation} {tables.shape(worst.row.shape)}"
    return [f"{geometric_mean(r.value for r in ratios):.2f}", f"{worst.value:.2f} {where}"]
