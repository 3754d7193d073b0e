"""Cross-entropy of yes-or-no labels against exact values, on every backend."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reference
from asserts import assert_like
from mpmath import mp, mpf

import portable_softmax as ps

pytestmark = pytest.mark.run_on("paths")

INF, NAN = np.inf, np.nan


def exact(z, t, w=1, c=1, g=0, e=0):
    """Return loss and gradient of one entry: the formula of the docstring, and its slope."""
    t = (1 - mpf(e)) * mpf(t) + mpf(e) / 2

    def loss(z):
        p, q = 1 / (1 + mp.exp(-z)), 1 / (1 + mp.exp(z))
        yes = mpf(c) * t * q ** mpf(g) * -mp.log(p)
        return mpf(w) * (yes + (1 - t) * p ** mpf(g) * -mp.log(q))

    return loss(mpf(z)), mp.diff(loss, mpf(z), h=mpf(10) ** -60)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("gamma", [0.0, 0.7, 2.0])
def test_confident_logits_keep_their_digits(xp, dtype, gamma):
    """log(1 - p) with p = 1 loses them all."""
    z = np.asarray([1.0, 10.0, 20.0, 40.0], dtype)
    if gamma:
        z = z[:3] if dtype == "float32" else z  # the square is below float32's range
    for sign, label in itertools.product((1, -1), (0, 1)):
        arguments = xp.asarray(sign * z), xp.asarray(np.full(z.shape, label))
        options = {"focal_gamma": gamma, "reduction": "none"}
        both = ps.sigmoid_cross_entropy_value_and_grad(*arguments, **options)
        loss, grad = xp.computed(both)
        found = [exact(float(sign * v), label, g=gamma) for v in z]
        value, slope = assert_like(xp, loss, z.shape, dtype), assert_like(xp, grad, z.shape, dtype)
        assert reference.ulps(value, [v for v, _ in found]) <= 8
        assert reference.ulps(slope, [s for _, s in found]) <= 8
        assert (value >= 0).all()


@pytest.mark.parametrize("smoothing", [1e-6, 0.3, 1.0])
def test_a_little_smoothing_keeps_its_digits(xp, smoothing):
    """1 - (1 - e / 2) in float32 has few digits of e / 2, which a confident logit multiplies."""
    z, t = np.asarray([30.0, -30.0, 60.0], np.float32), np.asarray([1, 0, 1])
    options = {"label_smoothing": smoothing, "reduction": "none"}
    arguments = xp.asarray(z, "float32"), xp.asarray(t)
    both = ps.sigmoid_cross_entropy_value_and_grad(*arguments, **options)
    found = [exact(float(v), int(k), e=smoothing) for v, k in zip(z, t, strict=True)]
    for actual, expected in zip(both, zip(*found, strict=True), strict=True):
        assert reference.ulps(assert_like(xp, actual, z.shape, "float32"), expected) <= 8


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.parametrize("gamma", [0.0, 0.3, 2.0, 5.0])
@pytest.mark.parametrize("order", [1, 2])
def test_derivatives_are_finite_at_the_ends(xp, gamma, order):
    """Also at infinite logits that are right; where libraries multiply 0 by infinity."""
    if not xp.differentiates:
        pytest.skip(f"{xp.name} does not differentiate")
    right = np.asarray([[INF, -INF, 800.0, -800.0, 0.0, 0.0], [-INF, INF, 800.0, -800.0, 1.0, 3.0]])
    labels = np.asarray([[1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 1, 0]])

    def total(z):
        return ps.sigmoid_cross_entropy(
            z, xp.asarray(labels), focal_gamma=gamma, label_smoothing=0.0, reduction="sum"
        )

    if xp.library == "torch":
        import torch

        z = xp.asarray(right).requires_grad_()
        (slope,) = torch.autograd.grad(total(z), z, create_graph=True)
        (second,) = torch.autograd.grad(slope.sum(), z)
    else:
        slope = xp.grad(total)(xp.asarray(right))
        second = xp.grad(lambda z: xp.grad(total)(z).sum())(xp.asarray(right))
    actual = xp.numpy(slope if order == 1 else second)
    assert np.isfinite(actual).all()
    if order == 1:
        _, grad = ps.sigmoid_cross_entropy_value_and_grad(
            xp.asarray(right), xp.asarray(labels), focal_gamma=gamma, reduction="sum"
        )
        np.testing.assert_allclose(actual, xp.numpy(grad), rtol=1e-12, atol=1e-15)
