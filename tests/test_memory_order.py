"""Arrays in any memory order: the answers, the order and the path are those of C order."""

from __future__ import annotations

import numpy as np
import pytest

import portable_softmax as ps
from portable_softmax import kernels, libraries

pytestmark = pytest.mark.run_on("paths")

ORDERED = pytest.mark.libraries("numpy", "torch", "cupy")
SHAPE = (3, 5, 4)

# As the name says, of an array in C order: the same entries in other places.
ORDERS = {
    "reversed axes": lambda a: a.T.copy().T,
    "class axis last": lambda a: np.moveaxis(np.moveaxis(a, 1, -1).copy(), -1, 1),
    "every other": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "without the last": lambda a: np.concatenate([a, a[:, :1]], axis=1)[:, :-1],
}


def in_order(xp, name, values):
    """Return the values in an order, and an array of them in C order."""
    values = np.asarray(values)
    there = ORDERS[name](values)
    if xp.library != "torch":
        return xp.from_numpy(there), xp.from_numpy(np.ascontiguousarray(there))
    whole = there if there.base is None else there.base
    whole = whole if min(there.strides) else there[:1].copy()
    strides = [n // there.itemsize for n in there.strides]
    memory = xp.from_numpy(np.ascontiguousarray(whole.ravel(order="K")))
    return memory.as_strided(there.shape, strides), xp.from_numpy(np.ascontiguousarray(there))


@ORDERED
@pytest.mark.parametrize("order", ["reversed axes", "class axis last", "without the last"])
def test_an_order_takes_the_kernels_and_is_that_of_the_answer(xp, order):
    """A small array is copied as it is handed over; a large one keeps its order."""
    x, same = in_order(xp, order, np.random.default_rng(0).standard_normal((30, 50, 40)))
    paths = [kernels.explain("softmax", a, axis=1).partition(":")[0] for a in (x, same)]
    assert paths[0] == paths[1]
    if order != "without the last":
        arrays = x, ps.softmax(x, axis=1), ps.softmax_vjp(ps.softmax(x, axis=1), x, axis=1)
        strides = [a.stride() if xp.library == "torch" else a.strides for a in arrays]
        assert strides[0] == strides[1] == strides[2]


@ORDERED
@pytest.mark.parametrize("shape", [(6, 5), (300, 400)], ids=str)
def test_c_order_stays_c_order(xp, shape):
    """Whatever the axes, for which an array may be worked on in another order."""
    x = xp.asarray(np.random.default_rng(0).standard_normal(shape))
    for axis in (0, 1):
        for y in (ps.softmax(x, axis=axis), ps.log_softmax(x, axis=axis)):
            assert y.is_contiguous() if xp.library == "torch" else y.flags.c_contiguous


@pytest.mark.libraries("torch")
@pytest.mark.parametrize(("made", "shape"), [((1, 400), (300, 400)), ((300, 1), (300, 400))])
def test_a_repeated_axis_stays_where_it_is(xp, torch, made, shape):
    x = xp.asarray(np.random.default_rng(0).standard_normal(made)).expand(shape)
    for y in (ps.softmax(x), ps.log_softmax(x, axis=0)):
        assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.libraries("numpy", "torch")
def test_a_label_is_named_where_it_is(xp):
    x, _ = in_order(xp, "reversed axes", np.zeros(SHAPE))
    labels = np.zeros((3, 4), int)
    labels[2, 1] = 9
    with pytest.raises(IndexError, match=r"labels\[2, 1\] is 9.* axis 1 "):
        ps.cross_entropy(x, xp.from_numpy(labels), axis=1)


@pytest.mark.libraries("numpy", "torch")
def test_answers_go_to_any_order(xp):
    """One that lies as the logits do is written in place, and another is copied to."""
    x, same = in_order(xp, "class axis last", np.random.default_rng(0).standard_normal(SHAPE))
    expected = xp.numpy(ps.softmax(same, axis=1))
    for order in ("class axis last", "reversed axes", "every other"):
        out, _ = in_order(xp, order, np.zeros(SHAPE))
        assert ps.softmax(x, axis=1, out=out) is out
        np.testing.assert_allclose(xp.numpy(out), expected, rtol=1e-12)
    assert ps.softmax(x, axis=1, out=x) is x
    np.testing.assert_allclose(xp.numpy(x), expected, rtol=1e-12)


def test_gradients_have_the_order_of_channels_last(torch):
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    labels = torch.randint(5, (2, 3, 4))
    grads = []
    for given in (x, x.contiguous()):
        leaf = given.detach().requires_grad_()
        loss = ps.cross_entropy(leaf, labels, axis=1) + (ps.softmax(leaf, axis=1) ** 2).sum()
        (grad,) = torch.autograd.grad(loss, leaf)
        grads.append(grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-13)
    leaf = x.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ps.softmax(x, axis=1), leaf)


@pytest.mark.libraries("numpy")
def test_integers_take_the_kernels(xp):
    x = np.random.default_rng(0).integers(-9, 9, size=(30, 40))
    for name in ("softmax", "log_softmax", "logsumexp"):
        function = getattr(ps, name)
        np.testing.assert_array_equal(function(x, axis=-1), function(x.astype(float), axis=-1))
        paths = [kernels.explain(name, a, axis=-1) for a in (x, x.astype(float))]
        assert paths[0] == paths[1]


@pytest.mark.libraries("numpy", "torch")
def test_nothing_is_copied_for_a_kernel_that_is_not_there(xp, monkeypatch):
    x, _ = in_order(xp, "every other", np.random.default_rng(0).standard_normal(SHAPE))
    is_there = not kernels.explain("softmax", x, axis=1).startswith("portable")
    library, copied = type(libraries.library_of(x)), []
    real = library.copy
    monkeypatch.setattr(library, "copy", lambda self, a: copied.append(a) or real(self, a))
    with kernels.portable():
        expected = xp.numpy(ps.softmax(x, axis=1))
    assert not copied
    np.testing.assert_allclose(xp.numpy(ps.softmax(x, axis=1)), expected, rtol=1e-12)
    assert bool(copied) == is_there
