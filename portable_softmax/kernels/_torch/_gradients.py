"""Values by a kernel; gradients by a kernel, or by the portable formula in torch's operations.

A gradient starts from what the forward pass kept (`kept`), which is at most what torch's own
functions keep: softmax and entmax their output; log_softmax its output, or its input where that is
of a half type, from which the output is computed again with all its digits; logsumexp and losses
the input. The latter may have made their gradient beside the value (`value_and_slopes`), which is
kept as well, and handed out once.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from portable_softmax import portable
from portable_softmax._typing import Tensor
from portable_softmax.kernels._request import (
    BINARY,
    DIVERGENCES,
    ENTMAX_LOSSES,
    ENTROPIES,
    RUNNING,
    SPARSE,
    Request,
)
from portable_softmax.kernels._torch._lending import (
    COMPUTE_DTYPE,
    NUMPY,
    computed,
    lent,
    on_numpy,
    taken,
)

HALVES = ("float16", "bfloat16")


def value(engine: Any, request: Request) -> Any:
    """Return what a kernel answers."""
    function = getattr(engine, request.operation)
    if engine.TENSORS:
        return function(request)
    lent = on_numpy(request)
    found = computed(request, function, lent)
    dtype, options = request.result_dtype, request.options
    answer = dtype if options is None or options.dtype is None else options.dtype
    if type(found) is tuple:
        return taken(found[0], answer), *[_own(request, lent, part, dtype) for part in found[1:]]
    return _own(request, lent, found, answer)


def _own(request: Request, lent: Request, found: Any, dtype: Any) -> Tensor:
    """Return what a kernel has found as a tensor: the one whose memory it was given to write."""
    if request.out is None or found is not lent.out:
        return taken(found, dtype)
    request.out[:0].zero_()  # torch counts the change, for graphs that keep the tensor
    return request.out


def kept(request: Request, y: Tensor) -> Tensor:
    """Return what the gradient of a call with the answer `y` starts from."""
    from_output = request.operation in ("softmax", *SPARSE) or (
        request.operation == "log_softmax" and request.dtype not in HALVES
    )
    return y if from_output else request.x


# --------------------------------------------------------------------------- by a kernel


def gradient(engine: Any, request: Request, dy: Tensor, slopes: Any = None) -> Any:
    """Return the gradient with respect to the logits; `request.x` is what was kept.

    It is in `request.out`, if the request has one and nothing is left to do to the kernel's. That
    of a divergence is a tuple of both. `slopes` are those of `value_and_slopes`, to be written
    over.
    """
    if engine.TENSORS:
        return engine.gradient(request, dy)
    if request.operation in BESIDE_VALUE:
        found = _by_slopes(engine, request, dy, slopes)
        return found if request.operation in DIVERGENCES else found[0]
    dx: Tensor = _GRADIENTS[request.operation](engine, request, dy)
    return dx if dx.dtype is request.result_dtype else dx.to(request.result_dtype)


# Values to which the upstream gradient is only a factor.
BESIDE_VALUE = ("cross_entropy", ENTROPIES[0], DIVERGENCES[0], BINARY[0], ENTMAX_LOSSES[0])


def value_and_slopes(engine: Any, request: Request) -> tuple[Tensor, list[Tensor]]:
    """Return what a kernel answers, and the gradients for an upstream one of 1, in one read."""
    both = f"{request.operation}_value_and_grad"
    found, *slopes = value(engine, request._replace(operation=both))
    return found, slopes


def has_slopes(engine: Any, request: Request) -> bool:
    """Return whether gradients can be made beside the value: a half type's are rounded once."""
    known = request.operation in BESIDE_VALUE and request.dtype not in HALVES
    return known and not engine.TENSORS


def _by_slopes(engine: Any, request: Request, dy: Tensor, slopes: Any) -> tuple[Any, ...]:
    """Return the gradients, None for one that was not kept."""
    factor = dy.item() if dy.ndim == 0 else math.nan
    if slopes is None:
        again = request if factor == 1.0 else in_float32(request)
        _, slopes = value_and_slopes(engine, again)
    upstream = factor if math.isfinite(factor) else _laid_out(request, dy)

    def gradient_by(slope: Tensor) -> Tensor:
        dx = slope if factor == 1.0 else slope.mul_(upstream)
        dx = dx if upstream is factor else unmasked(request, dx)
        return dx.to(request.result_dtype)

    return tuple([None if slope is None else gradient_by(slope) for slope in slopes])


def _softmax(engine: Any, request: Request, dy: Tensor) -> Tensor:
    where = request.options.where if request.active else None
    if where is not None:
        # What is masked out has a probability of 0, and so a gradient of 0 from a finite dy. Any
        # other dy makes the sum of its row nan, and with it each entry.
        alone = request._replace(options=request.options._replace(where=None))
        dx = _from_output(engine, alone, request.x, dy)
        ends = [slice(0, 1) if a in request.axes else slice(None) for a in range(dx.ndim)]
        if math.isfinite(dx[tuple(ends)].sum().item()):
            return dx
    return _from_output(engine, request, request.x, dy)


def _log_softmax(engine: Any, request: Request, dy: Tensor) -> Tensor:
    if request.dtype not in HALVES:
        return _from_output(engine, request, request.x, dy, False)
    wide = in_float32(request)
    return _from_output(engine, wide, value(engine, wide), dy.float(), False)


def _from_output(engine: Any, request: Request, y: Tensor, dy: Tensor, *masked: bool) -> Tensor:
    """Return a vector-Jacobian product, over the temperature."""
    if request.active and request.options.where is not None:
        dy = torch.where(request.options.where, dy, 0.0)
    array, dtype = lent(y), request.library.dtype(y.dtype).name
    vjp = Request(
        f"{request.operation}_vjp", NUMPY, array, dtype, request.axes, COMPUTE_DTYPE[dtype],
        array.dtype, "", None, (), lent(dy.contiguous()),
        out=None if request.out is None else lent(request.out),
    )  # fmt: skip
    if engine.declines(vjp, False):
        return formula(request._replace(x=y), dy)
    dx = taken(computed(request, getattr(engine, vjp.operation), vjp, *masked), y.dtype)
    temperature = request.options.temperature
    return unmasked(request, dx if temperature == 1.0 else dx.div_(temperature))


def _logsumexp(engine: Any, request: Request, dy: Tensor) -> Tensor:
    vjp = on_numpy(request.on(request.x, dy, None, request.options, "logsumexp_vjp"))
    return taken(computed(request, engine.logsumexp_vjp, vjp), request.x.dtype)


def _logcumsumexp(engine: Any, request: Request, dy: Tensor) -> Tensor:
    dy = dy.contiguous()
    vjp = on_numpy(request.on(request.x, dy, None, request.options, "logcumsumexp_vjp"))
    return taken(computed(request, engine.logcumsumexp_vjp, vjp), request.x.dtype)


def _entmax(engine: Any, request: Request, dy: Tensor) -> Tensor:
    vjp = on_numpy(request._replace(operation="entmax_vjp", dy=dy))
    return taken(computed(request, engine.entmax_vjp, vjp), request.x.dtype)


_GRADIENTS = {
    "entmax": _entmax,
    "sparsemax": _entmax,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "logsumexp": _logsumexp,
    "logmeanexp": _logsumexp,
    "logcumsumexp": _logcumsumexp,
}


def in_float32(request: Request) -> Request:
    """Return a request of a half type in float32, so that its gradient is rounded once."""
    if request.dtype not in HALVES:
        return request
    dtype, options = torch.float32, request.options
    if "dtype" in request.active:
        options = options._replace(dtype=None)
    dy = request.dy if request.operation not in DIVERGENCES else request.dy.to(dtype)
    return request._replace(
        x=request.x.to(dtype), dy=dy, dtype="float32", result_dtype=dtype, options=options,
        active=tuple(name for name in request.active if name != "dtype"),
    )  # fmt: skip


def _upstream(request: Request, dy: Tensor) -> Tensor:
    """Return the upstream gradient of a loss, which broadcasts to the logits: 0 in ignored rows."""
    if request.options.reduction == "none":
        dy = dy.unsqueeze(request.axis)
    counted = None
    if request.options.ignore_index is not None or request.options.sample_weight is not None:
        counted = request.target().counted
    return dy if counted is None else torch.where(counted, dy, 0.0)


def _laid_out(request: Request, dy: Tensor) -> Tensor:
    """Return the upstream gradient of an entropy or a loss, as it broadcasts to `x`."""
    if request.operation in ("cross_entropy", *ENTMAX_LOSSES):
        return _upstream(request, dy)
    reduced = getattr(request.options, "reduction", "none") != "none"
    return dy if reduced or not request.axes else dy.reshape(request.reduced_shape())


def unmasked(request: Request, dx: Tensor) -> Tensor:
    """Return a gradient with 0 for what is masked out, whatever came from upstream."""
    where = request.options.where if "where" in request.active else None
    return dx if where is None else torch.where(where, dx, 0.0)


def _infinite(request: Request) -> Tensor:
    """Return which rows have an infinite maximum, of what counts."""
    x, where = request.x.detach(), request.options.where
    if where is not None:
        x = torch.where(where, x, -torch.inf)
    return torch.isinf(x.amax(request.axes, keepdim=True))


# --------------------------------------------------------------------------- by the formula


def formula(request: Request, dy: Tensor) -> Any:
    """Return the same gradient in torch's own operations, which torch differentiates again."""
    x, dy = request.x.to(request.compute_dtype), dy.to(request.compute_dtype)
    xp, axes, options = request.xp, request.axes, request.options
    if request.operation == "cross_entropy":
        _, dx = portable.cross_entropy_value_and_grad(
            xp, x, request.target(), request.axis, options
        )
        return unmasked(request, dx * _upstream(request, dy)).to(request.result_dtype)
    if request.operation in (*ENTROPIES, *DIVERGENCES, *BINARY, *ENTMAX_LOSSES):
        return _slopes_by_formula(request, x, dy)
    if request.operation in RUNNING:
        return _of_running_sums(request, dy)
    if request.operation in SPARSE:
        return portable.entmax_vjp(xp, x, dy, axes, alpha=options.alpha).to(request.result_dtype)
    where, temperature = options.where, options.temperature
    if request.operation in ("logsumexp", "logmeanexp"):
        infinite = _infinite(request)
        p = portable.softmax(xp, torch.where(infinite, 0.0, x), axes, where=where)
        return torch.where(infinite, 0.0, p * dy).to(request.result_dtype)
    if where is not None:
        dy = torch.where(where, dy, 0.0)
    if request.operation == "softmax":
        dx = portable.softmax_vjp(xp, x, dy, axes, rounding=request.rounding)
    else:
        if request.dtype in HALVES:
            x = portable.log_softmax(xp, x, axes, where=where, temperature=temperature)
        # Unlike log_softmax_vjp: a logit of -inf that no mask has put there passes its gradient on.
        dx = -dy * torch.expm1(x) - torch.exp(x) * (portable.total(xp, dy, axes) - dy)
    dx = dx if temperature == 1.0 else dx / temperature
    return unmasked(request, dx).to(request.result_dtype)


def _of_running_sums(request: Request, dy: Tensor) -> Tensor:
    """Return what torch makes of the sums: is_grads_batched has no rule for what joins arrays."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x = request.x.view_as(request.x)
        y = portable.logcumsumexp(request.xp, x.to(request.compute_dtype), request.axis)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=create_graph)
    return dx


def _slopes_by_formula(request: Request, x: Tensor, dy: Tensor) -> Any:
    xp, dy, options = request.xp, _laid_out(request, dy), request.options
    if request.operation in ENTROPIES:
        _, *slopes = portable.entropy_value_and_grad(xp, x, request.axes)
    elif request.operation in BINARY:
        labels = request.labels.to(request.compute_dtype)
        _, *slopes = portable.sigmoid_cross_entropy_value_and_grad(xp, x, labels, options)
    elif request.operation in ENTMAX_LOSSES:
        _, *slopes = portable.entmax_loss_value_and_grad(
            xp, x, request.target(), request.axis, options.alpha, options.reduction, followed=True
        )
    else:
        q = request.dy.to(request.compute_dtype)
        _, *slopes = portable.kl_divergence_value_and_grad(xp, x, q, request.axis, options)
    found = tuple([(slope * dy).to(request.result_dtype) for slope in slopes])
    return found if request.operation in DIVERGENCES else found[0]


def vjp_derivatives(request: Request, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivatives of a vector-Jacobian product with respect to `x` and `dy`."""
    c, xp, axes = request.compute_dtype, request.xp, request.axes
    y, dy, u = request.x.to(c), request.dy.to(c), u.to(c)
    total = portable.total
    if request.operation == "softmax_vjp":
        du = total(xp, u * y, axes)
        d_y, d_dy = u * (dy - total(xp, y * dy, axes)) - dy * du, y * (u - du)
    else:
        masked = torch.isinf(y)
        p = torch.exp(y)
        d_y = -u * p * total(xp, torch.where(masked, 0.0, dy), axes)
        d_dy = torch.where(masked, 0.0, u - total(xp, u * p, axes))
    return d_y.to(request.x.dtype), d_dy.to(request.dy.dtype)


def gradient_derivative(request: Request, dgrad: Tensor) -> Tensor:
    """Return the derivative of the gradient of cross_entropy_value_and_grad, pulled back."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # An alias: dgrad may depend on the logits in another way.
        x = request.x.view_as(request.x) if create_graph else request.x.detach().requires_grad_()
        _, grad = portable.cross_entropy_value_and_grad(
            request.xp, x.to(request.compute_dtype), request.target(), request.axis,
            request.options,
        )  # fmt: skip
        (dx,) = torch.autograd.grad(
            grad.to(request.result_dtype), x, dgrad, create_graph=create_graph
        )
    return dx
