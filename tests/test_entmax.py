"""entmax and sparsemax against exact values, on every backend."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import reference
from asserts import assert_close, assert_like
from mpmath import mp, mpf
from test_values import ROWS, of_equal_length

import portable_softmax as ps

pytestmark = pytest.mark.run_on("paths")

FINITE = of_equal_length({k: v for k, v in ROWS.items() if k not in ("huge", "minus infinity")})
ALPHAS = (1.0, 1 + 1e-9, 1.01, 1.25, 1.5, 1.9, 2.0, 2.5, 3.0, 8.0, 100.0, np.inf)


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


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_golden(xp, alpha, dtype):
    """JAX compiles each: there each pair of length, alpha and dtype is met, not each three."""
    eps = float(np.finfo(dtype).eps)
    met = ALPHAS.index(alpha) + (dtype == "float64")
    groups = list(FINITE.items())
    for name, rows in groups[met % 2 :: 2] if xp.library == "jax" else groups:
        x = rows.astype(dtype)
        functions = [lambda x: ps.entmax(x, alpha=alpha)]
        functions += [ps.sparsemax] if alpha == 2 else []
        for f in functions:
            y = assert_like(xp, f(xp.asarray(x)), x.shape, dtype)
            np.testing.assert_allclose(y.sum(axis=1, dtype=np.longdouble), 1.0, atol=2 * eps)
            for got, row in zip(y, x, strict=True):
                expected = np.asarray([float(v) for v in exact_entmax(reference.exact(row), alpha)])
                # What tau is off by moves an entry by its power's slope, y^(2 - alpha).
                slope = expected ** (2 - alpha) if alpha < 2 else 1.0
                span = min(float(np.ptp(row)), 1 / max(alpha - 1, eps))
                bound = eps * (8 * slope + (4 + 2 * span) * expected)
                if alpha >= 2:
                    bound = eps * 8
                assert (np.abs(got - expected) <= bound + np.finfo(dtype).tiny).all(), (name, row)


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


def test_zeros_are_exact(xp):
    x = np.asarray([3.0, 2.9, 0.9, -50.0, 2.5])
    for alpha in (1.5, 1.75, 2.0, 3.0):
        y = xp.numpy(ps.entmax(xp.asarray(x), alpha=alpha))
        expected = [float(v) for v in exact_entmax(reference.exact(x), alpha)]
        np.testing.assert_array_equal(y == 0, np.asarray(expected) == 0)
        assert (y[3], y[2]) == (0.0, 0.0)


def test_its_ends_are_softmax_and_the_argmax(xp):
    x = np.asarray([[1.0, 3.0, 3.0, -2.0], [0.5, 0.25, 0.0, 0.0]])
    same = xp.numpy(ps.softmax(xp.asarray(x)))
    assert_close(xp, ps.entmax(xp.asarray(x), alpha=1), same, rtol=1e-14)
    assert_close(xp, ps.entmax(xp.asarray(x), alpha=1 + 1e-13), same, rtol=1e-11)
    shared = [[0.0, 0.5, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]]
    assert_close(xp, ps.entmax(xp.asarray(x), alpha=np.inf), shared, rtol=0.0)


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.parametrize("axis", [0, 1, -1, (0, 2), None])
def test_over_any_axes(xp, axis):
    x = np.random.default_rng(60).normal(size=(3, 4, 5)) * 2
    picked = range(3) if axis is None else np.atleast_1d(axis) % 3
    kept = [a for a in range(3) if a not in picked]
    flat = np.transpose(x, [*kept, *picked])
    shape = flat.shape
    rows = flat.reshape(int(np.prod([x.shape[a] for a in kept])), -1)
    alphas = (1.5, 2.0, 4.0)
    given = [((xp.asarray(x),), {"alpha": alpha, "axis": axis}) for alpha in alphas]
    for alpha, actual in zip(alphas, xp.calls(ps.entmax, given), strict=True):
        y = [[float(v) for v in exact_entmax(reference.exact(row), alpha)] for row in rows]
        y = np.transpose(np.asarray(y).reshape(shape), np.argsort([*kept, *picked]))
        assert_close(xp, actual, y, rtol=1e-12, atol=1e-15)


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0, 3.5])
def test_many_classes(xp, alpha):
    """Sums within 2 units of one, and no row depends on the rows beside it."""
    n = 3_000 if xp.lazy else 30_000
    rng = np.random.default_rng(61)
    x = np.stack([rng.normal(size=n), rng.normal(size=n) * 1e-3, rng.normal(size=n) * 10])
    for dtype in ("float32", "float64"):
        given = x.astype(dtype)
        y = assert_like(xp, ps.entmax(xp.asarray(given), alpha=alpha), x.shape, dtype)
        sums = y.sum(axis=1, dtype=np.longdouble)
        np.testing.assert_allclose(sums, 1.0, atol=2 * float(np.finfo(dtype).eps))
        alone = [xp.numpy(ps.entmax(xp.asarray(given[i : i + 1]), alpha=alpha)) for i in range(3)]
        if not xp.lazy:
            np.testing.assert_allclose(
                np.concatenate(alone), y, rtol=1e-3 if dtype == "float32" else 1e-10
            )


def test_shifting_a_row_changes_nothing(xp):
    x = np.round(np.random.default_rng(62).normal(size=(5, 8)) * 16) / 16
    for alpha in (1.3, 1.5, 2.0):
        one = ps.entmax(xp.asarray(x), alpha=alpha)
        other = ps.entmax(xp.asarray(x + 64.0), alpha=alpha)
        np.testing.assert_array_equal(xp.numpy(one), xp.numpy(other))


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
    if xp.library == "torch":
        import torch

        z = xp.asarray(x).requires_grad_()
        (grad,) = torch.autograd.grad(ps.entmax(z, alpha=alpha), z, xp.asarray(dy))
        assert_close(xp, grad, expected, rtol=1e-10, atol=1e-13)
    if xp.library == "jax":
        import jax

        back = jax.jit(lambda x, dy: jax.vjp(lambda x: ps.entmax(x, alpha=alpha), x)[1](dy)[0])
        assert_close(xp, back(*map(xp.asarray, (x, dy))), expected, rtol=1e-10, atol=1e-13)


def test_half_types_are_rounded_once(xp):
    """The power and the sum of float16 are no number soon; they are computed in float32."""
    if not xp.halves:
        pytest.skip(f"{xp.name} has no half types")
    for dtype in xp.halves:
        x = xp.asarray(np.random.default_rng(64).normal(size=(3, 400)), dtype)
        wide = xp.asarray(xp.numpy(x).astype(np.float32))
        for alpha in (1.5, 2.0):
            rounded = xp.asarray(xp.numpy(ps.entmax(wide, alpha=alpha)), dtype)
            actual = assert_like(xp, ps.entmax(x, alpha=alpha), (3, 400), dtype)
            np.testing.assert_array_equal(actual, xp.numpy(rounded))


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


@pytest.mark.slow("XLA compiles many programs", "jax")
def test_probabilities_beyond_2_meet_the_condition_of_the_maximum(xp):
    """p^c - c x is the same where p is not 0, and c x below it elsewhere."""
    x = np.random.default_rng(65).normal(size=(60, 7)).astype(np.float32)
    x *= 10.0 ** np.arange(-4, 2).repeat(10)[:, None].astype(np.float32)
    for alpha in (2.01, 2.7, 6.0):
        c = np.longdouble(alpha) - 1
        p = assert_like(xp, ps.entmax(xp.asarray(x), alpha=alpha), x.shape, "float32")
        p, z = p.astype(np.longdouble), c * x
        np.testing.assert_allclose(p.sum(axis=1), 1.0, atol=2.0**-22)
        level = p**c - z
        most = np.max(level, axis=1, keepdims=True, where=p > 0, initial=-np.inf)
        least = np.min(level, axis=1, keepdims=True, where=p > 0, initial=np.inf)
        rounding = 8 * c * 2.0**-23 * p.max(axis=1, keepdims=True) ** c
        assert (most - least <= rounding).all()
        assert ((p > 0) | (z + most <= rounding)).all()


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
