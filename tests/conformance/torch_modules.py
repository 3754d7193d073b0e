"""torch's own inputs for its modules of the family, run through `compat` on every backend.

    python -m pytest tests/conformance/torch_modules.py [--backend numpy,torch]

torch ships them, with their expected errors and reference functions of its own; nothing of them
is copied here. Its module of inputs imports the package `expecttest`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from backends import Backend
from torch.testing._internal.common_modules import module_db

from portable_softmax.compat import torch_functional, torch_nn

FUNCTIONS = {
    torch.nn.CrossEntropyLoss: torch_functional.cross_entropy,
    torch.nn.NLLLoss: torch_functional.nll_loss,
    torch.nn.Softmax: torch_functional.softmax,
    torch.nn.LogSoftmax: torch_functional.log_softmax,
    torch.nn.Softmin: torch_functional.softmin,
}


class Case(NamedTuple):
    """One input of a module: what it is made with, and what it is called with."""

    module: type[torch.nn.Module]
    options: dict[str, Any]  # weight, ignore_index, dim, ...: torch's names
    arrays: tuple[torch.Tensor, ...]  # logits, and labels of a loss
    reference: Any  # torch's function of a module and arrays

    @classmethod
    def of(cls, module, given) -> Case:
        made, called = given.constructor_input, given.forward_input
        names = ("dim",) if hasattr(module, "dim") or made.args else ()
        options = dict(zip(names, made.args, strict=True)) | made.kwargs
        return cls(module, options, called.args, given.reference_fn)

    def __call__(self, function, xp: Backend, **more: Any) -> Any:
        """Call a function of ours with the arrays of a backend."""
        options = {
            name: xp.from_numpy(value.numpy()) if isinstance(value, torch.Tensor) else value
            for name, value in self.options.items()
        }
        return function(*(xp.from_numpy(t.numpy()) for t in self.arrays), **options, **more)


def made_by(info, inputs) -> list:
    torch.manual_seed(0)
    made = inputs(info, device="cpu", dtype=torch.float64, requires_grad=False, training=True)
    return [(Case.of(info.module_cls, getattr(g, "module_error_input", g)), g) for g in made]


INFOS = [info for info in module_db if info.module_cls in FUNCTIONS]
CASES = [
    pytest.param(case, id=f"{info.module_cls.__name__}-{given.desc}")
    for info in INFOS
    for case, given in made_by(info, info.module_inputs_func)
]
MODULES = [case for case in CASES if hasattr(torch_nn, case.values[0].module.__name__)]

# What torch refuses and this package answers.
ANSWERED = {
    error: pytest.mark.xfail(reason=reason, strict=True)
    for error, reason in {
        "Expected floating point type for target with class probabilities": (
            "integers in the shape of the logits are a distribution, one-hot for example"
        ),
        r"expected scalar type \w+ but found \w+": "weights are cast to the dtype of the logits",
    }.items()
}
ERRORS = [
    pytest.param(case, id=given.error_regex, marks=ANSWERED.get(given.error_regex, ()))
    for info in INFOS
    if info.module_error_inputs_func
    for case, given in made_by(info, info.module_error_inputs_func)
]


def close(actual: Any, expected: torch.Tensor) -> None:
    """Compare shape, dtype and values."""
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-12, atol=1e-12, strict=True)


def test_every_function_has_inputs():
    assert {info.module_cls for info in INFOS} == FUNCTIONS.keys()


@pytest.mark.parametrize("case", CASES)
def test_answer(xp, case):
    answer = xp.numpy(case(FUNCTIONS[case.module], xp))
    module = case.module(**case.options)
    close(answer, module(*case.arrays))
    if case.reference:
        close(answer, case.reference(module, *case.arrays))


@pytest.mark.parametrize("case", MODULES)
def test_module_and_its_gradient(case):
    gradients = []
    for namespace in (torch.nn, torch_nn):
        x, *labels = case.arrays
        x = x.clone().requires_grad_()
        module = getattr(namespace, case.module.__name__)(**case.options)
        answer = module(x, *labels)
        answer.backward(torch.linspace(1, 2, answer.numel(), dtype=x.dtype).reshape(answer.shape))
        gradients.append(x.grad)
    close(gradients[1].numpy(), gradients[0])


@pytest.mark.parametrize("case", ERRORS)
def test_error(xp, case):
    weight = case.options.get("weight")
    if weight is not None and weight.dtype == torch.float16 and "float16" not in xp.halves:
        pytest.skip(f"{xp.name} has no float16")
    with pytest.raises((TypeError, ValueError)):
        case(FUNCTIONS[case.module], xp)
