"""softmax, log_softmax and logsumexp of rows that are cut, and gradients through the first two."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from portable_softmax import _checks, libraries, portable
from portable_softmax._typing import Tensor
from portable_softmax.kernels._dtensor._mesh import Place, Reduce, constant, merged
from portable_softmax.kernels._dtensor._watch import watched
from portable_softmax.kernels._in_parts import Rows, added, tiled, with_axes
from portable_softmax.kernels._request import VJPS, Request


def in_parts(request: Request, place: Place) -> Any:
    """Return the answer, of the same placements where it has an entry for each of `x`."""
    options, axes, every = request.options, request.axes, tuple(range(request.x.ndim))
    complex_too = request.library.dtype(request.compute_dtype).kind == "complex"
    if complex_too or (options is not None and (options.b is not None or options.return_sign)):
        raise _checks.shards(
            "x", request.x, f"which cut the axes {axes} of complex or signed terms",
            "redistribute it first, so that other axes are cut",
        )  # fmt: skip
    reduce = place.reduce(place.dims(axes))
    if request.operation in VJPS:
        dy = constant("dy", request.dy, place, every)
        return place.holds(_vjp(request, reduce, request.x.to_local(), dy))
    where, sink = (
        None if not isinstance(a, torch.Tensor) else constant(n, a, place, every[-a.ndim :])
        for n, a in (("where", options.where), ("sink", options.sink))
    )
    number = options.sink if isinstance(options.sink, float) else None
    rows = Rows(
        request.operation, axes, float(options.temperature), request.compute_dtype,
        request.answer_dtype,
    )  # fmt: skip
    y = _Rows.apply(
        _Call(rows, number, reduce), watched(request.x.to_local(), request), where, sink
    )
    ones = axes if request.operation == "logsumexp" else ()
    shape = [1 if a in ones else n for a, n in enumerate(place.shape)]
    return place.along(every, shape).holds(y)


class _Call(NamedTuple):
    """A call but for its arrays."""

    rows: Rows
    sink: float | None
    reduce: Reduce

    def state(self, x: Tensor, where: Tensor | None, sink: Tensor | None) -> tuple[Any, Any]:
        """Return the state of whole rows."""
        m, rest = self.rows.fold(x, where)
        m, rest = merged(m, rest, self.reduce, temperature=self.rows.temperature)
        if self.sink is not None or sink is not None:
            more = torch.full_like(m, self.sink) if sink is None else sink.to(m.dtype).expand_as(m)
            m, rest = self.rows.merge([(m, rest), (more, torch.zeros_like(rest))])
        return m, rest


class _Rows(torch.autograd.Function):
    """A call on a shard, differentiable with respect to it."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, x: Tensor, where: Tensor | None, sink: Tensor | None
    ) -> Tensor:
        x = x.detach()
        where = with_axes(where, x.ndim)
        m, rest = call.state(x, where, sink)
        ctx.call = call
        ctx.save_for_backward(x, where, m, rest)
        if call.rows.operation == "logsumexp":
            return call.rows.logsumexp((m, rest))
        return call.rows.finish(x, m, rest, where)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, where, m, rest = ctx.saved_tensors
        call: _Call = ctx.call
        operation, axes, temperature, compute, *_ = call.rows
        xp = libraries.namespace(x)

        def gradient(x: Any, dy: Any, m: Any, rest: Any, where: Any, *sums: Any) -> Any:
            p = portable.softmax_of(xp, x.to(compute), m, rest, temperature)
            dy = dy.to(compute)
            if where is not None:
                p, dy = torch.where(where, p, 0.0), torch.where(where, dy, 0.0)
            if operation == "logsumexp":
                found = torch.where(torch.isinf(m), 0.0, p * dy)
            elif not sums:
                if operation == "softmax":
                    return portable.softmax_vjp_sums(xp, p, dy, axes)
                return (portable.total(xp, dy, axes),)
            elif operation == "softmax":
                found = portable.softmax_vjp_of(xp, p, dy, sums)
            else:
                found = dy - p * sums[0]
            found = found if temperature == 1.0 else found / temperature
            return (found if where is None else torch.where(where, found, 0.0)).to(x.dtype)

        sums = ()
        if operation != "logsumexp":
            sums = tiled(gradient, axes, x, dy, m, rest, where, merge=added)
            sums = _of_all_ranks(call.reduce, sums)
        return None, tiled(gradient, (), x, dy, m, rest, where, *sums), None, None


def _of_all_ranks(reduce: Reduce, sums: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return sums of whole rows, by one all-reduce."""
    return tuple(reduce(torch.stack(sums), "sum"))


def _vjp(request: Request, reduce: Reduce, y: Tensor, dy: Tensor) -> Tensor:
    """Return softmax_vjp or log_softmax_vjp of a shard."""
    compute, answer = request.compute_dtype, request.result_dtype
    rows = Rows(request.operation, request.axes, 1.0, compute, answer, request.rounding)
    return rows.vjp(y, dy, _of_all_ranks(reduce, rows.vjp_sums(y, dy)))
