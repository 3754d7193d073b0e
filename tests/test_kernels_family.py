"""The relatives of softmax and cross-entropy on kernels: which path ran, and that it is right.

Expected values are closed forms in the widest dtype that NumPy has.
"""

from __future__ import annotations

import numpy as np
import pytest

import portable_softmax as ps
from portable_softmax import kernels

# One by one, in groups, in blocks, of few classes and across memory; longer than a part.
SHAPES = [
    *[((9, 3000), -1), ((40, 300), -1), ((90, 70), -1), ((90, 20), -1), ((90, 3), -1)],
    *[((5, 7, 19), 1), ((3, 9000), -1)],
]
_SLOW = pytest.mark.slow("Numba compiles every kernel once more")


def cases(dtypes, fast):
    """Return every shape in every dtype, and which of them are not slow."""
    return [
        pytest.param(*shape, dtype, marks=() if fast(i, dtype) else _SLOW)
        for i, shape in enumerate(SHAPES)
        for dtype in dtypes
    ]


every_case = pytest.mark.parametrize(
    ("shape", "axis", "dtype"),
    cases(("float32", "float64"), lambda i, dtype: dtype == "float32" or i in (1, 3)),
    ids=str,
)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])
BOUND = {"float32": 2e-6, "float64": 4e-15}  # of numbers up to 10


@pytest.fixture
def rows(numba):
    """Arrays of every size take Numba's kernels."""
    with kernels.use("numba rows"):
        yield


@pytest.fixture
def numba():
    return pytest.importorskip("numba")


def logits(shape, dtype, seed=0):
    """Random rows, of which one is confident, one has an entry of -inf and one nothing else."""
    x = np.random.default_rng(seed).normal(0, 3, shape)
    first = x.reshape(-1)
    first[0] += 50
    return x.astype(dtype)


def log_softmax(x, axis):
    x = x.astype(np.longdouble)
    m = x.max(axis, keepdims=True)
    return x - m - np.log(np.exp(x - m).sum(axis, keepdims=True))


def assert_near(actual, expected, dtype, scale=1.0):
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    with np.errstate(invalid="ignore"):  # an infinity less itself
        error = np.abs(actual - expected) / np.maximum(1.0, np.abs(expected))
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    assert np.all(same | (error <= scale * BOUND[str(np.dtype(dtype))])), np.nanmax(error)


@pytest.mark.numba
@every_case
def test_entropy_in_every_layout(rows, shape, axis, dtype):
    x = logits(shape, dtype)
    log_y = log_softmax(x, axis)
    h = -(np.exp(log_y) * log_y).sum(axis)
    grad = np.exp(log_y) * (-log_y - np.expand_dims(h, axis))
    assert kernels.explain("entropy", x, axis=axis).startswith("numba rows: one pass in cache")
    assert_near(ps.entropy(x, axis=axis), h, dtype)
    value, slope = ps.entropy_value_and_grad(x, axis=axis)
    assert_near(value, h, dtype)
    assert_near(slope, grad, dtype)


@pytest.mark.numba
@every_case
@pytest.mark.parametrize("temperature", [1.0, pytest.param(2.5, marks=_SLOW)])
def test_divergence_in_every_layout(rows, shape, axis, dtype, temperature):
    p, q = logits(shape, dtype), logits(shape, dtype, seed=1)
    options = {"axis": axis, "temperature": temperature}
    assert kernels.explain("kl_divergence", p, q, **options).startswith("numba rows")
    log_p, log_q = (log_softmax(a.astype(np.longdouble) / temperature, axis) for a in (p, q))
    each = (np.exp(log_p) * (log_p - log_q)).sum(axis)
    by_p = np.exp(log_p) * (log_p - log_q - np.expand_dims(each, axis)) / temperature
    by_q = (np.exp(log_q) - np.exp(log_p)) / temperature
    value, slopes = ps.kl_divergence_value_and_grad(p, q, reduction="none", **options)
    assert_near(value, each, dtype, 10)
    for slope, expected in zip(slopes, (by_p, by_q), strict=True):
        assert_near(slope, expected, dtype, 10)
    n, t2 = each.size, temperature**2
    for reduction, factor in (("mean", 1 / n), ("sum", 1.0)):
        more = options | {"reduction": reduction, "distillation": True}
        value, slopes = ps.kl_divergence_value_and_grad(p, q, **more)
        assert_near(np.asarray(value), each.sum() * factor * t2, dtype, 10)
        assert ps.kl_divergence(p, q, **more) == value
        for slope, expected in zip(slopes, (by_p, by_q), strict=True):
            assert_near(slope, expected * factor * t2, dtype, 10)


@pytest.mark.numba
@every_case
def test_divergence_of_shifted_rows_is_0(rows, shape, axis, dtype):
    x = np.random.default_rng(0).integers(-4, 4, shape).astype(dtype)
    assert np.all(ps.kl_divergence(x, x + dtype_of(x)(16), axis=axis, reduction="none") == 0)


def dtype_of(x):
    return x.dtype.type


@pytest.mark.numba
@every_case
def test_rows_that_are_not_finite(rows, shape, axis, dtype):
    """Each row is nan, or has a share of 0, as if it were alone."""
    x, q = (np.moveaxis(logits(shape, dtype, seed), axis, -1).copy() for seed in (0, 1))
    flat, flat_q = (a.reshape(-1, a.shape[-1]) for a in (x, q))
    clean = log_softmax(flat, -1)
    flat[1, 0] = flat_q[1, 0] = -np.inf
    flat[2] = -np.inf
    flat_q[0, 0] = -np.inf  # beside a share of p
    other = flat.copy()
    other[1, 2], other[2, 0] = np.nan, np.inf
    x, q, other = (np.moveaxis(a.reshape(x.shape), -1, axis) for a in (flat, flat_q, other))
    x, q, other = map(np.ascontiguousarray, (x, q, other))
    h, slope = ps.entropy_value_and_grad(x, axis=axis)
    h, slope = h.reshape(-1), np.moveaxis(slope, axis, -1).reshape(flat.shape)
    log_y = log_softmax(flat[1, 1:], -1)
    assert_near(h[1:2], -(np.exp(log_y) * log_y).sum(keepdims=True), dtype)
    assert slope[1, 0] == 0
    assert np.isnan(h[2])
    assert np.isnan(slope[2]).all()
    assert_near(h[3:], -(np.exp(clean) * clean).sum(-1)[3:], dtype)
    assert np.isnan(ps.entropy(other, axis=axis).reshape(-1)[1:3]).all()
    k = ps.kl_divergence(x, q, axis=axis, reduction="none").reshape(-1)
    log_q = log_softmax(flat_q[1, 1:], -1)
    assert_near(k[1:2], (np.exp(log_y) * (log_y - log_q)).sum(keepdims=True), dtype, 10)
    assert k[0] == np.inf
    assert np.isnan(k[2])
    assert np.isfinite(k[3:]).all()


@pytest.mark.numba
@pytest.mark.slow("Numba compiles every kernel for this dtype")
@pytest.mark.parametrize("name", ["entropy", "kl_divergence", "sigmoid_cross_entropy"])
def test_half_types_are_rounded_once(rows, name):
    x, y = logits((40, 300), "float16"), np.abs(logits((40, 300), "float16", 1)) % 1
    options = {} if name == "entropy" else {"reduction": "none"}
    arrays = (x,) if name == "entropy" else (x, y)
    narrow = getattr(ps, f"{name}_value_and_grad")(*arrays, **options)
    wide = getattr(ps, f"{name}_value_and_grad")(*(a.astype("float32") for a in arrays), **options)
    for a, b in zip(flat_parts(narrow), flat_parts(wide), strict=True):
        assert a.dtype == np.float16
        np.testing.assert_array_equal(a, b.astype(np.float16))


def flat_parts(answer):
    value, grads = answer
    return (value, *(grads if isinstance(grads, tuple) else (grads,)))


@every_dtype
@pytest.mark.parametrize("shape", [(), (3,), (7, 11)], ids=str)
def test_binary_losses_of_small_arrays(shape, dtype):
    z, t = np.asarray(2.5, dtype), np.asarray(1)
    if shape:
        z, t = logits(shape, dtype), np.random.default_rng(0).random(shape)
        t.reshape(-1)[:2] = 1, 0
    assert kernels.explain("sigmoid_cross_entropy", z, t).startswith("numpy tiles: few calls")
    x, t = z.astype(np.longdouble), t.astype(dtype)
    each = t * np.logaddexp(0, -x) + (1 - t) * np.logaddexp(0, x)
    slope = (1 - t) / (1 + np.exp(-x)) - t / (1 + np.exp(x))
    for reduction, factor in (("none", None), ("sum", 1.0), ("mean", 1 / max(x.size, 1))):
        loss, grad = ps.sigmoid_cross_entropy_value_and_grad(z, t, reduction=reduction)
        expected = each if factor is None else np.asarray(each.sum() * factor)
        assert_near(np.asarray(loss), np.asarray(expected), dtype)
        assert_near(np.asarray(grad), np.asarray(slope * (factor or 1.0)), dtype)
        assert np.all(ps.sigmoid_cross_entropy(z, t, reduction=reduction) == loss)


@pytest.mark.numba
@every_dtype
@pytest.mark.parametrize("shape", [(3,), (7, 11), (13, 1001), (3, 40_001)])
def test_binary_losses(rows, shape, dtype):
    rng = np.random.default_rng(0)
    z, t = logits(shape, dtype), (rng.random(shape) < 0.5).astype(np.int8)
    w, c = rng.uniform(0.5, 2, shape[-1:]).astype(dtype), dtype_of(z)(1.5)
    assert kernels.explain("sigmoid_cross_entropy", z, t).startswith("numba rows: one pass")
    x, e = z.astype(np.longdouble), 0.25
    for options, yes, no in (
        ({}, t, 1 - t),
        ({"weight": w, "pos_weight": np.asarray(c)}, t * (w * c), (1 - t) * w),
        ({"label_smoothing": e}, (1 - e) * t + e / 2, (1 - e) * (1 - t) + e / 2),
    ):
        each = yes * np.logaddexp(0, -x) + no * np.logaddexp(0, x)
        slope = no / (1 + np.exp(-x)) - yes / (1 + np.exp(x))
        for reduction, factor in (("none", None), ("sum", 1.0), ("mean", 1 / x.size)):
            loss, grad = ps.sigmoid_cross_entropy_value_and_grad(
                z, t, reduction=reduction, **options
            )
            expected = each if factor is None else each.sum() * factor
            assert_near(np.asarray(loss), expected, dtype)
            assert_near(grad, slope * (factor or 1.0), dtype)
            alone = ps.sigmoid_cross_entropy(z, t, reduction=reduction, **options)
            np.testing.assert_array_equal(alone, loss)


@every_dtype
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("engine", ["numba rows", "numpy tiles"])
def test_binary_losses_of_infinities(weighted, dtype, engine, request):
    """What a coefficient of 0 stands at has no effect."""
    if engine == "numba rows":
        request.getfixturevalue("numba")
    elif weighted:
        pytest.skip("not an option of this kernel")
    z = np.asarray([np.inf, -np.inf, np.inf, -np.inf, np.nan, 40.0, -80.0], dtype)
    t = np.asarray([1, 0, 0, 1, 1, 1, 0])
    w = np.asarray([1, 1, 1, 1, 0, 1, 1], dtype)
    options = {"reduction": "none"} | ({"weight": w} if weighted else {})
    with kernels.use(engine):
        assert kernels.explain("sigmoid_cross_entropy", z, t, **options).startswith(engine)
        loss, grad = ps.sigmoid_cross_entropy_value_and_grad(z, t, **options)
    if not weighted:
        assert np.isnan([loss[4], grad[4]]).all()
        loss[4] = grad[4] = 0
    small, smaller = np.exp(np.longdouble(-40)), np.exp(np.longdouble(-80))
    expected = np.asarray([0, 0, np.inf, np.inf, 0, small, smaller])
    np.testing.assert_allclose(loss, expected, rtol=BOUND[dtype])
    np.testing.assert_allclose(grad, [0, 0, 1, -1, 0, -small, smaller], rtol=BOUND[dtype])


# --------------------------------------------------------------------------- logmeanexp


@every_dtype
@pytest.mark.parametrize("engine", ["numba rows", "numpy tiles"])
@pytest.mark.parametrize(("shape", "axis"), [*SHAPES, ((6, 5, 40), (1, 2)), ((6, 5), None)])
def test_means_by_what_folds(shape, axis, dtype, engine, request):
    if engine == "numba rows":
        request.getfixturevalue("numba")
    x = logits(shape, dtype)
    x[1] = 1.5  # whose mean is 1 times exp of the maximum, so that nothing may cancel
    x[1].reshape(-1)[::2] += dtype_of(x)(1e-3)
    wide = x.astype(np.longdouble)
    m = wide.max(axis, keepdims=True)
    mean = np.log1p(np.expm1(wide - m).mean(axis, keepdims=True))
    with kernels.use(engine):
        assert kernels.explain("logmeanexp", x, axis=axis).startswith(engine)
        assert_near(ps.logmeanexp(x, axis=axis, keepdims=True), m + mean, dtype)
        near = x - m.astype(dtype)
        found = ps.logmeanexp(near, axis=axis, keepdims=True)
    expected = np.log1p(np.expm1(near.astype(np.longdouble)).mean(axis, keepdims=True))
    if len(found) > 1:
        np.testing.assert_allclose(found[1], expected[1], rtol=4 * BOUND[dtype])


@pytest.mark.numba
def test_a_masked_mean_counts_what_is_left(rows):
    x = logits((40, 300), "float64")
    where = np.random.default_rng(0).random(x.shape) < 0.5
    where[3] = False
    assert kernels.explain("logmeanexp", x, axis=-1, where=where).startswith("numba rows")
    found = ps.logmeanexp(x, axis=-1, where=where)
    assert np.isnan(found[3])
    for i in (0, 1, 2, 4, 39):
        expected = np.log(np.exp(x[i, where[i]].astype(np.longdouble)).mean())
        np.testing.assert_allclose(found[i], expected, rtol=1e-14)


# --------------------------------------------------------------------------- torch

TORCH = {"torch": "lent formulas", "torch-numba": "numba rows"}


def functions(xp):
    """Calls on a few rows, with what they are of, and the kernels that lack."""
    t = xp.asarray([0, 2, 1])
    soft = xp.asarray([[0.25, 0.25, 0.5, 0.0]] * 3, "float64")
    w = xp.asarray([0.5, 1.0, 2.0, 1.0], "float64")
    return {
        "entropy": (lambda x, _: ps.entropy(x, axis=0), ()),
        "kl_divergence": (
            lambda x, y: ps.kl_divergence(x, y, temperature=2.0, distillation=True), (),
        ),
        "each kl_divergence": (lambda x, y: ps.kl_divergence(x, y, reduction="none"), ()),
        "plain sigmoid_cross_entropy": (
            lambda x, _: ps.sigmoid_cross_entropy(x, soft, reduction="none"), (),
        ),
        "sigmoid_cross_entropy": (
            lambda x, _: ps.sigmoid_cross_entropy(x, soft, weight=w, pos_weight=w), (),
        ),
        "focal": (
            lambda x, _: ps.sigmoid_cross_entropy(x, soft, focal_gamma=2.0, reduction="none"),
            ("torch-numba",),
        ),
        "entmax_loss": (
            lambda x, _: ps.entmax_loss(x, t, ignore_index=1, reduction="sum"), ("torch-numba",),
        ),
        "entmax": (lambda x, _: ps.entmax(x, alpha=1.3, axis=0), ("torch-numba",)),
        "sparsemax": (lambda x, _: ps.sparsemax(x), ("torch-numba",)),
        "logmeanexp": (lambda x, _: ps.logmeanexp(x, axis=-1), ()),
    }  # fmt: skip


NAMES = [
    *("entropy", "kl_divergence", "each kl_divergence", "sigmoid_cross_entropy", "focal"),
    *("entmax", "sparsemax", "entmax_loss", "logmeanexp", "plain sigmoid_cross_entropy"),
]
OF_TILES = (
    *("entropy", "kl_divergence", "each kl_divergence", "logmeanexp"),
    "plain sigmoid_cross_entropy",
)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_of_both_orders_on_torch(torch, xp, name, monkeypatch):
    if xp.name not in TORCH:
        pytest.skip("no kernel of the family on this backend")
    function, lacking = functions(xp)[name]
    if xp.name in lacking:
        pytest.skip("not an operation of the kernel")
    rng = np.random.default_rng(0)
    x, y = (xp.asarray(rng.normal(0, 1.5, (3, 4)), "float64").requires_grad_() for _ in range(2))
    paths = []
    real = kernels._decide.decide

    def spy(request, switch):
        paths.append(real(request, switch))
        return paths[-1]

    monkeypatch.setattr(kernels._decide, "decide", spy)
    function(x, y)
    of_tiles = xp.name == "torch" and name in OF_TILES
    expected = "numpy tiles" if of_tiles else TORCH[xp.name]
    assert [path.taken.kernel.name for path in paths] == [expected]
    assert torch.autograd.gradcheck(function, (x, y))
    assert torch.autograd.gradgradcheck(function, (x, y))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["entropy", "kl_divergence", "sigmoid_cross_entropy"])
def test_gradients_of_half_types_on_torch_are_rounded_once(torch, xp, name, dtype):
    if xp.name not in TORCH:
        pytest.skip("no kernel of the family on this backend")
    rng = np.random.default_rng(0)
    x, y = (xp.asarray(rng.random((6, 5)), dtype) for _ in range(2))
    arrays = (x,) if name == "entropy" else (x, y)
    upstream = xp.asarray(rng.random(6 if name == "entropy" else (6, 5)), "float32")
    if name == "kl_divergence":
        upstream = upstream[:, 0]
    grads = []
    for wide in (False, True):
        leaf = (x.float() if wide else x.clone()).requires_grad_()
        others = [a.float() if wide else a for a in arrays[1:]]
        options = {} if name == "entropy" else {"reduction": "none"}
        value = getattr(ps, name)(leaf, *others, **options)
        value.backward(upstream.to(getattr(torch, dtype)).to(value.dtype))
        grads.append(leaf.grad)
    assert grads[0].dtype == getattr(torch, dtype)
    assert torch.equal(grads[0], grads[1].to(grads[0].dtype))


def test_a_gradient_that_is_differentiated_is_left_to_torch(torch, xp):
    if xp.name not in TORCH:
        pytest.skip("no kernel of the family on this backend")
    x = xp.asarray(np.random.default_rng(0).normal(size=(3, 4)), "float64").requires_grad_()
    assert kernels.explain("entropy_value_and_grad", x).startswith("portable")
    assert torch.autograd.gradcheck(lambda x: ps.entropy_value_and_grad(x)[1], (x,))


@pytest.fixture
def packed(xp):
    if xp.name != "torch":
        pytest.skip("packed rows are the same on every backend of torch")
    with kernels.use("packed rows"):
        yield


def test_an_infinite_upstream_gradient_of_an_ignored_row(torch, xp, packed):
    x = xp.asarray(np.random.default_rng(0).normal(0, 4, (4, 300))).requires_grad_()
    t = xp.asarray([0, 1, -1, 3])
    loss = ps.entmax_loss(x, t, ignore_index=-1, reduction="none")
    loss.backward(xp.asarray([1.0, 2.0, np.inf, 1.0]))
    assert (x.grad[2] == 0).all()
    assert x.grad.isfinite().all()


def test_the_loss_of_packed_rows_is_differentiated_twice(torch, xp, packed):
    x = xp.asarray(np.random.default_rng(0).normal(0, 2, (3, 5))).requires_grad_()
    t = xp.asarray([0, 4, 2])
    assert kernels.explain("entmax_loss", x, t).startswith("packed rows: ")
    assert torch.autograd.gradcheck(lambda x: ps.entmax_loss(x, t), (x,))
    assert torch.autograd.gradgradcheck(lambda x: ps.entmax_loss(x, t, alpha=1.3), (x,))
