"""Numbers for rows of logits: everyday ones, and those at which softmax is known to break."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np

from tests.backends import np_dtype

HALVES = ("float16", "bfloat16")
FLOATS = (*HALVES, "float32", "float64", "longdouble")


class Format:
    """What a floating dtype can hold, and the dtype that it is computed in."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.compute = "float32" if name in HALVES else name
        self.dtype = np_dtype(name)
        # bfloat16 has float32's exponents and eight bits.
        info = np.finfo(np.float32 if name == "bfloat16" else self.dtype)
        bits = 8 if name == "bfloat16" else info.nmant + 1
        self.bits = bits
        self.smallest_normal = np.longdouble(info.smallest_normal)
        self.smallest = np.ldexp(self.smallest_normal, 1 - bits)
        self.max = (2 - np.ldexp(np.longdouble(1), 1 - bits)) * np.ldexp(
            np.longdouble(1), info.maxexp - 1
        )
        self.u = np.ldexp(np.longdouble(1), -bits)
        # exp of less than this is 0.
        self.depth = float(-np.log(self.smallest))


FORMATS = {name: Format(name) for name in FLOATS}


def name_of(dtype: np.dtype) -> str:
    """Return a dtype's name in either byte order; that of np.longdouble depends on the machine."""
    return "longdouble" if dtype == np.longdouble and dtype != np.float64 else dtype.name


def rows(random: Random, rng: np.random.Generator, shape: tuple[int, int], dtype: str):
    """Return rows of logits, of one family or each of its own, some of them with infinities."""
    if dtype not in FORMATS:
        return integers(random, rng, shape, dtype)
    format = FORMATS[dtype]
    if random.random() < 0.75 or shape[0] < 2:
        x = random.choice(FAMILIES)(rng, *shape, format)
    else:
        each = [random.choice(FAMILIES)(rng, 1, shape[1], format) for _ in range(shape[0])]
        x = np.concatenate(each)
    if x.size and random.random() < 0.25:
        _spoil(rng, x)
    with np.errstate(all="ignore"):
        return np.clip(x, -format.max, format.max, where=~np.isinf(x), out=x).astype(format.dtype)


def integers(random: Random, rng: np.random.Generator, shape: tuple[int, ...], dtype: str):
    """Return integers: small ones, any, or those at the ends of their range."""
    info = np.iinfo(dtype)
    kind = random.choice(("small", "small", "any", "ends"))
    if kind == "small":
        return rng.integers(max(info.min, -20), 20, size=shape, dtype=dtype)
    if kind == "any":
        return rng.integers(info.min, info.max, size=shape, dtype=dtype, endpoint=True)
    ends = np.asarray([info.min, info.max, info.max - 1, 0], dtype)
    return ends[rng.integers(4, size=shape)]


def _spoil(rng: np.random.Generator, x: np.ndarray) -> None:
    """Put infinities and nans into some of the rows."""
    for row in np.flatnonzero(rng.random(len(x)) < 0.5):
        kind, at = rng.integers(7), rng.integers(x.shape[1])
        if kind < 3:
            x[row, at] = (np.nan, np.inf, -np.inf)[kind]
        elif kind == 3:
            x[row, rng.random(x.shape[1]) < 0.5] = -np.inf
        elif kind == 4:
            x[row] = -np.inf
        elif kind == 5:
            x[row] = np.inf
        else:
            some = rng.random(x.shape[1]) < 0.3
            x[row, some] = rng.choice([np.nan, np.inf, -np.inf], size=int(some.sum()))


# --------------------------------------------------------------------------- families of rows

Family = Callable[[np.random.Generator, int, int, Format], np.ndarray]


def _normal(rng, r, n):
    return rng.standard_normal((r, n)).astype(np.longdouble)


def plain(rng, r, n, format):
    return _normal(rng, r, n) * rng.choice([0.01, 1.0, 5.0, 30.0])


def ties(rng, r, n, format):
    return np.round(_normal(rng, r, n) * 2)


def constant(rng, r, n, format):
    return np.repeat(_normal(rng, r, 1) * 10, n, axis=1)


def confident(rng, r, n, format):
    x = _normal(rng, r, n)
    if n:
        top = rng.integers(n, size=r)
        x[np.arange(r), top] += rng.uniform(5, format.depth * 1.05, size=r)
    return x


def spread(rng, r, n, format):
    return rng.uniform(-1.1 * format.depth, 0, size=(r, n)).astype(np.longdouble)


def offset(rng, r, n, format):
    most = min(1e9, float(format.max) / 4)
    return _normal(rng, r, n) + min(10.0 ** rng.uniform(1, 9), most) * rng.choice([-1, 1])


def coarse(rng, r, n, format):
    """Numbers so large that a unit in their last place is worth an exp, or more than its range."""
    exponent = rng.integers(format.bits - 3, format.bits + 12, size=(r, 1))
    largest = np.ldexp(1 + rng.random((r, 1)).astype(np.longdouble), exponent)
    unit = np.ldexp(np.longdouble(1), exponent - format.bits + 1)
    return largest * rng.choice([-1, 1], size=(r, 1)) - unit * rng.integers(4, size=(r, n))


def huge(rng, r, n, format):
    return rng.uniform(-1, 1, size=(r, n)) * (format.max * rng.choice([1.0, 0.49, 1e-3]))


def tiny(rng, r, n, format):
    return _normal(rng, r, n) * (format.smallest_normal * rng.choice([1.0, 0.01]))


def log_probabilities(rng, r, n, format):
    p = rng.standard_gamma(rng.choice([0.1, 1.0]), size=(r, n)).astype(np.longdouble) + 1e-300
    return np.log(p) - np.log(p.sum(axis=1, keepdims=True))


def one_apart(rng, r, n, format):
    """Rows of -span, ..., -span, 0: one sum of many equal terms."""
    x = np.full((r, n), -rng.uniform(0, format.depth), np.longdouble)
    if n:
        x[:, rng.integers(n)] = 0
    return x


FAMILIES: tuple[Family, ...] = (
    plain, plain, plain, ties, constant, confident, confident, spread, offset, coarse, huge, tiny,
    log_probabilities, one_apart,
)  # fmt: skip


def upstream(random: Random, rng: np.random.Generator, shape: tuple[int, ...], dtype: str):
    """Return an upstream gradient: of one magnitude, with zeros, seldom with infinities."""
    x = np.asarray(rng.standard_normal(shape) * random.choice((1.0, 1e-3, 100.0)))
    if random.random() < 0.3:
        x[rng.random(shape) < 0.5] = 0.0
    if x.size and random.random() < 0.06:
        x.flat[rng.integers(x.size)] = random.choice((np.inf, -np.inf, np.nan))
    return np.asarray(x).astype(np_dtype(dtype))
