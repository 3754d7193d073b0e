"""Entropies, divergences, means and running sums of small arrays, on NumPy's tiles."""

from __future__ import annotations

import math

import ml_dtypes
import mpmath
import numpy as np
import pytest

import portable_softmax as ps
from portable_softmax import kernels

pytestmark = pytest.mark.once("NumPy's own arrays")

mp = mpmath.mp.clone()
mp.dps = 60

DTYPES = {
    "float64": (np.dtype(np.float64), 53),
    "float32": (np.dtype(np.float32), 24),
    "float16": (np.dtype(np.float16), 11),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), 8),
}
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def families(n, dtype):
    """Ordinary rows, and those in which digits are lost or numbers leave the range."""
    rng = np.random.default_rng(n)
    x = rng.normal(0, 2, (12, n))
    x[1] = rng.uniform(-80, 0, n)
    x[2, n // 2] += 40.0  # confident
    x[3] = 1.25  # ties
    x[4] = 1.25 + 2.0**-7 * rng.integers(0, 2, n)  # near ties
    x[5] += 1000.0
    x[6] -= 600.0
    x[7, 0] = 90.0
    x[8, 1:] = -math.inf
    x[9, 0] = -math.inf
    x[10] = np.linspace(-9, 9, n)
    x[11] = np.sort(rng.normal(0, 12, n))
    if n == 1:
        x[9, 0] = -3.0
    return x.astype(DTYPES[dtype][0])


def numbers(row):
    return [mp.mpf(float(v)) for v in row]


def probabilities(row):
    m = max(row)
    e = [mp.exp(v - m) for v in row]
    s = mp.fsum(e)
    return [v / s for v in e]


def entropy_of(row):
    return -mp.fsum(p * mp.log(p) for p in probabilities(row) if p > 0)


def divergence_of(row, other):
    p, q = probabilities(row), probabilities(other)
    if any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)):
        return mp.inf
    return mp.fsum(a * mp.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def logmeanexp_of(row):
    m = max(row)
    return m + mp.log(mp.fsum(mp.exp(v - m) for v in row) / len(row))


def running_of(row):
    found, total = [], mp.mpf(0)
    for v in row:
        total += mp.exp(v)
        found.append(mp.log(total) if total > 0 else -mp.inf)
    return found


def within(found, expected, dtype, units, scale=0.0):
    """Each is off by so many units in the last place of what is expected, or of `scale`.

    An answer of a half type is rounded once.
    """
    kind, digits = DTYPES[dtype]
    assert found.dtype == kind
    least = float(ml_dtypes.finfo(kind).smallest_normal)
    units = 0.51 if digits < 24 else units
    with np.errstate(all="ignore"):
        for one, exact, at_least in zip(
            found.reshape(-1), expected, np.broadcast_to(scale, found.size), strict=True
        ):
            if mp.isinf(exact):
                assert float(one) == float(exact)
                continue
            size = max(abs(exact), mp.mpf(float(at_least)), least)
            unit = mp.mpf(2) ** (mp.floor(mp.log(size, 2)) + 1 - digits)
            assert abs(mp.mpf(float(one)) - exact) <= units * unit, (float(one), exact)


def takes_few_calls(name, *arrays, **options):
    return "numpy tiles" in kernels.explain(name, *arrays, **options).partition(";")[0]


@every_dtype
@pytest.mark.parametrize("n", [1, 2, 3, 10, 60])
def test_entropy_and_its_gradient(n, dtype):
    x = families(n, dtype)
    assert takes_few_calls("entropy", x)
    h, grad = ps.entropy_value_and_grad(x)
    assert h.tobytes() == ps.entropy(x).tobytes()
    rows = [numbers(row) for row in x]
    expected = [entropy_of(row) for row in rows]
    within(h, expected, dtype, 8)
    for i, row in enumerate(rows):
        p, m = probabilities(row), max(row)
        gaps = [m - v if q > 0 else mp.mpf(0) for v, q in zip(row, p, strict=True)]
        mean = mp.fsum(q * g for q, g in zip(p, gaps, strict=True))
        slopes = [q * (g - mean) for q, g in zip(p, gaps, strict=True)]
        largest = [float(q * max(g, mean)) for q, g in zip(p, gaps, strict=True)]
        within(grad[i], slopes, dtype, 8, largest)


@every_dtype
@pytest.mark.parametrize("n", [1, 2, 10, 60])
def test_divergence(n, dtype):
    x = families(n, dtype)
    y = np.roll(families(n, dtype), 1, axis=1)
    y[3:5] = (x[3:5].astype(float) * (1 + 2.0**-7)).astype(x.dtype)  # next to each other
    y[0] = x[0]
    assert takes_few_calls("kl_divergence", x, y)
    found = ps.kl_divergence(x, y, reduction="none")
    rows = [(numbers(p), numbers(q)) for p, q in zip(x, y, strict=True)]
    expected = [divergence_of(*pair) for pair in rows]
    # What the rounding of log q - log p leaves: it is twice as sensitive to it as large.
    loose = [0.0 if v > 1e-3 or mp.isinf(v) else 1e-2 * math.sqrt(float(abs(v))) for v in expected]
    within(found, expected, dtype, 8, loose if dtype == "float64" else 0.0)
    assert found[0] == 0.0


@every_dtype
@pytest.mark.parametrize("options", [{}, {"temperature": 2.5}, {"reduction": "sum"}], ids=str)
def test_gradients_of_divergence(dtype, options):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(0, 2, (6, 7)).astype(DTYPES[dtype][0]) for _ in range(2))
    x[0, 2] = y[0, 2] = y[1, 3] = -math.inf
    x[1, 3] = -math.inf
    x[2, 1], y[3, 1] = 30.0, 30.0
    given = {"distillation": True, **options} if "temperature" in options else options
    assert takes_few_calls("kl_divergence_value_and_grad", x, y, **given)
    value, (by_p, by_q) = ps.kl_divergence_value_and_grad(x, y, **given)
    t = options.get("temperature", 1.0)
    count = 6 if "reduction" not in options else 1
    each = []
    for i in range(6):
        row = [v / t for v in numbers(x[i])]
        other = [v / t for v in numbers(y[i])]
        p, q, k = probabilities(row), probabilities(other), divergence_of(row, other)
        each.append(k * (t * t if "distillation" in given else 1))
        factor = (t if "distillation" in given else 1 / mp.mpf(t)) / count
        slopes = [
            factor * a * (mp.log(a / b) - k) if a > 0 else mp.mpf(0)
            for a, b in zip(p, q, strict=True)
        ]
        sizes = [
            float(factor * a * (max(abs(mp.log(a)), abs(mp.log(b))) + k)) if a > 0 else 0.0
            for a, b in zip(p, q, strict=True)
        ]
        within(by_p[i], slopes, dtype, 8, sizes)
        sizes = [float(factor * max(a, b)) for a, b in zip(p, q, strict=True)]
        within(by_q[i], [factor * (b - a) for a, b in zip(p, q, strict=True)], dtype, 8, sizes)
    within(np.asarray(value), [mp.fsum(each) / count], dtype, 8)


@every_dtype
@pytest.mark.parametrize("n", [1, 2, 3, 10, 60])
def test_means_and_running_sums(n, dtype):
    x = families(n, dtype)
    assert takes_few_calls("logmeanexp", x, axis=1)
    assert takes_few_calls("logcumsumexp", x)
    rows = [numbers(row) for row in x]
    sizes = [float(max(abs(v) for v in row if not mp.isinf(v))) for row in rows]
    within(ps.logmeanexp(x, axis=1), [logmeanexp_of(row) for row in rows], dtype, 6, sizes)
    y = ps.logcumsumexp(x)
    for i, row in enumerate(rows):
        largest = np.maximum.accumulate(np.asarray([abs(float(v)) for v in row]))
        within(y[i], running_of(row), dtype, 6, np.where(np.isinf(largest), 0.0, largest))


@every_dtype
@pytest.mark.parametrize("n", [1, 2, 10, 60])
def test_the_gradient_through_running_sums(n, dtype):
    x = families(n, dtype)
    dy = np.random.default_rng(1).normal(size=x.shape).astype(x.dtype)
    assert takes_few_calls("logcumsumexp_vjp", x, dy)
    dx = ps.logcumsumexp_vjp(x, dy)
    for i, row in enumerate([numbers(row) for row in x]):
        y, up = running_of(row), numbers(dy[i])
        slopes, sizes = [], []
        for j, v in enumerate(row):
            terms = [
                u * mp.exp(v - w) for u, w in zip(up[j:], y[j:], strict=True) if not mp.isinf(w)
            ]
            slopes.append(mp.fsum(terms))
            sizes.append(float(mp.fsum(map(abs, terms))))
        within(dx[i], slopes, dtype, 8 + n / 8, sizes)


@pytest.mark.parametrize("axis", [0, 1, 2, (0, 1), (0, 2), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_layout(axis, dtype):
    x = np.random.default_rng(0).normal(0, 3, (3, 4, 5)).astype(dtype)
    axes = axis if type(axis) is tuple else (axis,)
    moved = np.moveaxis(x, axes, range(-len(axes), 0))
    rows = np.ascontiguousarray(moved.reshape(*moved.shape[: 3 - len(axes)], -1))
    np.testing.assert_array_equal(ps.entropy(x, axis=axis), ps.entropy(rows))
    np.testing.assert_array_equal(ps.logmeanexp(x, axis=axis), ps.logmeanexp(rows, axis=-1))
    _, grad = ps.entropy_value_and_grad(x, axis=axis)
    _, of_rows = ps.entropy_value_and_grad(rows)
    assert grad.flags.c_contiguous
    again = np.moveaxis(grad, axes, range(-len(axes), 0)).reshape(rows.shape)
    np.testing.assert_array_equal(again, of_rows)
    if len(axes) == 1:
        y = ps.logcumsumexp(x, axis=axis)
        assert y.flags.c_contiguous
        np.testing.assert_array_equal(np.moveaxis(y, axis, -1), ps.logcumsumexp(rows))
        k = ps.kl_divergence(x, x[::-1], axis=axis, reduction="none")
        other = np.moveaxis(x[::-1], axis, -1).reshape(rows.shape)
        np.testing.assert_array_equal(
            k, ps.kl_divergence(rows, np.ascontiguousarray(other), reduction="none")
        )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_without_an_answer_changes_no_other(dtype, bad):
    x = np.random.default_rng(0).normal(0, 2, (5, 6)).astype(dtype)
    spoilt = x.copy()
    spoilt[2] = bad
    others = [0, 1, 3, 4]

    def every(x):
        dy = np.ones_like(x)
        found = [ps.entropy(x), *ps.entropy_value_and_grad(x), ps.logmeanexp(x, axis=1)]
        found += [ps.logcumsumexp(x), ps.logcumsumexp_vjp(x, dy)]
        value, grads = ps.kl_divergence_value_and_grad(x, np.flip(x, 1), reduction="none")
        return [*found, value, *grads]

    with kernels.portable():
        expected = every(spoilt)
    for plain, found, portable in zip(every(x), every(spoilt), expected, strict=True):
        assert found[others].tobytes() == plain[others].tobytes()
        np.testing.assert_array_equal(found[2], portable[2])


def test_what_is_left_to_the_portable_path():
    x = np.ones((3, 4), np.float32)

    def why(*arrays, **options):
        return kernels.explain("kl_divergence", *arrays, **options)

    assert "not numpy tiles: dtypes: float32 and float64" in why(x, x.astype(float))
    assert "not numpy tiles: options: extreme temperature" in why(x, x, temperature=1e300)
    assert "nothing to reduce" in kernels.explain("entropy", x[:0])
    assert "too many elements" in kernels.explain("entropy", np.ones((1 << 12, 17)))
