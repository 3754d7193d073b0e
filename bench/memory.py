"""``memory``: how much an operation allocates at its peak, in multiples of the array it is given.

Each cell is measured in a process of its own, by `bench.memory_cell`: what counts is the peak of
the resident memory, which holds what every allocator and every thread took. tracemalloc would see
NumPy's own allocations only, not those of torch, of XLA or of a compiled kernel. The result is
counted too, as no operation can do without it.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import places, tables
from bench.errors import CommandError
from bench.peers import FORWARD, LOSSES
from bench.providers import Provider, ours, ours_jitted
from bench.report import ROOT

OPERATIONS = (*FORWARD, *LOSSES)
SHAPES = "262144x128,16384x2048,256x131072"
QUICK_SHAPES = "16384x1024"
DTYPES = "float32"

# What a fused kernel may allocate, in units of the logits: little beyond its result. The portable
# code has no ceiling, nor has autograd, which keeps what the backward pass needs, nor have chunks,
# which are put together at the end.
_WITH_OUTPUT = 1.15
_WITHOUT = 0.15
CEILINGS = {
    "softmax": _WITH_OUTPUT,
    "log_softmax": _WITH_OUTPUT,
    "logsumexp": _WITHOUT,
    "cross_entropy": _WITHOUT,
    "cross_entropy_value_and_grad": _WITH_OUTPUT,
}

_NO_CEILING = ("", "portable", "dask chunks")

# The memory of a process is known to a few hundred kilobytes, a hundredth of this.
_SMALLEST = 64 * 10**6


@dataclass
class Cell:
    """The peak of one operation of one provider."""

    operation: str
    shape: tuple[int, int]
    dtype: str
    provider: str
    ours: bool
    input_bytes: int
    path: str = ""
    """The kernel that ours takes."""
    peak_bytes: float = math.nan
    """Beyond the memory in use before the call, the result included."""
    ratio: float = math.nan
    """In units of the input: of the output as well, where that is an array of the same size."""
    ceiling: float = math.inf
    problem: str = ""

    @property
    def held(self) -> bool:
        return not self.problem and self.ratio <= self.ceiling


def check(shapes: list[tuple[int, int]], dtypes: list[str]) -> None:
    """Raise for arrays that are too small to be measured."""
    for dtype in dtypes:
        for shape in shapes:
            size = math.prod(shape) * places.np_dtype(dtype).itemsize
            if size < _SMALLEST:
                raise CommandError(
                    f"shape {tables.shape(shape)} of {dtype} has {size / 1e6:.3g} MB: the memory "
                    f"of a process is too coarse for less than {_SMALLEST / 1e6:.0f} MB"
                )


def measure(
    backend: str,
    providers: list[Provider],
    operations: list[str],
    shapes: list[tuple[int, int]],
    dtypes: list[str],
) -> Iterator[Cell]:
    """Yield a cell for each operation, array and provider; each kernel of ours once."""
    for dtype in dtypes:
        for shape in shapes:
            size = math.prod(shape) * places.np_dtype(dtype).itemsize
            for operation in operations:
                seen = set()
                for provider in providers:
                    if operation not in provider.offer(-1, "mean"):
                        continue
                    cell = Cell(operation, shape, dtype, provider.name, provider.ours, size)
                    _fill(cell, _in_a_process(backend, cell))
                    if provider.offer in (ours, ours_jitted) and cell.path not in _NO_CEILING:
                        cell.ceiling = CEILINGS[operation]
                    way = provider.offer, cell.path
                    if not (cell.ours and way in seen):
                        yield cell
                    seen.add(way)


def _in_a_process(backend: str, cell: Cell) -> dict[str, Any]:
    return in_a_process("memory_cell", {"backend": backend, **asdict(cell)}, GIVEN_BACK)


# Otherwise glibc keeps freed blocks, and later peaks miss them.
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def in_a_process(module: str, asked: dict[str, Any], settings: dict[str, str]) -> dict[str, Any]:
    """Return what a module of the bench answers in a process of its own."""
    command = [sys.executable, "-m", f"bench.{module}", json.dumps(asked, default=str)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True
    )
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        said = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        return {"problem": said[-1][:120]}


def _fill(cell: Cell, found: dict[str, Any]) -> None:
    cell.problem = found.get("problem", "")
    cell.path = found.get("path", "")
    cell.peak_bytes = found.get("peak_bytes", math.nan)
    cell.ratio = cell.peak_bytes / cell.input_bytes


HEADINGS = ("operation", "shape", "dtype", "provider", "path", "peak", "/ input", "ceiling", "held")

LEGEND = (
    "The peak of memory beyond what was in use before the call, the result included, and the same "
    "in units of the logits. An array of their size is what softmax, log_softmax and the gradient "
    "return. A ceiling is promised for the fused kernels."
)


def cells(found: list[Cell]) -> list[list[str]]:
    """Return the cells as text."""
    return [
        [
            cell.operation,
            tables.shape(cell.shape),
            cell.dtype,
            cell.provider,
            cell.path,
            cell.problem or f"{cell.peak_bytes / 1e6:8.1f} MB",
            "" if cell.problem else f"{cell.ratio:5.2f}",
            f"{cell.ceiling:.2f}" if math.isfinite(cell.ceiling) else "",
            ("yes" if cell.held else "NO") if math.isfinite(cell.ceiling) or cell.problem else "",
        ]
        for cell in found
    ]


def why_not() -> str:
    """Why memory can't be measured here; empty where it can."""
    return "" if Path("/proc/self/clear_refs").exists() else "memory is measured on Linux only"
