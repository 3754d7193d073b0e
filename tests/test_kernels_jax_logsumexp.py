"""logsumexp by the handlers of JAX: its value and its slopes, by one where that is faster."""

from __future__ import annotations

import re

import numpy as np
import pytest

import portable_softmax as ps


@pytest.fixture(autouse=True)
def _only_handlers(jax, xp):
    if xp.path != "numba rows":
        pytest.skip("no handlers on this backend")


def handlers(f, *arrays):
    """Return the names of the handlers that a compiled function calls."""
    import jax

    program = jax.jit(f).lower(*arrays).compile().as_text()
    return re.findall(r'custom_call_target="portable_softmax\.ffi\.([^"]*)', program)


def value_and_pullback(x, dy, **options):
    import jax

    y, back = jax.vjp(lambda x: ps.logsumexp(x, axis=-1, **options), x)
    return y, back(dy)[0]


def kinds(f, *arrays):
    return [name.partition(".")[0] for name in handlers(f, *arrays)]


ONE, TWO = ["logsumexp_value_and_grad"], ["logsumexp", "logsumexp_vjp"]
# Each layout: columns of few classes, blocks, groups, and rows one by one.
SMALL = [(70, 3), (70, 20), (20, 200), (3, 3000)]
SHAPES = [(70_000, 3), (7_000, 20), (700, 200), (50, 3000), *SMALL]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.slow("a handler for each layout and dtype", "jax-numba")
def test_one_handler_has_the_value_and_the_slopes(jax, xp, shape, dtype):
    """Those of a small array are made when they are needed: a product by XLA takes longer."""
    rng = np.random.default_rng(0)
    x, dy = 3 * rng.standard_normal(shape), rng.standard_normal(shape[0])
    x[0, 0] += 40  # a confident row
    if shape not in SMALL:  # of so many rows some would come near 0, where digits cancel
        x += 20
    x, dy = xp.asarray(x, dtype), xp.asarray(dy, dtype)
    assert kinds(value_and_pullback, x, dy) == (TWO if shape in SMALL else ONE)
    y, grad = jax.jit(value_and_pullback)(x, dy)
    assert (y.dtype, grad.dtype, y.shape, grad.shape) == (dtype, dtype, shape[:1], shape)
    exact, tolerance = np.asarray(x, np.longdouble), {"float32": 2e-6, "float64": 4e-15}[dtype]
    want = np.logaddexp.reduce(exact, axis=-1)
    np.testing.assert_allclose(y, want, rtol=tolerance)
    slopes = np.exp(exact - want[:, None]) * np.asarray(dy)[:, None]
    np.testing.assert_allclose(grad, slopes, rtol=8 * tolerance)


def test_rows_without_a_finite_maximum(jax, xp):
    """The slopes are those of the semantics: 0 where the maximum is infinite, nan beside a nan."""
    inf, nan = np.inf, np.nan
    x = np.zeros((6, 300), np.float32)
    x[0], x[1, 3], x[2, 5], x[3, 7:9] = -inf, inf, nan, (inf, nan)
    x[4, 1:] = -inf
    dy = xp.asarray(np.full(6, 2.0), "float32")
    y, grad = jax.jit(value_and_pullback)(xp.asarray(x), dy)
    np.testing.assert_array_equal(y[:5], [-inf, inf, nan, nan, 0.0])
    grad = np.asarray(grad)
    assert (grad[:2] == 0).all()
    assert np.isnan(grad[2:4]).all()
    np.testing.assert_array_equal(grad[4], [2.0, *[0.0] * 299])
    np.testing.assert_allclose(grad[5], 2 / 300, rtol=1e-6)


@pytest.mark.slow("a handler of its own", "jax-numba")
def test_a_mask(jax, xp):
    """What is left out has no part in the answer, whatever it holds, and the slope 0."""
    rng = np.random.default_rng(1)
    shape = 500, 300
    x, where = rng.standard_normal(shape), rng.random(shape) < 0.6
    where[2] = False
    plain = np.where(where, x, -np.inf)
    x[~where] = np.nan
    x, dy = xp.asarray(x), xp.asarray(rng.standard_normal(500))

    def masked(x, dy):
        return value_and_pullback(x, dy, where=xp.asarray(where))

    (name,) = handlers(masked, x, dy)
    assert name.startswith("logsumexp_value_and_grad.")
    assert name.endswith("where")
    y, grad = jax.jit(masked)(x, dy)
    want = np.logaddexp.reduce(plain, axis=-1, dtype=np.longdouble)
    np.testing.assert_allclose(y, want, rtol=1e-14)
    slopes = np.where(where, np.exp(plain - np.where(where.any(1), want, 0)[:, None]), 0)
    np.testing.assert_allclose(grad, slopes * np.asarray(dy)[:, None], rtol=1e-13)


@pytest.mark.slow("handlers for several derivatives", "jax-numba")
def test_transforms(jax, xp):
    """Forward mode, the second order, vmap, a scan and rematerialization: by softmax itself."""
    rng = np.random.default_rng(2)
    x, v = (xp.asarray(rng.standard_normal((4, 130))) for _ in range(2))

    def total(x):
        return ps.logsumexp(x, axis=-1).sum()

    p = np.asarray(jax.nn.softmax(x, axis=-1))
    close = {"rtol": 1e-12, "atol": 1e-14}
    np.testing.assert_allclose(jax.jvp(total, (x,), (v,))[1], (p * np.asarray(v)).sum(), **close)
    forward = jax.jit(jax.jacfwd(total))
    assert kinds(forward, x)[-1:] == ONE
    np.testing.assert_allclose(forward(x), p, **close)
    np.testing.assert_allclose(jax.grad(jax.checkpoint(total))(x), p, **close)
    np.testing.assert_allclose(jax.vmap(jax.grad(total))(x), p, **close)
    found = jax.hessian(total)(x[0])
    np.testing.assert_allclose(found, np.diag(p[0]) - np.outer(p[0], p[0]), **close)
    steps = jax.grad(lambda x: jax.lax.scan(lambda s, r: (s + total(r), None), 0.0, x)[0])(x)
    np.testing.assert_allclose(steps, p, **close)


@pytest.mark.slow("a large array, and handlers of its own", "jax-numba")
def test_slopes_that_no_cache_holds_are_made_when_they_are_needed(jax, xp):
    from portable_softmax.kernels._jax import _transforms

    n = 300
    for more, names in ((0, ONE), (1, TWO)):
        shape = _transforms._CACHED // 4 // n + more, n
        x, dy = (jax.ShapeDtypeStruct(s, "float32") for s in (shape, shape[:1]))
        assert kinds(value_and_pullback, x, dy) == names
