"""The labels and options of a loss, drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.backends import np_dtype
from tests.fuzz import values
from tests.fuzz.draw import Draw, answer_dtype, from_rows, mask, rows_of

if TYPE_CHECKING:
    from tests.fuzz.cases import Case


def fill(draw: Draw, case: Case, shape: tuple[int, ...], axis: Any, dtype: str) -> None:
    """Give a case logits, labels and options."""
    at = int(axis) % len(shape)
    axes, folded = rows_of(shape, axis)
    n = shape[at]
    x = from_rows(values.rows(draw.random, draw.rng, folded, dtype), shape, axes)
    case.arrays["logits"] = draw.argument(draw.in_byte_order(x))
    if n and draw.chance() < 0.22:
        case.arrays["labels"] = draw.argument(_distribution(draw, folded, shape, axes, dtype))
    else:
        # As a model that was trained has it: mostly the largest logit is the label's.
        likely = np.asarray(x.argmax(axis=at)) if n and x.size and draw.chance() < 0.5 else None
        _indices(draw, case, (*shape[:at], *shape[at + 1 :]), n, likely)
    case.arrays.update(_arrays(draw, case, shape, n, dtype))
    case.options.update(_numbers(draw))
    if draw.chance() < 0.2:
        samples = _samples(draw, (*shape[:at], *shape[at + 1 :]), dtype)
        case.arrays["sample_weight"] = draw.argument(samples)
    answer_dtype(draw, case)


def make_linear(draw: Draw, case: Case) -> None:
    """Make logits the product of themselves and of the unit matrix, which rounds nothing."""
    logits = case.arrays.pop("logits").values
    hidden = np.where(np.isfinite(logits), logits, np.zeros_like(logits))
    n, dtype = hidden.shape[-1], hidden.dtype
    case.arrays = {
        "hidden": draw.argument(hidden),
        "classifier": draw.argument(np.eye(n).astype(dtype), plain=1.0),
        **case.arrays,
    }
    if draw.chance() < 0.3:
        case.arrays["bias"] = draw.argument(np.zeros(n, dtype), plain=1.0)


def fill_binary(draw: Draw, case: Case, shape: tuple[int, ...], axis: Any, dtype: str) -> None:
    """Give a case logits, yes-or-no labels and options."""
    axes, folded = rows_of(shape, axis)
    z = from_rows(values.rows(draw.random, draw.rng, folded, dtype), shape, axes)
    case.arrays["logits"] = draw.argument(draw.in_byte_order(z))
    own = dtype if dtype in values.FORMATS else draw.traits.default_float
    t = np.asarray(draw.rng.random(shape))
    name = draw.one_of((own, own, "bool", draw.one_of(draw.traits.labels), "probabilities"))
    if name == "probabilities":
        name = own
    else:
        t = np.asarray(t < 0.5)
    case.arrays["labels"] = draw.argument(np.asarray(t.astype(np_dtype(name))))
    for name in ("weight", "pos_weight"):
        if draw.chance() < 0.25:
            smaller = [1 if draw.chance() < 0.3 else n for n in shape]
            smaller = smaller[draw.random.randint(0, len(shape)) :]
            case.arrays[name] = draw.argument(_samples(draw, tuple(smaller), dtype))
    if draw.chance() < 0.5:
        case.options["focal_gamma"] = draw.one_of((0, 0.0, 0.5, 1, 2.0, 2.0, 3.7, 5.0))
    if draw.chance() < 0.3:
        case.options["label_smoothing"] = draw.one_of((0.1, 0.0, 1, 1e-6, 0.9))
    if draw.chance() < 0.75:
        case.options["reduction"] = draw.one_of(("none", "sum", "mean"))


def _samples(draw: Draw, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Return weights of positions or entries, of which some may be 0."""
    weight = np.asarray(draw.rng.choice([0.5, 1.0, 2.0, 0.25, 3.0, 100.0], size=shape))
    weight = weight * (draw.rng.random(shape) >= draw.one_of((0.0, 0.3, 0.3, 1.0)))
    name = dtype if dtype in values.FORMATS else draw.traits.default_float
    if draw.chance() < 0.2:
        name = draw.one_of((*draw.traits.floats, "int64"))
    return np.asarray(weight).astype(np_dtype(name))


def _distribution(
    draw: Draw, folded: tuple[int, int], shape: tuple[int, ...], axes: tuple[int, ...], dtype: str
) -> np.ndarray:
    kind = draw.one_of(("one-hot", "one-hot integers", "probabilities", "sparse", "any"))
    r, n = folded
    t: np.ndarray
    if kind.startswith("one-hot"):
        t = np.zeros((r, n))
        t[np.arange(r), draw.rng.integers(n, size=r)] = 1.0
    else:
        t = draw.rng.random((r, n))
        if kind == "sparse":
            t = t * (draw.rng.random((r, n)) < 0.5)
        if kind != "any":
            t = t / np.maximum(t.sum(axis=1, keepdims=True), 1e-3)
    if kind == "one-hot integers":
        name = draw.one_of(draw.traits.labels)
    else:
        own = dtype if dtype in values.FORMATS else draw.traits.default_float
        name = own if draw.chance() < 0.8 else draw.one_of(draw.traits.floats)
    return from_rows(draw.in_byte_order(t.astype(np_dtype(name))), shape, axes)


def _indices(
    draw: Draw, case: Case, positions: tuple[int, ...], n: int, likely: np.ndarray | None
) -> None:
    """Draw class indices, some of them ignored and some wrong."""
    dtype = draw.one_of(draw.traits.labels)
    info = np.iinfo(dtype)
    most = min(n - 1, info.max)
    labels = np.zeros(positions, dtype)
    if n:
        labels = draw.rng.integers(0, most, size=positions, dtype=dtype, endpoint=True)
        if likely is not None:
            often = (draw.rng.random(positions) < 0.8) & (likely <= most)
            labels = np.where(often, likely.astype(dtype), labels)
    if draw.chance() < 0.35:
        ignored = draw.one_of((
            -100, -1, n, 0, most, n // 2, 255, info.max, info.min, 2**63, 2**64 - 1, -(2**63),
            2**31, 10**30, -(10**30),
        ))  # fmt: skip
        case.options["ignore_index"] = max(ignored, 0) if ignored == most else ignored
        ignored = case.options["ignore_index"]
        if info.min <= ignored <= info.max:
            some = draw.rng.random(positions) < draw.one_of((0.3, 0.3, 0.9, 1.0))
            labels = np.where(some, np.asarray(ignored, dtype), labels)
    if draw.chance() < 0.1 and labels.size:
        bad = [v for v in (-1, -100, n, n + 1, info.max, info.min, 2**63, 2**64 - 1)
               if info.min <= v <= info.max]  # fmt: skip
        for at in draw.random.sample(range(labels.size), min(labels.size, draw.one_of((1, 1, 2)))):
            labels.flat[at] = draw.one_of(bad)
    if draw.chance() < 0.25:
        case.options["check_labels"] = draw.one_of((False, False, True))
    case.arrays["labels"] = draw.argument(draw.in_byte_order(np.asarray(labels)))


def _arrays(draw: Draw, case: Case, shape: tuple[int, ...], n: int, dtype: str) -> dict[str, Any]:
    found = {}
    if draw.chance() < 0.3:
        weight = draw.rng.choice([0.5, 1.0, 2.0, 1e-3, 100.0], size=n)
        kind = draw.one_of(("plain", "plain", "zeros", "zero", "negative", "special"))
        if kind == "zeros":
            weight = np.where(draw.rng.random(n) < 0.5, 0.0, weight)
        elif kind == "zero":
            weight = weight * 0
        elif kind == "negative":
            weight = weight * draw.rng.choice([-1, 1], size=n)
        elif kind == "special" and n:
            weight[draw.rng.integers(n)] = draw.one_of((np.inf, np.nan, -np.inf))
        name = dtype if dtype in values.FORMATS else draw.traits.default_float
        if draw.chance() < 0.2:
            name = draw.one_of(draw.traits.floats)
            if draw.chance() < 0.3 and kind != "special":
                name, weight = draw.one_of(draw.traits.labels), np.abs(np.round(weight))
        found["weight"] = draw.argument(draw.in_byte_order(weight.astype(np_dtype(name))))
    if draw.chance() < 0.15:
        where = mask(draw, shape)
        if draw.chance() < 0.7 and case.first.shape != case.arrays["labels"].values.shape:
            where = _with_labels(case, where, shape)
        found["where"] = draw.argument(where)
    return found


def _with_labels(case: Case, where: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Let the labels' classes take part."""
    (at,) = case.axes
    labels = np.expand_dims(case.arrays["labels"].values, at)
    classes = np.arange(shape[at]).reshape([-1 if a == at else 1 for a in range(len(shape))])
    return np.asarray(np.broadcast_to(where, shape) | (labels == classes))


def _numbers(draw: Draw) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if draw.chance() < 0.25:
        found["label_smoothing"] = draw.one_of((0.1, 0.1, 0.0, 1, 1e-6, 0.9, 5e-324))
    if draw.chance() < 0.2:
        found["z_loss"] = draw.one_of((1e-4, 0.1, 0, 1.0))
    if draw.chance() < 0.2:
        found["softcap"] = draw.one_of((30.0, 5.0, 50, 0.5, 1e4, 1e40, 1e300))
    if draw.chance() < 0.75:
        found["reduction"] = draw.one_of(("none", "sum", "mean"))
    return found
