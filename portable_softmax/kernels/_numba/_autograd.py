"""The row kernels for torch, with derivatives: the first by a kernel, further ones by the formula.

Two functions serve every operation. `_Value` computes the operation and saves what its gradient
is written in, the output or the logits. `_Gradient` computes the gradient, and is differentiated
through the portable form of the same gradient, which is made of torch's own operations: so there
are derivatives of every order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch

from portable_softmax import _arrays, portable
from portable_softmax.kernels import _numba
from portable_softmax.kernels._calls import LossCall, RowsCall, VjpCall
from portable_softmax.kernels._numba._tensors import on_numpy, taken, unusual

Tensor: TypeAlias = Any  # torch.Tensor, which mypy knows where torch is installed only


class Rule(NamedTuple):
    """How an operation is computed and differentiated."""

    value: Callable[[Tensor], Tensor]  # of the logits, by a kernel
    from_output: bool  # whether the gradient is written in the output, or in the logits
    gradient: Callable[[Tensor, Tensor], Tensor]  # of (output or logits, upstream), by a kernel
    formula: Callable[[Tensor, Tensor], Tensor]  # the same in torch's own operations


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: Rule) -> Tensor:
        y = rule.value(x)
        ctx.rule = rule
        ctx.save_for_backward(y if rule.from_output else x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (saved,) = ctx.saved_tensors
        return _gradient(saved, dy, ctx.rule), None


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, saved: Tensor, dy: Tensor, rule: Rule) -> Tensor:
        ctx.rule = rule
        ctx.save_for_backward(saved, dy)
        return rule.gradient(saved, dy)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases: the upstream gradient may have come from what is saved, by another way.
            inputs = [t.view_as(t) for t in ctx.saved_tensors]
            wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
            dx = ctx.rule.formula(*inputs)
            found = iter(torch.autograd.grad(dx, wanted, u, create_graph=create_graph))
        ds, ddy = (next(found) if needed else None for needed in ctx.needs_input_grad[:2])
        return ds, ddy, None


def _value(x: Tensor, rule: Rule) -> Tensor:
    y: Tensor = _Value.apply(x, rule)
    return y


def _gradient(saved: Tensor, dy: Tensor, rule: Rule) -> Tensor:
    """Compute a gradient by its kernel, or where a transform is on its way by the formula."""
    if unusual(dy) or not _arrays.reads_values(torch, dy):
        return rule.formula(saved, dy)
    if _differentiates(saved) or _differentiates(dy):
        dx: Tensor = _Gradient.apply(saved, dy, rule)
        return dx
    return rule.gradient(saved, dy)


def _differentiates(x: Tensor) -> bool:
    return bool(torch.is_grad_enabled() and x.requires_grad)


def _computed(call: Any) -> Any:
    """Return a call to be differentiated: its gradient, too, is rounded to a half type once."""
    x = call.x.to(call.compute)
    return call._replace(x=x, answer=call.compute)


# --------------------------------------------------------------------------- rows


def softmax(call: RowsCall) -> Tensor:
    """Softmax over the axes; dx = y * (dy - sum(y * dy)) / T."""
    if not _differentiates(call.x):
        return _rows(call, call.x)
    inner, t = _computed(call), call.temperature
    rule = Rule(
        lambda x: _rows(inner, x),
        True,
        lambda y, dy: _over(_vjp("softmax_vjp", inner, y, dy), t),
        lambda y, dy: portable.softmax_vjp(call.xp, y, dy, call.axes) / t,
    )
    return _value(inner.x, rule).to(call.answer)


def log_softmax(call: RowsCall) -> Tensor:
    """log_softmax over the axes; dx = (dy - exp(y) * sum(dy)) / T."""
    if not _differentiates(call.x):
        return _rows(call, call.x)
    inner, t = _computed(call), call.temperature

    def formula(y: Tensor, dy: Tensor) -> Tensor:
        dx: Tensor = (dy - torch.exp(y) * portable.total(call.xp, dy, call.axes)) / t
        return dx

    def gradient(y: Tensor, dy: Tensor) -> Tensor:
        return _over(_vjp("log_softmax_vjp", inner, y, dy, _numba.gradient_of_log_softmax), t)

    rule = Rule(lambda x: _rows(inner, x), True, gradient, formula)
    return _value(inner.x, rule).to(call.answer)


def logsumexp(call: RowsCall) -> Tensor:
    """Logsumexp over the axes, kept with length 1; dx = softmax(x) * dy, 0 in a row of infinity."""
    if not _differentiates(call.x):
        return _rows(call, call.x)
    inner = _computed(call)

    def infinite(x: Tensor) -> Tensor:
        return torch.isinf(x.detach().amax(call.axes, keepdim=True))

    def formula(x: Tensor, dy: Tensor) -> Tensor:
        some = infinite(x)
        p = portable.softmax(call.xp, torch.where(some, 0.0, x), call.axes)
        return torch.where(some, 0.0, p * dy)

    def gradient(x: Tensor, dy: Tensor) -> Tensor:
        p = _rows(inner._replace(operation="softmax"), x)
        first = p[tuple(slice(0, 1) if a in call.axes else slice(None) for a in range(p.ndim))]
        some = bool(torch.isnan(first).any())
        p.mul_(dy)
        return p.masked_fill_(infinite(x), 0.0) if some else p

    rule = Rule(lambda x: _rows(inner, x), False, gradient, formula)
    return _value(inner.x, rule).to(call.answer)


def vjp(call: VjpCall) -> Tensor:
    """softmax_vjp or log_softmax_vjp, differentiable by both arguments."""
    if not (_differentiates(call.x) or _differentiates(call.dy)):
        return _vjp(call.operation, call, call.x, call.dy)
    inner = _computed(call)
    rule = Rule(
        lambda x: x,
        True,
        lambda y, dy: _vjp(call.operation, inner, y, dy),
        lambda y, dy: getattr(portable, call.operation)(call.xp, y, dy, call.axes),
    )
    return _gradient(inner.x, call.dy.to(call.compute), rule).to(call.answer)


def _rows(call: RowsCall, x: Tensor) -> Tensor:
    found: Tensor = taken(getattr(_numba, call.operation)(on_numpy(call, x)), call.answer)
    return found


def _vjp(operation: str, like: Any, y: Tensor, dy: Tensor, kernel: Any = None) -> Tensor:
    call = VjpCall(operation, like.xp, y, dy.contiguous(), like.axes, like.compute, like.answer)
    found: Tensor = taken((kernel or getattr(_numba, operation))(on_numpy(call)), like.answer)
    return found


def _over(dx: Tensor, temperature: float) -> Tensor:
    return dx if temperature == 1.0 else dx.div_(temperature)


# --------------------------------------------------------------------------- losses


def cross_entropy(call: LossCall) -> Tensor:
    """Return the reduced loss; dx = dy * its gradient."""
    if not _differentiates(call.x):
        return _loss(call, call.x)
    inner = _computed(call)
    return _value(inner.x, _loss_rule(inner)).to(call.answer)


def cross_entropy_value_and_grad(call: LossCall) -> tuple[Tensor, Tensor]:
    """Return the reduced loss and its gradient, both differentiable."""
    if not _differentiates(call.x):
        return _loss_and_grad(call, call.x)
    inner = _computed(call)
    rule = _loss_rule(inner)
    loss = _value(inner.x, rule)
    grad = _gradient(inner.x, torch.ones_like(loss), rule)
    return loss.to(call.answer), grad.to(call.answer)


def _loss_rule(call: LossCall) -> Rule:
    def formula(x: Tensor, dy: Tensor) -> Tensor:
        arguments = call.target(), call.axis, call.options
        _, grad = portable.cross_entropy_value_and_grad(call.xp, x, *arguments)
        dx: Tensor = grad * _upstream(call, dy)
        return dx

    def gradient(x: Tensor, dy: Tensor) -> Tensor:
        _, grad = _loss_and_grad(call, x)
        return grad if dy.ndim == 0 and dy == 1.0 else grad.mul_(_upstream(call, dy))

    return Rule(lambda x: _loss(call, x), False, gradient, formula)


def _upstream(call: LossCall, dy: Tensor) -> Tensor:
    """Return dy along the rows of the logits, 0 for a row that is ignored."""
    if dy.ndim == 0 and call.options.reduction != "none":
        return dy
    dy = dy.unsqueeze(call.axis)
    counted = call._replace(check_labels=False).target().counted
    return dy if counted is None else torch.where(counted, dy, 0.0)


def _loss(call: LossCall, x: Tensor) -> Tensor:
    on_memory = on_numpy(call._replace(operation="cross_entropy"), x)
    found: Tensor = taken(_numba.cross_entropy(on_memory), call.answer)
    return found


def _loss_and_grad(call: LossCall, x: Tensor) -> tuple[Tensor, Tensor]:
    on_memory = on_numpy(call._replace(operation="cross_entropy_value_and_grad"), x)
    loss, grad = _numba.cross_entropy_value_and_grad(on_memory)
    return taken(loss, call.answer), taken(grad, call.answer)
