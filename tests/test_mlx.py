"""What only MLX has: its transforms, and the functions that stand in for its own."""

from __future__ import annotations

import numpy as np
import pytest
from asserts import assert_close

import portable_softmax as ps
from portable_softmax import libraries

pytestmark = pytest.mark.libraries("mlx")

LOGITS = np.asarray([[2.0, 1.0, 0.0], [30.0, 0.0, 0.0], [1.0, 1.0, -80.0]])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exp_is_exact_to_a_unit(xp, dtype):
    """Measured beside NumPy's extended precision; MLX's own is off by 60 units, and more."""
    low, high = (-87.0, 88.0) if dtype == "float32" else (-700.0, 700.0)
    x = np.linspace(low, high, 4001).astype(dtype)
    exact = np.exp(x.astype(np.longdouble))
    exp = libraries.library_of(xp.asarray(x)).xp.exp
    actual = xp.numpy(exp(xp.asarray(x)))
    assert actual.dtype == dtype
    assert (np.abs(actual - exact) / np.spacing(exact.astype(dtype))).max() < 1.1
    edges = [np.nan, np.inf, -np.inf, 0.0, -1e4, 1e4]
    assert_close(xp, exp(xp.asarray(edges, dtype)), [np.nan, np.inf, 0, 1, 0, np.inf], dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_grad_is_the_gradient_by_formula(xp, dtype):
    labels = xp.asarray([0, 0, 2])
    logits = xp.asarray(LOGITS, dtype)
    _, expected = ps.cross_entropy_value_and_grad(logits, labels)
    actual = xp.xp.grad(lambda x: ps.cross_entropy(x, labels))(logits)
    rtol = {"float32": 2e-6, "float64": 1e-14}[dtype]
    assert_close(xp, actual, xp.numpy(expected), dtype, rtol=rtol)


def test_compile_and_vmap(xp):
    logits, labels, mx = xp.asarray(LOGITS), xp.asarray([0, 0, 2]), xp.xp

    def losses(x, t):
        return ps.cross_entropy(x, t, reduction="none", check_labels=False)

    expected = xp.numpy(losses(logits, labels))
    assert_close(xp, mx.compile(losses)(logits, labels), expected, rtol=1e-14)
    assert_close(xp, mx.vmap(losses)(logits, labels), expected, rtol=1e-14)
    rows = mx.vmap(ps.softmax)(logits)
    assert_close(xp, rows, xp.numpy(ps.softmax(logits)), rtol=1e-14)


# Labels are checked where they can be read, and give nan elsewhere.
TRANSFORMED = {
    "cross_entropy": lambda x, t: ps.cross_entropy(x, t, reduction="none"),
    "sparsemax": lambda x, _: ps.sparsemax(x),
    "entmax": lambda x, _: ps.entmax(x, alpha=1.3),
    "entmax_vjp": lambda x, _: ps.entmax_vjp(ps.softmax(x), x),
    "entmax of a large alpha": lambda x, _: ps.entmax(x, alpha=3.0),
    "entmax_loss": lambda x, t: ps.entmax_loss(x, t, reduction="none"),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_what_reads_values_goes_without_under_vmap(xp, name):
    logits, labels, function = xp.asarray(LOGITS), xp.asarray([0, 0, 2]), TRANSFORMED[name]
    expected = xp.numpy(function(logits, labels))
    assert_close(xp, xp.xp.vmap(function)(logits, labels), expected, rtol=1e-13)


_LONG = pytest.mark.slow("MLX compiles each step of a search")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "cross_entropy" else _LONG) for n in TRANSFORMED]
)
def test_what_reads_values_goes_without_when_compiled(xp, name):
    logits, labels, function = xp.asarray(LOGITS), xp.asarray([0, 0, 2]), TRANSFORMED[name]
    expected = xp.numpy(function(logits, labels))
    assert_close(xp, xp.xp.compile(function)(logits, labels), expected, rtol=1e-13)


def test_a_label_out_of_range_is_nan_in_a_transform(xp):
    logits, labels = xp.asarray(LOGITS), xp.asarray([0, 3, -1])
    with pytest.raises(IndexError, match=r"labels\[1\] is 3"):
        ps.cross_entropy(logits, labels)
    found = xp.numpy(xp.xp.vmap(ps.cross_entropy)(logits, labels))
    np.testing.assert_array_equal(np.isnan(found), [False, True, True])


def test_an_answer_is_as_lazy_as_what_it_is_made_of(xp):
    mx = xp.xp
    x = mx.arange(1 << 20, dtype=mx.float32) + 1.0
    before = mx.get_active_memory()
    answers = ps.softmax(x), ps.logsumexp(x), ps.kl_divergence(x, 2.0 * x)
    assert mx.get_active_memory() - before < x.nbytes / 4
    mx.eval(answers)
    assert mx.get_active_memory() - before >= x.nbytes


def test_one_call_of_float64_needs_no_device(xp):
    """The namespace takes `device=None`, which MLX's own functions do not know."""
    library = libraries.library_of(xp.asarray(LOGITS))
    assert library.xp.zeros((2,), device=None).shape == (2,)
    assert library.xp.__name__ == "mlx.core"


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0, 3.0])
def test_its_own_derivative_of_entmax_is_the_formulas(xp, alpha):
    """The probabilities come from a search: what follows an array has to be told their slopes."""
    import mlx.core as mx

    x, dy = xp.asarray(np.float32([0.5, -1.0, 1.0, 0.9])), xp.asarray(np.float32([1, 2, -1, 0.5]))
    found = mx.grad(lambda x: (ps.entmax(x, alpha=alpha) * dy).sum())(x)
    want = ps.entmax_vjp(ps.entmax(x, alpha=alpha), dy, alpha=alpha)
    np.testing.assert_allclose(xp.numpy(found), xp.numpy(want), rtol=1e-5, atol=1e-6)
    assert np.abs(xp.numpy(found)).max() > 0.01
