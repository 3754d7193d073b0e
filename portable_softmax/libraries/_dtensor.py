"""torch's DTensors: one shard a rank, on the devices of a mesh."""

from __future__ import annotations

from typing import Any

from portable_softmax.libraries._torch import Torch

NAME = "torch.distributed.tensor"


class DTensors(Torch):
    """Arrays of which each rank holds a shard. Operations on shards are those of torch."""

    sharded = True

    def tracing(self, *arrays: Any) -> str:
        """Return which compiler or transform follows these tensors; autograd does anyway."""
        return "torch.compile" if self._torch.compiler.is_compiling() else self.transform()
