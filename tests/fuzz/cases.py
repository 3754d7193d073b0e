"""A call of the package, drawn from a seed and a number."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tests.backends import np_dtype
from tests.fuzz import draw_losses, values, wrong
from tests.fuzz.draw import (
    Argument,
    Draw,
    Traits,
    answer_dtype,
    from_rows,
    mask,
    rows_of,
    shape_and_axis,
)

# How often each function is drawn.
FUNCTIONS = {
    "softmax": 14,
    "log_softmax": 14,
    "logsumexp": 16,
    "softmax_vjp": 8,
    "log_softmax_vjp": 8,
    "softmax_jacobian": 4,
    "cross_entropy": 12,
    "cross_entropy_value_and_grad": 24,
    "linear_cross_entropy": 2,
    "linear_cross_entropy_value_and_grad": 6,
    "entmax": 6,
    "sparsemax": 3,
    "entropy": 4,
    "entropy_value_and_grad": 4,
    "logmeanexp": 4,
    "logcumsumexp": 4,
    "kl_divergence": 5,
    "kl_divergence_value_and_grad": 5,
    "sigmoid_cross_entropy": 3,
    "sigmoid_cross_entropy_value_and_grad": 6,
}
LOSSES = ("cross_entropy", "cross_entropy_value_and_grad")
LINEAR = ("linear_cross_entropy", "linear_cross_entropy_value_and_grad")
DIVERGENCES = ("kl_divergence", "kl_divergence_value_and_grad")
ENTROPIES = ("entropy", "entropy_value_and_grad")
FAMILY = ("entmax", "sparsemax", *ENTROPIES, "logmeanexp", "logcumsumexp", *DIVERGENCES)
BINARY = ("sigmoid_cross_entropy", "sigmoid_cross_entropy_value_and_grad")
VJPS = ("softmax_vjp", "log_softmax_vjp")

SUMS = ("logsumexp", "logmeanexp")  # all axes by default

POSITIONAL = ("x", "other", "y", "log_y", "hidden", "classifier", "logits", "labels", "dy")


class Refused(NamedTuple):
    """The error that a call has to raise, and what its message has to name."""

    error: type[Exception]
    names: str


@dataclass
class Case:
    """A call: positional and keyword arrays by name, and the other options."""

    seed: int
    number: int
    function: str
    arrays: dict[str, Argument]
    options: dict[str, Any] = field(default_factory=dict)
    refused: Refused | None = None

    @property
    def first(self) -> np.ndarray:
        return next(iter(self.arrays.values())).values

    @property
    def axes(self) -> tuple[int, ...]:
        """The reduced axes, non-negative and in order."""
        default = None if self.function in SUMS else -1
        axis = self.options.get("axis", default)
        ndim = self.first.ndim
        if axis is None:
            return tuple(range(ndim))
        given = axis if isinstance(axis, tuple) else (axis,)
        return tuple(sorted(int(a) % ndim for a in given))

    def values(self, name: str) -> np.ndarray | None:
        return self.arrays[name].values if name in self.arrays else None

    def __str__(self) -> str:
        said = [f"{n}: {a.values.dtype}{list(a.values.shape)} {a.layout}" for n, a in
                self.arrays.items()]  # fmt: skip
        said += [f"{k}={v!r}" for k, v in self.options.items()]
        return f"{self.function}({', '.join(said)})"


def make(traits: Traits, seed: int, number: int, functions: tuple[str, ...] = ()) -> Case:
    """Return the case of a number."""
    draw = Draw(traits, seed, number)
    chosen = {f: w for f, w in FUNCTIONS.items() if not functions or f in functions}
    function = draw.weighted(chosen)
    one_axis = function in (*LOSSES, *LINEAR, "softmax_jacobian", "logcumsumexp", *DIVERGENCES)
    dtype = _dtype(draw, function)
    shape, axis = shape_and_axis(draw, dtype, one_axis=one_axis)
    if function in LINEAR:
        dtype = dtype if dtype in values.FORMATS and dtype != "longdouble" else "float64"
        shape, axis = (*shape[:-1], min(shape[-1], 64)), -1
        if draw.traits.library == "dask" and 0 in shape[:-1]:  # it reshapes no more axes of it
            shape = (0, shape[-1])
    if function == "softmax_jacobian":
        shape = tuple(min(n, 20) for n in shape)
    case = Case(seed, number, function, {}, {})
    default = None if function in SUMS else -1
    if function not in (*BINARY, *LINEAR) and (axis != default or draw.chance() < 0.3):
        case.options["axis"] = axis
    if function in BINARY:
        draw_losses.fill_binary(draw, case, shape, axis, dtype)
    elif function in (*LOSSES, *LINEAR):
        draw_losses.fill(draw, case, shape, axis, dtype)
        if function in LINEAR:
            draw_losses.make_linear(draw, case)
            return case
    elif function in VJPS or function == "softmax_jacobian":
        _fill_from_output(draw, case, shape, axis, dtype)
    elif function in FAMILY:
        _fill_family(draw, case, shape, axis, dtype)
    else:
        _fill_rows(draw, case, shape, axis, dtype)
    return wrong.spoil(draw, case) if draw.chance() < 0.03 else case


def _dtype(draw: Draw, function: str) -> str:
    floats = dict.fromkeys(draw.traits.floats, 1.0)
    floats["float32"] = floats["float64"] = 4.0
    if "longdouble" in floats:
        floats["longdouble"] = 0.5
    if function in (*VJPS, *LINEAR, "softmax_jacobian") or draw.chance() < 0.88:
        return draw.weighted(floats)
    return draw.one_of(draw.traits.integers)


# --------------------------------------------------------------------------- the softmax family


TEMPERATURES = (
    0.5, 2.0, 0.1, 10.0, 0.7, 3, 1, 1e-3, 1e3, np.float32(0.3), 1e-30, 1e30, 1e-300, 1e300, 5e-324,
)  # fmt: skip


def _fill_rows(draw: Draw, case: Case, shape: tuple[int, ...], axis: Any, dtype: str) -> None:
    axes, folded = rows_of(shape, axis)
    x = from_rows(values.rows(draw.random, draw.rng, folded, dtype), shape, axes)
    is_sum = case.function == "logsumexp"
    if is_sum and draw.chance() < 0.12 and dtype in draw.traits.complex_of:
        turned = np.asarray(draw.rng.uniform(-7, 7, size=shape))
        x = np.clip(x, -1e4, 1e4) + (1j * turned).astype("c16")
        x = x.astype("complex64" if dtype == "float32" else "complex128")
    case.arrays["x"] = draw.argument(draw.in_byte_order(x))
    if draw.chance() < 0.25:
        case.arrays["where"] = draw.argument(mask(draw, shape))
    if is_sum:
        if draw.chance() < 0.35:
            case.arrays["b"] = draw.argument(_weights(draw, shape, dtype))
        for option in ("keepdims", "return_sign"):
            if draw.chance() < 0.3:
                case.options[option] = draw.one_of((True, True, False))
    else:
        if draw.chance() < 0.3:
            case.options["temperature"] = draw.one_of(TEMPERATURES)
        if draw.chance() < 0.25:
            _sink(draw, case, shape, axes, dtype)
    answer_dtype(draw, case)


SINKS = (0.0, 0, -3.5, 2, 60.0, -90.0, 1e5, -np.inf)


def _sink(draw: Draw, case: Case, shape: tuple[int, ...], axes: Any, dtype: str) -> None:
    """Give a case a sink, a number or one per row."""
    if draw.chance() < 0.5:
        case.options["sink"] = draw.one_of(SINKS)
        return
    kept = [1 if a in axes or draw.chance() < 0.2 else n for a, n in enumerate(shape)]
    sink = np.asarray(draw.rng.standard_normal(kept) * draw.one_of((1.0, 30.0)))
    if draw.chance() < 0.2:
        sink = np.where(draw.rng.random(kept) < 0.3, -np.inf, sink)
    own = dtype if dtype in values.FORMATS else draw.traits.default_float
    name = own if draw.chance() < 0.8 else draw.one_of(draw.traits.floats)
    case.arrays["sink"] = draw.argument(np.asarray(sink).astype(np_dtype(name)))


ALPHAS = (1, 1.0, 1 + 1e-12, 1.001, 1.1, 1.25, 1.5, 1.5, 1.75, 2, 2.0, 2.5, 3.0, 7, 1e3, np.inf)


def _fill_family(draw: Draw, case: Case, shape: tuple[int, ...], axis: Any, dtype: str) -> None:
    """Give a case of the rest of the family its logits and options."""
    axes, folded = rows_of(shape, axis)
    x = from_rows(values.rows(draw.random, draw.rng, folded, dtype), shape, axes)
    case.arrays["x"] = draw.argument(draw.in_byte_order(x))
    if case.function == "entmax":
        case.options["alpha"] = draw.one_of(ALPHAS)
    elif case.function == "logmeanexp":
        if draw.chance() < 0.3:
            case.arrays["where"] = draw.argument(mask(draw, shape))
        if draw.chance() < 0.3:
            case.options["keepdims"] = draw.one_of((True, True, False))
    elif case.function in DIVERGENCES:
        other = from_rows(values.rows(draw.random, draw.rng, folded, dtype), shape, axes)
        if dtype in values.FORMATS and draw.chance() < 0.5:  # close to each other
            scale = draw.one_of((0.0, 1e-6, 1e-3, 0.1))
            near = x.astype(np.longdouble) * (1 + scale * draw.rng.standard_normal(shape))
            other = np.asarray(near).astype(x.dtype)
        case.arrays["other"] = draw.argument(draw.in_byte_order(other))
        case.options["reduction"] = draw.one_of(("none", "none", "sum", "mean"))
        if draw.chance() < 0.3:
            case.options["temperature"] = draw.one_of((0.5, 2.0, 3, 10.0))
        if draw.chance() < 0.3:
            case.options["distillation"] = True


def _weights(draw: Draw, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    smaller = [1 if draw.chance() < 0.2 else n for n in shape]
    if draw.chance() < 0.15:
        smaller = smaller[draw.random.randint(0, len(shape)) :]
    b = np.asarray(draw.rng.standard_normal(smaller))
    kind = draw.one_of(("signed", "positive", "zeros", "equal", "special"))
    if kind == "positive":
        b = np.abs(b)
    elif kind == "zeros":
        b = np.where(draw.rng.random(smaller) < 0.4, 0.0, b)
    elif kind == "equal":
        b = np.asarray(draw.rng.choice([-1.0, 1.0], size=smaller))
    elif kind == "special":
        special = draw.rng.choice([np.inf, -np.inf, np.nan, 0.0], size=smaller)
        b = np.where(draw.rng.random(smaller) < 0.1, special, b)
    return np.asarray(b).astype(np_dtype(dtype if dtype in values.FORMATS else "float64"))


def _fill_from_output(draw: Draw, case: Case, shape: tuple[int, ...], axis: Any, dtype: str):
    axes, folded = rows_of(shape, axis)
    x = values.rows(draw.random, draw.rng, folded, dtype).astype(np.longdouble)
    with np.errstate(all="ignore"):
        y = np.exp(x - x.max(axis=1, keepdims=True, initial=-np.inf))
        y = y / y.sum(axis=1, keepdims=True)
        name, y = ("log_y", np.log(y)) if case.function == "log_softmax_vjp" else ("y", y)
        y = from_rows(y.astype(np_dtype(dtype)), shape, axes)
    case.arrays[name] = draw.argument(draw.in_byte_order(y))
    if case.function != "softmax_jacobian":
        other = dtype if draw.chance() < 0.85 else draw.one_of(draw.traits.floats)
        dy = values.upstream(draw.random, draw.rng, shape, other)
        case.arrays["dy"] = draw.argument(draw.in_byte_order(dy))
