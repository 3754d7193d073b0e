"""Compiled tensors whose answers go to memory that is no longer needed, and to no other."""

from __future__ import annotations

import importlib
import warnings

import pytest

import portable_softmax as ps
from portable_softmax import kernels

SHAPE = (64, 1200)  # more than is left to the portable path
INNER = 24

pytestmark = [
    pytest.mark.slow("Inductor compiles each program"),
    pytest.mark.run_on("torch-numba"),  # which compiles kernels that work on memory
    pytest.mark.usefixtures("torch"),
]


@pytest.fixture
def inductor(torch):
    """The module that tells Inductor of the operators."""
    return importlib.import_module("portable_softmax.kernels._torch._inductor")


@pytest.fixture
def compiled(torch, monkeypatch):
    """torch.compile, and the operations whose answer replaced something."""
    replaced = []

    def spied(real):
        def spy(engine, request, *others, **options):
            if request.out is not None:
                replaced.append((real.__name__, request.operation))
            return real(engine, request, *others, **options)

        return spy

    def compiled(function):
        torch.compiler.reset()
        return torch.compile(function, fullgraph=True, dynamic=False), replaced

    gradients = importlib.import_module("portable_softmax.kernels._torch._gradients")
    monkeypatch.setattr(gradients, "value", spied(gradients.value))
    monkeypatch.setattr(gradients, "gradient", spied(gradients.gradient))
    with warnings.catch_warnings(), torch._inductor.config.patch(force_disable_caches=True):
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning, UserWarning))
        yield compiled
    torch.compiler.reset()


def step(torch, function, arrays):
    """The values of a function, and the gradients of the floats among its arguments."""
    given = [a.detach().clone() for a in arrays]
    given = [a.requires_grad_() if a.is_floating_point() else a for a in given]
    values = function(*given)
    values = values if isinstance(values, tuple) else (values,)
    leaves = [a for a in given if a.requires_grad]
    random = torch.Generator().manual_seed(1)
    sums = [(v * torch.randn(v.shape, generator=random)).sum() for v in values if v.requires_grad]
    gradients = torch.autograd.grad(sum(sums), leaves, allow_unused=True)
    for mine, theirs in zip(given, arrays, strict=True):
        torch.testing.assert_close(mine.detach(), theirs, rtol=0, atol=0)
    return [v.detach() for v in values], gradients


def check(torch, compiled, function, *arrays):
    """Compare a program with what it gives operation by operation; return what was replaced."""
    expected = step(torch, function, arrays)
    program, replaced = compiled(function)
    actual = step(torch, program, arrays)
    assert actual[0][0].shape == expected[0][0].shape
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
    return sorted(replaced)


@pytest.fixture
def factors(torch):
    """Two matrices of which the logits are the product, and labels."""
    random = torch.Generator().manual_seed(0)
    n, c = SHAPE
    a, b = torch.randn(n, INNER, generator=random), torch.randn(INNER, c, generator=random)
    return a, b, torch.randint(c, (n,), generator=random)


SOFTMAX = [("gradient", "softmax"), ("value", "softmax")]
LOG_SOFTMAX = [("gradient", "log_softmax"), ("value", "log_softmax")]
# The kernel of a loss's gradient gives the loss as well.
LOSS = [("gradient", "cross_entropy"), ("value", "cross_entropy_value_and_grad")]


def loss(scale=1.0, **options):
    return LOSS, lambda a, b, t: ps.cross_entropy(a @ b * scale, t, **options)


REPLACED = {
    "softmax": (SOFTMAX, lambda a, b, t: ps.softmax(a @ b, temperature=0.7) @ b.T),
    "log_softmax": (LOG_SOFTMAX, lambda a, b, t: ps.log_softmax(a @ b, temperature=0.7) @ b.T),
    "view": (SOFTMAX, lambda a, b, t: ps.softmax((a @ b).unflatten(0, (4, 16))) * 2.0),
    "loss": loss(),
    "sum": loss(reduction="sum", label_smoothing=0.1, z_loss=1e-3),
    "none": loss(reduction="none", ignore_index=7),
    "softcap": loss(softcap=3.0),
    "confident rows": loss(50.0),
}


@pytest.mark.parametrize(("expected", "program"), REPLACED.values(), ids=REPLACED)
def test_an_answer_behind_a_product_takes_its_memory(torch, compiled, factors, expected, program):
    assert check(torch, compiled, program, *factors) == expected


def test_a_loss_of_distributions(torch, compiled, factors):
    a, b, _ = factors
    labels = torch.softmax(torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)), -1)
    assert check(torch, compiled, lambda a, b: ps.cross_entropy(a @ b, labels), a, b) == LOSS


def test_an_answer_that_a_kernel_puts_elsewhere(torch, compiled):
    """The tiles take so many elements for a small array, whose answer is a new one."""
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=random) for shape in ((64, INNER), (INNER, 1024)))
    with kernels.without("numba rows"):
        replaced = check(torch, compiled, lambda a, b: ps.softmax(a @ b) @ b.T, a, b)
    assert replaced == SOFTMAX


# --------------------------------------------------------------------------- what is read later


def also_read_before(a, b, labels):
    x = a @ b
    doubled = x * 2.0  # which no kernel has read when the softmax is compiled
    return ps.softmax(x) * doubled


def a_view_read_later(a, b, labels):
    x = a @ b
    flat = x.view(-1)
    return ps.softmax(x), flat[5:] * 3.0


def joined_before(a, b, labels):
    x = a @ b
    both = a.new_zeros(2, *x.shape) + x
    return both.flatten(0, 1)[:1] * 1.5, ps.log_softmax(x), ps.softmax(x)


def of_logits(function):
    return lambda a, b, labels: function(a @ b, labels)


PROGRAMS = {
    "also read before": also_read_before,
    "a view read later": a_view_read_later,
    "joined before": joined_before,
    "also returned": of_logits(lambda x, t: (ps.softmax(x), ps.cross_entropy(x, t), x)),
    "also read later": of_logits(lambda x, t: ps.softmax(x) + x.square()),
    "a part of more": of_logits(lambda x, t: (ps.softmax(x[: x.shape[0] // 2]), x)),
    "its own labels": of_logits(lambda x, t: ps.cross_entropy(x, x.detach())),
    "two losses": of_logits(
        lambda x, t: (ps.cross_entropy(x, t), ps.cross_entropy(x, t, reduction="none"))
    ),
    "used by the backward pass": of_logits(lambda x, t: (ps.softmax(x), x.square())),
    "columns": lambda a, b, t: ps.softmax((b.T @ a.T).T),
    "masked": of_logits(lambda x, t: ps.softmax(x, where=(t % 2 == 0)[:, None])),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_what_is_needed_elsewhere_is_kept(torch, compiled, factors, program):
    check(torch, compiled, program, *factors)
    actual = compiled(program)[0](*factors)
    torch.testing.assert_close(actual, program(*factors), rtol=2e-5, atol=2e-5)


def test_arguments_and_results_are_kept(torch, compiled, factors):
    """The logits are the caller's, before and after."""
    a, b, labels = factors

    def program(x, labels):
        return ps.softmax(x), ps.log_softmax(x), ps.cross_entropy(x, labels), x + 1.0

    replaced = check(torch, compiled, program, a @ b, labels)
    assert not {*replaced} & {SOFTMAX[1], LOG_SOFTMAX[1], LOSS[0]}


def test_a_backward_pass_may_be_repeated(torch, compiled, factors):
    """A graph that is kept has no memory to spare: torch says so, or gives the same again."""
    a, b, labels = (t.clone() for t in factors)
    a.requires_grad_()
    with torch._functorch.config.patch(donated_buffer=False):
        program, replaced = compiled(lambda: ps.cross_entropy(a @ b, labels))
        loss = program()
        first, second = (torch.autograd.grad(loss, a, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert replaced == []


# --------------------------------------------------------------------------- names of Inductor


def test_inductor_has_the_names(inductor):
    importlib.import_module("torch._inductor.lowering")  # as a compilation does
    assert vars(inductor._names()).keys() == inductor.PRIVATE.keys()


def test_without_a_name_answers_are_in_new_memory(torch, compiled, inductor, factors, monkeypatch):
    lowerings = importlib.import_module("torch._inductor.lowering").lowerings
    for name, path in inductor.PRIVATE.items():
        with monkeypatch.context() as m:
            m.setitem(inductor.PRIVATE, name, path + "_of_another_version")
            assert inductor._names() is None
    monkeypatch.setitem(inductor.PRIVATE, "make_fallback", "lowering.of_another_version")
    monkeypatch.setattr(inductor, "_REGISTERED", set())
    operators = torch.ops.portable_softmax
    for operator in (operators.value.default, operators.gradient.default):
        monkeypatch.delitem(lowerings, operator, raising=False)
    a, b, _ = factors
    assert check(torch, compiled, lambda a, b: ps.softmax(a @ b) @ b.T, a, b) == []
