"""Modules with the arguments of `torch.nn`: the only module of this package that needs torch.

Each is the module of torch with another `forward`, so that its arguments, attributes, buffers and
representation are torch's own. What differs is in `torch_functional`.
"""

from __future__ import annotations

from typing import Any

try:
    import torch
except ImportError as error:
    raise ImportError(
        f"portable_softmax.compat.torch_nn needs torch ({error}): "
        'pip install "portable_softmax[torch]"'
    ) from error

from portable_softmax.compat import torch_functional

__all__ = ["CrossEntropyLoss", "LogSoftmax", "Softmax"]


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """The cross-entropy of logits whose classes are in axis 1.

    The arguments are those of ``torch.nn.CrossEntropyLoss``, the loss is that of
    `torch_functional.cross_entropy`.

    Examples
    --------
    >>> import torch
    >>> from portable_softmax.compat.torch_nn import CrossEntropyLoss
    >>> criterion = CrossEntropyLoss(reduction="sum")
    >>> print(f"{criterion(torch.tensor([[30.0, 0.0, 0.0]]), torch.tensor([0])).item():.4e}")
    1.8715e-13
    """

    def forward(self, input: Any, target: Any) -> Any:
        """Return the loss of logits and class indices or a distribution."""
        return torch_functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class Softmax(torch.nn.Softmax):
    """The softmax along `dim`.

    The arguments are those of ``torch.nn.Softmax``, the answer is that of
    `torch_functional.softmax`.

    Examples
    --------
    >>> import torch
    >>> from portable_softmax.compat.torch_nn import Softmax
    >>> Softmax(dim=-1)(torch.zeros(1, 2))
    tensor([[0.5000, 0.5000]])
    """

    def forward(self, input: Any) -> Any:
        """Return the probabilities."""
        return torch_functional.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    """The logarithm of the softmax along `dim`.

    The arguments are those of ``torch.nn.LogSoftmax``, the answer is that of
    `torch_functional.log_softmax`.

    Examples
    --------
    >>> import torch
    >>> from portable_softmax.compat.torch_nn import LogSoftmax
    >>> LogSoftmax(dim=-1)(torch.zeros(1, 2))
    tensor([[-0.6931, -0.6931]])
    """

    def forward(self, input: Any) -> Any:
        """Return the log-probabilities."""
        return torch_functional.log_softmax(input, self.dim, _stacklevel=5)
