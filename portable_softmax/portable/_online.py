"""The state of rows that come in parts: fold a part, merge parts, and finish.

A state is the pair (max, rest) of `_state`, and merging two of them takes one exponential:

    merge((m1, r1), (m2, r2)) = (m1, r1 + (1 + r2) exp(m2 - m1))         for m1 >= m2

Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", with a maximum left out of
the sum. No entry at all, and entries of -inf only, are (-inf, -1), which merges as nothing. The
rest of a row that holds +inf or nan is nan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from portable_softmax import libraries
from portable_softmax._typing import Namespace
from portable_softmax.libraries import cast, constant, device, scalar
from portable_softmax.portable._divisor import divisor, times_power_of_2
from portable_softmax.portable._softmax import masked
from portable_softmax.portable._state import exponentials, fold, from_maximum, maximum

Folded = tuple[Any, Any]


def fold_part(
    xp: Namespace,
    x: Any,
    axes: tuple[int, ...],
    *,
    where: Any = None,
    temperature: float = 1.0,
) -> Folded:
    """Return the maximum of x, and the rest of x / temperature, the axes kept with length 1.

    They are merged and finished with the same temperature, so that nothing of the maximum is
    rounded before it is subtracted. `rest` has the wider dtype, so that any number of merges adds
    nothing to its error that counts in the dtype of `x`, if there is a wider one.
    """
    some = None
    if where is not None:
        x, some = masked(xp, x, where, axes)
    m = maximum(xp, x, axes)
    # As if the maximum were 0 the rest of a row of -inf is -1, and of one with +inf it is nan.
    finite_m = xp.where(xp.isinf(m), scalar(xp, 0.0, m), m)
    exponent = divisor(xp, temperature, x).exponent
    shift = times_power_of_2(xp, finite_m, -max(exponent, 0))
    rest = fold(xp, x, axes, shift=shift, temperature=temperature).rest
    if some is not None:
        m = xp.where(some, m, scalar(xp, -math.inf, m))
        rest = xp.where(some, rest, scalar(xp, -1.0, rest))
    return m, cast(xp, rest, libraries.of(xp).wider_dtype(rest))


def of_nothing(xp: Namespace, x: Any, axes: tuple[int, ...]) -> Folded:
    """Return the state of no entry, for parts of an array like `x`."""
    shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    if all(n is not None and n == n for n in shape):
        m = xp.full(shape, -math.inf, dtype=x.dtype, device=device(x))
    else:  # a length is unknown, which only an array of that shape has
        nothing = xp.zeros_like(xp.sum(x, axis=axes, keepdims=True))
        m = nothing + scalar(xp, -math.inf, nothing)
    return m, cast(xp, xp.full_like(m, -1.0), libraries.of(xp).wider_dtype(m))


def merge(xp: Namespace, states: Sequence[Folded], temperature: float = 1.0) -> Folded:
    """Return the state of all parts, each read once."""
    m = states[0][0]
    for other, _ in states[1:]:
        m = libraries.of(xp).maximum(m, other)
    m = constant(xp, m)  # nothing depends on what is subtracted; the rest has the derivatives
    terms, maxima = [], scalar(xp, -1.0, states[0][1])
    for state in states:
        term, is_max = toward(xp, state, m, temperature)
        terms.append(term)
        maxima = maxima + is_max
    while len(terms) > 1:  # in pairs
        odd = terms[-1:] if len(terms) % 2 else []
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)] + odd
    return m, terms[0] + maxima


def toward(xp: Namespace, state: Folded, m: Any, temperature: float = 1.0) -> tuple[Any, Any]:
    """Return (1 + rest) exp(max - m) of a part without its maximum, and whether that is m.

    The rest of all parts is the sum of both, minus 1.
    """
    part, rest = state
    shift = cast(xp, m, rest.dtype)
    shift = xp.where(xp.isinf(shift), scalar(xp, 0.0, shift), shift)
    is_max = cast(xp, constant(xp, part) == m, rest.dtype)
    exps = _moved(xp, cast(xp, part, rest.dtype), shift, temperature)
    # (1 + rest) exps, where 1 - 1 is left out as a constant, so that its derivative stays.
    return rest * exps + (exps - is_max), is_max


def share_of(xp: Namespace, part: Folded, m: Any, rest: Any) -> Any:
    """Return the sum of the probabilities of a part of rows whose state is (m, rest).

    It is nan in a row without a softmax, whose `rest` is infinite, nan or -1.
    """
    sum_of_others, is_max = toward(xp, part, m)
    return (sum_of_others + is_max) / (1.0 + rest)


def _moved(xp: Namespace, m: Any, shift: Any, temperature: float) -> Any:
    """Return exp((m - shift) / temperature)."""
    by = divisor(xp, temperature, m)
    m, shift = (times_power_of_2(xp, part, -max(by.exponent, 0)) for part in (m, shift))
    return exponentials(xp, m, shift, by)[1]


def logsumexp_of(xp: Namespace, m: Any, rest: Any) -> Any:
    """Return max + log1p(rest); an infinite maximum as it is, with the derivative 0."""
    infinite, wide = xp.isinf(m), cast(xp, m, rest.dtype)
    zero = scalar(xp, 0.0, rest)
    value = xp.where(infinite, wide, wide + xp.log1p(xp.where(infinite, zero, rest)))
    return cast(xp, value, m.dtype)


def softmax_of(xp: Namespace, x: Any, m: Any, rest: Any, temperature: float = 1.0) -> Any:
    """exp(x - max) / (1 + rest)."""
    return xp.exp(from_maximum(xp, x, m, temperature)) / cast(xp, 1.0 + rest, x.dtype)


def log_softmax_of(xp: Namespace, x: Any, m: Any, rest: Any, temperature: float = 1.0) -> Any:
    """(x - max) - log1p(rest)."""
    return from_maximum(xp, x, m, temperature) - cast(xp, xp.log1p(rest), x.dtype)


def cross_entropy_of(xp: Namespace, m: Any, rest: Any, at_label: Any) -> Any:
    """(max - x_label) + log1p(rest)."""
    return (m - at_label) + cast(xp, xp.log1p(rest), m.dtype)
