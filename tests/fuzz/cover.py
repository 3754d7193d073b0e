"""A few of the drawn cases that hold every pair of what a call can have."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import numpy as np

from tests.fuzz import cases
from tests.fuzz.cases import BINARY, Case
from tests.fuzz.draw import Traits

# What vectors, blocks and groups of rows, parts of a row, and pieces for threads differ by.
LENGTHS, LARGE = (0, 1, 8, 32, 128, 1024, 4096, 30_000), 1 << 16


def features(case: Case) -> list[tuple[str, str]]:
    """Return what a case has, by name: dtypes, layouts, the axes, the length of a row, options."""
    if case.refused is not None:
        return [("refused", f"{case.refused.error} {case.refused.names}")]
    first, *others = case.arrays.items()
    shape = case.first.shape
    axes = tuple(range(len(shape))) if case.function in BINARY else case.axes
    length = math.prod(shape[a] for a in axes)
    place = "last" if axes == (len(shape) - 1,) else "another" if len(axes) == 1 else "several"
    found = {
        "dtype": first[1].values.dtype.name,
        "layout": first[1].layout,
        "axes": place,
        "length": str(sum(length > most for most in LENGTHS)),
        "large": str(case.first.size >= LARGE),
    }
    for name, argument in others:
        whole, alike = argument.values.ndim == len(shape), argument.layout == first[1].layout
        found[name] = f"{whole} {alike}"
    for name, value in case.options.items():
        found[name] = str(value) if isinstance(value, str | bool) else "given"
    return sorted(found.items())


def cover(
    traits: Traits,
    function: str,
    *,
    seed: int = 0,
    drawn: int = 1000,
    takes: Callable[[Case], bool] = lambda case: True,
) -> list[Case]:
    """Return those of the first cases of a seed of which each has a pair that none before it had.

    So every two values that any of them has together are in one of the few that are returned.
    `takes` tells which cases there is an answer to.
    """
    seen: set[tuple[tuple[str, str], ...]] = set()
    kept = []
    for number in range(drawn):
        with np.errstate(all="ignore"):
            case = cases.make(traits, seed, number, (function,))
        has = features(case)
        pairs = {(one,) for one in has} | set(combinations(has, 2))
        if not pairs <= seen and takes(case):
            kept.append(case)
            seen |= pairs
    return kept
