"""The kernels as torch knows them: for autograd, and for torch.compile and its fake tensors.

What is traced takes an operator, which has a fake, which gives shapes, and a derivative. What is
not takes the same derivative as a Function of autograd, whose call costs the host a fraction of an
operator's. The derivatives of the forward functions are kernels as well; those of the derivatives,
for the second order, are the portable mathematics.
"""

from __future__ import annotations

import sys
from typing import Any

from portable_softmax import libraries, portable
from portable_softmax.kernels._calls import LossCall, RowsCall, VjpCall
from portable_softmax.kernels._triton import _launch

torch: Any = sys.modules["torch"]  # whose tensors are here, so that it is imported


def _kept(x: Any, axes: Any) -> list[int]:
    return [1 if a in axes else n for a, n in enumerate(x.shape)]


def _differentiable(operator: Any, launched: Any, keep: Any, backward: Any) -> Any:
    """Return what takes an operator for tensors that are traced, and a Function for others."""

    class Launched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = launched(*inputs)
            keep(ctx, inputs, output)
            if isinstance(output, tuple):
                ctx.mark_non_differentiable(*output[1:])
            return output

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            return backward(ctx, *upstream)

    operator.register_autograd(backward, setup_context=keep)

    def taken(x: Any, *rest: Any) -> Any:
        traced = not libraries.reads_values(torch, x)
        return operator(x, *rest) if traced else Launched.apply(x, *rest)

    return taken


def _mapped() -> bool:
    """Return whether a functional transform is at work, inside of which no kernel runs."""
    return torch._C._functorch.peek_interpreter_stack() is not None


# --------------------------------------------------------------------------- softmax and so on


def _rows(x: Any, axes: Any, mask: Any, temperature: float, operation: str) -> Any:
    """softmax, log_softmax or logsumexp with its axes kept."""
    xp = libraries.namespace(x)
    compute, answer = libraries.compute_dtype(xp, x)
    axes = tuple(axes)
    return _launch.forward(RowsCall(operation, xp, x, axes, mask, temperature, compute, answer))


_rows_operator = torch.library.custom_op(
    "portable_softmax::rows",
    _rows,
    mutates_args=(),
    schema="(Tensor x, int[] axes, Tensor? mask, float temperature, str operation) -> Tensor",
)


@_rows_operator.register_fake
def _(x: Any, axes: Any, mask: Any, temperature: float, operation: str) -> Any:
    if operation == "logsumexp":
        return x.new_empty(_kept(x, axes))
    return torch.empty_like(x)


def _keep_rows(ctx: Any, inputs: Any, output: Any) -> None:
    x, ctx.axes, mask, ctx.temperature, ctx.operation = inputs
    saved = (x, mask, output) if ctx.operation == "logsumexp" else (None, None, output)
    ctx.save_for_backward(*saved)


def _rows_backward(ctx: Any, dy: Any) -> Any:
    x, mask, y = ctx.saved_tensors
    if ctx.operation != "logsumexp":
        dx = _pulled_back(f"{ctx.operation}_vjp", y, dy, ctx.axes, ctx.temperature)
    elif torch.is_grad_enabled() or _mapped():
        # An infinite value has the derivative 0 in every entry.
        dx = torch.where(torch.isinf(y), 0.0, dy * rows(x, ctx.axes, mask, 1.0, "softmax"))
    else:
        traced = not libraries.reads_values(torch, x)
        pulled = _logsumexp_backward_operator if traced else _logsumexp_backward
        dx = pulled(x, dy, ctx.axes, mask)
    return dx, None, None, None, None


rows = _differentiable(_rows_operator, _rows, _keep_rows, _rows_backward)


def _pulled_back(operation: str, y: Any, dy: Any, axes: Any, temperature: float) -> Any:
    """Take the kernel, or inside of a functional transform the portable form."""
    if not _mapped():
        return pull_back(y, dy, axes, temperature, operation)
    xp = libraries.namespace(y)
    compute, answer = libraries.compute_dtype(xp, y)
    dx = getattr(portable, operation)(xp, y.to(compute), dy.to(compute), tuple(axes))
    return (dx if temperature == 1.0 else dx / temperature).to(answer)


def _logsumexp_backward(x: Any, dy: Any, axes: Any, mask: Any) -> Any:
    """dy * softmax(x), for dy with the axes of a logsumexp that keeps them."""
    xp = libraries.namespace(x)
    compute, answer = libraries.compute_dtype(xp, x)
    call = RowsCall("logsumexp", xp, x, tuple(axes), mask, 1.0, compute, answer)
    return _launch.forward(call, dy)


_logsumexp_backward_operator = torch.library.custom_op(
    "portable_softmax::logsumexp_backward",
    _logsumexp_backward,
    mutates_args=(),
    schema="(Tensor x, Tensor dy, int[] axes, Tensor? mask) -> Tensor",
)


@_logsumexp_backward_operator.register_fake
def _(x: Any, dy: Any, axes: Any, mask: Any) -> Any:
    return torch.empty_like(x)


def _pull_back(y: Any, dy: Any, axes: Any, temperature: float, operation: str) -> Any:
    """softmax_vjp or log_softmax_vjp, over a temperature."""
    xp = libraries.namespace(y)
    compute, answer = libraries.compute_dtype(xp, y)
    call = VjpCall(operation, xp, y, dy, tuple(axes), compute, answer)
    return _launch.pull_back(call, temperature)


_pull_back_operator = torch.library.custom_op(
    "portable_softmax::pull_back",
    _pull_back,
    mutates_args=(),
    schema="(Tensor y, Tensor dy, int[] axes, float temperature, str operation) -> Tensor",
)


@_pull_back_operator.register_fake
def _(y: Any, dy: Any, axes: Any, temperature: float, operation: str) -> Any:
    return torch.empty_like(y)


def _keep_pull_back(ctx: Any, inputs: Any, output: Any) -> None:
    y, dy, ctx.axes, ctx.temperature, ctx.operation = inputs
    ctx.save_for_backward(y, dy)


def _pull_back_backward(ctx: Any, g: Any) -> Any:
    """Differentiate y (dy - sum(y dy)), or dy - exp(y) sum(dy): see the public docstrings."""
    y, dy = ctx.saved_tensors
    compute, answer = libraries.compute_dtype(libraries.namespace(y), y)
    y, dy, g, axes = y.to(compute), dy.to(compute), g.to(compute), tuple(ctx.axes)
    g = g if ctx.temperature == 1.0 else g / ctx.temperature
    if ctx.operation == "softmax_vjp":
        inner = g * y
        total = inner.sum(axes, keepdim=True)
        d_y = g * (dy - (y * dy).sum(axes, keepdim=True)) - dy * total
        d_dy = inner - y * total
    else:
        masked = torch.isinf(y)
        p = torch.exp(y)
        d_y = -g * p * torch.where(masked, 0.0, dy).sum(axes, keepdim=True)
        d_dy = torch.where(masked, 0.0, g - (g * p).sum(axes, keepdim=True))
    return d_y.to(answer), d_dy.to(answer), None, None, None


pull_back = _differentiable(_pull_back_operator, _pull_back, _keep_pull_back, _pull_back_backward)


# --------------------------------------------------------------------------- the loss


def _losses(
    x: Any, labels: Any, axis: int, weight: Any, ignore_index: Any, label_smoothing: float,
    z_loss: float, softcap: Any, mask: Any, indices: bool, check_labels: bool, gradient: bool,
) -> Any:  # fmt: skip
    """Return each position's loss, its gradient and its label's weight; empty if not there."""
    rest = (ignore_index, label_smoothing, z_loss, softcap)
    call = _call(x, labels, axis, weight, rest, mask, indices, check_labels)
    loss, grad, weights = _launch.losses(call, gradient=gradient)
    # What is not there is empty, and no two of them one tensor.
    grad = x.new_empty(0) if grad is None else grad
    return loss, grad, x.new_empty(0) if weights is None else weights


def _call(
    x: Any, labels: Any, axis: int, weight: Any, rest: Any, mask: Any, indices: bool, check: bool
) -> LossCall:
    xp = libraries.namespace(x)
    compute, answer = libraries.compute_dtype(xp, x)
    ignore_index, label_smoothing, z_loss, softcap = rest
    options = portable.Options(weight, ignore_index, label_smoothing, z_loss, softcap, mask, "none")
    return LossCall("cross_entropy_value_and_grad", xp, x, labels, indices, axis, options,
                    check, compute, answer)  # fmt: skip


_losses_operator = torch.library.custom_op(
    "portable_softmax::losses",
    _losses,
    mutates_args=(),
    schema="(Tensor x, Tensor labels, int axis, Tensor? weight, int? ignore_index, "
    "float label_smoothing, float z_loss, float? softcap, Tensor? mask, bool indices, "
    "bool check_labels, bool gradient) -> (Tensor, Tensor, Tensor)",
)


@_losses_operator.register_fake
def _(
    x: Any, labels: Any, axis: int, weight: Any, ignore_index: Any, label_smoothing: float,
    z_loss: float, softcap: Any, mask: Any, indices: bool, check_labels: bool, gradient: bool,
) -> Any:  # fmt: skip
    compute, _ = libraries.compute_dtype(libraries.namespace(x), x)
    shape = [n for a, n in enumerate(x.shape) if a != axis]
    weighs = indices and (weight is not None or ignore_index is not None)
    return (
        x.new_empty(shape, dtype=compute),
        torch.empty_like(x) if gradient else x.new_empty(0),
        x.new_empty(shape, dtype=compute) if weighs else x.new_empty(0),
    )


def _keep_losses(ctx: Any, inputs: Any, output: Any) -> None:
    x, labels, ctx.axis, weight, *ctx.options, mask, ctx.indices, _, _ = inputs
    ctx.save_for_backward(x, labels, weight, mask)


def _losses_backward(ctx: Any, dloss: Any, dgrad: Any, dweights: Any) -> Any:
    x, labels, weight, mask = ctx.saved_tensors
    if torch.is_grad_enabled() or _mapped():  # the portable form can be differentiated again
        call = _call(x, labels, ctx.axis, weight, ctx.options, mask, ctx.indices, False)
        _, grad = portable.cross_entropy_value_and_grad(
            call.xp, x.to(call.compute), call.target(), ctx.axis, call.options
        )
        dx = (grad * dloss.unsqueeze(ctx.axis)).to(x.dtype)
    else:
        options = (weight, *ctx.options, mask, ctx.indices)
        traced = not libraries.reads_values(torch, x)
        pulled = _losses_backward_operator if traced else _losses_backward_launched
        dx = pulled(x, labels, dloss, ctx.axis, *options)
    return (dx, *(None,) * 11)


def _losses_backward_launched(
    x: Any, labels: Any, dloss: Any, axis: int, weight: Any, ignore_index: Any,
    label_smoothing: float, z_loss: float, softcap: Any, mask: Any, indices: bool,
) -> Any:  # fmt: skip
    """Pull dloss back to the logits: the gradient is made from the logits, and kept by nobody."""
    rest = (ignore_index, label_smoothing, z_loss, softcap)
    call = _call(x, labels, axis, weight, rest, mask, indices, False)
    _, grad, _ = _launch.losses(call, gradient=True, upstream=dloss)
    return grad


_losses_backward_operator = torch.library.custom_op(
    "portable_softmax::losses_backward",
    _losses_backward_launched,
    mutates_args=(),
    schema="(Tensor x, Tensor labels, Tensor dloss, int axis, Tensor? weight, int? ignore_index, "
    "float label_smoothing, float z_loss, float? softcap, Tensor? mask, bool indices) -> Tensor",
)


@_losses_backward_operator.register_fake
def _(
    x: Any, labels: Any, dloss: Any, axis: int, weight: Any, ignore_index: Any,
    label_smoothing: float, z_loss: float, softcap: Any, mask: Any, indices: bool,
) -> Any:  # fmt: skip
    return torch.empty_like(x)


losses = _differentiable(_losses_operator, _losses, _keep_losses, _losses_backward)
