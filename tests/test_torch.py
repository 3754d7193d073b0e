"""torch: derivatives of every order and mode, compilation, and tensors that hold no values."""

from __future__ import annotations

import importlib
import itertools
import warnings
from functools import partial

import numpy as np
import pytest
from backends import LIBRARIES
from calls import CALLS, as_tuple, every_call, every_call_compiled
from numpy.testing import assert_array_equal

import portable_softmax as ps
from portable_softmax import kernels

pytestmark = pytest.mark.run_on("paths", "torch-portable")

INF, NAN = np.inf, np.nan


@pytest.fixture(autouse=True)
def _only_torch(torch):
    """Skip this module for the other libraries."""


def finite(torch, function):
    """Return the function with 0 for -inf: a masked log-probability has no difference quotient."""

    def outputs(*arrays):
        ys = as_tuple(function(*arrays))
        return tuple(torch.where(torch.isinf(y.detach().abs()), 0.0, y) for y in ys)

    return outputs


def all_calls(xp):
    """Every call that is code of its own on a path, as a function and its floating arrays."""
    for name, call in CALLS.items():
        if xp.name in LIBRARIES or call.has_paths:
            yield name, *call.on(xp.from_numpy)


def close(found, expected, rtol=1e-13, atol=1e-15, name=""):
    for y, e in zip(as_tuple(found), as_tuple(expected), strict=True):
        same = {"rtol": rtol, "atol": atol, "equal_nan": True}
        importlib.import_module("torch").testing.assert_close(
            y, e, **same, msg=lambda said: f"{name}: {said}"
        )


# --------------------------------------------------------------------------- derivatives


@pytest.mark.slow("difference quotients for every argument")
@every_call
def test_gradcheck_and_gradgradcheck(torch, xp, call):
    """Jacobians in reverse mode entry by entry on one path; all else along a random direction.

    An entry that is wrong in forward mode or under vmap shows in a random direction as well.
    """
    function, arrays = call.on(xp.from_numpy)
    function = finite(torch, function)
    for a in arrays:
        a.requires_grad_()
    if xp.name in LIBRARIES:
        assert torch.autograd.gradcheck(function, arrays)
    # Reverse mode, forward mode, and both under vmap, against difference quotients.
    assert torch.autograd.gradcheck(
        function,
        arrays,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )
    assert torch.autograd.gradgradcheck(function, arrays, check_fwd_over_rev=True, fast_mode=True)


def test_hessian_of_a_logarithm_of_a_sum(torch, xp):
    """diag(p) - p p^T for logsumexp and the loss, at ties and for the largest entry."""
    for row in ([0.0] * 4, [3.0, 1.0, -2.0, 3.0], [9.0, 1.0, 0.0, 2.0]):
        x, label = xp.asarray(row), xp.asarray(0)
        p = torch.softmax(x, dim=0)
        for f in (ps.logsumexp, lambda x: ps.cross_entropy(x, label, check_labels=False)):  # noqa: B023
            for hessian in (torch.func.hessian(f), torch.func.jacrev(torch.func.jacrev(f))):
                close(hessian(x), torch.diag(p) - torch.outer(p, p))


def test_transforms_of_torch_func_agree_with_the_public_gradients(torch, xp):
    x = xp.asarray(np.random.default_rng(1).normal(size=(3, 5)))
    labels = xp.asarray([4, 0, 2])
    jacobians = ps.softmax_jacobian(ps.softmax(x))
    for jacobian in (torch.func.jacrev(ps.softmax), torch.func.jacfwd(ps.softmax)):
        close(torch.func.vmap(jacobian)(x), jacobians)
    # One gradient an example: labels are mapped over as well, so their values cannot be read.
    each = torch.func.vmap(torch.func.grad(ps.cross_entropy))(x, labels)
    close(each, ps.cross_entropy_value_and_grad(x, labels, reduction="sum")[1])
    losses = torch.func.vmap(ps.cross_entropy, in_dims=(1, 0))(x.T, labels)
    close(losses, ps.cross_entropy(x, labels, reduction="none"))


def test_vmap_over_a_stack_is_the_loop_over_it(torch, xp):
    for name, function, arrays in all_calls(xp):
        stacks = [torch.stack([a, 0.5 * a]) for a in arrays]
        one, two = (as_tuple(function(*(factor * a for a in arrays))) for factor in (1.0, 0.5))
        loop = tuple(map(torch.stack, zip(one, two, strict=True)))
        close(torch.func.vmap(function)(*stacks), loop, name=name)


@pytest.mark.parametrize("hidden", [NAN, INF, -INF, 1e308])
def test_what_a_mask_hides_reaches_no_derivative(torch, xp, hidden):
    x = xp.asarray([[1.0, hidden, 2.0], [hidden] * 3, [0.0, 0.0, 3.0]])
    mask = xp.asarray([[True, False, True], [False] * 3, [True] * 3])
    some, t = xp.asarray([0, -1, 2]), torch.full_like(x, 1 / 3)
    counted = {"where": mask, "ignore_index": -1}
    options = {"z_loss": 0.1, "softcap": 3.0, "label_smoothing": 0.1}
    direction = torch.where(mask, 0.0, 1.0).to(x.dtype)
    for f in (
        lambda x: ps.softmax(x, where=mask),
        lambda x: ps.log_softmax(x, where=mask),
        lambda x: ps.logsumexp(x, axis=1, where=mask),
        lambda x: ps.logsumexp(x, axis=1, where=mask, b=t, return_sign=True)[0],
        lambda x: ps.logsumexp(x, axis=1, b=mask.to(x.dtype)),
        lambda x: ps.cross_entropy(x, some, **counted),
        lambda x: ps.cross_entropy(x, some, **counted, **options),
        lambda x: ps.cross_entropy(x, t, where=mask),
        lambda x: ps.cross_entropy(x, t, where=mask, **options),
        lambda x: ps.cross_entropy_value_and_grad(x, some, **counted, **options)[1],
    ):
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        weights = torch.arange(1.0, y.numel() + 1, dtype=y.dtype, device=y.device).reshape(y.shape)
        (first,) = torch.autograd.grad(y, leaf, weights, create_graph=True)
        (second,) = torch.autograd.grad((first * torch.cos(first)).sum(), leaf)
        for g in (first, second):
            assert torch.isfinite(g).all()
            assert_array_equal(xp.numpy(g[~mask]), 0.0)
        _, tangent = torch.func.jvp(f, (x,), (direction,))
        assert_array_equal(xp.numpy(tangent), 0.0)


@pytest.mark.parametrize("hidden", [NAN, INF, -INF])
def test_what_an_ignored_row_holds_reaches_no_derivative(torch, xp, hidden):
    x = xp.asarray([[0.0, 1.0], [hidden, hidden], [1.0, hidden]]).requires_grad_()
    labels = xp.asarray([0, -1, -1])
    for smoothing in (0.0, 0.1):
        options = {"ignore_index": -1, "label_smoothing": smoothing}
        (grad,) = torch.autograd.grad(ps.cross_entropy(x, labels, **options), x)
        assert_array_equal(xp.numpy(grad[1:]), 0.0)
        _, expected = ps.cross_entropy_value_and_grad(x.detach(), labels, **options)
        close(grad, expected, 1e-14, 0.0)


def test_a_label_out_of_range_makes_its_own_row_nan(torch, xp):
    x, labels = xp.asarray(np.zeros((2, 3))).requires_grad_(), xp.asarray([3, 0])
    loss = ps.cross_entropy(x, labels, reduction="none", check_labels=False)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    each = torch.func.vmap(ps.cross_entropy)(x.detach(), labels)
    for found in (loss, grad[:, 0], grad[:, 2], each):
        assert torch.isnan(found).tolist() == [True, False]


# --------------------------------------------------------------------------- what takes part


def test_a_derivative_is_taken_for_those_that_ask(torch, xp):
    for name, function, arrays in all_calls(xp):
        assert not any(y.requires_grad for y in as_tuple(function(*arrays))), name
        for asking in arrays:
            asking.requires_grad_()
            y = as_tuple(function(*arrays))[0]
            assert y.requires_grad, name
            with torch.no_grad():
                assert not any(y.requires_grad for y in as_tuple(function(*arrays))), name
            y.abs().nan_to_num().sum().backward()
            assert [a.grad is not None for a in arrays] == [a is asking for a in arrays], name
            asking.grad = None
            asking.requires_grad_(False)


@pytest.mark.slow("each call on each path", "torch-portable", "torch-numba")
def test_inference_mode_and_autocast_change_no_bit(torch, xp):
    for name, function, arrays in all_calls(xp):
        arrays = [a if a.is_complex() else a.float() for a in arrays]
        expected = as_tuple(function(*arrays))
        with torch.inference_mode():
            inferred = as_tuple(function(*arrays))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast = as_tuple(function(*arrays))
        assert all(y.is_inference() for y in inferred), name
        for found in (inferred, autocast):
            close(found, expected, 0.0, 0.0, name=name)


def test_logits_that_autocast_made(torch, xp):
    x, w = xp.asarray(np.eye(3), "float32").requires_grad_(), xp.asarray(np.eye(3), "float32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = x @ w
        loss = ps.cross_entropy(logits, xp.asarray([0, 1, 2]))
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    (grad,) = torch.autograd.grad(loss, x)
    close(grad, ps.cross_entropy_value_and_grad(x.detach(), xp.asarray([0, 1, 2]))[1], 2.0**-7, 0.0)


def test_sparse_tensors_are_refused(torch, xp):
    x, labels = xp.asarray(np.eye(2)), xp.asarray([0, 1])
    sparse, weight = x.to_sparse(), x[0].to_sparse()
    for function, *given in (
        (ps.softmax, sparse),
        (ps.logsumexp, sparse),
        (ps.entmax, sparse),
        (ps.cross_entropy, sparse, labels),
        (ps.cross_entropy, x, labels.to_sparse()),
        (partial(ps.cross_entropy, weight=weight), x, labels),
        (ps.linear_cross_entropy, x, sparse, labels),
        (ps.sigmoid_cross_entropy, sparse, x),
        (kernels.explain, "softmax", sparse),
    ):
        with pytest.raises(TypeError, match=r"tensor of layout torch\.sparse_coo.*its to_dense\("):
            function(*given)


def test_integers_take_the_default_dtype(torch, xp):
    x, labels = xp.asarray([[1, 2, 3]]), xp.asarray([0])
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            torch.set_default_dtype(dtype)
            for y in (ps.softmax(x), ps.logsumexp(x), ps.cross_entropy(x, labels)):
                assert y.dtype == dtype
            assert torch.equal(ps.softmax(x), ps.softmax(x.to(dtype)))
            state = ps.online.fold(x)  # of a half type in float32, as others are
            assert ps.online.logsumexp(state).dtype == torch.promote_types(dtype, torch.float32)
    finally:
        torch.set_default_dtype(before)


def test_a_label_of_any_integer_dtype_is_named_as_it_is(torch, xp):
    x = xp.asarray(np.random.default_rng(2).normal(size=(3, 4)))
    for dtype in ("uint8", "uint16", "uint32", "uint64", "int8", "int32"):
        for wrong, loss in itertools.product(
            (4, np.iinfo(dtype).max), (ps.cross_entropy, ps.entmax_loss)
        ):
            with pytest.raises(IndexError, match=rf"labels\[2\] is {wrong}, outside \[0, 4\)"):
                loss(x, xp.from_numpy(np.asarray([3, 0, wrong], dtype)))


# --------------------------------------------------------------------------- no values to read


@pytest.mark.slow("each call twice without values", "torch-portable")
def test_meta_and_fake_tensors_give_the_shape_and_dtype(torch, xp, arrays_of):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for name, call in CALLS.items():
        expected = call.outputs(xp.from_numpy)
        with FakeTensorMode() as mode:
            fake = call.outputs(lambda a, mode=mode: mode.from_tensor(xp.from_numpy(a)))
        meta = call.outputs(lambda a: xp.from_numpy(a).to("meta"))
        for found, place in ((meta, "meta"), (fake, xp.place)):
            for y, e in zip(found, expected, strict=True):
                assert (y.shape, y.dtype, y.device.type) == (e.shape, e.dtype, place), name


def test_weights_of_a_row_of_minus_infinities_in_any_layout(torch, xp):
    """Sums in another order do not cancel to the last digit."""
    random = torch.Generator().manual_seed(0)
    x, b = torch.full((5, 5, 26), -torch.inf), torch.randn(1, 5, 26, generator=random)
    x[:4] = torch.randn(4, 5, 26, generator=random)
    last_axis_outermost = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    value, sign = ps.logsumexp(last_axis_outermost, b=b, axis=-1, return_sign=True)
    assert (value[4] == -torch.inf).all()
    assert (sign[4] == 0).all()


# --------------------------------------------------------------------------- torch.compile


@pytest.fixture
def compiled(torch, arrays_of):
    """torch.compile, of which nothing may be left to the interpreter.

    What is traced of small tensors is the portable path, whatever the switches.
    """

    def compiled(function, **options):
        torch.compiler.reset()
        return torch.compile(function, fullgraph=True, **options)

    with warnings.catch_warnings():
        # torch's own: it looks at deprecated names while it traces.
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning, UserWarning))
        yield compiled
    torch.compiler.reset()


@every_call_compiled("torch.compile traces each call")
def test_compiles_as_one_graph(torch, xp, compiled, call):
    function, arrays = call.on(xp.from_numpy)
    close(compiled(function, backend="eager")(*arrays), function(*arrays))


DIFFERENTIATED = [n for n in CALLS if "weight, label_smoothing" in n or n.endswith("softmax()")]


@pytest.mark.slow("torch.compile traces each call, forward and backward")
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_a_compiled_gradient_is_the_eager_one(torch, xp, compiled, name):
    function, arrays = CALLS[name].on(xp.from_numpy)
    x = arrays[0].requires_grad_()

    def gradient(function):
        y = as_tuple(function(*arrays))[-1]
        weights = torch.arange(1.0, y.numel() + 1, dtype=y.dtype, device=y.device).reshape(y.shape)
        return torch.autograd.grad(y, x, weights)[0]

    close(gradient(compiled(function, backend="aot_eager")), gradient(function))


def test_a_compiled_function_takes_other_lengths(torch, xp, compiled):
    step = compiled(ps.cross_entropy, backend="eager")
    for n, c in ((4, 7), (5, 8), (40, 20)):
        x = xp.asarray(np.random.default_rng(3).normal(size=(n, c)))
        labels = xp.asarray(np.arange(n) % c)
        torch.testing.assert_close(step(x, labels), ps.cross_entropy(x, labels))


def test_an_operator_takes_no_ignore_index_of_64_bits(torch, xp, compiled):
    """Its integers have a sign, those of labels need not: such a call is traced as it stands."""
    rng, ignored = np.random.default_rng(4), 2**64 - 1
    hidden, classifier = (xp.asarray(rng.normal(size=(n, 3))) for n in (700, 100))
    labels = np.arange(700, dtype=np.uint64) % 100
    labels[::5] = ignored
    labels = xp.from_numpy(labels)
    for function, *arrays in (
        (ps.cross_entropy, hidden @ classifier.T, labels),
        (ps.linear_cross_entropy, hidden, classifier, labels),
    ):
        actual = compiled(function, backend="eager")(*arrays, ignore_index=ignored)
        torch.testing.assert_close(actual, function(*arrays, ignore_index=ignored))


@pytest.mark.slow("torch.compile compiles C++")
def test_inductor_keeps_the_digits_of_a_confident_row(torch, xp, compiled):
    x = xp.asarray([[30.0, 0.0, 0.0], [0.0, 1.0, 2.0]], "float32")
    labels = xp.asarray([0, 3])  # the second is out of range: nan, since no value can be read

    def loss(x):
        return ps.cross_entropy(x, labels, reduction="none")

    leaf = x.clone().requires_grad_()
    value = compiled(loss)(leaf)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    rest = 2 * np.exp(-30.0)
    np.testing.assert_allclose(xp.numpy(value), [np.log1p(rest), NAN], rtol=1e-6)
    np.testing.assert_allclose(xp.numpy(grad[0]), [-rest, rest / 2, rest / 2], rtol=1e-6)
    assert np.isnan(xp.numpy(grad[1])).all()
