"""JAX: one compiled call, without a branch, in the form that XLA compiles best.

This module loads nothing; `_rules`, `_sinks`, `_family`, `_losses` and `_binary`, which need JAX,
are imported when there is an array of it.
"""

from __future__ import annotations

import math
import sys
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from portable_softmax import portable
from portable_softmax.kernels._request import (
    BINARY,
    DIVERGENCES,
    ENTROPIES,
    FOLD,
    LINEAR,
    LOSSES,
    RUNNING,
    SIGNED,
    VJPS,
    Request,
)


def missing() -> str:
    """Return what has to be installed: nothing, where there is an array."""
    return ""


def declines(request: Request, asked: bool) -> str:
    """Return why a call is left to the portable path."""
    if request.operation in LINEAR:
        lengths = (*request.x.shape, *request.options.classifier.shape)
        if not all(map(request.library.is_known, lengths)):
            return "symbolic shapes"
        return "nothing to reduce" if 0 in lengths else ""
    of_known_lengths = (
        request.operation in (*DIVERGENCES, *BINARY, "logmeanexp") or "b" in request.active
    )
    if of_known_lengths and not all(map(request.library.is_known, request.x.shape)):
        return "symbolic shapes"
    if "softcap" in request.active:
        cap, most = request.options.softcap, float(request.xp.finfo(request.compute_dtype).max)
        if cap > most:  # no number of the dtype
            return f"a softcap of {cap}, beyond {most}"
    return ""


def _module(name: str) -> Any:
    return import_module(f"{__name__}.{name}")


def put(request: Request, value: Any) -> Any:
    """Return numbers of the host as an array of the compute dtype, so that no value is compiled in.

    They are moved explicitly: JAX's transfer guard forbids the implicit transfer of an argument.
    """
    value = np.asarray(value, request.compute_dtype)
    return value if request.tracing else sys.modules["jax"].device_put(value)


def _scale(request: Request) -> Any:
    scale = _module("_fold").scale_of(request.options.temperature, request.compute_dtype)
    return None if scale is None else put(request, scale)


def _dtypes(request: Request) -> tuple[Any, Any]:
    return request.compute_dtype, request.answer_dtype


class Program(NamedTuple):
    """A function, its arrays and what it is compiled for."""

    function: Any
    arrays: tuple[Any, ...]
    static: tuple[Any, ...]


def program(request: Request) -> Program:
    """Return what answers a call but that of a linear layer."""
    operation, x = request.operation, request.x
    if operation in LOSSES:
        return _loss(request)
    if operation in BINARY:
        return _of_entries(request)
    found, static = function(operation), (request.axes, *_dtypes(request))
    if operation in DIVERGENCES:
        return _divergence(request, found, static)
    if operation in (*ENTROPIES, RUNNING[0]):
        return Program(found, (x,), static)
    if operation in (*VJPS, RUNNING[1]):
        return Program(found, (x, request.dy), static)
    where, b = request.options.where, request.options.b
    if operation == "logsumexp" and (b is not None or request.options.return_sign):
        weighted = _module("_family").weighted_logsumexp
        return Program(weighted, (x, b, where), (*static, request.options.return_sign))
    if operation in ("logsumexp", "logmeanexp"):
        return Program(found, (x, where), static)
    if (sink := request.options.sink) is not None:
        sink = put(request, sink) if isinstance(sink, float) else sink
        beside = getattr(_module("_sinks"), operation)
        return Program(beside, (x, sink, where, _scale(request)), static)
    return Program(found, (x, where, _scale(request)), static)


def function(operation: str) -> Any:
    """Return what answers an operation, if not that of a linear layer."""
    if operation.startswith("cross_entropy"):
        return getattr(_module("_losses"), operation)
    if operation in BINARY:
        return getattr(_module("_binary"), operation)
    if operation.endswith("_beside_sink"):
        return getattr(_module("_sinks"), operation)
    operation = "fold_rows" if operation == FOLD else operation
    return getattr(_module("_family" if operation in _FAMILY else "_rules"), operation)


_FAMILY = (*DIVERGENCES, *RUNNING, "logcumsumexp_pullback", "logmeanexp", "fold_rows", SIGNED)


def _divergence(request: Request, function: Any, static: tuple[Any, ...]) -> Program:
    options, x, y = request.options, request.x, request.dy
    t, distilled = options.temperature, options.distillation and options.temperature != 1.0
    arrays = x, y, _scale(request), put(request, t) if distilled else None
    static = *static, options.reduction
    if request.operation == DIVERGENCES[0]:
        return Program(function, arrays, static)
    _, of_q = request.library.compute_dtype(y)
    return Program(
        function,
        (*arrays, put(request, factor(request))),
        (*static, request.result_dtype, of_q),
    )


def factor(request: Request) -> float:
    """Return what multiplies the gradients of a divergence by logits over the temperature."""
    options, shape, axis = request.options, request.x.shape, request.axis
    t: float = options.temperature
    positions: int = math.prod(n for a, n in enumerate(shape) if a != axis)
    scale = t if options.distillation else 1.0 / t
    return scale / max(positions, 1) if options.reduction == "mean" else scale


def _loss(request: Request) -> Program:
    losses, options = _module("_losses"), request.options
    numbers = _numbers(request, options)
    form = losses.Form(
        request.axis, options.reduction, request.indices, not _labels_are_checked(request),
        options.ignore_index, *_dtypes(request), request.result_dtype,
    )  # fmt: skip
    function = getattr(losses, request.operation)
    coefficients = losses.Weights(options.weight, options.sample_weight)
    return Program(
        function, (request.x, request.labels, coefficients, options.where, numbers), (form,)
    )


def _of_entries(request: Request) -> Program:
    options, form = request.options, _module("_binary").Form
    smoothing = options.label_smoothing
    numbers = None if smoothing == 0.0 else put(request, [1.0 - smoothing, smoothing / 2.0])
    return Program(
        function(request.operation),
        (request.x, request.labels, options.weight, options.pos_weight, numbers),
        (form(options.reduction, *_dtypes(request), request.result_dtype),),
    )


def _run(request: Request) -> Any:
    """Answer by one compiled function."""
    function, arrays, static = program(request)
    return function(*arrays, *static)


softmax = log_softmax = logsumexp = softmax_vjp = log_softmax_vjp = _run
cross_entropy = cross_entropy_value_and_grad = entropy = entropy_value_and_grad = _run
kl_divergence = kl_divergence_value_and_grad = logmeanexp = _run
sigmoid_cross_entropy = sigmoid_cross_entropy_value_and_grad = _run


def _linear(request: Request) -> Any:
    """Return the reduced loss of a linear layer, and its gradients if they are asked for."""
    return getattr(_module("_linear"), request.operation)(*_layer(request))


linear_cross_entropy = linear_cross_entropy_value_and_grad = _linear


def _layer(request: Request) -> tuple[Any, Any, Any]:
    linear, problem = _module("_linear"), request.linear()
    request.check_labels_of_linear(problem)
    options = problem.options
    n, (height, _) = problem.positions, portable.tiles(problem, request.options.elements)
    height = -(-n // -(-n // height))  # as even as can be: the last tile is filled up
    # A label without a class is nan, as under tracing nobody has looked for one.
    of_a_tile = _module("_losses").Form(
        1, "none", request.indices, True, options.ignore_index, *[request.compute_dtype] * 3
    )
    weights = _module("_losses").Weights(options.weight, options.sample_weight)
    form = linear.Form(of_a_tile, options.reduction, height)
    return (
        linear.Layer(*problem[:3]),
        linear.Rest(problem.labels, weights, options.where, _numbers(request, options)),
        form,
    )


def _numbers(request: Request, options: Any) -> Any:
    cap = options.softcap
    if cap is not None:
        info = request.xp.finfo(request.compute_dtype)
        cap = min(max(cap, float(info.tiny)), float(info.max))
    return _module("_losses").Numbers(
        None if options.label_smoothing == 0.0 else put(request, options.label_smoothing),
        None if options.z_loss == 0.0 else put(request, options.z_loss),
        None if cap is None else put(request, cap),
    )


def _labels_are_checked(request: Request) -> bool:
    """Raise for a label without a class; return whether the labels could be read."""
    reads_values = request.library.reads_values
    if not (request.indices and request.check_labels and reads_values(request.labels)):
        return False
    options = request.options
    found = _module("_losses").every_label_has_a_class(
        request.labels, options.where, request.x.shape, request.axis, options.ignore_index
    )
    # In a traced function what is computed of constants is traced, too.
    if not reads_values(found):
        return False
    if not sys.modules["jax"].device_get(found):
        # It finds the label and names it. With other arrays traced it looks at none.
        return request.target().valid is None
    return True
