"""``steps``: a training step with this package in units of the same step with torch's functions.

The small GPT is that of `examples/train_gpt.py`, in each of its modes. A layer is a product and the
loss behind it, with both gradients, compiled. The two ways take turns, and their losses are
compared.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import portable_softmax as ps
from bench import peers, places, tables
from bench.errors import CommandError
from bench.report import ROOT

HEADINGS = ("step", "mode", "ours", "torch", "/ torch", "goal", "")
LEGEND = (
    "The fastest of several steps, in turns. `/ torch` is the time in units of that of the same "
    "step with torch's softmax and cross_entropy."
)
GOALS = {"eager": 0.75, "bfloat16": 0.9, "compiled": 0.9}
LAYER_GOAL = 0.95
LAYERS = ((4096, 512), (262144, 16), (1024, 32000))
QUICK_LAYERS = ((2048, 64),)
WIDTH = 256


@dataclass
class Row:
    """One step in both ways."""

    step: str
    mode: str
    ours_s: float
    torch_s: float
    goal: float

    @property
    def ratio(self) -> float:
        """Our time in units of torch's."""
        return self.ours_s / self.torch_s


def check() -> None:
    """Raise what explains why nothing can be measured."""
    if not places.is_installed("torch"):
        raise CommandError("torch is not installed: pip install 'portable_softmax[torch]'")
    if why := peers.why_not_compiled(places.open_backend("torch")):
        raise CommandError(f"torch cannot compile here: {why}")


def measure(*, quick: bool) -> Iterator[Row]:
    """Yield a row for each mode of the GPT, and for each layer."""
    gpt = _example("train_gpt")
    size, steps = (gpt.QUICK, 2) if quick else (gpt.Size(), 12)
    for mode in gpt.MODES:
        found = gpt.compare(mode, size, steps)
        yield Row("small GPT", mode, found.ours_s, found.torch_s, GOALS[mode])
    for shape in QUICK_LAYERS if quick else LAYERS:
        yield _layer(*shape, rounds=2 if quick else 20)


def _example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def _layer(rows: int, classes: int, rounds: int) -> Row:
    """Time the loss behind a product of random numbers, with its gradients."""
    torch = sys.modules["torch"]
    random = torch.Generator().manual_seed(0)
    x = torch.randn(rows, WIDTH, generator=random)
    W = (torch.randn(WIDTH, classes, generator=random) * WIDTH**-0.5).requires_grad_()
    x.requires_grad_()
    labels = torch.randint(classes, (rows,), generator=random)
    places.forget_compiled()
    losses = ps.cross_entropy, torch.nn.functional.cross_entropy
    ways = [_compiled(torch, loss) for loss in losses]
    found = [way(x, W, labels) for way in ways]
    torch.testing.assert_close(found[0], found[1])
    seconds = [[], []]
    for _ in range(rounds):
        for way, taken in zip(ways, seconds, strict=True):
            began = perf_counter()
            way(x, W, labels)
            taken.append(perf_counter() - began)
    name = f"layer {tables.shape((rows, classes))}"
    return Row(name, "compiled", *map(min, seconds), LAYER_GOAL)


def _compiled(torch: Any, loss: Callable[..., Any]) -> Callable[..., Any]:
    forward = torch.compile(lambda x, W, labels: loss(x @ W, labels), dynamic=False)

    def step(x: Any, W: Any, labels: Any) -> Any:
        value = forward(x, W, labels)
        return value.detach(), *torch.autograd.grad(value, (x, W))

    return step


def cells(rows: list[Row]) -> list[list[str]]:
    """Return the rows as text."""
    return [
        [
            row.step, row.mode, tables.duration(row.ours_s), tables.duration(row.torch_s),
            f"{row.ratio:.2f}", f"{row.goal:.2f}", "OVER" if row.ratio > row.goal else "",
        ]
        for row in rows
    ]  # fmt: skip
