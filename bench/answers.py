"""Reference results: a provider whose result is wrong is not timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.peers import BACKWARD, FOCAL_GAMMA, TIMED

# The largest relative and absolute error of a correct result. A probability that is subnormal in
# float16 may be off by a unit in the last place.
_TOLERANCE = {
    "float64": (1e-12, 0.0),
    "float32": (2e-5, 0.0),
    "float16": (2e-2, 2.0**-24),
    "bfloat16": (1e-1, 0.0),
}

# How many entries of a result are compared: rows at equal distances, the first and last included.
_COMPARED = 2**19
_BLOCK = 2**18


class Answers:
    """The results of every operation over the last axis of one array, in float64."""

    def __init__(self, x: np.ndarray, labels: np.ndarray) -> None:
        rows, classes = x.shape
        self.x, self.labels = x, labels
        step = max(1, _BLOCK // classes)
        self._logsumexp = np.concatenate(
            [_logsumexp(x[i : i + step]) for i in range(0, rows, step)]
        )
        compared = min(rows, max(2, _COMPARED // classes))
        self._rows = np.unique(np.linspace(0, rows - 1, compared).astype(int))

    def problem(self, operation: str, second: np.ndarray, results: tuple[np.ndarray, ...]) -> str:
        """Return what is wrong with a provider's results; empty where nothing is.

        `second` is what the call got beside x: labels, or the upstream gradient.
        """
        relative, absolute = _TOLERANCE[self.x.dtype.name]
        expected = self._expected(operation, second)
        if len(results) != len(expected):
            return f"wrong: {len(results)} results instead of {len(expected)}"
        for i, (shape, answer) in enumerate(expected):
            actual = results[i]
            if actual.shape != shape:
                return f"wrong: shape {actual.shape} instead of {shape}"
            if shape:
                actual = actual[self._rows]
            size = np.abs(answer)
            # A difference, which cancels somewhere, or a probability that is 0.
            if (i and operation in BACKWARD) or operation in TIMED:
                size = np.maximum(size, size.max())
            error = np.max((np.abs(actual.astype(np.float64) - answer) - absolute) / size)
            if not error <= relative:  # so that nan is wrong
                return f"wrong: relative error {error:.1e}"
        return ""

    def _expected(self, operation: str, second: np.ndarray) -> list[tuple[tuple[int, ...], Any]]:
        """Return the shape of each result, and its compared rows."""
        forward, _, backward = operation.partition("+")
        picked = self._rows
        if operation in TIMED:
            return self._of_the_rest(forward, second, bool(backward))
        lse = self._logsumexp[picked]
        log_y = self.x[picked].astype(np.float64) - lse[:, None]
        if forward.startswith("cross_entropy"):
            every = np.arange(len(second))
            loss = np.mean(self._logsumexp - self.x[every, second].astype(np.float64))
            grad = np.exp(log_y)
            grad[np.arange(len(picked)), second[picked]] -= 1
            both: list[tuple[tuple[int, ...], Any]] = [
                ((), loss),
                (self.x.shape, grad / len(every)),
            ]
            return both[:1] if forward == "cross_entropy" else both
        values: dict[str, Any] = {"softmax": np.exp(log_y), "log_softmax": log_y, "logsumexp": lse}
        value = values[forward]
        shape = self.x.shape[: value.ndim]
        if not backward:
            return [(shape, value)]
        dy = second[picked].astype(np.float64)
        return [(shape, value), (self.x.shape, _VJP[forward](np.exp(log_y), dy))]

    def _of_the_rest(
        self, name: str, second: np.ndarray, backward: bool
    ) -> list[tuple[tuple[int, ...], Any]]:
        """Return the same of an operation of the rest of the family."""
        rows, classes = self.x.shape
        if name in _LOSSES:  # a mean over all rows
            step = max(1, _BLOCK // classes)
            cuts = [slice(i, i + step) for i in range(0, rows, step)]
            found = [_LOSSES[name](self.x[c].astype(np.float64), second[c]) for c in cuts]
            each = np.concatenate(found)
            answer: list[tuple[tuple[int, ...], Any]] = [((), each.mean())]
            if backward:
                x, other = (a[self._rows].astype(np.float64) for a in (self.x, second))
                slopes = _SLOPES[name](x, other)
                answer += [(self.x.shape, slope / each.size) for slope in slopes]
            return answer
        value = _VALUES[name](self.x[self._rows].astype(np.float64))
        shape = self.x.shape[: value.ndim]
        if not backward:
            return [(shape, value)]
        if name in _SLOPES:
            (slope,) = _SLOPES[name](self.x[self._rows].astype(np.float64), value)
            return [(shape, value), (self.x.shape, slope)]
        dy, g = second[self._rows].astype(np.float64), value ** (2 - _ALPHA[name]) * (value > 0)
        mean = (g * dy).sum(axis=1, keepdims=True) / g.sum(axis=1, keepdims=True)
        return [(shape, value), (shape, g * (dy - mean))]


# --------------------------------------------------------------------------- the rest

_ALPHA = {"entmax": 1.5, "sparsemax": 2.0}


def _sparse(x: np.ndarray, alpha: float) -> np.ndarray:
    """Return entmax by bisection for the threshold."""
    z = (alpha - 1) * (x - x.max(axis=1, keepdims=True))
    low, high = np.full((len(x), 1), -1.0), np.zeros((len(x), 1))
    for _ in range(60):
        tau = (low + high) / 2
        p = np.maximum(z - tau, 0) ** (1 / (alpha - 1))
        more = p.sum(axis=1, keepdims=True) >= 1
        low, high = np.where(more, tau, low), np.where(more, high, tau)
    return p / p.sum(axis=1, keepdims=True)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    return x - _logsumexp(x)[:, None]


def _fenchel_young(x: np.ndarray, labels: np.ndarray, alpha: float) -> np.ndarray:
    p = _sparse(x, alpha)
    tsallis = (1 - (p**alpha).sum(axis=1)) / (alpha * (alpha - 1))
    return (p * x).sum(axis=1) - x[np.arange(len(x)), labels] + tsallis


def _binary(x: np.ndarray, yes: np.ndarray, gamma: float) -> np.ndarray:
    z = np.where(yes > 0, -x, x)
    loss = np.logaddexp(0, z)
    return loss * np.exp(gamma * (z - loss))


def _divergence(x: np.ndarray, other: np.ndarray) -> np.ndarray:
    log_p = _log_softmax(x)
    return (np.exp(log_p) * (log_p - _log_softmax(other.astype(np.float64)))).sum(axis=1)


def _slopes_of_divergence(x: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, ...]:
    log_p, log_q = _log_softmax(x), _log_softmax(other)
    gap = log_p - log_q
    by_p = np.exp(log_p) * (gap - (np.exp(log_p) * gap).sum(axis=1, keepdims=True))
    return by_p, np.exp(log_q) - np.exp(log_p)


def _slopes_of_entropy(x: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, ...]:
    return (-np.exp(_log_softmax(x)) * (_log_softmax(x) + h[:, None]),)


# Of a sum.
_SLOPES: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, ...]]] = {
    "entropy": _slopes_of_entropy,
    "kl_divergence": _slopes_of_divergence,
    "sigmoid_cross_entropy": lambda x, yes: (1 / (1 + np.exp(-x)) - yes,),
}
_VALUES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "softmax_with_sink": lambda x: np.exp(x - np.logaddexp(0, _logsumexp(x))[:, None]),
    "entmax": lambda x: _sparse(x, 1.5),
    "sparsemax": lambda x: _sparse(x, 2.0),
    "entropy": lambda x: -(np.exp(_log_softmax(x)) * _log_softmax(x)).sum(axis=1),
    "logmeanexp": lambda x: _logsumexp(x) - np.log(x.shape[1]),
    "logcumsumexp": lambda x: np.logaddexp.accumulate(x, axis=1),
}
_LOSSES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "entmax_loss": lambda x, t: _fenchel_young(x, t, 1.5),
    "sparsemax_loss": lambda x, t: _fenchel_young(x, t, 2.0),
    "sigmoid_cross_entropy": lambda x, t: _binary(x, t, 0.0),
    "sigmoid_focal": lambda x, t: _binary(x, t, FOCAL_GAMMA),
    "kl_divergence": _divergence,
}


def _logsumexp(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    m = wide.max(axis=-1)
    return m + np.log(np.exp(wide - m[:, None]).sum(axis=-1))


_VJP: dict[str, Callable[[Any, Any], Any]] = {
    "softmax": lambda y, dy: y * (dy - (y * dy).sum(axis=-1, keepdims=True)),
    "log_softmax": lambda y, dy: dy - y * dy.sum(axis=-1, keepdims=True),
    "logsumexp": lambda y, dy: dy[:, None] * y,
}
