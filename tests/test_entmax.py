"""entmax and sparsemax against exact values, on every backend."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import reference
from asserts import assert_close
from mpmath import mp, mpf

import portable_softmax as ps

pytestmark = pytest.mark.run_on("paths")


def exact_entmax(row, alpha):
    """Return the probabilities by bisection for the threshold, in many digits.

    Beyond 2 the least probability is looked for: it is steep in the threshold.
    """
    return _bisected(tuple(row), alpha)


@cache  # for every backend of a process
def _bisected(row, alpha):
    c = mpf(alpha) - 1
    if c == 0:
        return reference.softmax(row)
    if c == mp.inf:
        ties = [v == max(row) for v in row]
        return [mpf(tie) / sum(ties) for tie in ties]
    if c > 1:
        with mp.workdps(60):

            def powers(base, p):
                return [(p**c + c * (v - base)) ** (1 / c) if v >= base else mpf(0) for v in row]

            base = min(v for v in row if mp.fsum(powers(v, mpf(0))) < 1)
            low, high = mpf(0), mpf(1)
            for _ in range(190):
                p = (low + high) / 2
                low, high = (low, p) if mp.fsum(powers(base, p)) >= 1 else (p, high)
            return powers(base, low)
    with mp.workdps(60):
        top = max(row)
        z = [c * (v - top) for v in row]
        low, high = mpf(-1), mpf(0)
        for _ in range(190):
            tau = (low + high) / 2
            s = mp.fsum((v - tau) ** (1 / c) for v in z if v > tau)
            low, high = (tau, high) if s >= 1 else (low, tau)
        return [(v - low) ** (1 / c) if v > low else mpf(0) for v in z]


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_a_large_entry_does_not_pay_for_many_small_ones(xp, alpha):
    """Small entries are rounded alike, and their sum is off by what all of them have lost."""
    n, h = 255, float(np.float32(0.91051114))
    x = np.full(n, -h, np.float32)
    x[41] = 0.0
    if alpha == 2.0:  # p - h is the probability of the others
        largest = (1 + (n - 1) * h) / n
        small = largest - h
    else:  # a^2, and (a - h/2)^2
        a = ((n - 1) * h + np.sqrt((n - 1) ** 2 * h**2 - n * ((n - 1) * h**2 - 4))) / (2 * n)
        largest, small = a * a, (a - h / 2) ** 2
    y = xp.numpy(ps.entmax(xp.asarray(x), alpha=alpha))
    assert abs(y[41] - largest) <= 4 * 2.0**-24
    np.testing.assert_allclose(np.delete(y, 41), small, atol=4 * 2.0**-24)


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
def test_many_probabilities_sum_to_1(xp, alpha):
    x = 0.01 * np.random.default_rng(4).standard_normal((3, 3000))
    y = xp.numpy(ps.entmax(xp.asarray(x, "float32"), alpha=alpha))
    assert np.count_nonzero(y) > 300
    np.testing.assert_allclose(y.sum(axis=1, dtype=np.float64), 1.0, rtol=0, atol=2 * 2.0**-23)


@pytest.mark.slow("XLA compiles each loop", "jax")
@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0, 3.0])
def test_the_vjp_is_the_slope(xp, alpha):
    """Of the exact function, by central differences; away from where an entry becomes 0."""
    rng = np.random.default_rng(63)
    x, dy = rng.normal(size=(2, 4)) * 0.8, rng.normal(size=(2, 4))
    step = mpf(10) ** -25
    expected = np.zeros((2, 4))
    for i in range(2):
        row = reference.exact(x[i])
        for j in range(4):
            ends = [
                exact_entmax([v + s * step * (k == j) for k, v in enumerate(row)], alpha)
                for s in (1, -1)
            ]
            slope = [(a - b) / (2 * step) for a, b in zip(*ends, strict=True)]
            expected[i, j] = float(mp.fsum(d * mpf(v) for d, v in zip(slope, dy[i], strict=True)))
    y = ps.entmax(xp.asarray(x), alpha=alpha)
    actual = ps.entmax_vjp(y, xp.asarray(dy), alpha=alpha)
    assert_close(xp, actual, expected, rtol=1e-10, atol=1e-13)


def test_the_argmax_has_the_gradient_0(xp, torch):
    x = xp.asarray([1.0, 3.0, 3.0]).requires_grad_()
    y = ps.entmax(x, alpha=np.inf)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.zeros_like(x))


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.libraries("torch", "jax")
def test_the_slope_in_alpha(xp):
    """Of the exact function, by difference quotients, also where the formula is 0/0."""
    x, dy = np.asarray([0.9, 0.3, -0.2, 0.5]), np.asarray([1.0, -2.0, 3.0, 0.5])
    alphas, step = (1.0, 1 + 1e-9, 1.001, 1.5, 1.9), mpf(10) ** -12

    def exact(alpha):
        p = exact_entmax(reference.exact(x), alpha)
        return mp.fsum(a * mpf(b) for a, b in zip(p, dy, strict=True))

    def total(alpha):
        return (ps.entmax(xp.asarray(x), alpha=alpha) * xp.asarray(dy)).sum()

    ends = [(max(mpf(1), a - step), a + step) for a in map(mpf, alphas)]
    expected = [float((exact(high) - exact(low)) / (high - low)) for low, high in ends]
    if xp.library == "torch":
        import torch

        leaves = [xp.asarray(a).requires_grad_() for a in alphas]
        slopes = [float(torch.autograd.grad(total(a), a)[0]) for a in leaves]
    else:
        import jax

        slopes = jax.jit(jax.vmap(jax.grad(total)))(xp.asarray(np.asarray(alphas)))
        outside = jax.jit(lambda a: ps.entmax(xp.asarray(x), alpha=a))(2.5)
        assert np.isnan(outside).all()
    np.testing.assert_allclose(slopes, expected, rtol=1e-10)


def test_an_alpha_in_an_array_is_the_number(xp):
    x = np.asarray([[0.9, 0.3, -0.2, 0.5], [2.0, 2.0, -1.0, 0.75]])
    for alpha in (1.0, 1.25, 2.0):
        expected = xp.numpy(ps.entmax(xp.asarray(x), alpha=alpha))
        actual = ps.entmax(xp.asarray(x), alpha=xp.asarray(alpha))
        assert_close(xp, actual, expected, rtol=1e-14, atol=1e-16)


def test_second_derivatives_in_alpha(xp, torch):
    x = xp.asarray(np.random.default_rng(66).normal(size=(2, 5))).requires_grad_()
    alpha = xp.asarray(1.3).requires_grad_()
    f = lambda x, a: ps.entmax(x, alpha=a)  # noqa: E731
    assert torch.autograd.gradcheck(f, (x, alpha))
    assert torch.autograd.gradgradcheck(f, (x, alpha))


@pytest.mark.slow("XLA compiles both orders", "jax")
def test_check_grads_in_alpha(xp, jax):
    from jax.test_util import check_grads

    x = xp.asarray(np.random.default_rng(66).normal(size=(2, 5)))
    check_grads(lambda x, a: ps.entmax(x, alpha=a), (x, 1.3), order=2, modes=["rev"])
