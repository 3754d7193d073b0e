"""Cross-entropy and its gradient against exact values, on every backend."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import reference
from asserts import assert_close, assert_like, assert_same
from covering import combined
from mpmath import mp, mpf

import portable_softmax as ps
from portable_softmax import kernels

pytestmark = pytest.mark.run_on("paths")

GOLDEN = json.loads(Path(__file__).with_name("cross_entropy_golden.json").read_text())
SOURCES = sorted({case["source"] for case in GOLDEN})


def arguments(xp, case):
    """Return the arrays and the options of a case."""
    options = dict(case["kwargs"], axis=case["axis"])
    if "weight" in options:
        options["weight"] = xp.asarray(options["weight"], "float64")
    dtype = "int64" if case["target_kind"] == "index" else "float64"
    return (xp.asarray(case["logits"], "float64"), xp.asarray(case["target"], dtype)), options


def three_outputs(logits, labels, **options):
    """Return what both functions answer: the loss alone, then the loss and its gradient."""
    loss, grad = ps.cross_entropy_value_and_grad(logits, labels, **options)
    return ps.cross_entropy(logits, labels, **options), loss, grad


@pytest.mark.slow("Triton interprets element by element", "triton")
@pytest.mark.slow("Numba compiles each option", "numba")
@pytest.mark.slow("a large graph for each case", "dask")
@pytest.mark.slow("XLA compiles each operation for each case", "jax")
@pytest.mark.parametrize("source", SOURCES)
def test_golden(xp, source):
    """The losses and gradients of tests/cross_entropy_golden.json, computed with 40 digits."""
    cases = [case for case in GOLDEN if case["source"] == source]
    answers = xp.calls(three_outputs, [arguments(xp, case) for case in cases])
    for case, (alone, loss, grad) in zip(cases, answers, strict=True):
        assert_close(xp, loss, case["loss"], rtol=1e-12, atol=1e-12)
        assert_close(xp, grad, case["grad"], rtol=1e-12, atol=1e-12)
        assert_close(xp, alone, case["loss"], rtol=1e-12, atol=1e-12)


def test_all_golden_cases_are_run():
    assert len(GOLDEN) == 135


# --------------------------------------------------------------------------- all options

LOGITS = np.asarray(
    [[0.3, -1.2, 2.0, 0.7], [40.0, 1.0, -3.0, 0.5], [-2.0, -2.0, 1.5, 1.5], [0.1, 0.2, 0.3, 9.0]]
)
INDICES = np.asarray([2, 0, 3, 1])
IGNORED = 3  # row 2
PROBABILITIES = np.asarray(
    [[0.2, 0.3, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.2], [0.5, 0.5, 0.5, 0.5]]
)
WEIGHT = np.asarray([0.5, 1.0, 2.0, 1.25])
SAMPLES = np.asarray([0.5, 2.0, 1.25, 0.0])
MASK = np.asarray(
    [[True, True, True, False], [True, True, True, True], [True, False, True, True], [True] * 4]
)
TARGETS = ("index", "one-hot", "probabilities")


@cache
def expected_row(kind, row, weighted, smoothing, z, cap, masked):
    t = np.eye(4)[INDICES[row]] if kind != "probabilities" else PROBABILITIES[row]
    return reference.cross_entropy_row(
        [mpf(v) for v in LOGITS[row]],
        [mpf(v) for v in t],
        [mpf(v) for v in (WEIGHT if weighted else np.ones(4))],
        mpf(smoothing),
        mpf(z),
        None if cap is None else mpf(cap),
        MASK[row] if masked else np.ones(4, bool),
    )


def expected(kind, reduction, sampled, weighted, ignoring, smoothing, z, cap, masked):
    """Return the exact loss and gradient: each position's times its weight, 0 if ignored."""
    rows = [expected_row(kind, r, weighted, smoothing, z, cap, masked) for r in range(4)]
    s = [mpf(v) for v in (SAMPLES if sampled else np.ones(4))]
    s = [mpf(0) if ignoring and INDICES[r] == IGNORED else s[r] for r in range(4)]
    losses = [s[r] * loss for r, (loss, _) in enumerate(rows)]
    divisor = mpf(1)
    if reduction == "mean":
        counts = [mpf(WEIGHT[k]) if weighted and kind == "index" else mpf(1) for k in INDICES]
        divisor = mp.fsum(a * b for a, b in zip(s, counts, strict=True))
    grad = np.asarray([[float(s[r] * g / divisor) for g in row] for r, (_, row) in enumerate(rows)])
    if reduction == "none":
        return np.asarray([float(v) for v in losses]), grad
    return float(mp.fsum(losses) / divisor), grad


BOTH = (False, True)


@pytest.mark.slow("Numba compiles each option", "numba", "torch-numba")
@pytest.mark.slow("Triton interprets element by element", "triton")
@pytest.mark.slow("a large graph for each option", "dask")
@pytest.mark.slow("XLA compiles each option", "jax")
@pytest.mark.parametrize("kind", TARGETS)
def test_option_product(xp, kind):
    """Every option with every other, against an exact model written from the docstring."""
    labels = {
        "index": INDICES,
        "one-hot": np.eye(4, dtype=np.int64)[INDICES],
        "probabilities": PROBABILITIES,
    }[kind]
    kinds = [(k, ignoring) for k in TARGETS for ignoring in BOTH if k == "index" or not ignoring]
    reductions, smoothings, caps = ("mean", "sum", "none"), (0.0, 0.1, 1.0), (None, 2.5)
    cases = [
        (axis, reduction, sampled, weighted, ignoring, *others)
        for axis, reduction, sampled, weighted, (one, ignoring), *others in combined(
            xp, (0, 1), reductions, BOTH, BOTH, tuple(kinds), smoothings, (0.0, 0.3), caps, BOTH
        )
        if one == kind
    ]

    def along(axis, a):
        return np.ascontiguousarray(a.T) if axis == 0 else a

    given = []
    for axis, reduction, sampled, weighted, ignoring, smoothing, z, cap, masked in cases:
        options = {
            "axis": axis,
            "reduction": reduction,
            "sample_weight": xp.asarray(SAMPLES) if sampled else None,
            "weight": xp.asarray(WEIGHT) if weighted else None,
            "ignore_index": IGNORED if ignoring else None,
            "label_smoothing": smoothing,
            "z_loss": z,
            "softcap": cap,
            "where": xp.asarray(along(axis, MASK)) if masked else None,
        }
        given.append(((xp.asarray(along(axis, LOGITS)), xp.asarray(along(axis, labels))), options))
    answers = xp.calls(three_outputs, given)
    for (axis, *case), (alone, loss, grad) in zip(cases, answers, strict=True):
        want, slope = expected(kind, *case)
        assert_close(xp, loss, want, rtol=1e-13, atol=1e-13)
        assert_close(xp, grad, along(axis, slope), rtol=1e-12, atol=1e-13)
        assert_same(xp, alone, loss)


# --------------------------------------------------------------------------- shapes and labels


@pytest.mark.slow("XLA compiles each axis", "jax")
@pytest.mark.slow("Numba compiles each layout", "numba")
@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -3])
def test_any_class_axis(xp, axis):
    """Images: the class axis may be anywhere."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 3, 4, 5))
    n = x.shape[axis]
    moved = np.moveaxis(x, axis, -1)
    labels = rng.integers(n, size=moved.shape[:-1])
    p = np.exp(moved) / np.exp(moved).sum(axis=-1, keepdims=True)
    losses = -np.log(np.take_along_axis(p, labels[..., None], axis=-1))[..., 0]
    slope = np.moveaxis(p - np.eye(n)[labels], -1, axis)
    options = {"axis": axis, "reduction": "none"}
    one_hot = np.moveaxis(np.eye(n)[labels], -1, axis)
    given = [((xp.asarray(x), xp.asarray(t)), options) for t in (labels, one_hot)]
    for loss, grad in xp.calls(ps.cross_entropy_value_and_grad, given):
        assert_close(xp, loss, losses, rtol=1e-12)
        assert_close(xp, grad, slope, rtol=1e-11, atol=1e-15)


@pytest.mark.slow("XLA compiles many programs", "jax")
def test_single_sample(xp):
    """1-d logits with a 0-d label, or with a distribution."""
    x = np.asarray([1.0, 2.0, 3.0])
    p = np.exp(x) / np.exp(x).sum()
    given = [
        ((xp.asarray(x), xp.asarray(labels)), {"reduction": reduction})
        for labels in (np.asarray(2), np.asarray([0, 0, 1]), np.asarray([0.0, 0.0, 1.0]))
        for reduction in ("mean", "sum", "none")
    ]
    for loss, grad in xp.calls(ps.cross_entropy_value_and_grad, given):
        assert_close(xp, loss, -np.log(p[2]), rtol=1e-14)
        assert_close(xp, grad, p - [0, 0, 1], rtol=1e-14)


@pytest.mark.slow("XLA compiles each dtype", "jax")
@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
)
def test_labels_of_every_integer_dtype(xp, dtype):
    x = np.random.default_rng(4).normal(size=(5, 6))
    labels = np.asarray([0, 5, 2, 3, 1])
    losses = np.log(np.exp(x).sum(axis=1)) - x[np.arange(5), labels]
    arrays = xp.asarray(x), xp.asarray(labels, dtype)
    options = ({"reduction": "none", "ignore_index": ignored} for ignored in (None, 5))
    each, some = xp.calls(ps.cross_entropy, [(arrays, given) for given in options])
    assert_close(xp, each, losses, rtol=1e-12)
    assert_close(xp, some, np.where(labels == 5, 0, losses), rtol=1e-12)


def test_labels_that_int32_would_wrap_into_a_class(xp):
    x, labels = xp.asarray(np.zeros((3, 4))), xp.asarray([1, 2**32, -(2**63)], "int64")
    for target in (labels, xp.asarray([1, 2**32, 2**63], "uint64")):
        options = {"reduction": "none", "check_labels": False}
        loss, grad = ps.cross_entropy_value_and_grad(x, target, **options)
        assert_close(xp, loss, [np.log(4), np.nan, np.nan], rtol=1e-14)
        np.testing.assert_array_equal(np.isnan(xp.numpy(grad)).all(axis=1), [False, True, True])


@pytest.mark.parametrize("margin", [5, 20, 40, 80])
def test_the_label_entry_of_a_confident_gradient(xp, margin):
    """p - 1 is 0 in float32 from a margin of 17 on; the entry is minus the sum of the others."""
    x = np.asarray([[margin, 0.0, 0.25, -1.0]], np.float32)
    exact = reference.softmax(reference.exact(x[0]))
    slope = [float(-(exact[1] + exact[2] + exact[3])), *map(float, exact[1:])]
    for labels in (np.asarray([0]), np.asarray([[1, 0, 0, 0]])):
        loss, grad = ps.cross_entropy_value_and_grad(xp.asarray(x), xp.asarray(labels))
        assert_close(xp, grad, [slope], "float32", rtol=1e-5)
        assert_close(xp, loss, float(-mp.log(exact[0])), "float32", rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("others", [[], [-40.0, -50.0], [-3.0, -4.0, -3.5]])
def test_the_label_entry_of_a_gradient_with_z_loss(xp, dtype, others):
    """A = 1 + 2 z logsumexp keeps few digits of a small z, and A - 1 fewer."""
    x = np.asarray([0.7, *others], dtype)
    z, n = 1e-5, len(x)
    one, row = [mpf(1)] * n, reference.exact(x)
    _, slope = reference.cross_entropy_row(row, one[:1] + [mpf(0)] * (n - 1), one, 0, mpf(z), None,
                                           [True] * n)  # fmt: skip
    _, grad = ps.cross_entropy_value_and_grad(xp.asarray(x), xp.asarray(np.asarray(0)), z_loss=z)
    actual = assert_like(xp, grad, (n,), dtype)
    assert reference.ulps(actual[:1], slope[:1]) <= 16


def test_the_gradient_is_that_of_the_sum_of_the_returned_loss(xp):
    x = np.random.default_rng(5).normal(size=(4, 3))
    labels = xp.asarray([0, 1, 2, 0])
    grads = {
        r: xp.numpy(ps.cross_entropy_value_and_grad(xp.asarray(x), labels, reduction=r)[1])
        for r in ("mean", "sum", "none")
    }
    np.testing.assert_array_equal(grads["none"], grads["sum"])
    np.testing.assert_allclose(grads["mean"] * 4, grads["sum"], rtol=1e-15)


def test_weight_of_another_dtype(xp):
    x, labels = xp.asarray(LOGITS, "float32"), xp.asarray(INDICES)
    loss = ps.cross_entropy(x, labels, weight=xp.asarray([1, 2, 3, 4]))
    assert_like(xp, loss, (), "float32")
    same = ps.cross_entropy(x, labels, weight=xp.asarray([1.0, 2.0, 3.0, 4.0]))
    np.testing.assert_array_equal(xp.numpy(loss), xp.numpy(same))


def test_a_weight_that_the_dtype_cannot_hold(xp):
    """1e300 is infinite in float32, without a warning, and counts where a label names its class."""
    x, labels = xp.asarray(LOGITS, "float32"), np.asarray([2, 0, 0, 2])
    weight = xp.asarray([1.0, 1e300, 2.0, 1.0])
    with np.errstate(all="raise"):
        loss = ps.cross_entropy(x, xp.asarray(labels), weight=weight, reduction="none")
    expected = ps.cross_entropy(LOGITS, labels, weight=WEIGHT * 0 + [1, 1, 2, 1], reduction="none")
    assert_close(xp, loss, expected, "float32")
    loss = ps.cross_entropy(x, xp.asarray(labels * 0 + 1), weight=weight, reduction="sum")
    assert_close(xp, loss, np.inf, "float32")


@pytest.mark.parametrize("axis", [0, 1])
def test_a_gradient_through_a_softcap_keeps_its_digits(xp, axis):
    """Where tanh is close to 1, few digits are left of 1 - tanh^2, which libraries take."""
    if not xp.differentiates:
        pytest.skip(f"{xp.name} does not differentiate")
    x, cap = np.asarray([[9.0, -11.5, 0.5], [-0.3, 1e-3, 13.0]], "float32"), 2.0
    y = np.asarray([2, 0])
    capped = cap * np.tanh(x.astype(np.longdouble) / cap)
    p = np.exp(capped) / np.exp(capped).sum(axis=1, keepdims=True)
    p[[0, 1], y] -= 1
    expected = p / np.cosh(x.astype(np.longdouble) / cap) ** 2

    def total(x):
        return ps.cross_entropy(x, xp.asarray(y), axis=axis, softcap=cap, reduction="sum")

    with kernels.portable():
        found = xp.numpy(xp.grad(total)(xp.asarray(x if axis else x.T.copy())))
    np.testing.assert_allclose(found if axis else found.T, expected.astype("float64"), rtol=2e-6)


def test_a_softcap_beyond_the_range_bends_logits_that_are_near_it(xp):
    values, cap = np.asarray([[2e38, 1e38, -3e38]]), 1e40
    capped = cap * np.tanh(values / cap)
    x, labels = xp.asarray(values, "float32"), xp.asarray([1])
    loss = ps.cross_entropy(x, labels, softcap=cap)
    np.testing.assert_allclose(xp.numpy(loss), capped[0, 0] - capped[0, 1], rtol=1e-5)


@pytest.mark.slow("XLA compiles each kind of labels", "jax")
def test_an_infinite_weight_makes_the_loss_of_what_it_names_infinite(xp):
    x = xp.asarray([[0.0, 1.0, -1.0], [2.0, 0.0, 1.0], [-800.0, 0.0, 0.0]])
    weight, indices = xp.asarray([np.inf, 1.0, 2.0]), np.asarray([0, 1, 0])
    t = np.asarray([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.25, 0.75, 0.0]])
    cases = (indices, 0.0, [0, 2]), (indices, 0.1, [0, 1, 2]), (t, 0.0, [0, 2])
    for labels, smoothing, infinite in cases:
        loss = ps.cross_entropy(
            x, xp.asarray(labels), weight=weight, label_smoothing=smoothing, reduction="none"
        )
        expected = np.isin(np.arange(3), infinite)
        np.testing.assert_array_equal(np.isposinf(xp.numpy(loss)), expected)
        np.testing.assert_array_equal(np.isfinite(xp.numpy(loss)), ~expected)
