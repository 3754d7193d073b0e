"""sigmoid_cross_entropy on JAX: by handlers, and by rules without a branch."""

from __future__ import annotations

import re

import numpy as np
import pytest

import portable_softmax as ps
from portable_softmax import kernels

SHAPE = 4, 33


def handlers(f, *arrays):
    """Return the names of the handlers that a compiled function calls."""
    import jax

    program = jax.jit(f).lower(*arrays).compile().as_text()
    return re.findall(r'custom_call_target="portable_softmax\.ffi\.([^"]*)', program)


def draw(options):
    """Return logits, labels and the options in float64: some entries are confident."""
    rng = np.random.default_rng(0)
    z, t = 3 * rng.standard_normal(SHAPE), rng.random(SHAPE)
    z[0, ::2] *= 20
    t[1] = t[1] < 0.5
    arrays = {"weight": rng.random(SHAPE), "pos_weight": 1 + rng.random(SHAPE[1])}
    arrays["weight"][2, 3:9] = 0
    return z, t, {k: arrays.get(k, v) for k, v in options.items()}


def exact(z, t, weight=1.0, pos_weight=1.0, label_smoothing=0.0, reduction="mean"):
    """Return loss and gradient, by their formula in extended precision."""
    z, t = (np.asarray(a, np.longdouble) for a in (z, t))
    t = (1 - label_smoothing) * t + np.longdouble(label_smoothing) / 2
    a, b = weight * pos_weight * t, weight * (1 - t)
    each = a * np.logaddexp(0, -z) + b * np.logaddexp(0, z)
    grad = b / (1 + np.exp(-z)) - a / (1 + np.exp(z))
    if reduction == "mean":
        return each.mean(), grad / each.size
    return each.sum() if reduction == "sum" else each, grad


OPTIONS = [
    {},
    {"reduction": "none"},
    {"reduction": "sum", "label_smoothing": 0.2},
    {"weight": True, "pos_weight": True},
    {"reduction": "none", "pos_weight": True, "label_smoothing": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.slow("handlers for each option", "jax-numba")
def test_values_and_gradients(jax, xp, options, dtype):
    """Of the function with its gradient, and of JAX's derivative of the other."""
    z, t, options = draw(options)
    x, t = xp.asarray(z, dtype), xp.asarray(t, dtype)
    given = {
        k: xp.asarray(v, dtype) if isinstance(v, np.ndarray) else v for k, v in options.items()
    }
    known = {k: np.asarray(v, np.longdouble) if hasattr(v, "ndim") else v for k, v in given.items()}
    loss, grad = exact(x, t, **known)
    # With neither, nothing cancels; else a rounding of the terms of a gradient counts.
    cancels = given.keys() & {"label_smoothing", "pos_weight"}
    rounding = float(np.finfo(dtype).eps) * (2 if cancels else 1e-12)
    close = {"rtol": {"float32": 2e-6, "float64": 4e-15}[dtype], "atol": rounding}

    def ours(x):
        return ps.sigmoid_cross_entropy(x, t, **given)

    for found in (
        ps.sigmoid_cross_entropy_value_and_grad(x, t, **given),
        (ours(x), jax.jit(jax.grad(lambda x: ours(x).sum()))(x)),
    ):
        for one, want in zip(found, (loss, grad), strict=True):
            assert (one.dtype, one.shape) == (dtype, want.shape)
            np.testing.assert_allclose(np.asarray(one, np.longdouble), want, **close)


@pytest.mark.slow("handlers of half types", "jax-numba")
def test_a_half_type_is_rounded_once(jax, xp):
    z, t, _ = draw({})
    x, t = xp.asarray(z, "bfloat16"), xp.asarray(t, "float32")
    loss, grad = exact(x, t, reduction="sum")
    total, slopes = jax.jit(
        jax.value_and_grad(lambda x: ps.sigmoid_cross_entropy(x, t, reduction="sum"))
    )(x)
    assert (slopes.dtype, slopes.shape) == (x.dtype, x.shape)
    np.testing.assert_allclose(np.float64(total), float(loss), rtol=2.0**-8)
    np.testing.assert_allclose(np.float64(slopes), grad.astype(float), rtol=2.0**-8 * 1.01)


def test_which_path_is_taken(jax, xp):
    x = xp.asarray(np.zeros(SHAPE), "float32")
    rules = "jax rules: one compiled call, without a branch"
    name = "numba rows: one pass" if xp.path == "numba rows" else rules
    assert kernels.explain("sigmoid_cross_entropy", x, x > 0).startswith(name)
    found = kernels.explain("sigmoid_cross_entropy", x, x > 0, focal_gamma=2.0)
    assert found.startswith("portable: ")
    assert "not jax rules: options: focal_gamma" in found


def test_a_small_array_is_left_to_xla(jax, xp):
    if xp.path != "numba rows":
        pytest.skip("no handlers on this backend")
    said = []

    def f(x):
        said.append(kernels.explain("sigmoid_cross_entropy", x, x))
        return x

    with kernels._switches.switched(asked=(), off=()):
        for n in (1 << 16, (1 << 16) - 1):
            jax.eval_shape(f, jax.ShapeDtypeStruct((n,), np.float32))
    assert said[0] == "numba rows: one pass"
    assert said[1].startswith("jax rules: ")
    assert "not numba rows: too few elements" in said[1]


def test_entries_that_do_not_count(jax, xp):
    """An infinity or a nan has no effect where its weight is 0, and else that of the semantics."""
    inf, nan = np.inf, np.nan
    z, t = [inf, -inf, nan, -inf, inf, nan], [1, 0, 1, 1, 0, 0]
    x, t = xp.asarray(z, "float32"), xp.asarray(t, "float32")
    w = xp.asarray([1, 1, 0, 1, 1, 1], "float32")
    loss, grad = ps.sigmoid_cross_entropy_value_and_grad(x, t, weight=w, reduction="none")
    np.testing.assert_array_equal(loss, [0, 0, 0, inf, inf, nan])
    np.testing.assert_array_equal(grad, [0, 0, 0, -1, 1, nan])


@pytest.mark.slow("several programs", "jax-numba")
def test_transforms(jax, xp):
    z, t, _ = draw({})
    z[3] = 0  # where a logit is neither positive nor negative
    x, t = xp.asarray(z), xp.asarray(t)
    v = xp.asarray(np.random.default_rng(1).standard_normal(SHAPE))

    def total(x, t=t):
        return ps.sigmoid_cross_entropy(x, t, reduction="sum")

    _, grad = exact(z, t, reduction="sum")
    grad, close = grad.astype(float), {"rtol": 1e-12, "atol": 1e-15}
    np.testing.assert_allclose(jax.jvp(total, (x,), (v,))[1], (grad * np.asarray(v)).sum(), **close)
    np.testing.assert_allclose(jax.vmap(jax.grad(total))(x, t), grad, **close)
    np.testing.assert_allclose(jax.grad(jax.checkpoint(total))(x), grad, **close)
    steps = jax.grad(lambda x: jax.lax.scan(lambda s, r: (s + total(*r), None), 0.0, (x, t))[0])(x)
    np.testing.assert_allclose(steps, grad, **close)
    each = jax.vmap(lambda x, t: ps.sigmoid_cross_entropy(x, t))(x, t)
    np.testing.assert_allclose(each, [float(exact(*r)[0]) for r in zip(z, t, strict=True)], **close)
    for row in (1, 3):
        found = jax.hessian(total)(x[row], t[row])
        p = 1 / (1 + np.exp(-z[row]))
        np.testing.assert_allclose(found, np.diag(p * (1 - p)), **close)


@pytest.mark.slow("several programs", "jax-numba")
def test_by_labels_and_by_weights(jax, xp):
    """The loss is linear in them."""
    z, t, _ = draw({})
    x, t, w, c = xp.asarray(z), xp.asarray(t), xp.asarray(1.5 + 0 * z), xp.asarray(2.0 + 0 * z[0])

    def total(x, t, w, c):
        return ps.sigmoid_cross_entropy(x, t, weight=w, pos_weight=c, reduction="sum")

    of_x, of_t, of_w, of_c = jax.jit(jax.grad(total, (0, 1, 2, 3)))(x, t, w, c)
    t, yes, no = np.asarray(t), np.logaddexp(0, -z), np.logaddexp(0, z)
    close = {"rtol": 1e-12, "atol": 1e-13}
    p = 1 / (1 + np.exp(-z))
    np.testing.assert_allclose(of_x, 1.5 * ((1 - t) * p - 2 * t * (1 - p)), **close)
    np.testing.assert_allclose(of_t, 1.5 * (2 * yes - no), **close)
    np.testing.assert_allclose(of_w, 2 * t * yes + (1 - t) * no, **close)
    np.testing.assert_allclose(of_c, (1.5 * t * yes).sum(0), **close)


def test_value_and_gradient_are_one_handler_and_none_is_exported(jax, xp):
    if xp.path != "numba rows":
        pytest.skip("no handlers on this backend")
    from jax import export

    x = xp.asarray(np.zeros(SHAPE), "float32")

    t = x + 1

    def loss(x):
        return ps.sigmoid_cross_entropy(x, t)

    (name,) = handlers(lambda x: jax.value_and_grad(loss)(x), x)
    assert name.startswith("sigmoid_cross_entropy_value_and_grad.")
    exported = export.export(jax.jit(loss))(x)
    assert "custom_call" not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(x), np.log(2), rtol=1e-6)


@pytest.mark.slow("two programs", "jax-numba")
@pytest.mark.parametrize("more", [-1, 0])
def test_the_sum_of_many_entries_is_that_of_few(jax, xp, more):
    """From a size on XLA is kept from making one operation of losses and sum; a nan stays."""
    from portable_softmax.kernels._jax import _binary

    z = 3 * np.random.default_rng(0).standard_normal(_binary._LARGE + more)
    x, t = xp.asarray(z), xp.asarray((z > 1).astype(float))
    loss, grad = ps.sigmoid_cross_entropy_value_and_grad(x, t)
    want = exact(z, np.asarray(t))
    np.testing.assert_allclose(float(loss), float(want[0]), rtol=1e-14)
    np.testing.assert_allclose(grad, want[1].astype(float), rtol=1e-13)
    assert np.isnan(ps.sigmoid_cross_entropy(x.at[5].set(np.nan), t))
