"""``speed``: each operation beside its peers, in GB/s and in shares of the machine's copy.

Everything that is compared takes turns within one run, so that what disturbs the machine disturbs
all; a benchmark library times one function to its end, then the next. Each call makes a new result,
as users' calls do, and each provider works on arrays of its own library.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from time import sleep
from typing import Any, NamedTuple

import numpy as np

from bench import copies, gpu, places, providers
from bench.answers import Answers
from bench.errors import CommandError, chosen, one_line
from bench.peers import (
    BACKWARD,
    BACKWARD_OF_FAMILY,
    FAMILY,
    LOGITS,
    OPERATIONS,
    TIMED,
    YES_OR_NO,
)
from bench.places import Place
from bench.providers import Provider

SHAPES = "32x10,262144x16,100000x100,10000x1000,4096x4096,1024x32000,64x128256"
QUICK_SHAPES = "32x10,1000x1000"
DTYPES = "float32,float64"
QUICK_DTYPES = "float32"

# How often an operation has to read or write an array of the input's size: its input, its result,
# the upstream gradient and the gradient, if they are that large.
_TOUCHES = {
    "softmax": 2,
    "log_softmax": 2,
    "logsumexp": 1,
    "cross_entropy": 1,
    "cross_entropy_value_and_grad": 2,
    "softmax+backward": 4,
    "log_softmax+backward": 4,
    "logsumexp+backward": 2,
    "softmax_with_sink": 2,
    "entmax": 2,
    "sparsemax": 2,
    "entmax_loss": 1,
    "sparsemax_loss": 1,
    "sigmoid_cross_entropy": 2,
    "sigmoid_focal": 2,
    "kl_divergence": 2,
    "entropy": 1,
    "logmeanexp": 1,
    "logcumsumexp": 2,
    "entmax+backward": 4,
    "sparsemax+backward": 4,
    "entropy+backward": 2,
    "kl_divergence+backward": 4,
    "sigmoid_cross_entropy+backward": 3,
}

# The threads of a library spin for a while after a call and would take a core from the next turn:
# the pause lets them sleep. The warm calls wake the provider's own threads and bring its arrays
# into the caches, as the earlier calls of a round do for the later ones.
_SETTLE_S = 2e-3
_WARM_CALLS = 20

OURS, PEER, COPY = "ours", "peer", "copy"


@dataclass
class Row:
    """One provider's time for one operation on one array."""

    operation: str
    shape: tuple[int, int]
    dtype: str
    provider: str
    role: str
    """Ours, a peer, or a copy."""
    bytes_moved: int
    path: str = ""
    """The kernel that ours takes, or the function of a peer that has several."""
    clock: str = ""
    problem: str = ""
    """Why it was not timed: a wrong result, or an exception."""
    rounds: int = 0
    min_s: float = math.nan
    median_s: float = math.nan
    gb_per_s: float = math.nan
    """Of the bytes that must move, in the fastest round."""
    share_of_copy: float = math.nan
    """Of the fastest copy in the same run."""


@dataclass(frozen=True)
class Effort:
    """How long to measure one operation on one array."""

    seconds: float
    """For each provider, unless it has had too few rounds."""
    rounds: int
    """At least."""
    most: int
    """Rounds at most: more would lower the minimum of the fast ones only."""
    slice_s: float = 1e-3
    """A faster call is repeated until a round takes this long."""
    enough_s: float = math.inf
    """Two rounds of a provider that have taken this long are enough."""
    warm: int = _WARM_CALLS
    """Calls before a round, at most."""


# The slowest peers decide how long a full run takes: some 10 minutes on 2 cores. A sort, or fifty
# bisections, of 128,000 classes take seconds a call.
THOROUGH = Effort(seconds=0.3, rounds=5, most=40, enough_s=1.0)
QUICK = Effort(seconds=0.01, rounds=3, most=10, slice_s=1e-4)


class Timed(NamedTuple):
    """A call, its clock and its context."""

    call: Callable[[], Any]
    clock: gpu.Clock
    context: Callable[[], Any]


def default_operations(place: Place) -> list[str]:
    """Return all operations, without backward if the library has no autograd."""
    autograd = place.name in ("torch", "jax")
    return [operation for operation in OPERATIONS if autograd or operation not in BACKWARD]


def measure(
    all_providers: list[Provider],
    operations: list[str],
    shapes: list[tuple[int, int]],
    dtypes: list[str],
    effort: Effort,
    *,
    cpu_time: bool = False,
) -> Iterator[Row]:
    """Yield a row for each operation, array and provider, and for the copies."""
    for provider in all_providers:
        has = provider.place.dtypes() if provider.ours else dtypes
        for dtype in dtypes:
            if dtype not in has:
                raise CommandError(f"{provider.place.name} has no {dtype} here: {', '.join(has)}")
    taken = copies.of(list(dict.fromkeys(provider.place for provider in all_providers)))
    clocks = {
        one.place: gpu.clock(one.place, cpu_time=cpu_time) for one in (*all_providers, *taken)
    }
    for dtype in dtypes:
        for shape in shapes:
            places.forget_compiled()
            problem = Problem(shape, dtype)
            for operation in operations:
                with warnings.catch_warnings(action="ignore"):  # a library warns of its own code
                    rows = _compare(problem, all_providers, taken, clocks, operation, effort)
                yield from rows


class Problem:
    """The arrays of one shape and dtype, made once and moved once to each place."""

    def __init__(self, shape: tuple[int, int], dtype: str) -> None:
        rng = np.random.default_rng(0)
        np_dtype = places.np_dtype(dtype)
        x = rng.standard_normal(shape).astype(np_dtype)
        self.shape, self.dtype = shape, dtype
        self.arrays = {"x": x, "labels": rng.integers(0, shape[1], shape[0])}
        self._draw = lambda shape: rng.standard_normal(shape).astype(np_dtype)
        self._there: dict[tuple[Place, str], Any] = {}

    @cached_property
    def answers(self) -> Answers:
        return Answers(self.arrays["x"], self.arrays["labels"])

    def second(self, operation: str) -> str:
        """Return the name of what an operation takes beside x."""
        of_family = operation in BACKWARD_OF_FAMILY
        kind = FAMILY.get(operation.partition("+")[0] if of_family else operation, "")
        backward = operation.endswith("+backward") and not of_family
        if not (kind in (LOGITS, YES_OR_NO) or backward):
            return "labels"
        name, shape = kind or "upstream", self.shape
        if operation.startswith("logsumexp"):
            name, shape = "upstream of rows", self.shape[:1]
        if name not in self.arrays:
            drawn = self._draw(shape)
            self.arrays[name] = (drawn > 0).astype(drawn.dtype) if kind == YES_OR_NO else drawn
        return name

    def at(self, place: Place, name: str) -> Any:
        if (place, name) not in self._there:
            self._there[place, name] = places.put(place, self.arrays[name])
        return self._there[place, name]


def _compare(
    problem: Problem,
    all_providers: list[Provider],
    taken: list[copies.Copy],
    clocks: Mapping[Place, gpu.Clock],
    operation: str,
    effort: Effort,
) -> list[Row]:
    x = problem.arrays["x"]
    second = problem.second(operation)
    what = operation, x.shape, x.dtype.name
    rows: dict[str, Row] = {}
    turns: dict[str, Timed] = {}
    seen = set()
    for provider in all_providers:
        call = provider.offer(-1, "mean").get(operation)
        if call is None:
            continue
        place = provider.place
        arrays = problem.at(place, "x"), problem.at(place, second)
        row = Row(
            *what, provider.name, OURS if provider.ours else PEER, x.nbytes * _TOUCHES[operation]
        )
        if provider.ours:
            row.path = providers.path_taken(provider, operation, *arrays)
            if (provider.offer, row.path) in seen:
                continue
            seen.add((provider.offer, row.path))
        else:
            row.path = getattr(call, "of", "")
        rows[provider.name] = row
        timed = Timed(bound(call, *arrays), clocks[place], provider.context)
        row.problem = wrong(problem, place, operation, problem.arrays[second], timed)
        if not row.problem:
            turns[provider.name] = timed
    for copy in taken:
        rows[copy.name] = Row(*what, copy.name, COPY, 2 * x.nbytes)
        call = bound(copy.call, problem.at(copy.place, "x"))
        turns[copy.name] = Timed(call, clocks[copy.place], providers.nullcontext)
    for name, times in interleaved(turns, effort).items():
        _fill(rows[name], times, turns[name].clock)
    best = max(row.gb_per_s for row in rows.values() if row.role == COPY)
    for row in rows.values():
        row.share_of_copy = row.gb_per_s / best
    return list(rows.values())


def bound(call: Callable[..., Any], *arrays: Any) -> Callable[[], Any]:
    return lambda: call(*arrays)


def wrong(problem: Problem, place: Place, operation: str, second: np.ndarray, timed: Timed) -> str:
    """Return what is wrong with a provider's result; empty if nothing is."""
    try:
        with timed.context():
            result = timed.call()
        results = result if isinstance(result, tuple) else (result,)
        arrays = tuple(places.get(place, r) for r in results)
    except Exception as error:  # the exception for a missing dtype differs between libraries
        return one_line(error)
    return problem.answers.problem(operation, second, arrays)


def interleaved(turns: Mapping[str, Timed], effort: Effort) -> dict[str, list[float]]:
    """Return the seconds of a call for each name and round; in a round each takes a turn."""
    calls = {name: repeats(timed, effort.slice_s) for name, timed in turns.items()}
    times: dict[str, list[float]] = {name: [] for name in turns}

    def goes_on(name: str) -> bool:
        taken = times[name]
        spent = sum(taken) * calls[name]
        if len(taken) > 1 and spent >= effort.enough_s:
            return False
        return len(taken) < effort.rounds or (spent < effort.seconds and len(taken) < effort.most)

    names = list(turns)
    gc.collect()
    gc.disable()
    try:
        while names := [name for name in names if goes_on(name)]:
            for name in names:
                times[name].append(turn(turns[name], calls[name], effort.warm))
            names.append(names.pop(0))  # no provider always follows the same one
    finally:
        gc.enable()
    return times


def turn(timed: Timed, calls: int, warm: int = _WARM_CALLS) -> float:
    """Return the seconds of a call, the mean of one round."""
    call, clock, context = timed
    sleep(_SETTLE_S)
    with context():
        if warm:  # waits for them: JAX returns before the work is done
            clock.seconds(call, min(calls, warm))
        return clock.seconds(call, calls)


def repeats(timed: Timed, slice_s: float) -> int:
    """Return how many calls make a round; the first call has compiled what it needs."""
    call, clock, context = timed
    with context():
        once = clock.seconds(call, 1)
        if once < 10 * slice_s:  # threads that had to wake may have made it longer
            once = min(once, *(clock.seconds(call, 1) for _ in range(_WARM_CALLS)))
    return max(1, math.ceil(slice_s / once))


def _fill(row: Row, times: list[float], clock: gpu.Clock) -> None:
    row.clock = clock.name
    row.rounds = len(times)
    row.min_s, row.median_s = min(times), median(times)
    row.gb_per_s = row.bytes_moved / row.min_s / 1e9


def parse_operations(text: str) -> list[str]:
    return chosen("operation", text, (*OPERATIONS, *TIMED))


def parse_shapes(text: str) -> list[tuple[int, int]]:
    shapes = []
    for part in text.split(","):
        rows, _, classes = part.partition("x")
        if not (rows.isdecimal() and classes.isdecimal() and int(rows) and int(classes)):
            raise CommandError(f"shape {part!r} is not of the form ROWSxCLASSES, such as 32x10")
        shapes.append((int(rows), int(classes)))
    return shapes
