"""A linear layer with a loss as an operator of torch.library, for what torch.compile traces.

The compiler sees one call, whose tiles it does not take apart. Its gradients are made with the loss
and wait for one number from upstream, as in eager code; with a loss for each position the backward
pass is another call.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import torch

from portable_softmax import libraries
from portable_softmax._typing import Tensor
from portable_softmax.kernels._request import LinearOptions, LossOptions, Request

_SCHEMA = (
    "(Tensor hidden, Tensor classifier, Tensor? bias, Tensor labels, Tensor? weight, "
    "Tensor? where, Tensor? sample, Tensor? upstream, bool[] wanted, str engine, "
    "ScalarType compute, int? ignore_index, float label_smoothing, float z_loss, "
    "float? softcap, str reduction, int elements) -> (Tensor, Tensor, Tensor, Tensor)"
)


def answer(engine: str, request: Request, wanted: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """Return the loss and the gradients, in the dtype of the computation; empty if not wanted."""
    layer, loss = request.options, request.options.loss
    found: tuple[Tensor, ...] = _linear(
        request.x, layer.classifier, layer.bias, request.labels, loss.weight, loss.where,
        loss.sample_weight, None, list(wanted), engine, request.compute_dtype, loss.ignore_index,
        loss.label_smoothing, loss.z_loss, loss.softcap, loss.reduction, int(layer.elements),
    )  # fmt: skip
    return found


# It asks which positions count, and waits for the device: no CUDA graph can record that. Versions
# before 2.8 cannot be told.
_TAGS: dict[str, Any] = {}
if hasattr(torch.Tag, "cudagraph_unsafe"):
    _TAGS["tags"] = (torch.Tag.cudagraph_unsafe,)


@partial(
    torch.library.custom_op, "portable_softmax::linear", mutates_args=(), schema=_SCHEMA, **_TAGS
)
def _linear(
    hidden: Tensor, classifier: Tensor, bias: Tensor | None, labels: Tensor,
    weight: Tensor | None, where: Tensor | None, sample: Tensor | None, upstream: Tensor | None,
    wanted: list[bool], engine: str, compute: Any, ignore_index: int | None,
    label_smoothing: float, z_loss: float, softcap: float | None, reduction: str, elements: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return what `answer` does; `upstream` multiplies the gradient of each position."""
    library, module = libraries.library_of(hidden), import_module(engine)
    loss = LossOptions(
        weight, ignore_index, label_smoothing, z_loss, softcap, where, reduction, None, sample
    )
    request = Request(
        "linear_cross_entropy", library, hidden, library.dtype(hidden.dtype).name,
        (hidden.ndim - 1,), compute, hidden.dtype, "",
        LinearOptions(classifier, bias, loss, elements), (), None, labels,
        labels.ndim < hidden.ndim, False,
    )  # fmt: skip
    value, grads = module.answer(request, module.Wanted(*wanted), upstream)
    none = hidden.new_empty(0)
    found = (value, *(none.clone() if g is None else g for g in grads))
    return tuple(t.contiguous() for t in found)


@_linear.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, classifier, bias, *_ = arguments
    wanted, compute, reduction = arguments[8], arguments[10], arguments[15]
    rows = hidden.reshape(-1, hidden.shape[-1])
    loss = hidden.new_empty(rows.shape[:1] if reduction == "none" else [], dtype=compute)
    grads = [
        like.new_empty(like.shape, dtype=compute) if want else hidden.new_empty(0)
        for want, like in zip(wanted, (rows, classifier, bias), strict=True)
    ]
    return loss, *grads


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wanted, ctx.rest, ctx.each = inputs[8], inputs[9:], inputs[15] == "none"
    ctx.save_for_backward(*inputs[:7], *(() if ctx.each else output[1:]))


def _backward(ctx: Any, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, grads = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
    if ctx.each:
        _, *grads = _linear(*inputs, upstream, ctx.wanted, *ctx.rest)
    found = []
    for want, like, grad in zip(ctx.wanted, inputs, grads, strict=False):
        if want and not ctx.each:
            grad = grad * upstream
        found.append(grad.to(like.dtype).reshape(like.shape) if want else None)
    return *found, *(None,) * 14


_linear.register_autograd(_backward, setup_context=_keep)
