"""``calls``: calls that people make, each beside what they would use instead, with a goal.

Options beside the plain call and the form by hand, soft labels, half types, images, few classes,
layouts, rows that are not random, and answers in place. The two work in turns. A result that
differs from that of the other is named instead of timed.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, TypeAlias

import numpy as np

import portable_softmax as ps
from bench import copies, tables
from bench.goals import Compared
from portable_softmax import kernels

HEADINGS = ("call", "arrays", "time", "beside", "its time", "ratio", "goal", "", "path")
LEGEND = (
    "The fastest of several rounds, in turns. `ratio` is the time in units of that beside it: "
    "the plain call is the same one without the option, on random logits."
)
OPTION, SINK, BY_HAND, LAYOUT, ROWS = 1.5, 1.3, 0.6, 0.9, 1.15
GRADIENT = "cross_entropy_value_and_grad"
ROUNDS = 40


@dataclass
class Row(Compared):
    """One call beside another."""

    call: str
    library: str
    shape: tuple[int, ...]
    dtype: str
    beside: str
    goal: float
    path: str
    seconds: float = math.nan
    other_seconds: float = math.nan
    problem: str = ""


class Ours(NamedTuple):
    """A call of this package."""

    name: str
    operation: str
    arrays: tuple[Any, ...]
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed
    values: Any = None
    """What is put in the first array before each call, where several calls share its memory."""

    def prepare(self) -> None:
        if self.values is not None:
            self.arrays[0][...] = self.values

    def __call__(self) -> Any:
        return getattr(ps, self.operation)(*self.arrays, **self.options)


class Through(NamedTuple):
    """A call of this package and what autograd does after it."""

    name: str
    logits: Any
    call: Callable[[], Any]

    @property
    def arrays(self) -> tuple[Any, ...]:
        return (self.logits,)

    def prepare(self) -> None:
        """Nothing is to be done."""

    def __call__(self) -> Any:
        return self.call()


class Other(NamedTuple):
    """What a call stands beside."""

    name: str
    call: Callable[[], Any]
    goal: float
    same: bool = True
    """Whether it has the same result."""


Case: TypeAlias = tuple[Any, ...]  # a call, and what it stands beside


# --------------------------------------------------------------------------- NumPy


def _beside_sink(x: Any, sink: Any) -> Any:
    m = np.maximum(x.max(axis=-1, keepdims=True), sink)
    e = np.exp(x - m)
    return e / (e.sum(axis=-1, keepdims=True) + np.exp(sink - m))


def _softmax(x: Any, axis: int, mask: Any) -> Any:
    x = np.where(mask, x, -np.inf)
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def _logsumexp(x: Any, mask: Any) -> Any:
    x = np.where(mask, x, -np.inf)
    m = x.max(axis=-1)
    return m + np.log(np.exp(x - m[:, None]).sum(axis=-1))


def _loss(x: Any, q: Any, samples: Any = None, mask: Any = None) -> tuple[Any, Any]:
    """Return the mean loss of distributions, and its gradient."""
    if mask is not None:
        x = np.where(mask, x, -np.inf)
    d = x - x.max(axis=-1, keepdims=True)
    e = np.exp(d)
    s = e.sum(axis=-1, keepdims=True)
    terms = np.where(q == 0, 0, q * (d - np.log(s)))
    w = np.ones((len(x), 1), x.dtype) if samples is None else samples[:, None].astype(x.dtype)
    w /= w.sum()
    return -(w * terms.sum(axis=-1, keepdims=True)).sum(), w * (e / s - q)


def _capped_loss(x: Any, q: Any, cap: float) -> tuple[Any, Any]:
    t = np.tanh(x / cap)
    loss, grad = _loss(cap * t, q)
    return loss, grad * (1 - t * t)


def _with_options(dtype: str, *, quick: bool) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    n, c = (64, 32) if quick else (4096, 512)
    x = rng.standard_normal((n, c)).astype(dtype)
    labels, t = rng.integers(c, size=n), rng.dirichlet(np.ones(c), n).astype(dtype)
    mask, samples = rng.random((n, c)) < 0.7, rng.uniform(0.5, 2.0, n)
    one_hot = np.arange(c) == labels[:, None]
    mask |= one_hot
    one_hot = one_hot.astype(dtype)
    heads = rng.standard_normal((2, 2, 16, 16) if quick else (8, 16, 256, 256)).astype(dtype)
    causal = np.tril(np.ones(heads.shape[-2:], bool))
    sink = rng.standard_normal((heads.shape[1], 1, 1)).astype(dtype)
    last = {"axis": -1}
    named = x, labels
    for name, operation, arrays, options, plain, by_hand in (
        ("where", "softmax", (x,), {"where": mask}, (x,), lambda: _softmax(x, -1, mask)),
        (
            "where", "log_softmax", (x,), {"where": mask}, (x,),
            lambda: np.log(_softmax(x, -1, mask)),
        ),
        ("where", "logsumexp", (x,), {"where": mask}, (x,), lambda: _logsumexp(x, mask)),
        ("causal", "softmax", (heads,), {"where": causal}, (heads,),
         lambda: _softmax(heads, -1, causal)),
        ("sink", "softmax", (x,), {"sink": 0.5}, (x,), lambda: _beside_sink(x, x.dtype.type(0.5))),
        ("sink of each head", "softmax", (heads,), {"sink": sink}, (heads,),
         lambda: _beside_sink(heads, sink)),
        ("sink of each head", "log_softmax", (heads,), {"sink": sink}, (heads,),
         lambda: np.log(_beside_sink(heads, sink))),
        ("where", GRADIENT, named, {"where": mask}, named, lambda: _loss(x, one_hot, mask=mask)),
        ("probabilities", GRADIENT, (x, t), {}, named, lambda: _loss(x, t)),
        ("sample_weight", GRADIENT, named, {"sample_weight": samples}, named,
         lambda: _loss(x, one_hot, samples)),
        ("softcap", GRADIENT, named, {"softcap": 30.0}, named,
         lambda: _capped_loss(x, one_hot, 30.0)),
    ):  # fmt: skip
        goal = 1.8 if name == "probabilities" else SINK if "sink" in name else OPTION
        yield (
            Ours(f"{operation}, {name}", operation, arrays, last | options),
            Other("plain", Ours("", operation, plain, last), goal, same=False),
            Other("by hand", by_hand, BY_HAND),
        )


def _rows(dtype: str, *, quick: bool) -> Iterator[Case]:
    """Rows that are confident, masked by -inf, and some of each among random ones.

    All in the same memory: where an array lies may make more of a difference.
    """
    for shape in ((64, 32),) if quick else ((4096, 256), (4096, 512), (1024, 32_000)):
        rng = np.random.default_rng(0)
        random = rng.standard_normal(shape).astype(dtype)
        labels = rng.integers(shape[1], size=shape[0])
        right = np.arange(shape[1]) == labels[:, None]
        left_out = (rng.random(shape) < 0.5) & ~right
        third = rng.integers(3, size=(shape[0], 1))
        kinds = {"confident": random + 25 * right, "masked": np.where(left_out, -np.inf, random)}
        kinds["mixed"] = np.choose(third, [random, *kinds.values()])
        x = np.empty_like(random)
        for name, values in kinds.items():
            for operation in ("softmax", "logsumexp", "cross_entropy", GRADIENT):
                takes = (labels,) if "cross_entropy" in operation else ()
                options = {"axis": -1}
                plain = Ours("", operation, (x, *takes), options, random)
                yield (
                    Ours(f"{operation}, {name}", operation, (x, *takes), options, values),
                    Other("plain", plain, ROWS, same=False),
                )


def _layouts(*, quick: bool) -> Iterator[Case]:
    if not importlib.util.find_spec("scipy"):
        return
    from scipy import special

    rng = np.random.default_rng(0)
    shape = (64, 32) if quick else (4096, 512)
    large = rng.standard_normal(shape)
    for name, x, goal in (
        ("Fortran order", np.asfortranarray(large, np.float32), LAYOUT),
        ("Fortran order", np.asfortranarray(large), LAYOUT),
        ("integers", rng.integers(-9, 9, size=(64, 64)), 1.1),
        ("strided", rng.standard_normal((400, 60))[::2, ::2], LAYOUT),
    ):
        for operation in ("softmax", "log_softmax", "logsumexp"):
            theirs = partial(getattr(special, operation), x, axis=-1)
            yield (
                Ours(f"{operation}, {name}", operation, (x,), {"axis": -1}),
                Other("scipy.special", theirs, goal),
            )


def _weighted(dtype: str, *, quick: bool) -> Iterator[Case]:
    """Sums with weights, of one sign and of both."""
    if not importlib.util.find_spec("scipy"):
        return
    from scipy import special

    rng = np.random.default_rng(0)
    for shape in ((64, 32),) if quick else ((4096, 512), (8, 16, 256, 256), (32, 10)):
        x, b = rng.standard_normal(shape).astype(dtype), rng.uniform(0.5, 1.5, shape).astype(dtype)
        signed = b * np.where(rng.random(shape) < 0.3, x.dtype.type(-1), x.dtype.type(1))
        for name, options in (("b", {"b": b}), ("sign", {"b": signed, "return_sign": True})):
            given = {"axis": -1, **options}
            yield (
                Ours(f"logsumexp, {name}", "logsumexp", (x,), given),
                Other("scipy.special", partial(special.logsumexp, x, **given), BY_HAND),
            )


def _few_classes(dtype: str, *, quick: bool) -> Iterator[Case]:
    if not importlib.util.find_spec("sklearn"):
        return
    from sklearn._loss.loss import HalfMultinomialLoss

    rng = np.random.default_rng(0)
    for n, c in ((100, 3),) if quick else ((100_000, 2), (100_000, 3), (1000, 3)):
        x = rng.standard_normal((n, c)).astype(dtype)
        labels = rng.integers(c, size=n)
        theirs = partial(
            HalfMultinomialLoss(n_classes=c).loss_gradient, y_true=labels.astype(dtype),
            raw_prediction=x, n_threads=copies.cores(),
        )  # fmt: skip
        yield (
            Ours("few classes", GRADIENT, (x, labels), {"reduction": "none"}),
            Other("scikit-learn", theirs, LAYOUT),
        )


def _in_place(dtype: str, *, quick: bool) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    n, c = (64, 32) if quick else (4096, 4096)
    x, out = rng.standard_normal((n, c)).astype(dtype), np.zeros((n, c), dtype)
    labels = rng.integers(c, size=n)
    for operation, arrays, option in (
        ("softmax", (x,), "out"),
        ("log_softmax", (x,), "out"),
        (GRADIENT, (x, labels), "grad_out"),
    ):
        plain = Ours("", operation, arrays)
        # Less than 1 by what new memory costs on a machine.
        yield (
            Ours(f"{operation}, {option}", operation, arrays, {option: out}),
            Other("plain", plain, 1.0),
        )


# --------------------------------------------------------------------------- torch


def _backward(torch: Any, loss: Callable[..., Any], x: Any, *rest: Any) -> tuple[Any, Any]:
    x = x.detach().requires_grad_()
    value = loss(x, *rest)
    return value.detach(), torch.autograd.grad(value, x)[0]


def _slopes(torch: Any, function: Callable[..., Any], dy: Any, *given: Any) -> tuple[Any, ...]:
    given = tuple(t.detach().requires_grad_() for t in given)
    y = function(*given)
    return (y.detach(), *torch.autograd.grad(y, given, dy))


def _options_of_torch(*, quick: bool) -> Iterator[Case]:
    """Sinks that are learned, and weights."""
    if not importlib.util.find_spec("torch"):
        return
    import torch

    random = torch.Generator().manual_seed(0)
    heads = torch.randn((2, 2, 16, 16) if quick else (8, 16, 256, 256), generator=random)
    sink = torch.randn((heads.shape[1], 1, 1), generator=random)
    dy = torch.randn(heads.shape, generator=random)

    def joined(x: Any, sink: Any) -> Any:
        both = torch.cat([x, sink.expand(*x.shape[:-1], 1)], -1)
        return both.softmax(-1)[..., :-1]

    def ours(x: Any, sink: Any) -> Any:
        return ps.softmax(x, sink=sink)

    slopes = partial(_slopes, torch)
    yield (
        Ours("softmax, sink of each head", "softmax", (heads,), {"sink": sink}),
        Other("torch, joined", lambda: joined(heads, sink), BY_HAND),
    )
    yield (
        Through("softmax, sink, backward", heads, partial(slopes, ours, dy, heads, sink)),
        Other("torch, joined", partial(slopes, joined, dy, heads, sink), BY_HAND),
    )
    n, c = (64, 32) if quick else (4096, 512)
    x, b = torch.randn((n, c), generator=random), torch.rand((n, c), generator=random) + 0.5
    up = torch.randn(n, generator=random)

    def by_hand(x: Any, b: Any) -> Any:
        m = x.detach().amax(-1, keepdim=True)
        return m[..., 0] + (b * (x - m).exp()).sum(-1).log()

    def weighted(x: Any, b: Any) -> Any:
        return ps.logsumexp(x, axis=-1, b=b)

    yield (
        Ours("logsumexp, b", "logsumexp", (x,), {"axis": -1, "b": b}),
        Other("torch by hand", lambda: by_hand(x, b), BY_HAND),
    )
    yield (
        Through("logsumexp, b, backward", x, partial(slopes, weighted, up, x, b)),
        Other("torch by hand", partial(slopes, by_hand, up, x, b), LAYOUT),
    )


def _of_torch(*, quick: bool) -> Iterator[Case]:
    if not importlib.util.find_spec("torch"):
        return
    import torch
    from torch.nn import functional

    random = torch.Generator().manual_seed(0)
    n, c = (64, 32) if quick else (4096, 512)
    x, t = (torch.randn((n, c), generator=random) for _ in range(2))
    t = t.softmax(-1)
    backward = partial(_backward, torch)
    yield (
        Through("soft labels, backward", x, partial(backward, ps.cross_entropy, x, t)),
        Other("torch", partial(backward, functional.cross_entropy, x, t), BY_HAND),
    )
    heads = torch.randn((2, 2, 16, 16) if quick else (8, 16, 256, 256), generator=random)
    seen = torch.ones(heads.shape[-2:], dtype=torch.bool).tril()
    yield (
        Ours("softmax, causal", "softmax", (heads,), {"where": seen}),
        Other("torch", lambda: heads.masked_fill(~seen, -torch.inf).softmax(-1), BY_HAND),
    )
    side = 64 if quick else 4096
    logits = torch.randn((side, side), generator=random)
    labels = torch.randint(side, (side,), generator=random)
    for dtype in (torch.bfloat16, torch.float16):
        half = logits.to(dtype)
        ours = partial(backward, ps.cross_entropy, half, labels)
        yield (
            Through("loss, backward", half, ours),
            Other("torch", partial(backward, functional.cross_entropy, half, labels), BY_HAND),
        )
    image = torch.randn((1, 3, 8, 8) if quick else (4, 21, 256, 256), generator=random)
    classes = torch.randint(image.shape[1], (len(image), *image.shape[2:]), generator=random)
    classes[classes == 0] = 255
    yield (
        Ours("softmax, image", "softmax", (image,), {"axis": 1}),
        Other("torch", lambda: image.softmax(1), LAYOUT),
    )
    ignoring = {"ignore_index": 255}
    yield (
        Ours("loss, image", "cross_entropy", (image, classes), {"axis": 1, **ignoring}),
        Other("torch", lambda: functional.cross_entropy(image, classes, **ignoring), LAYOUT),
    )


# --------------------------------------------------------------------------- all


def cases(*, quick: bool) -> Iterator[Case]:
    """Yield each call, and what it stands beside."""
    for dtype in ("float32", "float64"):
        for part in (_with_options, _weighted, _rows, _few_classes, _in_place):
            yield from part(dtype, quick=quick)
    yield from _layouts(quick=quick)
    yield from _options_of_torch(quick=quick)
    yield from _of_torch(quick=quick)


def measure(*, quick: bool) -> Iterator[Row]:
    """Yield a row for each call and what it stands beside."""
    for ours, *others in cases(quick=quick):
        yield from _measured(ours, others, rounds=2 if quick else ROUNDS)


def _measured(ours: Any, others: list[Other], rounds: int) -> list[Row]:
    x = ours.arrays[0]
    path = "autograd"
    if isinstance(ours, Ours):
        path = kernels.explain(ours.operation, *ours.arrays, **ours.options).partition(":")[0]
    library, dtype = type(x).__module__.partition(".")[0], str(x.dtype).rpartition(".")[2]
    rows = [
        Row(ours.name, library, tuple(x.shape), dtype, other.name, other.goal, path)
        for other in others
    ]
    ways = [ours, *(other.call for other in others)]
    seconds = [math.inf] * len(ways)
    with np.errstate(all="ignore"):
        found = [way() for way in ways]
        for row, other, theirs in zip(rows, others, found[1:], strict=True):
            if other.same and not _alike(found[0], theirs, dtype):
                row.problem = "wrong result"
        del found
        order = list(range(len(ways)))
        for _ in range(rounds):
            for i in order:
                if hasattr(ways[i], "prepare"):
                    ways[i].prepare()
                started = perf_counter()
                ways[i]()
                seconds[i] = min(seconds[i], perf_counter() - started)
            order.reverse()  # else one of them always finds what the form by hand has left in cache
    for row, other_seconds in zip(rows, seconds[1:], strict=True):
        row.seconds, row.other_seconds = seconds[0], other_seconds
    return rows


def _alike(ours: Any, theirs: Any, dtype: str) -> bool:
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
    rtol = {"float16": 5e-3, "bfloat16": 5e-2}.get(dtype, 1e-3)
    return all(np.allclose(_array(a), _array(b), rtol=rtol, atol=1e-5) for a, b in pairs)


def _array(x: Any) -> np.ndarray:
    if "torch" in sys.modules and isinstance(x, sys.modules["torch"].Tensor):
        x = x.detach().double()
    return np.asarray(x)


def cells(rows: list[Row]) -> list[list[str]]:
    """Return the rows as text."""
    return [
        [
            row.call, f"{row.library} {row.dtype} {'x'.join(map(str, row.shape))}",
            row.problem or tables.duration(row.seconds), row.beside,
            tables.duration(row.other_seconds), f"{row.ratio:.2f}", f"{row.goal:.2f}",
            "OVER" if row.missed else "", row.path,
        ]
        for row in rows
    ]  # fmt: skip
