"""sample_weight: one weight per position; beside every other option in test_cross_entropy.py."""

from __future__ import annotations

import numpy as np
import pytest
from asserts import assert_close
from test_cross_entropy import INDICES, LOGITS, SAMPLES

import portable_softmax as ps

pytestmark = pytest.mark.run_on("paths")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_whole_weight_repeats_its_position(xp, reduction):
    rng = np.random.default_rng(21)
    x, labels, times = rng.normal(size=(5, 7)), rng.integers(7, size=5), [3, 1, 0, 2, 1]
    for t in (labels, rng.dirichlet(np.ones(7), size=5)):
        weighted = ps.cross_entropy_value_and_grad(
            xp.asarray(x), xp.asarray(t), sample_weight=xp.asarray(times), reduction=reduction
        )
        loss, grad = ps.cross_entropy_value_and_grad(
            np.repeat(x, times, axis=0), np.repeat(t, times, axis=0), reduction=reduction
        )
        assert_close(xp, weighted[0], loss, rtol=1e-14)
        summed = np.zeros((5, 7))
        np.add.at(summed, np.repeat(np.arange(5), times), grad)
        assert_close(xp, weighted[1], summed, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("weight", [0.0, 1.5])
def test_the_weight_of_a_single_sample(xp, weight):
    """It has no axis, as the label has none; an ignored sample may hold what it likes."""
    row = np.asarray([np.nan, 1.0, 2.0]) if weight == 0 else np.asarray([0.5, 1.0, 2.0])
    options = {"sample_weight": xp.asarray(weight, "float64"), "reduction": "sum"}
    loss, grad = ps.cross_entropy_value_and_grad(xp.asarray(row), xp.asarray(1), **options)
    exact = np.exp(row) / np.exp(row).sum()
    want = weight * -np.log(exact[1]) if weight else 0.0
    assert_close(xp, loss, want, rtol=1e-14)
    slope = weight * (exact - [0, 1, 0]) if weight else np.zeros(3)
    assert_close(xp, grad, slope, rtol=1e-14)


@pytest.mark.slow("XLA compiles many programs", "jax")
def test_the_weight_of_its_class_is_the_weight_of_a_position(xp):
    rng = np.random.default_rng(22)
    x, labels, weight = rng.normal(size=(6, 4)), rng.integers(4, size=6), rng.uniform(size=4)
    for reduction in ("mean", "sum", "none"):
        given = xp.asarray(x), xp.asarray(labels)
        by_class = ps.cross_entropy_value_and_grad(
            *given, weight=xp.asarray(weight), reduction=reduction
        )
        by_position = ps.cross_entropy_value_and_grad(
            *given, sample_weight=xp.asarray(weight[labels]), reduction=reduction
        )
        for one, other in zip(by_class, by_position, strict=True):
            np.testing.assert_allclose(xp.numpy(one), xp.numpy(other), rtol=1e-14)


@pytest.mark.parametrize("shape", [(3, 5), (100_000, 3), (3, 100_000), (70, 40, 33), (0, 4)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_tiles_answer_as_the_portable_path(shape, dtype):
    """On both sides of the size of a tile, for every axis, with labels that count and do not."""
    rng = np.random.default_rng(23)
    x = (rng.normal(size=shape) * 5).astype(dtype)
    compute = np.float32 if dtype == "float16" else x.dtype
    for axis in range(len(shape)):
        if not (n := shape[axis]):
            continue
        positions = (*shape[:axis], *shape[axis + 1 :])
        labels = rng.integers(n, size=positions)
        samples = np.where(rng.random(positions) < 0.2, 0, rng.random(positions))
        for options in (
            {},
            {"weight": rng.random(n), "ignore_index": 0},
            {"reduction": "none", "label_smoothing": 0.1},
        ):
            options = {"axis": axis, "sample_weight": samples, **options}
            tiled = ps.cross_entropy_value_and_grad(x, labels, **options)
            with ps.kernels.portable():
                plain = ps.cross_entropy_value_and_grad(x, labels, **options)
            for one, other in zip(tiled, plain, strict=True):
                unit = 64 * np.finfo(compute).eps + 2 * np.finfo(dtype).eps
                terms = 8 * np.finfo(compute).eps * np.max(np.abs(other), initial=0)
                terms = np.nan_to_num(terms) + np.finfo(dtype).smallest_subnormal
                np.testing.assert_allclose(one, other, rtol=unit, atol=terms)


def test_the_loss_of_a_position_is_the_derivative_of_its_weight(xp):
    """Of the sum; where the library differentiates."""
    if not xp.differentiates:
        pytest.skip(f"{xp.name} does not differentiate")
    x, labels = xp.asarray(LOGITS), xp.asarray(INDICES)
    losses = xp.numpy(ps.cross_entropy(x, labels, reduction="none"))

    def total(s):
        return ps.cross_entropy(x, labels, sample_weight=s, reduction="sum")

    slope = xp.grad(total)(xp.asarray(SAMPLES))
    # A position of weight 0 is ignored.
    np.testing.assert_allclose(xp.numpy(slope), np.where(SAMPLES == 0, 0, losses), rtol=1e-14)
