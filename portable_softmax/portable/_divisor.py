"""Division by a number that the dtype may not hold, such as a temperature of 1e300 in float32.

The number is taken apart into ``mantissa * 2**exponent``. Dividing by the power of two is exact, in
steps that each stay inside the dtype's range.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from portable_softmax import libraries
from portable_softmax._typing import Namespace
from portable_softmax.libraries import constant, scalar


class Divisor(NamedTuple):
    """A positive number, ``(high + low) * 2**exponent``."""

    exponent: int
    high: float  # in (0.5, 1], and exact in the dtype
    low: float  # what `high` leaves of the mantissa


def divisor(xp: Namespace, number: float, like: Any) -> Divisor:
    """Take a positive number apart, for division in the dtype of `like`."""
    if number == 1.0:
        return Divisor(0, 1.0, 0.0)
    if not libraries.of(xp).is_known(number):  # a compiler's symbol; beyond 2**100 nothing changes
        return Divisor(0, max(2.0**-100, min(2.0**100, number)), 0.0)
    mantissa, exponent = math.frexp(number)
    if mantissa == 0.5:
        mantissa, exponent = 1.0, exponent - 1
    unit = 2.0 ** _digits(xp, like)
    high = round(mantissa * unit) / unit
    return Divisor(exponent, high, mantissa - high)


def divided(xp: Namespace, x: Any, number: float) -> Any:
    """Return x / number."""
    d = divisor(xp, number, x)
    return times_power_of_2(xp, x, -d.exponent) / d.high


def times_power_of_2(xp: Namespace, x: Any, exponent: int) -> Any:
    """Return x * 2**exponent."""
    factors = powers_of_2(xp, exponent, x)
    for factor in factors:
        product = x * factor
        # XLA merges constant factors, here into one out of range, but not across a `where`.
        x = product if len(factors) == 1 else xp.where(xp.isinf(x), x, product)
    return x


def powers_of_2(xp: Namespace, exponent: int, like: Any) -> list[float]:
    """Return the factors of 2**exponent, each well inside the range of the dtype of `like`.

    Beyond three of them everything but 0 is 0 or infinite.
    """
    if exponent == 0:
        return []
    most = ordinary(xp, like.dtype)
    factors: list[float] = []
    while exponent and len(factors) < 3:
        factor = max(-most, min(most, exponent))
        factors.append(2.0**factor)
        exponent -= factor
    return factors


def ordinary(xp: Namespace, dtype: Any) -> int:
    """Return the exponent up to which powers of 2, and their last digits, are normal numbers."""
    return 100 if xp.finfo(dtype).bits == 32 else 900


def quotient_error(xp: Namespace, x: Any, q: Any, by: Divisor) -> Any:
    """Return ``x / m - q`` for q = fl(x / m) and the mantissa m of a divisor, where q is finite.

    x - q * m is exact with the product q * m in two parts (Dekker 1971, "A floating-point technique
    for extending the available precision").
    """
    x, q = constant(xp, x), constant(xp, q)
    m = scalar(xp, 1.0, q) * by.high  # a product, as `high` may be a compiler's symbol
    (q1, q2), (m1, m2) = halves(xp, q), halves(xp, m)
    product = q * m
    error = ((q1 * m1 - product) + q1 * m2 + q2 * m1) + q2 * m2
    return ((x - product) - error - q * by.low) / m


def halves(xp: Namespace, x: Any) -> tuple[Any, Any]:
    """Split x into two numbers of half as many digits (Veltkamp 1968)."""
    c = (2.0 ** math.ceil(_digits(xp, x) / 2) + 1.0) * x
    high = c - (c - x)
    return high, x - high


def _digits(xp: Namespace, like: Any) -> int:
    return 1 - round(math.log2(xp.finfo(like.dtype).eps))
