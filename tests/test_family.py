"""Entropy, divergence, means and running sums against exact values, on every backend."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
from asserts import assert_close, assert_like
from mpmath import mp
from test_values import EPS, MARGINS, confident

import portable_softmax as ps

pytestmark = pytest.mark.run_on("paths")


def exact_mean(row):
    return reference.logsumexp(row) - mp.log(len(row))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_divergence_of_equal_rows_is_0_however_they_lie_in_memory(xp, dtype):
    x = (np.random.default_rng(31).normal(size=(40, 31)) * 0.01).astype(dtype)
    wide = xp.asarray(np.concatenate([x, x], axis=1))[:, :31]
    for p, q in ((xp.asarray(np.asfortranarray(x)), wide), (xp.asarray(x.T.copy()).T, wide)):
        each = ps.kl_divergence(p, q, reduction="none")
        assert_close(xp, each, np.zeros(40), dtype, rtol=0.0)


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
    _, slopes = ps.kl_divergence_value_and_grad(x, y)
    assert [xp.dtype_name(slope) for slope in slopes] == ["float32", "float64"]


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


@pytest.mark.slow("a large graph", "dask")
def test_a_long_running_sum_keeps_its_digits(xp):
    """One entry after the other, 20 000 in float32 lose hundreds of units."""
    n = 512 if xp.lazy else 20_000
    x = np.full(n, 0.1, np.float32)
    exact = np.float64(x[0]) + np.log(np.arange(1.0, n + 1))
    y = assert_like(xp, ps.logcumsumexp(xp.asarray(x)), (n,), "float32")
    assert (np.abs(y - exact) <= 4 * np.spacing(np.abs(exact).astype(np.float32))).all()


# --------------------------------------------------------------------------- derivatives


def test_the_gradient_of_logcumsumexp(xp):
    """Also far from 0: a logarithm of 1000 is rounded by more than its exponential may be."""
    rng = np.random.default_rng(39)
    x, dy = rng.normal(size=(2, 11, 3)) * 3
    for shift, dtype, tolerance in ((0, "float64", 1e-11), (1000, "float32", 2e-6)):
        x, dy = (x, dy) if shift == 0 else (np.round(x), np.round(dy))
        expected = np.exp(x) * np.cumsum((dy / np.cumsum(np.exp(x), axis=0))[::-1], axis=0)[::-1]
        given = xp.asarray(x + shift, dtype), xp.asarray(dy, dtype)
        actual = ps.logcumsumexp_vjp(*given, axis=0)
        atol = tolerance if shift else 1e-14
        assert_close(xp, actual, expected, dtype, rtol=tolerance, atol=atol)
    far = xp.asarray([-np.inf, 0.0, 2000.0, -np.inf, 0.0])
    actual = ps.logcumsumexp_vjp(far, xp.asarray([7.0, 1.0, 2.0, 3.0, 4.0]))
    assert_close(xp, actual, [0.0, 1.0, 9.0, 0.0, 0.0])


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


def test_losses_answer_in_float32_under_autocast(xp, torch):
    x, labels = xp.asarray([[1.0, 2.0, 0.0]], "bfloat16").requires_grad_(), xp.asarray([1])
    for loss in (
        lambda: ps.kl_divergence(x, x.detach() * 0.5),
        lambda: ps.entmax_loss(x, labels),
        lambda: ps.sigmoid_cross_entropy(x, torch.ones_like(x, dtype=int)),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = loss()
        assert found.dtype == torch.float32
        assert torch.autograd.grad(found, x)[0].dtype == torch.bfloat16


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
