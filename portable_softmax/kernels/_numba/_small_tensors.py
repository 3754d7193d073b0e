"""The shortcuts of `_small` for CPU tensors of torch that nobody differentiates by or watches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch

from portable_softmax import _arrays
from portable_softmax.kernels._numba import _small
from portable_softmax.kernels._numba._tensors import recording, unusual
from portable_softmax.kernels._shortcuts import SHORTCUTS

Tensor: TypeAlias = Any  # torch.Tensor, which mypy knows where torch is installed only


def register() -> None:
    """Take small tensors from now on, each operation when its kernel is loaded."""
    for operation, function in _small.FUNCTIONS.items():
        lend_labels = operation.startswith("cross_entropy")
        SHORTCUTS[torch.Tensor, operation] = _shortcut(operation, function, lend_labels)


def _shortcut(operation: str, function: Callable[..., Any], lend_labels: bool) -> Any:
    def quick(x: Any, *args: Any) -> Any:
        # The first question is all that torch.compile sees of this.
        if torch.compiler.is_compiling() or operation not in _small.ready or not _plain(x):
            return None
        if lend_labels:
            labels, *others = args
            if type(labels) is not torch.Tensor or not _plain(labels):
                return None
            found = function(x.detach().numpy(), labels.numpy(), *others)
        else:
            found = function(x.detach().numpy(), *args)
        if isinstance(found, tuple):
            return tuple(map(_taken, found))
        return None if found is None else _taken(found)

    return quick


def _taken(array: Any) -> Tensor:
    return torch.from_numpy(np.asarray(array))


def _plain(x: Tensor) -> bool:
    """Whether a tensor is no more than its memory, which NumPy can have."""
    return (
        x.is_cpu
        and x.dtype is not torch.bfloat16
        and not (x.requires_grad and torch.is_grad_enabled())
        and _arrays.reads_values(torch, x)
        and not unusual(x)
        and not x.is_conj()
        and not recording()
    )
