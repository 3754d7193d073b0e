"""The cross-entropy of rows that come in parts of their classes: fold a part, merge parts, finish.

The classes of a part give a state (max, rest) and the sums ::

    gap = sum_j q_j (max - x_j)          Q = sum_j q_j          u = sum_j weight_j t_j

with the coefficients q and u of `_cross_entropy`. They merge as the states do, and ::

    loss   = gap + Q log1p(rest) + z_loss u logsumexp^2
    grad_j = p_j Q - q_j + p_j A         A = 2 z_loss u logsumexp

The classes are the last of two axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

from portable_softmax._typing import Namespace
from portable_softmax.libraries import cast, scalar
from portable_softmax.portable._cross_entropy import (
    Options,
    Target,
    coefficients,
    conditioned,
    through_conditions,
    times,
)
from portable_softmax.portable._divisor import Divisor
from portable_softmax.portable._online import fold_part, merge
from portable_softmax.portable._state import exponentials
from portable_softmax.portable._sums import total


class Part(NamedTuple):
    """Some classes of some positions; `q` and what is summed of it have no infinite weight."""

    inputs: Any  # the logits before `softcap`
    x: Any  # the logits that are folded
    mask: Any  # which take part, or None
    q: Any
    u: Any


class Sums(NamedTuple):
    """What there is one of a position, with length 1 along the classes."""

    max: Any
    rest: Any
    gap: Any
    q: Any
    u: Any


def part_of_loss(
    xp: Namespace,
    x: Any,
    there: Any,
    labels: Target,
    mask: Any,
    weight: Any,
    count: Any,
    options: Options,
) -> Part:
    """Return a part, from its logits and what the labels, the mask and the weights are there.

    `there` are the numbers of the classes, or a distribution over them; `count` is the number of
    all classes of a row that take part.
    """
    inputs, x = conditioned(xp, x, mask, labels.counted, options.softcap)
    if mask is not None:
        x = xp.where(mask, x, scalar(xp, -math.inf, x))
    t = there if labels.index is None else cast(xp, there == labels.index, x.dtype)
    q, u = coefficients(xp, t, mask, weight, count, labels, 1, options.label_smoothing)
    return Part(inputs, x, mask, q, u)


def _finite(xp: Namespace, m: Any) -> Any:
    return xp.where(xp.isinf(m), scalar(xp, 0.0, m), m)


def _gap(xp: Namespace, q: Any, difference: Any) -> Any:
    """Return q * difference, 0 where one is 0 and the other infinite: a weight may be."""
    nothing = xp.isinf(q) & (difference == 0)
    return xp.where(nothing, scalar(xp, 0.0, difference), times(xp, q, difference))


def fold_part_of_loss(xp: Namespace, part: Part, state: tuple[Any, Any] | None = None) -> Sums:
    """Return the sums of a part; `state` is that of its logits, where it is known."""
    m, rest = fold_part(xp, part.x, (1,)) if state is None else state
    gap = total(xp, _gap(xp, part.q, _finite(xp, m) - part.x), (1,))
    return Sums(m, rest, gap, total(xp, part.q, (1,)), part.u)


def gap_toward(xp: Namespace, sums: Sums, m: Any) -> Any:
    """Return the gap of a part, from a maximum m of all parts."""
    return sums.gap + _gap(xp, sums.q, _finite(xp, m) - _finite(xp, sums.max))


def merge_losses(xp: Namespace, parts: Sequence[Sums]) -> Sums:
    """Return the sums of all parts."""
    m, rest = merge(xp, [(s.max, s.rest) for s in parts])
    gaps = [gap_toward(xp, s, m) for s in parts]
    sums = (gaps, [s.q for s in parts], [s.u for s in parts])
    return Sums(m, rest, *[reduce(lambda a, b: a + b, each) for each in sums])


def finished_loss(xp: Namespace, sums: Sums, labels: Target, options: Options) -> tuple[Any, Any]:
    """Return the losses and A, of the positions' shape with the class axis of length 1."""
    log, z = cast(xp, xp.log1p(sums.rest), sums.gap.dtype), options.z_loss
    loss, a, lse = sums.gap + times(xp, sums.q, log), xp.zeros_like(log), sums.max + log
    if z != 0.0:
        loss = loss + times(xp, sums.u, z * (lse * lse))
        a = times(xp, sums.u, 2.0 * z * lse)
    if labels.valid is not None:
        factor = xp.where(labels.valid, scalar(xp, 1.0, loss), scalar(xp, math.nan, loss))
        loss, a = loss * factor, a * factor
    if labels.counted is not None:
        loss = xp.where(labels.counted, loss, scalar(xp, 0.0, loss))
    return loss, a


def gradient_of_part(
    xp: Namespace, part: Part, sums: Sums, a: Any, options: Options, counted: Any
) -> Any:
    """p_j Q - q_j, as `_cross_entropy` has it, and p_j A: added to Q it would lose its digits."""
    rest = cast(xp, sums.rest, part.x.dtype)
    _, exps = exponentials(xp, part.x, sums.max, Divisor(0, 1.0, 0.0))
    g = (((exps * sums.q - part.q) - part.q * rest) + exps * a) * (1.0 / (1.0 + rest))
    return through_conditions(xp, g, part.inputs, part.mask, counted, options.softcap)
