"""torch.compile keeps the kernels: an operator for a large tensor, torch's operations otherwise."""

from __future__ import annotations

import importlib.util
import itertools
from functools import partial

import numpy as np
import pytest

import portable_softmax as ps
from portable_softmax import kernels

pytestmark = pytest.mark.run_on("paths")

VALUE, GRADIENT = "portable_softmax.value.default", "portable_softmax.gradient.default"
ROWS = {"small": 16, "large": 1_100}  # of 60 classes: on either side of 65,536 elements

CALLS = {
    "softmax": lambda x, t: ps.softmax(x),
    "softmax over the first axis": lambda x, t: ps.softmax(x, axis=0, temperature=0.7),
    "log_softmax": lambda x, t: ps.log_softmax(x),
    "logsumexp": lambda x, t: ps.logsumexp(x, axis=1),
    "logsumexp over all": lambda x, t: ps.logsumexp(x),
    "cross_entropy": ps.cross_entropy,
    "options": partial(
        ps.cross_entropy, ignore_index=1, label_smoothing=0.1, z_loss=0.01, reduction="none"
    ),
    "softcap": partial(ps.cross_entropy, softcap=3.0),
    # which Numba declines
    "softcap and smoothing": partial(ps.cross_entropy, softcap=3.0, label_smoothing=0.1),
    "where": lambda x, t: ps.softmax(x, where=x > 0),
    "value and gradient": lambda x, t: ps.cross_entropy_value_and_grad(x.detach(), t)[1] * x,
    "transposed": lambda x, t: ps.softmax(x.T),
}


@pytest.fixture(autouse=True)
def _no_graph_of_another_test(torch):
    torch._dynamo.reset()
    ps.softmax(torch.zeros(1))  # from the first untraced call on, tensors are known by their type


def batch(torch, n, dtype="float32"):
    rng = np.random.default_rng(n)
    x = torch.asarray(rng.normal(size=(n, 60)) * 3).to(getattr(torch, dtype)).requires_grad_()
    return x, torch.asarray(rng.integers(60, size=n))


def traced(torch, function, **options):
    """Return the names of what each graph of a function calls, and the function, compiled."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    names = []

    def compiler(graph, _):
        names.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    return names, torch.compile(function, backend=backend, fullgraph=True, **options)


@pytest.mark.slow("torch.compile traces every call twice")
@pytest.mark.parametrize("call", CALLS)
def test_the_values_and_gradients_of_a_compiled_call(torch, backend_name, call):
    function = CALLS[call]
    # The size decides only where the path is not asked for.
    for size in ROWS if backend_name == "torch" else ("large",):
        torch._dynamo.reset()
        x, labels = batch(torch, ROWS[size])
        names, compiled = traced(torch, function)
        found, expected = compiled(x, labels), function(x, labels)
        torch.testing.assert_close(found, expected)
        dy = torch.asarray(np.random.default_rng(0).normal(size=tuple(expected.shape))).to(x.dtype)
        (grad,), (slope,) = (torch.autograd.grad(y, x, dy) for y in (found, expected))
        torch.testing.assert_close(grad, slope, rtol=1e-5, atol=1e-6)
        forward, backward = names
        by_kernel = backend_name == "torch" and size == "large"
        if backend_name != "torch-numba":  # whose kernels do not take every call
            assert (VALUE in forward) == by_kernel
            assert (GRADIENT in backward) == (by_kernel and call != "value and gradient")


@pytest.mark.slow("torch.compile traces every call of a dtype")
def test_other_dtypes(torch):
    halves = ["float16", *(["bfloat16"] if importlib.util.find_spec("ml_dtypes") else [])]
    for dtype in ("float64", *halves):  # NumPy's bfloat16 is that of ml_dtypes
        x, labels = batch(torch, ROWS["large"], dtype)
        for call in ("softmax", "cross_entropy"):
            torch._dynamo.reset()
            _, compiled = traced(torch, CALLS[call])
            found, expected = compiled(x, labels), CALLS[call](x, labels)
            assert found.dtype == x.dtype
            torch.testing.assert_close(found, expected)
            (grad,), (slope,) = (torch.autograd.grad(y.sum(), x) for y in (found, expected))
            torch.testing.assert_close(grad, slope)


@pytest.mark.slow("torch.compile traces each path", "torch-portable", "torch-numba")
def test_one_graph_for_all_large_batches(torch, backend_name):
    """With symbols for the sizes there is one for the small ones and one for the large ones."""
    names, compiled = traced(torch, CALLS["cross_entropy"], dynamic=True)
    for n in (2_000, 1_200, 3_000, 1_500):
        x, labels = batch(torch, n)
        found = compiled(x.detach(), labels)
        torch.testing.assert_close(found, ps.cross_entropy(x.detach(), labels))
    (only,) = names
    assert (VALUE in only) == (backend_name != "torch-portable")


def test_a_label_without_a_class_is_nan(torch):
    """Nothing is read while a call is traced, so nothing can be raised for a value."""
    x, labels = batch(torch, ROWS["large"])
    labels[3] = 60
    _, compiled = traced(torch, partial(ps.cross_entropy_value_and_grad, reduction="none"))
    loss, grad = compiled(x.detach(), labels)
    for part in (loss, grad[:, 0]):
        assert torch.nonzero(part.isnan()).tolist() == [[3]]


def test_what_is_exported_needs_no_operator_of_ours(torch):
    if not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("this torch does not tell that it exports")

    class Model(torch.nn.Module):
        def forward(self, x):
            return ps.softmax(x)

    x, _ = batch(torch, ROWS["large"])
    exported = torch.export.export(Model(), (x.detach(),))
    names = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    assert names
    assert not [name for name in names if "portable_softmax" in name]


@pytest.mark.slow("torch.compile traces each transform", "torch-portable", "torch-numba")
def test_functional_transforms_in_compiled_code(torch):
    """They trace torch's own operations."""
    x, labels = batch(torch, ROWS["large"])
    x = x.detach()
    for function in (
        lambda x: torch.func.vmap(ps.softmax)(x),
        lambda x: torch.func.grad(lambda x: ps.cross_entropy(x, labels, check_labels=False))(x),
    ):
        torch._dynamo.reset()
        names, compiled = traced(torch, function)
        torch.testing.assert_close(compiled(x), function(x), rtol=1e-5, atol=1e-7)
        assert not [graph for graph in names if VALUE in graph]


def test_the_portable_mathematics_of_a_call_is_one_operation(torch):
    """What a trace goes into is looked up, and each name looked at again in every later call."""
    x, _ = batch(torch, ROWS["small"])
    for function in (ps.softmax, ps.log_softmax):
        graphs = []
        keep = lambda graph, _, graphs=graphs: graphs.append(graph) or graph  # noqa: E731
        compiled = torch.compile(function, backend=keep, fullgraph=True)
        with kernels.portable():
            torch.testing.assert_close(compiled(x), function(x), rtol=1e-5, atol=1e-6)
        (graph,) = graphs
        called = [n.target for n in graph.graph.nodes if n.op.startswith("call")]
        assert len([target for target in called if target is not getattr]) == 1


def test_switches_count_while_a_call_is_traced(torch):
    x, labels = batch(torch, ROWS["large"])
    with kernels.portable():
        names, compiled = traced(torch, CALLS["softmax"])
        compiled(x.detach(), labels)
    assert not [graph for graph in names if VALUE in graph]


def test_a_vector_jacobian_product_of_any_size_is_compiled(torch):
    """Where no kernel takes what has no memory yet, torch's operations do."""
    for rows, function in itertools.product(ROWS.values(), (ps.softmax_vjp, ps.log_softmax_vjp)):
        torch._dynamo.reset()
        y = torch.log_softmax(batch(torch, rows)[0].detach().double(), 1)
        actual = torch.compile(function, backend="eager", fullgraph=True)(y, y.flip(0))
        torch.testing.assert_close(actual, function(y, y.flip(0)), rtol=1e-12, atol=1e-12)
