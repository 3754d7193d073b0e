"""``options``: what an option costs, beside the plain call and beside the form by hand in NumPy.

The three work on the same arrays in turns. A result that is not that of the form by hand is named
instead of timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

import portable_softmax as ps
from bench import tables
from portable_softmax import kernels

HEADINGS = ("call", "array", "dtype", "time", "/ plain", "/ by hand", "path")
LEGEND = (
    "The fastest of several rounds, in turns. `/ plain` is the time in units of the same call "
    "without the option, and `/ by hand` in units of the form in NumPy's own operations."
)
DTYPES = "float32,float64"


@dataclass
class Row:
    """One call with an option."""

    call: str
    shape: tuple[int, ...]
    dtype: str
    seconds: float
    plain: float
    """The seconds of the call without the option."""
    by_hand: float
    path: str
    problem: str = ""


class _Call(NamedTuple):
    operation: str
    arrays: tuple[Any, ...]
    options: dict[str, Any]
    plain: tuple[Any, ...]
    """The arrays of the call without the option."""
    by_hand: Callable[[], Any]


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


def _calls(dtype: str, quick: bool) -> Iterator[tuple[str, _Call]]:
    rng = np.random.default_rng(0)
    n, c = (64, 32) if quick else (4096, 512)
    x = rng.standard_normal((n, c)).astype(dtype)
    labels, t = rng.integers(c, size=n), rng.dirichlet(np.ones(c), n).astype(dtype)
    mask, samples = rng.random((n, c)) < 0.7, rng.uniform(0.5, 2.0, n)
    one_hot = np.arange(c) == labels[:, None]
    mask |= one_hot
    one_hot = one_hot.astype(dtype)
    for operation in ("softmax", "log_softmax"):
        given = (x,), {"where": mask}, (x,)
        by_hand = lambda: _softmax(x, -1, mask)  # noqa: E731
        if operation == "log_softmax":
            by_hand = lambda: np.log(_softmax(x, -1, mask))  # noqa: E731
        yield f"{operation}, where", _Call(operation, *given, by_hand)
    yield (
        "logsumexp, where",
        _Call("logsumexp", (x,), {"where": mask, "axis": -1}, (x,), lambda: _logsumexp(x, mask)),
    )
    heads = rng.standard_normal((2, 2, 16, 16) if quick else (8, 16, 256, 256)).astype(dtype)
    causal = np.tril(np.ones(heads.shape[-2:], bool))
    yield (
        "softmax, causal",
        _Call(
            "softmax", (heads,), {"where": causal}, (heads,), lambda: _softmax(heads, -1, causal)
        ),
    )
    gradient, plain = "cross_entropy_value_and_grad", (x, labels)
    for name, arrays, options, by_hand in (
        ("where", plain, {"where": mask}, lambda: _loss(x, one_hot, mask=mask)),
        ("probabilities", (x, t), {}, lambda: _loss(x, t)),
        ("sample_weight", plain, {"sample_weight": samples}, lambda: _loss(x, one_hot, samples)),
        ("softcap", plain, {"softcap": 30.0}, lambda: _capped_loss(x, one_hot, 30.0)),
    ):
        yield f"loss and gradient, {name}", _Call(gradient, arrays, options, plain, by_hand)
    few = rng.standard_normal((100 if quick else 100_000, 3)).astype(dtype)
    named = rng.integers(3, size=len(few))
    targets = np.eye(3, dtype=dtype)[named]
    yield (
        "loss and gradient, 3 classes",
        _Call(gradient, (few, named), {}, (few, named), lambda: _loss(few, targets)),
    )


def measure(dtypes: list[str], *, quick: bool) -> Iterator[Row]:
    """Yield a row for each call and dtype."""
    for dtype in dtypes:
        for name, call in _calls(dtype, quick):
            yield _measured(name, call, dtype, rounds=2 if quick else 30)


def _measured(name: str, call: _Call, dtype: str, rounds: int) -> Row:
    function = getattr(ps, call.operation)
    axis = {"axis": -1} if call.operation == "logsumexp" else {}
    ways = (
        lambda: function(*call.arrays, **call.options),
        lambda: function(*call.plain, **axis),
        call.by_hand,
    )
    x = call.arrays[0]
    path = kernels.explain(call.operation, *call.arrays, **call.options).partition(":")[0]
    row = Row(name, x.shape, dtype, math.nan, math.nan, math.nan, path)
    seconds = [math.inf] * 3
    with np.errstate(all="ignore"):
        if not _alike(ways[0](), ways[2]()):
            row.problem = "wrong result"
            return row
        order = list(range(3))
        for _ in range(rounds):
            for i in order:
                started = perf_counter()
                ways[i]()
                seconds[i] = min(seconds[i], perf_counter() - started)
            order.reverse()  # else one of them always finds what the form by hand has left in cache
    row.seconds, row.plain, row.by_hand = seconds
    return row


def _alike(ours: Any, theirs: Any) -> bool:
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
    return all(np.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in pairs)


def cells(rows: list[Row]) -> list[list[str]]:
    """Return the rows as text."""
    return [
        [
            row.call, "x".join(map(str, row.shape)), row.dtype,
            row.problem or tables.duration(row.seconds),
            f"{row.seconds / row.plain:.2f}", f"{row.seconds / row.by_hand:.2f}", row.path,
        ]
        for row in rows
    ]  # fmt: skip
