"""``scale``, third part: what ranks of torch.distributed tell each other, and a model of its cost.

One process plays one rank of many: in torch's group "fake" a collective returns at once. So the
calls, the all-reduces and their bytes are those of the real code, and so is the time of the rank's
own work on this machine; its values are not. The time on a network is a model and no measurement.

The model of bytes, for N positions, C classes and H hidden entries in float32, with the classes or
the positions cut among the ranks ::

                              forward                        backward
    loss, classes cut         4 N + 48 N                     0
    loss, positions cut       24                             0
    linear, classes cut       4 N + 48 N                     4 N H
    linear, positions cut     24                             4 C H

A maximum takes 4 bytes per position, and six sums that belong to it 48; a mean takes three numbers.

The model of time: an all-reduce of n bytes among p ranks takes the less of a ring and a tree ::

    ring = 2 (p - 1) a + 2 (p - 1) / p * n b           tree = 2 ceil(log2 p) a + 2 ceil(log2 p) n b

and the logits of the other ranks would take an all-gather, (p - 1) a + (p - 1) / p * 4 N C b.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import portable_softmax as ps
from bench import gpu, memory, places, tables

LATENCY, SECONDS_PER_BYTE = 10e-6, 1 / 25e9  # a and b of the model: assumptions
# Positions, hidden entries and classes of the whole; numbers of ranks; rounds.
THOROUGH = (2048, 512, 32_768), (1, 4, 16, 64, 256, 1024), 3
QUICK = (64, 16, 2048), (1, 1024), 1
CALLS = ("cross_entropy", "linear_cross_entropy")
CUTS = ("classes", "positions")


@dataclass
class Row:
    """One rank's call with its gradients, among so many."""

    size: tuple[int, int, int]
    """Positions, hidden entries and classes of the whole."""
    call: str
    cut: str
    ranks: int
    sizes: list[int]
    """The bytes of each all-reduce, in order."""
    other: list[str]
    """Collectives that are no all-reduce: there should be none."""
    work_s: float
    """What the rank works by itself, measured here."""
    problem: str = ""

    @property
    def model_s(self) -> float:
        """The time of the all-reduces, of the model."""
        return sum(all_reduce(self.ranks, n) for n in self.sizes)

    @property
    def gather_s(self) -> float:
        """The time that gathering the logits would take, of the model."""
        (n, _, c), p = self.size, self.ranks
        return (p - 1) * LATENCY + (p - 1) / p * 4 * n * c * SECONDS_PER_BYTE

    @property
    def expected(self) -> list[int]:
        """The bytes of each all-reduce, of the model."""
        return expected(self.size, self.call, self.cut) if self.ranks > 1 else []

    @property
    def held(self) -> bool:
        return not self.problem and not self.other and self.sizes == self.expected


def expected(size: tuple[int, int, int], call: str, cut: str) -> list[int]:
    """Return the bytes of each all-reduce, forward and then backward."""
    n, h, c = size
    by_classes = cut == "classes"
    forward = [4 * n, 48 * n] if by_classes else [24]
    backward = [4 * n * h] if by_classes else [4 * c * h]
    return forward + (backward if call == "linear_cross_entropy" else [])


def all_reduce(p: int, n: int) -> float:
    """Return the seconds of an all-reduce of n bytes among p ranks, of the model."""
    steps, b = math.ceil(math.log2(p)), SECONDS_PER_BYTE
    return min(
        2 * (p - 1) * LATENCY + 2 * (p - 1) / p * n * b,
        2 * steps * LATENCY + 2 * steps * n * b,
    )


# --------------------------------------------------------------------------- one rank


def counted(asked: dict[str, Any]) -> dict[str, Any]:
    """Return what rank 0 tells the others and how long it works, in this process."""
    torch = importlib.import_module("torch")
    dist = importlib.import_module("torch.distributed")
    fake = importlib.import_module("torch.testing._internal.distributed.fake_pg")
    tensor = importlib.import_module("torch.distributed.tensor")
    meshes = importlib.import_module("torch.distributed.device_mesh")
    clock = gpu.clock(places.open_backend("torch"), cpu_time=asked["cpu_time"])
    rows = []
    for p in asked["ranks"]:
        dist.init_process_group("fake", rank=0, world_size=p, store=fake.FakeStore())
        mesh = meshes.init_device_mesh("cpu", (p,))
        for call in CALLS:
            for cut in CUTS:
                step = _step(torch, tensor, mesh, tuple(asked["size"]), call, cut)
                seen: list[tuple[str, int]] = []
                with _watching(seen, tensor.DTensor):
                    step()
                sizes = [n for name, n in seen if name == "all_reduce"]
                other = [name for name, _ in seen if name != "all_reduce"]
                work = min(clock.seconds(step, 1) for _ in range(asked["rounds"]))
                rows.append([call, cut, p, sizes, other, work])
        dist.destroy_process_group()
    return {"rows": rows}


def _step(
    torch: Any, tensor: Any, mesh: Any, size: tuple[int, int, int], call: str, cut: str
) -> Any:
    """Return a call of the loss and its gradients, on the shards of rank 0."""
    n, h, c = size

    def shard(
        shape: tuple[int, ...], axis: int | None, integers: bool = False, scale: float = 1.0
    ) -> Any:
        p, local = mesh.size(), list(shape)
        if axis is not None:
            local[axis] = -(-shape[axis] // p)
        # Hidden entries of this size make logits of size 1. Of much larger ones a gradient is
        # full of subnormal numbers, with which a product takes twenty times as long.
        a = torch.zeros(local, dtype=torch.int64) if integers else torch.randn(local) * scale
        at = tensor.Replicate() if axis is None else tensor.Shard(axis)
        return tensor.DTensor.from_local(
            a, mesh, [at], run_check=False, shape=torch.Size(shape),
            stride=torch.empty(shape, device="meta").stride(),
        )  # fmt: skip

    by_classes = cut == "classes"
    rows = None if by_classes else 0
    labels = shard((n,), rows, integers=True)
    if call == "cross_entropy":
        inputs = [shard((n, c), 1 if by_classes else 0)]
    else:
        inputs = [shard((n, h), rows, scale=h**-0.5), shard((c, h), 0 if by_classes else None)]
    inputs = [a.requires_grad_() for a in inputs]
    function = getattr(ps, call)

    def step() -> None:
        loss = function(*inputs, labels, check_labels=False)  # which would miss other ranks' sums
        loss.backward()
        for a in inputs:
            a.grad = None

    return step


def _watching(seen: list[tuple[str, int]], DTensor: Any) -> Any:
    """Return a context that notes the name and the bytes of each collective."""
    modes = importlib.import_module("torch.utils._python_dispatch")

    class Watching(modes.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if any(issubclass(t, DTensor) for t in types):
                return NotImplemented  # which takes it apart first
            if any(argument.name == "group_name" for argument in func._schema.arguments):
                seen.append((func._opname.rstrip("_"), args[0].numel() * args[0].element_size()))
            return func(*args, **(kwargs or {}))

    return Watching()


def measure(
    size: tuple[int, int, int], ranks: tuple[int, ...], rounds: int, *, cpu_time: bool
) -> Iterator[Row]:
    """Yield a row for each number of ranks, call and cut."""
    asked = {"size": size, "ranks": ranks, "rounds": rounds, "cpu_time": cpu_time}
    found = memory.in_a_process("scale_cell", {"part": "ranks", **asked}, {})
    if "problem" in found:
        yield Row(size, "all", "any", 0, [], [], math.nan, found["problem"])
        return
    for row in found["rows"]:
        yield Row(size, *row)


# --------------------------------------------------------------------------- as text

HEADINGS = (
    "call", "cut", "ranks", "all-reduces", "bytes", "as modelled", "own work", "model: all-reduces",
    "model: gathered logits",
)  # fmt: skip
LEGEND = (
    "The all-reduces of one rank's loss and gradients and their bytes, counted; "
    "its own work, measured here. What is headed `model` was computed and not measured: an "
    f"all-reduce with {LATENCY * 1e6:.0f} us a message and {1e-9 / SECONDS_PER_BYTE:.0f} GB/s a "
    "rank, and the all-gather that would bring whole rows of logits to each rank."
)


def cells(rows: list[Row]) -> list[list[str]]:
    """Return the rows as text."""
    return [
        [
            row.call, row.cut, f"{row.ranks:,}", str(len(row.sizes)),
            row.problem or f"{sum(row.sizes):,}", "yes" if row.held else "NO",
            tables.duration(row.work_s), tables.duration(row.model_s),
            tables.duration(row.gather_s) if row.cut == "classes" else "",
        ]
        for row in rows
    ]  # fmt: skip
