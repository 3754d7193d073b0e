"""torch: one graph for every batch size and every temperature, where the user asks for one."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import portable_softmax as ps
from portable_softmax import kernels

SIZES = (8, 16, 33, 64)

FUNCTIONS = {
    "cross_entropy": ps.cross_entropy,
    "none": partial(ps.cross_entropy, reduction="none"),
    "ignored": partial(ps.cross_entropy, ignore_index=1, reduction="sum"),
    "smoothed": partial(ps.cross_entropy, label_smoothing=0.1, z_loss=0.1, softcap=3.0),
    "value and grad": lambda x, labels: ps.cross_entropy_value_and_grad(x, labels)[1],
    "softmax over the batch": lambda x, labels: ps.softmax(x, axis=0),
    "log_softmax with a temperature": lambda x, labels: ps.log_softmax(x, temperature=0.7),
    "logsumexp over all": lambda x, labels: ps.logsumexp(x),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


@pytest.fixture(autouse=True)
def _no_graph_of_another_test(torch, arrays_of):
    torch._dynamo.reset()
    # Imported after the package, as in these tests, tensors are known from the first eager call on.
    ps.softmax(torch.zeros(1))


def batch(torch, n):
    rng = np.random.default_rng(n)
    x = torch.asarray(rng.normal(size=(n, 5))).requires_grad_()
    return x, torch.asarray(rng.integers(5, size=n))


@pytest.mark.slow("torch.compile traces eight functions for several sizes")
@every_function
def test_one_graph_for_every_batch_size(torch, function):
    from torch._dynamo.utils import counters

    counters.clear()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in SIZES:
        x, labels = batch(torch, n)
        found, expected = compiled(x, labels), function(x, labels)
        torch.testing.assert_close(found, expected)
        if expected.requires_grad:
            weights = torch.arange(expected.numel(), dtype=x.dtype).reshape(expected.shape) + 1
            grads = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, expected))
            torch.testing.assert_close(*grads)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow("torch.export traces eight functions in two ways")
@every_function
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(torch, function, strict):
    class Module(torch.nn.Module):
        def forward(self, x, labels):
            return function(x, labels)

    x, labels = batch(torch, 8)
    dynamic = {0: torch.export.Dim("batch")}
    exported = torch.export.export(
        Module(), (x.detach(), labels), dynamic_shapes=(dynamic, dynamic), strict=strict
    ).module()
    for n in SIZES:
        x, labels = batch(torch, n)
        torch.testing.assert_close(exported(x, labels), function(x.detach(), labels))


@pytest.mark.slow("torch.compile traces a function for several temperatures")
@pytest.mark.parametrize("function", [ps.softmax, ps.log_softmax])
def test_one_graph_for_every_temperature(torch, function):
    """A temperature that changes from step to step, past the ends of float32 too."""

    def tempered(x, temperature):
        return function(x, temperature=temperature)

    compiled = torch.compile(tempered, backend="inductor", fullgraph=True, dynamic=True)
    x = torch.asarray([[1.0, 0.0, 1.0, -np.inf], [0.5, 0.5, -0.5, 0.25]])
    # Inductor may ask for its graph twice within one compilation: only another one is an error.
    with torch._dynamo.config.patch(error_on_recompile=True):
        for temperature in (0.5, 0.7, 0.9, 2.0, 3.0, 1e300, 1e-320):
            found, expected = compiled(x, temperature), tempered(x, temperature)
            torch.testing.assert_close(found.exp(), expected.exp())


def test_what_was_computed_before_compiles_nothing_again(torch):
    """Arrays of another library or dtype, met in between, are no reason to compile again."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(ps.log_softmax, backend=counter, fullgraph=True)
    x = torch.zeros((3, 4))
    with kernels.portable():
        compiled(x)
        ps.log_softmax(torch.zeros((3, 4), dtype=torch.float64))
        ps.log_softmax(np.zeros((3, 4)))
        compiled(x)
    assert counter.frame_count == 1
