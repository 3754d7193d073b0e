"""``--compare``: ours now against ours in an earlier run, in units of each run's copy.

Two runs of the same code differ, as machines are shared and their clocks change. What changes the
copy alike is divided out: a time counts in units of the fastest copy of the same array in the same
run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from bench import tables
from bench.errors import CommandError
from bench.places import Place
from bench.speed import COPY, OURS, Row
from bench.summary import geometric_mean

# The ratios that are marked, and that fail the command. In a cell, two runs of the same code on an
# idle machine may differ by a tenth, but not by a quarter.
MARKED = 1.10
FAILING = 1.25

Key = tuple[str, tuple[int, int], str, str]


class Change(NamedTuple):
    """One cell in both runs."""

    key: Key
    old_s: float
    new_s: float
    copies: float
    """The old copy's time in units of the new one's."""

    @property
    def raw(self) -> float:
        """New time in units of the old."""
        return self.new_s / self.old_s

    @property
    def normalised(self) -> float:
        """The same, each in units of its run's copy."""
        return self.raw * self.copies


def read(path: Path) -> dict[str, Any]:
    """Return the document of an earlier run of `speed`, with its rows as `Row`."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"can't read {path}: {error.strerror}") from error
    except ValueError as error:  # neither JSON nor text
        raise CommandError(f"{path} is no JSON") from error
    if not isinstance(document, dict) or document.get("benchmark") != "speed":
        raise CommandError(f"{path} is not what `python -m bench speed --json` writes")
    try:
        document["rows"] = [_row(row) for row in document["rows"]]
        for name, kind in _NEEDED.items():
            if not isinstance(document[name], kind):
                raise TypeError(name)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CommandError(f"{path} is of another version of the benchmark, or broken") from error
    return document


_NEEDED = {"backend": str, "device": str, "machine": dict, "versions": dict, "threads": dict}
_NUMBERS = tuple(field.name for field in fields(Row) if field.type == "float")


def _row(values: dict[str, Any]) -> Row:
    rows, classes = values["shape"]
    numbers = {name: float(values[name]) for name in _NUMBERS}  # nan is a string in JSON
    return Row(**{**values, **numbers, "shape": (int(rows), int(classes))})


def check(
    path: Path,
    old: dict[str, Any],
    place: Place,
    operations: list[str],
    shapes: list[tuple[int, int]],
    dtypes: list[str],
) -> None:
    """Raise if an earlier run measured another library, device, or other arrays."""
    if (old["backend"], old["device"]) != (place.name, place.device_name):
        raise CommandError(
            f"{path} was measured on {old['backend']}, {old['device']}, "
            f"not on {place.name}, {place.device_name}"
        )
    wanted = set(product(operations, shapes, dtypes))
    if not any((row.operation, row.shape, row.dtype) in wanted for row in old["rows"]):
        raise CommandError(f"{path} holds none of these operations, shapes and dtypes")


def changes(old: Iterable[Row], new: Iterable[Row]) -> list[Change]:
    """Return ours in each cell that both runs have."""
    old_s, old_copy = _times(old)
    new_s, new_copy = _times(new)
    return [
        Change(key, old_s[key], seconds, old_copy[key[1:3]] / new_copy[key[1:3]])
        for key, seconds in new_s.items()
        if key in old_s
    ]


def _times(rows: Iterable[Row]) -> tuple[dict[Key, float], dict[tuple[Any, ...], float]]:
    """Return our times, and the fastest copy of each array."""
    ours: dict[Key, float] = {}
    copies: dict[tuple[Any, ...], float] = {}
    for row in rows:
        array = row.shape, row.dtype
        if row.role == OURS and not row.problem:
            ours[row.operation, *array, row.provider] = row.min_s
        elif row.role == COPY:
            copies[array] = min(row.min_s, copies.get(array, math.inf))
    return ours, copies


HEADINGS = ("operation", "shape", "dtype", "provider", "before", "now", "ratio", "/ copy", "")

LEGEND = (
    "`ratio` is the time now in units of the time before; `/ copy` the same with each time in "
    "units of the fastest copy in its run. Marked is what took over "
    f"{MARKED - 1:.0%} longer in units of the copy; over {FAILING - 1:.0%} fails."
)


def cells(found: list[Change]) -> list[list[str]]:
    return [
        [
            change.key[0],
            tables.shape(change.key[1]),
            *change.key[2:],
            tables.duration(change.old_s),
            tables.duration(change.new_s),
            f"{change.raw:5.2f}",
            f"{change.normalised:5.2f}",
            mark(change),
        ]
        for change in found
    ]


def mark(change: Change) -> str:
    if change.normalised > FAILING:
        return "SLOWER"
    return "slower" if change.normalised > MARKED else ""


def verdict(found: list[Change]) -> str:
    """Return one line on all the cells."""
    mean = geometric_mean(change.normalised for change in found)
    marked = sum(change.normalised > MARKED for change in found)
    failing = sum(change.normalised > FAILING for change in found)
    return (
        f"{len(found)} cells, geometric mean {mean:.2f} in units of the copy; {marked} over "
        f"{MARKED - 1:.0%} slower, {failing} of them over {FAILING - 1:.0%}"
    )


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return what else differs between two runs: machine, threads and versions."""
    found = []
    for part in ("machine", "threads", "versions"):
        for name in sorted({*old[part], *new[part]} - {"load_before"}):
            before, now = (document[part].get(name, "absent") for document in (old, new))
            if before != now:
                found.append(f"{name}: {before} before, {now} now")
    return found
