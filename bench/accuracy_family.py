"""The accuracy of the rest of the family, in the same cells, against mpmath."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from bench import exact, exact_family, families, peers, places
from bench.accuracy import HALF_BOUND, Cell, Column, compute, distance, distinct, empty

OPERATIONS = tuple(peers.FAMILY)
_OF_HALVES = ("cross_entropy_in_float32",)


class Case(NamedTuple):
    """Rows of one family in one dtype, and what the operations take beside them."""

    family: str
    dtype: str
    axis: int
    x: np.ndarray
    seconds: dict[str, Any]


class Judged(NamedTuple):
    """An operation's exact answers, in extended precision, with a unit and a bound for each."""

    answer: np.ndarray
    unit: np.ndarray
    bound: np.ndarray
    counted: np.ndarray


def measure(providers: list[Column], dtypes: list[str], *, quick: bool) -> Iterator[Cell]:
    """Yield a cell for each operation, family, dtype and provider."""
    cases = [
        _case(family, dtype)
        for family in families.chosen_of_rest(quick=quick)
        for dtype in family.dtypes
        if dtype in dtypes
    ]
    for operation in OPERATIONS:
        for case in cases:
            if operation in _OF_HALVES and case.dtype not in families.HALVES:
                continue
            if case.family == families.SPARSE and operation not in peers.SPARSE:
                continue
            rows = _judged(case, operation)
            labels = case.seconds[peers.FAMILY[operation]]
            labels = labels[0] if isinstance(labels, tuple) else labels
            for column in distinct(providers, operation, case, labels):
                yield _cell(case, operation, column, rows)


def _case(family: families.Family, dtype: str) -> Case:
    rng = np.random.default_rng(0)
    x = family.rows(rng, dtype).astype(places.np_dtype(dtype))
    labels = families.labels(rng, x, -1)
    # A confident logit that is right is the hard one: its loss is far below those beside it.
    other = rng.permuted(x, axis=1)
    near = rng.standard_normal(x.shape) * 1e-3
    other[::2] = (x[::2].astype(np.float64) + near[::2]).astype(x.dtype)
    yes = np.where(rng.random(x.shape) < 0.5, x > 0, rng.random(x.shape) < 0.5)
    seconds = {
        "": labels,
        peers.LABELS: labels,
        peers.WEIGHTED: (labels, rng.uniform(0.1, 2.0, len(x)).astype(x.dtype)),
        peers.YES_OR_NO: yes.astype(x.dtype),
        peers.LOGITS: other,
    }
    return Case(family.name, dtype, -1, x, seconds)


def _judged(case: Case, operation: str) -> Judged:
    rule = exact_family.RULES[operation]
    second = case.seconds[peers.FAMILY[operation]]
    seconds = second if isinstance(second, tuple) else (second,)
    half = case.dtype in families.HALVES
    dtype = "float32" if operation in _OF_HALVES else case.dtype
    u = np.ldexp(1.0, -exact.FORMATS["float32" if half else dtype][0])
    found = []
    with exact_family.mp.workdps(exact_family.DIGITS):
        for i, values in enumerate(case.x):
            row = exact_family.row_of(values)
            values, allowed = rule.exact(row, *(part[i] for part in seconds))
            answer, bound = exact_family.wide(values), rule.bound(row)
            slack = np.asarray([float(a) for a in allowed]) * u
            unit = _unit(answer, dtype)
            counted = (answer == 0) | (np.abs(answer) > 1.01 * exact.smallest_normal(dtype))
            if half and dtype == case.dtype:
                # Rounded once, where an error in float32 cannot decide which way.
                counted &= bound * _unit(answer, "float32") + slack < 0.01 * unit
                bound = HALF_BOUND
            else:
                unit = np.maximum(unit, slack / bound)
            found.append((answer, unit, np.full(answer.shape, float(bound)), counted))
    parts = [np.stack(part) for part in zip(*found, strict=True)]
    whole = parts[0].shape[1] > 1
    return Judged(*(part if whole else part[:, 0] for part in parts))


def _unit(answer: np.ndarray, dtype: str) -> np.ndarray:
    """Return the unit in the last place, and next to 0 that of the least normal number."""
    at = np.where(answer == 0, exact.smallest_normal(dtype), answer)
    return exact.unit(at, dtype)


def _cell(case: Case, operation: str, column: Column, rows: Judged) -> Cell:
    cell = empty(case, operation, column, float(rows.bound.max()))
    second = case.seconds[peers.FAMILY[operation]]
    result = compute(case, operation, column, cell, second)
    if result is not None:
        error = distance(result, rows.answer) / rows.unit
        cell.counted = int(rows.counted.sum())
        cell.error = float(np.max(error, where=rows.counted, initial=0))
        cell.held = bool(np.all(~rows.counted | (error <= rows.bound)))
    return cell


LEGEND = (
    "The rest of the family is judged against mpmath with 60 digits, by its bounds alone. Its "
    "units are at least what a rounding or two move an answer by: 4 units of entmax's threshold, "
    "4u max(1, |x|) of a logarithm near 0, and 8uK + 4u(1 + D) sqrt(2K) of a divergence K whose "
    "logarithms reach D."
)
