"""Masks, distributions and weights of positions in the kernels that Numba compiles."""

from __future__ import annotations

import numpy as np
import pytest

import portable_softmax as ps
from portable_softmax import kernels

pytestmark = pytest.mark.numba

ROWS = ("softmax", "log_softmax", "logsumexp")
NAME = "numba rows: one pass in cache"
# Rows one by one, in blocks, of few classes and across memory; longer than a part; for two threads.
SHAPES = [
    *[((40, 300), -1), ((90, 30), -1), ((90, 3), -1), ((5, 7, 19), 1)],
    *[((4, 9000), -1), ((3000, 400), -1)],
]
_SLOW = pytest.mark.slow("Numba compiles every kernel once more")
every_shape = pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)


def shapes_and(names, first, others, fast=SHAPES):
    """Return every shape with the first values, and two of them with each of the others."""
    cases = [(*case, *first) for case in SHAPES]
    cases += [(*SHAPES[i], *values) for values in others for i in (0, 3)]
    return pytest.mark.parametrize(
        ("shape", "axis", *names),
        [pytest.param(*c, marks=() if c in [(*f, *first) for f in fast] else _SLOW) for c in cases],
        ids=str,
    )


@pytest.fixture(autouse=True)
def _every_size():
    with kernels.use("numba rows"):
        yield


def as_rows(x, axis):
    """Return an array with its class axis last, in two dimensions."""
    x = np.moveaxis(x, axis, -1)
    return x.reshape(-1, x.shape[-1])


def formula(operation, x):
    """Return softmax, log_softmax or logsumexp of one row in longdouble."""
    x = x.astype(np.longdouble)
    lse = np.log(np.sum(np.exp(x - x.max()))) + x.max()
    return {"softmax": np.exp(x - lse), "log_softmax": x - lse, "logsumexp": lse}[operation]


@pytest.mark.slow("Numba compiles each layout")
@every_shape
@pytest.mark.parametrize("operation", ROWS)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=_SLOW)])
def test_a_masked_row_is_the_row_without_those_classes(shape, axis, operation, dtype):
    rng = np.random.default_rng(0)
    x = (3 * rng.standard_normal(shape)).astype(dtype)
    mask = rng.random(shape) < 0.6
    np.moveaxis(mask, axis, -1)[..., 1] = True  # at least one class per row
    x[~mask] = rng.choice([np.nan, np.inf, 1e30, -np.inf], size=np.count_nonzero(~mask))
    function = getattr(ps, operation)
    assert kernels.explain(operation, x, axis=axis, where=mask).startswith(NAME)
    y = function(x, axis=axis, where=mask)
    rtol = 1e-6 if dtype == "float32" else 1e-14
    rows = y.reshape(-1, 1) if operation == "logsumexp" else as_rows(y, axis)
    some = rng.permutation(len(rows))[:50]
    for row, logits, kept in zip(
        rows[some], as_rows(x, axis)[some], as_rows(mask, axis)[some], strict=True
    ):
        expected = formula(operation, logits[kept])
        found = row if operation == "logsumexp" else row[kept]
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-6 * rtol)
        if operation != "logsumexp":
            assert np.all(row[~kept] == (0.0 if operation == "softmax" else -np.inf))


@pytest.mark.slow("Numba compiles every layout")
@pytest.mark.parametrize(
    ("shape", "axis", "of_mask"),
    [
        ((2, 3, 260, 260), -1, (260, 260)),  # causal: the same for each head, and never repeated
        ((2, 3, 20, 20), -1, (20, 20)),
        ((4, 6, 300), -1, (4, 1, 300)),
        ((4, 6, 300), -1, (300,)),
        ((4, 6, 30), (1, 2), (6, 1)),
        ((4, 30, 6), 1, (30, 1)),
        ((4, 30, 6), 1, (4, 1, 6)),
    ],
    ids=str,
)
def test_a_mask_is_repeated(shape, axis, of_mask):
    rng = np.random.default_rng(1)
    x = rng.standard_normal(shape)
    mask = np.tril(np.ones(of_mask, bool)) if len(of_mask) == 2 else rng.random(of_mask) < 0.7
    for read_only in (False, True):
        mask.flags.writeable = not read_only
        for operation in ROWS:
            y = getattr(ps, operation)(x, axis=axis, where=mask)
            whole = np.broadcast_to(mask, shape).copy()
            expected = getattr(ps, operation)(x, axis=axis, where=whole)
            np.testing.assert_array_equal(y, expected)


@pytest.mark.slow("Numba compiles each layout")
@every_shape
def test_what_a_mask_leaves_of_rows_without_an_answer(shape, axis):
    """A row that it leaves out as a whole, and one with a nan or an inf that it leaves in."""
    x, mask = np.random.default_rng(2).standard_normal(shape), np.ones(shape, bool)
    rows, kept = as_rows(x, axis).copy(), as_rows(mask, axis).copy()
    kept[0], kept[1:4, 0] = False, False
    rows[0], rows[1, 2], rows[2, 2], rows[3] = np.nan, np.nan, np.inf, -np.inf
    lengths = np.moveaxis(x, axis, -1).shape
    x, mask = (np.moveaxis(a.reshape(lengths), -1, axis).copy() for a in (rows, kept))
    for operation, nothing in (("softmax", 0.0), ("log_softmax", -np.inf)):
        y = as_rows(getattr(ps, operation)(x, axis=axis, where=mask), axis)
        assert np.all(y[0] == nothing)
        assert np.all(y[1:4, 0] == nothing)
        assert np.isnan(y[1:4, 1:]).all()
    y = ps.logsumexp(x, axis=axis, where=mask).reshape(-1)
    np.testing.assert_array_equal(y[:4], [-np.inf, np.nan, np.inf, -np.inf])


@pytest.mark.slow("Numba compiles each layout")
@shapes_and(("dtype",), ("float32",), [("float64",), ("float16",)])
def test_the_loss_of_a_masked_row_is_that_of_the_row_without_those_classes(shape, axis, dtype):
    rng = np.random.default_rng(3)
    x = rng.standard_normal(shape).astype(dtype)
    n = shape[axis]
    positions = np.delete(shape, axis % len(shape))
    t = rng.integers(n // 2, n, positions)
    low = np.full([n if a == axis % len(shape) else 1 for a in range(len(shape))], -np.inf)
    np.moveaxis(low, axis, 0)[n // 2 :] = 0.0  # as a mask of the upper half
    for options in ({}, {"reduction": "sum", "z_loss": 0.1}, {"reduction": "none"}):
        given = {"axis": axis, "where": low == 0, **options}
        assert kernels.explain("cross_entropy", x, t, **given).startswith(NAME)
        loss, grad = ps.cross_entropy_value_and_grad(x, t, **given)
        rtol = {"float32": 1e-6, "float64": 1e-14, "float16": 2e-3}[dtype]
        with kernels.portable():
            wanted = ps.cross_entropy_value_and_grad(
                (x + low).astype(dtype), t, axis=axis, **options
            )
        np.testing.assert_allclose(loss, wanted[0], rtol=rtol)
        np.testing.assert_allclose(grad, wanted[1], rtol=20 * rtol, atol=1e-6 * rtol)
        assert np.all(np.moveaxis(grad, axis, 0)[: n // 2] == 0)
        np.testing.assert_array_equal(ps.cross_entropy(x, t, **given), loss)


def test_a_label_that_a_mask_leaves_out():
    x, t = np.zeros((50, 300)), np.arange(50)
    mask = np.ones(x.shape, bool)
    mask[7, 7] = False
    with pytest.raises(IndexError, match=r"labels\[7\] is 7, a class that where masks out there"):
        ps.cross_entropy(x, t, where=mask)
    assert np.isfinite(ps.cross_entropy(x, t, where=mask, ignore_index=7))
    losses = ps.cross_entropy(x, t, where=mask, reduction="none", check_labels=False)
    assert np.flatnonzero(np.isnan(losses)) == [7]


@every_shape
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_the_loss_of_a_distribution_is_the_mean_of_its_labels(shape, axis, z_loss):
    """Weighted by it, with the gradient."""
    rng = np.random.default_rng(4)
    n = shape[axis]
    x = rng.standard_normal(shape)
    first, second = rng.permutation(n)[:2]
    t = np.zeros(shape)
    np.moveaxis(t, axis, 0)[first] = 0.75
    np.moveaxis(t, axis, 0)[second] = 0.25
    given = {"axis": axis, "z_loss": z_loss, "reduction": "none"}
    assert kernels.explain("cross_entropy", x, t, **given).startswith(NAME)
    positions = np.delete(shape, axis % len(shape))
    loss, grad = ps.cross_entropy_value_and_grad(x, t, **given)
    parts = [
        ps.cross_entropy_value_and_grad(x, np.full(positions, k), **given) for k in (first, second)
    ]
    for found, of_first, of_second in zip((loss, grad), *parts, strict=True):
        expected = 0.75 * of_first + 0.25 * of_second
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
    for reduction, total in (("sum", loss.sum()), ("mean", loss.mean())):
        given["reduction"] = reduction
        value, slope = ps.cross_entropy_value_and_grad(x, t, **given)
        np.testing.assert_allclose(value, total, rtol=1e-13)
        np.testing.assert_allclose(slope * (loss.size if reduction == "mean" else 1), grad)


@pytest.mark.parametrize("n", [3, 30, 300])
def test_a_confident_distribution_with_z_loss(n):
    """p - t cancels to all its digits beside a square of the logsumexp that is as small."""
    x, t = np.zeros((20, n)), np.zeros((20, n))
    x[:, 0], t[:, 0] = 60.0, 1.0
    rest, z = (n - 1) * np.exp(-60.0), 1e-20
    _, grad = ps.cross_entropy_value_and_grad(x, t, z_loss=z, reduction="sum")
    np.testing.assert_allclose(grad[:, 0], 2 * z * 60.0 - rest, rtol=1e-13)
    np.testing.assert_allclose(grad[:, 1:], rest / (n - 1), rtol=1e-13)


@every_shape
def test_a_class_of_probability_0_may_have_any_logit_below_inf(shape, axis):
    """And a row of a distribution of nothing has no loss."""
    rng = np.random.default_rng(5)
    x, t = rng.standard_normal(shape), rng.random(shape)
    np.moveaxis(x, axis, 0)[1] = -np.inf
    np.moveaxis(t, axis, 0)[1] = 0.0
    loss, grad = ps.cross_entropy_value_and_grad(x, t, axis=axis, reduction="none")
    assert np.isfinite(loss).all()
    assert np.isfinite(grad).all()
    assert np.all(np.moveaxis(grad, axis, 0)[1] == 0)
    loss, grad = ps.cross_entropy_value_and_grad(x, 0 * t, axis=axis, reduction="none")
    assert not loss.any()
    assert not grad.any()


@pytest.mark.slow("Numba compiles each layout")
@every_shape
def test_a_whole_weight_repeats_its_position(shape, axis):
    rng = np.random.default_rng(6)
    x = np.ascontiguousarray(rng.standard_normal(shape))
    positions = np.delete(shape, axis % len(shape))
    t, times = rng.integers(shape[axis], size=positions), rng.integers(3, size=positions)
    junk = np.moveaxis(x, axis, -1)
    junk[times == 0] = np.nan
    t[times == 0] = -1  # no class, and of no weight
    repeated = np.repeat(junk.reshape(-1, shape[axis]), times.reshape(-1), axis=0)
    labels = np.repeat(t.reshape(-1), times.reshape(-1))
    for reduction in ("mean", "sum"):
        given = {"reduction": reduction, "weight": rng.uniform(0.5, 2.0, shape[axis])}
        weighted = {"axis": axis, "sample_weight": times, **given}
        assert kernels.explain("cross_entropy", x, t, **weighted).startswith(NAME)
        loss, grad = ps.cross_entropy_value_and_grad(x, t, **weighted)
        expected, slopes = ps.cross_entropy_value_and_grad(repeated, labels, **given)
        np.testing.assert_allclose(loss, expected, rtol=1e-12)
        sums = np.zeros((t.size, shape[axis]))
        np.add.at(sums, np.repeat(np.arange(t.size), times.reshape(-1)), slopes)
        np.testing.assert_allclose(as_rows(grad, axis), sums, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_too_low_to_count_is_an_exact_zero(dtype):
    low = -105.0 if dtype == "float32" else -746.0
    for n in (30, 300):
        x = np.zeros((20, n), dtype)
        x[:, 1:] = np.linspace(low, 3 * low, n - 1)
        x[:, -1] = -np.inf
        y = ps.softmax(x)
        assert np.all(y[:, 0] == 1)
        assert not y[:, 1:].any()


# --------------------------------------------------------------------------- softcap


def bounded_loss(x, t, cap, mask, z):
    """Return the losses and gradients of rows in longdouble, with 1 / cosh^2 as the slope."""
    ratio = x.astype(np.longdouble) / cap
    b = np.where(mask, cap * np.tanh(ratio), -np.inf)
    at = np.arange(len(x)), t
    gap = b - b.max(axis=1, keepdims=True)
    e = np.exp(gap)
    total = e.sum(axis=1, keepdims=True)
    lse = np.log(total) + b.max(axis=1, keepdims=True)
    p = e / total
    others = p.copy()
    others[at] = 0
    grad = p.copy()
    grad[at] = -others.sum(axis=1)
    far = np.exp(-2 * np.abs(np.where(mask, ratio, np.inf)))
    loss = (lse - b[at][:, None] + z * lse * lse)[:, 0]
    return loss, (grad + 2 * z * lse * p) * 4 * far / (1 + far) ** 2


@pytest.mark.slow("Numba compiles every layout")
@shapes_and(
    ("dtype", "masked"),
    ("float32", False),
    [("float64", False), ("float32", True), ("float16", True)],
    fast=(SHAPES[0], SHAPES[3]),
)
def test_a_softcap_bounds_the_logits_and_slopes_the_gradient(shape, axis, dtype, masked):
    rng, cap = np.random.default_rng(7), 11.0
    x = (8 * rng.standard_normal(shape)).astype(dtype)
    x.flat[:5] = np.inf, -np.inf, 0.0, -1e-7, 200.0
    positions = np.delete(shape, axis % len(shape))
    t, mask = rng.integers(shape[axis], size=positions), np.ones(shape, bool)
    if masked:
        mask = rng.random(shape) < 0.7
        np.put_along_axis(mask, np.expand_dims(t, axis), True, axis=axis)
        x[~mask] = rng.choice([np.nan, np.inf, -np.inf], size=np.count_nonzero(~mask))
    for z in (0.0, 0.01):
        given = {"axis": axis, "softcap": cap, "z_loss": z, "reduction": "none"}
        given |= {"where": mask} if masked else {}
        assert kernels.explain("cross_entropy", x, t, **given).startswith(NAME)
        loss, grad = ps.cross_entropy_value_and_grad(x, t, **given)
        with np.errstate(invalid="ignore"):
            expected, slopes = bounded_loss(
                as_rows(x, axis), t.reshape(-1), cap, as_rows(mask, axis), z
            )
        eps = np.finfo(dtype).eps
        rtol = (1 if dtype == "float16" else 8) * eps
        # A rounded bound of `cap` is off by its last digit, and exp(-2 x / cap) by 2 x / cap units.
        atol = 2 * cap * np.finfo("float64" if dtype == "float64" else "float32").eps
        np.testing.assert_allclose(loss.reshape(-1), expected, rtol=rtol, atol=atol)
        wide = 100 * eps if dtype != "float16" else 2 * eps
        tiny = float(np.finfo(dtype).smallest_subnormal) + (atol if z else 0)
        np.testing.assert_allclose(as_rows(grad, axis), slopes, rtol=wide, atol=tiny)
        np.testing.assert_array_equal(ps.cross_entropy(x, t, **given), loss)


@pytest.mark.slow("Numba compiles kernels with a softcap")
@pytest.mark.parametrize("cap", [2.0**-59, 1e-3, 1e6, 2.0**59])
def test_a_softcap_of_any_size(cap):
    """Far below the logits they are all the cap's, of no slope; far above it does nothing."""
    x = np.asarray([[1.0, -2.0, 0.5, 3.0]] * 40, np.float32)
    t = np.zeros(40, np.int64)
    found = ps.cross_entropy_value_and_grad(x, t, softcap=cap)
    assert kernels.explain("cross_entropy", x, t, softcap=cap).startswith(NAME)
    if cap > 1:
        wanted = ps.cross_entropy_value_and_grad(x, t)
    else:
        wanted = ps.cross_entropy(np.sign(x) * np.float32(cap), t), np.zeros_like(x)
    for y, e in zip(found, wanted, strict=True):
        np.testing.assert_allclose(y, e, rtol=1e-5)
