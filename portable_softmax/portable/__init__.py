"""The implementation: mathematics in the array API standard alone.

Nothing here checks an argument or names a library; `libraries` answers what differs between them.
"""

from portable_softmax.portable._cross_entropy import (
    Options,
    Target,
    cross_entropy,
    cross_entropy_value_and_grad,
    distribution_target,
    index_target,
    mean_divisor,
    nll_loss,
    not_ignored,
    nothing_to_inf,
    reduced,
    softcapped,
    with_class_axis,
)
from portable_softmax.portable._divisor import divisor, ordinary, powers_of_2, times_power_of_2
from portable_softmax.portable._entmax import (
    entmax,
    entmax_loss,
    entmax_loss_value_and_grad,
    entmax_vjp,
)
from portable_softmax.portable._entropy import entropy, kl_divergence
from portable_softmax.portable._linear_cross_entropy import (
    Gradients,
    Linear,
    at_positions,
    by_classes,
    classes_taken,
    cuts,
    finished,
    label_target,
    linear_cross_entropy,
    linear_cross_entropy_value_and_grad,
    tiles,
)
from portable_softmax.portable._logsums import logcumsumexp, logmeanexp
from portable_softmax.portable._online import (
    cross_entropy_of,
    fold_part,
    log_softmax_of,
    logsumexp_of,
    merge,
    of_nothing,
    softmax_of,
)
from portable_softmax.portable._sigmoid import (
    SigmoidOptions,
    sigmoid_cross_entropy,
    sigmoid_cross_entropy_value_and_grad,
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
    "Gradients",
    "Linear",
    "Options",
    "SigmoidOptions",
    "Target",
    "at_positions",
    "by_classes",
    "classes_taken",
    "cross_entropy",
    "cross_entropy_of",
    "cross_entropy_value_and_grad",
    "cuts",
    "distribution_target",
    "divisor",
    "entmax",
    "entmax_loss",
    "entmax_loss_value_and_grad",
    "entmax_vjp",
    "entropy",
    "finished",
    "fold_part",
    "index_target",
    "kl_divergence",
    "label_target",
    "linear_cross_entropy",
    "linear_cross_entropy_value_and_grad",
    "log_softmax",
    "log_softmax_of",
    "log_softmax_vjp",
    "logcumsumexp",
    "logmeanexp",
    "logsumexp",
    "logsumexp_of",
    "mean_divisor",
    "merge",
    "nll_loss",
    "not_ignored",
    "nothing_to_inf",
    "of_nothing",
    "ordinary",
    "powers_of_2",
    "reduced",
    "sigmoid_cross_entropy",
    "sigmoid_cross_entropy_value_and_grad",
    "softcapped",
    "softmax",
    "softmax_jacobian",
    "softmax_of",
    "softmax_vjp",
    "tiles",
    "times_power_of_2",
    "total",
    "with_class_axis",
]
