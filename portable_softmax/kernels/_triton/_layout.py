"""See arrays of any shape and strides as (other, lead, classes), all arrays of a call alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Strides = tuple[int, ...]


class Layout(NamedTuple):
    """Sizes, and for each array its strides in elements along (lead, other, classes)."""

    lead: int
    other: int
    classes: int
    along: str  # which of `lead` and `classes` has the stride 1 in every array with both
    unit: int  # divides every size and stride; more than 1 allows 16-byte loads
    strides: tuple[tuple[int, int, int], ...]


def refusal(shape: Sequence[int], axes: Sequence[int]) -> str:
    """Return why the reduced axes cannot be merged into one; empty if they can."""
    at = sorted(a for a in axes if shape[a] != 1)
    between = range(at[0], at[-1] + 1) if at else ()
    if any(a not in at and shape[a] != 1 for a in between):
        return "the reduced axes are not neighbours"
    return ""


def layout(
    shape: Sequence[int], axes: Sequence[int], arrays: Sequence[Strides], full: int, wide: int
) -> Layout | None:
    """Merge the axes of all arrays, or return None where their strides do not allow it.

    The first `full` arrays have all axes; the others may be broadcast, with stride 0. A 16-byte
    load has `wide` elements.
    """
    reduced = [a for a in range(len(shape)) if a in axes and shape[a] != 1]
    batch = [a for a in range(len(shape)) if a not in axes and shape[a] != 1]
    classes = _merged(shape, reduced, arrays)
    rows = _merged(shape, batch, arrays)
    if len(classes) > 1 or len(rows) > 2:
        return None
    n, class_strides = classes[0] if classes else (1, (1,) * len(arrays))
    rows += [(1, (0,) * len(arrays))] * (2 - len(rows))
    if all(s == 1 for s in class_strides[:full]):
        along = "classes"
        # The longer batch axis is `lead`: programs take blocks of it.
        rows.sort(key=lambda row: -row[0])
    else:
        along = "lead"
        rows.sort(key=lambda row: sum(s != 1 for s in row[1][:full]))
        if any(s != 1 for s in rows[0][1][:full]):
            return None
    (lead, lead_strides), (other, other_strides) = rows
    aligned = [n if along == "classes" else lead]
    for i in range(full):
        aligned += [other_strides[i], lead_strides[i] if along == "classes" else class_strides[i]]
    unit = wide if all(size % wide == 0 for size in aligned) else 1
    strides = tuple(zip(lead_strides, other_strides, class_strides, strict=True))
    return Layout(lead, other, n, along, unit, strides)


def _merged(
    shape: Sequence[int], axes: Sequence[int], arrays: Sequence[Strides]
) -> list[tuple[int, tuple[int, ...]]]:
    """Merge adjacent axes where the strides of every array allow it: (length, strides) each."""
    found: list[tuple[int, tuple[int, ...]]] = []
    for a in axes:
        strides = tuple(array[a] for array in arrays)
        if found:
            length, before = found[-1]
            if all(b == s * shape[a] for b, s in zip(before, strides, strict=True)):
                found[-1] = (length * shape[a], strides)
                continue
        found.append((shape[a], strides))
    return found
