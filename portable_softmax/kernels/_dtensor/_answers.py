"""The answer of a call on DTensors, by what each rank holds: whole rows, or parts of them."""

from __future__ import annotations

from typing import Any

import torch

from portable_softmax import _checks
from portable_softmax.kernels._decide import public
from portable_softmax.kernels._dtensor import _losses, _rows
from portable_softmax.kernels._dtensor._mesh import Axes, Place, constant, place_of
from portable_softmax.kernels._dtensor._watch import watched
from portable_softmax.kernels._request import LINEAR, LOSSES, ROWS, VJPS, Request


def declines(module: Any, request: Request, asked: bool) -> str:
    """Return what is neither differentiated nor reduced here; empty if all is."""
    if not torch.is_grad_enabled():
        return ""
    options = request.options
    loss = options.loss if request.operation in LINEAR else options
    if _require_gradients(request.labels, *(loss or ())):
        return "labels, weights or other options that require gradients"
    is_gradient = request.operation.endswith(("_vjp", "_grad"))
    if is_gradient and _require_gradients(request.x, request.dy, *(options or ())):
        return "gradients that are differentiated again, which torch.no_grad() would prevent"
    return ""


def _require_gradients(*given: Any) -> bool:
    return any(isinstance(a, torch.Tensor) and a.requires_grad for a in given)


def answer(module: Any, request: Request) -> Any:
    """Return the answer, whose shards lie as those of the first array."""
    place = place_of("the first array", request.x)
    if request.operation in LINEAR:
        return _losses.linear(request, place)
    if request.operation in LOSSES:
        return _losses.plain(request, place)
    if not place.dims(request.axes):
        return _whole(request, place)
    if request.operation in (*ROWS, *VJPS):
        return _rows.in_parts(request, place)
    raise _checks.shards(
        "the first array", request.x, f"which cut the rows along {request.axes}",
        "redistribute it first, so that other axes are cut",
    )  # fmt: skip


def _whole(request: Request, place: Place) -> Any:
    """Return the call of each rank on its own rows."""
    axes, every = request.axes, tuple(range(request.x.ndim))
    given = options_here(request, place, every)
    arrays = [watched(request.x.to_local(), request)]
    if request.dy is not None:
        arrays.append(constant("dy", request.dy, place, every))
    reduces = request.operation in ("logsumexp", "logmeanexp")
    if reduces:
        given["keepdims"] = True
    if request.operation == "sparsemax":
        given.pop("alpha")
    axis = axes[0] if len(axes) == 1 else axes
    found = public(request.operation)(*arrays, axis=axis, **given)
    shape = [1 if reduces and a in axes else n for a, n in enumerate(place.shape)]
    there = place.along(every, shape)
    return tuple(map(there.holds, found)) if isinstance(found, tuple) else there.holds(found)


def options_here(request: Request, place: Place, every: Axes) -> dict[str, Any]:
    """Return the options that are not neutral, of arrays the part of this rank."""
    if request.options is None:
        return {}
    given = {}
    for name, value in request.options._asdict().items():
        if isinstance(value, torch.Tensor):
            given[name] = constant(name, value, place, every[len(every) - value.ndim :])
        elif value != request.options._field_defaults[name]:
            given[name] = value
    return given
