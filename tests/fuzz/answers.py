"""What a case should answer: arrays with tolerances, or an error."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from tests.fuzz import binary, family, losses, reference
from tests.fuzz.cases import BINARY, FAMILY, LINEAR, LOSSES, Case, Refused
from tests.fuzz.draw import Traits, from_rows, to_rows
from tests.fuzz.reference import Answer, L, Rounding
from tests.fuzz.values import FORMATS, name_of


class Expected(NamedTuple):
    """The answers of a call in their shapes, and the dtype of each by name."""

    answers: tuple[Answer, ...]
    dtypes: tuple[str, ...]


def expected(
    case: Case, traits: Traits, *, reads_labels: bool, flushes: bool
) -> Expected | Refused:
    """Return what a case should answer."""
    if case.refused:
        return case.refused
    x, given = case.first, case.first
    dtype = name_of(x.dtype) if x.dtype.kind != "c" else x.dtype.name
    if dtype in ("complex64", "complex128"):
        rounding = Rounding.of({"complex64": "float32"}.get(dtype, "float64"), flushes=flushes)
    else:
        if dtype not in FORMATS:  # integers are promoted before anything is subtracted
            dtype = traits.default_float
            x = x.astype(dtype)
        rounding = Rounding.of(dtype, flushes=flushes)
    own, answer = rounding, case.options.get("dtype")
    if answer is not None:
        rounding = rounding.answered_in(answer)
        if given.dtype.kind in "iu":
            x = given.astype(rounding.compute.dtype)
    with np.errstate(all="ignore"):
        if case.function in LOSSES:
            return _loss(case, x, rounding, own.result.name, reads_labels)
        if case.function in LINEAR:
            return _linear(case, x, rounding, own.result.name, reads_labels)
        if case.function in BINARY:
            return _binary(case, x, dtype, rounding)
        found = (_family if case.function in FAMILY else _rows)(case, x, rounding)
    last = dtype if given.dtype.kind == "c" else rounding.result.name
    dtypes = (*(rounding.result.name,) * (len(found) - 1), last)
    return Expected(found, dtypes)


def _rows(case: Case, x: np.ndarray, rounding: Rounding) -> tuple[Answer, ...]:
    """Return the answers of the softmax family."""
    axes, shape, options = case.axes, x.shape, case.options
    # A reduction over no axis folds each entry alone.
    rows = to_rows(x, axes)
    if case.function == "softmax_jacobian":
        answer = reference.softmax_jacobian(rows, rounding)
        kept = [n for a, n in enumerate(shape) if a not in axes]
        return (Answer(*(part.reshape(*kept, rows.shape[1], rows.shape[1]) for part in answer)),)
    if case.function.endswith("_vjp"):
        dy = case.values("dy")
        assert dy is not None
        dy = to_rows(dy.astype(FORMATS[rounding.compute.name].dtype), axes)
        answer = getattr(reference, case.function)(rows, dy, rounding)
        return (_whole(answer, shape, axes),)
    where = case.values("where")
    live = np.broadcast_to(True if where is None else where, shape)
    live = to_rows(live, axes)
    if case.function in ("softmax", "log_softmax"):
        temperature = float(options.get("temperature", 1.0))
        sink = options.get("sink", case.values("sink"))
        if sink is not None:  # one entry of each row more
            kept = tuple(1 if a in axes else n for a, n in enumerate(shape))
            sink = np.broadcast_to(np.asarray(sink).astype(rounding.compute.dtype), kept)
            rows = np.concatenate([rows.astype(np.longdouble), to_rows(sink, axes)], axis=1)
            live = np.concatenate([live, np.ones((len(live), 1), bool)], axis=1)
        answer = getattr(reference, case.function)(rows, live, rounding, temperature)
        if rounding.flushes:
            lost = _flushed(rows, rounding.compute, temperature)[:, None]
            answer = answer._replace(tolerance=np.where(lost, np.nan, answer.tolerance))
        if sink is not None:
            answer = Answer(*(part[:, :-1] for part in answer))
        return (_whole(answer, shape, axes),)
    return tuple(_sums(case, rows, live, rounding, shape))


def _flushed(rows: np.ndarray, compute: Any, temperature: float) -> np.ndarray:
    """Return which rows lose a logit or a difference that counts, over a low temperature."""
    tiny = compute.smallest_normal
    if tiny <= compute.u * temperature:
        return np.zeros(len(rows), bool)
    sizes = np.abs(
        np.concatenate([rows, rows - rows.max(axis=1, keepdims=True, initial=-np.inf)], axis=1)
    )
    return ((sizes > 0) & (sizes < tiny)).any(axis=1)


def _family(case: Case, x: np.ndarray, rounding: Rounding) -> tuple[Answer, ...]:
    """Return the answer of a function of the rest of the family."""
    axes, shape, options = case.axes, x.shape, case.options
    rows = to_rows(x, axes).astype(rounding.compute.dtype)
    if case.function in ("entmax", "sparsemax"):
        answer = family.entmax(rows, float(options.get("alpha", 2.0)), rounding)
        return (_whole(answer, shape, axes),)
    if case.function == "logcumsumexp":
        return (_whole(family.logcumsumexp(rows, rounding), shape, axes),)
    if case.function == "entropy":
        answer, _ = family.entropy(rows, rounding)
    elif case.function == "entropy_value_and_grad":
        answer, slope = family.entropy(rows, rounding)
        kept = [n for a, n in enumerate(shape) if a not in axes]
        return Answer(*(part.reshape(kept) for part in answer)), _whole(slope, shape, axes)
    elif case.function == "logmeanexp":
        where = case.values("where")
        live = to_rows(np.broadcast_to(True if where is None else where, shape), axes)
        answer = family.logmeanexp(rows, live, rounding)
    else:
        return _divergence(case, rows, rounding)
    keep = options.get("keepdims", False)
    kept = [1 if a in axes else n for a, n in enumerate(shape) if keep or a not in axes]
    return (Answer(*(part.reshape(kept) for part in answer)),)


def _divergence(case: Case, rows: np.ndarray, rounding: Rounding) -> tuple[Answer, ...]:
    """Return the divergence and, if they are asked for, the gradients by both arguments."""
    axes, shape, options = case.axes, case.first.shape, case.options
    other = case.values("other")
    assert other is not None
    other = to_rows(other, axes).astype(rounding.compute.dtype)
    t, reduction = float(options.get("temperature", 1)), options.get("reduction", "mean")
    factor = L(t) ** 2 if options.get("distillation") else L(1)
    value, *by = family.kl_divergence(rows, other, t, factor, reduction, rounding)
    if reduction == "none":
        kept = [n for a, n in enumerate(shape) if a not in axes]
        value = Answer(*(part.reshape(kept) for part in value))
    if not case.function.endswith("grad"):
        return (value,)
    return value, *(_whole(slope, shape, axes) for slope in by)


def _sums(case: Case, rows: Any, live: Any, rounding: Rounding, shape: tuple[int, ...]) -> Any:
    """Return logsumexp, and its sign if that is asked for."""
    b, signed = case.values("b"), case.options.get("return_sign", False)
    given = np.ones(shape) if b is None else np.broadcast_to(b, shape)
    if b is not None:  # as it is cast
        given = given.astype(rounding.compute.dtype)
    given = to_rows(given, case.axes)
    if rows.dtype.kind == "c":
        answer = reference.complex_logsumexp(rows, live, given, rounding)
        if signed:  # log|s| and a unit complex number: only the first is judged
            size = Answer(answer.values.real, answer.tolerance)
            sign = Answer(answer.values, np.full_like(answer.tolerance, np.nan))
            found = (size, sign)
        else:
            found = (answer,)
    elif b is None:
        value = reference.logsumexp(rows, live, rounding)
        sign = np.where(np.isneginf(value.values), 0, np.where(np.isnan(value.values), np.nan, 1))
        found = (value, Answer(sign, np.zeros(sign.shape)))
    else:
        value, sign = reference.weighted_logsumexp(rows, live, given, rounding)
        if not signed:
            negative = sign.values < 0
            value = Answer(np.where(negative, np.nan, value.values), value.tolerance)
        found = (value, sign)
    axes, keep = case.axes, case.options.get("keepdims", False)
    kept = [1 if a in axes else n for a, n in enumerate(shape) if keep or a not in axes]
    for answer in found[: 1 + bool(signed)]:
        yield Answer(*(part.reshape(kept) for part in answer))


def _whole(answer: Answer, shape: tuple[int, ...], axes: tuple[int, ...]) -> Answer:
    full = [
        np.broadcast_to(part, (_rows_of(shape, axes), _classes(shape, axes))) for part in answer
    ]
    return Answer(*(from_rows(part, shape, axes) for part in full))


def _rows_of(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    return math.prod(n for a, n in enumerate(shape) if a not in axes)


def _classes(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    return math.prod(shape[a] for a in axes)


def _loss(
    case: Case, x: np.ndarray, rounding: Rounding, own: str, reads_labels: bool
) -> Expected | Refused:
    axes, shape, options = case.axes, x.shape, case.options
    rows = to_rows(x, axes)
    where, weight, labels = case.values("where"), case.values("weight"), case.values("labels")
    live = to_rows(np.broadcast_to(True if where is None else where, shape), axes)
    compute = rounding.compute.dtype
    assert labels is not None
    if labels.shape == shape:
        t = to_rows(labels.astype(compute), axes).astype(np.longdouble)
        none = np.zeros((len(rows), 1), bool)
        to = losses.Target(t, None, none, none)
    else:
        to = losses.target(labels, shape[axes[0]], live, options.get("ignore_index"))
    samples = case.values("sample_weight")
    if samples is not None:
        samples = samples.astype(compute).astype(np.longdouble).reshape(-1, 1)
        to = to._replace(ignored=to.ignored | (samples == 0), wrong=to.wrong & (samples != 0))
    raises = to.wrong.any() and options.get("check_labels", True)
    if raises and to.index is not None and reads_labels:
        return Refused(IndexError, "label")
    given = losses.Options(
        weight=None if weight is None else weight.astype(compute)[None, :],
        smoothing=float(options.get("label_smoothing", 0.0)),
        z_loss=float(options.get("z_loss", 0.0)),
        softcap=None if options.get("softcap") is None else float(options["softcap"]),
        live=live,
        masked=where is not None,
        reduction=options.get("reduction", "mean"),
        samples=samples,
    )
    loss, grad = losses.value_and_grad(rows.astype(compute), to, given, rounding, FORMATS[own])
    if given.reduction == "none":
        positions = [n for a, n in enumerate(shape) if a not in axes]
        loss = Answer(*(part.reshape(positions) for part in loss))
    grad = _whole(grad, shape, axes)
    if case.function == "cross_entropy":
        return Expected((loss,), (rounding.result.name,))
    return Expected((loss, grad), (rounding.result.name, own))


def _linear(
    case: Case, x: np.ndarray, rounding: Rounding, own: str, reads_labels: bool
) -> Expected | Refused:
    """Return the answers of a linear layer whose classifier is the unit matrix."""
    both = _loss(replace(case, function=LOSSES[1]), x, rounding, own, reads_labels)
    if isinstance(both, Refused):
        return both
    loss, grad = both.answers
    if case.function == LINEAR[0]:
        return Expected((loss,), both.dtypes[:1])
    # Gradients are sums over the positions, of what a half type may have rounded before.
    g, slack, hidden = (to_rows(a, case.axes) for a in (*grad, x.astype(np.longdouble)))
    # A product with the unit matrix spreads what is nan, or not known.
    g, slack = (np.where(np.isnan(a).any(1, keepdims=True), np.nan, a) for a in (g, slack))
    u = len(g) * rounding.compute.u + FORMATS[own].u
    found = [loss, _whole(Answer(g, slack), case.first.shape, case.axes)]
    for factor in (hidden, np.ones((len(g), 1))) if "bias" in case.arrays else (hidden,):
        values, size = g.T @ factor, np.abs(g).T @ np.abs(factor)
        # What underflows may have been divided, or be multiplied, by the weights of a mean.
        compute = rounding.compute
        lost = 2000 * len(g) * rounding.gone
        error = slack.T @ np.abs(factor) + u * size + lost
        # The sum before a mean divides it, and what is divided first, may leave the range.
        largest = np.maximum(size, np.max(np.abs(factor), initial=0))
        error = np.where(largest * (1000 * len(g)) > compute.max, np.nan, error)
        tolerance = rounding._replace(result=FORMATS[own]).tolerance(values, 1, error)
        found.append(Answer(values, tolerance))
    if "bias" in case.arrays:
        found[-1] = Answer(*(part[:, 0] for part in found[-1]))
    return Expected(tuple(found), (both.dtypes[0], *[own] * (len(found) - 1)))


def _binary(case: Case, z: np.ndarray, dtype: str, rounding: Rounding) -> Expected:
    """Return the answers of the loss of yes-or-no labels."""
    compute, options = rounding.compute.dtype, case.options
    arrays = [case.values(name) for name in ("labels", "weight", "pos_weight")]
    labels, *weights = (None if a is None else a.astype(compute) for a in arrays)
    given = binary.Options(
        *weights,
        gamma=float(options.get("focal_gamma", 0.0)),
        smoothing=float(options.get("label_smoothing", 0.0)),
        reduction=options.get("reduction", "mean"),
    )
    both = binary.value_and_grad(z.astype(compute), labels, given, rounding)
    count = 2 if case.function.endswith("grad") else 1
    return Expected(both[:count], (dtype,) * count)
