"""softmax and log_softmax with a sink under torch's autograd.

To autograd the row has one more class: what the kernel returns beside the answer, the share of the
sink, is an answer too, which nobody sees. So the derivative by the sink is that by any logit,
without the cancellation of 1 - sum(y), and the formula that is differentiated again takes both.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from portable_softmax import portable
from portable_softmax._typing import Tensor
from portable_softmax.kernels._request import Request
from portable_softmax.kernels._torch._gradients import HALVES, in_float32, unmasked
from portable_softmax.kernels._torch._lending import NUMPY, computed, lent, on_numpy, taken


def answer(engine: Any, request: Request) -> Tensor:
    """Return the answer of a call that is differentiated."""
    sink = request.options.sink
    given = sink if isinstance(sink, torch.Tensor) else None
    y: Tensor = _BesideSink.apply((engine, request), request.x, given, request.options.where)[0]
    return y


class _BesideSink(torch.autograd.Function):
    """The answer and the share of the sink, differentiable with respect to logits and sinks."""

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, Request], *given: Tensor | None) -> tuple[Tensor, ...]:
        engine, request = call
        y, share = _value(engine, request)
        x, sink, where = given
        ctx.save_for_backward(x if _from_input(request) else y, share, sink, where)
        ctx.set_materialize_grads(False)
        ctx.engine, options = engine, request.options._replace(where=None)
        ctx.request = request.on(
            None, None, None, options if sink is None else options._replace(sink=None)
        )
        return y, share

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dshare: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None and dshare is None:
            return (None,) * 4
        kept, share, sink, where = ctx.saved_tensors
        request = ctx.request
        options = request.options._replace(where=where)
        options = options if sink is None else options._replace(sink=sink)
        request = request.on(kept, None, None, options)
        if dy is None:
            dy = torch.zeros_like(kept)
        if where is not None:
            dy = torch.where(where, dy, 0.0)
        follows = torch.is_grad_enabled() or request.library.tracing(kept, dy)
        if follows or dshare is not None:
            dx, dsink = _formula(request, share, dy, dshare)
        else:
            dx, dsink = _by_kernel(ctx.engine, request, share, dy)
        return None, dx, None if sink is None else _of_sink(request, dsink, sink), None


def _from_input(request: Request) -> bool:
    """Return whether the gradient starts from the input: the output has lost its digits."""
    return request.operation == "log_softmax" and request.dtype in HALVES


def _value(engine: Any, request: Request) -> tuple[Tensor, Tensor]:
    lent = on_numpy(request)
    y, share = computed(request, getattr(engine, f"{request.operation}_beside_sink"), lent)
    dtype = request.options.dtype
    return taken(y, request.result_dtype if dtype is None else dtype), torch.from_numpy(share)


def _by_kernel(engine: Any, request: Request, share: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient by the logits, and that by the sink of each row."""
    y, log, t = request.x, request.operation == "log_softmax", request.options.temperature
    if _from_input(request):
        y, dy = _value(engine, in_float32(request))[0], dy.float()
    array, dtype = lent(y), request.library.dtype(y.dtype).name
    vjp = Request(
        f"{request.operation}_vjp_beside_sink", NUMPY, array, dtype, request.axes,
        lent(share).dtype, array.dtype, options=request.options._replace(sink=lent(share)),
        dy=lent(dy.contiguous()),
    )  # fmt: skip
    dx, sums = computed(request, getattr(engine, vjp.operation), vjp)
    share = share.exp() if log else share
    dsink = -share * torch.from_numpy(sums)
    dx = taken(dx, y.dtype)
    if t != 1.0:
        dx, dsink = dx.div_(t), dsink.div_(t)
    return unmasked(request, dx).to(request.result_dtype), dsink


def _formula(
    request: Request, share: Tensor, dy: Tensor, dshare: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the same in torch's own operations, which torch differentiates again."""
    xp, axes, options, t = request.xp, request.axes, request.options, request.options.temperature
    y, dy = request.x.to(share.dtype), dy.to(share.dtype)
    total = partial(portable.total, xp)
    more: Any = 0.0 if dshare is None else dshare
    if request.operation == "softmax":
        s = total(y * dy, axes) + share * more
        big = y.detach() > portable.CONFIDENT
        c = total(torch.where(big, dy, 0.0), axes)
        c = torch.where(torch.isfinite(c), c, 0.0)
        dx = y * ((dy - c) - (total(y * (dy - c), axes) + share * (more - c)))
        dsink = share * (more - s)
    else:
        if _from_input(request):
            y = portable.log_softmax(
                xp, y, axes, where=options.where, temperature=t, sink=options.sink
            )
        s = total(dy, axes) + more
        dx = -dy * torch.expm1(y) - torch.exp(y) * (s - dy)
        dsink = more - torch.exp(share) * s
    if t != 1.0:
        dx, dsink = dx / t, dsink / t
    return unmasked(request, dx).to(request.result_dtype), dsink


def _of_sink(request: Request, dsink: Tensor, sink: Tensor) -> Tensor:
    """Return the gradient by the sinks of the rows as that of the array of sinks: sums of rows.

    A row of which a mask leaves nothing gives nothing.
    """
    where = request.options.where
    if where is not None:
        shape = torch.broadcast_shapes(where.shape, request.x.shape)
        some = where.expand(shape).any(dim=request.axes, keepdim=True)
        dsink = torch.where(some, dsink, 0.0)
    shape = (1,) * (dsink.ndim - sink.ndim) + tuple(sink.shape)
    repeated = [a for a, n in enumerate(shape) if n == 1 and dsink.shape[a] != 1]
    if repeated:
        dsink = dsink.sum(repeated, keepdim=True)
    return dsink.reshape(sink.shape).to(sink.dtype)
