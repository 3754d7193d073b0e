"""JAX: a form that XLA fuses into one pass, for arrays whose digits allow it.

This module loads nothing; `_rules`, which needs JAX, is imported when there is an array of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from portable_softmax.kernels._request import Request


def missing() -> str:
    """Return what has to be installed: nothing, where there is an array."""
    return ""


def declines(request: Request, asked: bool) -> str:
    """Return the empty string: what is declared is taken."""
    return ""


def _rules() -> Any:
    return import_module("portable_softmax.kernels._jax._rules")


def _rows(request: Request) -> Any:
    """log_softmax or logsumexp over the axes, those of the latter kept with length 1."""
    function = getattr(_rules(), request.operation)
    x = request.x.astype(request.compute_dtype)
    return function(x, request.axes).astype(request.result_dtype)


log_softmax = logsumexp = _rows


def _loss(request: Request) -> Any:
    """Return the reduced loss, and its gradient if that is asked for."""
    function = getattr(_rules(), request.operation)
    x = request.x.astype(request.compute_dtype)
    found = function(x, request.target(), request.axis, request.options.reduction)
    if isinstance(found, tuple):
        return tuple(part.astype(request.result_dtype) for part in found)
    return found.astype(request.result_dtype)


cross_entropy = cross_entropy_value_and_grad = _loss
