"""``programs``: calls inside compiled programs of JAX, and calls with options, beside the peers.

Inside a program a call of compiled code is a wall for what XLA would fuse with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

import portable_softmax as ps
from bench import places, speed, tables, transforms
from bench.places import Place
from bench.transforms import Call, Row

PROGRAM, ALONE = 1.0, 0.9
HEADINGS = ("call", "arrays", "path", "time", "peer", "its time", "ratio", "goal", "")
LEGEND = (
    "Under jit, the fastest of several rounds in turns. The goals are those of Numba's kernels: "
    "1 inside a program, 0.9 alone."
)
_OURS = "numba rows"
Case: TypeAlias = tuple[Call, tuple[int, ...], tuple[np.ndarray, ...]]  # and the logits' shape


def measure(place: Place, *, quick: bool) -> Iterator[Row]:
    """Yield a row for each call and path."""
    effort = speed.QUICK if quick else speed.THOROUGH
    for call, shape, arrays in (*_programs(quick=quick), *_alone(quick=quick)):
        given = tuple(places.put(place, a) for a in arrays)
        row = Row(call.name, "random", "jit", shape, "")
        yield from transforms.compared(place, row, call, given, effort)


def goal(row: Row) -> float:
    """Return the ratio that Numba's kernels are to reach."""
    return PROGRAM if row.call.startswith("program") else ALONE


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def _labels(classes: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(classes, size=shape, dtype=np.int32)


def _programs(*, quick: bool) -> Iterator[Case]:
    import jax
    import optax

    def attend(softmax: Any) -> Any:
        return lambda x, scale, bias, v: softmax(x * scale + bias) @ v

    def learn(loss: Any) -> Any:
        return jax.grad(lambda W, h, b, t: loss(h @ W + b, t))

    def theirs(x: Any, t: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(x, t).mean()

    for n, c in ((64, 32),) if quick else ((4096, 512), (262_144, 16), (1024, 32_000)):
        call = Call(
            "program: softmax(x * scale + bias) @ v", "softmax", attend(ps.softmax),
            {"jax.nn": attend(jax.nn.softmax)},
        )  # fmt: skip
        yield call, (n, c), (_normal(n, c), _normal(c), _normal(c), _normal(c, 64))
        call = Call(
            "program: gradient of W in loss(h @ W + b)", "cross_entropy", learn(ps.cross_entropy),
            {"optax": learn(theirs)},
        )  # fmt: skip
        yield call, (n, c), (_normal(128, c) / 16, _normal(n, 128), _normal(c), _labels(c, n))


def _alone(*, quick: bool) -> Iterator[Case]:
    import jax
    import ml_dtypes
    import optax

    def call(name: str, ours: Any, peer: str, theirs: Any) -> Call:
        return Call(name, "", ours, {peer: theirs})

    def gradient(loss: Any) -> Any:
        return jax.value_and_grad(loss)

    def of_indices(axis: int) -> Any:
        given = optax.softmax_cross_entropy_with_integer_labels
        return lambda x, t: given(x, t, axis=axis).mean()

    image = (2, 3, 8, 8) if quick else (4, 21, 256, 256)
    x, t = _normal(*image), _labels(image[1], image[0], *image[2:])
    yield (
        call(
            "image, axis=1: softmax", lambda x: ps.softmax(x, axis=1),
            "jax.nn", lambda x: jax.nn.softmax(x, axis=1),
        ),
        x.shape, (x,),
    )  # fmt: skip
    yield (
        call(
            "image, axis=1: loss and gradient",
            gradient(lambda x, t: ps.cross_entropy(x, t, axis=1)), "optax", gradient(of_indices(1)),
        ),
        x.shape, (x, t),
    )  # fmt: skip
    side = 64 if quick else 4096
    half = _normal(side, side).astype(ml_dtypes.bfloat16)
    yield (
        call("bfloat16: loss and gradient", gradient(ps.cross_entropy), "optax",
             gradient(of_indices(-1))),
        half.shape, (half, _labels(side, side)),
    )  # fmt: skip
    n, c = (64, 32) if quick else (4096, 512)
    x, t = _normal(n, c), _labels(c, n)
    q = np.random.default_rng(0).dirichlet(np.ones(c), n).astype(np.float32)
    yield (
        call(
            "soft labels: loss and gradient", gradient(ps.cross_entropy), "optax",
            gradient(lambda x, q: optax.softmax_cross_entropy(x, q).mean()),
        ),
        x.shape, (x, q),
    )  # fmt: skip

    def smoothed(x: Any, t: Any) -> Any:
        q = optax.smooth_labels(jax.nn.one_hot(t, x.shape[-1]), 0.1)
        return optax.softmax_cross_entropy(x, q).mean()

    yield (
        call(
            "label smoothing: loss and gradient",
            gradient(lambda x, t: ps.cross_entropy(x, t, label_smoothing=0.1)), "optax",
            gradient(smoothed),
        ),
        x.shape, (x, t),
    )  # fmt: skip
    mask = np.random.default_rng(0).random((n, c)) < 0.7
    yield (
        call(
            "where: logsumexp", lambda x, mask: ps.logsumexp(x, axis=-1, where=mask), "jax.nn",
            lambda x, mask: jax.nn.logsumexp(x, axis=-1, where=mask),
        ),
        x.shape, (x, mask),
    )  # fmt: skip
    heads = _normal(*((2, 2, 16, 16) if quick else (8, 16, 256, 256)))
    yield (
        call(
            "causal: softmax", lambda x, seen: ps.softmax(x, where=seen), "jax.nn",
            lambda x, seen: jax.nn.softmax(x, where=seen),
        ),
        heads.shape, (heads, np.tril(np.ones(heads.shape[-2:], bool))),
    )  # fmt: skip


def cells(rows: list[Row]) -> list[list[str]]:
    """Return the rows as text."""
    return [
        [
            row.call, "x".join(map(str, row.shape)), row.path,
            row.problem or tables.duration(row.seconds), row.peer,
            tables.duration(row.peer_seconds), f"{row.ratio:.2f}",
            *((f"{goal(row):.2f}", "OVER" if row.ratio > goal(row) else "")
              if row.path == _OURS else ("", "")),
        ]
        for row in rows
    ]  # fmt: skip
