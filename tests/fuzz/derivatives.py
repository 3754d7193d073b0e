"""A value and its gradients as the library finds them: what users of a loss differentiate."""

from __future__ import annotations

import sys
from typing import Any

import portable_softmax as ps
from tests.fuzz.cases import Case

LIBRARIES = ("torch", "jax")  # MLX's derivative of `where` multiplies 0 by infinity
_GIVES_BOTH = "_value_and_grad"


def has_one(case: Case) -> bool:
    """Return whether a case is a value and its gradients by arrays of floats.

    With z_loss the derivative of the formulas, which those of another dtype are left to in torch,
    has a unit of 2 z logsumexp at the label, however small its probability: 1 less the others. That
    of the entropy of a large tensor has a unit of the probability, however small the entropy.
    """
    if case.function.startswith("entropy") and case.first.size >= 1 << 16:
        return False
    by_formulas = "dtype" in case.options and case.options.get("z_loss")
    if not case.function.endswith(_GIVES_BOTH) or by_formulas:
        return False
    return all(case.arrays[name].values.dtype.kind not in "biu" for name in _by(case))


def _by(case: Case) -> list[str]:
    """Return the names of the arrays that the gradients are by."""
    if "x" in case.arrays:
        names = ["x", "other"]
    else:
        names = ["hidden", "classifier", "bias"] if "hidden" in case.arrays else ["logits"]
    return [name for name in names if name in case.arrays]


def found(case: Case, *positional: Any, **keyword: Any) -> tuple[Any, Any]:
    """Return the value and the gradients of its sum, in the form of the function of both."""
    function = getattr(ps, case.function.removesuffix(_GIVES_BOTH))
    several, bias = {"hidden", "other"} & case.arrays.keys(), keyword.get("bias")
    n = 2 if several else 1

    def value(*by: Any) -> Any:
        named = keyword if bias is None else {**keyword, "bias": by[n]}
        return function(*by[:n], *positional[n:], **named)

    y, grads = _differentiated(value, positional[:n] if bias is None else (*positional[:n], bias))
    return y, grads if several else grads[0]


def _differentiated(value: Any, by: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(by[0], torch.Tensor):
        by = tuple(a.detach().requires_grad_() for a in by)
        y = value(*by)
        return y.detach(), torch.autograd.grad(y, by, torch.ones_like(y))
    jax = sys.modules["jax"]
    y, back = jax.vjp(value, *by)
    return y, back(jax.numpy.ones_like(y))
