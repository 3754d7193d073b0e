"""``compile``: how long XLA compiles a call of JAX, and how large the program is, beside the peers.

The first time of a path is beside the others: it may load or compile a handler.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from bench import places, providers, tables, transforms
from bench.places import Place
from bench.summary import geometric_mean

SHAPE = (4096, 512)
HEADINGS = ("call", "path", "first", "time", "/ peer", "instructions", "/ peer")
LEGEND = (
    f"Of a call on float32 of shape {tables.shape(SHAPE)}: `time` from the function to its "
    "compiled program, the fastest of several rounds in turns, and the HLO instructions that JAX "
    "hands to XLA. `/ peer` is in units of optax, or of jax.nn where optax has no such call."
)


@dataclass
class Row:
    """What one path of ours costs before its first answer."""

    call: str
    path: str
    first: float
    seconds: float
    instructions: int
    peer: str
    peer_seconds: float
    peer_instructions: int

    @property
    def ratios(self) -> tuple[float, float]:
        """The time and the size, in units of the peer's."""
        return self.seconds / self.peer_seconds, self.instructions / self.peer_instructions


def measure(place: Place, *, quick: bool) -> Iterator[Row]:
    """Yield a row for each call and path of ours."""
    for call in transforms.calls():
        given = [places.put(place, a) for a in transforms.arrays(call, SHAPE)]
        peer = list(call.theirs)[-1]
        ways: dict[str, Any] = {peer: (call.theirs[peer], providers.nullcontext)}
        ways |= {path: (call.ours, context) for path, context in transforms.paths().items()}
        times: dict[str, list[float]] = {name: [] for name in ways}
        sizes = {}
        for _ in range(2 if quick else 10):
            for name, (function, context) in ways.items():
                with context():
                    seconds, sizes[name] = _compiled(function, given)
                times[name].append(seconds)
        for path in transforms.paths():
            yield Row(
                call.name, path, times[path][0], min(times[path]), sizes[path],
                peer, min(times[peer]), sizes[peer],
            )  # fmt: skip


def _compiled(function: Any, given: list[Any]) -> tuple[float, int]:
    """Compile anew; return the seconds and how many instructions JAX has handed over."""
    jax = sys.modules["jax"]
    jax.clear_caches()
    started = perf_counter()
    lowered = jax.jit(lambda x, second: function(x, second)).lower(*given)
    lowered.compile()
    seconds = perf_counter() - started
    return seconds, lowered.compiler_ir("hlo").as_hlo_text().count(" = ")


def cells(rows: list[Row]) -> list[list[str]]:
    """Return the rows as text, and a line for each path."""
    lines = [
        [
            row.call, row.path, tables.duration(row.first), tables.duration(row.seconds),
            f"{row.ratios[0]:.2f}", str(row.instructions), f"{row.ratios[1]:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    for path in dict.fromkeys(row.path for row in rows):
        time, size = zip(*(row.ratios for row in rows if row.path == path), strict=True)
        means = [f"{geometric_mean(ratios):.2f}" for ratios in (time, size)]
        lines.append(["geometric mean", path, "", "", means[0], "", means[1]])
    return lines
