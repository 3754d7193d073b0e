"""softmax and log_softmax with a sink on JAX: by handlers, or by rules of XLA without a branch."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from test_kernels_jax_family import called
from test_kernels_sinks import case, formula

import portable_softmax as ps
from portable_softmax import kernels

OPERATIONS = ("softmax", "log_softmax")
BY_XLA = "jax rules: one compiled call, without a branch"
# A block of a row, some, and several axes.
SHAPES = [((9, 40), -1), ((3, 1500), -1), ((5, 7, 19), 1), ((6, 50, 3), (0, 1))]


def test_which_path_is_taken(jax, xp):
    x = xp.asarray(np.zeros((2, 3)), "float32")
    for operation in OPERATIONS:
        for sink in (0.0, x[:, :1]):
            found = kernels.explain(operation, x, sink=sink, where=x == 0, temperature=2.0)
            name = {"numba rows": "numba rows: one pass in cache"}.get(xp.path, BY_XLA)
            assert found.startswith(name)


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.slow("a program for each option", "jax-numba")
def test_a_sink_is_one_more_entry_of_its_row(jax, xp, shape, axis, dtype):
    x, sink = case(shape, axis, dtype)
    mask = np.random.default_rng(1).random(shape) < 0.7
    rtol = {"float32": 2e-6, "float64": 4e-15}[dtype]
    for operation in OPERATIONS:
        for options in ({}, {"temperature": 2.5}, {"where": mask, "temperature": 0.5}):
            given = {k: xp.asarray(v) if k == "where" else v for k, v in options.items()}
            y = getattr(ps, operation)(
                xp.asarray(x, dtype), axis=axis, sink=xp.asarray(sink, dtype), **given
            )
            assert (y.dtype, y.shape) == (dtype, shape)
            t = options.get("temperature", 1.0)
            want = formula(operation, x, sink, axis, t, options.get("where"))
            np.testing.assert_allclose(
                np.asarray(y, np.longdouble), want, rtol=3 * rtol, atol=1e-18
            )


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.slow("two programs for each operation", "jax-numba")
def test_gradients_in_every_layout(jax, xp, shape, axis):
    """With s = sum(y * dy), or sum(dy) for log_softmax, that by a sink is -s times its share."""
    x, sink = case(shape, axis, "float32")
    rng = np.random.default_rng(2)
    dy, mask = rng.standard_normal(shape), rng.random(shape) < 0.7
    given = [xp.asarray(a, "float32") for a in (x, sink)]
    for operation in OPERATIONS:
        for where in (None, mask):
            t = 1.0 if where is None else 2.0
            known = None if where is None else xp.asarray(where)
            f = partial(getattr(ps, operation), axis=axis, temperature=t, where=known)
            _, pull = jax.vjp(lambda x, sink, f=f: f(x, sink=sink), *given)
            seen = dy if where is None else np.where(where, dy, 0.0)
            p = formula("softmax", x, sink, axis, t, where)
            s = np.sum(p * seen if operation == "softmax" else seen, axis=axis, keepdims=True)
            share = 1 - np.sum(p, axis=axis, keepdims=True)
            by_x = p * (seen - s) if operation == "softmax" else seen - p * s
            for found, want in zip(
                pull(xp.asarray(dy, "float32")), (by_x, -share * s), strict=True
            ):
                assert found.dtype == "float32"
                np.testing.assert_allclose(found, want / t, rtol=1e-5, atol=2e-6)


def test_values_and_gradients_are_handlers_on_one_cpu(jax, xp):
    if xp.path != "numba rows":
        pytest.skip("no handlers on this backend")
    x = xp.asarray(np.zeros((40, 300)), "float32")
    for operation in OPERATIONS:

        def f(x, sink, operation=operation):
            return getattr(ps, operation)(x, sink=sink)

        def grads(x, sink, f=f):
            return jax.vjp(f, x, sink)[1](x)

        value, through = f"{operation}_beside_sink", f"{operation}_vjp_beside_sink"
        assert called(jax, f, x, x[:, :1]) == [value]
        assert called(jax, grads, x, x[:, :1]) == [value, through]
        exported = jax.export.export(jax.jit(grads))(x, x[:, :1])
        assert "custom_call" not in exported.mlir_module()


@pytest.mark.slow("handlers of its own", "jax-numba")
def test_rows_of_nothing_and_of_infinities(jax, xp):
    """Beside a sink a row of -inf has the probabilities 0; a nan or an infinity is a nan."""
    inf, nan = np.inf, np.nan
    x = np.zeros((6, 3), np.float32)
    x[0], x[1], x[2, 1], x[3, 2] = -inf, -inf, nan, inf
    sink = xp.asarray([[1.0], [-inf], [0.0], [0.0], [nan], [-inf]], "float32")
    x = xp.asarray(x)
    for t in (1.0, 2.0):
        p, log_p = (getattr(ps, name)(x, sink=sink, temperature=t) for name in OPERATIONS)
        np.testing.assert_array_equal(p[0], 0.0)
        np.testing.assert_array_equal(log_p[0], -inf)
        for y in (p, log_p):
            assert np.isnan(np.asarray(y[1:5])).all()
            alone = (ps.softmax if y is p else ps.log_softmax)(x[5], temperature=t)
            np.testing.assert_array_equal(y[5], alone)
        for name in OPERATIONS:
            f = partial(getattr(ps, name), x, temperature=t)
            _, pull = jax.vjp(lambda sink, f=f: f(sink=sink), sink)
            by_sink = np.asarray(pull(xp.asarray(np.ones((6, 3)), "float32"))[0])[:, 0]
            np.testing.assert_array_equal(by_sink[0], 0.0 if name == "softmax" else -3.0 / t)
            assert np.isnan(by_sink[1:5]).all()
            np.testing.assert_array_equal(by_sink[5], 0.0)


def test_a_confident_row_keeps_its_digits(jax, xp):
    x = xp.asarray([[0.0, -40.0, -50.0], [-60.0, -70.0, -80.0]], "float32")
    sink = xp.asarray([[-45.0], [0.0]], "float32")
    exact = np.asarray(x, np.longdouble), np.asarray(sink, np.longdouble)
    want = formula("log_softmax", *exact, -1)
    others = np.exp(exact[0][0, 1:]).sum() + np.exp(exact[1][0, 0])
    want[0, 0] = -np.log1p(others)
    y = ps.log_softmax(x, sink=sink)
    np.testing.assert_allclose(np.asarray(y, np.longdouble), want, rtol=3e-7)
    dy = xp.asarray([[3.0, 1.0, 2.0]] * 2, "float32")
    grad = jax.grad(lambda x: (ps.softmax(x, sink=sink) * dy).sum())(x)
    p = np.exp(formula("log_softmax", *exact, -1))
    # Of the first row, sum(p_j (dy_0 - dy_j)) over the others, whose dy the sink has as 0.
    lost = (p[0, 1:] * (3.0 - np.asarray(dy[0, 1:]))).sum() + 3.0 * np.exp(exact[1][0, 0])
    np.testing.assert_allclose(float(grad[0, 0]), float(lost), rtol=3e-6)


def test_the_share_of_a_sink_keeps_its_digits_at_any_distance(jax, xp):
    """XLA takes exp(a) / exp(b) for exp(a - b), whose difference is rounded."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(50, 3)).astype("float32")
    x[:, 1] += rng.uniform(20, 60, 50).astype("float32")
    sink = rng.normal(size=(50, 1)).astype("float32")
    rows = np.concatenate([x, sink], axis=1).astype(np.longdouble)
    others = np.exp(rows[:, [0, 2, 3]] - rows[:, 1:2]).sum(axis=1)
    y = ps.log_softmax(xp.asarray(x), sink=xp.asarray(sink))[:, 1]
    np.testing.assert_allclose(np.asarray(y, np.longdouble), -np.log1p(others), rtol=5e-7)


def joined(jax, operation, x, sink, t):
    """Return the answer as JAX has it, of rows with the sink as one more entry."""
    from jax import numpy as jnp

    rows = jnp.concatenate([x, jnp.broadcast_to(sink, (*x.shape[:-1], 1))], axis=-1)
    return getattr(jax.nn, operation)(rows / t, axis=-1)[..., :-1]


@pytest.mark.slow("several programs", "jax-numba")
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("t", [1.0, 2.5])
def test_transforms(jax, xp, operation, t):
    """The derivatives are those of rows with one more entry, and sum over what is repeated."""
    rng = np.random.default_rng(0)
    x, sink = 3 * rng.standard_normal((2, 3, 5)), rng.standard_normal((3, 1))
    x, sink, dy = (xp.asarray(a) for a in (x, sink, rng.standard_normal((2, 3, 5))))

    def ours(x, sink):
        return (getattr(ps, operation)(x, sink=sink, temperature=t) * dy).sum()

    def theirs(x, sink):
        return (joined(jax, operation, x, sink, t) * dy).sum()

    def found(f):
        each = jax.vmap(lambda x: jax.grad(f, 1)(x, sink))(x[:, None])
        changes = jax.jvp(f, (x, sink), (dy, sink + 1.0))
        hessian = jax.hessian(f, argnums=(0, 1))(x[:1], sink)
        return f(x, sink), jax.grad(f, (0, 1))(x, sink), each, changes, hessian

    found = jax.jit(found, static_argnums=0)
    for a, b in zip(*(jax.tree.leaves(found(f)) for f in (ours, theirs)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.slow("handlers of its own", "jax-numba")
def test_a_mask_hides_what_it_hides_from_derivatives(jax, xp):
    x = xp.asarray([[1.0, np.inf, 2.0], [np.nan, 0.0, 1.0]])
    where = xp.asarray([[True, False, True], [False, False, False]])
    sink = xp.asarray([[0.5], [0.5]])

    def total(x, sink):
        return (ps.softmax(x, sink=sink, where=where)[:, 0] * 2.0).sum()

    by_x, by_sink = jax.grad(total, (0, 1))(x, sink)
    e = np.exp([1.0, 2.0, 0.5])
    p = e / e.sum()
    np.testing.assert_allclose(by_x[0], 2.0 * p[0] * np.asarray([1 - p[0], 0.0, -p[1]]), rtol=1e-12)
    np.testing.assert_array_equal(by_x[1], 0.0)
    np.testing.assert_allclose(by_sink[:, 0], [-2.0 * p[0] * p[2], 0.0], rtol=1e-12)
