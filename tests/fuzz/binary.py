"""The loss of yes-or-no labels in extended precision, entry by entry."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tests.fuzz.reference import ANY, Answer, L, Rounding


class Options(NamedTuple):
    """The options, weights in the dtype of the computation."""

    weight: np.ndarray | None
    pos_weight: np.ndarray | None
    gamma: float
    smoothing: float
    reduction: str


def value_and_grad(
    z: np.ndarray, t: np.ndarray, options: Options, rounding: Rounding
) -> tuple[Answer, Answer]:
    """Return the reduced loss and the gradient of its sum."""
    z, t, e = z.astype(L), t.astype(L), L(options.smoothing)
    weight, pos_weight = (
        np.ones((), L) if w is None else w.astype(L) for w in (options.weight, options.pos_weight)
    )
    yes = weight * pos_weight * ((1 - e) * t + e / 2)
    no = weight * ((1 - e) * (1 - t) + e / 2)
    of_yes, of_no = (_side(y, k, options.gamma) for y, k in ((-z, yes), (z, no)))
    u, compute = rounding.compute.u, rounding.compute
    loss, grad = of_yes[0] + of_no[0], of_no[1] - of_yes[1]
    size = np.abs(of_no[1]) + np.abs(of_yes[1])
    # What underflows, a power or a sigmoid, may be multiplied by a large loss after that.
    gone = rounding.gone
    finite = np.where(np.isfinite(z), np.abs(z), 0)
    lost = 4 * gone * (1 + options.gamma) * (1 + (yes + no) * (1 + finite))
    error = 12 * u * np.where(np.isfinite(loss), loss, 0) + lost
    slack = 16 * u * np.where(np.isfinite(size), size, 0) + lost
    if options.reduction != "none":
        total = loss.sum()
        summed = np.abs(np.where(np.isfinite(loss), loss, 0)).sum()
        error = error.sum() + 8 * u * summed
        # A sum may overflow on the way to a mean that would not.
        error = np.where(compute.max / 8 <= np.abs(total), ANY, error)
        error = np.where(np.isfinite(total), error, 0)
        loss = np.asarray(total)
    if options.reduction == "mean":
        n = L(z.size)
        if z.size:
            loss, error, grad, slack = loss / n, error / n, grad / n, slack / n
        else:
            loss, error = np.asarray(L("nan")), np.asarray(L(0))
    return (
        Answer(loss, rounding.tolerance(loss, 1, error)),
        Answer(grad, rounding.tolerance(grad, 1, slack)),
    )


def _side(y: Any, k: Any, gamma: float) -> tuple[Any, Any]:
    """Return k sigmoid(y)^gamma softplus(y) and its derivative by y; 0 where k is."""
    y, k = np.broadcast_arrays(y, k)
    y = np.where((k == 0) & ~np.isfinite(y), 0, y)
    small = np.log1p(np.exp(-np.abs(y)))
    loss, other = np.maximum(y, 0) + small, np.maximum(-y, 0) + small
    power = np.exp(-L(gamma) * other) if gamma else L(1)
    q = np.exp(-loss)
    steep = np.where(q == 0, 0, q * np.where(q == 0, 0, loss))
    return k * (power * loss), k * (power * (L(gamma) * steep + np.exp(-other)))
