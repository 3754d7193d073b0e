"""A linear layer with a loss under torch's autograd: the gradients are made with the loss.

They wait for one number from upstream. The first backward pass multiplies them in their own memory
and gives them away, since a classifier's gradient may be larger than all else; a further pass makes
them again. So does every pass through a loss for each position, with a number for each. Where torch
follows the derivative itself, the formula in its own operations takes over.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from portable_softmax import portable
from portable_softmax._typing import Tensor
from portable_softmax.kernels._request import Request
from portable_softmax.kernels._torch import _linear_operator

_FEW = 1 << 16  # logits that the compiler keeps: an operator would cost more


def declines(engine: Any, request: Request, asked: bool) -> str:
    """Return what is not differentiated or traced here; empty if all is."""
    if request.tracing and (why := _not_traced(request, asked)):
        return why
    if not torch.is_grad_enabled():
        return ""
    if any(t is not None and t.requires_grad for t in _constants(request)):
        return "labels or weights that require gradients"
    value_and_grad = request.operation == "linear_cross_entropy_value_and_grad"
    if value_and_grad and any(t is not None and t.requires_grad for t in _inputs(request)):
        return "gradients that are differentiated again"
    return ""


def _not_traced(request: Request, asked: bool) -> str:
    loss, positions = request.options.loss, request.x.shape[:-1]
    numbers = loss.label_smoothing, loss.z_loss, loss.softcap
    if not all(request.library.is_known(n) for n in numbers if n is not None):
        return "a number that may be another one in the next call"
    if loss.ignore_index is not None and loss.ignore_index >= 2**63:
        return "an ignore_index of 64 bits"
    few = math.prod(positions) * request.options.classifier.shape[0] < _FEW
    return "too few logits" if few and not asked else ""


def answer(engine: Any, request: Request) -> Any:
    """Return the answer of a call, with its derivatives where torch asks for them."""
    inputs = _inputs(request)
    if request.tracing:
        value_and_grad = request.operation == "linear_cross_entropy_value_and_grad"
        follows = torch.is_grad_enabled()
        wanted = tuple(
            t is not None and (value_and_grad or (follows and t.requires_grad)) for t in inputs
        )
        loss, *grads = _linear_operator.answer(engine.__name__, request, wanted)
        if not value_and_grad:
            return loss
        made = [g if want else None for g, want in zip(grads, wanted, strict=True)]
        return loss, portable.Gradients(*made)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _Linear.apply(engine, request, *inputs, *_constants(request))
    return getattr(engine, request.operation)(request)


def _inputs(request: Request) -> tuple[Tensor | None, ...]:
    return request.x, request.options.classifier, request.options.bias


def _constants(request: Request) -> tuple[Tensor | None, ...]:
    loss = request.options.loss
    return request.labels, loss.weight, loss.where, loss.sample_weight


def _with(request: Request, tensors: tuple[Tensor | None, ...]) -> Request:
    """Return a request with these in place of its tensors."""
    hidden, classifier, bias, labels, weight, where, sample = tensors
    options = request.options
    loss = options.loss._replace(weight=weight, where=where, sample_weight=sample)
    options = options._replace(classifier=classifier, bias=bias, loss=loss)
    return request._replace(x=hidden, labels=labels, options=options)


class _Linear(torch.autograd.Function):
    """A call, differentiable with respect to hidden, classifier and bias."""

    @staticmethod
    def forward(ctx: Any, engine: Any, request: Request, *tensors: Tensor | None) -> Any:
        wanted = engine.Wanted(*ctx.needs_input_grad[2:5])
        ctx.each = request.options.loss.reduction == "none"
        nothing = engine.Wanted(False, False, False)
        loss, grads = engine.answer(request, nothing if ctx.each else wanted)
        ctx.engine, ctx.wanted = engine, wanted
        ctx.kept = {} if ctx.each else {"gradients": True}
        ctx.save_for_backward(*tensors, *grads)
        ctx.request = _with(request._replace(check_labels=False), (None,) * 7)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, hidden, classifier, bias = ctx.saved_tensors
        request = _with(ctx.request, tuple(tensors))
        grads: Any = (hidden, classifier, bias)
        if torch.is_grad_enabled():
            grads = _by_formula(request, ctx.wanted, upstream)
        else:
            grads = _scaled(ctx, request, grads, upstream)
        found = [
            g if g is None else g.to(like.dtype).reshape(like.shape)
            for g, like in zip(grads, tensors, strict=False)
        ]
        return None, None, *found, None, None, None, None


def _scaled(ctx: Any, request: Request, kept: Any, upstream: Tensor) -> Any:
    """Return the gradients times what comes from upstream, in the memory of those that are kept."""
    if request.library.tracing(upstream):
        # Looked at afterwards: another thread may have taken what was multiplied here.
        found = [g if g is None else g * upstream.to(g.dtype) for g in kept]
        return found if ctx.kept else _by_formula(request, ctx.wanted, upstream)
    if ctx.each:
        upstream = upstream.to(request.compute_dtype).reshape(-1)
        return ctx.engine.answer(request, ctx.wanted, upstream)[1]
    taken = ctx.kept.pop("gradients", False)  # in one step, as threads may share a graph
    grads = kept if taken else ctx.engine.answer(request, ctx.wanted)[1]
    # Aliases whose changes torch does not count: a graph that is retained still holds what was
    # saved, and a further pass would be refused.
    grads = [g if g is None else g.data for g in grads]
    known = upstream.device.type == "cpu"  # elsewhere reading it would wait for the device
    if not (known and upstream.item() == 1.0):
        for g in grads:
            if g is not None:
                g.mul_(upstream.to(g.dtype))
    return grads


def _by_formula(request: Request, wanted: Any, upstream: Tensor) -> list[Tensor | None]:
    """Return the same in torch's own operations, which torch differentiates again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: what comes from upstream may depend on the inputs in another way.
        inputs = [
            None if t is None else t.view_as(t) if again else t.detach().requires_grad_()
            for t in _inputs(request)
        ]
        problem = _with(request, (*inputs, *_constants(request))).linear()
        loss = portable.linear_cross_entropy(request.xp, problem, request.options.elements)
        loss = loss.to(request.answer_dtype).reshape(upstream.shape)
        asked = [t for t, want in zip(inputs, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(loss, asked, upstream, create_graph=again))
    return [next(found) if want else None for want in wanted]
