"""``arrays``: this package beside scipy.special on each library's own arrays.

That is what the author of an array-agnostic package would call instead, with SCIPY_ARRAY_API=1.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from bench import peers, places, providers, speed, tables
from bench.errors import CommandError
from bench.goals import Compared
from bench.providers import Provider

LIBRARIES = ("numpy", "torch", "jax", "dask")
DTYPE = "float32"
GOALS = {"jax": 0.6}
GOAL = 0.9
HEADINGS = ("library", "operation", "shape", "time", "its time", "ratio", "goal", "", "path")
LEGEND = (
    "The fastest of several rounds, in turns, float32, called as a user would, without a compiler. "
    "`ratio` is the time in units of that of scipy.special on the same arrays."
)
_SWITCH = "SCIPY_ARRAY_API"


@dataclass
class Row(Compared):
    """One function on one library's arrays."""

    library: str
    operation: str
    shape: tuple[int, int]
    path: str
    seconds: float
    other_seconds: float
    problem: str = ""

    @property
    def goal(self) -> float:
        return GOALS.get(self.library, GOAL)


def prepare() -> None:
    """Let scipy.special take any array, before it is imported."""
    if not importlib.util.find_spec("scipy"):
        raise CommandError("scipy is not installed: pip install 'portable_softmax[bench]'")
    if "scipy" in sys.modules and os.environ.get(_SWITCH) != "1":
        raise CommandError(f"scipy is already imported: set {_SWITCH}=1 before that")
    os.environ[_SWITCH] = "1"


def measure(shapes: list[tuple[int, int]], effort: speed.Effort) -> Iterator[Row]:
    """Yield a row for each library that is installed, function and shape."""
    for name in LIBRARIES:
        if not places.is_installed(name):
            continue
        place = places.open_backend(name)
        both = [
            Provider("ours", place, providers.ours, ours=True),
            Provider(peers.SCIPY, place, peers.scipy_special),
        ]
        found: dict[str, speed.Row] = {}
        for row in speed.measure(both, list(peers.FORWARD), shapes, [DTYPE], effort):
            if row.role == speed.COPY:
                continue
            found[row.provider] = row
            if row.provider == peers.SCIPY:
                ours = found["ours"]
                problem = ours.problem or row.problem
                yield Row(name, row.operation, row.shape, ours.path, ours.min_s, row.min_s, problem)


def cells(rows: list[Row]) -> list[list[str]]:
    """Return the rows as text."""
    return [
        [
            row.library, row.operation, tables.shape(row.shape),
            row.problem or tables.duration(row.seconds), tables.duration(row.other_seconds),
            f"{row.ratio:.2f}" if math.isfinite(row.ratio) else "", f"{row.goal:.2f}",
            "OVER" if row.missed else "", row.path,
        ]
        for row in rows
    ]  # fmt: skip
