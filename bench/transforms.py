"""``jax``: compiled calls of JAX and their vmap, beside the faster of jax.nn and optax.

Each call works on random logits, and on logits of which most rows are confident. The paths of ours
and the peers take turns.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from bench import gpu, peers, places, providers, speed, tables
from bench.peers import BACKWARD, FORWARD, LOSSES
from bench.places import Place
from bench.summary import geometric_mean
from portable_softmax import kernels

SHAPES = "32x10,512x64,4096x512,262144x16,1024x32000"
QUICK_SHAPES = "64x32"
BATCH = 4  # of vmap
COMPILATIONS = 3  # of each program, as XLA may let one of them take fewer threads than another
LOGITS = ("random", "confident")
FORMS = ("jit", "vmap", "rows")  # the last maps a function of one row


class Call(NamedTuple):
    """One operation, by this package and by the peers that have it."""

    name: str
    operation: str
    ours: peers.Call
    theirs: dict[str, peers.Call]


@dataclass
class Row:
    """One path of ours beside the fastest peer."""

    call: str
    logits: str
    form: str
    shape: tuple[int, int]
    path: str
    seconds: float = math.nan
    peer: str = ""
    peer_seconds: float = math.nan
    problem: str = ""

    @property
    def ratio(self) -> float:
        return self.seconds / self.peer_seconds


def calls() -> Iterator[Call]:
    """Yield the functions, their gradients by hand, and those by JAX's autodiff."""
    ours = providers.ours(-1, "mean")
    offers = {"jax.nn": peers.jax_nn(-1, "mean"), "optax": peers.optax_losses(-1, "mean")}
    for name, offer, operations in (
        ("{}", ours, (*FORWARD, *LOSSES)),
        ("{}, autodiff", peers.jax_autograd(ours), (*BACKWARD, LOSSES[1])),
    ):
        for operation in operations:
            theirs = {peer: o[operation] for peer, o in offers.items() if operation in o}
            yield Call(name.format(operation), operation, offer[operation], theirs)


def paths() -> dict[str, Callable[[], Any]]:
    """Return the kernels that JAX's arrays have here, each with its switch."""
    found = {"jax rules": partial(kernels.without, "numba rows")}
    if "numba rows" in kernels.available():
        found["numba rows"] = partial(kernels.use, "numba rows")
    return found


def arrays(call: Call, shape: tuple[int, int], logits: str = "random") -> tuple[Any, Any]:
    """Return the logits of a call in float32, and what it takes beside them."""
    rng = np.random.default_rng(0)
    x = 3 * rng.standard_normal(shape, np.float32)
    labels = rng.integers(shape[1], size=shape[0], dtype=np.int32)
    if logits == "confident":
        confident = rng.random(shape[0]) < 0.7
        x[confident, labels[confident]] += 25
    if call.operation in LOSSES:
        return x, labels
    few = call.operation.startswith("logsumexp")
    return x, rng.standard_normal(shape[:1] if few else shape, np.float32)


def measure(place: Place, shapes: list[tuple[int, int]], effort: speed.Effort) -> Iterator[Row]:
    """Yield a row for each call, path, form, kind of logits and shape."""
    for shape, logits, form, call in product(shapes, LOGITS, FORMS, calls()):
        if form != "vmap" or shape[0] % BATCH == 0:
            yield from _compare(place, call, logits, form, shape, effort)


def _compare(
    place: Place, call: Call, logits: str, form: str, shape: tuple[int, int], effort: speed.Effort
) -> list[Row]:
    given = arrays(call, shape, logits)
    if form == "vmap":
        given = tuple(a.reshape(BATCH, -1, *a.shape[1:]) for a in given)
    given = tuple(places.put(place, a) for a in given)
    return compared(place, Row(call.name, logits, form, shape, ""), call, given, effort)


def compared(
    place: Place, row: Row, call: Call, given: tuple[Any, ...], effort: speed.Effort
) -> list[Row]:
    """Return the row for each path, with the times of a compiled call on these arrays."""
    jax = sys.modules["jax"]
    turns, clock = {}, gpu.clock(place)
    compilations = COMPILATIONS if effort is speed.THOROUGH else 1
    ways = [(name, call.theirs[name], providers.nullcontext) for name in call.theirs]
    ways += [(name, call.ours, context) for name, context in paths().items()]
    for name, function, context in ways:
        found = {}
        for i in range(compilations):
            # A function of its own for each path, as JAX keeps what it has traced.
            one = partial(_called, function)
            compiled = jax.jit(one if row.form == "jit" else jax.vmap(one))
            found[str(i)] = speed.Timed(speed.bound(compiled, *given), clock, context)
        turns[name] = _fastest(found)
    answers = {}
    for name, timed in turns.items():
        with timed.context():
            answers[name] = jax.tree.leaves(timed.call())
    times = {name: min(found) for name, found in speed.interleaved(turns, effort).items()}
    peer = min(call.theirs, key=lambda name: times[name])
    rows = []
    for name in paths():
        problem = "" if _alike(answers[name], answers[peer]) else "wrong result"
        rows.append(
            replace(
                row, path=name, seconds=times[name], peer=peer, peer_seconds=times[peer],
                problem=problem,
            )
        )  # fmt: skip
    return rows


def _fastest(compilations: dict[str, speed.Timed]) -> speed.Timed:
    if len(compilations) == 1:
        return next(iter(compilations.values()))
    times = speed.interleaved(compilations, speed.QUICK)
    return compilations[min(times, key=lambda i: min(times[i]))]


def _called(function: peers.Call, *given: Any) -> Any:
    return function(*given)


def _alike(ours: list[Any], theirs: list[Any]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(np.allclose(*map(np.float64, pair), **_close(pair[0])) for pair in pairs)


def _close(x: Any) -> dict[str, float]:
    return {"rtol": 5e-2 if x.dtype == "bfloat16" else 1e-3, "atol": 1e-5}


HEADINGS = ("call", "logits", "form", "shape", "path", "time", "peer", "its time", "ratio")
LEGEND = (
    f"The fastest of several rounds in turns, float32, of the fastest of {COMPILATIONS} "
    "compilations (one with --quick). `peer` is the faster of jax.nn and optax, "
    f"`vmap` is over {BATCH} parts of the rows, `rows` over each, and `+backward` is forward and "
    "backward."
)


def cells(rows: list[Row]) -> list[list[str]]:
    """Return the rows as text."""
    return [
        [
            row.call, row.logits, row.form, tables.shape(row.shape), row.path,
            row.problem or tables.duration(row.seconds), row.peer,
            tables.duration(row.peer_seconds), f"{row.ratio:.2f}",
        ]
        for row in rows
    ]  # fmt: skip


SUMMARY = ("path", "shape", "cells", "geometric mean", "largest", "of")


def summary(rows: list[Row]) -> list[list[str]]:
    """Return a line for each path and shape, and one for all shapes of a path."""
    lines = []
    for path in dict.fromkeys(row.path for row in rows):
        own = [row for row in rows if row.path == path and not row.problem]
        shapes = list(dict.fromkeys(row.shape for row in own))
        groups = [(tables.shape(s), [row for row in own if row.shape == s]) for s in shapes]
        for name, some in (*groups, ("all", own)):
            worst = max(some, key=lambda row: row.ratio)
            lines.append([
                path, name, str(len(some)), f"{geometric_mean(r.ratio for r in some):.2f}",
                f"{worst.ratio:.2f}", ", ".join((worst.call, worst.logits, worst.form)),
            ])  # fmt: skip
    return lines
