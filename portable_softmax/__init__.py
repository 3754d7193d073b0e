"""The softmax family and cross-entropy, done right on every Python array library.

>>> import numpy as np
>>> from portable_softmax import cross_entropy, softmax
>>> softmax(np.asarray([1.0, 2.0, 3.0, 4.0])).round(4)
array([0.0321, 0.0871, 0.2369, 0.6439])
>>> print(f"{cross_entropy(np.asarray([30.0, 0.0, 0.0]), np.asarray(0)):.12e}")
1.871524593768e-13
"""

from portable_softmax import kernels, online, textbook
from portable_softmax._cross_entropy import cross_entropy, cross_entropy_value_and_grad
from portable_softmax._entmax import entmax, entmax_vjp, sparsemax
from portable_softmax._entmax_loss import entmax_loss, entmax_loss_value_and_grad
from portable_softmax._entropy import (
    entropy,
    entropy_value_and_grad,
    kl_divergence,
    kl_divergence_value_and_grad,
)
from portable_softmax._linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_value_and_grad,
)
from portable_softmax._logsums import logcumsumexp, logcumsumexp_vjp, logmeanexp
from portable_softmax._sigmoid_cross_entropy import (
    sigmoid_cross_entropy,
    sigmoid_cross_entropy_value_and_grad,
)
from portable_softmax._softmax import log_softmax, logsumexp, softmax
from portable_softmax._vjps import log_softmax_vjp, softmax_jacobian, softmax_vjp
from portable_softmax.layers import LogSoftmax, Softmax, SoftmaxWithLoss

__version__ = "0.1.0"

__all__ = [
    "LogSoftmax",
    "Softmax",
    "SoftmaxWithLoss",
    "cross_entropy",
    "cross_entropy_value_and_grad",
    "entmax",
    "entmax_loss",
    "entmax_loss_value_and_grad",
    "entmax_vjp",
    "entropy",
    "entropy_value_and_grad",
    "kernels",
    "kl_divergence",
    "kl_divergence_value_and_grad",
    "linear_cross_entropy",
    "linear_cross_entropy_value_and_grad",
    "log_softmax",
    "log_softmax_vjp",
    "logcumsumexp",
    "logcumsumexp_vjp",
    "logmeanexp",
    "logsumexp",
    "online",
    "sigmoid_cross_entropy",
    "sigmoid_cross_entropy_value_and_grad",
    "softmax",
    "softmax_jacobian",
    "softmax_vjp",
    "sparsemax",
    "textbook",
]
