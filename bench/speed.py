"""``speed``: each operation beside its peers, in GB/s and in shares of the machine's copy.

Everything that is compared takes turns within one run, so that what disturbs the machine disturbs
all. Each call makes a new result, as users' calls do.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from bench import places
from bench.places import Place
from bench.providers import (
    OPERATIONS,
    Provider,
    numpy_by_hand,
    our_provider,
    peers,
    portable_provider,
)
from portable_softmax import kernels
from portable_softmax._cli.errors import CommandError, one_line

SHAPES = "32x10,10000x1000,1024x32000"
QUICK_SHAPES = "32x10,1000x1000"

# The array is read once; these write one of its size as well. Anything else is small.
_WRITES = {"softmax", "log_softmax", "cross_entropy_value_and_grad"}

# Largest error, relative and absolute, of a result that deserves to be timed. A probability may
# be subnormal in float16, and is then a whole unit off.
_TOLERANCE = {
    "float64": (1e-12, 0.0),
    "float32": (2e-5, 0.0),
    "float16": (2e-2, 2.0**-24),
    "bfloat16": (1e-1, 0.0),
}

COPY = "copy"


@dataclass
class Row:
    """One provider's time for one operation on one array."""

    operation: str
    shape: tuple[int, int]
    dtype: str
    provider: str
    ours: bool
    bytes_moved: int
    problem: str = ""
    """Why it was not timed: the wrong answer, or the exception."""
    rounds: int = 0
    min_s: float = math.nan
    median_s: float = math.nan
    gb_per_s: float = math.nan
    """Of the bytes that must move, in the fastest round."""
    share_of_copy: float = math.nan


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    seconds: float
    """For one operation on one array, all providers together."""
    rounds: int
    """At least."""
    slice_s: float = 1e-3
    """A faster call is repeated until a round takes this long."""


THOROUGH = Effort(seconds=3.0, rounds=7)
QUICK = Effort(seconds=0.05, rounds=3, slice_s=1e-4)


def measure(
    place: Place,
    providers: list[Provider],
    operations: list[str],
    shapes: list[tuple[int, int]],
    dtypes: list[str],
    effort: Effort,
) -> Iterator[Row]:
    """Yield a row for each operation, array and provider, and for the copy."""
    for dtype in dtypes:
        if dtype not in place.dtypes():
            raise CommandError(f"{place.name} has no {dtype} here: {', '.join(place.dtypes())}")
    for dtype in dtypes:
        for shape in shapes:
            rng = np.random.default_rng(0)
            x = rng.standard_normal(shape).astype(places.np_dtype(dtype))
            labels = rng.integers(0, shape[1], shape[0])
            for operation in operations:
                yield from _compare(place, providers, operation, x, labels, effort)


def default_providers(place: Place) -> tuple[list[Provider], list[str]]:
    """Return ours and the peers on this backend, and the peers that are not installed."""
    present, missing = peers(place)
    return [our_provider(place), portable_provider(), *present], missing


def _compare(
    place: Place,
    providers: list[Provider],
    operation: str,
    x: np.ndarray,
    labels: np.ndarray,
    effort: Effort,
) -> list[Row]:
    expected = numpy_by_hand(-1, "mean")[operation](x.astype(np.float64), labels)
    arrays = places.put(place, x), places.put(place, labels)
    moved = x.nbytes * (2 if operation in _WRITES else 1)
    has_kernel = not kernels.explain(operation, arrays[0]).startswith("portable")
    rows, calls = [], {}
    for provider in providers:
        call = provider.offer(-1, "mean").get(operation)
        if call is None or (provider.context is kernels.portable and not has_kernel):
            continue
        row = Row(operation, x.shape, x.dtype.name, provider.name, provider.ours, moved)
        rows.append(row)
        with provider.context():
            row.problem = _wrong(place, call, arrays, expected, x.dtype.name)
        if not row.problem:
            calls[provider.name] = provider.context, _bound(place, call, *arrays)
    rows.append(Row(operation, x.shape, x.dtype.name, COPY, False, 2 * x.nbytes))
    calls[COPY] = ExitStack, _bound(place, lambda x, _: places.copy(place, x), *arrays)
    times = _interleaved(calls, effort)
    for row in rows:
        if row.provider in times:
            _fill(row, times[row.provider])
    for row in rows:
        row.share_of_copy = row.gb_per_s / rows[-1].gb_per_s
    return rows


def _wrong(place: Place, call: Any, arrays: Any, expected: Any, dtype: str) -> str:
    """Return what is wrong with a provider's answer; empty where nothing is."""
    try:
        result = call(*arrays)
        results = result if isinstance(result, tuple) else (result,)
        results = [places.get(place, r).astype(np.float64) for r in results]
    except Exception as problem:  # a library refuses a dtype in its own way
        return one_line(problem)
    relative, absolute = _TOLERANCE[dtype]
    answers = expected if isinstance(expected, tuple) else (expected,)
    for actual, answer in zip(results, answers, strict=True):
        if actual.shape != np.shape(answer):
            return f"wrong: shape {actual.shape} instead of {np.shape(answer)}"
        error = np.max((np.abs(actual - answer) - absolute) / np.abs(answer))
        if not error <= relative:  # nor may it be nan
            return f"wrong: relative error {error:.1e}"
    return ""


def _bound(place: Place, call: Any, *arrays: Any) -> Callable[[], None]:
    return lambda: places.finish(place, call(*arrays))


def _interleaved(calls: Mapping[str, Any], effort: Effort) -> dict[str, list[float]]:
    """Return seconds a call for each name, one value a round; in each round all take a turn."""
    repeats = {}
    for name, (context, call) in calls.items():
        with context():
            call()  # compiles
            once = min(_seconds(call, 1) for _ in range(3))
            repeats[name] = max(1, math.ceil(effort.slice_s / once))
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    gc.collect()
    gc.disable()
    try:
        started = perf_counter()
        while len(times[names[0]]) < effort.rounds or perf_counter() - started < effort.seconds:
            for name in names:
                context, call = calls[name]
                with context():
                    times[name].append(_seconds(call, repeats[name]))
            names.append(names.pop(0))  # nobody always runs after the same neighbour
    finally:
        gc.enable()
    return times


def _seconds(call: Callable[[], None], repeats: int) -> float:
    started = perf_counter()
    for _ in range(repeats):
        call()
    return (perf_counter() - started) / repeats


def _fill(row: Row, times: list[float]) -> None:
    row.rounds = len(times)
    row.min_s, row.median_s = min(times), median(times)
    row.gb_per_s = row.bytes_moved / row.min_s / 1e9


HEADINGS = (
    "operation", "shape", "dtype", "provider", "min", "median", "GB/s", "of copy", "/ ours",
)  # fmt: skip


LEGEND = (
    "GB/s of the bytes that must move, in the fastest round: softmax, log_softmax and the gradient "
    "read and write the array once, logsumexp and the loss read it once. `of copy` is the share of "
    "what the library's own copy of the same array reached in the same run, `/ ours` the time in "
    "units of ours."
)


def cells(rows: list[Row]) -> list[list[str]]:
    """Return the rows as text."""
    ours: dict[Any, float] = {}
    for row in rows:
        if row.ours:
            ours.setdefault((row.operation, row.shape, row.dtype), row.min_s)
    lines = []
    for row in rows:
        what = row.operation, row.shape, row.dtype
        numbers = (
            [row.problem, "", "", "", ""]
            if row.problem
            else [
                _duration(row.min_s),
                _duration(row.median_s),
                f"{row.gb_per_s:6.2f}",
                f"{row.share_of_copy:5.0%}",
                f"{row.min_s / ours.get(what, math.nan):5.2f}",
            ]
        )
        lines.append(
            [row.operation, "x".join(map(str, row.shape)), row.dtype, row.provider, *numbers]
        )
    return lines


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:9.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:9.2f} ms"


def parse_operations(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in OPERATIONS:
            raise CommandError(f"unknown operation {name!r}; choose from {', '.join(OPERATIONS)}")
    return names


def parse_shapes(text: str) -> list[tuple[int, int]]:
    shapes = []
    for part in text.split(","):
        rows, _, classes = part.partition("x")
        if not (rows.isdecimal() and classes.isdecimal() and int(rows) and int(classes)):
            raise CommandError(f"shape {part!r} is not of the form ROWSxCLASSES, such as 32x10")
        shapes.append((int(rows), int(classes)))
    return shapes
