"""The layers: forward, backward, and what they keep."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from asserts import assert_close, assert_like

import portable_softmax as ps
from portable_softmax import layers

pytestmark = pytest.mark.run_on("libraries")

RNG = np.random.default_rng(8)


def slope_of(function, x, step=1e-6):
    """Return the gradient of a scalar function of NumPy arrays by central differences."""
    grad = np.empty_like(x)
    for index in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[index] = step
        grad[index] = (function(x + shift) - function(x - shift)) / (2 * step)
    return grad


@pytest.mark.parametrize("axis", [-1, 0, (0, 1), None])
@pytest.mark.parametrize("layer", [ps.Softmax, ps.LogSoftmax])
def test_softmax_layers(xp, layer, axis):
    """The backward pass is the gradient of the forward pass."""
    a, dout = RNG.normal(size=(3, 4)), RNG.normal(size=(3, 4))
    one = layer(axis=axis)
    assert (one.params, one.grads, one.out) == ([], [], None)
    out = one.forward(xp.asarray(a))
    assert one.out is out
    expected = slope_of(lambda v: (layer(axis=axis).forward(v) * dout).sum(), a)
    assert_close(xp, one.backward(xp.asarray(dout)), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("layer", [ps.Softmax, ps.LogSoftmax, ps.SoftmaxWithLoss])
def test_backward_before_forward(layer):
    says = rf"{layer.__name__}\.backward was called before forward"
    with pytest.raises(RuntimeError, match=says):
        layer().backward(np.ones(3))


def test_softmax_with_loss(xp):
    """(y - t) / batch, for class indices and one-hot labels alike."""
    x = RNG.normal(size=(4, 3))
    p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    labels = np.asarray([0, 2, 1, 2])
    t = np.eye(3)[labels]
    for given in (xp.asarray(labels), xp.asarray(t), xp.asarray(t, "int64")):
        layer = ps.SoftmaxWithLoss()
        assert (layer.params, layer.grads, layer.y, layer.t) == ([], [], None, None)
        loss = layer.forward(xp.asarray(x), given)
        assert_close(xp, loss, -np.log((p * t).sum(axis=1)).mean(), rtol=1e-13)
        assert_close(xp, layer.y, p, rtol=1e-13)
        assert layer.t is given
        for dout, scale in (((), 1.0), ((3.0,), 3.0), ((xp.asarray(0.5),), 0.5)):
            grad = scale * (p - t) / 4
            assert_close(xp, layer.backward(*dout), grad, rtol=1e-12, atol=1e-16)
    layer = ps.SoftmaxWithLoss()
    loss = layer.forward(xp.asarray([0.0, 0.0]), xp.asarray(np.asarray(1)))  # a single sample
    assert_close(xp, loss, np.log(2))
    assert_close(xp, layer.backward(), [0.5, -0.5])


def test_softmax_with_loss_scales_each_position(xp):
    """With reduction="none" each loss has an upstream gradient of its own, on any axis."""
    x, dout = RNG.normal(size=(2, 3, 4)), RNG.normal(size=(2, 4))
    labels = RNG.integers(3, size=(2, 4))
    layer = ps.SoftmaxWithLoss(axis=1, reduction="none")
    assert_like(xp, layer.forward(xp.asarray(x), xp.asarray(labels)), (2, 4), "float64")

    def weighed(v):
        return (ps.cross_entropy(v, labels, axis=1, reduction="none") * dout).sum()

    actual = layer.backward(xp.asarray(dout))
    assert_close(xp, actual, slope_of(weighed, x), rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match=r"dout has shape \(4,\), expected \(\) or \(2, 4\)"):
        layer.backward(xp.asarray(dout[0]))


def test_softmax_with_loss_goes_back_from_what_forward_was_given(xp):
    """Whatever becomes of its labels and options in between."""
    layer = ps.SoftmaxWithLoss(axis=0, ignore_index=1)
    layer.forward(xp.asarray(np.zeros((2, 2))), xp.asarray([0, 1]))
    layer.t = xp.asarray([1, 0])
    layer.options |= {"axis": 1, "softcap": 1.0, "sample_weight": xp.asarray([0.0, 0.0])}
    assert_close(xp, layer.backward(np.inf), [[-np.inf, 0.0], [np.inf, 0.0]])
    assert_close(xp, layer.y, np.full((2, 2), 0.5))


def test_softmax_with_loss_passes_over_its_logits_once(monkeypatch):
    """The probabilities are computed for who reads them."""
    layer = ps.SoftmaxWithLoss()
    x, labels = np.asarray([[0.0, 0.0]]), np.asarray([0])
    with monkeypatch.context() as patched:
        patched.setattr(layers, "softmax", lambda *_, **__: pytest.fail("a second pass"))
        layer.forward(x, labels)
        layer.backward()
    np.testing.assert_array_equal(layer.y, [[0.5, 0.5]])


def test_softmax_with_loss_takes_the_losss_options(xp):
    x = RNG.normal(size=(3, 4))
    options = {"label_smoothing": 0.1, "softcap": 2.0, "z_loss": 0.1, "ignore_index": -1}
    layer = ps.SoftmaxWithLoss(**options)
    labels = np.asarray([1, -1, 3])
    loss = layer.forward(xp.asarray(x), xp.asarray(labels))
    assert_close(xp, loss, ps.cross_entropy(x, labels, **options), rtol=1e-13)
    slope = slope_of(lambda v: ps.cross_entropy(v, labels, **options), x)
    assert_close(xp, layer.backward(), slope, rtol=1e-6, atol=1e-9)
    capped = 2.0 * np.tanh(x / 2.0)
    p = np.exp(capped) / np.exp(capped).sum(axis=1, keepdims=True)
    assert_close(xp, layer.y, p, rtol=1e-12)
    with pytest.raises(TypeError, match="SoftmaxWithLoss got 'smoothing', expected options of"):
        ps.SoftmaxWithLoss(smoothing=0.1)


@pytest.mark.parametrize(
    "dout",
    [2, 2.0, np.float64(2), np.float32(2), np.float16(2), np.int64(2), Fraction(2)],
    ids=lambda dout: type(dout).__name__,
)
def test_a_number_as_upstream_gradient_keeps_the_dtype(xp, dout):
    """NumPy's scalars would promote."""
    for dtype in ("float32", "float64", *xp.halves):
        layer = ps.SoftmaxWithLoss()
        loss = layer.forward(xp.asarray([[0.0, 0.0]], dtype), xp.asarray([0]))
        assert_like(xp, loss, (), dtype)
        assert_like(xp, layer.y, (1, 2), dtype)
        assert_like(xp, layer.backward(loss), (1, 2), dtype)
        assert_close(xp, layer.backward(dout), [[-1.0, 1.0]], dtype)


def test_an_array_as_upstream_gradient_keeps_the_dtype(xp):
    layer = ps.SoftmaxWithLoss()
    layer.forward(xp.asarray([[0.0, 0.0]], "float32"), xp.asarray([0]))
    for dtype in ("float64", "int64"):
        assert_close(xp, layer.backward(xp.asarray(2, dtype)), [[-1.0, 1.0]], "float32")
    with pytest.raises(ValueError, match="dout is beyond the range of a float"):
        layer.backward(10**400)


def test_longdouble_keeps_the_digits_of_a_scalar():
    layer = ps.SoftmaxWithLoss()
    layer.forward(np.zeros((1, 2), np.longdouble), np.asarray([0]))
    third = np.longdouble(1) / 3
    np.testing.assert_array_equal(layer.backward(third), [[-third / 2, third / 2]])


def test_a_masked_class_has_no_gradient_whatever_follows(xp):
    mask = xp.asarray([[True, True, False]])
    layer = ps.SoftmaxWithLoss(where=mask)
    layer.forward(xp.asarray([[0.0, 0.0, 0.0]]), xp.asarray([0]))
    assert_close(xp, layer.backward(np.inf), [[-np.inf, np.inf, 0.0]])


def test_a_softcap_beyond_the_range(xp):
    layer = ps.SoftmaxWithLoss(softcap=1e300)
    layer.forward(xp.asarray([[0.0, 0.0]], "float32"), xp.asarray([0]))
    assert_close(xp, layer.y, [[0.5, 0.5]], "float32")
    assert_close(xp, layer.backward(), [[-0.5, 0.5]], "float32")


@pytest.mark.run_on("strict", "torch", "jax", "dask")
def test_an_upstream_gradient_of_another_library(xp):
    layer = ps.SoftmaxWithLoss()
    layer.forward(xp.asarray([[0.0, 0.0]]), xp.asarray([0]))
    with pytest.raises(TypeError, match="dout is an array of numpy and logits one of"):
        layer.backward(np.asarray(1.0))
