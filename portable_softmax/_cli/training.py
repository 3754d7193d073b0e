"""Multinomial logistic regression by mini-batch gradient descent, the same on every backend."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from portable_softmax import SoftmaxWithLoss, cross_entropy, softmax
from portable_softmax._cli.backends import Place
from portable_softmax._cli.digits import Split

BATCH = 64
RATE = 1.0


class Epoch(NamedTuple):
    """How well the classifier does after an epoch, counted from 1."""

    number: int
    train_loss: float
    train_accuracy: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Training:
    """What a training leaves behind, as NumPy arrays."""

    place: Place
    W: NDArray[np.float32]
    b: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    """Of the held-out digits, (n, 10)."""
    epochs: tuple[Epoch, ...]
    seconds: float


def gradients(xp: Any, W: Any, b: Any, x: Any, t: Any) -> tuple[Any, Any]:
    """Return dL/dW and dL/db of the mean loss L on a batch ``x`` with labels ``t``, by hand.

    The logits are x W + b, and ``SoftmaxWithLoss.backward`` returns dL/dlogits. The chain rule
    then gives dL/dW = x^T dL/dlogits and, b being added to each row, dL/db = the sum of the rows
    of dL/dlogits.
    """
    layer = SoftmaxWithLoss[Any]()
    layer.forward(x @ W + b, t)
    dlogits = layer.backward()
    return x.T @ dlogits, xp.sum(dlogits, axis=0)


def train(
    place: Place,
    data: Split,
    *,
    epochs: int,
    rng: np.random.Generator,
    on_epoch: Callable[[Epoch], object] = lambda epoch: None,
) -> Training:
    """Train on `place`; first weights and batches come from `rng`, so are NumPy's everywhere."""
    xp = place.xp

    @place.compile
    def step(W: Any, b: Any, x: Any, t: Any, batch: Any) -> tuple[Any, Any]:
        """Go downhill once."""
        dW, db = gradients(xp, W, b, xp.take(x, batch, axis=0), xp.take(t, batch, axis=0))
        return W - RATE * dW, b - RATE * db

    @place.compile
    def judge(W: Any, b: Any, x: Any, t: Any) -> tuple[Any, Any]:
        """Return the mean loss and how many are right."""
        logits = x @ W + b
        return cross_entropy(logits, t), xp.sum(xp.astype(xp.argmax(logits, axis=1) == t, t.dtype))

    x, t, held_out_x, held_out_t = (place.put(part) for part in data)
    learnt, held_out = len(data.train_t), len(data.held_out_t)
    shape = data.train_x.shape[1], int(data.train_t.max()) + 1
    W = place.put(rng.normal(scale=0.01, size=shape).astype(np.float32))
    b = place.put(np.zeros(shape[1], np.float32))
    history = []
    start = time.perf_counter()
    for number in range(1, epochs + 1):
        order = rng.permutation(learnt)
        for first in range(0, learnt, BATCH):
            W, b = step(W, b, x, t, place.put(order[first : first + BATCH]))
        train_loss, train_right = judge(W, b, x, t)
        loss, right = judge(W, b, held_out_x, held_out_t)
        history.append(
            Epoch(
                number=number,
                train_loss=float(train_loss),
                train_accuracy=int(train_right) / learnt,
                loss=float(loss),
                accuracy=int(right) / held_out,
            )
        )
        on_epoch(history[-1])
    seconds = time.perf_counter() - start
    return Training(
        place=place,
        W=place.get(W),
        b=place.get(b),
        probabilities=place.get(softmax(held_out_x @ W + b)),
        epochs=tuple(history),
        seconds=seconds,
    )
