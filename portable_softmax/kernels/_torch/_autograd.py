"""The kernels under torch's autograd: one function over saved tensors.

The first derivative is computed by a kernel. The formula in torch's own operations takes over where
torch follows the derivative itself: to differentiate it again, to map over it, or to push a tangent
through it. So there are derivatives of every order and mode.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from portable_softmax._typing import Tensor
from portable_softmax.kernels._request import VJPS, Request
from portable_softmax.kernels._torch import _gradients


def answer(engine: Any, request: Request) -> Any:
    """Return the answer of a call that is differentiated."""
    tensors = (request.x,) if request.dy is None else (request.x, request.dy)
    return _Kernel.apply((engine, request), *tensors)


class _Kernel(torch.autograd.Function):
    """A call, differentiable with respect to `x` and `dy`."""

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, Request], *_: Tensor) -> Any:
        engine, request = call
        ctx.slopes = None
        if _gradients.has_slopes(engine, request) and not _is_watched():
            found, slopes = _gradients.value_and_slopes(engine, request)
            # A teacher's logits, as those of a divergence, need none.
            needed = zip(slopes, ctx.needs_input_grad[1:], strict=True)
            ctx.slopes = [slope if wanted else None for slope, wanted in needed]
        else:
            found = _gradients.value(engine, request)
        keep(ctx, request, found[0] if type(found) is tuple else found)
        ctx.engine = engine
        return found

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        request = restored(ctx)
        # A second pass computes them again: the first may return them themselves.
        slopes, ctx.slopes = ctx.slopes, None
        by_kernel = partial(_gradients.gradient, ctx.engine, slopes=slopes)
        dx, ddy = pulled_back(request, upstream, request.library.tracing, by_kernel)
        return (None, dx) if request.dy is None else (None, dx, ddy)


def _is_watched() -> bool:
    """Return whether hooks take what is saved, as checkpoints do: slopes would escape them."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is None or hooks(True) is not None


# --------------------------------------------------------------------------- shared with operators

_OF_OPERATORS = ("weight", "where", "sample_weight")
_ARRAY_OPTIONS = (*_OF_OPERATORS, "pos_weight")


def tensors(request: Request) -> tuple[Tensor | None, ...]:
    """Return x, dy, labels and the array options that operators take."""
    options = [getattr(request.options, name, None) for name in _OF_OPERATORS]
    return request.x, request.dy, request.labels, *options


def keep(ctx: Any, request: Request, y: Tensor) -> None:
    """Save what the backward pass needs: tensors as such, so that torch sees them."""
    saved, options = [_gradients.kept(request, y), request.dy, request.labels], request.options
    if request.active:
        saved += [getattr(options, name, None) for name in _ARRAY_OPTIONS]
        options = options._replace(
            **{name: None for name in _ARRAY_OPTIONS if name in options._fields}
        )
    ctx.save_for_backward(*saved)
    ctx.set_materialize_grads(False)
    ctx.request = request.on(None, None, None, options)


def restored(ctx: Any) -> Request:
    """Return the request with the tensors that were saved."""
    x, dy, labels, *arrays = ctx.saved_tensors
    request: Request = ctx.request
    options = request.options
    if request.active:
        given = zip(_ARRAY_OPTIONS, arrays, strict=True)
        options = options._replace(**{name: t for name, t in given if t is not None})
    return request.on(x, dy, labels, options)


def pulled_back(
    request: Request,
    upstream: tuple[Tensor | None, ...],
    followed: Callable[..., str],
    by_kernel: Callable[[Request, Tensor], Any],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients with respect to `x` and `dy`; undefined ones are None.

    `followed` tells why the kernel cannot take the upstream gradient: torch follows it.
    """
    dvalue, *others = upstream
    if request.operation in VJPS:
        if dvalue is None:
            return None, None
        return _gradients.vjp_derivatives(request, dvalue)
    dx: Any = None
    if dvalue is not None:
        if others:
            request = request._replace(operation="cross_entropy")
        if torch.is_grad_enabled() or followed(request.x, dvalue):
            dx = _gradients.formula(request, dvalue)
        else:
            dx = by_kernel(request, dvalue)
        if type(dx) is tuple:
            return dx
    if others and others[0] is not None:
        further = _gradients.gradient_derivative(request, others[0])
        dx = further if dx is None else dx + further
    return dx, None
