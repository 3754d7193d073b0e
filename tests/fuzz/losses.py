"""The loss and its gradient in extended precision, as `reference` has the softmax family."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tests.fuzz.reference import ANY, Answer, L, Rounding, fold, lost_to_underflow
from tests.fuzz.values import Format


class Target(NamedTuple):
    """Labels of rows: class indices or distributions, and what of them counts."""

    t: np.ndarray  # (r, n), one-hot for an index
    index: np.ndarray | None
    ignored: np.ndarray  # (r, 1)
    wrong: np.ndarray  # (r, 1)


class Options(NamedTuple):
    """The options, with every array in rows."""

    weight: np.ndarray | None
    smoothing: float
    z_loss: float
    softcap: float | None
    live: np.ndarray
    masked: bool
    reduction: str
    samples: np.ndarray | None = None


def target(labels: np.ndarray, n: int, live: np.ndarray, ignore: int | None) -> Target:
    """Sort class indices; Python's ints compare without wrap-around."""
    index = np.asarray([int(v) for v in labels.reshape(-1)], dtype=object).reshape(-1, 1)
    ignored = np.asarray([[ignore is not None and v == ignore] for v in index[:, 0]], bool).reshape(
        -1, 1
    )
    wrong = np.asarray([[not 0 <= v < n] for v in index[:, 0]], bool).reshape(-1, 1)
    safe = np.where(wrong, 0, index).astype(np.int64)
    if n:
        wrong = wrong | ~np.take_along_axis(live, safe, axis=1)
        t = (np.arange(n) == safe).astype(L)
    else:
        t = np.zeros((len(safe), 0), L)
    return Target(t, safe, ignored, wrong & ~ignored)


def value_and_grad(
    x: np.ndarray, to: Target, options: Options, rounding: Rounding, own: Format
) -> tuple[Answer, Answer]:
    """Return the reduced loss and the gradient of its sum, which is of the logits' own dtype."""
    with np.errstate(all="ignore"):
        loss, grad, slack = _value_and_grad(x.astype(L), to, options, rounding)
    return loss, Answer(grad, rounding._replace(result=own).tolerance(grad, 1, slack))


def _value_and_grad(x: Any, to: Target, options: Options, rounding: Rounding) -> Any:
    n, u, live, compute = x.shape[1], rounding.compute.u, options.live, rounding.compute
    harmless = ~live | to.ignored
    x = np.where(harmless, 0, x)
    cap, lost = options.softcap, L(0)
    capped = x
    if cap is not None:
        ratio = x / L(cap)
        # Beside a large cap it is x, which is not to be rounded: a row may be units apart.
        capped = np.where(np.abs(ratio) < 2.0**-33, x, L(cap) * np.tanh(ratio))
        finite = np.abs(np.where(np.isfinite(capped), capped, 0))
        lost = 8 * u * np.max(finite, axis=1, keepdims=True, initial=0)
    rows = fold(capped, live)
    gap = np.where(live, np.where(rows.bad, 0, rows.max) - capped, 0)
    surprise = gap + rows.log
    lse = np.where(rows.bad, 0, rows.max) + rows.log

    w = np.ones((1, n), L) if options.weight is None else options.weight.astype(L)
    if options.samples is not None:
        w = np.where(options.samples == 0, w, w * options.samples)
    e = L(options.smoothing)
    t = np.where(live, to.t, 0)
    count = np.maximum(live.sum(axis=1, keepdims=True), 1)
    # A Python number as it is given; by a count of `where` in the dtype of the computation.
    number = rounding.compute.dtype.type if options.masked else np.float64
    share = (number(options.smoothing) / count.astype(number)).astype(L)
    named = np.where(t == 0, 0, w * t)
    q = named * L(1.0 - options.smoothing) + (np.where(live, w * share, 0) if e else 0)
    total_q, label_weight = q.sum(axis=1, keepdims=True), named.sum(axis=1, keepdims=True)
    # Weights of both signs may cancel in that sum, and the roundings of its terms do not.
    terms_of_weight = np.abs(named).sum(axis=1, keepdims=True)

    z = L(options.z_loss)
    underflow = rounding.gone
    lost_rest = lost_to_underflow(rows, rounding)
    terms = np.where(q == 0, 0, q * surprise)
    squared = np.where(label_weight == 0, 0, z * label_weight * lse * lse)
    loss = terms.sum(axis=1, keepdims=True) + squared
    sizes = np.abs(terms).sum(axis=1, keepdims=True)
    lse_error = u * (6 * np.abs(lse) + 4 * np.maximum(1, np.abs(np.where(rows.bad, 0, rows.max))))
    # Eight units of a row's loss are promised, and the weight is one rounding more.
    rounded = 8 * rounding.ulp(sizes) if to.index is not None and not e else 24 * u * sizes
    if options.samples is not None:
        rounded = rounded + 2 * u * sizes
    error = (
        rounded
        + np.abs(q).sum(axis=1, keepdims=True) * (lost + lost_rest)
        + np.abs(z * label_weight) * 2 * np.abs(lse) * (lse_error + lost)
        + z * terms_of_weight * 8 * u * lse * lse
    )
    # Beyond the range, squares of weights of both signs may meet.
    opposed = (named < 0).any(axis=1, keepdims=True) & (z * lse * lse > compute.max)
    error = np.where(opposed, ANY, error)

    p = np.where(live, np.exp(-surprise), 0)
    slope = total_q + np.where(label_weight == 0, 0, 2 * z * label_weight * lse)
    if to.index is not None and not e:
        # At the label p A - q as -q (rest / (1 + rest)) + 2 z p u lse: nothing cancels but the two.
        others = _others(rows, to.index, gap)
        at_label = t * (-label_weight * others + p * (slope - total_q))
        grad = np.where(t == 1, at_label, p * slope)
        sizes = np.where(
            t == 1, np.abs(label_weight) * others + p * np.abs(slope - total_q), p * np.abs(slope)
        )
    else:
        grad = p * slope - q
        squares = np.where(terms_of_weight == 0, 0, 2 * z * terms_of_weight * np.abs(lse))
        terms_of_slope = np.abs(q).sum(axis=1, keepdims=True) + squares
        sizes = p * terms_of_slope + np.abs(q)
    depth = np.minimum(rows.span, rounding.compute.depth)
    slack = u * (16 + 4 * depth) * sizes + np.where(p > 0, p * np.abs(slope), 0) * (4 * lost)
    slack = slack + p * np.abs(2 * z * label_weight) * lse_error
    # Of a probability that underflows, or of an exponential that is a third of it.
    slack = slack + 2 * underflow * np.abs(slope)
    slack = slack + lost_rest * np.abs(q)
    if cap is not None:
        # Squared last, as cosh**2 overflows where its inverse is not 0 yet.
        derivative = (1 / np.cosh(np.minimum(np.abs(x / L(cap)), 11_000))) ** 2
        slack = slack * derivative + 3 * underflow * np.abs(grad)  # of a derivative that underflows
        grad = grad * derivative
        slack = slack + np.abs(grad) * u * (16 + 8 * np.minimum(np.abs(x / L(cap)), 100))
    # A product with a small weight may underflow before a mean divides by weights as small.
    slack = slack + 2 * underflow
    grad = np.where(harmless, 0, grad)

    nan_row = np.isnan(np.where(harmless, 0, x)).any(axis=1, keepdims=True)
    unknown = rows.bad & ~to.ignored & ~nan_row | _unknown_weights(w, t, e, live)
    # A difference from the maximum that is weighted may overflow before it is, and so may a sum of
    # them before its share of the smoothing is taken. Beside an infinite one that says nothing,
    # unless the weights are of both signs.
    counts = np.where(q == 0, 0, gap)
    finite_gap = np.where(np.isinf(counts), 0, counts)
    widest = np.max(finite_gap, axis=1, keepdims=True, initial=0)
    if e:
        weights = np.where(np.isfinite(w), np.abs(w), 0)
        widest = np.maximum(widest, np.sum(weights * finite_gap, axis=1, keepdims=True))
    one_sign = ((q >= 0).all(axis=1) | (q <= 0).all(axis=1))[:, None]
    unsure = (widest >= compute.max / 8) & ~(one_sign & np.isinf(counts).any(axis=1, keepdims=True))
    if cap is not None and cap > compute.max:  # as if there were none
        unsure = unsure | np.isinf(x).any(axis=1, keepdims=True)
    loss = np.where(nan_row | to.wrong, L("nan"), loss)
    grad = np.where((nan_row | to.wrong) & live, L("nan"), grad)
    infinite = ~np.isfinite(np.where(harmless, 0, x)).all(axis=1, keepdims=True)
    # Beside a probability of 0, and before it is weighted.
    overflows = ~(np.abs(slope) < compute.max / 8) | (
        (label_weight != 0) & ~(np.abs(2 * z * lse) < compute.max / 8)
    )
    unknown_grad = unknown | infinite & (cap is not None) | overflows
    loss, error = np.where(to.ignored, 0, loss), np.where(to.ignored, 0, error)
    grad = np.where(to.ignored, 0, grad)
    unknown, unknown_grad = unknown & ~to.ignored, unknown_grad & ~to.ignored
    error = np.where(unknown | unsure & ~to.ignored, ANY, error)
    slack = np.where(unknown_grad, ANY, slack)
    return _reduced(loss, error, grad, slack, to, label_weight, options, rounding)


def _others(rows: Any, index: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """Return the sum of the probabilities of all classes but the label's."""
    e = np.where(rows.live, np.exp(-gap), 0)
    if e.shape[1]:
        np.put_along_axis(e, index, 0, axis=1)
    return e.sum(axis=1, keepdims=True) / (1 + rows.rest)


def _unknown_weights(w: Any, t: Any, e: Any, live: Any) -> np.ndarray:
    """Return the rows in which a weight that counts is no finite number."""
    counts = (t != 0) | (live & (e != 0))
    return (counts & ~np.isfinite(w)).any(axis=1, keepdims=True)


def _reduced(
    loss: Any, error: Any, grad: Any, slack: Any, to: Target, weight: Any, options: Options,
    rounding: Rounding,
) -> tuple[Answer, Any, Any]:  # fmt: skip
    u = rounding.compute.u
    if options.reduction == "none":
        values, tolerance = loss[:, 0], error[:, 0]
    else:
        values = np.asarray(loss.sum())
        tolerance = np.asarray(
            error.sum() + 8 * u * np.abs(np.where(np.isfinite(loss), loss, 0)).sum()
        )
    if options.reduction == "mean":
        counted = np.where(to.ignored, 0, weight)
        if to.index is None and options.samples is None:
            divisor = size = L(len(loss))
        elif to.index is None:
            divisor = size = np.where(to.ignored, 0, options.samples).sum()
        else:
            divisor, size = counted.sum(), np.abs(counted).sum()
        if to.wrong.any() or not np.isfinite(divisor):
            values = np.asarray(L("nan"))
            grad = np.where(to.wrong & options.live, L("nan"), grad)
            # What a label without a class weighs in the mean is not said.
            slack = np.where(to.wrong, slack, ANY)
            tolerance = tolerance if to.wrong.any() else np.asarray(ANY)
        elif divisor == 0:
            # Weights that cancel to 0 may leave a rest of their rounding.
            cancel = bool(size > 0)
            values, tolerance = np.asarray(L("nan")), np.asarray(ANY if cancel else L(0))
            # A row with nan or an infinity may stay nan.
            slack = np.where(np.isnan(slack) | np.isnan(grad) | cancel, ANY, 0)
            grad = np.zeros_like(grad)
        else:
            worse = 8 * u * size / np.abs(divisor)
            values, tolerance = values / divisor, tolerance / np.abs(divisor)
            tolerance = tolerance + np.abs(np.where(np.isfinite(values), values, 0)) * worse
            grad, slack = grad / divisor, slack / np.abs(divisor)
            slack = slack + np.abs(np.where(np.isfinite(grad), grad, 0)) * worse
    # A sum, or a term of it, may overflow on the way to a result that would not.
    size = np.abs(loss).max(initial=0) if options.reduction == "none" else np.abs(loss).sum()
    huge = bool(rounding.compute.max / 8 <= size < np.inf)
    tolerance = np.where(huge, ANY, tolerance)
    return Answer(values, rounding.tolerance(values, 1, tolerance)), grad, slack
