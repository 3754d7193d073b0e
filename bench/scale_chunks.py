"""``scale``, second part: chunks of whole rows in Dask.

Ours stands beside what it cannot do without, the kernel's own calls on the same chunks one after
another and a task per chunk that does nothing, and beside `scipy.special` by `map_blocks` and on
the lazy array itself. All take turns in one process, on the scheduler of threads; chunks that are
made are kept, as `persist` does. The memory of each is that of a largest entry, in a process of its
own.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np

import portable_softmax as ps
from bench import gpu, memory, memory_cell, places, providers, speed, tables

ARRAY = (300_000, 1000), 60 * 10**6  # its shape, and the bytes of a chunk
QUICK = (2000, 100), 100_000
OPERATIONS = ("softmax", "log_softmax", "cross_entropy", "cross_entropy_value_and_grad")
OURS, KERNEL, NOTHING = "ours", "the kernel, chunk by chunk", "map_blocks of nothing"
MAPPED, LAZY = "map_blocks of scipy.special", "scipy.special"
PROVIDERS = (OURS, KERNEL, NOTHING, MAPPED, LAZY)

# On the arrays of other libraries, which SciPy asks for when it is imported.
SETTINGS = {"SCIPY_ARRAY_API": "1"}


@dataclass
class Row:
    """One way to work on chunks."""

    shape: tuple[int, int]
    chunks: int
    operation: str
    provider: str
    rounds: int = 0
    min_s: float = math.nan
    median_s: float = math.nan
    peak_bytes: float = math.nan
    """What finding the largest entry takes beyond the array; nan where there is none."""
    problem: str = ""

    def __post_init__(self) -> None:
        self.shape = (self.shape[0], self.shape[1])  # a list in JSON, where nan is a string
        self.peak_bytes = float(self.peak_bytes)

    @property
    def held(self) -> bool:
        """Whether it ran."""
        return not self.problem


Call = Callable[[Any, Any], Any]  # of lazy logits and labels


def _lazy(operation: str) -> dict[str, Call]:
    """Return each way to a lazy array."""
    ours = getattr(ps, operation)
    if not operation.startswith("cross_entropy"):
        scipy = getattr(importlib.import_module("scipy.special"), operation)
        return {
            OURS: lambda x, _: ours(x),
            NOTHING: lambda x, _: x.map_blocks(_same),
            MAPPED: lambda x, _: x.map_blocks(partial(scipy, axis=-1)),
            LAZY: lambda x, _: scipy(x, axis=-1),
        }
    return {OURS: ours, NOTHING: lambda x, _: x.map_blocks(_same)}


def _same(chunk: Any) -> Any:
    return chunk


def _arrays(shape: tuple[int, int], size: int) -> tuple[Any, Any, list[Any], list[Any]]:
    """Return lazy logits and labels, and the chunks of both."""
    da, rng = places.open_backend("dask").xp, np.random.default_rng(0)
    rows = max(1, size // (4 * shape[1]))
    x = rng.standard_normal(shape, np.float32)
    labels = rng.integers(shape[1], size=shape[0])
    cuts = [slice(i, i + rows) for i in range(0, shape[0], rows)]
    lazy = da.from_array(x, (rows, shape[1])), da.from_array(labels, rows)
    return *lazy, [x[cut] for cut in cuts], [labels[cut] for cut in cuts]


def times(asked: dict[str, Any]) -> dict[str, Any]:
    """Return a row for each operation and provider, but for its memory."""
    dask, shape = importlib.import_module("dask"), tuple(asked["shape"])
    x, labels, parts, own = _arrays(shape, asked["chunk"])
    clock = gpu.clock(places.open_backend("numpy"), cpu_time=asked["cpu_time"])
    rows = []
    for operation in OPERATIONS:
        function = getattr(ps, operation)
        with_labels = operation.startswith("cross_entropy")

        def kernel(function: Any = function, with_labels: bool = with_labels) -> Any:
            if with_labels:
                return [function(a, t, reduction="sum") for a, t in zip(parts, own, strict=True)]
            return [function(a) for a in parts]

        calls: dict[str, Callable[[], Any]] = {KERNEL: kernel}
        for name, make in _lazy(operation).items():
            calls[name] = partial(_persisted, dask, make, x, labels)
        turns = {n: speed.Timed(call, clock, providers.nullcontext) for n, call in calls.items()}
        effort = speed.Effort(**asked["effort"])
        for name, taken in speed.interleaved(turns, effort).items():
            row = Row(shape, len(parts), operation, name, len(taken), min(taken), median(taken))
            rows.append(asdict(row))
    return {"rows": rows}


def _persisted(dask: Any, make: Call, x: Any, labels: Any) -> Any:
    return dask.persist(make(x, labels), scheduler="threads")


def peaks(asked: dict[str, Any]) -> dict[str, Any]:
    """Return the peaks of finding the largest entry, in this process."""
    x, labels, *_ = _arrays(tuple(asked["shape"]), asked["chunk"])
    gauge = memory_cell.gauge(places.open_backend("numpy"))
    found: dict[str, dict[str, int]] = {}
    for operation in OPERATIONS:
        found[operation] = {}
        for name, make in _lazy(operation).items():
            made = make(x, labels)
            largest = (made[1] if isinstance(made, tuple) else made).max()
            call = partial(largest.compute, scheduler="threads")
            found[operation][name] = memory_cell.peak_of(call, lambda _: None, gauge)
    return found


def measure(
    shape: tuple[int, int], chunk: int, effort: speed.Effort, *, cpu_time: bool
) -> Iterator[Row]:
    """Yield a row for each operation and provider."""
    asked = {"shape": shape, "chunk": chunk, "effort": asdict(effort), "cpu_time": cpu_time}
    found = memory.in_a_process("scale_cell", {"part": "times of chunks", **asked}, SETTINGS)
    settings = SETTINGS | memory.GIVEN_BACK
    most = memory.in_a_process("scale_cell", {"part": "peaks of chunks", **asked}, settings)
    for said in (found, most):
        if "problem" in said:
            yield Row(shape, 0, "all", OURS, problem=said["problem"])
            return
    for row in (Row(**one) for one in found["rows"]):
        row.peak_bytes = most[row.operation].get(row.provider, math.nan)
        yield row


# --------------------------------------------------------------------------- as text

HEADINGS = ("operation", "provider", "min", "median", "/ ours", "/ bare", "peak")
LEGEND = (
    "The fastest of several rounds, in turns. `/ ours` is the time in units of ours, and `/ bare` "
    "in units of the kernel's own calls and of Dask's tasks that do nothing, together. The peak is "
    "what finding the largest entry takes beyond the array, of which each thread works on a chunk."
)


def cells(rows: list[Row]) -> list[list[str]]:
    """Return the rows as text."""
    seconds = {(row.operation, row.provider): row.min_s for row in rows}
    lines = []
    for row in rows:
        ours, kernel, nothing = (
            seconds.get((row.operation, name), math.nan) for name in (OURS, KERNEL, NOTHING)
        )
        line = [row.operation, row.provider, row.problem or tables.duration(row.min_s)]
        line += [tables.duration(row.median_s)]
        line += [f"{row.min_s / ours:.2f}", f"{row.min_s / (kernel + nothing):.2f}"]
        line += ["" if math.isnan(row.peak_bytes) else f"{row.peak_bytes / 1e6:.0f} MB"]
        lines.append(line)
    return lines
