"""The loss of entmax against exact values, on every backend."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import reference
from asserts import assert_close, assert_like, assert_same
from covering import combined
from mpmath import mp, mpf
from test_entmax import exact_entmax
from test_family import gradient

import portable_softmax as ps

pytestmark = pytest.mark.run_on("paths")

LOGITS = np.asarray(
    [[0.3, -1.2, 2.0, 0.7], [4.0, 1.0, -3.0, 0.5], [-2.0, -2.0, 1.5, 1.5], [0.1, 0.2, 0.3, 1.0]]
)
INDICES = np.asarray([2, 0, 0, 1])
ALPHAS = (1.0, 1 + 1e-9, 1.25, 1.5, 2.0, 3.0, 10.0, np.inf)


def exact_loss(row, t, alpha):
    """Return the definition, the sum of (p - t) x and both entropies, and p - t."""
    row, t, a = reference.exact(row), reference.exact(t), mpf(alpha)
    p = exact_entmax(row, alpha)

    def entropy(q):
        if a == mp.inf:
            return mpf(0)
        if a == 1:
            return -mp.fsum(v * mp.log(v) for v in q if v)
        return (1 - mp.fsum(v**a for v in q if v)) / (a * (a - 1))

    # Bisection has left 1e-57, which alpha near 1 divides by 1e-9.
    inner = mp.fsum((b - c) * v for b, c, v in zip(p, t, row, strict=True))
    return inner + entropy(p) - entropy(t), [b - c for b, c in zip(p, t, strict=True)]


def targets(kind):
    if kind == "index":
        return INDICES, np.eye(4)[INDICES]
    if kind == "one-hot":
        return np.eye(4, dtype=np.int64)[INDICES], np.eye(4)[INDICES]
    t = np.asarray(
        [[0.25, 0.25, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0], [0.125, 0.375, 0.5, 0.0], [0.25] * 4]
    )
    return t, t


@cache
def exact_losses(alpha, kind):
    """Return the losses and the slopes of LOGITS."""
    exact = [exact_loss(row, t, alpha) for row, t in zip(LOGITS, targets(kind)[1], strict=True)]
    losses = np.asarray([float(loss) for loss, _ in exact])
    return losses, np.asarray([[float(v) for v in slope] for _, slope in exact])


@pytest.mark.slow("a graph for each loss", "dask")
@pytest.mark.slow("XLA compiles each loss with its gradient", "jax")
@pytest.mark.parametrize("alpha", ALPHAS)
def test_golden(xp, alpha):
    kinds, reductions = ("index", "one-hot", "probabilities"), ("mean", "sum", "none")
    cases = combined(xp, ALPHAS, kinds, reductions, (False, True), strength=2)
    cases = [case for one, *case in cases if one == alpha]
    given, samples = [], np.asarray([0.5, 2.0, 1.0, 0.0])
    for kind, reduction, weighted in cases:
        options = {"alpha": alpha, "reduction": reduction}
        options["sample_weight"] = xp.asarray(samples) if weighted else None
        given.append(((xp.asarray(LOGITS), xp.asarray(targets(kind)[0])), options))
    for case, (alone, loss, grad) in zip(cases, xp.calls(three_outputs, given), strict=True):
        kind, reduction, weighted = case
        losses, slopes = exact_losses(alpha, kind)
        s = samples if weighted else np.ones(4)
        scale = s.sum() if reduction == "mean" else 1
        expected = s * losses if reduction == "none" else (s * losses).sum() / scale
        assert_close(xp, loss, expected, rtol=1e-13, atol=2e-15)
        assert_close(xp, grad, s[:, None] * slopes / scale, rtol=1e-12, atol=2e-15)
        assert_same(xp, alone, loss)


def three_outputs(x, labels, **options):
    """Return what both functions answer: the loss alone, then the loss and its gradient."""
    loss, grad = ps.entmax_loss_value_and_grad(x, labels, **options)
    return ps.entmax_loss(x, labels, **options), loss, grad


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0, 3.0, np.inf])
def test_it_is_never_negative_and_0_at_its_own_probabilities(xp, alpha):
    rng = np.random.default_rng(71)
    x = (rng.normal(size=(50, 6)) * rng.choice([0.01, 1.0, 5.0], size=(50, 1))).astype(np.float32)
    options = {"alpha": alpha, "reduction": "none"}
    losses = ps.entmax_loss(xp.asarray(x), xp.asarray(rng.integers(6, size=50)), **options)
    assert (assert_like(xp, losses, (50,), "float32") >= 0).all()
    own = ps.entmax(xp.asarray(x), alpha=alpha)
    losses = xp.numpy(ps.entmax_loss(xp.asarray(x), own, **options))
    np.testing.assert_allclose(losses, 0.0, atol=2e-6)


def test_equal_maxima_share_the_gradient_of_the_loss_of_an_argmax(xp):
    if not xp.differentiates:
        pytest.skip(f"{xp.name} does not differentiate")
    x = np.asarray([-2.0, -2.0, 1.5, 1.5])
    (grad,) = gradient(xp, lambda x: ps.entmax_loss(x, xp.asarray(0), alpha=np.inf), x)
    np.testing.assert_array_equal(grad, [-1.0, 0.0, 0.5, 0.5])


def test_a_label_far_ahead_has_no_loss_and_no_gradient(xp):
    x = xp.asarray([[3.0, 0.0, 0.5]])
    for alpha in (1.5, 2.0):
        loss, grad = ps.entmax_loss_value_and_grad(x, xp.asarray([0]), alpha=alpha)
        assert_close(xp, loss, 0.0)
        assert_close(xp, grad, np.zeros((1, 3)))
