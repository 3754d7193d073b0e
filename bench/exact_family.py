"""Exact answers of the rest of the family, by mpmath from the definitions, and what is allowed.

A function of a row gives its answers as mpf's and, for each, how far off an answer may be beside
its bound in units in the last place: what an error of one rounding in a threshold or a logit moves
it by, in units of the roundoff u that is computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from mpmath import mp, mpf

from bench.peers import FOCAL_GAMMA

DIGITS = 60  # a margin of 100 is 44 of them
Row = Sequence[Any]


class Answer(NamedTuple):
    """The exact values of a row, and in units of u what is allowed where that is more."""

    values: list[Any]
    allowed: list[Any]


class Rule(NamedTuple):
    """How a function is judged."""

    exact: Callable[..., Answer]
    bound: Callable[[Row], float]
    """In units in the last place, for a row."""


def row_of(values: np.ndarray) -> list[Any]:
    return [mpf(float(v)) for v in values]


def wide(values: Row) -> np.ndarray:
    """Return mpf's as long doubles: in two parts that a float holds."""
    highs = [float(v) for v in values]
    lows = [float(v - mpf(high)) for v, high in zip(values, highs, strict=True)]
    return np.asarray(highs, np.longdouble) + np.asarray(lows, np.longdouble)


def _alone(values: list[Any]) -> Answer:
    return Answer(values, [mpf(0)] * len(values))


def _logs(row: Row) -> list[Any]:
    normaliser = mp.log(mp.fsum(mp.exp(v) for v in row))
    return [v - normaliser for v in row]


# --------------------------------------------------------------------------- probabilities


def with_sink(row: Row, _: Any) -> Answer:
    return _alone([mp.exp(v) for v in _logs([*row, mpf(0)])[:-1]])


def sparse(row: Row, alpha: float) -> list[Any]:
    """Return entmax of a row, by Newton's method: the sum is convex in the threshold."""
    c = mpf(alpha) - 1
    top = max(row)
    near = [z for v in row if (z := c * (v - top)) > -1]
    tau = mpf(-1)
    for _ in range(200):
        inside = [z - tau for z in near if z > tau]
        excess = mp.fsum(z ** (1 / c) for z in inside) - 1
        step = excess * c / mp.fsum(z ** (1 / c - 1) for z in inside)
        if abs(step) < mpf(10) ** (5 - DIGITS):
            break
        tau += step
    return [(z - tau) ** (1 / c) if (z := c * (v - top)) > tau else mpf(0) for v in row]


def entmax(row: Row, _: Any, alpha: float = 1.5) -> Answer:
    """What 4 units of tau move an entry by, y^(2 - alpha), and the logits' own rounding."""
    p, c = sparse(row, alpha), mpf(alpha) - 1
    threshold = max(c * x - v**c for v, x in zip(p, row, strict=True) if v)
    slopes = [
        v ** (2 - mpf(alpha)) if v else mpf(c * x > threshold - mpf(2) ** -20)
        for v, x in zip(p, row, strict=True)
    ]
    return Answer(p, [16 * slope for slope in slopes])


def sparsemax(row: Row, second: Any) -> Answer:
    return entmax(row, second, 2.0)


# --------------------------------------------------------------------------- losses


def entmax_loss(row: Row, label: int, alpha: float = 1.5) -> Answer:
    """The loss is flat where it is small: u moves it by its slope, and at least by itself."""
    a, c, p = mpf(alpha), mpf(alpha) - 1, sparse(row, alpha)
    tsallis = (1 - mp.fsum(v**a for v in p)) / (a * c)
    loss = mp.fsum(v * x for v, x in zip(p, row, strict=True)) - row[label] + tsallis
    slope = mp.fsum(abs(v - (j == label)) for j, v in enumerate(p))
    none = abs(loss) < mpf(10) ** (10 - DIGITS)
    return Answer([mpf(0) if none else loss], [mpf(0) if none else 16 * slope])


def sparsemax_loss(row: Row, label: int) -> Answer:
    return entmax_loss(row, label, 2.0)


def sigmoid_cross_entropy(row: Row, labels: Row, gamma: float = 0.0) -> Answer:
    losses = []
    for v, t in zip(row, labels, strict=True):
        z = v if t else -v  # the loss of a yes
        losses.append(mp.log1p(mp.exp(-z)) / (1 + mp.exp(z)) ** mpf(gamma))
    return _alone(losses)


def sigmoid_focal(row: Row, labels: Row) -> Answer:
    return sigmoid_cross_entropy(row, labels, FOCAL_GAMMA)


def kl_divergence(row: Row, other: Row) -> Answer:
    """The bound that the docstring states: absolute where p and q are close to each other."""
    p, q = _logs(row), _logs([mpf(float(v)) for v in other])
    k = mp.fsum(mp.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
    depth = max(abs(v) for v in (*p, *q))
    return Answer([k], [8 * k + 4 * (1 + depth) * mp.sqrt(2 * abs(k))])


def cross_entropy(row: Row, label: int) -> Answer:
    return _alone([-_logs(row)[label]])


def weighted(row: Row, label: int, weight: float) -> Answer:
    return _alone([mpf(float(weight)) * cross_entropy(row, label).values[0]])


# --------------------------------------------------------------------------- sums


def entropy(row: Row, _: Any) -> Answer:
    return _alone([-mp.fsum(mp.exp(v) * v for v in _logs(row))])


def _near_zero(values: list[Any], row: Row) -> Answer:
    """A logarithm near 0 is the difference of two larger numbers."""
    return Answer(values, [4 * max(mpf(1), *map(abs, row))] * len(values))


def logmeanexp(row: Row, _: Any) -> Answer:
    return _near_zero([mp.log(mp.fsum(mp.exp(v) for v in row) / len(row))], row)


def logcumsumexp(row: Row, _: Any) -> Answer:
    values, total = [], mpf(0)
    for v in row:
        total += mp.exp(v)
        values.append(mp.log(total))
    return _near_zero(values, row)


def _span(row: Row) -> float:
    low, high = min(0.0, *map(float, row)), max(0.0, *map(float, row))
    return max(6, 2 + 2 * (high - low))


RULES = {
    "softmax_with_sink": Rule(with_sink, _span),
    "entmax": Rule(entmax, lambda row: 8),
    "sparsemax": Rule(sparsemax, lambda row: 8),
    "entmax_loss": Rule(entmax_loss, lambda row: 8),
    "sparsemax_loss": Rule(sparsemax_loss, lambda row: 8),
    "sigmoid_cross_entropy": Rule(sigmoid_cross_entropy, lambda row: 8),
    "sigmoid_focal": Rule(sigmoid_focal, lambda row: 8),
    "kl_divergence": Rule(kl_divergence, lambda row: 8),
    "entropy": Rule(entropy, lambda row: 8),
    "logmeanexp": Rule(logmeanexp, lambda row: 6),
    "logcumsumexp": Rule(logcumsumexp, lambda row: 6),
    "cross_entropy_weighted": Rule(weighted, lambda row: 8),
    "cross_entropy_in_float32": Rule(cross_entropy, lambda row: 8),
}
