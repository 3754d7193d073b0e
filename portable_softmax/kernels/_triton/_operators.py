"""The kernels as operators of torch: for autograd, and for torch.compile and its fake tensors.

Each has a fake, which gives shapes, and a derivative. The derivatives of the forward functions
are kernels as well; those of the derivatives, for the second order, are the portable mathematics.
"""

from __future__ import annotations

import sys
from typing import Any

from portable_softmax import _arrays, portable
from portable_softmax.kernels._calls import LossCall, RowsCall, VjpCall
from portable_softmax.kernels._triton import _launch

torch: Any = sys.modules["torch"]  # whose tensors are here, so that it is imported


def _kept(x: Any, axes: Any) -> list[int]:
    return [1 if a in axes else n for a, n in enumerate(x.shape)]


def _mapped() -> bool:
    """Return whether a functional transform is at work, inside of which no kernel runs."""
    return torch._C._functorch.peek_interpreter_stack() is not None


# --------------------------------------------------------------------------- softmax and so on


@torch.library.custom_op(
    "portable_softmax::rows",
    mutates_args=(),
    schema="(Tensor x, int[] axes, Tensor? mask, float temperature, str operation) -> Tensor",
)
def rows(x: Any, axes: Any, mask: Any, temperature: float, operation: str) -> Any:
    """softmax, log_softmax or logsumexp with its axes kept."""
    xp = _arrays.namespace(x)
    compute, answer = _arrays.compute_dtype(xp, x)
    axes = tuple(axes)
    return _launch.forward(RowsCall(operation, xp, x, axes, mask, temperature, compute, answer))


@rows.register_fake
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
    if ctx.operation == "logsumexp":
        p = rows(x, ctx.axes, mask, 1.0, "softmax")
        # An infinite value has the derivative 0 in every entry.
        dx = torch.where(torch.isinf(y), 0.0, dy * p)
    else:
        dx = _pulled_back(f"{ctx.operation}_vjp", y, dy, ctx.axes)
        dx = dx if ctx.temperature == 1.0 else dx / ctx.temperature
    return dx, None, None, None, None


rows.register_autograd(_rows_backward, setup_context=_keep_rows)


def _pulled_back(operation: str, y: Any, dy: Any, axes: Any) -> Any:
    """Take the kernel, or inside of a functional transform the portable form."""
    if not _mapped():
        return pull_back(y, dy, axes, operation)
    xp = _arrays.namespace(y)
    compute, answer = _arrays.compute_dtype(xp, y)
    return getattr(portable, operation)(xp, y.to(compute), dy.to(compute), tuple(axes)).to(answer)


@torch.library.custom_op(
    "portable_softmax::pull_back",
    mutates_args=(),
    schema="(Tensor y, Tensor dy, int[] axes, str operation) -> Tensor",
)
def pull_back(y: Any, dy: Any, axes: Any, operation: str) -> Any:
    """softmax_vjp or log_softmax_vjp."""
    xp = _arrays.namespace(y)
    compute, answer = _arrays.compute_dtype(xp, y)
    return _launch.pull_back(VjpCall(operation, xp, y, dy, tuple(axes), compute, answer))


@pull_back.register_fake
def _(y: Any, dy: Any, axes: Any, operation: str) -> Any:
    return torch.empty_like(y)


def _keep_pull_back(ctx: Any, inputs: Any, output: Any) -> None:
    y, dy, ctx.axes, ctx.operation = inputs
    ctx.save_for_backward(y, dy)


def _pull_back_backward(ctx: Any, g: Any) -> Any:
    """Differentiate y (dy - sum(y dy)), or dy - exp(y) sum(dy): see the public docstrings."""
    y, dy = ctx.saved_tensors
    compute, answer = _arrays.compute_dtype(_arrays.namespace(y), y)
    y, dy, g, axes = y.to(compute), dy.to(compute), g.to(compute), tuple(ctx.axes)
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
    return d_y.to(answer), d_dy.to(answer), None, None


pull_back.register_autograd(_pull_back_backward, setup_context=_keep_pull_back)


# --------------------------------------------------------------------------- the loss


@torch.library.custom_op(
    "portable_softmax::losses",
    mutates_args=(),
    schema="(Tensor x, Tensor labels, int axis, Tensor? weight, int? ignore_index, "
    "float label_smoothing, float z_loss, float? softcap, Tensor? mask, bool indices, "
    "bool check_labels, bool gradient) -> (Tensor, Tensor, Tensor)",
)
def losses(
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
    xp = _arrays.namespace(x)
    compute, answer = _arrays.compute_dtype(xp, x)
    ignore_index, label_smoothing, z_loss, softcap = rest
    options = portable.Options(weight, ignore_index, label_smoothing, z_loss, softcap, mask, "none")
    return LossCall("cross_entropy_value_and_grad", xp, x, labels, indices, axis, options,
                    check, compute, answer)  # fmt: skip


@losses.register_fake
def _(
    x: Any, labels: Any, axis: int, weight: Any, ignore_index: Any, label_smoothing: float,
    z_loss: float, softcap: Any, mask: Any, indices: bool, check_labels: bool, gradient: bool,
) -> Any:  # fmt: skip
    compute, _ = _arrays.compute_dtype(_arrays.namespace(x), x)
    shape = [n for a, n in enumerate(x.shape) if a != axis]
    weighs = indices and (weight is not None or ignore_index is not None)
    return (
        x.new_empty(shape, dtype=compute),
        torch.empty_like(x) if gradient else x.new_empty(0),
        x.new_empty(shape, dtype=compute) if weighs else x.new_empty(0),
    )


def _keep_losses(ctx: Any, inputs: Any, output: Any) -> None:
    x, labels, ctx.axis, weight, *ctx.options, mask, ctx.indices, _, _ = inputs
    ctx.save_for_backward(x, labels, weight, mask, output[1])


def _losses_backward(ctx: Any, dloss: Any, dgrad: Any, dweights: Any) -> Any:
    x, labels, weight, mask, grad = ctx.saved_tensors
    if torch.is_grad_enabled():  # for a second derivative, the portable form is differentiated
        call = _call(x, labels, ctx.axis, weight, ctx.options, mask, ctx.indices, False)
        _, grad = portable.cross_entropy_value_and_grad(
            call.xp, x.to(call.compute), call.target(), ctx.axis, call.options
        )
    dx = (grad * dloss.unsqueeze(ctx.axis)).to(x.dtype)
    return (dx, *(None,) * 11)


losses.register_autograd(_losses_backward, setup_context=_keep_losses)
