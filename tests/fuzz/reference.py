"""Answers in extended precision from the documented formulas, sharing no code with the package.

Everything is computed on rows: the reduced axes are one axis, the last. An `Answer` holds the
values and, entry by entry, how far a right answer may be from them. Where the documentation does
not say what the answer is, the tolerance is nan, and nothing is judged.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tests.fuzz.values import FORMATS, Format

L = np.longdouble
ANY = L("nan")  # the tolerance of an entry that is not judged


class Answer(NamedTuple):
    """What a row function should give, and how far from it an answer may be."""

    values: np.ndarray
    tolerance: np.ndarray


class Rounding(NamedTuple):
    """The formats of a call: what it computes in, and what it answers in."""

    compute: Format
    result: Format
    flushes: bool = False
    """Whether subnormal numbers are taken for 0."""

    @property
    def gone(self) -> Any:
        """The least that a number may be, and be 0 for what comes after it."""
        return self.compute.smallest_normal if self.flushes else self.compute.smallest

    @classmethod
    def of(cls, dtype: str, *, flushes: bool = False) -> Rounding:
        result = FORMATS[dtype]
        return cls(FORMATS[result.compute], result, flushes)

    def answered_in(self, name: str) -> Rounding:
        """Return the same with the answer in another dtype, and nothing narrower computed in."""
        result, compute = FORMATS[name], self.compute
        if result.compute == name and result.bits > compute.bits:
            compute = result
        return self._replace(compute=compute, result=result)

    def ulp(self, values: np.ndarray, format: Format | None = None) -> np.ndarray:
        """Return the units in the last place of values, in the compute dtype by default."""
        format = format or self.compute
        size = np.abs(np.where(np.isfinite(values), values, 0)).astype(L)
        exponent = np.frexp(np.maximum(size, format.smallest_normal))[1]
        return np.ldexp(L(1), exponent - format.bits)

    def tolerance(self, values: np.ndarray, units: Any, extra: Any = 0) -> np.ndarray:
        """Return so many units of the compute dtype, and half a unit more for a half type."""
        # The design's 0.51 units of a half type leave 0.01 for what is computed in float32; long
        # spans may take more.
        found = units * self.ulp(values) + extra + 2 * self.compute.smallest
        if self.flushes:
            found = found + max(self.compute, self.result, key=_smallest).smallest_normal
        if self.result is not self.compute:
            found = found + L("0.505") * self.ulp(values, self.result)
        if self.compute.name == "longdouble":
            # The reference has no more digits itself, nor does it put rounding errors back: the
            # exponentials of long spans are off by thousands of units.
            found = found * max(1000, self.compute.depth)
        return found


def _smallest(format: Format) -> Any:
    """Return a format's least normal number; half types are not flushed."""
    return format.smallest_normal if format.name == format.compute else 0


class Rows(NamedTuple):
    """Rows of logits, folded."""

    x: np.ndarray  # -inf where masked
    live: np.ndarray
    max: np.ndarray
    rest: np.ndarray
    log: np.ndarray  # log1p(rest)
    span: np.ndarray  # of the finite entries, divided by the temperature
    bad: np.ndarray  # rows with nan, +inf, or nothing but -inf
    empty: np.ndarray  # rows without a live entry


def fold(x: np.ndarray, live: np.ndarray, temperature: float = 1.0) -> Rows:
    """Fold rows: the maximum, and the sum of the other exponentials."""
    x = np.where(live, x.astype(L), -L("inf"))
    m = np.max(x, axis=1, keepdims=True, initial=-np.inf)
    bad = ~np.isfinite(m)
    d = _scaled_differences(x, np.where(bad, 0, m), temperature)
    at = np.argmax(x, axis=1) if x.shape[1] else np.zeros(len(x), int)
    others = np.exp(np.where(bad, 0, d))
    if x.shape[1]:
        others[np.arange(len(x)), at] = 0
    rest = others.sum(axis=1, keepdims=True)
    finite = np.where(np.isfinite(d), d, 0)
    span = -np.min(finite, axis=1, keepdims=True, initial=0)
    empty = ~live.any(axis=1, keepdims=True)
    return Rows(x, live, m, rest, np.log1p(rest), np.where(bad, 0, span), bad, empty)


def lost_to_underflow(rows: Rows, rounding: Rounding) -> np.ndarray:
    """Return what remainders may lack that are no normal numbers, or sums of some that are none."""
    n, least = rows.x.shape[1], rounding.compute.smallest_normal
    most, each = (n * least, least) if rounding.flushes else (least, rounding.compute.smallest)
    return np.where(rows.rest < most, n * each, 0)


def _units(rows: Rows, rounding: Rounding) -> np.ndarray:
    """Return the bound on a probability: max(6, 2 + 2 D)."""
    d = np.minimum(rows.span, rounding.compute.depth)
    return np.maximum(6, 2 + 2 * d)


def _differences(rows: Rows, temperature: float) -> np.ndarray:
    return _scaled_differences(rows.x, np.where(rows.bad, 0, rows.max), temperature)


def _scaled_differences(x: np.ndarray, m: np.ndarray, temperature: float) -> np.ndarray:
    # The difference first, as x / T may overflow where (x - max) / T does not; by halves, as in
    # longdouble the difference may, too. A power of 2 costs no digits.
    halves = (np.ldexp(x, -1) - np.ldexp(m, -1)) / L(temperature)
    return np.where(np.isneginf(x), -L("inf"), np.ldexp(halves, 1))


def softmax(x: Any, live: Any, rounding: Rounding, temperature: float) -> Answer:
    rows = fold(x, live, temperature)
    y = np.exp(_differences(rows, temperature)) / (1 + rows.rest)
    y = np.where(rows.bad, L("nan"), y)
    y = np.where(rows.live, y, 0)
    y = np.where(np.isnan(rows.x) & rows.live, L("nan"), y)
    return Answer(y, rounding.tolerance(y, _units(rows, rounding)))


def log_softmax(x: Any, live: Any, rounding: Rounding, temperature: float) -> Answer:
    rows = fold(x, live, temperature)
    y = _differences(rows, temperature) - rows.log
    y = np.where(rows.bad, L("nan"), y)
    y = np.where(rows.live, y, -L("inf"))
    return Answer(y, rounding.tolerance(y, 8, lost_to_underflow(rows, rounding)))


def logsumexp(x: Any, live: Any, rounding: Rounding) -> Answer:
    rows = fold(x, live)
    y = np.where(rows.bad, rows.max, rows.max + rows.log)
    largest = np.where(np.isfinite(rows.max), np.abs(rows.max), 0)
    near_zero = 4 * rounding.compute.u * np.maximum(1, largest)
    return Answer(y, np.maximum(rounding.tolerance(y, 6), rounding.tolerance(y, 0, near_zero)))


def weighted_logsumexp(x: Any, live: Any, b: Any, rounding: Rounding) -> tuple[Answer, Answer]:
    """Return log|s| and the sign of s = sum b exp(x); nothing is judged beside infinities of b."""
    live = live & (b != 0)
    x = np.where(live, x, -L("inf")).astype(L)
    b = np.where(live, b, 0).astype(L)
    m = np.max(x, axis=1, keepdims=True, initial=-np.inf)
    finite = np.isfinite(m)
    m = np.where(finite, m, 0)
    e = np.where(finite, np.exp(np.where(np.isneginf(x), -L("inf"), x - m)), 0)
    terms = b * e
    s = terms.sum(axis=1, keepdims=True)
    scale = (np.abs(terms) * (2 + np.abs(np.where(e > 0, x - m, 0)))).sum(axis=1, keepdims=True)
    value = np.log(np.abs(s)) + m
    sign = np.sign(s)
    top = np.max(x, axis=1, keepdims=True, initial=-np.inf)
    plus = np.isposinf(top)
    signs = np.sign(np.where(np.isposinf(x), b, 0))
    both = (signs > 0).any(axis=1, keepdims=True) & (signs < 0).any(axis=1, keepdims=True)
    sign = np.where(plus, np.where(both, L("nan"), signs.sum(axis=1, keepdims=True)), sign)
    sign = np.where(plus & ~both, np.sign(sign), sign)
    value = np.where(plus, np.where(both, L("nan"), L("inf")), value)
    nan = np.isnan(x).any(axis=1, keepdims=True) | np.isnan(b).any(axis=1, keepdims=True)
    value, sign = np.where(nan, L("nan"), value), np.where(nan, L("nan"), sign)
    u = rounding.compute.u
    with np.errstate(all="ignore"):
        lost = 8 * u * scale / np.abs(s) + 4 * u * np.maximum(1, np.abs(m))
    unknown = np.isinf(b).any(axis=1, keepdims=True) | ~(lost < 0.25) & ~plus & ~nan
    # A sum of 0 is 0 by chance, or to the last digit.
    unknown = unknown & ~(
        (terms == 0).all(axis=1, keepdims=True) & ~np.isinf(b).any(axis=1, keepdims=True)
    )
    lost = np.where(np.isfinite(lost), lost, 0)
    tolerance = np.where(unknown, ANY, rounding.tolerance(value, 6, lost))
    return Answer(value, tolerance), Answer(sign, np.where(unknown, ANY, L(0)))


def complex_logsumexp(x: Any, live: Any, b: Any, rounding: Rounding) -> Answer:
    """Return log s of finite complex rows; others are not judged."""
    x = x.astype(np.clongdouble)
    count = live & (b != 0)
    bounded = (np.isfinite(x) & np.isfinite(b)) | ~count
    fine = bounded.all(axis=1, keepdims=True) & count.any(axis=1, keepdims=True)
    x = np.where(count & fine, x, 0)
    m = np.max(np.where(count, x.real, -L("inf")), axis=1, keepdims=True, initial=-np.inf)
    m = np.where(np.isfinite(m), m, 0)
    terms = np.where(count & fine, b, 0) * np.exp(x - m)
    s = terms.sum(axis=1, keepdims=True)
    scale = (np.abs(terms) * (4 + np.abs(x - m))).sum(axis=1, keepdims=True)
    with np.errstate(all="ignore"):
        value = np.log(np.where(s == 0, 1, s)) + m
        lost = 16 * rounding.compute.u * (scale / np.abs(s) + 1 + np.abs(m))
    return Answer(value, np.where(fine & (lost < 0.25), lost, ANY))


# --------------------------------------------------------------------------- gradients


def _scaled(
    values: np.ndarray, scale: np.ndarray, rounding: Rounding, nan: Any = False, lost: Any = 0
) -> Answer:
    """Return values whose error is a dozen roundings of terms as large as `scale`.

    Where an infinity comes in, what comes out depends on the order of the operations: not judged.
    """
    overflows = ~(scale < rounding.compute.max / 8)  # something on the way may
    unsure = overflows & np.logical_not(nan)
    fine = np.isfinite(scale)
    slack = 12 * rounding.compute.u * np.where(fine, scale, 0) + np.where(fine, lost, 0)
    tolerance = rounding.tolerance(np.where(fine, values, 0), 2, slack)
    return Answer(np.where(nan, L("nan"), values), np.where(unsure, ANY, tolerance))


def softmax_vjp(y: Any, dy: Any, rounding: Rounding) -> Answer:
    y, dy = y.astype(L), dy.astype(L)
    # A row that sums to 1 but for its rounding is one of a softmax, which sums to 1: its derivative
    # does not see a constant of dy, and has errors of what is left without that of its maximum.
    off = 64 * rounding.compute.u
    off += rounding.result.u if rounding.result.bits < rounding.compute.bits else 0
    big = y > 0.75
    c = np.where(big, dy, 0).sum(axis=1, keepdims=True)
    is_softmax = (np.abs(y.sum(axis=1, keepdims=True) - 1) <= off) & np.isfinite(c)
    c = np.where(is_softmax, c, 0)
    dy = dy - c
    total = (y * dy).sum(axis=1, keepdims=True)
    size = np.abs(y * dy).sum(axis=1, keepdims=True)
    size += np.abs(c) * np.where(big, 0, y).sum(axis=1, keepdims=True)
    nan = np.isnan(y + dy).any(axis=1, keepdims=True) & (~np.isinf(y * dy)).all(
        axis=1, keepdims=True
    )
    lost = rounding.gone * y.shape[1]  # of products that underflow
    return _scaled(y * (dy - total), np.abs(y) * (np.abs(dy) + size), rounding, nan, lost)


def log_softmax_vjp(log_y: Any, dy: Any, rounding: Rounding) -> Answer:
    log_y, dy = log_y.astype(L), dy.astype(L)
    dy = np.where(np.isinf(log_y), 0, dy)
    p = np.exp(log_y)
    total = dy.sum(axis=1, keepdims=True)
    size = np.abs(dy).sum(axis=1, keepdims=True)
    depth = 1 + np.abs(np.where(p > 0, log_y, 0))
    nan = np.isnan(p + total)
    lost = rounding.gone * size  # of exponentials that underflow
    return _scaled(dy - p * total, np.abs(dy) + p * size * depth, rounding, nan, lost)


def softmax_jacobian(y: Any, rounding: Rounding) -> Answer:
    y = y.astype(L)
    n = y.shape[1]
    eye = np.eye(n, dtype=bool)
    rows, columns = y[:, :, None], y[:, None, :]
    others = np.where(eye, 0, columns).sum(axis=-1, keepdims=True)
    jacobian = np.where(eye, rows * others, -rows * columns)
    return _scaled(jacobian, np.abs(np.where(eye, rows * others, rows * columns)), rounding)
