"""What cases are drawn with: what a library has, shapes and axes, how arrays lie in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import numpy as np

from tests.backends import np_dtype
from tests.fuzz import layouts, values

SIGNED = ("int8", "int16", "int32", "int64")
UNSIGNED = ("uint8", "uint16", "uint32", "uint64")


class Argument(NamedTuple):
    """An array that is passed: its values, and how it lies in memory."""

    values: np.ndarray
    layout: str = "C order"


@dataclass(frozen=True)
class Traits:
    """What is drawn for a library."""

    library: str
    floats: tuple[str, ...] = ("float32", "float64")
    integers: tuple[str, ...] = (*SIGNED, *UNSIGNED)
    labels: tuple[str, ...] = (*SIGNED, *UNSIGNED)
    default_float: str = "float64"
    complex_of: tuple[str, ...] = ("float32", "float64")
    large: float = 0.0
    """How often an array is large enough for kernels that small ones do not wait for."""
    few_shapes: bool = False
    """Whether each shape is compiled anew, so that few are drawn."""


TRAITS = {
    "numpy": Traits("numpy", values.FLOATS, large=0.002),
    "torch": Traits(
        "torch",
        ("float16", "bfloat16", "float32", "float64"),
        integers=(*SIGNED, "uint8"),
        labels=(*SIGNED, "uint8"),
        default_float="float32",
        large=0.002,
    ),
    "jax": Traits("jax", ("float16", "bfloat16", "float32", "float64"), few_shapes=True),
    "strict": Traits("array_api_strict"),
    "dask": Traits("dask", ("float16", "float32", "float64")),
    "mlx": Traits(
        "mlx",
        ("float16", "bfloat16", "float32", "float64"),
        default_float="float32",
        complex_of=("float32",),
    ),
    "dpnp": Traits("dpnp", ("float16", "float32", "float64")),
}


def traits_of(library: str) -> Traits:
    """Return what is drawn for a library."""
    return next(traits for traits in TRAITS.values() if traits.library == library)


class Draw:
    """What the parts of a case are drawn with."""

    def __init__(self, traits: Traits, seed: int, number: int) -> None:
        self.traits = traits
        self.random = Random(f"{seed}/{number}")
        self.rng = np.random.default_rng(self.random.getrandbits(64))
        self.chance, self.one_of = self.random.random, self.random.choice

    def weighted(self, weights: Mapping[Any, float]) -> Any:
        return self.random.choices(list(weights), list(weights.values()))[0]

    def argument(self, array: np.ndarray, *, plain: float = 0.5) -> Argument:
        """Lay an array out, in the library's C order with the chance `plain`."""
        known = list(layouts.BY_LIBRARY[self.traits.library])
        layout = known[0]
        if array.ndim and array.size and self.chance() > plain:
            layout = self.one_of(known)
        return Argument(layouts.conditioned(array, layout), layout)

    def in_byte_order(self, array: np.ndarray) -> np.ndarray:
        """Return NumPy's arrays in the other byte order at times."""
        if self.traits.library != "numpy" or array.dtype.kind not in "iuf" or self.chance() > 0.06:
            return array
        if values.name_of(array.dtype) == "longdouble":
            return array
        return array.astype(array.dtype.newbyteorder())


# --------------------------------------------------------------------------- shapes


def shape_and_axis(draw: Draw, dtype: str, *, one_axis: bool) -> tuple[tuple[int, ...], Any]:
    """Draw a shape and the axis, axes or None that a call reduces."""
    if draw.chance() < draw.traits.large:
        shape = draw.one_of(((32769, 2), (6600, 10), (660, 100), (66, 1000), (2, 40000), (70000,)))
        axis = draw.one_of((0, -1)) if len(shape) == 2 else -1
        return (shape if axis == -1 else shape[::-1]), axis
    if draw.traits.few_shapes:
        shape = draw.one_of(((5,), (1,), (3, 4), (2, 3, 7), (1, 40), (0, 3), (4, 0)))
    else:
        ndim = draw.weighted({0: 0.0 if one_axis else 2, 1: 15, 2: 45, 3: 28, 4: 10})
        shape = tuple(draw.weighted({0: 0.4, 1: 2, 2: 2, 3: 2, 5: 2}) for _ in range(ndim))
    ndim = len(shape)
    kinds = {"one": 8.0} if ndim else {"all": 1.0}
    if not one_axis and ndim:
        kinds.update({"all": 1.0, "several": 2.0 if ndim > 1 else 0.0, "no": 0.2})
    kind = draw.weighted(kinds)
    if kind == "all":
        return _lengthened(draw, shape, 0, dtype), None
    if kind == "no":
        return shape, ()
    if kind == "several":
        axes = draw.random.sample(range(ndim), draw.random.randint(2, ndim))
        signed = tuple(a - ndim * draw.one_of((0, 1)) for a in axes)
        return _lengthened(draw, shape, axes[0], dtype), signed
    at = draw.one_of((ndim - 1, draw.random.randrange(ndim)))
    axis: Any = at - ndim * draw.one_of((0, 1))
    if draw.chance() < 0.03:
        axis = np.int64(axis)
    elif not one_axis and draw.chance() < 0.03:
        axis = (axis,)
    return _lengthened(draw, shape, at, dtype), axis


def _lengthened(draw: Draw, shape: tuple[int, ...], at: int, dtype: str) -> tuple[int, ...]:
    """Give the reduced axis a length of its own."""
    if not shape or draw.traits.few_shapes:
        return shape
    kind = draw.weighted({"few": 60, "bytes": 20, "one": 5, "none": 3, "more": 8, "many": 1.5})
    near = draw.one_of((-1, 0, 0, 1))
    if kind == "few":
        n = draw.random.randint(2, 40)
    elif kind == "bytes":
        n = draw.one_of((128, 256, 1024)) // np_dtype(dtype).itemsize + near
    elif kind == "more":
        n = draw.random.randint(41, 300)
    elif kind == "many":
        n = 1 << 12
        n += near
    else:
        n = int(kind == "one")
    others = math.prod(shape[:at] + shape[at + 1 :])
    longest = max(1, (200 if dtype == "longdouble" else 12_000) // max(others, 1))
    return (*shape[:at], min(n, longest), *shape[at + 1 :])


# --------------------------------------------------------------------------- rows


def rows_of(shape: tuple[int, ...], axis: Any) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Return the reduced axes, and the shape as (rows, entries of a row)."""
    ndim = len(shape)
    given = range(ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    axes = tuple(sorted(int(a) % ndim for a in given))
    n = math.prod(shape[a] for a in axes)
    return axes, (math.prod(s for a, s in enumerate(shape) if a not in axes), n)


def from_rows(rows: np.ndarray, shape: tuple[int, ...], axes: tuple[int, ...]) -> np.ndarray:
    """Give rows of entries the shape that they were folded from."""
    kept = [a for a in range(len(shape)) if a not in axes]
    moved = rows.reshape([shape[a] for a in (*kept, *axes)])
    return np.ascontiguousarray(moved.transpose(np.argsort((*kept, *axes)))).reshape(shape)


def to_rows(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Return an array as rows of entries, the reduced axes last."""
    kept = [a for a in range(array.ndim) if a not in axes]
    n = math.prod(array.shape[a] for a in axes)
    r = math.prod(array.shape[a] for a in kept)
    return array.transpose((*kept, *axes)).reshape(r, n)


def answer_dtype(draw: Draw, case: Any) -> None:
    """Ask for an answer in a dtype at times, by its name."""
    if case.first.dtype.kind != "c" and draw.chance() < 0.12:
        case.options["dtype"] = draw.one_of(draw.traits.floats)


def mask(draw: Draw, shape: tuple[int, ...]) -> np.ndarray:
    """Draw a boolean array that broadcasts to the shape."""
    smaller = [1 if draw.chance() < 0.2 else n for n in shape]
    if draw.chance() < 0.2:
        smaller = smaller[draw.random.randint(0, len(shape)) :]
    return np.asarray(draw.rng.random(smaller) < draw.one_of((0.5, 0.8, 0.95, 0.0, 1.0)))
