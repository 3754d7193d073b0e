"""Losses in torch's autograd on the kernels: the gradient is made beside the value, in one read."""

from __future__ import annotations

import numpy as np
import pytest

import portable_softmax as ps
from portable_softmax import kernels

pytestmark = [
    pytest.mark.run_on("torch", "torch-numba"),  # to which a tensor's memory is lent
    pytest.mark.slow("Numba compiles each loss", "torch-numba"),
]


@pytest.fixture(autouse=True)
def _only_torch(torch):
    """Run on torch's backends."""


def normal(xp, shape=(6, 5), seed=0, dtype="float64"):
    return xp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def value_of(xp, name, dtype="float64", **how):
    """Return a function of logits; upstream is a factor of its gradient, which the value leaves."""
    labels, other = xp.asarray(np.arange(6) % 5), normal(xp, seed=1, dtype=dtype)
    ones = (other > 0).to(other.dtype)
    some = {"ignore_index": 2, "label_smoothing": 0.1, "weight": other[0].abs()}
    return {
        "cross_entropy": lambda x: ps.cross_entropy(x, labels, **how),
        "cross_entropy, options": lambda x: ps.cross_entropy(x, labels, **some, **how),
        "cross_entropy, probabilities": lambda x: ps.cross_entropy(x, ones, **how),
        "sigmoid_cross_entropy": lambda x: ps.sigmoid_cross_entropy(x, ones, **how),
        "kl_divergence": lambda x: ps.kl_divergence(other, x, **how),
        "entmax_loss": lambda x: ps.entmax_loss(x, labels, **how),
        "entropy": lambda x: ps.entropy(x),
    }[name]


every_value = pytest.mark.parametrize(
    "name",
    [
        *("cross_entropy", "cross_entropy, options", "cross_entropy, probabilities"),
        *("sigmoid_cross_entropy", "kl_divergence", "entmax_loss", "entropy"),
    ],
)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "none"])


@pytest.fixture
def ran(torch, monkeypatch):
    """Which operations the kernels gave."""
    from portable_softmax.kernels._torch import _gradients

    seen, real = [], _gradients.value

    def spy(engine, request):
        seen.append(request.operation)
        return real(engine, request)

    monkeypatch.setattr(_gradients, "value", spy)
    return seen


@every_value
@every_reduction
def test_one_kernel_makes_the_value_and_the_gradient(torch, xp, ran, name, reduction):
    function, x = value_of(xp, name, reduction=reduction), normal(xp).requires_grad_()
    both = [f"{name.partition(',')[0]}_value_and_grad"]
    y = function(x)
    dy = normal(xp, tuple(y.shape), seed=2)
    (found,) = torch.autograd.grad(y, x, dy)
    assert ran == both
    with kernels.portable():
        (want,) = torch.autograd.grad(function(x), x, dy)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-14)
    assert ran == both


@every_value
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_value_has_the_same_bits_whether_torch_records_or_not(torch, xp, name, dtype):
    x = 4 * normal(xp, dtype=dtype)
    for reduction in ("mean", "sum", "none"):
        function = value_of(xp, name, dtype, reduction=reduction)
        alone, recorded = function(x), function(x.clone().requires_grad_())
        assert recorded.requires_grad
        torch.testing.assert_close(recorded.detach(), alone, rtol=0.0, atol=0.0)


@every_value
@every_reduction
def test_a_second_backward_pass_gives_the_same_again(torch, xp, ran, name, reduction):
    """The first one may have handed out what was kept, for others to write in."""
    function, x = value_of(xp, name, reduction=reduction), normal(xp).requires_grad_()
    y = function(x).sum()
    y.backward(retain_graph=True)
    first = x.grad.clone()
    x.grad.zero_()
    y.backward(retain_graph=True)
    torch.testing.assert_close(x.grad, first, rtol=0.0, atol=0.0)
    assert len(ran) == 2
    (two,) = torch.autograd.grad(y, x, torch.full_like(y, 2.0))
    torch.testing.assert_close(two, 2 * first, rtol=1e-14, atol=0.0)


@every_value
def test_what_was_kept_is_freed_by_the_backward_pass(torch, xp, name):
    y = value_of(xp, name)(normal(xp).requires_grad_()).sum()
    node = y.grad_fn
    while not hasattr(node, "slopes"):
        ((node, _),) = node.next_functions
    assert node.slopes is not None
    y.backward()
    assert node.slopes is None


def test_no_gradient_is_kept_that_nobody_asks_for(torch, xp):
    teacher, student = normal(xp), normal(xp, seed=1).requires_grad_()
    for given, kept in (
        ((teacher, student), [False, True]),
        ((student, teacher), [True, False]),
        ((student, student), [True, True]),
    ):
        y = ps.kl_divergence(*given, reduction="sum")
        assert [slope is not None for slope in y.grad_fn.slopes] == kept
        (found,) = torch.autograd.grad(y, student)
        with kernels.portable():
            (want,) = torch.autograd.grad(ps.kl_divergence(*given, reduction="sum"), student)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-14)


@every_value
def test_nothing_is_kept_where_hooks_take_what_is_saved(torch, xp, ran, name):
    """A checkpoint would not know of it, nor what moves saved tensors to another device."""
    function, x = value_of(xp, name), normal(xp).requires_grad_()
    (want,) = torch.autograd.grad(function(x).sum(), x)
    ran.clear()
    with torch.autograd.graph.save_on_cpu():
        y = function(x).sum()
    assert ran == [name.partition(",")[0]]
    torch.testing.assert_close(torch.autograd.grad(y, x)[0], want, rtol=0.0, atol=0.0)
    y = torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False).sum()
    torch.testing.assert_close(torch.autograd.grad(y, x)[0], want, rtol=0.0, atol=0.0)


@every_value
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_gradient_of_a_half_type_waits_for_its_factor(torch, xp, ran, name, dtype):
    """A gradient of 1e-8 is 0 in float16 until a scaled loss has multiplied it."""
    function = value_of(xp, name, dtype)
    x = normal(xp, dtype=dtype).requires_grad_()
    y = function(x)
    assert not {operation for operation in ran if operation.endswith("_value_and_grad")}
    (found,) = torch.autograd.grad(y, x, torch.full_like(y, 3.0))
    wide = x.detach().double().requires_grad_()
    y = value_of(xp, name)(wide) if "probabilities" not in name else function(wide)
    (want,) = torch.autograd.grad(y, wide, torch.full_like(y, 3.0))
    unit = torch.finfo(x.dtype).eps
    torch.testing.assert_close(found.double(), want, rtol=unit, atol=unit / 50)
