"""JAX: a form that XLA fuses into one pass, for arrays whose digits allow it.

This module loads nothing; `_rules`, which needs JAX, is imported when there is an array of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from portable_softmax.kernels._calls import Call, LossCall, RowsCall


def missing() -> str:
    """Return what has to be installed: nothing, where there is an array."""
    return ""


def refusal(call: Call) -> str:
    """Return why a call takes the portable form."""
    if 0 in call.x.shape:
        return "an empty array"
    if isinstance(call, RowsCall):
        if call.where is not None:
            return "where"
        return "" if call.temperature == 1.0 else "temperature"
    if isinstance(call, LossCall):
        o = call.options
        given = {
            "a distribution as labels": not call.indices,
            "weight": o.weight is not None,
            "label_smoothing": o.label_smoothing != 0.0,
            "z_loss": o.z_loss != 0.0,
            "softcap": o.softcap is not None,
            "where": o.where is not None,
        }
        return ", ".join(name for name, it_is in given.items() if it_is)
    return "no operation of this kernel"


def log_softmax(call: RowsCall) -> Any:
    """(x - max) - log(sum exp(x - max)), or the portable form: reads and writes the array."""
    rules = import_module("portable_softmax.kernels._jax._rules")
    return rules.log_softmax(call.x.astype(call.compute), call.axes).astype(call.answer)


def logsumexp(call: RowsCall) -> Any:
    """Max + log(sum exp(x - max)), or the portable form: reads the array."""
    rules = import_module("portable_softmax.kernels._jax._rules")
    return rules.logsumexp(call.x.astype(call.compute), call.axes).astype(call.answer)


def cross_entropy(call: LossCall) -> Any:
    """Return the reduced loss: reads the array."""
    rules = import_module("portable_softmax.kernels._jax._rules")
    return rules.cross_entropy(*_loss_arguments(call))


def cross_entropy_value_and_grad(call: LossCall) -> tuple[Any, Any]:
    """Return the reduced loss and its gradient: reads and writes the array."""
    rules = import_module("portable_softmax.kernels._jax._rules")
    found: tuple[Any, Any] = rules.cross_entropy_value_and_grad(*_loss_arguments(call))
    return found


def _loss_arguments(call: LossCall) -> tuple[Any, ...]:
    x = call.x.astype(call.compute)
    return x, call.target(), call.axis, call.options.reduction
