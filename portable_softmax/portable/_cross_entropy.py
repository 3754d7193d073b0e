"""Cross-entropy and its gradient, in the standard alone.

Every loss is one sum over the classes. With the coefficients

    q_j = weight_j * ((1 - label_smoothing) * t_j + label_smoothing / C)        Q = sum_j q_j

of a target distribution t (one-hot for a class index), and u = sum_j weight_j * t_j, both times
the position's own weight,

    loss   = sum_j q_j * ((max - x_j) + log1p(rest))  +  z_loss * u * logsumexp^2
    grad_j = p_j * (Q + 2 * z_loss * u * logsumexp) - q_j                       p = softmax(x)

where x are the logits after `softcap` and without the classes that `where` masks out. All arrays
here have the logits' number of dimensions: per-position values have length 1 along the class axis.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from portable_softmax import libraries
from portable_softmax._typing import Namespace
from portable_softmax.libraries import cast, constant, device, scalar
from portable_softmax.portable._divisor import divided
from portable_softmax.portable._softmax import masked
from portable_softmax.portable._state import State, fold, maximum
from portable_softmax.portable._sums import total


class Options(NamedTuple):
    """The options of the loss, checked, and arrays among them in the dtype of the computation."""

    weight: Any = None  # (C,)
    ignore_index: int | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    where: Any = None
    reduction: str = "mean"
    dtype: Any = None  # of the loss, where that is not the usual one
    sample_weight: Any = None  # one per position


class Target(NamedTuple):
    """The labels, as class indices or as a distribution."""

    index: Any  # class indices inside [0, C), or None for a distribution
    distribution: Any  # t, or None for class indices
    counted: Any  # bool: not ignored, nor of weight 0; None where every position counts
    valid: Any  # bool: ignored, or the index of a class; None for a distribution
    weight: Any = None  # what it counts in a mean, 0 where ignored; None where it is 1 everywhere
    sample: Any = None  # its own weight; None where it is 1 everywhere


EVERY = Target(None, None, None, None)  # every position counts as much as another


# --------------------------------------------------------------------------- targets


def classes(xp: Namespace, x: Any, axis: int) -> Any:
    """Return 0 .. C-1 along `axis`."""
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    dtype = libraries.of(xp).default_int(x)
    return xp.reshape(xp.arange(x.shape[axis], dtype=dtype, device=device(x)), tuple(shape))


def with_class_axis(x: Any, axis: int) -> Any:
    """Return per-position values with a class axis of length 1."""
    # Dask expands no axis beside one of unknown length, but indexes there.
    return x[(*(slice(None),) * axis, None, ...)]


def index_target(
    xp: Namespace, x: Any, labels: Any, axis: int, options: Options, dtype: Any
) -> Target:
    """Return the target of class indices, with the weights of the labels in `dtype`."""
    labels = with_class_axis(labels, axis)
    index = cast(xp, labels, libraries.of(xp).default_int(x))
    n = x.shape[axis]
    valid = (index >= 0) & (index < n)
    index = xp.where(valid, index, xp.zeros_like(index))
    if options.where is not None:
        valid = valid & pick(xp, options.where, index, axis, x)
    weight = None
    if options.weight is not None:
        weight = pick(xp, _along(xp, options.weight, x, axis), index, axis, x)
    return weighted_target(xp, labels, index, valid, weight, axis, options, dtype)


def weighted_target(
    xp: Namespace,
    labels: Any,
    index: Any,
    valid: Any,
    weight: Any,
    axis: int,
    options: Options,
    dtype: Any,
) -> Target:
    """Return the target of class indices, from the weights of their classes or None."""
    sample = options.sample_weight
    if sample is not None:
        sample = with_class_axis(sample, axis)
        weight = sample if weight is None else weight * sample
    counted = counted_positions(xp, labels, options.ignore_index, sample)
    if counted is not None:
        valid = valid | ~counted
        if weight is None:
            weight = cast(xp, counted, dtype)
        else:
            weight = xp.where(counted, weight, scalar(xp, 0.0, weight))
    return Target(index, None, counted, valid, weight, sample)


def distribution_target(distribution: Any, axis: int, options: Options) -> Target:
    """Return the target of a distribution over the classes."""
    sample = options.sample_weight
    if sample is None:
        return Target(None, distribution, None, None)
    sample = with_class_axis(sample, axis)
    return Target(None, distribution, sample != 0, None, sample, sample)


def counted_positions(xp: Namespace, labels: Any, ignore_index: int | None, sample: Any) -> Any:
    """Return which positions are neither ignored nor of weight 0, None where every one counts."""
    counted = not_ignored(xp, labels, ignore_index)
    if sample is not None:
        counted = (sample != 0) if counted is None else counted & (sample != 0)
    return counted


def not_ignored(xp: Namespace, labels: Any, ignore_index: int | None) -> Any:
    """Return where the labels are not `ignore_index`, or None where no label can be."""
    if ignore_index is None:
        return None
    # In the labels' own dtype: another one would wrap indices around.
    limits = xp.iinfo(labels.dtype)
    if not limits.min <= ignore_index <= limits.max:
        return None
    return labels != scalar(xp, ignore_index, labels)


def pick(xp: Namespace, values: Any, index: Any, axis: int, x: Any) -> Any:
    """Return ``values[index]`` along `axis`, kept with length 1; `values` broadcast to `x`."""
    if libraries.of(xp).gathers and x.shape[axis] > 0:
        return libraries.of(xp).take_along_axis(xp.broadcast_to(values, x.shape), index, axis)
    hit = classes(xp, x, axis) == index
    if xp.isdtype(values.dtype, "bool"):
        return xp.any(hit & values, axis=axis, keepdims=True)
    # The sum of one entry and zeros is the entry, whatever the others hold.
    return xp.sum(xp.where(hit, values, scalar(xp, 0.0, values)), axis=axis, keepdims=True)


# --------------------------------------------------------------------------- the public pair


def cross_entropy(xp: Namespace, logits: Any, target: Target, axis: int, options: Options) -> Any:
    """Return the reduced loss."""
    loss, _, _ = _forward(xp, logits, target, axis, options)
    return reduced(xp, loss, target, axis, options.reduction)


def cross_entropy_value_and_grad(
    xp: Namespace, logits: Any, target: Target, axis: int, options: Options
) -> tuple[Any, Any]:
    """Return the reduced loss and the gradient of its sum with respect to the logits."""
    loss, state, rows = _forward(xp, logits, target, axis, options)
    grad = _gradient(xp, state, rows, target, axis, options)
    if options.reduction == "mean":
        grad = grad / nothing_to_inf(xp, mean_divisor(xp, loss, target))
    if target.valid is not None:
        grad = xp.where(target.valid, grad, scalar(xp, math.nan, grad))
    grad = through_conditions(xp, grad, rows.inputs, options.where, target.counted, options.softcap)
    return reduced(xp, loss, target, axis, options.reduction), grad


def nll_loss(xp: Namespace, log_y: Any, target: Target, axis: int, options: Options) -> Any:
    """Return the reduced loss -log_y of the labels, for log-probabilities."""
    loss = -pick(xp, log_y, target.index, axis, log_y)
    if target.weight is not None:
        loss = times(xp, target.weight, loss)
    loss = _of_valid_positions(xp, loss, target)
    return reduced(xp, loss, target, axis, options.reduction)


# --------------------------------------------------------------------------- one row


class Rows(NamedTuple):
    """What loss and gradient share."""

    inputs: Any  # the logits before `softcap`, 0 where they are ignored or masked
    x: Any  # the logits that are folded
    q: Any  # the coefficients; None where they are u at the label and 0 elsewhere
    u: Any  # sum of weight * t, 0 where ignored; None where it is 1 everywhere


def _forward(
    xp: Namespace, logits: Any, target: Target, axis: int, options: Options
) -> tuple[Any, State, Rows]:
    inputs, x = conditioned(xp, logits, options.where, target.counted, options.softcap)
    if options.where is not None:
        x, _ = masked(xp, x, options.where, (axis,))
    if target.index is not None and options.label_smoothing == 0.0:
        rows = Rows(inputs, x, None, target.weight)
        loss, state = _index_loss(xp, rows, target, axis, options)
    else:
        rows = _distribution_rows(xp, inputs, x, target, axis, options)
        loss, state = _distribution_loss(xp, rows, axis, options)
    return _of_valid_positions(xp, loss, target), state, rows


def _of_valid_positions(xp: Namespace, loss: Any, target: Target) -> Any:
    """Return the losses, nan where the label has no class and 0 where it is ignored."""
    if target.valid is not None:
        # A factor: `where` between two losses would multiply nan by the gradient 0.
        loss = loss * xp.where(target.valid, scalar(xp, 1.0, loss), scalar(xp, math.nan, loss))
    if target.counted is not None:
        loss = xp.where(target.counted, loss, scalar(xp, 0.0, loss))
    return loss


def conditioned(
    xp: Namespace, x: Any, mask: Any, counted: Any, softcap: float | None
) -> tuple[Any, Any]:
    """Return the logits with 0 in place of masked and ignored ones, before and after `softcap`."""
    zero = scalar(xp, 0.0, x)
    for part in (mask, counted):
        if part is not None:
            x = xp.where(part, x, zero)
    return x, x if softcap is None else softcapped(xp, x, softcap)


def through_conditions(
    xp: Namespace, grad: Any, inputs: Any, mask: Any, counted: Any, softcap: float | None
) -> Any:
    """Return the gradient with respect to the logits, from that to what `conditioned` returns."""
    if softcap is not None:
        grad = grad * softcap_derivative(xp, inputs, softcap)
    for part in (mask, counted):
        if part is not None:
            grad = xp.where(part, grad, scalar(xp, 0.0, grad))
    return grad


def softcapped(xp: Namespace, x: Any, cap: float) -> Any:
    """cap * tanh(x / cap)."""
    if 2.0**-60 < cap < 2.0**60:
        return cap * _tanh(xp, x / cap)
    # Beside such a cap x / cap may underflow. There, and at 0 for every cap, this is x.
    ratio = divided(xp, x, cap)
    is_x = xp.abs(ratio) < 2.0**-30
    if cap <= float(xp.finfo(x.dtype).max):
        return xp.where(is_x, x, cap * _tanh(xp, ratio))
    is_x = is_x | xp.isinf(x)
    ratio = xp.where(is_x, scalar(xp, 1.0, ratio), ratio)
    return xp.where(is_x, x, x * (_tanh(xp, ratio) / ratio))


def _tanh(xp: Namespace, y: Any) -> Any:
    """tanh(y), so that a library that differentiates it has the digits of the derivative.

    That is 1 - tanh^2 to libraries, of which few digits are left where tanh is close to 1.
    """
    if not libraries.of(xp).differentiates:
        return xp.tanh(y)
    size = _size(xp, y)
    e = xp.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    return xp.where(size < 0.5, xp.tanh(y), xp.where(y < 0, -far, far))


def _size(xp: Namespace, x: Any) -> Any:
    """Return abs(x), but with a second derivative at 0."""
    return xp.where(x < 0, -x, x)


def softcap_derivative(xp: Namespace, x: Any, cap: float) -> Any:
    """1 - tanh(x/cap)^2, written as 1/cosh^2 to keep its digits where tanh is close to 1."""
    e = xp.exp(-2.0 * divided(xp, _size(xp, x), cap))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


def _along(xp: Namespace, weight: Any, x: Any, axis: int) -> Any:
    """Lay the weights of the classes along the class axis."""
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    return xp.reshape(weight, tuple(shape))


def _index_loss(
    xp: Namespace, rows: Rows, target: Target, axis: int, options: Options
) -> tuple[Any, State]:
    """Return u * ((max - x_label) + log1p(rest)), the rows' loss."""
    x = rows.x
    at_label = pick(xp, x, target.index, axis, x)
    if libraries.of(xp).differentiates:
        state, gap = _fold_from_label(xp, x, at_label, target.index, axis)
    else:
        state = fold(xp, x, (axis,))
        gap = state.max - at_label
    loss = gap + state.log
    if options.z_loss != 0.0:
        lse = state.max + state.log
        loss = loss + options.z_loss * (lse * lse)
    if rows.u is not None:
        loss = times(xp, rows.u, loss)
    return loss, state


def _fold_from_label(
    xp: Namespace, x: Any, at_label: Any, index: Any, axis: int
) -> tuple[State, Any]:
    """Fold a row so that automatic differentiation keeps a confident label's digits.

    loss = log sum_j exp(x_j - x_label) has the derivative -sum of the other probabilities at the
    label, because each term but the label's own depends on x_label. Written as (max - x_label) +
    log1p(rest) it would be p_label - 1, which cancels. So the value is the latter's and the
    derivative is the former's: `attach` adds a zero with the derivative of x_j - x_label.
    """
    zero, m = scalar(xp, 0.0, x), maximum(xp, x, (axis,))
    finite = xp.isfinite(m)  # in another row every derivative is nan, as the loss is
    infinite = finite & xp.isinf(at_label)
    linear = xp.where(infinite, zero, at_label)
    label = classes(xp, x, axis) == index

    def attach(shifted: Any) -> Any:
        moved = (x - constant(xp, x)) - (linear - constant(xp, linear))
        apart = label | (constant(xp, shifted) == -math.inf)  # the label's term is a constant
        return constant(xp, shifted) + xp.where(finite & apart, zero, moved)

    state = fold(xp, x, (axis,), shift=m, attach=attach)
    gap = state.max - xp.where(infinite, at_label, constant(xp, at_label))
    # The derivative that the shift took from the logarithm goes to the maximum, for logsumexp.
    return state._replace(max=state.max + (linear - constant(xp, linear))), gap


def _distribution_rows(
    xp: Namespace,
    inputs: Any,
    x: Any,
    target: Target,
    axis: int,
    options: Options,
) -> Rows:
    if target.index is not None:
        zero, one = scalar(xp, 0.0, x), scalar(xp, 1.0, x)
        t = xp.where(classes(xp, x, axis) == target.index, one, zero)
    else:
        t = target.distribution
    smoothing, weight, count = options.label_smoothing, options.weight, None
    if smoothing != 0.0:
        count = _class_count(xp, x, axis, options)
    if weight is not None:
        weight = _along(xp, weight, x, axis)
    q, u = coefficients(xp, t, options.where, weight, count, target, axis, smoothing)
    return Rows(inputs, x, q, u)


def coefficients(
    xp: Namespace, t: Any, mask: Any, weight: Any, count: Any, target: Target, axis: int,
    smoothing: float,
) -> tuple[Any, Any]:  # fmt: skip
    """Return q, and u as the sum over these classes; `count` is the number of all that take part.

    The weights of the classes lie along the class axis.
    """
    zero = scalar(xp, 0.0, t)
    t = t if mask is None else xp.where(mask, t, zero)
    q = t
    if smoothing != 0.0:
        q = (1.0 - smoothing) * t + smoothing / count
        q = q if mask is None else xp.where(mask, q, zero)
    for factor in (weight, target.sample):
        if factor is not None:
            t, q = weighted(xp, t, factor), weighted(xp, q, factor)
    u = total(xp, t, (axis,))
    if target.counted is not None:
        q, u = xp.where(target.counted, q, zero), xp.where(target.counted, u, zero)
    return q, u


def weighted(xp: Namespace, coefficient: Any, weight: Any) -> Any:
    """Return coefficient * weight, 0 where the coefficient is 0, whatever the weight."""
    never = (coefficient == 0) & ~xp.isfinite(weight)
    return coefficient * xp.where(never, scalar(xp, 0.0, weight), weight)


def _class_count(xp: Namespace, x: Any, axis: int, options: Options) -> Any:
    if options.where is None:
        return max(x.shape[axis], 1)
    part = xp.where(options.where, xp.ones_like(x), scalar(xp, 0.0, x))
    count = xp.sum(part, axis=axis, keepdims=True)
    return xp.where(count == 0, scalar(xp, 1.0, count), count)


def _distribution_loss(xp: Namespace, rows: Rows, axis: int, options: Options) -> tuple[Any, State]:
    state = fold(xp, rows.x, (axis,))
    surprise = (state.max - rows.x) + state.log
    loss = total(xp, times(xp, rows.q, surprise), (axis,))
    if options.z_loss != 0.0:
        lse = state.max + state.log
        loss = loss + times(xp, rows.u, options.z_loss * (lse * lse))
    return loss, state


def times(xp: Namespace, coefficient: Any, value: Any) -> Any:
    """Return coefficient * value, 0 where the coefficient is 0 and the value is infinite."""
    zero = scalar(xp, 0.0, value)
    never = (coefficient == 0) & xp.isinf(value)
    return coefficient * xp.where(never, zero, value)


# --------------------------------------------------------------------------- gradient, reduction


def _gradient(
    xp: Namespace, state: State, rows: Rows, target: Target, axis: int, options: Options
) -> Any:
    """p_j * A - q_j with A = Q + 2 * z_loss * u * logsumexp, without its cancellation.

    With p_j = e_j / (1 + rest) this is ((e_j Q - q_j) - q_j rest + e_j (A - Q)) / (1 + rest). At
    the label of a confident row e_j Q - q_j is an exact 0, and -q_j rest is minus the sum of the
    others.
    """
    inverse = 1.0 / (1.0 + state.rest)
    u = scalar(xp, 1.0, state.exps) if rows.u is None else rows.u
    if rows.q is None:
        q = a = u
    else:
        q, a = rows.q, total(xp, rows.q, (axis,))
    scaled = state.exps * a
    grad = (scaled - q) - q * state.rest
    if rows.q is None:
        label = classes(xp, state.exps, axis) == target.index
        grad = xp.where(label, grad, scaled)
    if options.z_loss != 0.0:
        squared = times(xp, u, 2.0 * options.z_loss * (state.max + state.log))
        grad = grad + state.exps * squared
    return grad * inverse


def mean_divisor(xp: Namespace, loss: Any, target: Target) -> Any:
    """Return the divisor of the mean: the weights that count, or the number of positions."""
    if target.weight is not None:
        return xp.sum(total(xp, target.weight, tuple(range(loss.ndim))))
    # None: an open length of a graph; nan: chunks of unknown length.
    if any(n is None or n != n for n in loss.shape):
        return xp.sum(xp.ones_like(loss))
    return scalar(xp, math.prod(loss.shape), loss)


def nothing_to_inf(xp: Namespace, divisor: Any) -> Any:
    """Return `divisor` with inf for 0, so that the mean of no position has the gradient 0."""
    return xp.where(divisor == 0, scalar(xp, math.inf, divisor), divisor)


def reduced(xp: Namespace, loss: Any, target: Target, axis: int, reduction: str) -> Any:
    """Reduce the per-position losses."""
    if reduction == "none":
        return xp.squeeze(loss, axis=axis)
    summed = xp.sum(total(xp, loss, tuple(range(loss.ndim))))
    if reduction == "sum":
        return summed
    return mean(xp, summed, mean_divisor(xp, loss, target))


def mean(xp: Namespace, summed: Any, divisor: Any) -> Any:
    """Return a sum of losses divided by the weights that count."""
    # Smoothing may leave a loss where the labels' weights sum to 0, which is no infinite mean but
    # nan: 0 / 0, as a constant nan would be reported by what looks for one (jax.debug_nans).
    zero = scalar(xp, 0.0, summed)
    return xp.where(divisor == 0, zero, summed) / divisor
