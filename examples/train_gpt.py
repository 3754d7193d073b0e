"""Train a small GPT with this package's softmax and cross_entropy beside torch's own.

    pip install "portable_softmax[torch,numba]" rich
    python examples/train_gpt.py            # 2 blocks of 192, 8 x 128 tokens, 50,257 classes
    python examples/train_gpt.py --quick    # a smaller one

Two models start from the same weights and take turns on the same batches, one with ours and one
with torch's: eagerly, in bfloat16 under autocast, and compiled. A step is the loss, its gradients
and AdamW's update; the fastest counts. Losses that differ end the program with an error. The tokens
are generated: four of five follow from the token before, so that there is something to learn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

from portable_softmax import cross_entropy, softmax

MODES = ("eager", "bfloat16", "compiled")
RTOL = {"eager": 1e-4, "bfloat16": 1e-2, "compiled": 1e-4}


class Size(NamedTuple):
    """The model, and a batch."""

    blocks: int = 2
    width: int = 192
    heads: int = 6
    batch: int = 8
    length: int = 128
    classes: int = 50_257


QUICK = Size(blocks=1, width=32, heads=2, batch=4, length=32, classes=1_000)


class Functions(NamedTuple):
    """What the two models differ in."""

    attend: Callable[[Any, Any], Any]
    """Scores, and which tokens may be seen, to weights."""
    loss: Callable[[Any, Any], Any]


OURS = Functions(lambda scores, seen: softmax(scores, where=seen), cross_entropy)
TORCH = Functions(
    lambda scores, seen: torch.softmax(scores.masked_fill(~seen, -torch.inf), -1),
    lambda logits, labels: functional.cross_entropy(logits.flatten(0, 1), labels.flatten()),
)


class Block(nn.Module):
    """Attention to the tokens so far, and a layer for each token."""

    def __init__(self, size: Size, attend: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        width = size.width
        self.heads, self.attend = size.heads, attend
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.projections, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.layer = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        seen = torch.ones(size.length, size.length, dtype=torch.bool).tril()
        self.register_buffer("seen", seen)

    def forward(self, x: Any) -> Any:
        """Return what the tokens are known to be after this block."""
        by_head = self.projections(self.before(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = by_head.permute(2, 0, 3, 1, 4)
        scores = query @ key.mT * key.shape[-1] ** -0.5
        found = self.attend(scores, self.seen) @ value
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.layer(self.between(x))


class Gpt(nn.Module):
    """Scores for the next token; its classes share their weights with the embedding."""

    def __init__(self, size: Size, functions: Functions) -> None:
        super().__init__()
        self.loss = functions.loss
        self.tokens = nn.Embedding(size.classes, size.width)
        self.places = nn.Embedding(size.length, size.width)
        self.blocks = nn.Sequential(*(Block(size, functions.attend) for _ in range(size.blocks)))
        self.last = nn.LayerNorm(size.width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Any, labels: Any) -> Any:
        """Return the mean loss of a batch."""
        x = self.blocks(self.tokens(tokens) + self.places.weight)
        return self.loss(self.last(x) @ self.tokens.weight.T, labels)


def batch(size: Size, seed: int) -> tuple[Any, Any]:
    """Return tokens, and the token that follows each."""
    random = torch.Generator().manual_seed(seed)
    shape = size.batch, size.length + 1
    text = torch.randint(size.classes, shape, generator=random)
    follows = torch.rand(shape, generator=random) < 0.8
    for i in range(1, shape[1]):
        text[:, i] = torch.where(follows[:, i], (3 * text[:, i - 1] + 1) % size.classes, text[:, i])
    return text[:, :-1], text[:, 1:]


class Run:
    """A model in training."""

    def __init__(self, functions: Functions, size: Size, mode: str) -> None:
        torch.manual_seed(0)
        model = Gpt(size, functions)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.model = torch.compile(model) if mode == "compiled" else model
        self.autocast = mode == "bfloat16"
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, tokens: Any, labels: Any) -> None:
        """Learn from a batch, and keep its loss and the time."""
        began = perf_counter()
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = self.model(tokens, labels)
        loss.backward()
        self.optimizer.step()
        self.seconds.append(perf_counter() - began)
        self.losses.append(loss.item())


class Result(NamedTuple):
    """Both models after training in one mode."""

    mode: str
    losses: tuple[float, float]
    """The first and the last of ours."""
    ours_s: float
    """The fastest step."""
    torch_s: float

    @property
    def ratio(self) -> float:
        """Our time in units of torch's."""
        return self.ours_s / self.torch_s


def compare(mode: str, size: Size, steps: int) -> Result:
    """Train both models; the first step, which may compile, is not timed."""
    ours, theirs = (Run(functions, size, mode) for functions in (OURS, TORCH))
    for i in range(steps + 1):
        given = batch(size, i)
        for run in (ours, theirs):
            run.step(*given)
    torch.testing.assert_close(
        torch.tensor(ours.losses), torch.tensor(theirs.losses), rtol=RTOL[mode], atol=0.0
    )
    ends = ours.losses[0], ours.losses[-1]
    return Result(mode, ends, min(ours.seconds[1:]), min(theirs.seconds[1:]))


def main(arguments: list[str] | None = None) -> list[Result]:
    """Train in the modes that the command line names, and print a table."""
    parser = argparse.ArgumentParser(description="Train a small GPT in two ways.")
    parser.add_argument("--quick", action="store_true", help="a smaller model, and fewer steps")
    parser.add_argument("--steps", type=int, help="of each model")
    parser.add_argument("--mode", choices=MODES, action="append", help="may be repeated")
    given = parser.parse_args(arguments)
    size, steps = (QUICK, 2) if given.quick else (Size(), 8)
    results = [compare(mode, size, given.steps or steps) for mode in given.mode or MODES]
    table = Table("mode", "first loss", "last loss", "ours", "torch", "ours / torch")
    for r in results:
        losses = (f"{loss:.4f}" for loss in r.losses)
        times = (f"{seconds * 1e3:.1f} ms" for seconds in (r.ours_s, r.torch_s))
        table.add_row(r.mode, *losses, *times, f"{r.ratio:.2f}")
    Console().print(table)
    return results


if __name__ == "__main__":
    main()
