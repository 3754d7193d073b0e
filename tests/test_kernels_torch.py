"""torch's tensors on the kernels: whose memory, what autograd keeps, which derivatives.

On each backend of torch the tests run on another path: tiles, Numba's kernels, Triton's.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import operator
import os
import re
import subprocess
import sys
import weakref
from contextlib import nullcontext
from threading import Event, get_ident

import numpy as np
import pytest

import portable_softmax as ps
from portable_softmax import kernels, libraries
from portable_softmax.kernels import _table, _threads, _triton
from portable_softmax.kernels._request import LOSSES, OPERATIONS, VJPS, Request
from portable_softmax.libraries._torch import PRIVATE

PATHS = {"torch": "numpy tiles", "torch-numba": "numba rows", "triton": "triton rows"}
LABELS = [0, 3, 2]

pytestmark = [
    pytest.mark.run_on(*PATHS),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]


@pytest.fixture(autouse=True)
def _only_torch(torch):
    """Run on torch's backends."""


@pytest.fixture
def engine(xp):
    """The module of the kernels of a backend."""
    found = next(k.module for k in _table.TABLE if k.name == PATHS[xp.name])
    return importlib.import_module(found)


@pytest.fixture
def ran(engine, monkeypatch):
    """Which operations a kernel gave."""
    seen = []

    def spied(real):
        def spy(request, *options):
            seen.append(request.operation)
            return real(request, *options)

        return spy

    for name in (*OPERATIONS, "logsumexp_vjp", "gradient"):
        if hasattr(engine, name):
            monkeypatch.setattr(engine, name, spied(getattr(engine, name)))
    monkeypatch.setattr("portable_softmax.kernels._decide._ROUTES", {})
    return seen


def recorded(name):
    """What a kernel gives where torch records: the gradient beside the loss."""
    return "cross_entropy_value_and_grad" if name == "cross_entropy" else name


def normal(xp, shape=(3, 4), dtype="float64", seed=0):
    return xp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def own(torch):
    """Our functions beside torch's own, of logits and labels."""
    nn = torch.nn.functional
    return {
        "softmax": (lambda x, _: ps.softmax(x), lambda x, _: torch.softmax(x, -1)),
        "log_softmax": (lambda x, _: ps.log_softmax(x), lambda x, _: torch.log_softmax(x, -1)),
        "logsumexp": (
            lambda x, _: ps.logsumexp(x, axis=-1),
            lambda x, _: torch.logsumexp(x, -1),
        ),
        "cross_entropy": (lambda x, t: ps.cross_entropy(x, t), lambda x, t: nn.cross_entropy(x, t)),
    }


NAMES = ("softmax", "log_softmax", "logsumexp", "cross_entropy")
every_function = pytest.mark.parametrize("name", NAMES)


def functions(xp, axis=-1):
    labels = xp.asarray(LABELS)
    return {
        "softmax": lambda x: ps.softmax(x, axis=axis, temperature=2.0),
        "log_softmax": lambda x: ps.log_softmax(x, axis=axis),
        "logsumexp": lambda x: ps.logsumexp(x, axis=axis),
        "cross_entropy": lambda x: ps.cross_entropy(
            x, labels, axis=axis, ignore_index=2, z_loss=0.01
        ),
    }


# --------------------------------------------------------------------------- values, memory


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_path_that_explain_names_is_taken(xp, ran, operation):
    x = normal(xp)
    arguments = (x, xp.asarray(LABELS)) if operation in LOSSES else (x,)
    if operation in VJPS:
        arguments = (x, x)
    with kernels.use(PATHS[xp.name]):
        assert kernels.explain(operation, *arguments).startswith(PATHS[xp.name])
        ran.clear()  # to say what has to be compiled, a call is gone through
        getattr(ps, operation)(*arguments)
    assert ran == [operation]


@pytest.mark.run_on("torch", "torch-numba")  # Triton's kernels take tensors
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_the_memory_is_the_tensors_own(xp, engine, monkeypatch, dtype):
    """No copy goes in or comes out."""
    lent, real = [], engine.softmax
    monkeypatch.setattr(
        engine, "softmax", lambda request: lent.append((request.x, real(request))) or lent[0][1]
    )
    monkeypatch.setattr("portable_softmax.kernels._decide._ROUTES", {})
    x = normal(xp, dtype=dtype)
    y = ps.softmax(x)
    for array, tensor in zip(lent[0], (x, y), strict=True):
        assert array.__array_interface__["data"][0] == tensor.data_ptr()
    assert y.dtype == x.dtype


@pytest.mark.run_on("torch", "torch-numba")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_gradient_of_a_half_type_needs_no_wider_copy(torch, xp, engine, monkeypatch, dtype):
    """But for an upstream gradient other than 1: then it would be rounded twice."""
    seen, name = [], "cross_entropy_value_and_grad"
    real = getattr(engine, name)
    monkeypatch.setattr(engine, name, lambda request: seen.append(request.dtype) or real(request))
    x, labels = normal(xp, dtype=dtype).requires_grad_(), xp.asarray(LABELS)
    wide = torch.softmax(x.detach().double(), -1) - torch.eye(4)[labels]
    for upstream in (1.0, 3.0):
        (grad,) = torch.autograd.grad(upstream * ps.cross_entropy(x, labels), x)
        torch.testing.assert_close(grad, (upstream / 3 * wide).to(x.dtype), rtol=4e-3, atol=0.0)
    assert seen == [dtype, "float32"]


# --------------------------------------------------------------------------- what is kept


class Saved(list):
    """The tensors that autograd keeps in a block."""

    def __init__(self, torch):
        self._hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: self.append(t) or t, lambda t: t
        )

    def __enter__(self):
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)

    @property
    def bytes(self):
        """Those of distinct storages."""
        return sum({t.untyped_storage().data_ptr(): t.nbytes for t in self}.values())


@every_function
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_more_is_kept_than_by_torchs_own(torch, xp, ran, name, dtype):
    leaf = normal(xp, (50, 40), dtype).requires_grad_()
    labels, kept = xp.asarray(np.arange(50) % 40), []
    for function in own(torch)[name]:
        with Saved(torch) as saved:
            function(leaf * 1, labels)
        kept.append(saved)
    ours, theirs = kept
    assert ran == [name]
    assert 0 < len(ours) <= (1 if name == "softmax" else len(theirs))
    assert ours.bytes <= theirs.bytes


@every_function
def test_a_graph_is_freed_with_the_last_reference(torch, xp, ran, name):
    ours, _ = own(torch)[name]
    leaf, labels = normal(xp).requires_grad_(), xp.asarray(LABELS)
    ours(leaf, labels).sum().backward()  # what the first call loads has cycles of its own
    gc.disable()
    gc.freeze()  # what other tests have left is not looked at
    try:
        for backward in (False, True):
            x = leaf * 1
            y = ours(x, labels)
            logits = weakref.ref(x)
            del x
            if backward:
                y.sum().backward()
                assert logits() is None
            del y
            assert logits() is None
        x = leaf * 1
        first = weakref.ref(x)
        if name == "softmax":
            for _ in range(3):
                x.copy_(ps.softmax(x))
        del x
        assert first() is None
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert not any(isinstance(found, torch.Tensor | Request) for found in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.unfreeze()
        gc.enable()
    assert recorded(name) in ran


def test_softmax_may_overwrite_its_input(torch, xp):
    found = []
    for function in (ps.softmax, lambda x: torch.softmax(x, -1)):
        leaf = normal(xp).requires_grad_()
        x = leaf * 1
        for _ in range(3):
            x.copy_(function(x))
        x.square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("changed", ["labels", "weight", "where", "logits"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_change_in_place_before_the_backward_pass_is_noticed(torch, xp, changed, reduction):
    leaf, weight = normal(xp).requires_grad_(), normal(xp, (4,)).abs()
    given = {"where": xp.asarray(np.ones((3, 4), bool)), "weight": weight}
    logits, labels = call = leaf * 1, xp.asarray(LABELS)
    assert kernels.explain("cross_entropy", *call, **given).startswith(PATHS[xp.name])
    loss = ps.cross_entropy(*call, reduction=reduction, **given)
    array = {"logits": logits, "labels": labels, **given}[changed]
    with torch.no_grad():
        array.copy_(array.flip(0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_a_change_of_the_output_is_noticed(xp, name):
    y = functions(xp)[name](normal(xp).requires_grad_())
    y.detach().mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_function
def test_saved_tensors_may_be_packed_and_checkpointed(torch, xp, ran, name):
    function = functions(xp)[name]
    x = normal(xp).requires_grad_()
    (expected,) = torch.autograd.grad(function(x).square().sum(), x)
    with torch.autograd.graph.save_on_cpu():
        y = function(x)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected)
    y = torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected)
    assert sum(operation.startswith(name) for operation in ran) >= 4


# --------------------------------------------------------------------------- derivatives


@every_function
def test_the_first_derivative_is_a_kernels_and_the_third_is_right(torch, xp, ran, name):
    """The second are among the calls that gradgradcheck is given."""
    function = functions(xp)[name]
    # Tiles of a gradient are for large arrays.
    x = normal(xp, (3, 400_000) if xp.name == "torch" else (3, 4)).requires_grad_()
    y = function(x)
    assert ran == [recorded(name)]
    torch.autograd.grad(y.sum(), x)
    assert len(ran) >= (1 if name == "cross_entropy" else 2)
    x = normal(xp).requires_grad_()

    def third(x):
        (g,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
        return torch.autograd.grad(h.square().sum(), x)[0]

    found = third(x)
    with kernels.portable():
        torch.testing.assert_close(found, third(x), rtol=1e-10, atol=1e-10)


@pytest.mark.run_on("torch-numba")
@pytest.mark.parametrize("axis", [-1, 0])
def test_derivatives_of_running_sums(torch, xp, monkeypatch, axis):
    """The first one by a kernel, those of higher order by the formula."""
    engine = importlib.import_module("portable_softmax.kernels._numba")
    seen, real = [], engine.logcumsumexp
    x, dy = normal(xp, (5, 7)).requires_grad_(), normal(xp, (5, 7), seed=1)
    for name in ("logcumsumexp", "logcumsumexp_vjp"):
        monkeypatch.setattr(engine, name, lambda r: seen.append(r.operation) or real(r))
    y = ps.logcumsumexp(x, axis=axis)
    (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    assert seen == ["logcumsumexp", "logcumsumexp_vjp"]
    # What is differentiated again is torch's to follow.
    (followed,) = torch.autograd.grad(y, x, dy, create_graph=True)
    assert followed.requires_grad
    assert len(seen) == 2
    torch.testing.assert_close(ps.logcumsumexp_vjp(x.detach(), dy, axis=axis), dx)
    assert seen[2:] == ["logcumsumexp_vjp"]
    (by_sum,) = torch.autograd.grad(y.sum(), x)  # an upstream gradient without strides
    assert len(seen) == 4
    z = torch.logcumsumexp(x, axis)
    (expected,) = torch.autograd.grad(z, x, dy, retain_graph=True)
    (of_sum,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close((y, dx, followed, by_sum), (z, expected, expected, of_sum))
    explained = kernels.explain("logcumsumexp_vjp", x, dy, axis=axis)
    assert "a gradient that is differentiated again" in explained


HALVES = {"float16": 2.0**-10, "bfloat16": 2.0**-7}


@pytest.mark.parametrize("dtype", HALVES)
@every_function
def test_the_gradient_of_a_half_type_is_rounded_once(torch, xp, ran, name, dtype):
    function = functions(xp)[name]
    x = normal(xp, (3, 40) if name != "cross_entropy" else (3, 4), dtype).requires_grad_()
    y = function(x)
    dy = normal(xp, tuple(y.shape), dtype, seed=5)
    (grad,) = torch.autograd.grad(y, x, dy)
    assert len(ran) >= (1 if xp.name == "torch" else 2)
    assert grad.dtype == x.dtype
    if name == "softmax":  # of what was returned, which is all that is kept
        expected = ps.softmax_vjp(y.detach().double(), dy.double()) / 2.0
    else:
        wide = x.detach().double().requires_grad_()
        with kernels.portable():
            (expected,) = torch.autograd.grad(function(wide), wide, dy.double())
    error = (grad.double() - expected).abs()
    assert (error <= 0.502 * HALVES[dtype] * expected.abs() + 1e-6).all()


LOGSUMS = [
    (shape, axis, dtype, masked)
    for shape, axis in (((50, 3), 1), ((50, 10), 1), ((5, 9000), 1), ((300, 5), 0))
    for i, dtype in enumerate(("float16", "float32", "float64"))
    for masked in (False, True)
    if (sum(shape) + i + masked) % 2 == 0  # half of them, in which each two values meet
]


@pytest.mark.parametrize(("shape", "axis", "dtype", "masked"), LOGSUMS)
@pytest.mark.slow("Numba compiles every layout", "torch-numba")
@pytest.mark.slow("Triton interprets element by element", "triton")
def test_the_gradient_of_logsumexp_is_upstream_times_softmax(torch, xp, shape, axis, masked, dtype):
    x = normal(xp, shape, dtype).detach() * 3
    where = normal(xp, shape, dtype, seed=1) > -0.5 if masked else None
    x.view(-1)[-2] = np.nan
    x.requires_grad_()
    y = ps.logsumexp(x, axis=axis, where=where)
    dy = normal(xp, tuple(y.shape), dtype, seed=5)
    (grad,) = torch.autograd.grad(y, x, dy)
    mask, logits = np.ones(shape, bool) if where is None else where.numpy(), x.detach().numpy()
    exact = np.where(mask, logits.astype(np.longdouble), -np.inf)
    e = np.exp(exact - exact.max(axis, keepdims=True))
    exact = np.where(mask, e / e.sum(axis, keepdims=True) * np.expand_dims(dy.numpy(), axis), 0)
    assert (grad.dtype, grad.shape) == (x.dtype, x.shape)
    found, info = grad.numpy().astype(np.longdouble), np.finfo(dtype)
    error = np.abs(found - exact) / np.maximum(np.abs(exact) * info.eps, info.smallest_subnormal)
    bound = 0.51 if dtype == "float16" else 7
    if masked and xp.name == "torch" and dtype != "float16":  # tiles take the portable form
        bound = 2 + 2 * np.ptp(logits[~np.isnan(logits)])
    assert np.nanmax(error) <= bound
    np.testing.assert_array_equal(np.isnan(found), np.isnan(exact))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_gradients_at_infinities_are_those_of_the_portable_path(torch, xp, name, masked):
    dy = xp.asarray([[1.0, 2.0, -3.0]] * 2)
    options = {"axis": -1, "where": xp.asarray([True, True, False]) if masked else None}
    rows = [-np.inf, 0.0, 1.0], [-np.inf] * 3, [np.inf, 0.0, 1.0]
    for row in rows[: 2 if name == "logsumexp" else 3]:  # which has no derivative at inf
        x, found = xp.asarray([row, [0.0, 1.0, 2.0]]).requires_grad_(), []
        for path in (nullcontext, kernels.portable):
            with path():
                y = getattr(ps, name)(x, **options)
                found += torch.autograd.grad(y, x, dy[:, 0] if name == "logsumexp" else dy)
        torch.testing.assert_close(found[0], found[1], equal_nan=True)


# --------------------------------------------------------------------------- threads


@pytest.fixture
def team(torch, monkeypatch):
    """torch's own threads, of which there are two, whatever this machine has."""
    found = libraries.library_of(torch.zeros(1)).team
    if found is None:
        pytest.skip("this torch has no GNU OpenMP of its own")
    monkeypatch.setattr(_threads, "limit", lambda: 2)
    return found


@pytest.mark.libraries("torch")
def test_kernels_run_in_the_threads_of_torch(torch, xp, team, monkeypatch):
    asked = []

    def counted(member, threads):
        asked.append(threads)
        team(member, threads)

    monkeypatch.setattr(libraries.library_of(torch.zeros(1)), "team", counted)
    x = torch.randn(3000, 500, dtype=torch.float64).requires_grad_()  # large enough for two threads
    ps.softmax(x).sum().backward()
    assert asked == [2, 2]
    with kernels.portable():
        want = ps.softmax(x)
    torch.testing.assert_close(ps.softmax(x), want)


@pytest.mark.libraries("torch")
def test_torch_s_threads_share_the_pieces(team):
    done, seen, met = [], set(), Event()

    def work(piece):
        seen.add(get_ident())
        if len(seen) == 2:
            met.set()
        met.wait(5)
        done.append(piece)

    _threads.on_team(team, _threads.run, work, range(50))
    assert sorted(done) == list(range(50))
    assert len(seen) == 2


@pytest.mark.libraries("torch")
def test_torch_s_threads_share_errors_and_errstate(team):
    def fails(piece):
        if piece == 3:
            raise ZeroDivisionError(piece)

    def divides(_):
        return np.float32(1) / np.zeros(1000, np.float32)

    with pytest.raises(ZeroDivisionError, match="3"):
        _threads.on_team(team, _threads.run, fails, range(100))
    with np.errstate(all="ignore"):
        _threads.on_team(team, _threads.run, divides, range(8))
    with np.errstate(all="raise"), pytest.raises(FloatingPointError):
        _threads.on_team(team, _threads.run, divides, range(8))


@pytest.mark.libraries("torch")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.slow("a fresh process imports torch")
def test_a_forked_child_does_without_the_threads_of_torch(team):
    """GNU's OpenMP waits there for threads of the parent, in torch's own operations too."""
    code = """
import os, sys, warnings, torch
import portable_softmax as ps
from portable_softmax.kernels import _threads
warnings.simplefilter("ignore")
_threads.limit = lambda: 2
x = torch.randn(3000, 500, dtype=torch.float64)
want = ps.softmax(x).numpy()
child = os.fork()
if not child:
    os._exit(0 if (ps.softmax(x).numpy() == want).all() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --------------------------------------------------------------------------- the upstream gradient


@pytest.mark.parametrize("axis", [0, -1, (0, 1)])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_upstream_of_a_masked_entry_counts_for_nothing(torch, xp, name, axis):
    x, dy = normal(xp, (4, 3)).requires_grad_(), normal(xp, (4, 3), seed=1)
    where = torch.ones((4, 3), dtype=torch.bool)
    where[0, 0] = where[2, 1] = False
    y = getattr(ps, name)(x, axis=axis, where=where)
    y = torch.where(where, y, 0.0) if name == "log_softmax" else y  # which is -inf there
    want, *each = (
        torch.autograd.grad(y, x, torch.where(where, dy, hidden), retain_graph=True)[0]
        for hidden in (0.0, np.inf, -np.inf, np.nan)
    )
    for found in each:
        assert (found[~where] == 0).all()
        torch.testing.assert_close(found, want)


@every_function
@pytest.mark.parametrize("axis", [0, -1])
def test_a_tangent_of_the_upstream_gradient_is_not_dropped(torch, xp, ran, name, axis):
    """The gradient is linear in it, so its tangent is the gradient for the tangent."""
    forward = torch.autograd.forward_ad
    x = normal(xp, (4, 3) if axis == 0 else (3, 4)).requires_grad_()
    y = functions(xp, axis)[name](x)
    assert ran == [recorded(name)]
    dy, tangent = normal(xp, tuple(y.shape), seed=1), normal(xp, tuple(y.shape), seed=2)
    (expected,) = torch.autograd.grad(y, x, tangent, retain_graph=True)

    def gradient(dy):
        return torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    with forward.dual_level():
        found = forward.unpack_dual(gradient(forward.make_dual(dy, tangent)))
        torch.testing.assert_close(found.primal, gradient(dy))
        torch.testing.assert_close(found.tangent, expected)
    primal, found = torch.func.jvp(gradient, (dy,), (tangent,))
    torch.testing.assert_close(primal, gradient(dy))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"label_smoothing": 0.1}])
def test_an_ignored_row_stops_any_upstream_gradient(torch, xp, ran, reduction, options):
    x = xp.asarray([[np.nan] * 4, [0.0, 1.0, 2.0, 3.0], [1.0] * 4]).requires_grad_()
    labels = xp.asarray([-1, 2, -1])
    loss = ps.cross_entropy(x, labels, ignore_index=-1, reduction=reduction, **options)
    assert ran == [recorded("cross_entropy")]
    for upstream in (np.inf, -np.inf, np.nan):
        for graph in ({"retain_graph": True}, {"create_graph": True}):
            (grad,) = torch.autograd.grad(loss, x, torch.full_like(loss, upstream), **graph)
            assert (grad[[0, 2]] == 0).all()
            assert not torch.isfinite(grad[1]).any()


@every_function
@pytest.mark.parametrize("axis", [0, -1])
def test_many_upstream_gradients_at_once(torch, xp, ran, name, axis):
    x = normal(xp, (4, 3) if axis == 0 else (3, 4)).requires_grad_()
    y = functions(xp, axis)[name](x)
    rows = torch.eye(y.numel(), dtype=y.dtype).reshape(-1, *y.shape)
    (batch,) = torch.autograd.grad(y, x, rows, is_grads_batched=True, retain_graph=True)
    assert ran == [recorded(name)]
    loop = torch.stack([torch.autograd.grad(y, x, r, retain_graph=True)[0] for r in rows])
    mapped = torch.func.vmap(lambda r: torch.autograd.grad(y, x, r, retain_graph=True)[0])(rows)
    torch.testing.assert_close((batch, mapped), (loop, loop))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "cross_entropy"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_many_upstream_gradients_with_long_inner_axes(torch, xp, name, axis):
    x = normal(xp, (20, 20, 20)).requires_grad_()
    y = functions(xp, axis)[name](x)
    rows = normal(xp, (2, *y.shape), seed=4)
    (batch,) = torch.autograd.grad(y, x, rows, is_grads_batched=True, retain_graph=True)
    loop = torch.stack([torch.autograd.grad(y, x, r, retain_graph=True)[0] for r in rows])
    torch.testing.assert_close(batch, loop)


@every_function
def test_zero_tensors_and_undefined_gradients(torch, xp, ran, name):
    x = normal(xp).requires_grad_()
    y = functions(xp)[name](x)
    zero = torch._efficientzerotensor(y.shape, dtype=y.dtype)
    (grad,) = torch.autograd.grad(y, x, zero, retain_graph=True)
    torch.testing.assert_close(grad + 0.0, torch.zeros_like(x))

    class Undefined(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    (grad,) = torch.autograd.grad(Undefined.apply(y).sum(), x, allow_unused=True)
    assert grad is None
    assert ran == [recorded(name)]


def test_an_undefined_gradient_of_one_of_two_outputs(torch, xp):
    x, labels = normal(xp).requires_grad_(), xp.asarray(LABELS)
    loss, grad = ps.cross_entropy_value_and_grad(x, labels)
    torch.testing.assert_close(torch.autograd.grad(loss, x, retain_graph=True)[0], grad)
    (of_grad,) = torch.autograd.grad(grad.square().sum(), x)
    with kernels.portable():
        _, grad = ps.cross_entropy_value_and_grad(x, labels)
        torch.testing.assert_close(torch.autograd.grad(grad.square().sum(), x)[0], of_grad)


def test_an_upstream_gradient_may_be_a_view_of_one_number(torch, xp):
    """That of a sum is: it has no memory in C order."""
    x = normal(xp).requires_grad_()
    (grad,) = torch.autograd.grad(ps.log_softmax(x).sum(), x)
    torch.testing.assert_close(grad, 1 - 4 * torch.softmax(x.detach(), dim=1))


# --------------------------------------------------------------------------- stepping aside


def test_what_the_kernels_step_aside_for(torch, xp, ran):
    """What watches torch's operations, or follows them, would not see a kernel's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    class Kind(torch.Tensor):
        pass

    def why(operation, *args, **kwargs):
        explained = kernels.explain(operation, *args, **kwargs)
        assert explained.startswith("portable")
        assert f"not {PATHS[xp.name]}" in explained
        getattr(ps, operation)(*args, **kwargs)
        return explained

    x, labels = normal(xp), xp.asarray(LABELS)
    torch.func.vmap(ps.softmax)(x)
    torch.func.grad(lambda x: ps.logsumexp(x))(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        assert "forward-mode differentiation" in why("softmax", dual)
    with Watching():
        assert "a dispatch mode" in why("softmax", x)
    assert "a Kind" in why("softmax", x.as_subclass(Kind))
    assert "device meta" in why("softmax", x.to("meta"))
    weight = xp.asarray(np.ones(4)).requires_grad_()
    needed = "labels or weights that require gradients"
    assert needed in why("cross_entropy", x, labels, weight=weight)
    probabilities = torch.softmax(x, -1).requires_grad_()
    if xp.name != "torch-numba":
        assert needed in why("cross_entropy", x, probabilities)
    assert ran == []
    with torch.no_grad():
        ps.cross_entropy(x, labels, weight=weight)
    assert ran == ["cross_entropy"]


@pytest.mark.filterwarnings("ignore:Converting a tensor")
def test_a_traced_call_takes_no_kernel(torch, xp, ran):
    x = normal(xp)
    traced = torch.jit.trace(ps.softmax, x, check_trace=False)
    assert ran == []
    torch.testing.assert_close(traced(2 * x), torch.softmax(2 * x, -1))


# --------------------------------------------------------------------------- torch's private names


def test_what_torch_s_private_names_tell(torch):
    from torch.utils.flop_counter import FlopCounterMode

    def named(what):
        return operator.attrgetter(PRIVATE[what])(torch)

    seen, peek = [], named("functional transforms")
    assert peek() is None
    torch.func.vmap(lambda x: seen.append(peek()) or x)(torch.ones(2))
    assert seen.pop() is not None
    is_batched, x = named("the vmap of is_grads_batched"), torch.ones(2, requires_grad=True)
    y = x * 1
    y.register_hook(lambda dy: seen.append(is_batched(dy)))
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)
    assert seen == [True]
    assert not is_batched(x)
    assert named("dispatch modes")() == 0
    with FlopCounterMode(display=False):
        assert named("dispatch modes")() == 1
    assert named("forward-mode differentiation") < 0
    with torch.autograd.forward_ad.dual_level():
        assert named("forward-mode differentiation") >= 0
    is_zero = named("zero tensors")
    assert is_zero(torch._efficientzerotensor(2))
    assert not is_zero(torch.zeros(2))


def test_the_mark_of_a_constant_is_what_torch_sets(torch):
    def ours():
        return 0

    def theirs():
        return 0

    libraries.traced_as_constant(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}


def in_a_fresh_process(program, *, warnings="error::UserWarning"):
    """Run a program, by default with warnings as errors, and return the lines that it prints."""
    run = [sys.executable, "-W", warnings, "-c", program]
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


WITHOUT_A_NAME = """
import os
import portable_softmax as ps
from portable_softmax import kernels
from portable_softmax.libraries._torch import PRIVATE
import torch, torch.autograd.forward_ad
for what in PRIVATE:
    if os.fork():  # in a process that has called nothing
        assert os.wait()[1] == 0, what
        continue
    parent, _, name = PRIVATE[what].rpartition(".")
    try:
        exec(f"del torch.{parent}.{name}")
    except TypeError:  # of a type that cannot be changed
        PRIVATE[what] += "_of_another_version"
    x = torch.zeros(2, 3, requires_grad=True)
    print(kernels.explain("softmax", x))
    ps.cross_entropy(x, torch.tensor([0, 1])).backward()
    print(x.grad.sum().item())
    break
"""


@pytest.mark.slow("a fresh process imports torch")
def test_without_a_private_name_calls_take_the_portable_path(arrays_of):
    """As in a version of torch that does not have it."""
    lines = in_a_fresh_process(WITHOUT_A_NAME, warnings="ignore")
    for name, explained, gradient in zip(PRIVATE.values(), lines[::2], lines[1::2], strict=True):
        assert explained.startswith("portable: ")
        assert f"has no torch.{name}" in explained
        assert abs(float(gradient)) < 1e-6


def test_what_is_raised_in_a_thread_of_torch_s_is_not_lost(torch, xp):
    """As by a signal that comes when nothing can catch it yet; ctypes would only print it."""
    team = libraries.of(xp.xp).team
    if team is None:
        pytest.skip("this torch has no GNU OpenMP")

    def interrupted():
        raise KeyboardInterrupt

    before = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt):
        team(interrupted, 2)
    assert sys.unraisablehook is before


INTERRUPTED = """
import torch, portable_softmax as ps
real = torch.library.register_autograd
def interrupted(*args, **kwargs):
    raise KeyboardInterrupt
torch.library.register_autograd = interrupted
try:
    ps.softmax(torch.zeros(3))
except KeyboardInterrupt:
    torch.library.register_autograd = real
    print(round(float(ps.softmax(torch.zeros(3)).sum())))
"""


@pytest.mark.slow("a fresh process imports torch")
def test_an_import_that_was_interrupted_is_made_again(torch):
    assert in_a_fresh_process(INTERRUPTED) == ["1"]


# --------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize(
    "imports",
    ["import torch, portable_softmax as ps", "import portable_softmax as ps, torch"],
    ids=["torch first", "torch last"],
)
@pytest.mark.slow("fresh processes import torch, and compile")
def test_the_first_call_of_all_may_be_a_traced_one(arrays_of, imports):
    """It warns of nothing, and no call of another library or dtype makes it compile again."""
    found = in_a_fresh_process(f"""
{imports}
import numpy as np
from torch._dynamo.testing import CompileCounter
counter = CompileCounter()
compiled = torch.compile(ps.softmax, backend=counter, fullgraph=True, dynamic=True)
x = torch.zeros(3, 4)
compiled(x), compiled(torch.zeros(5, 6))
print(counter.frame_count)
ps.softmax(np.zeros((3, 4))), ps.softmax(x.double()), ps.softmax(x), compiled(x), compiled(x)
print(counter.frame_count)
""")
    # Where torch comes last, tensors are unknown until a call that is not traced.
    assert found == (["1", "1"] if imports.startswith("import torch") else ["1", "2"])


def test_the_switches_at_the_time_of_the_trace_count(torch, xp):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(ps.softmax, backend=backend, fullgraph=True)
    x = normal(xp)
    with kernels.portable():
        compiled(x)
    compiled(x)
    with kernels.without("numba rows"):
        compiled(x)
    torch.compiler.reset()
    assert len(graphs) == 1


def test_the_triton_that_torch_pins_is_new_enough(torch):
    """Builds for CUDA require one version, or its patches, beside which no other is installed."""
    for pin in importlib.metadata.requires("torch") or ():
        if re.match(r"triton\b", pin):
            (version,) = re.findall(r"[=~]=\s*(\d+)\.(\d+)", pin)
            assert tuple(map(int, version)) >= _triton.OLDEST, pin
