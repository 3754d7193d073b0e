"""Is the gradient that was derived by hand the gradient? Central differences answer."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from portable_softmax import cross_entropy
from portable_softmax._cli.backends import Place
from portable_softmax._cli.digits import Split
from portable_softmax._cli.training import BATCH, Training, gradients


class GradientCheck(NamedTuple):
    """The largest difference over all entries of dL/dW and dL/db, beside the largest entry."""

    difference: float
    largest: float
    entries: int
    dtype: str


def check_gradient(trained: Training, data: Split) -> GradientCheck:
    """Compare the two gradients at the trained weights, on a batch of held-out digits.

    The dtype is float64 where the place has it. The numerical gradient of float32 is itself
    wrong from the fourth digit or so on, because the losses that it subtracts have only seven.
    """
    place = trained.place
    dtype = np.dtype("float64" if "float64" in place.dtypes() else "float32")
    W, b = trained.W.astype(dtype), trained.b.astype(dtype)
    # Spread over the held-out digits, which lie class by class.
    batch = np.linspace(0, len(data.held_out_t) - 1, BATCH).astype(int)
    x, t = place.put(data.held_out_x[batch].astype(dtype)), place.put(data.held_out_t[batch])

    by_hand = place.compile(partial(gradients, place.xp))(place.put(W), place.put(b), x, t)
    derived = np.concatenate([place.get(gradient).ravel() for gradient in by_hand])
    measured = _central_differences(place, W, b, x, t)
    return GradientCheck(
        difference=float(np.max(np.abs(derived - measured))),
        largest=float(np.max(np.abs(derived))),
        entries=derived.size,
        dtype=dtype.name,
    )


def _central_differences(
    place: Place, W: NDArray[Any], b: NDArray[Any], x: Any, t: Any
) -> NDArray[Any]:
    """Move each weight up and down by h, all models in one stack, and watch the loss."""
    xp = place.xp
    # About where the error of the formula, h^2, and that of the rounding, eps / h, are equal.
    h = float(np.finfo(W.dtype).eps) ** (1 / 3)

    @place.compile
    def losses(W: Any, b: Any, x: Any, t: Any) -> Any:
        logits = x @ W + b  # (models, n, classes)
        labels = xp.broadcast_to(t, logits.shape[:-1])
        return xp.mean(cross_entropy(logits, labels, reduction="none"), axis=-1)

    move = h * np.eye(W.size + b.size, dtype=W.dtype)
    dW, db = move[:, : W.size].reshape(-1, *W.shape), move[:, W.size :].reshape(-1, 1, b.size)
    up = losses(place.put(W + dW), place.put(b + db), x, t)
    down = losses(place.put(W - dW), place.put(b - db), x, t)
    return place.get((up - down) / (2 * h))
