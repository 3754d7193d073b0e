"""entmax on packed rows: what is left out has no probability, and the rest is answered alike."""

from __future__ import annotations

import numpy as np
import pytest
from asserts import assert_like

import portable_softmax as ps
from portable_softmax import kernels
from portable_softmax.kernels import _table

pytestmark = [pytest.mark.run_on("paths"), pytest.mark.libraries("numpy", "torch")]

PACKED = next(kernel for kernel in _table.TABLE if kernel.name == "packed rows")


@pytest.fixture
def packed():
    with kernels.use("packed rows"):
        yield


def rows(dtype="float64", classes=700):
    """Rows with few entries near the maximum, with many, with all, and with ties alone."""
    rng = np.random.default_rng(80)
    x = rng.normal(size=(9, classes)) * np.repeat([30.0, 1.0, 1e-3], 3)[:, None]
    x[4] = np.round(x[4])
    x[5] = 2.5
    return x.astype(dtype)


def test_which_path_is_taken_on_both_sides_of_the_size(xp, arrays_of):
    n, smaller = PACKED.at_least, "lent formulas" if xp.library == "torch" else "portable"
    for operation in ("entmax", "sparsemax"):
        for size, path in ((n, "packed rows"), (n - 1, smaller)):
            x = xp.asarray(np.zeros((1, size)))
            assert kernels.explain(operation, x).partition(":")[0] == path
    y = xp.asarray(np.full((1, n), 1 / n))
    assert kernels.explain("entmax_vjp", y, y).startswith("packed rows: ")


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0])
def test_a_row_has_the_same_bits_alone_and_beside_others(xp, packed, alpha):
    x, dy = rows("float32"), np.random.default_rng(82).normal(size=(9, 700)).astype("float32")
    y = ps.entmax(xp.asarray(x), alpha=alpha)
    dx = xp.numpy(ps.entmax_vjp(y, xp.asarray(dy), alpha=alpha))
    y = xp.numpy(y)
    for i in range(9):
        one = ps.entmax(xp.asarray(x[i : i + 1]), alpha=alpha)
        np.testing.assert_array_equal(xp.numpy(one)[0], y[i])
        alone = ps.entmax_vjp(one, xp.asarray(dy[i : i + 1]), alpha=alpha)
        np.testing.assert_array_equal(xp.numpy(alone)[0], dx[i])


@pytest.mark.run_on("torch", "torch-numba")
def test_derivatives_of_second_order(torch, xp, packed):
    x = xp.asarray(np.random.default_rng(84).normal(size=(2, 5))).requires_grad_()
    for f in (ps.sparsemax, ps.entmax, lambda x: ps.entmax(x, alpha=1.25)):
        assert kernels.explain("entmax", x).startswith("packed rows: ")
        assert torch.autograd.gradcheck(f, (x,))
        assert torch.autograd.gradgradcheck(f, (x,))
    alpha = xp.asarray(1.3).requires_grad_()
    assert kernels.explain("entmax", x, alpha=alpha).startswith("portable: ")
    y = ps.entmax(x, alpha=1.5)
    assert kernels.explain("entmax_vjp", y, x).startswith("portable: ")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
def test_the_loss_is_that_of_fenchel_and_young(xp, packed, alpha, dtype):
    """Omega(p) + (p - t) x with Omega(p) = (sum(p^alpha) - 1) / (alpha c), and p - t beside it."""
    x, n, c = rows(dtype), 9, np.longdouble(alpha) - 1
    t = np.where(np.arange(n) % 2, x.argmax(1), np.arange(n))
    logits, labels = xp.asarray(x), xp.asarray(t)
    options = {"alpha": alpha, "reduction": "none"}
    assert kernels.explain("entmax_loss", logits, labels, **options).startswith("packed rows: ")
    loss, grad = ps.entmax_loss_value_and_grad(logits, labels, **options)
    loss, grad = assert_like(xp, loss, (n,), dtype), assert_like(xp, grad, x.shape, dtype)
    p = as_wide(xp, ps.entmax(xp.asarray(x.astype("float64")), alpha=alpha))
    one_hot = (np.arange(x.shape[1]) == t[:, None]).astype(np.longdouble)
    wide = x.astype(np.longdouble)
    # -c Omega is made of p alone; what is left is linear in the logits, less their maximum.
    exact = ((1 - (p**alpha).sum(1)) / (alpha * c)) + ((p - one_hot) * (wide - wide.max())).sum(1)
    size = np.maximum(1.0, np.abs(wide - wide.max()).max())
    np.testing.assert_allclose(loss, exact, atol=float(16 * np.finfo(dtype).eps * size))
    np.testing.assert_allclose(grad, p - one_hot, atol=float(16 * np.finfo(dtype).eps))
    np.testing.assert_array_equal(
        assert_like(xp, ps.entmax_loss(logits, labels, **options), (n,), dtype), loss
    )


def as_wide(xp, x):
    return assert_like(xp, x, tuple(x.shape), "float64").astype(np.longdouble)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_options_of_the_loss_on_packed_rows(xp, packed, axis):
    """The same rows alone, weighted and summed; an ignored one has the gradient 0."""
    x = np.random.default_rng(0).normal(0, 4, (5, 300, 4))
    x = np.moveaxis(x, 1, axis)
    positions = [k for a, k in enumerate(x.shape) if a != axis % 3]
    t = np.random.default_rng(1).integers(0, x.shape[axis], positions)
    t.reshape(-1)[3] = -100
    # An ignored row may hold anything.
    np.moveaxis(x, axis, -1)[np.unravel_index(3, positions)] = np.nan
    w = np.random.default_rng(2).uniform(0.5, 2.0, positions)
    given = xp.asarray(x), xp.asarray(t)
    options = {"axis": axis, "ignore_index": -100}
    weights = {"sample_weight": xp.asarray(w)}
    each = as_wide(xp, ps.entmax_loss(*given, reduction="none", **options))
    loss, grad = ps.entmax_loss_value_and_grad(*given, **options, **weights)
    counted = t >= 0
    mean = (w * each)[counted].sum() / w[counted].sum()
    np.testing.assert_allclose(float(loss), float(mean), rtol=1e-14)
    _, plain = ps.entmax_loss_value_and_grad(*given, reduction="none", **options)
    scaled = as_wide(xp, plain) * np.expand_dims(w * counted / w[counted].sum(), axis)
    np.testing.assert_allclose(as_wide(xp, grad), scaled, rtol=1e-13, atol=1e-18)
    assert np.all(np.moveaxis(as_wide(xp, plain), axis, -1)[~counted] == 0)
