"""The kernels as operators of torch.library, for what torch.compile traces.

One operator gives the value of any operation of any kernel and one the gradient. A fake gives the
shapes; the derivative is that of `_autograd`. What is traced has no labels to look at: one without
a class gives nan.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch

from portable_softmax import libraries
from portable_softmax._typing import Tensor
from portable_softmax.kernels._request import (
    LOSSES,
    PLAIN_LOSS,
    PLAIN_ROWS,
    LossOptions,
    Request,
    RowOptions,
    active,
)
from portable_softmax.kernels._torch import _autograd, _gradients, _inductor

_SCHEMA = (
    "(Tensor x, Tensor? dy, Tensor? labels, Tensor? weight, Tensor? where, Tensor? sample, "
    "str engine, str operation, int[] axes, float temperature, int? ignore_index, "
    "float label_smoothing, float z_loss, float? softcap, str reduction, ScalarType? dtype)"
)
_INTO = f"{_SCHEMA[:-1]}, Tensor(a!) out) -> ()"

_NAMESPACE: Any = torch.ops.portable_softmax
# An import that was interrupted has left some of the operators, which cannot be defined again.
if _LEFT := vars(_NAMESPACE).get("library"):
    _LEFT._destroy()
_LIBRARY = _NAMESPACE.library = torch.library.Library("portable_softmax", "FRAGMENT")


def _operator(name: str, schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Make a function an operator for tensors of any device.

    `custom_op` puts checks around it that take as long as the loss of a small batch.
    """

    def define(function: Callable[..., Any]) -> Any:
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.portable_softmax, name).default

    return define


def _shapes_of(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Make a function the fake of an operator, which a trace calls for shapes."""
    return partial(torch.library.register_fake, f"portable_softmax::{name}", lib=_LIBRARY)


def answer(engine: str, request: Request) -> Any:
    """Return the answer of a traced call, by the kernels of the module `engine`."""
    value, grad = _value(*_arguments(engine, request))
    return (value, grad) if request.operation == "cross_entropy_value_and_grad" else value


def _gradient_of(engine: str, request: Request, dy: Tensor) -> Tensor:
    found: Tensor = _gradient(*_arguments(engine, request._replace(dy=dy)))
    return found


class _Arguments(NamedTuple):
    """Those of the operators."""

    x: Tensor
    dy: Tensor | None
    labels: Tensor | None
    weight: Tensor | None
    where: Tensor | None
    sample: Tensor | None
    engine: str
    operation: str
    axes: list[int]
    temperature: float
    ignore_index: int | None
    label_smoothing: float
    z_loss: float
    softcap: float | None
    reduction: str
    dtype: Any


def _arguments(engine: str, request: Request) -> tuple[Any, ...]:
    """Return a request as the operators take it."""
    options = request.options
    is_loss = request.operation in LOSSES
    rows, loss = (PLAIN_ROWS, options) if is_loss else (options, PLAIN_LOSS)
    return (
        *_autograd.tensors(request), engine, request.operation, list(request.axes),
        rows.temperature, loss.ignore_index, loss.label_smoothing, loss.z_loss, loss.softcap,
        loss.reduction, options.dtype if request.active else None,
    )  # fmt: skip


def _request(*arguments: Any) -> tuple[Any, Request]:
    """Return the kernel's module and the request that the operators' arguments stand for."""
    call = _Arguments(*arguments)
    x, library = call.x, libraries.library_of(call.x)
    options: Any
    neutral: Any
    if call.operation in LOSSES:
        neutral = PLAIN_LOSS
        options = LossOptions(
            call.weight, call.ignore_index, call.label_smoothing, call.z_loss, call.softcap,
            call.where, call.reduction, call.dtype, call.sample,
        )  # fmt: skip
    else:
        options, neutral = RowOptions(call.where, call.temperature, dtype=call.dtype), PLAIN_ROWS
    request = Request(
        call.operation, library, x, library.dtype(x.dtype).name, tuple(call.axes),
        *library.compute_dtype(x), "", options, active(options, neutral), call.dy, call.labels,
        call.labels is None or call.labels.ndim < x.ndim, False,
    )  # fmt: skip
    return import_module(call.engine), request


def _as_promised(found: Tensor, x: Tensor) -> Tensor:
    """Return what is as large as `x` with the strides of ``empty_like(x)``.

    Compiled code goes by them. None is made beside the answer: memory that is taken and given back
    with it is memory that both are given anew.
    """
    if found.stride() == x.stride():
        return found
    strides = torch.empty_like(x, device="meta").stride()
    if found.stride() == strides:
        return found
    return found.new_empty_strided(found.shape, strides).copy_(found)


def _shaped(request: Request) -> tuple[Tensor, Tensor]:
    """Return tensors like those of an answer."""
    x, none = request.x, request.x.new_empty(0)
    answer = x.dtype if request.options.dtype is None else request.options.dtype
    if request.operation in LOSSES:
        positions = [n for a, n in enumerate(x.shape) if a != request.axis]
        loss = x.new_empty(positions if request.options.reduction == "none" else [], dtype=answer)
        wants_gradient = request.operation == "cross_entropy_value_and_grad"
        return loss, torch.empty_like(x) if wants_gradient else none
    if request.operation == "logsumexp":
        return x.new_empty(request.reduced_shape(), dtype=answer), none
    return torch.empty_like(x, dtype=answer), none


@_operator("value", f"{_SCHEMA} -> (Tensor, Tensor)")
def _value(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the answer of a kernel; the second is empty where there is only one."""
    engine, request = _request(*arguments)
    found, x = _gradients.value(engine, request), request.x
    if isinstance(found, tuple):
        return found[0], _as_promised(found[1], x)
    reduced = request.operation in (*LOSSES, "logsumexp")
    return found.contiguous() if reduced else _as_promised(found, x), x.new_empty(0)


@_shapes_of("value")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    _register()
    return _shaped(_request(*arguments)[1])


@_operator("gradient", f"{_SCHEMA} -> Tensor")
def _gradient(*arguments: Any) -> Tensor:
    """Return the gradient with respect to the logits, from what was kept and upstream."""
    engine, request = _request(*arguments)
    found = _gradients.gradient(engine, request._replace(dy=None), request.dy)
    return _as_promised(found, request.x)


@_shapes_of("gradient")
def _(*arguments: Any) -> Tensor:
    _register()
    return torch.empty_like(arguments[0])


# --------------------------------------------------------------------------- over an argument


@_operator("value_into", _INTO)
def _value_into(*arguments: Any) -> None:
    """Write the value to `out`, which may be the logits."""
    *given, out = arguments
    engine, request = _request(*given)
    _put(_gradients.value(engine, request._replace(out=out)), out)


@_operator("gradient_into", _INTO)
def _gradient_into(*arguments: Any) -> None:
    """Write the gradient to `out`, which may be what was kept or the upstream gradient."""
    *given, out = arguments
    engine, request = _request(*given)
    found = _gradients.gradient(engine, request._replace(dy=None, out=out), request.dy)
    _put(found, out)


def _put(found: Tensor, out: Tensor) -> None:
    """Copy what a kernel has put elsewhere, as that of small arrays does."""
    if found.data_ptr() != out.data_ptr():
        out.copy_(found)


for _name in ("value_into", "gradient_into"):
    _shapes_of(_name)(lambda *_: None)


def _value_over(*arguments: Any) -> tuple[Any, ...]:
    """Return which arguments a value may be written over."""
    call = _Arguments(*arguments)
    rows = call.operation in ("softmax", "log_softmax") and call.dtype is None
    return (call.x,) if rows and not import_module(call.engine).TENSORS else ()


def _gradient_over(*arguments: Any) -> tuple[Any, ...]:
    """Return which arguments a gradient may be written over: by what reads them no further."""
    call = _Arguments(*arguments)
    if import_module(call.engine).TENSORS or call.x.dtype not in (torch.float32, torch.float64):
        return ()
    if call.operation == "cross_entropy":
        return (call.x,)
    # That of a masked softmax is taken again if it is not finite.
    rows = call.operation in ("softmax", "log_softmax") and call.where is None
    return (call.dy, call.x) if rows else ()


def _register() -> None:
    """Tell Inductor of them, once it is there."""
    _inductor.register(_value, _value_into, _value_over)
    _inductor.register(_gradient, _gradient_into, _gradient_over)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, request = _request(*inputs)
    ctx.engine = inputs[6]
    _autograd.keep(ctx, request, output[0])


def _backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    request = _autograd.restored(ctx)
    dx, ddy = _autograd.pulled_back(
        request, upstream[:1], request.library.transform, partial(_gradient_of, ctx.engine)
    )
    return dx, ddy, *(None,) * 14


torch.library.register_autograd(
    "portable_softmax::value", _backward, setup_context=_keep, lib=_LIBRARY
)
