"""``fresh``: calls of small arrays in processes that have called nothing else, and the first call.

Ours and each peer have a process of their own and take turns. The first call is that of a large
array by Numba's kernels, after Numba has been imported: compiled, and then loaded from the cache.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

from bench import peers, places, speed, tables, versus
from bench.goals import Compared
from bench.report import ROOT
from bench.summary import geometric_mean

HEADINGS = ("call", "arrays", "time", "beside", "its time", "ratio", "goal", "")
LEGEND = (
    "Each in a process of its own that has called nothing else, in turns, the fastest of several "
    "processes. `first call` is softmax of 1000x1000 float32 after `import numba`, beside a second."
)
SHAPE, DTYPE, PROCESSES = (32, 10), "float32", 3
_MEAN = "geometric mean"
_ONCE = "cross_entropy_value_and_grad"


class _Cell(NamedTuple):
    backend: str
    path: str
    operation: str
    peer: str
    goal: float  # nan: one of a mean


def _cells() -> list[_Cell]:
    cells = [
        _Cell("numpy", "ours", operation, peer, goal)
        for operation in ("softmax", "cross_entropy", _ONCE)
        for peer, goal in ((peers.NUMPY_BY_HAND, 1.1), (peers.SCIPY, 0.5))
        if (operation, peer) != (_ONCE, peers.SCIPY)  # which has no gradients
    ]
    if places.is_installed("torch"):
        cells += [
            _Cell("torch", path, operation, peers.TORCH, math.nan)
            for path, operations in (
                ("ours", (*peers.FORWARD, "cross_entropy")),
                ("ours, autograd", (*peers.BACKWARD, _ONCE)),
            )
            for operation in operations
        ]
    return cells


@dataclass
class Row(Compared):
    """One call beside another."""

    call: str
    arrays: str
    seconds: float
    beside: str
    other_seconds: float
    goal: float
    problem: str = ""


def measure(*, quick: bool) -> Iterator[Row]:
    """Yield a row for each call, and one for the mean of torch's."""
    ratios = []
    for cell in _cells():
        row = _compared(cell, processes=1 if quick else PROCESSES, quick=quick)
        if math.isnan(cell.goal):
            ratios.append(row.ratio)
        yield row
    if ratios:
        mean = geometric_mean(ratios)
        yield Row(_MEAN, f"torch {DTYPE}", mean, peers.TORCH, 1.0, 2.5)
    if importlib.util.find_spec("numba"):
        yield from _first_calls()


def _compared(cell: _Cell, processes: int, *, quick: bool) -> Row:
    effort = speed.QUICK if quick else versus.EFFORT
    call = cell.operation if cell.path == "ours" else f"{cell.operation}, autograd"
    arrays = f"{cell.backend} {DTYPE} {tables.shape(SHAPE)}"
    row = Row(call, arrays, math.inf, cell.peer, math.inf, cell.goal)
    for _ in range(processes):
        with ExitStack() as stack:
            trees = [stack.enter_context(versus.Tree(ROOT)) for _ in range(2)]
            keys = [(cell.backend, SHAPE, DTYPE, cell.operation, p) for p in (cell.path, cell.peer)]
            for tree, key in zip(trees, keys, strict=True):
                tree.send("prepare", *key, effort.slice_s)
            row.problem = "; ".join(filter(None, [tree.receive() for tree in trees]))
            if row.problem:
                return row
            for i in range(2 if quick else effort.most):
                for tree in trees[:: -1 if i % 2 else 1]:
                    tree.send("turn")
                    seconds = tree.receive()
                    if tree is trees[0]:
                        row.seconds = min(row.seconds, seconds)
                    else:
                        row.other_seconds = min(row.other_seconds, seconds)
    return row


_FIRST = """
import time, numba, numpy as np
x = np.ones((1000, 1000), np.float32)
began = time.perf_counter()
from portable_softmax import kernels, softmax
softmax(x)
print(time.perf_counter() - began)
assert kernels.explain("softmax", x).startswith("numba rows")
"""


def _first_calls() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as cache:
        for name, goal in (("nothing compiled", 1.0), ("from the cache", 0.25)):
            said = subprocess.run(
                [sys.executable, "-c", _FIRST], cwd=ROOT, check=True, capture_output=True,
                text=True, env={**os.environ, "NUMBA_CACHE_DIR": cache},
            ).stdout  # fmt: skip
            yield Row(f"first call, {name}", "numpy float32", float(said), "1 s", 1.0, goal)


def cells(rows: list[Row]) -> list[list[str]]:
    """Return the rows as text."""
    return [
        [
            row.call, row.arrays,
            row.problem or ("" if row.call == _MEAN else tables.duration(row.seconds)), row.beside,
            "" if row.other_seconds == 1.0 else tables.duration(row.other_seconds),
            f"{row.ratio:.2f}",
            "" if math.isnan(row.goal) else f"{row.goal:.2f}", "OVER" if row.missed else "",
        ]
        for row in rows
    ]  # fmt: skip
