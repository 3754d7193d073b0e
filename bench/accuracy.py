"""``accuracy``: errors in units in the last place, ours beside the peers', against the bounds."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from bench import exact, families, places
from bench.errors import one_line
from bench.peers import ENTMAX, OPTAX, SCIPY, TORCH, Offer
from bench.places import Place
from bench.providers import Provider, our_providers, path_taken, peers_at

OPERATIONS = ("softmax", "log_softmax", "logsumexp", "cross_entropy")
LABEL_GRADIENT = "label gradient"
NOT_OFFERED = "-"

# The backends on which ours is measured, and the peers, if installed.
BACKENDS = ("numpy", "torch", "jax")
PEERS = (SCIPY, TORCH, "jax.nn, jit", ENTMAX, OPTAX)

HALF_BOUND = 0.51
_LABEL_GRADIENT_BOUND = 1e-5


@dataclass
class Cell:
    """The worst error of one provider on one family, in units in the last place."""

    operation: str
    family: str
    dtype: str
    provider: str
    ours: bool
    error: float
    bound: float
    """The largest over the family's rows: that of a portable softmax depends on what one spans."""
    held: bool
    counted: int = 0
    """How many entries the bound applies to."""
    problem: str = ""


@dataclass(frozen=True)
class Column:
    """A provider on its backend."""

    name: str
    ours: bool
    place: Place
    dtypes: frozenset[str]
    offer: Callable[[int, str], Offer]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Case:
    """One family in one dtype, and its exact answers."""

    family: str
    dtype: str
    axis: int
    x: np.ndarray
    labels: np.ndarray
    exact: exact.Exact

    @property
    def rows(self) -> np.ndarray:
        """The logits with the classes last, in extended precision."""
        return np.moveaxis(self.x, self.axis, -1).astype(np.longdouble)


def installed() -> list[str]:
    return [name for name in BACKENDS if places.is_installed(name)]


def why_not(dtype: str) -> str:
    """Why a dtype can't be judged here; empty where it can."""
    if not exact.measures(dtype):
        return "np.longdouble is no longer than float64 on this machine"
    if dtype == "bfloat16" and importlib.util.find_spec("ml_dtypes") is None:
        return "ml_dtypes is not installed"
    return ""


def columns(backends: list[str]) -> tuple[list[Column], list[str]]:
    """Return ours on each of `backends`, every peer, and the names of the peers that are missing.

    The peers are always all there: a bound compares with the best of them.
    """
    opened = {name: places.open_backend(name) for name in {*backends, *installed()}}
    dtypes = {name: frozenset(place.dtypes()) for name, place in opened.items()}
    ours, theirs, missing = [], [], [name for name in BACKENDS if name not in opened]
    for name in backends:
        for path in our_providers(opened[name], slow_starts=False):
            offer = cache(path.offer)  # JAX compiles once
            if offer(-1, "none").keys() >= set(OPERATIONS):
                place = opened[name]
                named = _named(path, name)
                ours.append(Column(named, True, place, dtypes[name], offer, path.context))
    for name in installed():
        present, absent = peers_at(opened[name], slow_starts=False)
        missing += [peer for peer in absent if peer in PEERS]
        theirs += [
            Column(peer.name, False, opened[name], dtypes[name], cache(peer.offer))
            for peer in present
            if peer.name in PEERS
        ]
    return ours + theirs, missing


def _named(path: Provider, backend: str) -> str:
    """Return "ours", the backend, and how the path differs from the default."""
    ours, *how = path.name.split(", ")
    return ", ".join((ours, backend, *(word for word in how if word != "jit")))


def measure(providers: list[Column], dtypes: list[str], *, quick: bool) -> Iterator[Cell]:
    """Yield a cell for each operation, family, dtype and provider."""
    for case in _cases(dtypes, quick=quick):
        for operation in OPERATIONS:
            some = distinct(providers, operation, case, case.labels)
            yield from _judged([_cell(case, operation, column) for column in some])
    if "float32" in dtypes:
        for case in _margins():
            some = distinct(providers, "cross_entropy_value_and_grad", case, case.labels)
            yield from (_label_gradient(case, column) for column in some)


def distinct(columns: list[Column], operation: str, case: Any, labels: Any) -> Iterator[Column]:
    """Yield the columns but those of ours that take the same path as an earlier one."""
    seen = set()
    for column in columns:
        if column.ours and case.dtype in column.dtypes:
            there = partial(places.put, column.place)
            taken = path_taken(column, operation, there(case.x), there(labels), case.axis)
            if (column.place, taken) in seen:
                continue
            seen.add((column.place, taken))
        yield column


def _cases(dtypes: list[str], *, quick: bool) -> Iterator[Case]:
    for family in families.chosen(quick=quick):
        for dtype in family.dtypes:
            if dtype in dtypes:
                rng = np.random.default_rng(0)
                yield _case(family.name, dtype, family.axis, family.rows(rng, dtype), rng)


def _margins() -> Iterator[Case]:
    for margin in families.MARGINS:
        rng = np.random.default_rng(0)
        x = families.confident(rng, np.full(400, float(margin)))
        yield _case(f"margin {margin}, V=10", "float32", -1, x, rng)


def _case(name: str, dtype: str, axis: int, rows: np.ndarray, rng: np.random.Generator) -> Case:
    x = rows.astype(places.np_dtype(dtype))
    labels = families.labels(rng, x, axis)
    answers = exact.solve(np.moveaxis(x, axis, -1), labels)
    return Case(name, dtype, axis, x, labels, answers)


def _cell(case: Case, operation: str, column: Column) -> Cell:
    answer = getattr(case.exact, operation)
    unit, bound = _unit_and_bound(case, operation, answer, column)
    cell = empty(case, operation, column, float(np.max(bound)))
    result = compute(case, operation, column, cell, case.labels)
    if result is not None:
        error = distance(result, answer) / unit
        counted = _counted(case, operation, answer, column.place)
        cell.counted = int(counted.sum())
        cell.error = float(np.max(error, where=counted, initial=0))
        cell.held = bool(np.all(~counted | (error <= bound)))
    return cell


def _label_gradient(case: Case, column: Column) -> Cell:
    cell = empty(case, LABEL_GRADIENT, column, _LABEL_GRADIENT_BOUND)
    result = compute(case, "cross_entropy_value_and_grad", column, cell, case.labels)
    if result is not None:
        answer = case.exact.label_gradient
        gradient = result[np.arange(len(answer)), case.labels]
        cell.counted = len(answer)
        cell.error = float(np.max(distance(gradient, answer) / np.abs(answer)))
        cell.held = cell.error <= cell.bound
    return cell


def empty(case: Any, operation: str, column: Column, bound: float) -> Cell:
    names = (operation, case.family, case.dtype, column.name)
    return Cell(*names, ours=column.ours, error=np.nan, bound=bound, held=False)


def compute(
    case: Any, operation: str, column: Column, cell: Cell, second: Any
) -> np.ndarray | None:
    """Return the result with the classes last, in extended precision; None if it failed.

    `second` is what the call takes beside x: an array, or a tuple of them.
    """
    place, call = column.place, column.offer(case.axis, "none").get(operation)
    if call is None or case.dtype not in column.dtypes:
        cell.problem, cell.held = NOT_OFFERED, True
        return None
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            np.errstate(all="ignore"),
            column.context(),
        ):
            there = partial(places.put, place)
            second = tuple(map(there, second)) if isinstance(second, tuple) else there(second)
            result = call(there(case.x), second)
            if operation == "cross_entropy_value_and_grad":
                _, result = result
            result = places.get(place, result).astype(np.longdouble)
    except Exception as problem:  # the exception for a missing dtype differs between libraries
        cell.problem = one_line(problem)
        return None
    return np.moveaxis(result, case.axis, -1) if result.ndim == case.x.ndim else result


def distance(result: np.ndarray, answer: np.ndarray) -> np.ndarray:
    distance = np.abs(result - answer)
    return np.where(np.isnan(distance), np.inf, distance)


def _unit_and_bound(
    case: Case, operation: str, answer: np.ndarray, column: Column
) -> tuple[Any, Any]:
    unit = exact.unit(answer, case.dtype)
    if case.dtype in families.HALVES:
        return unit, HALF_BOUND
    if operation == "softmax":
        if column.ours and not column.name.endswith("portable"):
            return unit, 5
        return unit, np.maximum(6, 2 + 2 * np.ptp(case.rows, axis=-1, keepdims=True))
    if operation == "logsumexp":
        # Near 0 it is the difference of two larger numbers: its bound there is absolute.
        u = np.ldexp(np.longdouble(1), -exact.FORMATS[case.dtype][0])
        near_zero = 4 * u * np.maximum(1, np.abs(case.rows.max(axis=-1)))
        return np.maximum(unit, near_zero / 6), 6
    return unit, 8


def _counted(case: Case, operation: str, answer: np.ndarray, place: Place) -> np.ndarray:
    """Return the entries that the bound applies to.

    A logarithm counts where it is a normal number: it is the remainder where that is small. A
    library that flushes subnormal numbers to 0 has no such probabilities, and drops such terms
    from its remainders: what is counted is what these could not change.
    """
    everything = np.ones(answer.shape, bool)
    if operation == "logsumexp":
        return everything
    flushes = _flushes(place, case.dtype)
    smallest = 1.01 * exact.smallest_normal(case.dtype)
    if operation == "softmax":
        return answer > smallest if flushes else everything
    if flushes:
        terms = np.exp(case.rows - case.rows.max(axis=-1, keepdims=True))
        dropped = terms.sum(axis=-1, keepdims=answer.ndim == 2, where=terms < smallest)
        smallest = np.maximum(smallest, np.ldexp(dropped, exact.FORMATS[case.dtype][0]))
    return np.abs(answer) > smallest


def _flushes(place: Place, dtype: str) -> bool:
    """Whether a library flushes subnormal numbers to 0, as XLA does."""
    smallest = np.asarray(exact.smallest_normal(dtype), places.np_dtype(dtype))
    return bool((places.put(place, smallest) / 2) == 0)


def _judged(cells: list[Cell]) -> list[Cell]:
    """Compare ours with the best peer as well, of those judged on the same entries.

    Not the logarithm of a sum: near 0 it is the difference of two larger numbers, and how close
    the best peer comes there is luck. Its own bound allows what their roundings add up to.
    """
    for cell in cells:
        if cell.ours and cell.operation != "logsumexp":
            same = [c.error for c in cells if not c.ours and c.counted == cell.counted]
            best = min(same, default=np.inf)
            # The error of a cell with a problem is nan: the comparison leaves it as it is.
            cell.held = cell.held and not cell.error > 1.5 * best + 1
    return cells


def tables(cells: list[Cell]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield a title, column names and rows of text for each operation."""
    for operation in dict.fromkeys(cell.operation for cell in cells):
        some = [cell for cell in cells if cell.operation == operation]
        offered = {cell.provider for cell in some if cell.problem != NOT_OFFERED}
        some = [cell for cell in some if cell.provider in offered]
        first = sorted(some, key=lambda cell: not cell.ours)  # a path may be missing for some rows
        names = list(dict.fromkeys(cell.provider for cell in first))
        lines: dict[tuple[str, str], list[Cell]] = {}
        for cell in some:
            lines.setdefault((cell.family, cell.dtype), []).append(cell)
        unit = "relative error" if operation == LABEL_GRADIENT else "ulp"
        rows = [
            [
                family,
                dtype,
                *(_text(by_provider.get(name)) for name in names),
                f"{min(cell.bound for cell in line):.3g}",
                "yes" if all(cell.held for cell in line if cell.ours) else "NO",
            ]
            for (family, dtype), line in lines.items()
            for by_provider in [{cell.provider: cell for cell in line}]
        ]
        yield f"{operation}, {unit}", ["rows", "dtype", *names, "bound", "ours within"], rows


def _text(cell: Cell | None) -> str:
    """Return a cell as text; one that is missing takes the path of an earlier one."""
    return "" if cell is None else cell.problem or f"{cell.error:.3g}"


LEGEND = (
    "The worst error over the rows of a family, in units in the last place of the exact result. "
    "Ours must stay within the bound, and but for logsumexp within 1.5 times the best peer's error "
    "plus one. "
    "Shown is the bound of the kernels' softmax; the portable one has max(6, 2 + 2D) for a row "
    "that spans D. "
    "logsumexp within 4u max(1, |max|) of the exact value counts as 6 units or less. The "
    "logarithms count where the remainder is a normal number; a library that flushes subnormal "
    "numbers to 0 is not asked for those, nor for remainders that need them."
)
