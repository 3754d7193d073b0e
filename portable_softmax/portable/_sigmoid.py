"""Cross-entropy of independent yes-or-no labels, and its gradient, in the standard alone.

With the logit z, the label t in [0, 1] and p = 1 / (1 + exp(-z)), for one entry

    loss = a (1 - p)^g softplus(-z) + b p^g softplus(z)          a = w c t,  b = w (1 - t)
    grad = b p^g (g (1 - p) softplus(z) + p) - a (1 - p)^g (g p softplus(-z) + (1 - p))

where w is the entry's weight, c that of a yes and g the focal exponent. The powers are
exp(-g softplus), and 1 - p is the sigmoid of -z: nothing is subtracted from 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from portable_softmax._typing import Namespace
from portable_softmax.libraries import constant, scalar
from portable_softmax.portable._cross_entropy import (
    EVERY,
    mean_divisor,
    nothing_to_inf,
    reduced,
    weighted,
)
from portable_softmax.portable._divisor import divisor, halves, times_power_of_2
from portable_softmax.portable._softmax import with_axes


class SigmoidOptions(NamedTuple):
    """The options of the loss, checked, and arrays among them in the dtype of the computation."""

    weight: Any = None  # broadcasts to the logits
    pos_weight: Any = None  # likewise
    focal_gamma: float = 0.0
    label_smoothing: float = 0.0
    reduction: str = "mean"
    dtype: Any = None  # of the loss, where that is not the usual one


def sigmoid_cross_entropy(xp: Namespace, z: Any, t: Any, options: SigmoidOptions) -> Any:
    """Return the reduced loss."""
    return _reduced(xp, _losses(xp, z, t, options), options.reduction)


def sigmoid_cross_entropy_value_and_grad(
    xp: Namespace, z: Any, t: Any, options: SigmoidOptions
) -> tuple[Any, Any]:
    """Return the reduced loss and the gradient of its sum with respect to the logits."""
    loss = _losses(xp, z, t, options)
    yes, no = _coefficients(xp, t, options)
    gamma, zero = options.focal_gamma, scalar(xp, 0.0, z)
    slopes = []
    for coefficient, y in ((no, z), (yes, -z)):
        y = _where_it_counts(xp, y, coefficient)
        p = sigmoid(xp, y)
        slope = p
        if gamma != 0.0:
            q, loss_of_y = sigmoid(xp, -y), softplus(xp, y)
            steep = xp.where(q == 0, zero, q * xp.where(q == 0, zero, loss_of_y))
            slope = _power(xp, -y, gamma) * (gamma * steep + p)
        slopes.append(coefficient * slope)
    grad = slopes[0] - slopes[1]
    if options.reduction == "mean":
        grad = grad / nothing_to_inf(xp, mean_divisor(xp, loss, EVERY))
    return _reduced(xp, loss, options.reduction), grad


def _losses(xp: Namespace, z: Any, t: Any, options: SigmoidOptions) -> Any:
    yes, no = _coefficients(xp, t, options)
    return _surprise(xp, -z, yes, options.focal_gamma) + _surprise(xp, z, no, options.focal_gamma)


def _coefficients(xp: Namespace, t: Any, options: SigmoidOptions) -> tuple[Any, Any]:
    """Return what the two logarithms are multiplied by."""
    yes, no, smoothing = t, 1.0 - t, options.label_smoothing
    if smoothing != 0.0:
        # Of both: 1 - (1 - smoothing / 2) would have few digits.
        yes, no = ((1.0 - smoothing) * each + smoothing / 2.0 for each in (yes, no))
    if options.pos_weight is not None:
        yes = weighted(xp, yes, with_axes(options.pos_weight, t.ndim))
    if options.weight is not None:
        weight = with_axes(options.weight, t.ndim)
        yes, no = weighted(xp, yes, weight), weighted(xp, no, weight)
    return yes, no


def _where_it_counts(xp: Namespace, y: Any, coefficient: Any) -> Any:
    """Return the logits with 0 for an infinity or nan that nothing is made of."""
    never = (constant(xp, coefficient) == 0) & ~xp.isfinite(constant(xp, y))
    return xp.where(never, scalar(xp, 0.0, y), y)


def _surprise(xp: Namespace, y: Any, coefficient: Any, gamma: float) -> Any:
    """Return coefficient * sigmoid(y)^gamma * softplus(y)."""
    y = _where_it_counts(xp, y, coefficient)
    loss = softplus(xp, y)
    if gamma != 0.0:
        # The power is 1 beside so large a loss, and its derivative 0, times what may be infinite.
        far = constant(xp, loss) > 1e5
        near = xp.where(far, scalar(xp, 0.0, loss), loss)
        loss = xp.where(far, loss, _power(xp, -y, gamma) * near)
    return coefficient * loss


def softplus(xp: Namespace, y: Any) -> Any:
    """log(1 + exp(y)) = max(y, 0) + log1p(exp(-|y|))."""
    negative, zero = y < 0, scalar(xp, 0.0, y)
    # max and abs, but with a second derivative at 0.
    return xp.where(negative, zero, y) + xp.log1p(xp.exp(xp.where(negative, y, -y)))


def _power(xp: Namespace, y: Any, gamma: float) -> Any:
    """Return (1 / (1 + exp(y)))^gamma, exp(-gamma softplus(y)).

    An exponent of 100 that is off by half a unit is 100 halves of one in its exponential. So what
    the product of gamma and max(y, 0) is off by is put back (Dekker 1971).
    """
    negative, zero, one = y < 0, scalar(xp, 0.0, y), scalar(xp, 1.0, y)
    big = xp.where(negative, zero, y)
    small = xp.log1p(xp.exp(xp.where(negative, y, -y)))
    by = divisor(xp, gamma, y)
    product, high = big * by.high, one * by.high
    (b1, b2), (g1, g2) = halves(xp, constant(xp, big)), halves(xp, high)
    error = ((b1 * g1 - constant(xp, product)) + b1 * g2 + b2 * g1) + b2 * g2
    error = error + constant(xp, big) * by.low
    error = times_power_of_2(xp, xp.where(xp.isfinite(error), error, zero), by.exponent)
    return xp.exp(-times_power_of_2(xp, product, by.exponent)) * (
        xp.exp(-gamma * small) * (1.0 - error)
    )


def sigmoid(xp: Namespace, y: Any) -> Any:
    """1 / (1 + exp(-y)) with all its digits at both ends."""
    negative = y < 0
    e = xp.exp(xp.where(negative, y, -y))
    return xp.where(negative, e, scalar(xp, 1.0, y)) / (1.0 + e)


def _reduced(xp: Namespace, loss: Any, reduction: str) -> Any:
    return loss if reduction == "none" else reduced(xp, loss, EVERY, 0, reduction)
