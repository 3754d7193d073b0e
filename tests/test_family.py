"""Entropy, divergence, means and running sums against exact values, on every backend."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
from asserts import assert_close, assert_like, assert_same
from mpmath import mp, mpf
from test_values import EPS, MARGINS, ROWS, confident

import portable_softmax as ps

pytestmark = pytest.mark.run_on("paths")

FINITE = {k: v for k, v in ROWS.items() if k not in ("huge", "minus infinity")}


def exact_entropy(row):
    logs = reference.log_softmax(row)
    return -mp.fsum(mp.exp(v) * v for v in logs)


def exact_divergence(p, q, t=1):
    logs = [reference.log_softmax([v / mpf(t) for v in row]) for row in (p, q)]
    return mp.fsum(mp.exp(a) * (a - b) for a, b in zip(*logs, strict=True))


def exact_mean(row):
    return reference.logsumexp(row) - mp.log(len(row))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FINITE)
def test_entropy(xp, name, dtype):
    x = FINITE[name].astype(dtype)
    actual = assert_like(xp, ps.entropy(xp.asarray(x)), x.shape[:1], dtype)
    expected = [exact_entropy(reference.exact(row)) for row in x]
    if dtype == "float32":  # where the remainder is a normal number
        expected = [v if v > 1e-30 else mpf(0) for v in expected]
        actual = np.where(actual > 1e-30, actual, 0)
    if name == "one class":
        np.testing.assert_array_equal(actual, 0.0)
    else:
        assert reference.ulps(actual, expected) <= 8
    assert (actual >= 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("margin", [1.0, 10.0, 30.0, 80.0])
def test_a_confident_row_keeps_the_digits_of_its_entropy(xp, margin, dtype):
    """-sum(p * log(p)) with log(p) = 0 loses half of the answer, or all of it."""
    x = np.asarray([margin, 0.25, 0.0, -1.0], dtype)
    actual = assert_like(xp, ps.entropy(xp.asarray(x)), (), dtype)
    assert reference.ulps(actual, [exact_entropy(reference.exact(x))]) <= 8


@pytest.mark.parametrize("axis", [0, 1, (0, 2), None])
def test_entropy_over_any_axes(xp, axis):
    x = np.random.default_rng(30).normal(size=(3, 4, 5))
    e = np.exp(x)
    p = e / e.sum(axis=axis, keepdims=True)
    expected = -(p * np.log(p)).sum(axis=axis)
    assert_close(xp, ps.entropy(xp.asarray(x), axis=axis), expected, rtol=1e-13)


# Half the square of what a difference of logarithms is off by is more than their divergence.
_NEAR = (
    [-3.10632633e-3, -2.36878591e-3, 3.44945421e-3, -8.00930336e-3, -1.38035032e-3,
     -1.63274538e-2, -7.69111933e-3, -6.67669578e-3, 7.21138995e-3],
    [-3.10632796e-3, -2.36878567e-3, 3.44945001e-3, -8.00930336e-3, -1.38034916e-3,
     -1.63274761e-2, -7.69111468e-3, -6.67669345e-3, 7.2113811e-3],
)  # fmt: skip
PAIRS = {
    "plain": ([0.3, -1.2, 2.0, 0.7], [1.0, 0.5, -0.25, 0.0]),
    "far apart": ([20.0, 0.0, -20.0, 3.0], [-20.0, 1.0, 20.0, 0.0]),
    "confident": ([40.0, 0.0, 1.0, 0.5], [35.0, 0.0, 0.0, 0.0]),
    "near": ([0.5, 0.25, -1.0, 2.0], [0.5, 0.2500001, -1.0, 2.0]),
    "nearer than a rounding": _NEAR,
    "shifted": ([1.0, 2.0, 3.0, 4.0], [11.0, 12.0, 13.0, 14.0]),
    "same": ([1.0, -2.0, 0.5, 0.0], [1.0, -2.0, 0.5, 0.0]),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", PAIRS)
def test_divergence(xp, name, dtype):
    """Within the bound that the docstring states, and never negative."""
    p, q = (np.asarray(row, dtype) for row in PAIRS[name])
    logs = [reference.log_softmax(reference.exact(row)) for row in (p, q)]
    actual = assert_like(xp, ps.kl_divergence(xp.asarray(p), xp.asarray(q)), (), dtype)
    k = exact_divergence(reference.exact(p), reference.exact(q))
    u, d = mpf(float(np.finfo(dtype).eps) / 2), max(abs(v) for row in logs for v in row)
    error = 4 * u * (1 + d)  # of a difference of logarithms
    assert abs(mpf(float(actual)) - k) <= 8 * u * k + error * mp.sqrt(2 * abs(k)) + error**2 / 2
    assert actual >= 0
    if name in ("same", "shifted"):
        assert actual == 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_divergence_of_equal_rows_is_0_however_they_lie_in_memory(xp, dtype):
    x = (np.random.default_rng(31).normal(size=(40, 31)) * 0.01).astype(dtype)
    wide = xp.asarray(np.concatenate([x, x], axis=1))[:, :31]
    for p, q in ((xp.asarray(np.asfortranarray(x)), wide), (xp.asarray(x.T.copy()).T, wide)):
        each = ps.kl_divergence(p, q, reduction="none")
        assert_close(xp, each, np.zeros(40), dtype, rtol=0.0)


def test_divergence_of_random_rows_is_never_negative(xp):
    rng = np.random.default_rng(31)
    p = rng.normal(size=(200, 5)).astype(np.float32)
    for scale in (1.0, 1e-2, 1e-4, 1e-6):
        q = (p + scale * rng.normal(size=p.shape)).astype(np.float32)
        each = ps.kl_divergence(xp.asarray(p), xp.asarray(q), reduction="none")
        assert (xp.numpy(each) >= 0).all()


@pytest.mark.slow("XLA compiles each option", "jax")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_divergence_with_its_options(xp, reduction):
    rng = np.random.default_rng(32)
    p, q = rng.normal(size=(2, 3, 4, 2)) * 2
    for t in (0.5, 3.0):
        each = np.asarray(
            [
                [
                    float(exact_divergence(*(reference.exact(a[i, :, j]) for a in (p, q)), t))
                    for j in range(2)
                ]
                for i in range(3)
            ]
        )
        expected = {"mean": each.mean(), "sum": each.sum(), "none": each}[reduction]
        options = {"axis": 1, "temperature": t, "reduction": reduction}
        plain, distilled = xp.computed(
            [
                ps.kl_divergence(xp.asarray(p), xp.asarray(q), distillation=d, **options)
                for d in (False, True)
            ]
        )
        assert_close(xp, plain, expected, rtol=1e-13)
        assert_close(xp, distilled, expected * t * t, rtol=1e-13)


@pytest.mark.parametrize("t", [2.0**1000, 2.0**-1000])
def test_divergence_at_a_temperature_near_the_ends_of_the_range(xp, t):
    """A power of 2 that the logits have too changes nothing but the scale of the gradients."""
    given = np.random.default_rng(40).normal(size=(2, 3, 4))
    value, grads = ps.kl_divergence_value_and_grad(*(xp.asarray(a) for a in given))
    found, slopes = ps.kl_divergence_value_and_grad(
        *(xp.asarray(a * t) for a in given), temperature=t
    )
    assert_close(xp, found, xp.numpy(value), rtol=1e-13)
    for slope, grad in zip(slopes, grads, strict=True):
        assert_close(xp, slope, xp.numpy(grad) / t, rtol=1e-12)


def test_divergence_of_two_dtypes(xp):
    """It is computed in the wider precision and answered in the dtype of the first."""
    rng = np.random.default_rng(33)
    x, y = xp.asarray(rng.normal(size=(2, 5)), "float32"), xp.asarray(rng.normal(size=(2, 5)))
    wide = xp.asarray(xp.numpy(x).astype(np.float64))
    expected = xp.numpy(ps.kl_divergence(wide, y)).astype(np.float32)
    assert_close(xp, ps.kl_divergence(x, y), expected, "float32", rtol=0.0)
    assert_close(xp, ps.kl_divergence(y, x), xp.numpy(ps.kl_divergence(y, wide)), rtol=0.0)


def test_divergence_is_cross_entropy_less_entropy(xp):
    rng = np.random.default_rng(34)
    p, q = rng.normal(size=(2, 6, 7))
    loss = ps.cross_entropy(xp.asarray(q), ps.softmax(xp.asarray(p)), reduction="none")
    h = ps.entropy(xp.asarray(p))
    each = ps.kl_divergence(xp.asarray(p), xp.asarray(q), reduction="none")
    np.testing.assert_allclose(xp.numpy(each), xp.numpy(loss) - xp.numpy(h), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FINITE)
def test_logmeanexp(xp, name, dtype):
    x = FINITE[name].astype(dtype)
    actual = assert_like(xp, ps.logmeanexp(xp.asarray(x), axis=1), x.shape[:1], dtype)
    eps = np.finfo(dtype).eps
    for a, row in zip(actual, x, strict=True):
        exact = exact_mean(reference.exact(row))
        bound = max(abs(exact) * 3, 2 * max(1, abs(mpf(float(row.max())))))
        assert abs(mpf(float(a)) - exact) <= eps * bound
        assert a <= row.max()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_mean_of_exponents_close_to_each_other(xp, dtype):
    """logsumexp(x) - log(n) has lost every digit of it."""
    x = np.asarray([0.0, -3e-20, -1e-20, -5e-21], dtype)
    actual = assert_like(xp, ps.logmeanexp(xp.asarray(x)), (), dtype)
    assert reference.ulps(actual, [exact_mean(reference.exact(x))]) <= 6


def test_a_mask_of_exponents_close_to_each_other(xp):
    """What is left out counts in neither the sum nor the number of terms."""
    x, where = np.zeros(102), np.arange(102) < 100
    x[:100:2], x[100:] = -2e-20, [5.0, np.nan]
    actual = ps.logmeanexp(xp.asarray(x), where=xp.asarray(where))
    assert_close(xp, actual, -1e-20, rtol=1e-14)


@pytest.mark.slow("XLA compiles each option", "jax")
def test_logmeanexp_with_its_options(xp):
    rng = np.random.default_rng(35)
    x, mask = rng.normal(size=(3, 4, 5)), rng.random((3, 4, 5)) < 0.6
    mask[:, :, 0] = mask[0] = True
    for axis in (0, 1, (0, 2), None):
        where = np.broadcast_to(mask[:, :1], x.shape)
        for given, full in ((None, np.ones(x.shape, bool)), (mask, mask), (mask[:, :1], where)):
            options = {"axis": axis, "where": None if given is None else xp.asarray(given)}
            kept = {"axis": axis, "keepdims": True}
            with np.errstate(invalid="ignore"):  # a row may be masked out as a whole
                expected = np.log((np.exp(x) * full).sum(**kept) / full.sum(**kept))
            actual = ps.logmeanexp(xp.asarray(x), keepdims=True, **options)
            assert_close(xp, actual, expected, rtol=1e-12, atol=1e-14)
            actual = ps.logmeanexp(xp.asarray(x), **options)
            assert_close(xp, actual, np.squeeze(expected, axis), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FINITE)
def test_logcumsumexp(xp, name, dtype):
    x = FINITE[name].astype(dtype)
    actual = assert_like(xp, ps.logcumsumexp(xp.asarray(x)), x.shape, dtype)
    eps = np.finfo(dtype).eps
    for a, row in zip(actual, x, strict=True):
        for i, value in enumerate(a):
            exact = reference.logsumexp(reference.exact(row[: i + 1]))
            top = mpf(float(row[: i + 1].max()))
            assert abs(mpf(float(value)) - exact) <= eps * max(abs(exact) * 3, 2 * max(1, abs(top)))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_logcumsumexp_along_any_axis(xp, axis):
    x = np.random.default_rng(36).normal(size=(5, 6, 7))
    expected = np.log(np.cumsum(np.exp(x), axis=axis))
    assert_close(xp, ps.logcumsumexp(xp.asarray(x), axis=axis), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.slow("a large graph", "dask")
def test_a_long_running_sum_keeps_its_digits(xp):
    """One entry after the other, 20 000 in float32 lose hundreds of units."""
    n = 512 if xp.lazy else 20_000
    x = np.full(n, 0.1, np.float32)
    exact = np.float64(x[0]) + np.log(np.arange(1.0, n + 1))
    y = assert_like(xp, ps.logcumsumexp(xp.asarray(x)), (n,), "float32")
    assert (np.abs(y - exact) <= 4 * np.spacing(np.abs(exact).astype(np.float32))).all()


def test_the_confident_end_of_running_sums(xp):
    x = np.asarray([-40.0, -40.0, 0.0])
    expected = float(mp.log1p(2 * mp.exp(-40)))
    assert_close(xp, ps.logcumsumexp(xp.asarray(x))[-1:], [expected], rtol=1e-15)


# --------------------------------------------------------------------------- derivatives


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_gradient_of_entropy(xp, dtype):
    """The documented formula, in many digits."""
    eps = np.finfo(dtype).eps
    for name, rows in FINITE.items():
        x = rows.astype(dtype)
        h, grad = ps.entropy_value_and_grad(xp.asarray(x))
        assert_same(xp, h, ps.entropy(xp.asarray(x)))
        grad = assert_like(xp, grad, x.shape, dtype)
        for a, row in zip(grad, x, strict=True):
            logs = reference.log_softmax(reference.exact(row))
            exact_h = -mp.fsum(mp.exp(v) * v for v in logs)
            for value, log in zip(a, logs, strict=True):
                size = mp.exp(log) * (1 + abs(log))
                bound = 8 * eps * size + float(np.finfo(dtype).tiny)
                assert abs(mpf(float(value)) + mp.exp(log) * (log + exact_h)) <= bound, name


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_gradients_of_divergence(xp, reduction):
    """The documented formulas, in many digits; q - p keeps its digits where q is near p."""
    rng = np.random.default_rng(38)
    p = rng.normal(size=(3, 4))
    q = p + np.asarray([[1.0], [1e-7], [20.0]]) * rng.normal(size=(3, 4))
    for t, scale in ((1.0, 1), (3.0, 9)):
        options = {"temperature": t, "distillation": scale == 9, "reduction": reduction}
        given = xp.asarray(p), xp.asarray(q)
        both = (
            ps.kl_divergence_value_and_grad(*given, **options),
            ps.kl_divergence(*given, **options),
        )
        (value, grads), alone = xp.computed(both)
        assert_same(xp, value, alone)
        expected = np.empty((2, 3, 4))
        for i in range(3):
            rows = [reference.exact(a[i]) for a in (p, q)]
            logs = [reference.log_softmax([v / mpf(t) for v in row]) for row in rows]
            k = exact_divergence(*rows, t)
            for j, (lp, lq) in enumerate(zip(*logs, strict=True)):
                ends = mp.exp(lp) * (lp - lq - k), mp.exp(lq) - mp.exp(lp)
                positions = 3 if reduction == "mean" else 1
                expected[:, i, j] = [float(v * scale / mpf(t) / positions) for v in ends]
        for grad, want in zip(grads, expected, strict=True):
            assert_close(xp, grad, want, rtol=1e-7, atol=1e-16)
        np.testing.assert_allclose(xp.numpy(grads[1])[[0, 2]], expected[1, [0, 2]], rtol=1e-12)


def test_the_gradient_of_logcumsumexp(xp):
    rng = np.random.default_rng(39)
    x, dy = rng.normal(size=(2, 11, 3)) * 3
    sums = np.cumsum(np.exp(x), axis=0)
    expected = np.exp(x) * np.cumsum((dy / sums)[::-1], axis=0)[::-1]
    actual = ps.logcumsumexp_vjp(xp.asarray(x), xp.asarray(dy), axis=0)
    assert_close(xp, actual, expected, rtol=1e-11, atol=1e-14)
    far = xp.asarray([-np.inf, 0.0, 2000.0, -np.inf, 0.0])
    actual = ps.logcumsumexp_vjp(far, xp.asarray([7.0, 1.0, 2.0, 3.0, 4.0]))
    assert_close(xp, actual, [0.0, 1.0, 9.0, 0.0, 0.0])


def test_the_gradient_of_running_sums_far_from_0(xp):
    """A logarithm of 1000 is rounded by more than its exponential may be."""
    rng = np.random.default_rng(40)
    x, dy = np.round(rng.normal(size=(2, 11, 3)) * 3)
    sums = np.cumsum(np.exp(x), axis=0)
    expected = np.exp(x) * np.cumsum((dy / sums)[::-1], axis=0)[::-1]
    given = xp.asarray(x + 1000, "float32"), xp.asarray(dy, "float32")
    actual = ps.logcumsumexp_vjp(*given, axis=0)
    assert_close(xp, actual, expected, "float32", rtol=2e-6, atol=2e-6)


def gradient(xp, f, *arrays):
    """Return the gradients of a number that is computed of arrays, as the library finds them."""
    if xp.library == "torch":
        import torch

        given = [xp.asarray(a).requires_grad_() for a in arrays]
        return [xp.numpy(g) for g in torch.autograd.grad(f(*given), given)]
    if xp.library == "mlx":
        given = [xp.asarray(a) for a in arrays]
        return [xp.numpy(g) for g in xp.xp.vjp(f, given, [xp.asarray(1.0)])[1]]
    import jax

    slopes = jax.jit(jax.grad(f, argnums=tuple(range(len(arrays)))))
    return [xp.numpy(g) for g in slopes(*map(xp.asarray, arrays))]


@pytest.fixture
def differentiating(xp):
    if not xp.differentiates:
        pytest.skip(f"{xp.name} does not differentiate")
    return xp


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_derivative_of_a_confident_softmax(differentiating, dtype, axis, temperature):
    xp = differentiating
    x, dy, expected = (a if axis else a.T for a in confident(5, MARGINS[dtype]))
    # Products of 0.7 are rounded, which is not to be left over from what cancels.
    x, dy, expected = (temperature * x).astype(dtype), xp.asarray(0.7 * dy, dtype), 0.7 * expected

    def f(x):
        return (ps.softmax(x, axis=axis, temperature=temperature) * dy).sum()

    found = gradient(xp, f, x)
    if xp.library == "jax":  # whose parts are other programs
        import jax

        found.append(xp.numpy(jax.grad(f)(xp.asarray(x))))
    for dx in found:
        np.testing.assert_allclose(dx, expected / temperature, rtol=32 * EPS[dtype], atol=0)


def test_the_derivative_by_a_confident_output_is_that_of_the_formula(differentiating):
    """Of dx = y * (dy - s): w_i (dy_i - s) - dy_i sum(w * y) by y_i, whatever the y sum to."""
    xp = differentiating
    rng = np.random.default_rng(38)
    y = np.asarray(ps.softmax(np.asarray([[20.0, 0, 1, 2], [0, 4, 0, 0], [1, 1, 1, 1]])))
    dy, w = rng.normal(size=(2, *y.shape))
    s, t = ((a * y).sum(axis=-1, keepdims=True) for a in (dy, w))
    given = [xp.asarray(a) for a in (dy, w)]
    (grad,) = gradient(xp, lambda y: (ps.softmax_vjp(y, given[0]) * given[1]).sum(), y)
    np.testing.assert_allclose(grad, w * (dy - s) - dy * t, rtol=1e-12)
    (grad,) = gradient(xp, lambda dy: (ps.softmax_vjp(xp.asarray(y), dy) * given[1]).sum(), dy)
    np.testing.assert_allclose(grad, y * (w - t), rtol=1e-12, atol=1e-15)


def test_documented_gradients(differentiating):
    xp = differentiating
    rng = np.random.default_rng(37)
    x, y = rng.normal(size=(2, 5))
    p, q = (np.exp(a) / np.exp(a).sum() for a in (x, y))
    h = -(p * np.log(p)).sum()
    (grad,) = gradient(xp, ps.entropy, x)
    np.testing.assert_allclose(grad, p * (-np.log(p) - h), rtol=1e-12, atol=1e-15)
    k, u, t = (p * np.log(p / q)).sum(), np.log(q / p), 1.0
    by_p, by_q = gradient(xp, lambda x, y: ps.kl_divergence(x, y, temperature=t), x, y)
    np.testing.assert_allclose(by_p, p * (-u - k) / t, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(by_q, (q - p) / t, rtol=1e-12, atol=1e-15)
    (grad,) = gradient(xp, ps.logmeanexp, x)
    np.testing.assert_allclose(grad, p, rtol=1e-13)
    dy = rng.normal(size=5)
    (grad,) = gradient(xp, lambda x: (ps.logcumsumexp(x) * xp.asarray(dy)).sum(), x)
    sums = np.cumsum(np.exp(x))
    expected = [np.exp(x[j]) * (dy[j:] / sums[j:]).sum() for j in range(5)]
    np.testing.assert_allclose(grad, expected, rtol=1e-12)


def test_zero_probabilities_have_no_gradient_and_give_no_nan(differentiating):
    """What torch's kl_div and a product p * log(p) get wrong."""
    xp = differentiating
    x, y = np.asarray([0.0, -math.inf, 1.0, -2000.0]), np.asarray([1.0, 0.5, 0.0, -1.0])
    (grad,) = gradient(xp, ps.entropy, x)
    p = np.exp(x) / np.exp(x).sum()
    assert np.isfinite(grad).all()
    np.testing.assert_array_equal(grad[[1, 3]], 0.0)
    by_p, by_q = gradient(xp, ps.kl_divergence, x, y)
    assert np.isfinite(by_p).all()
    np.testing.assert_array_equal(by_p[[1, 3]], 0.0)
    q = np.exp(y) / np.exp(y).sum()
    np.testing.assert_allclose(by_q, q - p, rtol=1e-13)
    y[1] = -math.inf  # both are 0
    by_p, by_q = gradient(xp, ps.kl_divergence, x, y)
    assert np.isfinite([by_p, by_q]).all()
    (grad,) = gradient(xp, ps.logmeanexp, x)
    np.testing.assert_allclose(grad, p, rtol=1e-13, atol=1e-300)
    (grad,) = gradient(xp, lambda x: ps.logcumsumexp(x)[-1], np.r_[-math.inf, -math.inf, x])
    np.testing.assert_allclose(grad, np.r_[0, 0, p], rtol=1e-13, atol=1e-300)


def test_divergence_answers_in_float32_under_autocast(xp, torch):
    x = xp.asarray([[1.0, 2.0, 0.0]], "bfloat16").requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        k = ps.kl_divergence(x, x.detach() * 0.5)
    assert k.dtype == torch.float32
    assert torch.autograd.grad(k, x)[0].dtype == torch.bfloat16


def test_a_memory_map_is_an_array_of_numpy(tmp_path):
    """The one subclass that is taken: what numpy.load gives for a file that is not read at once."""

    def mapped(values):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.npy"
        np.save(path, values)
        return np.load(path, mmap_mode="r")

    x, labels = np.random.default_rng(31).normal(size=(6, 5)), np.arange(6) % 5
    assert type(mapped(x)) is np.memmap
    for f in (ps.softmax, ps.logsumexp, ps.softmax_jacobian, ps.sparsemax, ps.entropy):
        y = f(mapped(x))
        assert type(y) is type(f(x))
        np.testing.assert_array_equal(y, f(x))
    for f in (ps.cross_entropy_value_and_grad, ps.entmax_loss_value_and_grad):
        for y, expected in zip(f(mapped(x), mapped(labels)), f(x, labels), strict=True):
            assert type(y) is type(expected)
            np.testing.assert_array_equal(y, expected)


def test_autograd_of_running_sums_gives_nothing_to_minus_infinity(differentiating):
    """As logcumsumexp_vjp does; a sum of nothing, too, has no gradient."""
    xp, inf = differentiating, np.inf
    x, dy = [[-inf, -inf, 0.0, 0.0], [-inf] * 4], xp.asarray([7.0, 5.0, 3.0, 2.0])
    (grad,) = gradient(xp, lambda x: (ps.logcumsumexp(x, axis=1) * dy).sum(), x)
    np.testing.assert_allclose(grad, [[0.0, 0.0, 4.0, 1.0], [0.0] * 4], rtol=1e-15)
