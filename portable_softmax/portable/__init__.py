"""The implementation: mathematics in the array API standard alone.

Nothing here checks an argument or names a library; `libraries` answers what differs between them.
"""

from portable_softmax.portable._cross_entropy import (
    Options,
    Target,
    counted_positions,
    cross_entropy,
    cross_entropy_value_and_grad,
    distribution_target,
    index_target,
    mean,
    mean_divisor,
    nll_loss,
    nothing_to_inf,
    reduced,
    softcapped,
    with_class_axis,
)
from portable_softmax.portable._divisor import (
    divided,
    divisor,
    ordinary,
    powers_of_2,
    times_power_of_2,
)
from portable_softmax.portable._entmax import (
    entmax,
    entmax_loss,
    entmax_loss_value_and_grad,
    entmax_vjp,
)
from portable_softmax.portable._entropy import (
    entropy,
    entropy_value_and_grad,
    exp_minus_its_tangent,
    kl_divergence,
    kl_divergence_value_and_grad,
)
from portable_softmax.portable._linear_cross_entropy import (
    Gradients,
    Linear,
    at_positions,
    by_classes,
    classes_taken,
    cuts,
    finished,
    gradients_of,
    kept_positions,
    label_target,
    linear_cross_entropy,
    linear_cross_entropy_value_and_grad,
    logits_of,
    sound,
    tiles,
)
from portable_softmax.portable._logsums import logcumsumexp, logcumsumexp_vjp, logmeanexp
from portable_softmax.portable._loss_in_parts import (
    Part,
    Sums,
    finished_loss,
    fold_part_of_loss,
    gap_toward,
    gradient_of_part,
    merge_losses,
    part_of_loss,
)
from portable_softmax.portable._online import (
    cross_entropy_of,
    fold_part,
    log_softmax_of,
    logsumexp_of,
    merge,
    of_nothing,
    share_of,
    softmax_of,
    toward,
)
from portable_softmax.portable._sigmoid import (
    SigmoidOptions,
    sigmoid_cross_entropy,
    sigmoid_cross_entropy_value_and_grad,
)
from portable_softmax.portable._softmax import (
    CONFIDENT,
    LOG_CONFIDENT,
    ROUNDING,
    log_share_of_sink,
    log_softmax,
    log_softmax_vjp,
    log_softmax_vjp_of,
    log_softmax_vjp_sums,
    logsumexp,
    off_one,
    softmax,
    softmax_jacobian,
    softmax_vjp,
    softmax_vjp_of,
    softmax_vjp_sums,
    with_axes,
)
from portable_softmax.portable._sums import total
