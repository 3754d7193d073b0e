"""JAX: one branch-free form that is exact for every row, and what JAX's own functions pass."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import reference

import portable_softmax as ps
from portable_softmax import kernels

pytestmark = pytest.mark.run_on("paths")


@pytest.fixture(autouse=True)
def _only_jax(jax):
    """Skip this module for the other libraries."""


# Rows of 8 classes whose rest is 3.0, 0.81, 0.0074 and 6e-9, and rows with ties of the maximum.
ROWS = {
    "plain": [0.0, -0.5, -0.5, -1.0, -1.0, -2.0, -1.0, -0.5],
    "small rest": [0.0, -2.0, -2.0, -2.5, -2.5, -3.0, -2.0, -2.0],
    "smaller rest": [0.0] + [float(np.log(0.0074 / 7))] * 7,
    "confident": [0.0] + [-20.9] * 7,
    "very confident": [40.25, -30.3, -31.7, -29.9, -60.0, -35.0, -33.0, -30.1],
    "ties": [5.0, 5.0, -3.0, 5.0, 1.0, 5.0, 5.0, 5.0],
    "offset": [1000.5, 990.25, 1000.0, 998.0, 999.0, 1000.25, 985.0, 970.0],
    # XLA makes a / (b * b) of a / b / b, and b * b may overflow.
    "below": [-79.5, -80.25, -81.0, -114.0, -79.75, -85.0, -90.0, -100.0],
    "far below": [-650.5, -651.25, -652.0, -690.0, -650.75, -655.0, -660.0, -670.0],
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_row_is_exact(xp, dtype):
    """All of them in one call, so that XLA has no row of its own to see through."""
    rows = np.asarray([*ROWS.values()]).astype(dtype)
    x, unit = xp.asarray(np.repeat(rows, 2, axis=0)), np.finfo(dtype).eps
    labels = np.tile([3, 0], len(rows))
    loss, grad = ps.cross_entropy_value_and_grad(x, xp.asarray(labels), reduction="none")
    alone = ps.cross_entropy(x, xp.asarray(labels), reduction="none")
    y, lse = xp.numpy(ps.log_softmax(x)), xp.numpy(ps.logsumexp(x, axis=1))
    losses, grad = [xp.numpy(found) for found in (loss, alone)], xp.numpy(grad)
    for i, label in enumerate(labels):
        given = reference.exact(rows[i // 2])
        exact, p = reference.log_softmax(given), reference.softmax(given)
        want = float(reference.logsumexp(given))
        most = max(1, abs(rows[i // 2].max()))
        assert abs(lse[i] - want) <= max(6 * np.spacing(abs(want)), 2 * unit * most)
        assert reference.ulps(y[i], exact) <= 8
        assert all(reference.ulps(found[i : i + 1], [-exact[label]]) <= 8 for found in losses)
        p[label] = -sum(other for j, other in enumerate(p) if j != label)
        normal = [j for j, v in enumerate(p) if abs(v) > np.finfo(dtype).tiny]  # XLA's others are 0
        assert reference.ulps(grad[i][normal], [p[j] for j in normal]) <= 8


@pytest.fixture
def by_xla():
    """Take the path of the rules on the other backend, too."""
    with kernels.without("numba rows"):
        yield


def test_no_branch_looks_at_the_values(jax, xp, by_xla):
    """One program for every row: under vmap a branch would be computed on both sides."""
    x, t = xp.asarray(np.zeros((4, 8))), xp.asarray([0, 1, 2, 3])
    for f in (
        ps.softmax,
        ps.log_softmax,
        ps.logsumexp,
        lambda x: ps.cross_entropy(x, t, label_smoothing=0.1, z_loss=0.1),
        lambda x: ps.cross_entropy_value_and_grad(x, t),
        jax.grad(lambda x: ps.cross_entropy(x, t)),
    ):
        text = jax.jit(f).lower(x).as_text()
        assert "exponential" in text
        for branch in ("stablehlo.case", "stablehlo.if", "stablehlo.while"):
            assert branch not in text


def test_a_row_has_the_same_bits_beside_any_other(xp):
    """What stands in another row leaves this one alone."""
    others = [[np.nan] * 8, [np.inf] + [0.0] * 7, *(ROWS[n] for n in ("plain", "confident"))]
    labels = xp.asarray([3, 3])
    functions = (
        ps.log_softmax,
        lambda x: ps.logsumexp(x, axis=1),
        lambda x: ps.cross_entropy(x, labels, reduction="none"),
        lambda x: ps.cross_entropy_value_and_grad(x, labels, reduction="sum")[1],
    )
    for row, f in itertools.product(ROWS.values(), functions):
        alone = xp.numpy(f(xp.asarray([row, row], "float32")))[0]
        for beside in others:
            together = xp.numpy(f(xp.asarray([row, beside], "float32")))[0]
            np.testing.assert_array_equal(together, alone)


def test_explain_says_what_is_left_to_the_portable_form(jax, xp, by_xla):
    x, t = xp.asarray(np.zeros((2, 3))), xp.asarray([0, 1])
    name = "jax rules: one compiled call, without a branch; not numba rows: switched off"
    for operation, arrays, options in (
        *((f, (x,), {}) for f in ("softmax", "log_softmax", "logsumexp")),
        ("softmax_vjp", (x, x), {}),
        ("cross_entropy", (x, t), {}),
        ("cross_entropy", (x, t), {"z_loss": 0.1, "softcap": 2.0}),
        ("cross_entropy", (x, t), {"label_smoothing": 0.1, "where": x == 0}),
        ("cross_entropy", (x, x), {}),
    ):
        assert kernels.explain(operation, *arrays, **options).startswith(name)
    assert kernels.explain("logsumexp", x, b=x, return_sign=True).startswith("jax rules: ")
    assert kernels.explain("softmax", x, sink=0.0).startswith("jax rules: ")
    complex_weights = kernels.explain("logsumexp", x, b=x * 1j)
    assert complex_weights.startswith("portable: ")
    assert complex_weights.endswith("not jax rules: options: complex weights")
    assert kernels.explain("log_softmax", x[:0]) == "portable: nothing to reduce"
    seen = []
    jax.jit(lambda x: seen.append(kernels.explain("logsumexp", x)))(x)
    assert seen[0].startswith(name)


# --------------------------------------------------------------------------- what peers pass


@pytest.fixture(params=["kernels", "portable"])
def path(request):
    with kernels.portable() if request.param == "portable" else nullcontext():
        yield


every_path = pytest.mark.usefixtures("path")


def calls(jax, xp):
    """Functions of logits that are finite, with the value and the gradient of each finite."""
    x = xp.asarray(np.asarray([[0.5, -40.0, 1.0], [30.0, 0.0, -2.0], [3.0, 3.0, 3.0]]))
    t = xp.asarray([0, 0, 2])
    return x, (
        lambda x: ps.softmax(x),
        lambda x: ps.log_softmax(x, temperature=2.0),
        lambda x: ps.logsumexp(x, axis=-1),
        lambda x: ps.cross_entropy(x, t),
        lambda x: ps.cross_entropy(x, t, ignore_index=2, label_smoothing=0.1, z_loss=0.01),
        lambda x: ps.cross_entropy(x, t, softcap=20.0, reduction="none"),
        lambda x: ps.cross_entropy_value_and_grad(x, t)[1],
    )


@pytest.mark.slow("XLA compiles many programs", "jax")
@every_path
def test_debug_nans_raises_for_no_finite_input(jax, xp):
    x, functions = calls(jax, xp)
    with jax.debug_nans(True):
        jax.block_until_ready(jax.jit(lambda x: [f(x) for f in functions])(x))
        for f in functions:
            jax.block_until_ready(f(x))
            jax.block_until_ready(jax.grad(lambda x, f=f: f(x).sum())(x))


@pytest.mark.slow("XLA compiles each call")
@every_path
def test_no_rank_is_promoted(jax, xp):
    x, functions = calls(jax, xp)
    with jax.numpy_rank_promotion("raise"):
        for f in functions:
            f(x)
            jax.eval_shape(jax.grad(lambda x, f=f: f(x).sum()), x)


def test_nothing_is_transferred_implicitly(jax, xp):
    x, functions = calls(jax, xp)
    with jax.transfer_guard("disallow"):
        for f in functions:
            f(x)


@pytest.mark.slow("XLA compiles many programs", "jax")
@every_path
@pytest.mark.parametrize("shape", ["b, 7", "4, c", "b, c"])
def test_symbolic_shapes_are_exported(jax, xp, shape):
    from jax import export

    b, c = (int(part) if part.strip().isdigit() else 5 for part in shape.split(","))
    dims = export.symbolic_shape(shape)
    logits = jax.ShapeDtypeStruct(dims, np.float32)
    labels = jax.ShapeDtypeStruct(dims[:1], np.int32)
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((b, c)).astype(np.float32), rng.integers(c, size=b).astype(np.int32)

    def every(x, t):
        both = ps.cross_entropy_value_and_grad(x, t)
        return ps.softmax(x), ps.log_softmax(x), ps.logsumexp(x, axis=-1), *both

    found = export.export(jax.jit(every))(logits, labels).call(x, t)
    for one, want in zip(found, every(xp.asarray(x), xp.asarray(t)), strict=True):
        np.testing.assert_allclose(one, want, rtol=1e-5, atol=1e-7)


@pytest.mark.slow("XLA compiles many programs", "jax")
@every_path
def test_an_ignored_row_takes_no_upstream_gradient(jax, xp):
    x, t = xp.asarray(np.asarray([[1.0, 2.0], [3.0, 4.0]])), xp.asarray([1, -1])
    for reduction in ("none", "sum", "mean"):
        loss = lambda x, r=reduction: ps.cross_entropy(x, t, ignore_index=-1, reduction=r)  # noqa: E731
        pull_back = jax.jit(lambda x, dy, f=loss: jax.vjp(f, x)[1](dy)[0])
        for upstream in (np.inf, -np.inf, np.nan):
            dy = xp.asarray(np.full(2 if reduction == "none" else (), upstream))
            np.testing.assert_array_equal(xp.numpy(pull_back(x, dy))[1], 0.0)
