"""``versus``: this tree against another checkout of the package, in one run.

Each tree is measured by a process of its own, both with this bench. Within a cell the two take
turns, and the fastest round of each counts: what disturbs the machine disturbs both. A cell over
the limit is measured again by new processes before it is reported. Freed memory stays with the
process: whether glibc gives it back depends on the heap's history, and getting it anew takes longer
than a softmax.
"""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import portable_softmax
from bench import gpu, peers, places, providers, speed, summary, tables
from bench.errors import CommandError
from bench.report import ROOT

LIMIT = 1.1
# By whether the processes are fresh; no path is all of them.
SHAPES = (speed.SHAPES.partition(",")[2], "32x10,1x10,200x30,64x64")
PATHS = ([], ["ours", "ours, autograd", "ours, jit", "ours, jit, vjp"])
EFFORT = speed.Effort(seconds=0.4, rounds=7, most=40)

# Pairs of processes for a cell: at least, and more while it is over the limit.
PAIRS, FRESH_PAIRS, MORE = 1, 3, 2


class Key(NamedTuple):
    """What is compared."""

    backend: str
    shape: tuple[int, int]
    dtype: str
    operation: str
    path: str


@dataclass
class Cell:
    """The fastest round of each tree."""

    key: Key
    before_s: float = math.inf
    now_s: float = math.inf
    before_problem: str = ""
    problem: str = ""
    """Why this tree was not timed: a wrong result, or an exception."""

    @property
    def ratio(self) -> float:
        """The time now in units of the time before; nan where either is missing."""
        return math.nan if math.inf in (self.before_s, self.now_s) else self.now_s / self.before_s

    def fails(self, limit: float) -> bool:
        return bool(self.problem) or self.ratio > limit


# --------------------------------------------------------------------------- one tree's process

# The package is imported from its tree first; the bench, and nothing else, from this one.
_START = """
import sys
sys.path.insert(0, sys.argv[1])
import portable_softmax
sys.path[0] = sys.argv[2]
from bench import versus
versus.serve()
"""


# For glibc; other allocators pass them over.
_KEEPS_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


class Tree:
    """A process that measures the package of one checkout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, str(folder), str(ROOT)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **_KEEPS_MEMORY},
        )  # fmt: skip

    def send(self, name: str, *values: Any) -> None:
        with suppress(BrokenPipeError):  # `receive` reports it
            print(json.dumps([name, *values]), file=self.process.stdin, flush=True)

    def receive(self) -> Any:
        answer = self.process.stdout.readline()
        if not answer:
            raise CommandError(f"the process that measures {self.folder} ended early, see above")
        return json.loads(answer)

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def serve() -> None:
    """Answer each request, a line of stdin, with a line; what libraries print goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    warnings.simplefilter("ignore")
    server = _Server()
    for line in sys.stdin:
        name, *values = json.loads(line)
        print(json.dumps(getattr(server, name)(*values)), file=answers, flush=True)


class _Server:
    def paths(self, backend: str) -> list[Any]:
        """Return where the package is, the backend's version, and the operations of each path."""
        place = places.open_backend(backend)
        ours = providers.our_providers(place, slow_starts=False)
        timed = (*peers.OPERATIONS, *peers.TIMED)
        offers = {p.name: [op for op in p.offer(-1, "mean") if op in timed] for p in ours}
        return [portable_softmax.__file__, str(place), offers]

    def prepare(
        self, backend: str, shape: list[int], dtype: str, operation: str, path: str, slice_s: float
    ) -> str:
        """Make the arrays and check the result; return what is wrong with it, or nothing."""
        if not hasattr(self, "place"):  # all of a process's cells are of one array
            self.place = places.open_backend(backend)
            self.problem = speed.Problem((shape[0], shape[1]), dtype)
        place, problem = self.place, self.problem
        offer, context = providers.named(place, path)
        second = problem.second(operation)
        call = offer(-1, "mean")[operation]
        bound = speed.bound(call, problem.at(place, "x"), problem.at(place, second))
        self.timed = speed.Timed(bound, gpu.clock(place), context)
        why = speed.wrong(problem, place, operation, problem.arrays[second], self.timed)
        if not why:
            self.repeats = speed.repeats(self.timed, slice_s)
            gc.collect()
            gc.freeze()  # so that collecting before each turn is quick
            gc.disable()
        return why

    def turn(self) -> float:
        """Return the seconds of a call."""
        gc.collect()
        return speed.turn(self.timed, self.repeats)


# --------------------------------------------------------------------------- both, in turns


def paths(other: Path, backend: str) -> tuple[str, list[tuple[str, str]]]:
    """Return a backend's version, and the operations of each path that both trees have."""
    with Tree(other) as before, Tree(ROOT) as now:
        for tree in (before, now):
            tree.send("paths", backend)
        (file, _, theirs), (_, version, ours) = before.receive(), now.receive()
    if not Path(file).is_relative_to(other):
        raise CommandError(f"{other}: the package that was imported is {file}")
    return version, [(p, op) for p in ours for op in ours[p] if op in theirs.get(p, ())]


def chosen(backend: str, offered: list[tuple[str, str]], **asked: Any) -> list[Key]:
    """Return a key for each cell, of the paths and operations asked for, or of all."""
    return [
        Key(backend, shape, dtype, operation, path)
        for dtype, shape, (path, operation) in product(asked["dtypes"], asked["shapes"], offered)
        if path in (asked["paths"] or [path]) and operation in (asked["operations"] or [operation])
    ]


def measure(
    other: Path, keys: list[Key], *, limit: float, fresh: bool, effort: speed.Effort
) -> Iterator[Cell]:
    """Yield a cell for each key; those of one array share their processes unless `fresh`."""
    groups: dict[Any, list[Cell]] = {}
    for key in keys:
        groups.setdefault(key if fresh else key[:3], []).append(Cell(key))
    for cells in groups.values():
        for _ in range(FRESH_PAIRS if fresh else PAIRS):
            _measure(other, cells, effort)
        for _ in range(MORE):
            if slow := [cell for cell in cells if cell.ratio > limit]:
                _measure(other, slow, effort)
        yield from cells


def _measure(other: Path, cells: list[Cell], effort: speed.Effort) -> None:
    """Start a process for each tree, and let them take turns in each cell."""
    with ExitStack() as stack:
        before, now = (stack.enter_context(Tree(folder)) for folder in (other, ROOT))
        for cell in cells:
            for tree in (before, now):  # both import at the same time
                tree.send("prepare", *cell.key, effort.slice_s)
            cell.before_problem, cell.problem = before.receive(), now.receive()
            if not (cell.before_problem or cell.problem):
                _take_turns(cell, before, now, effort)


def _take_turns(cell: Cell, before: Tree, now: Tree, effort: speed.Effort) -> None:
    order, rounds, spent = [before, now], 0, 0.0
    while rounds < effort.rounds or (spent < effort.seconds and rounds < effort.most):
        seconds = {}
        for tree in order:
            tree.send("turn")
            seconds[tree] = tree.receive()
        cell.before_s = min(cell.before_s, seconds[before])
        cell.now_s = min(cell.now_s, seconds[now])
        spent += max(effort.slice_s, *seconds.values())
        rounds += 1
        order.reverse()


# --------------------------------------------------------------------------- as text

HEADINGS = ("backend", "operation", "shape", "dtype", "path", "before", "now", "ratio", "")
LEGEND = "The fastest round of each tree; `ratio` is the time now in units of the time before."


def text(cells: list[Cell], limit: float) -> list[list[str]]:
    lines = []
    for cell in cells:
        backend, shape, dtype, operation, path = cell.key
        problem = cell.problem or (cell.before_problem and f"before: {cell.before_problem}")
        mark = problem or ("SLOWER" if cell.ratio > limit else "")
        times = map(tables.duration, (cell.before_s, cell.now_s))
        numbers = ["", "", ""] if problem else [*times, f"{cell.ratio:5.2f}"]
        lines.append([backend, operation, tables.shape(shape), dtype, path, *numbers, mark])
    return lines


def verdict(cells: list[Cell], limit: float) -> list[str]:
    """Return a line for each path of each backend."""
    lines = []
    for backend, path in dict.fromkeys((cell.key.backend, cell.key.path) for cell in cells):
        some = [c for c in cells if (c.key.backend, c.key.path) == (backend, path)]
        ratios = [cell.ratio for cell in some if not math.isnan(cell.ratio)]
        lines.append(
            f"{backend}, {path}: {len(some)} cells, geometric mean "
            f"{summary.geometric_mean(ratios):.2f}, largest {max(ratios, default=math.nan):.2f}, "
            f"{sum(cell.fails(limit) for cell in some)} over {limit:g} or wrong"
        )
    return lines
