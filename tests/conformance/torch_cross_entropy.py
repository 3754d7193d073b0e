"""torch's own inputs for CrossEntropyLoss, run through this package on every backend.

    python -m pytest tests/conformance/torch_cross_entropy.py [--backend numpy,torch]

torch ships them, with their expected errors and a reference function of its own; nothing of them
is copied here. Its module of inputs imports the package `expecttest`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from backends import Backend
from torch.testing._internal.common_modules import module_db

import portable_softmax as ps


class Case(NamedTuple):
    """One input of the module: what it is made with, and what it is called with."""

    options: dict[str, Any]  # weight, ignore_index, label_smoothing, reduction: torch's names
    logits: torch.Tensor
    labels: torch.Tensor
    reference: Any  # torch's function of a module, logits and labels

    @classmethod
    def of(cls, given) -> Case:
        return cls(given.constructor_input.kwargs, *given.forward_input.args, given.reference_fn)

    def __call__(self, function, xp: Backend) -> Any:
        """Call a function of ours with the arrays of a backend."""
        options = {
            name: xp.from_numpy(value.numpy()) if isinstance(value, torch.Tensor) else value
            for name, value in self.options.items()
        }
        logits, labels = (xp.from_numpy(t.numpy()) for t in (self.logits, self.labels))
        return function(logits, labels, axis=self.axis, **options)

    @property
    def axis(self) -> int:
        """The class axis: the second, or the only one where there is no batch."""
        return min(1, self.logits.ndim - 1)


def made_by(inputs) -> list:
    torch.manual_seed(0)
    return inputs(INFO, device="cpu", dtype=torch.float64, requires_grad=False, training=True)


(INFO,) = (info for info in module_db if info.module_cls is torch.nn.CrossEntropyLoss)
CASES = [pytest.param(Case.of(g), id=g.desc) for g in made_by(INFO.module_inputs_func)]

# What torch refuses and this package answers.
ANSWERED = {
    "Expected floating point type for target with class probabilities": pytest.mark.xfail(
        reason="integers in the shape of the logits are a distribution, one-hot for example",
        strict=True,
    )
}
ERRORS = [
    pytest.param(
        Case.of(g.module_error_input), id=g.error_regex, marks=ANSWERED.get(g.error_regex, ())
    )
    for g in made_by(INFO.module_error_inputs_func)
]


def close(actual: Any, expected: torch.Tensor) -> None:
    """Compare shape, dtype and values."""
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-12, atol=1e-12, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_loss(xp, case):
    module = torch.nn.CrossEntropyLoss(**case.options)
    loss = xp.numpy(case(ps.cross_entropy, xp))
    close(loss, module(case.logits, case.labels))
    close(loss, case.reference(module, case.logits, case.labels))


@pytest.mark.parametrize("case", CASES)
def test_value_and_grad(xp, case):
    logits = case.logits.clone().requires_grad_()
    expected = torch.nn.CrossEntropyLoss(**case.options)(logits, case.labels)
    expected.sum().backward()
    loss, grad = case(ps.cross_entropy_value_and_grad, xp)
    close(xp.numpy(loss), expected.detach())
    close(xp.numpy(grad), logits.grad)


@pytest.mark.parametrize("case", CASES)
def test_autograd(case):
    logits, ours = (case.logits.clone().requires_grad_() for _ in range(2))
    torch.nn.CrossEntropyLoss(**case.options)(logits, case.labels).sum().backward()
    ps.cross_entropy(ours, case.labels, axis=case.axis, **case.options).sum().backward()
    close(ours.grad.numpy(), logits.grad)


@pytest.mark.parametrize("case", ERRORS)
def test_error(xp, case):
    with pytest.raises((TypeError, ValueError)):
        case(ps.cross_entropy, xp)
