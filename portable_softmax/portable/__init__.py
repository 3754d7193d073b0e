"""The implementation: mathematics in the array API standard alone.

Nothing here checks an argument or names a library; `libraries` answers what differs between them.
"""

from portable_softmax.portable._cross_entropy import (
    Options,
    Target,
    cross_entropy,
    cross_entropy_value_and_grad,
    index_target,
    mean_divisor,
    nothing_to_inf,
    reduced,
)
from portable_softmax.portable._softmax import (
    log_softmax,
    log_softmax_vjp,
    logsumexp,
    softmax,
    softmax_jacobian,
    softmax_vjp,
)
from portable_softmax.portable._sums import total

__all__ = [
    "Options",
    "Target",
    "cross_entropy",
    "cross_entropy_value_and_grad",
    "index_target",
    "log_softmax",
    "log_softmax_vjp",
    "logsumexp",
    "mean_divisor",
    "nothing_to_inf",
    "reduced",
    "softmax",
    "softmax_jacobian",
    "softmax_vjp",
    "total",
]
