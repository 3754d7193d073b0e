"""``scale``: beyond stored logits, beyond one worker and beyond one machine, in four parts.

`scale_linear` measures the loss of a linear layer, `scale_chunks` chunks of Dask, `scale_worker` a
worker that is smaller than the array, and `scale_ranks` counts what ranks tell each other and
models what that costs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from bench import memory, scale_chunks, scale_linear, scale_ranks, scale_worker, speed
from bench.errors import CommandError, chosen

# Each has HEADINGS, LEGEND and `cells(rows)`.
PARTS: dict[str, Any] = {
    "linear": scale_linear,
    "chunks": scale_chunks,
    "worker": scale_worker,
    "ranks": scale_ranks,
}
# A call takes seconds, and has been made before it is timed.
THOROUGH = speed.Effort(seconds=1.0, rounds=3, most=9, enough_s=4.0, warm=0)
QUICK = speed.Effort(seconds=0.0, rounds=2, most=2, warm=0)
_NEEDED = {
    "linear": ("numpy", "torch", "jax", "optax"),
    "chunks": ("dask", "scipy"),
    "worker": ("dask", "distributed"),
    "ranks": ("torch",),
}


def parse_parts(text: str) -> list[str]:
    if why := memory.why_not():
        raise CommandError(why)
    names = chosen("part", text, PARTS)
    for name in names:
        for module in _NEEDED[name]:
            if importlib.util.find_spec(module) is None:
                needed = "'portable_softmax[bench,peers,dask]' distributed"
                raise CommandError(f"{name} needs {module}: pip install {needed}")
    return names


def parse_classes(text: str) -> list[int]:
    for number in text.split(","):
        if not (number.isdecimal() and int(number)):
            raise CommandError(f"{number!r} is no number of classes")
    return [int(number) for number in text.split(",")]


def parse_layer(text: str) -> tuple[int, int]:
    """Return positions and hidden entries."""
    n, _, h = text.partition("x")
    if not (n.isdecimal() and h.isdecimal() and int(n) and int(h)):
        raise CommandError(f"layer {text!r} is not of the form POSITIONSxHIDDEN, such as 2048x512")
    return int(n), int(h)


def measure(part: str, layer: str, classes: str, *, quick: bool, cpu_time: bool) -> Iterator[Any]:
    """Yield the rows of one part."""
    effort = QUICK if quick else THOROUGH
    if part == "linear":
        n, h = parse_layer(layer or (scale_linear.QUICK if quick else scale_linear.LAYER))
        classes = classes or (scale_linear.QUICK_CLASSES if quick else scale_linear.CLASSES)
        sizes = [scale_linear.Size(n, h, c) for c in parse_classes(classes)]
        yield from scale_linear.measure(sizes, effort, cpu_time=cpu_time)
    elif part == "chunks":
        array = scale_chunks.QUICK if quick else scale_chunks.ARRAY
        yield from scale_chunks.measure(*array, effort, cpu_time=cpu_time)
    elif part == "worker":
        yield from scale_worker.measure(scale_worker.QUICK if quick else scale_worker.THOROUGH)
    else:
        whole, ranks, rounds = scale_ranks.QUICK if quick else scale_ranks.THOROUGH
        yield from scale_ranks.measure(whole, ranks, rounds, cpu_time=cpu_time)
