"""The handwritten digits that ship with the package; ``data/SOURCE.txt`` says where from."""

from __future__ import annotations

from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Split(NamedTuple):
    """Pixels in [0, 1] as rows of 64, and labels: some to learn from, some held out."""

    train_x: NDArray[np.float32]
    train_t: NDArray[np.int64]
    held_out_x: NDArray[np.float32]
    held_out_t: NDArray[np.int64]


def load() -> tuple[NDArray[Any], NDArray[Any]]:
    """Return images, uint8 (1797, 8, 8) from 0 to 16, and labels, uint8 (1797,)."""
    with (files("portable_softmax") / "data" / "digits.npz").open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        return archive["images"], archive["labels"]


def split(images: NDArray[Any], labels: NDArray[Any], rng: np.random.Generator) -> Split:
    """Hold out every fifth of the shuffled images of each class.

    The classes are split one by one because a plain split's luck with the hard ones moves the
    accuracy by a point from seed to seed.
    """
    x = images.reshape(len(images), -1).astype(np.float32) / 16
    t = labels.astype(np.int64)
    shuffled = rng.permutation(len(t))
    by_class = shuffled[np.argsort(t[shuffled], kind="stable")]
    held_out = np.arange(len(t)) % 5 == 0
    train, test = by_class[~held_out], by_class[held_out]
    return Split(x[train], t[train], x[test], t[test])
