"""logsumexp with weights or a sign: what a kernel finds, and the gradients by both arrays."""

from __future__ import annotations

import math
from typing import Any

import torch

from portable_softmax import portable
from portable_softmax._typing import Tensor
from portable_softmax.kernels._request import Request
from portable_softmax.kernels._torch._lending import computed, lent, on_numpy, taken


def answer(engine: Any, request: Request, unsigned: Any) -> Any:
    """Return the logarithm, and the sign if it is asked for; `unsigned` answers without either."""
    options, dtype = request.options, request.answer_dtype
    if options.b is None:
        options = options._replace(return_sign=False)
        active = tuple([name for name in request.active if name != "return_sign"])
        value = unsigned(request._replace(options=options, active=active))
        zero = value.detach()
        return value, torch.where(zero.isnan(), zero, (zero > -math.inf).to(dtype))
    given = (request.x, options.b)
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        value, sign = _Weighted.apply((engine, request), *given, options.where)
    else:
        value, sign, *_ = _parts(engine, request)
        value = _answered(request, value, sign)
    return (value, sign.to(dtype)) if options.return_sign else value


def _parts(engine: Any, request: Request) -> tuple[Tensor, ...]:
    """Return log|s|, the sign of s, the maximum and s over its exp, as they are computed."""
    found = computed(request, engine.weighted, on_numpy(request))
    return tuple([torch.from_numpy(part) for part in found])


def _answered(request: Request, value: Tensor, sign: Tensor) -> Tensor:
    if not request.options.return_sign:
        value = torch.where(sign < 0, math.nan, value)
    return value.to(request.answer_dtype)


class _Weighted(torch.autograd.Function):
    """The logarithm, differentiable with respect to exponents and weights, and the sign."""

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, Request], *given: Tensor | None) -> tuple[Tensor, ...]:
        engine, request = call
        value, sign, m, s = _parts(engine, request)
        ctx.save_for_backward(*given, sign, m, s)
        ctx.mark_non_differentiable(sign)
        ctx.set_materialize_grads(False)
        options = request.options._replace(b=None, where=None)
        ctx.engine, ctx.request = engine, request.on(None, None, None, options)
        return _answered(request, value, sign), sign

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 4
        x, b, where, sign, m, s = ctx.saved_tensors
        options = ctx.request.options._replace(b=b, where=where)
        request = ctx.request.on(x, dy, None, options)
        found = None
        if not (torch.is_grad_enabled() or request.library.tracing(x, b, dy)):
            found = _by_kernel(ctx.engine, request, sign, m, s, ctx.needs_input_grad[2])
        if found is None:
            found = _by_formula(request, ctx.needs_input_grad[1:3])
        return None, *found, None


def _by_kernel(
    engine: Any, request: Request, sign: Tensor, m: Tensor, s: Tensor, by_b: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Return dy * b * exp(x - m) / s, and without the weight if that is asked for.

    A sum of 0 has no derivative, nor has one that is answered with nan. Other rows that are not
    finite are for the formula, and None.
    """
    of_nothing = sign == 0
    if not bool((torch.isfinite(m + s) | of_nothing).all()):
        return None
    if not request.options.return_sign:
        of_nothing = of_nothing | (sign < 0)
    factor = lent(torch.where(of_nothing, 0.0, request.dy / s))
    m = torch.where(torch.isfinite(m), m, 0.0)
    given = on_numpy(request._replace(dy=None))
    found = computed(request, engine.weighted_slopes, given, lent(m), factor, by_b)
    if found is None:
        return None
    dx, db = found
    by_weights = None if db is None else _summed(torch.from_numpy(db), request.options.b)
    return taken(dx, request.x.dtype), by_weights


def _by_formula(request: Request, needed: tuple[bool, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Return the same in torch's own operations, which torch differentiates again."""
    create_graph, options = torch.is_grad_enabled(), request.options
    with torch.enable_grad():
        x, b = (
            t.view_as(t) if create_graph and t.requires_grad else t.detach().requires_grad_(need)
            for t, need in zip((request.x, options.b), needed, strict=True)
        )
        value, _ = portable.logsumexp(
            request.xp, x.to(request.compute_dtype), request.axes, b=b, where=options.where,
            return_sign=options.return_sign,
        )  # fmt: skip
        given = [t for t, need in zip((x, b), needed, strict=True) if need]
        found = iter(
            torch.autograd.grad(
                value.to(request.answer_dtype), given, request.dy, create_graph=create_graph
            )
        )
    by_x, by_b = (next(found) if need else None for need in needed)
    return by_x, by_b


def _as(found: Tensor, like: Tensor) -> Tensor:
    return found if found.dtype is like.dtype else found.to(like.dtype)


def _summed(found: Tensor, like: Tensor) -> Tensor:
    """Return the gradient by what was broadcast, which is summed where it was repeated."""
    return _as(found.sum_to_size(like.shape), like)
