"""JAX: transformations of every order and mode, tracing, and 32 bits."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from calls import as_tuple, every_call, every_call_compiled
from numpy.testing import assert_allclose, assert_array_equal

import portable_softmax as ps

INF, NAN = np.inf, np.nan


@pytest.fixture(autouse=True)
def _only_jax(jax):
    """Skip this module for the other libraries."""


def finite(jax, function):
    """Return the function with 0 for -inf: a masked log-probability has no difference quotient."""

    def outputs(*arrays):
        ys = as_tuple(function(*arrays))
        return tuple(jax.numpy.where(jax.numpy.isinf(y), 0.0, y) for y in ys)

    return outputs


# --------------------------------------------------------------------------- derivatives


@pytest.mark.slow("XLA compiles the derivatives of each call")
@every_call
def test_derivatives_are_the_limits_of_differences(jax, xp, call):
    """The first and the second along a line, forward and reverse, in one program per call.

    JAX's own check_grads compiles one for each step of each derivative.
    """
    function, x = call.on(xp.from_numpy)
    function, x = finite(jax, function), tuple(x)
    rng = np.random.default_rng(0)

    def random(a):
        values = rng.normal(size=(2, *a.shape))
        return xp.from_numpy(values[0] + (1j * values[1] if a.dtype.kind == "c" else 0.0))

    def dot(some, others):  # as JAX pairs cotangents and tangents: no factor is conjugated
        return sum((a * b).sum().real for a, b in zip(some, others, strict=True))

    v, w = (tuple(map(random, arrays)) for arrays in (x, jax.eval_shape(function, *x)))

    def first(x):
        ys, back = jax.vjp(function, *x)
        return ys, jax.jvp(function, x, v)[1], back(w)

    @xp.program
    def derivatives(x):
        firsts, (_, forward, back) = jax.jvp(first, (x,), (v,))
        return firsts, (forward, back, dot(jax.grad(lambda x: dot(first(x)[2], v))(x), v))

    def beside(step):
        return derivatives(jax.tree.map(lambda a, b: a + step * b, x, v))[0]

    def compare(found, expected):
        for a, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert_allclose(a, e, rtol=1e-6, atol=1e-6)

    step = 3e-6
    (_, forward, back), (in_forward, in_back, of_back) = derivatives(x)
    slope, forward_2, back_2 = jax.tree.map(
        lambda a, b: (a - b) / (2 * step), beside(step), beside(-step)
    )
    compare((forward, dot(back, v)), (slope, dot(w, forward)))
    compare((in_forward, in_back, of_back), (forward_2, back_2, dot(w, in_forward)))


@pytest.mark.parametrize("more", [0, 76])
def test_hessian_of_a_logarithm_of_a_sum(jax, xp, more):
    """diag(p) - p p^T for logsumexp and the loss, at ties and for the largest entry.

    Of 64 classes and more the gradient at the label is scattered.
    """
    label = xp.asarray(0)

    @xp.program
    def hessians(x):
        return [
            hessian(x)
            for f in (ps.logsumexp, lambda x: ps.cross_entropy(x, label))
            for hessian in (jax.hessian(f), jax.jacrev(jax.jacrev(f)), jax.jacrev(jax.jacfwd(f)))
        ]

    for row in ([0.0] * 4, [3.0, 1.0, -2.0, 3.0], [9.0, 1.0, 0.0, 2.0]):
        row = np.concatenate([row, np.linspace(-2.0, 0.0, more)])
        p = np.exp(row) / np.exp(row).sum()
        expected = np.diag(p) - np.outer(p, p)
        for hessian in hessians(xp.asarray(row)):
            assert_allclose(hessian, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.parametrize("f", [ps.logsumexp, ps.log_softmax, ps.cross_entropy])
def test_hessian_of_a_scan(jax, xp, f):
    """Forward over reverse through a scan, for which JAX drops rules for derivatives inside."""
    x = xp.asarray([[0.3, -1.2, 2.1, 0.0], [1.5, 1.5, 1.5, 1.5]])
    more = (xp.asarray(2),) if f is ps.cross_entropy else ()

    def scanned(x):
        return jax.lax.scan(lambda _, row: (None, f(row, *more)), None, x)[1].sum(axis=0)

    def looped(x):
        return f(x[0], *more) + f(x[1], *more)

    hessian, expected = xp.program(lambda x: [jax.hessian(g)(x) for g in (scanned, looped)])(x)
    assert_allclose(hessian, expected, rtol=1e-12, atol=1e-14)


def test_transformations_agree_with_the_public_gradients(jax, xp):
    x = xp.asarray(np.random.default_rng(1).normal(size=(3, 5)))
    labels = xp.asarray([4, 0, 2])
    dy = xp.asarray(np.random.default_rng(2).normal(size=(3, 5)))

    @xp.program
    def transformed(x, labels, dy):
        return (
            jax.vmap(jax.jacrev(ps.softmax))(x),
            jax.vmap(jax.jacfwd(ps.softmax))(x),
            # One gradient an example: labels are mapped over as well.
            jax.vmap(jax.grad(ps.cross_entropy))(x, labels),
            *(jax.vjp(f, x)[1](dy)[0] for f in (ps.softmax, ps.log_softmax)),
        )

    jacobian = ps.softmax_jacobian(ps.softmax(x))
    _, grad = ps.cross_entropy_value_and_grad(x, labels, reduction="sum")
    by_formula = (
        *(jacobian, jacobian, grad),
        ps.softmax_vjp(ps.softmax(x), dy),
        ps.log_softmax_vjp(ps.log_softmax(x), dy),
    )
    for found, expected in zip(transformed(x, labels, dy), by_formula, strict=True):
        assert_allclose(found, expected, rtol=1e-13, atol=1e-15)


@every_call_compiled("XLA compiles each call")
def test_jit_and_vmap_change_nothing(jax, xp, call):
    function, arrays = call.on(xp.from_numpy)
    expected = [as_tuple(function(*arrays)), as_tuple(function(*(0.5 * a for a in arrays)))]
    stacks = [jax.numpy.stack([a, 0.5 * a]) for a in arrays]
    found = as_tuple(xp.program(jax.vmap(function))(*stacks))
    for y, one, two in zip(found, *expected, strict=True):
        assert_allclose(y, np.stack([one, two]), rtol=1e-13, atol=1e-15)


@pytest.mark.slow("XLA compiles many programs")
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_the_gradient_through_the_value_has_the_digits_of_the_public_one(jax, xp, z_loss):
    # At a margin of 20 the label's p - 1 rounds to 0 in float32, and minus the others' sum is 2e-9.
    rows = [[1.5] * 4, [0.3, -1.2, 2.1, 0.0]]
    rows += [[margin, 0.5, 0.0, -0.25] for margin in (20.0, 40.0, 80.0)]
    x, labels = xp.asarray([*rows, *rows], "float32"), xp.asarray(np.repeat([0, 2], len(rows)))
    options = {"reduction": "sum", "z_loss": z_loss}

    def loss(x):
        return ps.cross_entropy(x, labels, **options)

    _, grad = ps.cross_entropy_value_and_grad(x, labels, **options)
    assert (xp.numpy(grad) != 0).all()
    for gradient in (jax.grad(loss), jax.jit(jax.grad(loss)), jax.jacfwd(loss)):
        assert_allclose(gradient(x), grad, rtol=4 * 2.0**-23, atol=0.0)


@pytest.mark.slow("XLA compiles many derivatives")
def test_what_a_mask_hides_reaches_no_derivative(jax, xp):
    jnp = jax.numpy
    mask = xp.asarray([[True, False, True], [False] * 3, [True] * 3])
    some, t = xp.asarray([0, -1, 2]), xp.asarray(np.full((3, 3), 1 / 3))
    counted = {"where": mask, "ignore_index": -1}
    options = {"z_loss": 0.1, "softcap": 3.0, "label_smoothing": 0.1}

    def every(x):
        ys = (
            ps.softmax(x, where=mask),
            ps.log_softmax(x, where=mask),
            ps.logsumexp(x, axis=1, where=mask),
            ps.logsumexp(x, axis=1, where=mask, b=t, return_sign=True)[0],
            ps.logsumexp(x, axis=1, b=mask.astype(x.dtype)),
            ps.cross_entropy(x, some, **counted),
            ps.cross_entropy(x, some, **counted, **options),
            ps.cross_entropy(x, t, where=mask),
            ps.cross_entropy(x, t, where=mask, **options),
            ps.cross_entropy_value_and_grad(x, some, **counted, **options)[1],
        )
        return [jnp.where(y == -INF, 0.0, y) for y in ys]  # nothing remains of a masked row

    def total(x):
        return [jnp.sum(jnp.cos(y) * y) for y in every(x)]

    first = jax.jacrev(total)
    second = jax.jacrev(lambda x: [jnp.sum(jnp.cos(g) * g) for g in first(x)])
    along_the_mask = jnp.where(mask, 0.0, 1.0)

    @xp.program
    def derivatives(x):
        return first(x), second(x), jax.jvp(every, (x,), (along_the_mask,))[1]

    for hidden in (NAN, INF, -INF, 1e308):
        x = xp.asarray([[1.0, hidden, 2.0], [hidden] * 3, [0.0, 0.0, 3.0]])
        *gradients, tangents = derivatives(x)
        for g in (*gradients[0], *gradients[1]):
            assert jnp.isfinite(g).all()
            assert_array_equal(g[~mask], 0.0)
        for tangent in tangents:
            assert_array_equal(tangent, 0.0)


# --------------------------------------------------------------------------- tracing


def test_a_label_out_of_range_raises_where_it_can_be_read_and_is_nan_where_not(jax, xp):
    x, labels = xp.asarray(np.zeros((2, 3))), xp.asarray([3, 0])
    for f in (ps.cross_entropy, jax.grad(ps.cross_entropy)):  # op by op: the labels can be read
        with pytest.raises(IndexError, match=r"labels\[0\] is 3"):
            f(x, labels)
    for loss in (
        jax.jit(lambda x: ps.cross_entropy(x, labels, reduction="none"))(x),
        jax.jit(lambda t: ps.cross_entropy(x, t, reduction="none"))(labels),
        jax.vmap(ps.cross_entropy)(x, labels),
    ):
        assert_allclose(loss, [NAN, np.log(3)], rtol=1e-14)
    grad = jax.jit(jax.grad(lambda x: ps.cross_entropy(x, labels, reduction="sum")))(x)
    assert_array_equal(np.isnan(grad), [[True] * 3, [False] * 3])


def test_labels_are_read_by_nobody_under_a_mapped_mask(jax, xp):
    x, labels = xp.asarray(np.zeros((2, 3))), xp.asarray([0, 2])
    masks = xp.asarray([[True, True, True], [True, True, False]])
    losses = jax.vmap(lambda m: ps.cross_entropy(x, labels, where=m, reduction="none"))(masks)
    assert_allclose(losses, [[np.log(3)] * 2, [np.log(2), NAN]], rtol=1e-14)


def test_labels_are_read_by_nobody_under_mapped_weights(jax, xp):
    """Not even one that is no tracer: its class would be another."""
    x, labels = xp.asarray([[0.0, 1.0, 2.0]] * 2), xp.asarray([-1, 3])
    weights = xp.asarray([[0.0, 0.0], [1.0, 1.0]])

    def loss(x, w):
        return ps.cross_entropy(x, labels, sample_weight=w, reduction="sum")

    values, grads = jax.vmap(jax.value_and_grad(loss), (None, 0))(x, weights)
    assert_array_equal(values, [0.0, NAN])
    assert_array_equal(grads, [[[0.0] * 3] * 2, [[NAN] * 3] * 2])


def test_labels_have_no_derivative(jax, xp):
    """Of whatever integer dtype."""
    x = xp.asarray(np.zeros((2, 3)))
    for dtype in ("uint8", "int32"):
        _, back = jax.vjp(ps.cross_entropy, x, xp.asarray([0, 2], dtype))
        assert back(jax.numpy.ones(()))[1].dtype == jax.dtypes.float0


@every_call_compiled("JAX traces each call")
def test_the_program_calls_nobody_back(jax, xp, call):
    function, arrays = call.on(xp.from_numpy)
    assert "callback" not in str(jax.make_jaxpr(function)(*arrays))


def test_shapes_are_known_without_values(jax, xp):
    x = jax.ShapeDtypeStruct((5, 7), "bfloat16")
    labels = jax.ShapeDtypeStruct((5,), "int32")
    loss, grad = jax.eval_shape(ps.cross_entropy_value_and_grad, x, labels)
    assert (loss.shape, loss.dtype, grad.shape, grad.dtype) == ((), x.dtype, (5, 7), x.dtype)


# --------------------------------------------------------------------------- 32 bits

WITHOUT_X64 = """
import jax, numpy as np
import portable_softmax as ps
x = jax.numpy.asarray([[30, 0, 0], [1, 2, 3]])
labels = jax.numpy.asarray([0, 2])
assert x.dtype == labels.dtype == "int32"
outputs = ps.softmax(x), ps.log_softmax(x), ps.logsumexp(x), ps.cross_entropy(x, labels)
assert {y.dtype.name for y in outputs} == {"float32"}
loss, grad = ps.cross_entropy_value_and_grad(x, labels, reduction="none")
np.testing.assert_allclose(loss, [2 * np.exp(-30.0), np.log1p(np.exp(-1) + np.exp(-2))], rtol=1e-6)
y = x.astype("float32")
through = jax.jit(jax.grad(lambda x: ps.cross_entropy(x, labels, reduction="sum")))(y)
assert through.dtype == grad.dtype == "float32"
np.testing.assert_allclose(through, grad, rtol=1e-6, atol=0)
np.testing.assert_allclose(grad[0], np.exp(-30.0) * np.asarray([-2, 1, 1]), rtol=1e-6)
"""


@pytest.mark.slow("a fresh process imports JAX")
def test_32_bits_only(jax):
    """x64 is off unless asked for, and cannot be switched in a process that computed before."""
    flags = ("-W", "error::UserWarning")  # JAX warns where it would truncate to 32 bits
    subprocess.run([sys.executable, *flags, "-c", WITHOUT_X64], check=True)
