"""What tells autograd of arrays that are changed in place before a gradient is asked for.

Operations on a DTensor leave no trace at its shard: only the whole array knows of them.
"""

from __future__ import annotations

from typing import Any

import torch

from portable_softmax._typing import Tensor
from portable_softmax.kernels._request import Request


def watched(shard: Tensor, request: Request) -> Tensor:
    """Return a shard through which no gradient passes once an array of the call has changed."""
    if not shard.requires_grad:
        return shard
    options = tuple(request.options or ())
    nested = [part for a in options if isinstance(a, tuple) for part in a]
    given = (request.x, request.labels, *options, *nested)
    return _Watched.apply(shard, *(a for a in given if isinstance(a, torch.Tensor)))


class _Watched(torch.autograd.Function):
    """The identity, which saves arrays so that torch looks at them in the backward pass."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, *arrays: Any) -> Tensor:
        ctx.save_for_backward(*arrays)
        return shard.view_as(shard)

    @staticmethod
    def backward(ctx: Any, d_shard: Tensor) -> tuple[Any, ...]:
        return d_shard, *(None for _ in ctx.saved_tensors)  # which raises if one has changed
