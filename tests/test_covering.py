"""Few cases of many options, in which each three values of different options meet."""

from __future__ import annotations

import itertools
import math

import pytest
from covering import covering, meetings


@pytest.mark.parametrize("strength", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(3,), (2, 2), (4, 3, 2), (3, 2, 2, 3, 2, 2, 2)], ids=str)
def test_all_values_meet_in_few_cases(sizes, strength):
    choices = [tuple(range(size)) for size in sizes]
    found = covering(*choices, strength=strength)
    met = {meeting for case in found for meeting in meetings(case, strength)}
    every = itertools.product(*choices)
    assert met == {meeting for case in every for meeting in meetings(case, strength)}
    at_least = math.prod(sorted(sizes)[-strength:])
    assert at_least <= len(found) <= 2 * at_least
