"""What only cubed has: a bound on memory, which its plan is checked against before it computes."""

from __future__ import annotations

import numpy as np
import pytest
from asserts import assert_close
from test_cross_entropy import GOLDEN, golden

import portable_softmax as ps

pytestmark = pytest.mark.libraries("cubed")

MEGABYTE = 1_000_000


def zeros(xp, shape, chunks, allowed):
    """Return logits and labels of 0, of which cubed stores none."""
    spec = xp.cubed.Spec(work_dir=xp.folder.name, allowed_mem=allowed)
    return (
        xp.xp.zeros(shape, dtype=xp.xp.float32, chunks=chunks, spec=spec),
        xp.xp.zeros(shape[:1], dtype=xp.xp.int64, chunks=chunks[:1], spec=spec),
    )


@pytest.mark.parametrize("rows", [512, 4096])
def test_projected_memory_is_within_what_is_allowed(xp, rows):
    """The chunks decide it; cubed fuses steps as far as they fit."""
    x, labels = zeros(xp, (rows, 512), (256, 256), 4 * MEGABYTE)
    loss, grad = ps.cross_entropy_value_and_grad(x, labels)
    for array in (ps.softmax(x), ps.logsumexp(x, axis=1), loss, grad):
        plan = array.plan()
        assert 0 < plan.max_projected_mem <= plan.allowed_mem == 4 * MEGABYTE


def test_a_chunk_that_does_not_fit_is_refused_before_anything_is_computed(xp):
    x, labels = zeros(xp, (1024, 512), (512, 512), 2 * MEGABYTE)
    with pytest.raises(ValueError, match="exceeds allowed_mem"):
        ps.cross_entropy(x, labels).compute()


def test_loss_and_gradient_in_chunks_are_those_of_the_whole(xp):
    rng = np.random.default_rng(5)
    given, labels = rng.normal(size=(6, 10)), rng.integers(0, 10, size=6)
    x = xp.xp.asarray(given, chunks=(4, 3), spec=xp.spec)
    loss, grad = ps.cross_entropy_value_and_grad(x, xp.asarray(labels))
    expected, slope = ps.cross_entropy_value_and_grad(given, labels)
    assert_close(xp, loss, expected, rtol=1e-14)
    assert_close(xp, grad, slope, rtol=1e-13)
    assert_close(xp, ps.logsumexp(x, axis=1), ps.logsumexp(given, axis=1), rtol=1e-14)


@pytest.mark.slow("cubed runs a plan of many tasks for each case")
@pytest.mark.parametrize("number", range(0, len(GOLDEN), 9))
def test_golden_cases(xp, number):
    """Some of those that test_cross_entropy.py runs on the other backends."""
    golden(xp, GOLDEN[number])


def test_arrays_of_two_specs_are_refused(xp):
    x, _ = zeros(xp, (4, 4), (2, 2), 10 * MEGABYTE)
    _, labels = zeros(xp, (4, 4), (2, 2), 11 * MEGABYTE)
    with pytest.raises(ValueError, match="labels"):
        ps.cross_entropy(x, labels)
