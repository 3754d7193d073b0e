"""The rows that accuracy is measured on, each family hard in its own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

SINGLE_AND_DOUBLE = ("float32", "float64")
HALVES = ("float16", "bfloat16")


class Family(NamedTuple):
    """Rows of logits, in float64: the dtype under test rounds them once."""

    name: str
    rows: Callable[[np.random.Generator, str], np.ndarray]
    dtypes: tuple[str, ...] = SINGLE_AND_DOUBLE
    axis: int = -1


def _normal(shape: tuple[int, int], scale: float = 1.0, offset: float = 0.0):
    return lambda rng, dtype: offset + scale * rng.standard_normal(shape)


def _spread(rng: np.random.Generator, dtype: str) -> np.ndarray:
    return rng.uniform(-80, 0, (200, 1000))


def _near_ties(rng: np.random.Generator, dtype: str) -> np.ndarray:
    """A few units in the last place apart, around anything in (-20, 20)."""
    around = rng.uniform(-20, 20, (200, 1))
    return around * (1 + np.finfo(dtype).eps * rng.integers(0, 4, (200, 1000)))


def confident(rng: np.random.Generator, margins: np.ndarray, classes: int = 10) -> np.ndarray:
    """One class ahead of the next by a margin, anywhere on the real line."""
    x = rng.standard_normal((margins.size, classes))
    ahead = rng.integers(0, classes, margins.size)
    x[np.arange(margins.size), ahead] = x.max(axis=-1) + margins
    return x + 20 * rng.standard_normal((margins.size, 1))


def _confident(rng: np.random.Generator, dtype: str) -> np.ndarray:
    return confident(rng, np.linspace(20, 100, 2001))


def _log_probabilities(classes: int):
    return lambda rng, dtype: np.log(rng.dirichlet(np.ones(classes), 20_000 // classes))


def _subnormal(rng: np.random.Generator, dtype: str) -> np.ndarray:
    """Probabilities around and below the smallest normal number."""
    info = np.finfo(dtype)
    low, high = np.log(float(info.smallest_subnormal)), np.log(float(info.smallest_normal))
    x = rng.uniform(low, high + 2, (500, 10))
    x[:, 3] = 0
    return x


_LONG = 1_000_000
_HALF = 70_000
_CONFIDENT = "margins 20..100, V=10"

FAMILIES = (
    *(
        Family(f"N(0,1), V={v}", _normal((max(2, min(20_000, 200_000 // v)), v)))
        for v in (2, 10, 100, 1000, 32_000, _LONG)
    ),
    Family("U(-80,0), V=1000", _spread),
    Family("1e4 + N(0,1), V=1000", _normal((200, 1000), offset=1e4)),
    Family("near ties, V=1000", _near_ties),
    Family(_CONFIDENT, _confident),
    Family("log-probabilities, V=10", _log_probabilities(10)),
    Family("log-probabilities, V=1000", _log_probabilities(1000)),
    Family("10 N(0,1), V=3", _normal((20_000, 3), scale=10)),
    Family("subnormal results, V=10", _subnormal),
    Family(f"N(0,1), axis 0 of ({_LONG}, 3)", _normal((_LONG, 3)), axis=0),
    Family(f"N(0,1), V={_HALF}", _normal((3, _HALF)), HALVES),
    Family(f"zeros, V={_HALF}", _normal((1, _HALF), scale=0), HALVES),
    Family(f"N(0,1), axis 0 of ({_HALF}, 3)", _normal((_HALF, 3)), HALVES, axis=0),
)
MARGINS = (5, 20, 40, 80)

SPARSE = "N(0,1), V=128000"  # what is never 0 would take mpmath a minute
_CONFIDENT_OF_REST = "margins 20..80, V=10"
# Fewer and shorter rows, as each exact answer takes long.
REST = (
    Family("N(0,1), V=10", _normal((100, 10))),
    Family("N(0,1), V=1000", _normal((4, 1000))),
    Family("U(-80,0), V=100", lambda rng, dtype: _spread(rng, dtype)[:10, :100]),
    Family("1e4 + N(0,1), V=100", _normal((10, 100), offset=1e4)),
    Family("near ties, V=100", lambda rng, dtype: _near_ties(rng, dtype)[:10, :100]),
    Family(_CONFIDENT_OF_REST, lambda rng, dtype: confident(rng, np.linspace(20, 80, 61))),
    Family(SPARSE, _normal((1, 128_000))),
    Family("N(0,1), V=1000", _normal((4, 1000)), HALVES),
)


def labels(rng: np.random.Generator, x: np.ndarray, axis: int) -> np.ndarray:
    """Return the likeliest class for every second position, any class for the others.

    The likeliest is the hard one: its loss may be far below the spacing of numbers near one.
    """
    t = x.argmax(axis)
    t[1::2] = rng.integers(0, x.shape[axis], t[1::2].shape)
    return t


def chosen(*, quick: bool) -> list[Family]:
    """Return the families, or an easy and a hard one of short rows."""
    return [f for f in FAMILIES if not quick or f.name in ("N(0,1), V=10", _CONFIDENT)]


def chosen_of_rest(*, quick: bool) -> list[Family]:
    """Return the families of the rest of the family of functions, or two as above."""
    return [f for f in REST if not quick or f.name in ("N(0,1), V=10", _CONFIDENT_OF_REST)]
