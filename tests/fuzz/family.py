"""The rest of the family in extended precision, as `reference` has the softmax family."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.fuzz.reference import ANY, Answer, L, Rounding, fold


def entmax(x: Any, alpha: float, rounding: Rounding) -> Answer:
    """Probabilities by bisection, of the threshold or, where the power is steep, of the least one.

    What 4 units of the threshold move an entry by is its slope, p^(2 - alpha), times these.
    """
    x, c = x.astype(L), L(alpha) - 1
    m = np.max(x, axis=1, keepdims=True, initial=-np.inf)
    bad = ~np.isfinite(m)
    d = np.where(bad, 0, x - np.where(bad, 0, m))
    u, tiny = rounding.compute.u, rounding.compute.smallest_normal
    span = -np.min(np.where(np.isfinite(d), d, 0), axis=1, keepdims=True, initial=0)
    if not np.isfinite(c):
        p = (d == 0) / np.maximum((d == 0).sum(axis=1, keepdims=True), 1)
        slack: Any = np.zeros(p.shape)
    elif c == 0:
        e = np.exp(d)
        p = e / e.sum(axis=1, keepdims=True)
        slack = u * (12 + 4 * np.minimum(span, rounding.compute.depth)) * p
    elif c <= 1:
        s = _bisected(lambda s: _power(d - s, c), d)
        p = _power(d - s, c)
        slope = np.where(p > 0, p, 1) ** (1 - c) * (p > 0)
        span = np.minimum(span, 1 / c)
        # The difference from the maximum is rounded itself.
        # So is the argument of the last exponential.
        log_p = -np.log(np.where(p > 0, p, 1))
        slack = u * ((16 + 2 * span) * slope + (8 + 4 * log_p) * p)
        # At the threshold an entry may be as large as its power makes of a few units.
        slack = slack + np.where(d - s > -(1 + 64 * u) / c, (64 * u) ** (1 / c), 0)
    else:
        p, slack = _steep(d, c, u)
    slack = slack + 4 * tiny * (1 if rounding.flushes else 0)
    p = np.where(bad, L("nan"), p)
    return Answer(p, rounding.tolerance(p, 2, slack))


def _power(w: Any, c: Any) -> Any:
    inside = c * w > -1
    return np.where(inside, np.exp(np.log1p(np.where(inside, c * w, 0)) / c), 0)


def _bisected(p_of: Any, d: Any) -> Any:
    """Return where the sum of probabilities is 1: it is at least that at 0."""
    low = np.zeros((len(d), 1), L)
    high = np.full((len(d), 1), L(2) + np.log(L(max(d.shape[1], 1))))
    for _ in range(90):
        middle = (low + high) / 2
        more = p_of(middle).sum(axis=1, keepdims=True) >= 1
        low, high = np.where(more, middle, low), np.where(more, high, middle)
    return low


def _steep(d: Any, c: Any, u: Any) -> tuple[Any, Any]:
    """Return probabilities for c > 1 and what is lost: by the least one above 0."""
    depth = np.where(np.isfinite(d), -d, L("inf"))

    def powers(base: Any, p: Any) -> Any:
        inside = depth <= base
        z = np.where(inside, p**c + c * (base - np.where(inside, depth, 0)), 0)
        return np.where(inside, z ** (1 / c), 0)

    base = _largest(lambda base: powers(base, L(0)).sum(axis=1, keepdims=True) < 1, depth)
    low, high = np.zeros((len(d), 1), L), np.ones((len(d), 1), L)
    for _ in range(90):
        middle = (low + high) / 2
        more = powers(base, middle).sum(axis=1, keepdims=True) >= 1
        low, high = np.where(more, low, middle), np.where(more, middle, high)
    p = powers(base, low)
    # Near the threshold the probability is a steep function of it: it is not judged there.
    unsure = np.abs(c * (base - depth)) + low**c < 1e4 * u
    return p, np.where(
        unsure | (np.abs(c * (depth - base)) < 1e4 * u), ANY, 64 * u * np.ones(p.shape)
    )


def _largest(fits: Any, depth: Any) -> Any:
    """Return the largest finite depth of each row that fits, or 0: those below it do, too."""
    depth = np.sort(depth, axis=1)
    few, many = np.zeros((len(depth), 1), int), np.isfinite(depth).sum(axis=1, keepdims=True)
    base = np.zeros((len(depth), 1), L)
    while (few < many).any():
        half = (few + many + 1) // 2
        at = np.take_along_axis(depth, np.maximum(half - 1, 0), axis=1)
        fit = fits(at) & (few < many)
        base, few = np.where(fit, at, base), np.where(fit, half, few)
        many = np.where(fit, many, half - 1)
    return base


def entropy(x: Any, rounding: Rounding) -> tuple[Answer, Answer]:
    """Return the entropy of rows and its gradient, -p (log p + H)."""
    rows = fold(x, np.ones(x.shape, bool))
    d = np.where(rows.bad, 0, np.where(np.isneginf(rows.x), 0, rows.max - rows.x))
    p = np.where(np.isneginf(rows.x), 0, np.exp(-d)) / (1 + rows.rest)
    h = rows.log + (p * np.where(p == 0, 0, d)).sum(axis=1, keepdims=True)  # d overflows
    if not x.shape[1]:
        return Answer(np.zeros(h.shape), np.zeros(h.shape)), Answer(x, x)
    u, least, depth = rounding.compute.u, rounding.compute.smallest, rounding.compute.depth
    lost = np.where(h < 64 * rounding.compute.smallest_normal, 64, 2) * x.shape[1]
    lost = lost * least * (1 + depth)
    minus_log = np.where(p == 0, 0, rows.log + d)
    grad = p * (minus_log - h)
    # The logarithm is rounded as the largest difference is, H is as said; p has its own bound.
    slack = u * (16 + 4 * np.minimum(rows.span, depth)) * p * (minus_log + h)
    slack = slack + 8 * rounding.gone * (1 + minus_log + h) + p * lost
    h, grad = (np.where(rows.bad, L("nan"), a) for a in (h, grad))
    return (
        Answer(h, rounding.tolerance(h, 8, lost)),
        Answer(grad, rounding.tolerance(grad, 1, slack)),
    )


def logmeanexp(x: Any, live: Any, rounding: Rounding) -> Answer:
    rows = fold(x, live)
    n = live.sum(axis=1, keepdims=True)
    infinite = np.isinf(rows.max)
    value = np.where(infinite, rows.max, rows.max + (rows.log - np.log(np.maximum(n, 1).astype(L))))
    value = np.where(n == 0, L("nan"), value)
    size = np.where(np.isfinite(rows.max), np.maximum(1, np.abs(rows.max)), 1)
    return Answer(value, rounding.tolerance(value, 6, 4 * rounding.compute.u * size))


def logcumsumexp(x: Any, rounding: Rounding) -> Answer:
    """The state after each entry, its sum with what was rounded off (Neumaier 1974)."""
    x = x.astype(L)
    top = np.maximum.accumulate(x, axis=1)
    log = np.empty(x.shape, L)
    m, rest, lost = np.full(len(x), -L("inf")), -np.ones(len(x), L), np.zeros(len(x), L)
    for i in range(x.shape[1]):
        new = x[:, i]
        above = new > m
        scale = np.exp(np.where(above, m - new, 0))
        # A new maximum is the 1 that `rest` leaves out, and the sum before it becomes the rest.
        rest, lost = np.where(above, scale * (1 + rest), rest), scale * lost
        e = np.where(above | np.isneginf(new), 0, np.exp(new - m))
        total = rest + e
        lost += np.where(rest > e, rest - total + e, e - total + rest)
        m, rest = np.where(above, new, m), total
        log[:, i] = np.log1p(rest + lost)
    finite = np.isfinite(top)
    value = np.where(finite, top + np.where(finite, log, 0), top)
    size = np.where(finite, np.maximum(1, np.abs(top)), 1)
    return Answer(value, rounding.tolerance(value, 6, 4 * rounding.compute.u * size))


def kl_divergence(
    x: Any, y: Any, temperature: float, factor: Any, reduction: str, rounding: Rounding
) -> tuple[Answer, Answer, Answer]:
    """Return the divergence, times a factor and reduced, and the gradients of its sum by x and y.

    The documented bound: 8 u K + e sqrt(2 K) + e^2 / 2 with e = 4 u (1 + D).
    """
    ones = np.ones(x.shape, bool)
    by_p, by_q = fold(x, ones, temperature), fold(y, ones, temperature)

    def logs(rows: Any) -> Any:
        d = (rows.x - np.where(rows.bad, 0, rows.max)) / L(temperature)
        return np.where(rows.bad, 0, d) - np.where(rows.bad, 0, rows.log)

    p, q = logs(by_p), logs(by_q)
    # A probability that the dtype does not hold is none.
    gone = np.exp(p) < rounding.compute.smallest
    u = np.where(gone, 0, np.where(gone, 0, q) - np.where(gone, 0, p))
    e = np.where(gone, 0, np.exp(p))
    small = np.abs(u) < 1e-3
    series = u * u * (L(1) / 2 + u * (L(1) / 6 + u * (L(1) / 24 + u / 120)))
    far = u > 64  # where exp(u) may overflow
    mild = np.where(small | far, 0, u)
    terms = e * np.where(small, series, np.expm1(mild) - mild)
    terms = np.where(far, np.exp(q) - e * (1 + u), terms)
    k = np.where(gone, np.exp(q), terms).sum(axis=1, keepdims=True)
    deep = np.maximum(np.abs(np.where(gone, 0, p)), np.abs(np.where(gone | np.isinf(q), 0, q)))
    depth = np.max(deep, axis=1, keepdims=True, initial=0)
    bad = by_p.bad | by_q.bad
    k = np.where(bad & (x.shape[1] > 0), L("nan"), k)
    finite = np.where(np.isfinite(k), np.abs(k), 0)
    unit = rounding.compute.u
    error = 4 * unit * np.where(np.isfinite(depth), 1 + depth, 0)
    slack = 8 * unit * finite + error * np.sqrt(2 * finite) + error * error / 2
    slack = slack + 16 * rounding.compute.smallest_normal * x.shape[1]
    # Logits that nearly overflow may do so here as well.
    largest = np.max(np.where(np.isfinite(x), np.abs(x), 0), axis=1, keepdims=True, initial=0)
    unsure = np.maximum(largest, np.maximum(finite, depth)) > rounding.compute.max / 16
    # Half of the smallest number rounds to it or to 0, and so a divergence from 0 is inf or not.
    nearly = (np.exp(p) > rounding.compute.smallest / 4) & gone & np.isneginf(q)
    unsure |= nearly.any(axis=1, keepdims=True)
    of_p, of_q = _slopes(p, q, u, e, k, error, temperature, rounding)
    of_p, of_q = (
        Answer(np.where(bad, L("nan"), a.values), np.where(unsure, ANY, a.tolerance))
        for a in (of_p, of_q)
    )
    whole = L(factor)
    slack = np.where(unsure, ANY, slack * whole)
    k = k * whole
    if reduction != "none":
        k, slack = np.asarray(k.sum()), slack.sum() + 8 * unit * (finite * whole).sum()
    if reduction == "mean":
        whole = whole / max(len(x), 1)
        k, slack = (k / len(x), slack / len(x)) if len(x) else (np.asarray(L("nan")), L(0))
    huge = bool(whole * finite.sum() > rounding.compute.max / 16)
    slack = np.where(huge, ANY, slack)
    scaled = (Answer(a.values * whole, a.tolerance * whole) for a in (of_p, of_q))
    by = (Answer(a.values, rounding.tolerance(a.values, 1, a.tolerance)) for a in scaled)
    return Answer(k, rounding.tolerance(k, 1, slack)), *by


def _slopes(
    p: Any, q: Any, u: Any, e: Any, k: Any, error: Any, temperature: float, rounding: Rounding
) -> tuple[Answer, Answer]:
    """Return p (log p - log q - K) / T and (q - p) / T of logarithms, and what they may be off."""
    compute, t = rounding.compute, L(temperature)
    least = rounding.gone
    of_p = np.where(e == 0, 0, e * (-u - k))
    near = (e > 0) & (np.abs(u) < 1)
    of_q = np.where(near, e * np.expm1(np.where(near, u, 0)), np.exp(q) - e)
    known = np.where(np.isfinite(k), k, 0)
    size = e * (np.abs(np.where(np.isfinite(u), u, 0)) + known)
    deep = np.minimum(np.maximum(-p, np.where(np.isinf(q), 0, -q)), compute.depth)
    units = compute.u * (16 + 4 * deep)
    lost = 16 * least * (1 + deep + np.where(np.isfinite(u), np.abs(u), 0) + known)
    slack_p = units * size + e * (2 * error + error * np.sqrt(2 * known)) + lost
    slack_q = units * np.abs(of_q) + 2 * error * np.maximum(e, np.exp(q)) + lost
    # Beside an infinite divergence the gradient by p is not said.
    slack_p = np.where(np.isfinite(k), slack_p, ANY)
    return Answer(of_p / t, slack_p / t), Answer(of_q / t, slack_q / t)
