"""Axes, numbers and names: what is checked by itself."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

import numpy as np

REDUCTIONS = ("mean", "sum", "none")
_AXIS = "an int, or where several are allowed a tuple of ints or None"


def axes(axis: Any, ndim: int) -> tuple[int, ...]:
    """Return `axis`, an int, a tuple of ints or None for all, as non-negative ints."""
    if axis is None:
        return tuple(range(ndim))
    if type(axis) is int and -ndim <= axis < ndim:
        return (axis % ndim,)
    given = axis if isinstance(axis, tuple) else (axis,)
    if ndim == 0 and given:
        raise _axis_error(whole("axis", given[0], _AXIS), ndim, "pass axis=None")
    found = tuple(one_axis(a, ndim) for a in given)
    if len(set(found)) != len(found):
        raise ValueError(f"axis is {axis}, which names an axis twice: name each axis once")
    return found


def one_axis(axis: Any, ndim: int) -> int:
    """Return the int `axis` as a non-negative one."""
    index = whole("axis", axis, _AXIS)
    if not -ndim <= index < ndim:
        raise _axis_error(index, ndim)
    return index % ndim


def whole(name: str, value: Any, expected: str) -> int:
    """Return `value` as an int, which a bool is not."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, expected {expected}") from None


def _axis_error(axis: Any, ndim: int, remedy: str = "") -> Exception:
    # NumPy's AxisError is both a ValueError and an IndexError, whichever a caller catches.
    if not remedy:
        remedy = f"pass an axis from {-ndim} to {ndim - 1}" if ndim else "give the array an axis"
    return np.exceptions.AxisError(f"axis is {axis}, but the array has {ndim} dimensions: {remedy}")


def number(
    name: str,
    value: Any,
    *,
    low: float,
    high: float = math.inf,
    open_low: bool = False,
    infinite: bool = False,
) -> float:
    """Return `value` as a float inside the range, which holds no nan, and infinity if asked."""
    open_high = high == math.inf and not infinite

    def inside() -> str:
        return f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"

    if type(value) is float:
        answer = value
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name} is {value!r}, expected a Python number in {inside()}: an array cannot be "
            "taken, scale the array instead"
        )
    else:
        answer = float(real(name, value, inside()))
    above = answer > low if open_low else answer >= low
    if not (above and answer <= high and not (open_high and answer == math.inf)):
        raise ValueError(f"{name} is {answer}, expected a number in {inside()}")
    return answer


def real(name: str, value: Any, inside: str = "(-inf, inf)") -> Any:
    """Return a number as a float; a NumPy scalar keeps its digits."""
    if isinstance(value, np.floating):
        return value
    try:
        return float(value)
    except OverflowError:  # a large int or Fraction, whose digits would fill the screen
        raise ValueError(
            f"{name} is beyond the range of a float, expected a number in {inside}"
        ) from None


def temperature(value: Any) -> float:
    """Return the temperature, a positive finite number."""
    return number("temperature", value, low=0.0, open_low=True)


def reduction(value: Any) -> str:
    """Return the reduction, one of `REDUCTIONS`."""
    if value not in REDUCTIONS:
        raise ValueError(
            f"reduction is {value!r}, expected one of {', '.join(map(repr, REDUCTIONS))}"
        )
    return str(value)


def ignore_index(value: Any, indices: bool) -> int | None:
    """Return `ignore_index` as an int."""
    if value is None:
        return None
    if not indices:
        raise ValueError(
            f"ignore_index is {value}, but labels are a distribution, which no index can leave "
            "out: set those rows of labels to 0, or pass class indices"
        )
    return whole("ignore_index", value, "an int or None: pass int(ignore_index)")


def tile(value: Any) -> int:
    """Return the largest number of bytes of a tile."""
    found = whole("tile", value, "a number of bytes, an int, or None: pass int(tile)")
    if found < 1:
        raise ValueError(f"tile is {found}, expected a positive number of bytes, or None")
    return found
