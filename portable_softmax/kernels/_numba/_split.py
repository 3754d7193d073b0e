"""Few and long rows: each is cut into parts, so that all threads have something to do.

Three passes over memory instead of one, the maximum, the sum and the result: a row of this length
does not stay in cache anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from numba import typeof

from portable_softmax.kernels import _threads
from portable_softmax.kernels._numba import _parts
from portable_softmax.kernels._numba._rows import enough

# Rows of so many classes are cut where half the threads would have none. On two threads that is
# level with one that reads each row once (`python -m bench thresholds`); more were not measured.
LONG = 1 << 22
# Entries of a part.
PART = 1 << 17


class State(NamedTuple):
    """A row's maximum and remainder, in double precision."""

    m: float
    rest: float

    @property
    def log(self) -> float:
        return math.log1p(self.rest)


def wanted(outer: int, n: int, inner: int) -> bool:
    """Return whether rows are few and long enough to be cut, and threads to share them."""
    return inner == 1 and n >= LONG and 2 * outer <= _threads.limit()


def _on_parts(entry: Any, arrays: tuple[Any, ...], rows: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Call a compiled function on every part of rows, each a number and what goes with it.

    Return a list for each row of what it returned for each part.
    """
    n = arrays[0].shape[1]
    cuts = [(lo, min(lo + PART, n)) for lo in range(0, n, PART)]
    jobs = [(*arrays, *numbers, i, lo, hi) for i, *numbers in rows for lo, hi in cuts]
    signature = tuple(typeof(a) for a in jobs[0])
    if signature not in entry.overloads:
        entry.compile(signature)
    answers: list[Any] = [None] * len(jobs)

    def work(at: int) -> None:
        answers[at] = entry(*jobs[at])

    _threads.run(work, range(len(jobs)))
    return [answers[at : at + len(cuts)] for at in range(0, len(jobs), len(cuts))]


def states(x: Any, t: Any) -> list[State]:
    """Return the state of each row."""
    outer, n = x.shape
    maxima = [_top(parts) for parts in _on_parts(_parts.top, (x,), ((i,) for i in range(outer)))]
    every = [(i, t, m) for i, m in enumerate(maxima)]
    found = [math.fsum(p) - 1.0 if _finite(p) else math.nan for p in _sums(_parts.plain, x, every)]
    # As in `_rows.fold`: what is small beside the row is summed again with care.
    again = [row for row, rest in zip(every, found, strict=True) if not rest >= enough(n)]
    if again:
        for (i, *_), parts in zip(again, _sums(_parts.careful, x, again), strict=True):
            below, tops = zip(*parts, strict=True)
            found[i] = math.fsum(below) + (sum(tops) - 1) if _finite(below) else math.nan
    return [State(m, rest) for m, rest in zip(maxima, found, strict=True)]


def _sums(entry: Any, x: Any, rows: list[tuple[Any, ...]]) -> list[Any]:
    return _on_parts(entry, (x,), ((i, *numbers) for i, *numbers in rows))


def _top(parts: list[float]) -> float:
    return math.nan if any(map(math.isnan, parts)) else max(parts)


def _finite(parts: Any) -> bool:
    return all(map(math.isfinite, parts))


def softmax(x: Any, out: Any, t: Any) -> None:
    """Three reads and one write."""
    rows = [(i, t, s.m, 1.0 / (1.0 + s.rest)) for i, s in enumerate(states(x, t))]
    _on_parts(_parts.exps, (x, out), rows)


def log_softmax(x: Any, out: Any, t: Any) -> None:
    """Three reads and one write."""
    rows = [(i, t, s.m, s.log) for i, s in enumerate(states(x, t))]
    _on_parts(_parts.logs, (x, out), rows)


def logsumexp(x: Any) -> list[float]:
    """Two reads; return the answers."""
    return [s.m + s.log if math.isfinite(s.m) else s.m for s in states(x, 1)]
