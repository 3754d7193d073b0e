"""The Numba rows on CPU tensors of torch: whose memory, which derivatives, when they step aside."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest

import portable_softmax as ps
from portable_softmax import kernels
from portable_softmax.kernels import _numba, _table

LABELS = [0, 3, 2]


@pytest.fixture(autouse=True)
def _for_small_arrays_too(torch, monkeypatch):
    """Skip this module for the other libraries; without shortcuts."""
    monkeypatch.setattr(_numba, "ENOUGH", 0)
    monkeypatch.setattr(_table, "SHORTCUTS", {})


@pytest.fixture
def ran(monkeypatch):
    """Which kernels ran."""
    seen = []

    def spied(name, real):
        def spy(call):
            seen.append(name)
            return real(call)

        return spy

    for name in (*kernels._table.OPERATIONS, "gradient_of_log_softmax"):
        monkeypatch.setattr(_numba, name, spied(name, getattr(_numba, name)))
    return seen


pytestmark = pytest.mark.numba


def functions(xp):
    labels = xp.asarray(LABELS)
    return {
        "softmax": lambda x: ps.softmax(x, temperature=2.0),
        "log_softmax": ps.log_softmax,
        "logsumexp": lambda x: ps.logsumexp(x, axis=-1),
        "cross_entropy": lambda x: ps.cross_entropy(
            x, labels, ignore_index=2, label_smoothing=0.1, z_loss=0.01
        ),
    }


GRADIENT = {
    "softmax": "softmax_vjp",
    "log_softmax": "gradient_of_log_softmax",
    "logsumexp": "softmax",
    "cross_entropy": "cross_entropy_value_and_grad",
}


@pytest.mark.parametrize("name", GRADIENT)
def test_value_and_gradient_are_kernels_and_further_derivatives_are_right(torch, xp, ran, name):
    function = functions(xp)[name]
    x = xp.asarray(np.random.default_rng(0).normal(size=(3, 4))).requires_grad_()
    y = function(x)
    assert ran == [name]
    torch.autograd.grad(y.sum(), x)
    assert ran == [name, GRADIENT[name]]
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)

    def third(x):
        (g,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
        return torch.autograd.grad(h.square().sum(), x)[0]

    found = third(x)
    with kernels.portable():
        torch.testing.assert_close(found, third(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["softmax_vjp", "log_softmax_vjp"])
def test_public_gradients_are_differentiable_by_both_arguments(torch, xp, ran, name):
    rng = np.random.default_rng(1)
    y = xp.asarray(rng.uniform(0.1, 1.0, size=(3, 4))).requires_grad_()
    dy = xp.asarray(rng.normal(size=(3, 4))).requires_grad_()
    assert torch.autograd.gradcheck(getattr(ps, name), (y, dy))
    assert set(ran) == {name}


def test_the_public_loss_and_gradient_are_differentiable(torch, xp, ran):
    x = xp.asarray(np.random.default_rng(2).normal(size=(3, 4))).requires_grad_()
    labels = xp.asarray(LABELS)
    assert torch.autograd.gradcheck(lambda x: ps.cross_entropy_value_and_grad(x, labels), x)
    assert set(ran) == {"cross_entropy", "cross_entropy_value_and_grad"}
    ran.clear()
    ps.cross_entropy_value_and_grad(x.detach(), labels)
    assert ran == ["cross_entropy_value_and_grad"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", GRADIENT)
def test_the_gradient_of_a_half_type_is_rounded_once(torch, xp, ran, name, dtype):
    x = xp.asarray(np.random.default_rng(3).normal(size=(3, 4)), dtype).requires_grad_()
    (grad,) = torch.autograd.grad(functions(xp)[name](x).float().square().sum(), x)
    with kernels.portable():
        (plain,) = torch.autograd.grad(functions(xp)[name](x).float().square().sum(), x)
    assert grad.dtype == x.dtype
    assert GRADIENT[name] in ran
    torch.testing.assert_close(grad, plain, rtol=torch.finfo(x.dtype).eps, atol=1e-7)


@pytest.mark.parametrize("row", [[-np.inf, 0.0, 1.0], [np.inf, 0.0, 1.0], [-np.inf] * 3])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_gradients_at_infinities_are_those_of_the_portable_path(torch, xp, name, row):
    if name == "logsumexp" and np.inf in row:
        pytest.skip("logsumexp has no derivative at inf")
    function = functions(xp)[name]
    dy = xp.asarray([[1.0, 2.0, -3.0]] * 2)
    found = []
    for path in (nullcontext, kernels.portable):
        x = xp.asarray([row, [0.0, 1.0, 2.0]]).requires_grad_()
        with path():
            y = function(x)
            found += torch.autograd.grad(y, x, dy[:, 0] if name == "logsumexp" else dy)
    torch.testing.assert_close(found[0], found[1], equal_nan=True)


def test_the_memory_is_the_tensors_own(torch, xp, monkeypatch):
    """No copy goes in or comes out, bfloat16 included."""
    lent = []
    real = _numba.softmax
    monkeypatch.setattr(
        _numba, "softmax", lambda call: lent.append((call.x, real(call))) or lent[-1][1]
    )
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        x = xp.asarray(np.zeros((3, 4)), dtype)
        y = ps.softmax(x)
        given, made = lent.pop()
        assert given.__array_interface__["data"][0] == x.data_ptr()
        assert made.__array_interface__["data"][0] == y.data_ptr()
        assert y.dtype == x.dtype


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Converting a tensor")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_what_the_kernels_step_aside_for(torch, xp, ran):
    """What watches torch's operations, or follows them, would not see a kernel's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    class Kind(torch.Tensor):
        pass

    x = xp.asarray(np.zeros((3, 4)))
    labels = xp.asarray(LABELS)
    torch.func.vmap(ps.softmax)(x)
    torch.func.grad(lambda x: ps.logsumexp(x))(x)
    torch.compile(ps.softmax, backend="eager")(x)
    torch.jit.trace(ps.softmax, x, check_trace=False)
    with torch.autograd.forward_ad.dual_level():
        ps.softmax(torch.autograd.forward_ad.make_dual(x, x))
    with Watching():
        assert "a dispatch mode of torch" in kernels.explain("softmax", x)
        ps.softmax(x)
    ps.softmax(x.as_subclass(Kind))
    assert "a Kind" in kernels.explain("softmax", x.as_subclass(Kind))
    ps.softmax(x.to("meta"))
    weight = xp.asarray(np.ones(4)).requires_grad_()
    ps.cross_entropy(x, labels, weight=weight)
    assert "weights that require gradients" in kernels.explain("cross_entropy", x, weight=weight)
    assert ran == []
    with torch.no_grad():
        ps.cross_entropy(x, labels, weight=weight)
    assert ran == ["cross_entropy"]


def test_a_transform_of_the_gradient_takes_the_formula(torch, xp, ran):
    """Gradients of many upstream gradients at once, of a graph that kernels made."""
    x = xp.asarray(np.random.default_rng(4).normal(size=(3, 4))).requires_grad_()
    for name, function in functions(xp).items():
        y = function(x)
        rows = torch.eye(y.numel(), dtype=y.dtype).reshape(-1, *y.shape)
        ran.clear()
        (batched,) = torch.autograd.grad(y, x, rows, is_grads_batched=True, retain_graph=True)
        assert ran == []
        loop = torch.stack([torch.autograd.grad(y, x, r, retain_graph=True)[0] for r in rows])
        assert set(ran) == {GRADIENT[name]}
        torch.testing.assert_close(batched, loop)


def test_an_upstream_gradient_may_be_a_view_of_one_number(torch, xp, ran):
    """That of a sum is: it has no memory in C order."""
    x = xp.asarray(np.random.default_rng(5).normal(size=(3, 4))).requires_grad_()
    (grad,) = torch.autograd.grad(ps.log_softmax(x).sum(), x)
    torch.testing.assert_close(grad, 1 - 4 * torch.softmax(x.detach(), dim=1))
    assert ran == ["log_softmax", "gradient_of_log_softmax"]


def test_an_ignored_row_stops_any_upstream_gradient(torch, xp):
    x = xp.asarray([[np.nan] * 4, [0.0, 1.0, 2.0, 3.0]]).requires_grad_()
    loss = ps.cross_entropy(x, xp.asarray([-1, 2]), ignore_index=-1, reduction="none")
    (grad,) = torch.autograd.grad(loss, x, xp.asarray([np.nan, 1.0]))
    assert (grad[0] == 0).all()
    assert torch.isfinite(grad[1]).all()


def test_saved_tensors_may_be_packed_and_checkpointed(torch, xp, ran):
    x = xp.asarray(np.random.default_rng(6).normal(size=(3, 4))).requires_grad_()
    expected = torch.autograd.grad(ps.softmax(x).square().sum(), x)[0]
    with torch.autograd.graph.save_on_cpu():
        y = ps.softmax(x)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected)
    y = torch.utils.checkpoint.checkpoint(ps.softmax, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected)
    assert ran.count("softmax_vjp") == 3


def test_changing_a_saved_tensor_is_noticed(torch, xp):
    x = xp.asarray(np.zeros((3, 4))).requires_grad_()
    y = ps.softmax(x)
    y.detach().mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x)
