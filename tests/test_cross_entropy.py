"""Cross-entropy and its gradient against exact values, on every backend."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import reference
from asserts import assert_close, assert_like, assert_same
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


# --------------------------------------------------------------------------- options

LOGITS = np.asarray(
    [[0.3, -1.2, 2.0, 0.7], [40.0, 1.0, -3.0, 0.5], [-2.0, -2.0, 1.5, 1.5], [0.1, 0.2, 0.3, 9.0]]
)
INDICES = np.asarray([2, 0, 3, 1])
SAMPLES = np.asarray([0.5, 2.0, 1.25, 0.0])
T, F = True, False
OPTIONS = {
    "sample_weight": SAMPLES,
    "weight": np.asarray([0.5, 1.0, 2.0, 1.25]),
    "label_smoothing": 0.1,
    "z_loss": 0.3,
    "softcap": 2.5,
    "where": np.asarray([[T, T, T, F], [T, T, T, T], [T, F, T, T], [T, T, T, T]]),
}


@pytest.mark.slow("Numba compiles each option", "numba", "torch-numba")
@pytest.mark.slow("Triton interprets element by element", "triton")
@pytest.mark.slow("a large graph for each option", "dask")
@pytest.mark.slow("XLA compiles each option", "jax")
@pytest.mark.parametrize("kind", ["index", "one-hot", "probabilities"])
def test_options_alone_and_together(xp, kind):
    """Against an exact model of rows; the contract draws pairs of options."""
    t = np.eye(4)[INDICES]
    if kind == "probabilities":
        t = np.asarray([[0.2, 0.3, 0.5, 0.0], [1.0, 0, 0, 0], [0.1, 0.1, 0.1, 0.2], [0.5] * 4])
    labels = xp.asarray({"index": INDICES, "one-hot": t.astype(int)}.get(kind, t))
    cases = [{name: value} for name, value in OPTIONS.items()] + [OPTIONS]
    given = [
        ((xp.asarray(LOGITS), labels), {"reduction": "none"} | {
            name: xp.asarray(v) if isinstance(v, np.ndarray) else v for name, v in case.items()})
        for case in cases
    ]  # fmt: skip
    for case, (alone, loss, grad) in zip(cases, xp.calls(three_outputs, given), strict=True):
        weight, mask = case.get("weight", np.ones(4)), case.get("where", np.ones((4, 4), bool))
        numbers = (mpf(case.get("label_smoothing", 0)), mpf(case.get("z_loss", 0)))
        rows = [
            reference.cross_entropy_row(reference.exact(x), reference.exact(target),
                                        reference.exact(weight), *numbers, case.get("softcap"), m)
            for x, target, m in zip(LOGITS, t, mask, strict=True)
        ]  # fmt: skip
        losses, slopes = (np.asarray(part, float) for part in zip(*rows, strict=True))
        s = case.get("sample_weight", np.ones(4))
        assert_close(xp, loss, s * losses, rtol=1e-13, atol=1e-13)
        assert_close(xp, grad, s[:, None] * slopes, rtol=1e-12, atol=1e-13)
        assert_same(xp, alone, loss)


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


# --------------------------------------------------------------------------- shapes and labels


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


def test_a_weight_that_the_dtype_cannot_hold(xp):
    """1e300 is infinite in float32, without a warning, and counts where a label names its class."""
    x, labels = xp.asarray(LOGITS, "float32"), np.asarray([2, 0, 0, 2])
    weight = xp.asarray([1.0, 1e300, 2.0, 1.0])
    with np.errstate(all="raise"):
        loss = ps.cross_entropy(x, xp.asarray(labels), weight=weight, reduction="none")
    expected = ps.cross_entropy(LOGITS, labels, weight=np.asarray([1.0, 1, 2, 1]), reduction="none")
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
