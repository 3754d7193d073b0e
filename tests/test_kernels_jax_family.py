"""The relatives of softmax on JAX: by XLA's operations, and by the handlers that Numba compiles.

Expected values are closed forms in the widest dtype that NumPy has.
"""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import test_kernels_jax_numba as handlers

import portable_softmax as ps
from portable_softmax import kernels

NAMES = {"jax": "jax rules", "jax-numba": "numba rows"}
BOUND = {"float32": 2e-6, "float64": 4e-15}  # of numbers up to 10

_SLOW = pytest.mark.slow("two compilers work on each layout")
ROWS, ACROSS = ((40, 300), -1), ((5, 7, 19), 1)
# Of Numba's kernels: in groups, in blocks, of few classes, across memory; longer than a part.
LAYOUTS = [((90, 70), -1), ((90, 20), -1), ((90, 3), -1), ACROSS, ((9, 3000), -1), ((3, 9000), -1)]


def cases(*slow):
    """Return rows of float32, and what else is slow."""
    some = [(*ROWS, "float32"), *(pytest.param(*case, marks=_SLOW) for case in slow)]
    return pytest.mark.parametrize(("shape", "axis", "dtype"), some, ids=str)


# Each test takes both dtypes and both arrangements, and one of them each pair of these.
every_value = cases((*ACROSS, "float64"))
every_pair = cases((*ACROSS, "float64"), (*ROWS, "float64"), (*ACROSS, "float32"))


@pytest.fixture(autouse=True)
def path(jax, xp):
    """Skip this module for the other libraries; name the kernel of this one."""
    return NAMES[xp.name]


def logits(xp, shape, dtype="float32", seed=0):
    """Random rows, of which one is confident; for NumPy and for JAX."""
    x = np.random.default_rng(seed).normal(0, 3, shape)
    x.reshape(-1)[0] += 50
    x = x.astype(dtype)
    return x.astype(np.longdouble), xp.asarray(x)


def log_softmax(x, axis):
    x = x - x.max(axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


def assert_near(actual, expected, dtype, scale=1.0):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    error = np.abs(actual - expected) / np.maximum(1.0, np.abs(expected))
    assert np.max(error) <= scale * BOUND[str(np.dtype(dtype))]


# --------------------------------------------------------------------------- values


@every_value
def test_divergence_and_its_gradients(jax, xp, path, shape, axis, dtype):
    (p, x), (q, y) = logits(xp, shape, dtype), logits(xp, shape, dtype, 1)
    _, same = logits(xp, shape, dtype)
    for t in (1.0, 2.5):
        options = {"axis": axis, "temperature": t}
        assert kernels.explain("kl_divergence", x, y, **options).startswith(path)
        log_p, log_q = log_softmax(p / t, axis), log_softmax(q / t, axis)
        k = (np.exp(log_p) * (log_p - log_q)).sum(axis)
        by_p = np.exp(log_p) * (log_p - log_q - np.expand_dims(k, axis)) / t
        by_q = (np.exp(log_q) - np.exp(log_p)) / t
        assert_near(ps.kl_divergence(x, y, reduction="none", **options), k, dtype, 10)
        each, of_itself, by, summed, distilled, traced, student = divergences(jax, options)(
            x, y, same
        )
        assert_near(each, k, dtype, 10)
        assert (np.asarray(of_itself) == 0).all()
        assert_near(by[0], k, dtype, 10)
        # The sum times T^2, of which the mean is a part.
        for value in (summed, distilled[0]):
            assert_near(np.asarray(value) / dtype_of(x)(k.size), k.mean() * t**2, dtype, 10)
        for i, want in enumerate((by_p, by_q)):
            assert_near(by[1][i], want, dtype, 10)
            for found in (distilled[1], traced):
                assert_near(found[i], want * t**2, dtype, 10)
        assert_near(student, by_q * t**2, dtype, 10)
    mean, grads = ps.kl_divergence_value_and_grad(x, y, axis=axis, temperature=2.5)
    assert_near(mean, k.mean(), dtype, 10)
    for slope, want in zip(grads, (by_p, by_q), strict=True):
        assert_near(np.asarray(slope) * dtype_of(x)(k.size), want, dtype, 10)


def divergences(jax, options):
    """Return a program of the divergence and its derivatives, whatever is made of both once."""
    each = {"reduction": "none", **options}
    distilled = {"reduction": "sum", "distillation": True, **options}

    def total(x, y):
        return ps.kl_divergence(x, y, **distilled)

    return jax.jit(
        lambda x, y, same: (
            ps.kl_divergence(x, y, **each),
            ps.kl_divergence(x, same, **each),
            ps.kl_divergence_value_and_grad(x, y, **each),
            total(x, y),
            ps.kl_divergence_value_and_grad(x, y, **distilled),
            jax.grad(total, (0, 1))(x, y),
            jax.grad(total, 1)(x, y),
        )
    )


def dtype_of(x):
    return np.dtype(x.dtype).type


@every_pair
def test_entropy_and_its_gradients(jax, xp, path, shape, axis, dtype):
    p, x = logits(xp, shape, dtype)
    assert kernels.explain("entropy", x, axis=axis).startswith(path)
    log_p = log_softmax(p, axis)
    h = -(np.exp(log_p) * log_p).sum(axis)
    grad = np.exp(log_p) * (-log_p - np.expand_dims(h, axis))
    value, slope = ps.entropy_value_and_grad(x, axis=axis)
    assert_near(value, h, dtype)
    assert_near(ps.entropy(x, axis=axis), h, dtype)
    assert_near(slope, grad, dtype)
    traced = jax.jit(jax.grad(lambda x: jax.numpy.sum(2 * ps.entropy(x, axis=axis))))(x)
    assert_near(traced, 2 * grad, dtype)


@every_value
def test_running_sums_and_their_gradients(jax, xp, path, shape, axis, dtype):
    wide, x = logits(xp, shape, dtype)
    dy, given = logits(xp, shape, dtype, 1)
    if path == "numba rows":
        assert kernels.explain("logcumsumexp", x, axis=axis).startswith(path)
    y, grad = running(wide, dy, axis)
    assert_near(ps.logcumsumexp(x, axis=axis), y, dtype)
    assert_near(ps.logcumsumexp_vjp(x, given, axis=axis), grad, dtype, 100)
    back = jax.jit(lambda x, dy: jax.vjp(lambda x: ps.logcumsumexp(x, axis=axis), x)[1](dy)[0])
    assert_near(back(x, given), grad, dtype, 100)


def running(x, dy, axis):
    """Return the logarithms of the running sums, and the gradient through them."""
    m = x.max(axis, keepdims=True)
    y = m + np.log(np.cumsum(np.exp(x - m), axis))
    behind = np.flip(np.cumsum(np.flip(dy * np.exp(m - y), axis), axis), axis)
    return y, np.exp(x - m) * behind


@_SLOW
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS, ids=str)
def test_every_layout(jax, xp, path, shape, axis):
    """A handler of each kind finds its buffers: of two arrays, of a mask, of running sums.

    Each kernel is tested in each layout on NumPy, and each handler above.
    """
    if path != "numba rows":
        pytest.skip("a layout of Numba's kernels")
    (p, x), (q, y) = logits(xp, shape), logits(xp, shape, seed=1)
    mask = np.random.default_rng(2).random(shape) < 0.7
    mask |= p == p.max(axis, keepdims=True)

    def f(x, y, mask):
        k = ps.kl_divergence_value_and_grad(x, y, axis=axis, temperature=2.5, reduction="none")
        m = ps.logmeanexp(x, axis=axis, where=mask)
        return k, m, ps.logcumsumexp_vjp(x, y, axis=axis)

    f, given = jax.jit(f), (x, y, xp.asarray(mask))
    of_kinds = ["fold", "kl_divergence_value_and_grad", "logcumsumexp_vjp"]
    assert called(jax, f, *given) == of_kinds
    (k, (by_p, by_q)), mean, slope = f(*given)
    log_p, log_q = log_softmax(p / 2.5, axis), log_softmax(q / 2.5, axis)
    want = (np.exp(log_p) * (log_p - log_q)).sum(axis)
    assert_near(k, want, "float32", 10)
    want = np.exp(log_p) * (log_p - log_q - np.expand_dims(want, axis)) / 2.5
    assert_near(by_p, want, "float32", 10)
    assert_near(by_q, (np.exp(log_q) - np.exp(log_p)) / 2.5, "float32", 10)
    terms = np.where(mask, np.exp(p - 50), 0)
    assert_near(mean, 50 + np.log(terms.sum(axis) / mask.sum(axis)), "float32")
    assert_near(slope, running(p, q, axis)[1], "float32", 100)


def test_rows_that_are_not_finite(jax, xp):
    """Each row is nan or infinite, or has a share of 0, as if it were alone."""
    (p, x), (q, y) = logits(xp, (6, 300)), logits(xp, (6, 300), seed=1)
    clean = ps.entropy(x), ps.kl_divergence(x, y, reduction="none")
    p, q = p.astype("float32"), q.astype("float32")
    p[1, 0] = q[1, 0] = -np.inf  # a class that both leave out
    p[2], p[3, 7], q[4, 5] = -np.inf, np.nan, -np.inf
    x, y = xp.asarray(p), xp.asarray(q)
    h, slope = map(np.asarray, ps.entropy_value_and_grad(x))
    k, by = ps.kl_divergence_value_and_grad(x, y, reduction="none")
    k, by_p, by_q = map(np.asarray, (k, *by))
    np.testing.assert_array_equal(k, ps.kl_divergence(x, y, reduction="none"))
    for found, want in zip((h, k), clean, strict=True):
        np.testing.assert_allclose(found[[0, 5]], np.asarray(want)[[0, 5]], rtol=1e-6)
        assert np.isfinite(found[1])
        assert np.isnan(found[2:4]).all()
    assert np.isfinite(h[4])
    assert k[4] == np.inf
    assert slope[1, 0] == by_p[1, 0] == by_q[1, 0] == 0
    for found in (slope, by_p, by_q):
        assert np.isfinite(found[[0, 1, 5]]).all()
        assert np.isnan(found[2:4]).all()
    assert not np.isfinite(by_p[4]).any()
    traced = jax.grad(lambda x, y: jax.numpy.sum(ps.kl_divergence(x, y, reduction="none")), (0, 1))
    for found, want in zip(traced(x, y), (by_p, by_q), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-7)


def test_a_divergence_keeps_the_digits_of_near_distributions(xp):
    """Its terms are of the second order: a sum of p (log p - log q) would have none left."""
    p, x = logits(xp, (40, 300), "float64")
    for size in (1e-3, 1e-6, 1e-9):
        q = (p + size * np.random.default_rng(1).standard_normal(p.shape)).astype("float64")
        log_p, log_q = log_softmax(p, -1), log_softmax(q.astype(np.longdouble), -1)
        u = log_q - log_p
        series = np.polyval([1 / np.longdouble(math.factorial(k)) for k in range(9, 1, -1)], u)
        exact = (np.exp(log_p) * u * u * series).sum(-1)
        found = np.asarray(ps.kl_divergence(x, xp.asarray(q), reduction="none"))
        unit = np.finfo("float64").eps / 2
        lost = 4 * unit * (1 + np.maximum(-log_p, -log_q).max(-1))
        bound = 8 * unit * exact + lost * np.sqrt(2 * exact) + lost**2 / 2
        assert (np.abs(found - exact) <= bound).all()
        assert (found >= 0).all()


@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=_SLOW)])
def test_half_types_are_rounded_once(jax, xp, dtype):
    x, y = (logits(xp, (40, 300), seed=seed)[1].astype(dtype) for seed in (0, 1))

    def of(x, y):
        k, grads = ps.kl_divergence_value_and_grad(x, y, reduction="none")
        dy = jax.numpy.linspace(0.1, 1.0, 40).astype(dtype)
        _, back = jax.vjp(lambda x: ps.entropy(x), x)
        _, of_k = jax.vjp(lambda x: ps.kl_divergence(x, y, reduction="none"), x)
        back, of_k = (f(dy.astype(v.dtype)) for f, v in ((back, x), (of_k, k)))
        return k, grads, ps.entropy_value_and_grad(x), back, of_k

    narrow, wide = of(x, y), of(*(a.astype("float32") for a in (x, y)))
    for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert a.dtype == dtype
        np.testing.assert_array_equal(a, b.astype(dtype))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty_arrays(xp, shape):
    x = xp.asarray(np.zeros(shape, "float32"))
    none = ps.kl_divergence(x, x, reduction="none")
    assert none.tolist() == [0] * shape[0]
    assert ps.kl_divergence(x, x, reduction="sum") == 0
    mean, grads = ps.kl_divergence_value_and_grad(x, x)
    assert np.isnan(mean) == (shape[0] == 0)
    assert [g.shape for g in grads] == [shape, shape]
    assert ps.entropy(x).tolist() == [0] * shape[0]
    assert ps.logcumsumexp(x).shape == shape


@every_value
def test_means(jax, xp, path, shape, axis, dtype):
    """Of a row near its maximum, too, where the logarithm of a mean would cancel."""
    wide, x = logits(xp, shape, dtype)
    near = np.moveaxis(-np.abs(wide) * 1e-3, axis, -1).copy()
    near[..., 0] = 0.0
    near = np.moveaxis(near, -1, axis).astype(dtype)
    rng = np.random.default_rng(2)
    mask = rng.random(shape) < 0.7
    mask |= wide == wide.max(axis, keepdims=True)
    for where in (None, mask):
        options = {"axis": axis, "keepdims": True}
        options["where"] = None if where is None else xp.asarray(where)
        kept = np.full(shape, True) if where is None else where
        slope = jax.jit(jax.grad(lambda x: jax.numpy.sum(ps.logmeanexp(x, **options))))  # noqa: B023
        for given, of in ((wide, x), (near.astype(np.longdouble), xp.asarray(near))):
            assert kernels.explain("logmeanexp", of, **options).startswith(path)
            m = np.where(kept, given, -np.inf).max(axis, keepdims=True)
            lost = np.where(kept, np.expm1(np.where(kept, given - m, 0)), 0)
            lost = lost.sum(axis, keepdims=True) / kept.sum(axis, keepdims=True)
            want = m + np.log1p(lost)
            found = ps.logmeanexp(of, **options)
            assert_near(found, want, dtype)
            if of is not x and where is None:
                np.testing.assert_allclose(found, want, rtol=4 * BOUND[dtype])
            p = np.where(kept, np.exp(np.where(kept, given, m) - m), 0)
            assert_near(slope(of), p / p.sum(axis, keepdims=True), dtype)


def test_means_of_nothing_and_of_infinities(jax, xp):
    x = np.ones((5, 300), "float32")
    x[1], x[2, 0], x[3, :4], x[4, :9] = -np.inf, np.inf, [1, np.inf, 1, np.nan], -np.inf
    found = np.asarray(ps.logmeanexp(xp.asarray(x), axis=1))
    assert found[:3].tolist() == [1.0, -np.inf, np.inf]
    assert np.isnan(found[3])
    assert abs(found[4] - (1 + np.log(291 / 300))) < 2e-7
    mask = np.full(x.shape, True)
    mask[0] = mask[3, 1] = mask[3, 3] = False
    f = jax.vmap(lambda x, where: ps.logmeanexp(x, where=where))
    found = np.asarray(f(xp.asarray(x), xp.asarray(mask)))
    assert np.isnan(found[0])
    assert found[1:4].tolist() == [-np.inf, np.inf, 1.0]
    assert np.isnan(ps.logmeanexp(xp.asarray(x[:, :0]), axis=1)).all()
    slopes = np.asarray(jax.grad(lambda x: ps.logmeanexp(x, axis=1)[:3].sum())(xp.asarray(x)))
    assert not slopes[[1, 2, 4]].any()
    assert np.isnan(slopes[3]).all()
    np.testing.assert_allclose(slopes[0], 1 / 300, rtol=1e-6)


@pytest.mark.parametrize("other", [0.0, -50.0])
def test_a_mean_has_the_same_bits_beside_any_other(xp, other):
    """Whether a row near 1 stands elsewhere does not count."""
    for gap in (0.2, 0.35, 0.36, 0.5):
        row = np.full(300, -gap, "float32")
        row[0] = 0.0
        x = xp.asarray(np.stack([row, np.full(300, other, "float32")]))
        x = x.at[1, 0].set(0.0)
        alone = ps.logmeanexp(xp.asarray(np.stack([row, row])), axis=1)
        assert ps.logmeanexp(x, axis=1)[0] == alone[0] == alone[1]


# --------------------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weighted_sums_and_their_gradients(jax, xp, path, dtype):
    wide, x = logits(xp, (40, 30), dtype)
    rng = np.random.default_rng(3)
    b = rng.normal(size=(40, 30)).astype(dtype)
    b[:, 5] = 0.0
    mask = rng.random((40, 30)) < 0.7
    mask[:, 0] = True
    for where in (None, mask):
        options = {"axis": 1, "where": None if where is None else xp.asarray(where)}
        given = {"b": xp.asarray(b), **options}
        said = kernels.explain("logsumexp", x, return_sign=True, **given)
        assert said.startswith(path)
        w = b if where is None else np.where(where, b, 0)
        m = wide.max(1, keepdims=True)
        s = (w * np.exp(wide - m)).sum(1, keepdims=True)
        sizes = (np.abs(w) * np.exp(wide - m)).sum(1, keepdims=True)
        want = (m + np.log(np.abs(s)))[:, 0]
        value, sign = ps.logsumexp(x, return_sign=True, **given)
        assert value.dtype == sign.dtype == dtype
        value, sign = np.asarray(value), np.asarray(sign)
        assert np.array_equal(sign, np.sign(s[:, 0]))
        lost = BOUND[dtype] * (1 + sizes / np.abs(s))  # where terms cancel
        assert (np.abs(value - want) <= np.maximum(1, np.abs(want)) * lost[:, 0]).all()
        alone = np.asarray(ps.logsumexp(x, **given))
        assert np.array_equal(alone, np.where(sign < 0, np.nan, value), equal_nan=True)
        grads = jax.grad(
            lambda x, b: jax.numpy.sum(ps.logsumexp(x, **{**given, "b": b}, return_sign=True)[0]),  # noqa: B023
            (0, 1),
        )(x, given["b"])
        of_x = jax.grad(lambda x: jax.numpy.sum(ps.logsumexp(x, **given, return_sign=True)[0]))(x)  # noqa: B023
        e = np.exp(wide - m) / s
        by_b = e if where is None else np.where(where, e, 0)
        for found, exact in ((of_x, w * e), (grads[0], w * e), (grads[1], by_b)):
            assert found.dtype == dtype
            assert (
                np.abs(np.asarray(found) - exact) <= 2 * lost * np.maximum(np.abs(exact), 1)
            ).all()


def test_weights_and_logits_of_every_kind(jax, xp):
    """Compare with the portable formula, also where an infinity meets one of the other sign."""
    rng = np.random.default_rng(4)
    x = rng.choice([0.0, -np.inf, np.inf, np.nan, 1.0, 800.0, -800.0], (900, 3))
    b = rng.choice([0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 2.0], (900, 3))
    b[:300] = rng.choice([0.0, 1.0, -1.0, 1e-20], (300, 3))  # whose sums cancel, all or in part
    x[:300] = rng.choice([0.0, 30.0, -np.inf], (300, 3))
    x, b = xp.asarray(x), xp.asarray(b)
    found = ps.logsumexp(x, axis=1, b=b, return_sign=True)
    with kernels.portable():
        want = ps.logsumexp(x, axis=1, b=b, return_sign=True)
    for a, c in zip(found, want, strict=True):
        np.testing.assert_allclose(a, c, rtol=1e-13)
    # One b for every row; a sign of sums without b.
    few = b[0][None]
    one = ps.logsumexp(x[:300], axis=1, b=few, return_sign=True)
    every = xp.asarray(np.repeat(np.asarray(few), 300, 0))
    two = ps.logsumexp(x[:300], axis=1, b=every, return_sign=True)
    np.testing.assert_array_equal(one, two)
    value, sign = ps.logsumexp(x, axis=1, return_sign=True)
    plain = np.asarray(ps.logsumexp(x, axis=1))
    np.testing.assert_allclose(value, plain, rtol=4e-16)  # which a handler may find
    signs = np.where(np.isnan(plain), np.nan, np.where(plain == -np.inf, 0.0, 1.0))
    np.testing.assert_array_equal(sign, signs)


@pytest.mark.parametrize("n", [3, 40])
def test_rows_of_which_nothing_counts_beside_others(jax, xp, n):
    """Padding has no weight, a masked row is -inf throughout: no other row is worse for it."""
    rng = np.random.default_rng(8)
    x, b = rng.normal(size=(50, n)), rng.uniform(0.5, 2.0, (50, n))
    want = np.log((b * np.exp(x)).sum(1))
    b[1], x[1, 0] = 0.0, np.nan
    x[2] = -np.inf
    b[3], x[3] = 0.0, -np.inf
    want[1:4] = -np.inf
    value, sign = ps.logsumexp(xp.asarray(x), axis=1, b=xp.asarray(b), return_sign=True)
    np.testing.assert_allclose(value, want, rtol=1e-14)
    np.testing.assert_array_equal(sign, np.where(want == -np.inf, 0.0, 1.0))
    x[4, 0] = np.nan  # which -inf, or what has no weight, follows
    x[4, 1:] = -np.inf
    x[5, 0], b[5, 1:] = np.nan, 0.0
    want[4:6] = np.nan
    value, _ = ps.logsumexp(xp.asarray(x), axis=1, b=xp.asarray(b), return_sign=True)
    np.testing.assert_allclose(value, want, rtol=1e-14)


def test_second_derivatives_of_weighted_sums(jax, xp):
    """Take the closed form, at a maximum and beside it."""
    rng = np.random.default_rng(5)
    x, b = xp.asarray(rng.normal(size=6)), xp.asarray(np.abs(rng.normal(size=6)) + 0.1)

    def f(x, b):
        return ps.logsumexp(x, b=b)

    p = np.asarray(b * np.exp(x) / np.sum(b * np.exp(x)))
    np.testing.assert_allclose(jax.hessian(f)(x, b), np.diag(p) - np.outer(p, p), atol=1e-14)
    mixed = jax.jacobian(jax.grad(f), 1)(x, b)
    np.testing.assert_allclose(mixed, (np.diag(p) - np.outer(p, p)) / np.asarray(b), atol=1e-14)


@pytest.mark.parametrize("n", [3, 40])
def test_a_nan_reaches_each_gradient_of_its_weighted_sum(jax, xp, n):
    """Beside +inf as well, where XLA may lose it from a maximum."""
    x = np.full((200, n), -1.0)
    x[1::2, :3] = -np.inf, np.inf, np.nan
    b = np.random.default_rng(6).uniform(1.0, 2.0, x.shape)
    grads = jax.grad(lambda x, b: ps.logsumexp(x, axis=1, b=b).sum(), (0, 1))
    by_x, by_b = map(np.asarray, grads(xp.asarray(x), xp.asarray(b)))
    assert np.isnan(by_x[1::2]).all()
    assert np.isnan(by_b[1::2]).all()
    sums = b[::2].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(by_x[::2], b[::2] / sums, rtol=1e-14)
    np.testing.assert_allclose(by_b[::2], np.broadcast_to(1.0 / sums, (100, n)), rtol=1e-14)


# --------------------------------------------------------------------------- derivatives


def family(x, _):
    """Return the answers of all operations, so that one program has them all."""
    y = x[::-1] / 2
    found = {
        "entropy": ps.entropy(x),
        "entropy and gradient": ps.entropy_value_and_grad(x, axis=0),
        "each divergence": ps.kl_divergence(x, y, axis=0, reduction="none"),
        "logcumsumexp": ps.logcumsumexp(x, axis=0),
        "logmeanexp": ps.logmeanexp(x, axis=1),
        "weighted logsumexp": ps.logsumexp(x, axis=1, b=y + 4, return_sign=True),
        "masked logmeanexp": ps.logmeanexp(x, axis=0, where=y < 1),
        "logcumsumexp_vjp": ps.logcumsumexp_vjp(x, y),
    }
    for options in ({}, {"temperature": 2.0, "distillation": True, "reduction": "sum"}):
        found[f"divergence, {[*options]}"] = ps.kl_divergence(x, y, **options)
        found[f"gradients, {[*options]}"] = ps.kl_divergence_value_and_grad(y, x, **options)
    return found


EVERY = [*("jit", "grad", "jvp", "vmap", "vmap of grad", "grad of vmap", "hessian", "scan")]


@pytest.mark.slow("two compilers work on all operations")
@pytest.mark.parametrize("name", [*EVERY, "checkpoint"])
def test_transforms_of_every_operation(jax, xp, name):
    """Compare with the portable formulas under the same transform."""
    x, t = handlers.draw(xp, 6, 5)
    transform = handlers.transforms(jax)[name]
    found = xp.program(transform(family))(x, t)
    with kernels.portable():
        want = xp.program(transform(family))(x, t)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def test_a_gradient_by_either_argument_and_by_both(jax, xp):
    x, y = (logits(xp, (40, 300), seed=seed)[1] for seed in (0, 1))

    def f(x, y):
        return ps.kl_divergence(x, y, reduction="sum")

    both = jax.grad(f, (0, 1))(x, y)
    for i in (0, 1):
        np.testing.assert_allclose(jax.grad(f, i)(x, y), both[i], rtol=1e-6, atol=1e-7)
    same = jax.grad(lambda x: f(x, 2 * x))(x)
    one, two = jax.grad(f, (0, 1))(x, 2 * x)
    np.testing.assert_allclose(same, one + 2 * two, rtol=1e-5, atol=1e-5)


def test_a_batch_of_one_argument(jax, xp):
    x, y = handlers.draw(xp, 3, 6, 5)[0], handlers.draw(xp, 6, 5, seed=1)[0]
    for f in (
        lambda x, y: ps.kl_divergence(x, y, reduction="sum"),
        lambda x, y: ps.kl_divergence_value_and_grad(x, y),
    ):
        found = jax.vmap(f, in_axes=(0, None))(x, y)
        handlers.close(found, jax.tree.map(lambda *a: np.stack(a), *(f(row, y) for row in x)))
        found = jax.vmap(f, in_axes=(None, 0))(y, x)
        handlers.close(found, jax.tree.map(lambda *a: np.stack(a), *(f(y, row) for row in x)))


# --------------------------------------------------------------------------- paths


def called(jax, f, *arrays):
    text = jax.jit(f).lower(*arrays).as_text()
    return sorted(re.findall(r"portable_softmax\.ffi\.(\w+)", text))


def test_each_operation_is_a_handler_on_one_cpu_alone(jax, xp, path):
    if path != "numba rows":
        pytest.skip("no handlers on this backend")
    x, y = (logits(xp, (40, 300), seed=seed)[1] for seed in (0, 1))
    assert called(jax, ps.kl_divergence, x, y) == ["kl_divergence"]
    pair = ["kl_divergence_value_and_grad"]
    assert called(jax, ps.kl_divergence_value_and_grad, x, y) == pair
    assert called(jax, jax.grad(ps.kl_divergence), x, y) == pair
    assert called(jax, jax.grad(ps.kl_divergence, 1), x, y) == ["kl_divergence_by_q"]
    assert called(jax, ps.entropy, x) == ["entropy"]
    assert called(jax, lambda x: jax.vjp(ps.entropy, x)[1](x[:, 0]), x) == [
        "entropy_value_and_grad"
    ]
    assert called(jax, lambda x: ps.logmeanexp(x, axis=1), x) == ["fold"]
    grad = jax.grad(lambda x: ps.logmeanexp(x, axis=1).sum())
    assert called(jax, grad, x) == ["logsumexp_vjp"]
    assert called(jax, lambda x: jax.vjp(ps.logcumsumexp, x)[1](x), x) == ["logcumsumexp_vjp"]
    f = jax.jit(lambda x, y: (ps.kl_divergence(x, y), ps.entropy(x), ps.logcumsumexp(x)))
    exported = jax.export.export(f)(x, y)
    assert "custom_call" not in exported.mlir_module()
    handlers.close(exported.call(x, y), f(x, y))


def test_a_small_array_is_left_to_xla(jax, xp, path):
    if path != "numba rows":
        pytest.skip("no handlers on this backend")
    said = []

    def f(x):
        for operation in ("entropy", "kl_divergence", "logcumsumexp"):
            second = (x,) if operation == "kl_divergence" else ()
            said.append(kernels.explain(operation, x, *second))
        return x

    with kernels._switches.switched(asked=(), off=()):
        for shape in ((256, 256), (255, 256)):
            jax.eval_shape(f, jax.ShapeDtypeStruct(shape, np.float32))
    assert [s.startswith("numba rows: ") for s in said] == [True] * 3 + [False] * 3
    assert all("not numba rows: too few elements" in s for s in said[3:])


def test_no_temperature_of_a_divergence_is_compiled_in(jax, xp, path):
    from portable_softmax.kernels._jax import _family, _rows

    x, y = (logits(xp, (40, 300), seed=seed)[1] for seed in (0, 1))
    compiled = _rows._compiled_divergence if path == "numba rows" else _family.kl_divergence
    found = [ps.kl_divergence(x, y, temperature=2.0)]
    before = compiled._cache_size()
    found += [ps.kl_divergence(x, y, temperature=t) for t in (3.0, 9.5)]
    assert compiled._cache_size() == before
    assert found[0] > found[1] > found[2] > 0
