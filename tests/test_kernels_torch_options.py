"""Sinks and weights in torch's autograd on the kernels: which path ran, and every derivative."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

import portable_softmax as ps
from portable_softmax import kernels
from portable_softmax.kernels import _table

PATHS = {"torch": "numpy tiles", "torch-numba": "numba rows"}
OPERATIONS = ("softmax", "log_softmax")

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.slow("Numba compiles each layout", "torch-numba"),
]
of_sinks = pytest.mark.parametrize(
    ("shape", "axis", "of_sinks"),
    [
        ((6, 5), -1, (6, 1)),
        ((2, 3, 4, 5), -1, (3, 1, 1)),
        ((3, 4, 5), 1, (5,)),
        ((3, 4, 5), (1, 2), ()),
        ((2, 3, 20), -1, (2, 1, 1)),
    ],
    ids=str,
)


@pytest.fixture(autouse=True)
def _only_kernels(torch, xp):
    if xp.name not in PATHS:
        pytest.skip("these kernels take no such option")


@pytest.fixture
def ran(xp, monkeypatch):
    """Which of an engine's functions ran."""
    name = next(k.module for k in _table.TABLE if k.name == PATHS[xp.name])
    engine, seen = importlib.import_module(name), []

    def spied(name, real):
        return lambda *args: (seen.append(name), real(*args))[1]

    names = [f"{o}{v}_beside_sink" for o in OPERATIONS for v in ("", "_vjp")]
    for name in (*names, "weighted", "weighted_slopes"):
        monkeypatch.setattr(engine, name, spied(name, getattr(engine, name)))
    return seen


def normal(xp, shape, seed=0, dtype="float64"):
    return xp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


# --------------------------------------------------------------------------- sinks


@of_sinks
@pytest.mark.parametrize("operation", OPERATIONS)
def test_derivatives_by_logits_and_sinks(torch, xp, ran, operation, shape, axis, of_sinks):
    x, sink = normal(xp, shape).requires_grad_(), normal(xp, of_sinks, 1).requires_grad_()
    seen = xp.asarray(np.random.default_rng(2).random(shape) < 0.7)
    for options in ({}, {"temperature": 0.7}, {"where": seen}):

        def function(x, sink, options=options):
            y = getattr(ps, operation)(x, axis=axis, sink=sink, **options)
            return torch.where(torch.isinf(y), 0.0, y)

        assert kernels.explain(operation, x, axis=axis, sink=sink).startswith(PATHS[xp.name])
        ran.clear()
        y = function(x, sink)
        torch.autograd.grad(y.sum(), (x, sink))
        assert ran == [f"{operation}_beside_sink", f"{operation}_vjp_beside_sink"]
        assert torch.autograd.gradcheck(function, (x, sink), check_batched_grad=True)
        # What follows along a random direction, in which a wrong entry shows as well.
        assert torch.autograd.gradgradcheck(function, (x, sink), fast_mode=True)
        alone = (lambda sink: function(x.detach(), sink), sink), (lambda x: function(x, 0.5), x)
        for of_one, array in alone:
            assert torch.autograd.gradcheck(of_one, array, fast_mode=True)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_of_half_types_start_from_float32(torch, xp, operation):
    for name in xp.halves:
        x, dy = normal(xp, (6, 40), 0, name), normal(xp, (6, 40), 1, name)
        sink = normal(xp, (6, 1), 2, name)
        given = [t.clone().requires_grad_() for t in (x, sink)]
        wide = [t.double().requires_grad_() for t in (x, sink)]
        found = torch.autograd.grad(getattr(ps, operation)(given[0], sink=given[1]), given, dy)
        with kernels.portable():
            y = getattr(ps, operation)(wide[0], sink=wide[1])
        expected = torch.autograd.grad(y, wide, dy.double())
        eps = torch.finfo(x.dtype).eps
        for one, two in zip(found, expected, strict=True):
            assert one.dtype == x.dtype
            torch.testing.assert_close(one.double(), two, rtol=2 * eps, atol=2 * eps)


def test_the_share_of_a_sink_keeps_its_digits(torch, xp):
    """In a confident row 1 - sum(y) would have none: the sink takes 2**-70 and less."""
    x = torch.zeros((1, 9), dtype=torch.float64)
    x[0, 4] = 50.0
    sink = torch.tensor([[0.0]], dtype=torch.float64)
    dy = torch.zeros_like(x)
    dy[0, 4] = 1.0
    x, sink = x.requires_grad_(), sink.requires_grad_()
    p = float(np.exp(-50.0) / (1 + 9 * np.exp(-50.0)))
    dx, dsink = torch.autograd.grad(ps.softmax(x, sink=sink), (x, sink), dy)
    largest = 1 - 9 * p
    torch.testing.assert_close(dsink.item(), -p * largest, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(dx[0, 4].item(), largest * 9 * p, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(dx[0, 0].item(), -p * largest, rtol=1e-12, atol=0.0)
    _, dsink = torch.autograd.grad(ps.log_softmax(x, sink=sink), (x, sink), dy)
    torch.testing.assert_close(dsink.item(), -p, rtol=1e-12, atol=0.0)


def test_a_sink_that_is_changed_before_the_gradient_is_taken(torch, xp):
    x, sink = normal(xp, (3, 4)).requires_grad_(), torch.zeros(3, 1, dtype=torch.float64)
    sink = sink.requires_grad_()
    y = ps.softmax(x, sink=sink)
    with torch.no_grad():
        sink += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.slow("torch compiles the portable code")
def test_compiled_code_has_sinks_and_weights(torch, xp):
    x, sink, b = normal(xp, (3, 4)), normal(xp, (3, 1), 1), normal(xp, (3, 4), 2).exp()
    for function in (
        lambda x: ps.softmax(x, sink=sink),
        lambda x: ps.logsumexp(x, axis=-1, b=b),
        lambda x: ps.logsumexp(x, axis=-1, return_sign=True)[1],
    ):
        torch.testing.assert_close(torch.compile(function, fullgraph=True)(x), function(x))


# --------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("shape", "axis", "of_weights"),
    [
        ((6, 5), -1, (6, 5)),
        ((3, 4, 5), 1, (5,)),
        ((3, 4, 5), (1, 2), (3, 1, 1)),
        ((9, 7), None, ()),
    ],
    ids=str,
)
@pytest.mark.parametrize("return_sign", [False, True])
def test_derivatives_by_exponents_and_weights(torch, xp, ran, shape, axis, of_weights, return_sign):
    x, rng = normal(xp, shape).requires_grad_(), np.random.default_rng(1)
    b = rng.uniform(0.5, 1.5, of_weights)
    b = b * np.where(rng.random(of_weights) < 0.3, -0.1, 1.0) if return_sign else b
    b = xp.asarray(b).requires_grad_()
    seen = xp.asarray(rng.random(shape) < 0.8)
    for options in ({}, {"where": seen}):

        def function(x, b, options=options):
            found = ps.logsumexp(x, axis=axis, b=b, return_sign=return_sign, **options)
            value = found[0] if return_sign else found
            return torch.where(torch.isfinite(value), value, 0.0)

        assert kernels.explain("logsumexp", x, axis=axis, b=b).startswith(PATHS[xp.name])
        ran.clear()
        torch.autograd.grad(function(x, b).sum(), (x, b))
        assert ran == ["weighted", "weighted_slopes"]
        assert torch.autograd.gradcheck(function, (x, b), check_batched_grad=True)
        # What follows along a random direction, in which a wrong entry shows as well.
        assert torch.autograd.gradgradcheck(function, (x, b), fast_mode=True)
        alone = (lambda b: function(x.detach(), b), b), (lambda x: function(x, b.detach()), x)
        for of_one, array in alone:
            assert torch.autograd.gradcheck(of_one, array, fast_mode=True)


def test_gradients_where_a_sum_is_not_ordinary(torch, xp):
    """Of nothing: 0. Of a negative sum without a sign: 0. At a weight of 0: by the weight alone."""
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64).requires_grad_()
    b = torch.tensor([[0.0, 0.0], [-1.0, -2.0], [0.0, 3.0]], dtype=torch.float64).requires_grad_()
    y = ps.logsumexp(x, axis=-1, b=b)
    np.testing.assert_allclose(y.detach().numpy(), [-np.inf, np.nan, np.log(3.0) + 6.0])
    dx, db = torch.autograd.grad(y.nan_to_num(neginf=0.0).sum(), (x, b))
    np.testing.assert_allclose(dx.numpy(), [[0.0, 0.0], [0.0, 0.0], [0.0, 1.0]], rtol=1e-15)
    expected = [[0.0, 0.0], [0.0, 0.0], [np.exp(-1.0) / 3, 1 / 3]]
    np.testing.assert_allclose(db.numpy(), expected, rtol=1e-14)
    value, sign = ps.logsumexp(x, axis=-1, b=b, return_sign=True)
    assert not sign.requires_grad
    dx, db = torch.autograd.grad(value[1], (x, b))
    p = np.asarray([np.exp(3.0), 2 * np.exp(4.0)])
    np.testing.assert_allclose(dx[1].numpy(), p / p.sum(), rtol=1e-14)
    np.testing.assert_allclose(db[1].numpy(), -np.exp([3.0, 4.0]) / p.sum(), rtol=1e-14)


def test_gradients_of_large_exponents_keep_their_digits(torch, xp):
    """The logarithm of a sum is rounded to a unit of its maximum, and its exp would be off."""
    x = normal(xp, (4, 30), 0, "float32") + 1e4
    x, b = x.requires_grad_(), (normal(xp, (4, 30), 1, "float32").abs() + 0.5).requires_grad_()
    dx, db = torch.autograd.grad(ps.logsumexp(x, axis=-1, b=b).sum(), (x, b))
    p = (x.detach().double() + b.detach().double().log()).softmax(-1)
    torch.testing.assert_close(dx.double(), p, rtol=2e-6, atol=0.0)
    torch.testing.assert_close(db.double(), p / b.detach().double(), rtol=2e-6, atol=0.0)


def test_what_a_weight_of_0_hides_is_in_no_gradient(torch, xp):
    x = normal(xp, (3, 40))
    b = torch.ones_like(x)
    x[0, 3], x[1, 5], b[0, 3], b[1, 5] = torch.inf, torch.nan, 0.0, 0.0
    x = x.requires_grad_()
    (dx,) = torch.autograd.grad(ps.logsumexp(x, axis=-1, b=b).sum(), x)
    counted = torch.where(b == 0, -torch.inf, x.detach())
    torch.testing.assert_close(dx, counted.softmax(-1), rtol=1e-12, atol=0.0)


def test_the_sign_of_a_sum_without_weights(torch, xp):
    x = normal(xp, (3, 4)).requires_grad_()
    value, sign = ps.logsumexp(x, axis=-1, return_sign=True)
    torch.testing.assert_close(sign, torch.ones(3, dtype=x.dtype))
    (dx,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(dx, x.softmax(-1))
