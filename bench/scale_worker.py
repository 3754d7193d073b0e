"""``scale``, fourth part: arrays that are larger than the workers of Dask that work on them.

Each function runs on worker processes of one thread with a limit of memory, of an array whose
chunks are made as they are needed; its largest entry, or the number that it is, comes back. Nothing
is spilled to disk, and a worker that goes beyond its limit is killed and fails the row.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

import portable_softmax as ps
from bench import memory_cell, tables
from bench.errors import one_line


class Task(NamedTuple):
    """An array, and who works on it."""

    shape: tuple[int, int]
    chunk_bytes: int
    parts: int  # of the class axis
    workers: int
    limit_bytes: int  # of each worker


THOROUGH = (
    Task((300_000, 1000), 60 * 10**6, 1, 1, 10**9),
    Task((300_000, 1000), 60 * 10**6, 4, 1, 10**9),
    Task((5_000_000, 1000), 60 * 10**6, 1, 2, 2 * 10**9),  # 20 GB
)
QUICK = (Task((4000, 1000), 10**6, 1, 1, 10**9), Task((4000, 1000), 10**6, 4, 2, 10**9))
PATIENCE = 600  # seconds

FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "softmax": lambda x, t: ps.softmax(x).max(),
    "log_softmax": lambda x, t: ps.log_softmax(x).max(),
    "logsumexp": lambda x, t: ps.logsumexp(x),
    "cross_entropy": ps.cross_entropy,
    "cross_entropy_value_and_grad": lambda x, t: ps.cross_entropy_value_and_grad(x, t)[1].max(),
}


@dataclass
class Row:
    """One function on one way to cut an array."""

    shape: tuple[int, int]
    chunk: tuple[int, int]
    workers: int
    limit_bytes: int
    operation: str
    seconds: float = math.nan
    peak_bytes: float = math.nan
    """The most memory that a worker's process has had so far."""
    problem: str = ""

    def __post_init__(self) -> None:
        self.shape = (self.shape[0], self.shape[1])  # a list in JSON, where nan is a string
        self.seconds, self.peak_bytes = float(self.seconds), float(self.peak_bytes)

    @property
    def held(self) -> bool:
        return not self.problem and self.peak_bytes <= self.limit_bytes


def measure(tasks: tuple[Task, ...]) -> Iterator[Row]:
    """Yield a row for each task and function."""
    dask, distributed = map(importlib.import_module, ("dask", "distributed"))
    settings = {
        f"distributed.worker.memory.{name}": False for name in ("target", "spill", "pause")
    } | {"distributed.scheduler.allowed-failures": 0}
    for shape, chunk, parts, workers, limit in tasks:
        with ExitStack() as stack:
            stack.enter_context(dask.config.set(settings))
            cluster = distributed.LocalCluster(
                processes=True, dashboard_address="127.0.0.1:0",
                n_workers=workers, threads_per_worker=1, memory_limit=limit,
            )  # fmt: skip
            client = stack.enter_context(distributed.Client(stack.enter_context(cluster)))
            width = shape[1] // parts
            cut = (max(1, chunk // (4 * width)), width)
            x, labels = arrays(shape, cut)
            for name, function in FUNCTIONS.items():
                row = Row(shape, cut, workers, limit, name)
                started = perf_counter()
                try:
                    client.compute(function(x, labels)).result(timeout=PATIENCE)
                    row.seconds = perf_counter() - started
                    row.peak_bytes = max(client.run(memory_cell.most_resident).values())
                except Exception as error:  # a worker that was killed, or none in time
                    row.problem = one_line(error)
                yield row


def arrays(shape: tuple[int, int], cut: tuple[int, int]) -> tuple[Any, Any]:
    """Return lazy logits and labels."""
    da = importlib.import_module("dask.array")
    like = da.zeros(shape, chunks=cut, dtype=np.float32)
    x = like.map_blocks(_made, dtype=np.float32, meta=np.empty((0, 0), np.float32))
    return x, da.arange(shape[0], chunks=cut[0]) % shape[1]


def _made(chunk: Any) -> Any:
    """Return random numbers that repeat, as it takes long to draw so many."""
    drawn = np.random.default_rng(0).standard_normal(1 << 16, np.float32)
    return np.resize(drawn, chunk.shape)


# --------------------------------------------------------------------------- as text

HEADINGS = ("operation", "array", "chunks", "seconds", "peak", "workers", "finished")
LEGEND = (
    "An array whose chunks are made when they are needed, on worker processes of one thread. "
    "`peak` is the most memory that one of them has had so far, all libraries included."
)


def cells(rows: list[Row]) -> list[list[str]]:
    """Return the rows as text."""
    return [
        [
            row.operation, tables.shape(row.shape), tables.shape(row.chunk),
            row.problem or f"{row.seconds:.1f}", f"{row.peak_bytes / 1e6:.0f} MB",
            f"{row.workers} of {row.limit_bytes / 1e6:.0f} MB", "yes" if row.held else "NO",
        ]
        for row in rows
    ]  # fmt: skip
