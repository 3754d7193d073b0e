"""Few cases of many options, in which each two or three values of different options meet."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable
from functools import cache

from backends import Backend

Case = tuple[Hashable, ...]
# Libraries that take the portable code as array_api_strict does, which is quicker.
SAME_CODE = ("cubed", "ndonnx", "mlx", "dpnp")


def combined(xp: Backend, *choices: tuple[Hashable, ...], strength: int = 3) -> list[Case]:
    """Return each case of an option's value from each of `choices` on NumPy, elsewhere a few.

    There each `strength` values of different options meet in one of them, or each two where no
    code is the library's own.
    """
    if xp.name == "numpy":
        return list(itertools.product(*choices))
    return covering(*choices, strength=min(strength, 2) if xp.name in SAME_CODE else strength)


@cache
def covering(*choices: tuple[Hashable, ...], strength: int = 3) -> list[Case]:
    """Return a covering array, chosen greedily.

    Few faults need more than three options to show (Kuhn, Wallace, Gallo 2004).
    """
    left = {case: set(meetings(case, strength)) for case in itertools.product(*choices)}
    found = []
    while left:
        best = max(left, key=lambda case: len(left[case]))  # the first of equals
        found.append(best)
        met = left.pop(best)
        for rest in left.values():
            rest -= met
        left = {case: rest for case, rest in left.items() if rest}
    return found


def meetings(case: Case, strength: int) -> Iterable[tuple[tuple[int, Hashable], ...]]:
    """Return which values, each with the number of its option, are together in a case."""
    return itertools.combinations(enumerate(case), min(strength, len(case)))
