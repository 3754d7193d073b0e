"""``thresholds``: both sides of every size at which the Numba rows change their method.

The sizes are constants of `portable_softmax.kernels._numba._driver`. For arrays around each of
them, both ways work on the same array in turns, whatever the constant says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from bench import tables
from bench.errors import CommandError
from portable_softmax import kernels

HEADINGS = ("size", "array", "dtype", "operation", "ways", "first", "second", "taken", "/ other")
LEGEND = (
    "The fastest of several rounds, the ways taking turns. `taken` is the way that the constant "
    "chooses for this array, and `/ other` its time in units of the other's: above 1, the other "
    "would have been better here."
)
OPERATIONS = ("softmax", "logsumexp", "cross_entropy_value_and_grad")
DTYPES = "float32,float64"
_HOME = "portable_softmax.kernels._numba._driver"


@dataclass
class Row:
    """Two ways to work on one array."""

    size: str
    """The constant."""
    shape: tuple[int, int]
    dtype: str
    operation: str
    ways: tuple[str, str]
    seconds: tuple[float, float]
    taken: str

    @property
    def ratio(self) -> float:
        """The time of the way that is taken, in units of the other's."""
        one, other = self.seconds
        return one / other if self.taken == self.ways[0] else other / one


class _Size(NamedTuple):
    """A constant, what it has to be for either way to be taken, and arrays around it."""

    name: str
    ways: dict[str, int]
    shapes: tuple[tuple[int, int], ...]
    # Whether an array takes the first way.
    first: Callable[[int, tuple[int, int], int], bool]


_NEVER, _ALWAYS = 1 << 62, 1
_SIZES = (
    _Size(
        "SHORT", {"blocks": _NEVER, "groups": _ALWAYS},
        tuple((1 << 14, n) for n in (16, 32, 64, 100, 128, 192, 256, 384, 512)),
        lambda size, shape, width: shape[1] * width < size,
    ),
    _Size(
        "MIDDLE", {"groups": _NEVER, "one by one": _ALWAYS},
        tuple((1 << 13, n) for n in (256, 384, 512, 768, 1000, 1500, 2000, 4000)),
        lambda size, shape, width: shape[1] * width <= size,
    ),
    _Size(
        "THREADED", {"one thread": _NEVER, "all": _ALWAYS},
        tuple((1 << k, 256) for k in range(9, 16)),
        lambda size, shape, width: math.prod(shape) * width < size,
    ),
)  # fmt: skip


def check() -> None:
    """Raise what explains why nothing can be measured."""
    if "numba rows" not in kernels.available():
        raise CommandError("numba is not installed: pip install 'portable_softmax[numba]'")


def measure(dtypes: list[str], *, quick: bool) -> Iterator[Row]:
    """Yield a row for each size, array, dtype and operation."""
    for size in _SIZES:
        for shape in size.shapes[:1] if quick else size.shapes:
            for dtype in dtypes:
                for operation in OPERATIONS:
                    yield _measured(size, shape, dtype, operation, rounds=2 if quick else 15)


def _measured(size: _Size, shape: tuple[int, int], dtype: str, operation: str, rounds: int) -> Row:
    module = import_module(_HOME)
    call = _call(shape, dtype, operation)
    seconds = dict.fromkeys(size.ways, math.inf)
    for _ in range(rounds):
        for way, value in size.ways.items():
            with _set(module, size.name, value):
                call()
                started = perf_counter()
                call()
                seconds[way] = min(seconds[way], perf_counter() - started)
    first, second = size.ways
    is_first = size.first(getattr(module, size.name), shape, np.dtype(dtype).itemsize)
    return Row(
        size.name, shape, dtype, operation, (first, second),
        (seconds[first], seconds[second]), first if is_first else second,
    )  # fmt: skip


def _call(shape: tuple[int, int], dtype: str, operation: str) -> Callable[[], Any]:
    """Return what runs an operation on an array."""
    driver = import_module(_HOME)
    rng = np.random.default_rng(0)
    rows, n = shape
    x, labels = rng.standard_normal(shape).astype(dtype), rng.integers(0, n, rows)
    layout, out = driver.Layout(rows, n, 1), np.empty_like(x)
    if operation == "softmax":
        return lambda: driver.softmax(x, out, layout)
    if operation == "logsumexp":
        few = out[:, 0].copy()
        return lambda: driver.logsumexp(x, few, layout)
    plain = driver.Loss(None, None, 0.0, 0.0)
    return lambda: driver.losses(x, labels, layout, plain, None, out, True)


@contextmanager
def _set(module: Any, name: str, value: int) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def cells(rows: list[Row]) -> list[list[str]]:
    """Return the rows as text."""
    return [
        [
            row.size, tables.shape(row.shape), row.dtype, row.operation, ", ".join(row.ways),
            *map(tables.duration, row.seconds), row.taken, f"{row.ratio:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
