"""``scale``, first part: the loss of a linear layer, with its gradients.

Ours stands beside the three products that it cannot do without, in tiles as large as its own, and
beside what the libraries offer: the loss of stored logits, torch's chunks and a scan in JAX. The
libraries take turns in one process; the memory of each call is measured in a process of its own.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any, NamedTuple

import numpy as np

import portable_softmax as ps
from bench import gpu, memory, memory_cell, places, providers, speed, tables
from bench.errors import one_line
from bench.places import Place

LAYER, CLASSES = "2048x512", "8000,32000,128000,256000"  # positions and hidden entries
QUICK, QUICK_CLASSES = "64x16", "500,1000"

# What ours may allocate beyond the gradients: two tiles of logits and the scratch of its kernels.
CEILING = 160 * 10**6
TILE = 1 << 26  # bytes of logits: the default of ours, but in JAX
OURS, PRODUCTS, PEER = "ours", "products", "peer"


class Size(NamedTuple):
    """How large a layer is."""

    positions: int
    width: int
    classes: int

    @property
    def tile(self) -> int:
        """The positions of a tile of ours."""
        return max(1, min(self.positions, TILE // (4 * self.classes)))

    @property
    def gradients(self) -> int:
        """The bytes of both gradients."""
        return 4 * self.width * (self.positions + self.classes)


@dataclass
class Row:
    """One provider's time and memory for one layer."""

    size: Size
    provider: str
    library: str
    role: str
    """Ours, the bare products, or a peer."""
    problem: str = ""
    """Why it was not timed: a wrong result, or an exception."""
    clock: str = ""
    rounds: int = 0
    min_s: float = math.nan
    median_s: float = math.nan
    of_products: float = math.nan
    """The time in units of the bare products of the same library."""
    beyond_bytes: float = math.nan
    """The peak of memory beyond the inputs and the gradients."""

    def __post_init__(self) -> None:
        self.size = Size(*self.size)  # a list in JSON

    @property
    def held(self) -> bool:
        """Whether ours is right and within its memory; True of others."""
        return self.role != OURS or (not self.problem and self.beyond_bytes <= CEILING)


# --------------------------------------------------------------------------- whom it is beside


Arrays = tuple[Any, Any, Any]  # hidden, classifier, labels
Call = Callable[[], Any]  # returns the loss and both gradients; of bare products nothing is known


class Provider(NamedTuple):
    """One way to the loss and the gradients."""

    name: str
    library: str
    role: str
    make: Callable[[Place, Arrays, int], Call]
    """Given the place, the arrays and the positions of a tile."""


def _ours_in_numpy(place: Place, arrays: Arrays, tile: int) -> Call:
    def call() -> Any:
        loss, (d_hidden, d_classifier, _) = ps.linear_cross_entropy_value_and_grad(*arrays)
        return loss, d_hidden, d_classifier

    return call


def _stored_in_numpy(place: Place, arrays: Arrays, tile: int) -> Call:
    hidden, classifier, labels = arrays

    def call() -> Any:
        loss, g = ps.cross_entropy_value_and_grad(hidden @ classifier.T, labels)
        return loss, g @ classifier, g.T @ hidden

    return call


def _products(place: Place, arrays: Arrays, tile: int) -> Call:
    """Return the products in NumPy or torch."""
    xp, (hidden, classifier, _) = place.xp, arrays

    def call() -> Any:
        d_hidden, d_classifier = xp.empty_like(hidden), xp.empty_like(classifier)
        x = xp.empty((tile, len(classifier)), dtype=hidden.dtype)
        for i in range(0, len(hidden), tile):
            h = hidden[i : i + tile]
            xp.matmul(h, classifier.T, out=x[: len(h)])
            xp.matmul(x[: len(h)], classifier, out=d_hidden[i : i + tile])
            xp.matmul(x[: len(h)].T, h, out=d_classifier)
        return d_hidden, d_classifier

    return call


def _torch(loss_of: Callable[[Any, Any, Any, Any], Any]) -> Any:
    """Return a provider that torch differentiates."""

    def make(place: Place, arrays: Arrays, tile: int) -> Call:
        hidden, classifier = (a.requires_grad_() for a in arrays[:2])

        def call() -> Any:
            loss = loss_of(place.xp, hidden, classifier, arrays[2])
            return loss.detach(), *place.xp.autograd.grad(loss, (hidden, classifier))

        return call

    return make


def _stored_in_torch(torch: Any, hidden: Any, classifier: Any, labels: Any) -> Any:
    return torch.nn.functional.cross_entropy(hidden @ classifier.T, labels)


def _chunked_in_torch(torch: Any, hidden: Any, classifier: Any, labels: Any) -> Any:
    options = torch.nn.LinearCrossEntropyOptions()  # from torch 2.13 on
    function = torch.nn.functional.linear_cross_entropy
    return function(hidden, classifier, labels, options=options)


def _jax(loss_of: Callable[[Any, Any, Any, int], Any]) -> Any:
    """Return a provider that JAX differentiates and compiles."""

    def make(place: Place, arrays: Arrays, tile: int) -> Call:
        jax, (hidden, classifier, labels) = importlib.import_module("jax"), arrays
        function = jax.jit(jax.value_and_grad(lambda h, w, t: loss_of(h, w, t, tile), (0, 1)))

        def call() -> Any:
            loss, grads = function(hidden, classifier, labels)
            return loss, *grads

        return call

    return make


def _stored_in_jax(hidden: Any, classifier: Any, labels: Any, tile: int) -> Any:
    return _optax_losses(hidden @ classifier.T, labels).mean()


def _scanned_in_jax(hidden: Any, classifier: Any, labels: Any, tile: int) -> Any:
    """A scan whose tiles of logits are made again in the backward pass."""
    jax = importlib.import_module("jax")

    @jax.checkpoint
    def step(total: Any, part: Any) -> Any:
        h, t, live = part
        return total + (_optax_losses(h @ classifier.T, t) * live).sum(), None

    parts = _cut_in_jax(hidden, labels, tile)
    total, _ = jax.lax.scan(step, jax.numpy.zeros((), hidden.dtype), parts)
    return total / len(labels)


def _cut_in_jax(hidden: Any, labels: Any, tile: int) -> Any:
    """Return tiles of hidden vectors, of labels and of which are no filling."""
    jnp, n = importlib.import_module("jax.numpy"), len(labels)
    short = -n % tile
    found = []
    for a in (hidden, labels, jnp.ones(n, hidden.dtype)):
        a = jnp.pad(a, [(0, short)] + [(0, 0)] * (a.ndim - 1))
        found.append(a.reshape(-1, tile, *a.shape[1:]))
    return found


def _optax_losses(x: Any, labels: Any) -> Any:
    optax = importlib.import_module("optax")
    return optax.softmax_cross_entropy_with_integer_labels(x, labels)


def _products_in_jax(place: Place, arrays: Arrays, tile: int) -> Call:
    jax, (hidden, classifier, labels) = importlib.import_module("jax"), arrays

    @jax.jit
    def products(hidden: Any, classifier: Any) -> Any:
        def step(d_classifier: Any, part: Any) -> Any:
            x = part[0] @ classifier.T
            return d_classifier + x.T @ part[0], x @ classifier

        start = jax.numpy.zeros_like(classifier)
        return jax.lax.scan(step, start, _cut_in_jax(hidden, labels, tile))

    return lambda: products(hidden, classifier)


PROVIDERS = (
    Provider("products, numpy", "numpy", PRODUCTS, _products),
    Provider("ours, numpy", "numpy", OURS, _ours_in_numpy),
    Provider("ours stored, numpy", "numpy", PEER, _stored_in_numpy),
    Provider("products, torch", "torch", PRODUCTS, _products),
    Provider("ours, torch", "torch", OURS, _torch(lambda _, *a: ps.linear_cross_entropy(*a))),
    Provider("stored, torch", "torch", PEER, _torch(_stored_in_torch)),
    Provider("chunked, torch", "torch", PEER, _torch(_chunked_in_torch)),
    Provider("products, jax", "jax", PRODUCTS, _products_in_jax),
    Provider("ours, jax", "jax", OURS, _jax(lambda h, w, t, _: ps.linear_cross_entropy(h, w, t))),
    Provider("stored, jax", "jax", PEER, _jax(_stored_in_jax)),
    Provider("scanned, jax", "jax", PEER, _jax(_scanned_in_jax)),
)


# --------------------------------------------------------------------------- what is measured


class Problem:
    """A layer, and what its loss and some of its gradients are in float64."""

    def __init__(self, size: Size) -> None:
        rng, (n, h, c) = np.random.default_rng(0), size
        self.size = size
        self.hidden = rng.standard_normal((n, h), np.float32)
        self.classifier = rng.standard_normal((c, h), np.float32) / np.float32(math.sqrt(h))
        self.labels = rng.integers(c, size=n)

    def call(self, provider: Provider, place: Place) -> Call:
        hidden, classifier, labels = (
            places.put(place, a) for a in (self.hidden, self.classifier, self.labels)
        )
        return provider.make(place, (hidden, classifier, labels), self.size.tile)

    @cached_property
    def expected(self) -> tuple[Any, Any, Any]:
        """The loss, and the gradients of the first position and of the first class."""
        hidden, classifier = self.hidden.astype(np.float64), self.classifier.astype(np.float64)
        n, tile = self.size.positions, self.size.tile
        loss, d_hidden, d_classifier = 0.0, None, 0.0
        for i in range(0, n, tile):
            h, t = hidden[i : i + tile], self.labels[i : i + tile]
            x = h @ classifier.T
            p = np.exp(x - x.max(axis=1, keepdims=True))
            total = p.sum(axis=1, keepdims=True)
            at_label = np.arange(len(t)), t
            loss -= np.log(p[at_label] / total[:, 0]).sum() / n
            p /= total * n
            p[at_label] -= 1 / n
            d_hidden = p[0] @ classifier if d_hidden is None else d_hidden
            d_classifier = d_classifier + p[:, 0] @ h
        return loss, d_hidden, d_classifier

    def wrong(self, place: Place, result: Any) -> str:
        """Return what is wrong with a result; empty if nothing is."""
        loss, d_hidden, d_classifier = (places.get(place, a) for a in result)
        found = {"loss": loss, "d_hidden": d_hidden[0], "d_classifier": d_classifier[0]}
        for (name, a), e in zip(found.items(), self.expected, strict=True):
            if not np.allclose(a, e, rtol=1e-4, atol=1e-4 * np.abs(e).max()):
                return f"wrong {name}"
        return ""


def measure(sizes: list[Size], effort: speed.Effort, *, cpu_time: bool) -> Iterator[Row]:
    """Yield a row for each layer and provider."""
    peaks: dict[str, list[Any]] = {}
    for library in dict.fromkeys(one.library for one in PROVIDERS):
        asked = {"part": "linear", "library": library, "sizes": sizes}
        found = memory.in_a_process("scale_cell", asked, memory.GIVEN_BACK)
        nothing = {"problem": found.get("problem")}
        some = [one.name for one in PROVIDERS if one.library == library]
        peaks |= {name: found.get(name) or [nothing] * len(sizes) for name in some}
    for i, size in enumerate(sizes):
        rows = {one.name: Row(size, one.name, one.library, one.role) for one in PROVIDERS}
        for name, row in rows.items():
            row.problem = peaks[name][i].get("problem", "")
            row.beyond_bytes = peaks[name][i].get("peak_bytes", math.nan) - size.gradients
        _time(Problem(size), rows, effort, cpu_time)
        products = {row.library: row.min_s for row in rows.values() if row.role == PRODUCTS}
        for row in rows.values():
            row.of_products = row.min_s / products[row.library]
            yield row


def _time(problem: Problem, rows: dict[str, Row], effort: speed.Effort, cpu_time: bool) -> None:
    turns = {}
    for provider in PROVIDERS:
        place, row = places.open_backend(provider.library), rows[provider.name]
        if row.problem:
            continue
        call = problem.call(provider, place)
        result = call()
        row.problem = "" if row.role == PRODUCTS else problem.wrong(place, result)
        if not row.problem:
            clock = gpu.clock(place, cpu_time=cpu_time)
            turns[provider.name] = speed.Timed(call, clock, providers.nullcontext)
    for name, times in speed.interleaved(turns, effort).items():
        row = rows[name]
        row.clock, row.rounds = turns[name].clock.name, len(times)
        row.min_s, row.median_s = min(times), median(times)


def peaks(asked: dict[str, Any]) -> dict[str, Any]:
    """Return the peaks of a library's calls beyond the memory before, in this process."""
    place = places.open_backend(asked["library"])
    some = [one for one in PROVIDERS if one.library == asked["library"]]
    found: dict[str, list[Any]] = {one.name: [] for one in some}
    for size in asked["sizes"]:
        problem = Problem(Size(*size))
        for one in some:
            found[one.name].append(_peak(problem, one, place))
    return found


def _peak(problem: Problem, provider: Provider, place: Place) -> dict[str, Any]:
    finish, gauge = (lambda r: places.finish(place, r)), memory_cell.gauge(place)
    try:
        call = problem.call(provider, place)
        return {"peak_bytes": memory_cell.peak_of(call, finish, gauge, repeats=1)}
    except Exception as error:  # each library raises its own where it cannot
        return {"problem": one_line(error)}


# --------------------------------------------------------------------------- as text

HEADINGS = ("classes", "provider", "min", "median", "/ products", "beyond", "held")
LEGEND = (
    "The time of the loss and both gradients, the fastest of several rounds in turns, and the same "
    "in units of the bare products of the same library, in tiles of the same size. `beyond` is "
    "the peak of memory beyond inputs and gradients; ours may take 160 MB at any number of classes."
)


def cells(rows: list[Row]) -> list[list[str]]:
    """Return the rows as text."""
    return [
        [
            f"{row.size.classes:,}", row.provider,
            row.problem or tables.duration(row.min_s),
            "" if row.problem else tables.duration(row.median_s),
            "" if row.problem else f"{row.of_products:.2f}",
            "" if row.problem else f"{row.beyond_bytes / 1e6:.0f} MB",
            "" if row.role != OURS else "yes" if row.held else "NO",
        ]
        for row in rows
    ]  # fmt: skip
