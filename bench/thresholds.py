"""``thresholds``: both sides of every size at which the Numba rows change their method.

The sizes are constants of `portable_softmax.kernels._numba._driver`. For arrays around each of
them, both ways work on the same array in turns, whatever the constant says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

import portable_softmax
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
    # Whether the driver has an operation on an array of such an item size take the first way.
    first: Callable[[Any, str, tuple[int, int], int], bool]
    operations: tuple[str, ...] = OPERATIONS
    xla: bool = False  # whether XLA calls, in its own threads

    @property
    def constant(self) -> str:
        return self.name.partition(",")[0]


def _rows(first: int, end: int, n: int) -> tuple[tuple[int, int], ...]:
    return tuple((1 << k, n) for k in range(first, end))


def _is_alone(xla: bool, driver: Any, operation: str, shape: tuple[int, int], width: int) -> bool:
    return bool(math.prod(shape) * width < driver.worth(operation, shape[1], xla))


_NEVER, _ALWAYS = 1 << 62, 1
_THREADS = {"one thread": _NEVER, "all": _ALWAYS}
_SIZES = (
    _Size(
        "SHORT", {"blocks": _NEVER, "groups": _ALWAYS},
        tuple((1 << 14, n) for n in (16, 32, 64, 100, 128, 192, 256, 384, 512)),
        lambda driver, _, shape, width: shape[1] * width < driver.SHORT,
    ),
    _Size(
        "MIDDLE", {"groups": _NEVER, "one by one": _ALWAYS},
        tuple((1 << 13, n) for n in (256, 384, 512, 768, 1000, 1500, 2000, 4000)),
        lambda driver, _, shape, width: shape[1] * width <= driver.MIDDLE,
    ),
    _Size("THREADED", _THREADS, _rows(9, 16, 256), partial(_is_alone, False)),
    _Size(
        "THREADED, sooner", _THREADS, _rows(7, 13, 256), partial(_is_alone, False),
        ("entropy", "sigmoid_cross_entropy"),
    ),
    _Size("THREADED, few classes", _THREADS, _rows(13, 18, 3), partial(_is_alone, False)),
    _Size(
        "THREADED, XLA", _THREADS, _rows(7, 13, 256), partial(_is_alone, True),
        (*OPERATIONS, "entropy", "sigmoid_cross_entropy"), xla=True,
    ),
)  # fmt: skip


def check() -> None:
    """Raise what explains why nothing can be measured."""
    if "numba rows" not in kernels.available():
        raise CommandError("numba is not installed: pip install 'portable_softmax[numba]'")


def sizes() -> list[_Size]:
    """Return those that can be measured here."""
    return [size for size in _SIZES if not size.xla or find_spec("jax")]


def measure(dtypes: list[str], *, quick: bool) -> Iterator[Row]:
    """Yield a row for each size, array, dtype and operation; those of XLA are of float32."""
    for size in sizes():
        for shape in size.shapes[:1] if quick else size.shapes:
            for dtype in dtypes:
                for operation in size.operations:
                    if not size.xla or dtype == "float32":
                        rounds = 2 if quick else 15
                        yield _measured(size, shape, dtype, operation, rounds)


def _measured(size: _Size, shape: tuple[int, int], dtype: str, operation: str, rounds: int) -> Row:
    driver = import_module(_HOME)
    calls, seconds = {}, dict.fromkeys(size.ways, math.inf)
    for way, value in size.ways.items():  # XLA compiles the way in
        with _set(driver, size.constant, value):
            calls[way] = (_call_of_xla if size.xla else _call)(shape, dtype, operation)
    for _ in range(rounds):
        for way, value in size.ways.items():
            with _set(driver, size.constant, value):
                calls[way]()
                started = perf_counter()
                calls[way]()
                seconds[way] = min(seconds[way], perf_counter() - started)
    first, second = size.ways
    is_first = size.first(driver, operation, shape, np.dtype(dtype).itemsize)
    return Row(
        size.name, shape, dtype, operation, (first, second),
        (seconds[first], seconds[second]), first if is_first else second,
    )  # fmt: skip


def _arrays(shape: tuple[int, int], dtype: str) -> tuple[Any, Any]:
    """Return logits and labels."""
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape).astype(dtype), rng.integers(0, shape[1], shape[0])


def _call(shape: tuple[int, int], dtype: str, operation: str) -> Callable[[], Any]:
    """Return what runs an operation on an array."""
    driver = import_module(_HOME)
    x, labels = _arrays(shape, dtype)
    layout, out = driver.Layout(*shape, 1), np.empty_like(x)
    if operation == "softmax":
        return lambda: driver.softmax(x, out, layout)
    if operation == "logsumexp":
        few = out[:, 0].copy()
        return lambda: driver.logsumexp(x, few, layout)
    if operation in ("entropy", "sigmoid_cross_entropy"):
        call = _of_the_package(operation, x, labels)

        def by_name() -> Any:
            with kernels.use("numba rows"):
                return call()

        return by_name
    plain = driver.Loss(None, None, 0.0, 0.0)
    return lambda: driver.losses(x, labels, layout, plain, None, out, True)


def _of_the_package(operation: str, x: Any, labels: Any) -> Callable[[], Any]:
    """Return a call of a public function."""
    function = getattr(portable_softmax, operation)
    if operation == "sigmoid_cross_entropy":
        return lambda: function(x, x > 0)
    if operation.startswith("cross_entropy"):
        return lambda: function(x, labels)
    return lambda: function(x, axis=-1)


def _call_of_xla(shape: tuple[int, int], dtype: str, operation: str) -> Callable[[], Any]:
    """Return a compiled program of JAX that is the operation."""
    import jax

    x, labels = map(jax.device_put, _arrays(shape, dtype))
    with kernels.use("numba rows"):
        traced = jax.jit(lambda x, t: _of_the_package(operation, x, t)()).lower(x, labels)
    program = traced.compile()
    return lambda: jax.block_until_ready(program(x, labels))


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
