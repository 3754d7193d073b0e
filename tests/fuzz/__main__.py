"""Run many cases: see the package's docstring."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tests.backends import BACKENDS, Backend
from tests.fuzz import answers, cases, compare, paths
from tests.fuzz.cases import Case, Refused
from tests.fuzz.draw import TRAITS, traits_of

# What is run by default; libraries that compile each shape, or schedule each call, take longer.
CASES = {
    "numpy": 100_000, "torch": 100_000, "jax": 3_000, "strict": 20_000, "dask": 1_500,
    "mlx": 20_000, "dpnp": 20_000,
}  # fmt: skip


class Failure:
    """A difference, with what repeats it."""

    def __init__(self, case: Case, path: paths.Path, words: str, backend: Backend) -> None:
        self.case, self.path, self.words, self.backend = case, path, words, backend

    def __str__(self) -> str:
        again = f"--backend {self.backend.name} --seed {self.case.seed} --case {self.case.number}"
        code = paths.reproducer(self.case, self.path, self.backend)
        return f"{self.path.name}: {self.case}\n{self.words}\n{again}\n{code}"


class Tally:
    """The counts of one function on one path."""

    def __init__(self) -> None:
        self.cases = self.by_kernel = self.refused = self.differences = 0
        self.judged = self.passed_over = 0
        self.worst: dict[str, float] = defaultdict(float)


def check(
    case: Case, backend: Backend, ways: list[paths.Path], tallies: dict[tuple[str, str], Tally]
) -> Iterator[Failure]:
    """Run a case on every path."""
    traits = traits_of(backend.library)
    expected = answers.expected(
        case, traits, reads_labels=not backend.lazy, flushes=backend.library in ("jax", "mlx")
    )
    given = paths.prepared(case, backend)
    for path in ways:
        if not path.takes(case):
            continue
        tally = tallies[case.function, path.name]
        tally.cases += 1
        found, kernel = paths.run(path, case, given)
        tally.by_kernel += kernel == path.kernel
        words = ""
        if isinstance(expected, Refused):
            tally.refused += 1
            if not (isinstance(found, expected.error) and expected.names in str(found)):
                words = f"{found!r}, expected {expected.error.__name__} naming {expected.names}"
        elif isinstance(found, Exception):
            words = f"raised {found!r}"
        else:
            verdict = compare.judge(found, expected, backend)
            words = "; ".join(verdict.wrong)
            tally.judged += verdict.judged
            tally.passed_over += verdict.passed_over
            if not words:
                dtype = expected.dtypes[-1]
                tally.worst[dtype] = max(tally.worst[dtype], verdict.worst)
        if not words and not paths.unchanged(case, given, backend):
            words = "changed its input"
        if words:
            tally.differences += 1
            yield Failure(case, path, words, backend)


def run(
    backend: Backend, seed: int, numbers: range, progress: Progress | None = None
) -> tuple[dict[tuple[str, str], Tally], list[Failure]]:
    """Run the cases of these numbers."""
    tallies: dict[tuple[str, str], Tally] = defaultdict(Tally)
    failures: list[Failure] = []
    ways = paths.paths(backend.library)
    task = progress.add_task(backend.name, total=len(numbers)) if progress else None
    for number in numbers:
        with np.errstate(all="ignore"):
            case = cases.make(traits_of(backend.library), seed, number)
        for failure in check(case, backend, ways, tallies):
            failures.append(failure)
            if progress is not None:  # a run takes up to an hour, and may be ended before its end
                progress.console.print(f"case {number}, {failure.path.name}: a difference")
        if progress is not None and task is not None:
            progress.advance(task)
    return tallies, failures


def table(tallies: dict[tuple[str, str], Tally]) -> Table:
    """Return the counts as a table."""
    found = Table("function", "path", "cases", "by the path", "refused", "judged entries",
                  "not judged", "largest error in ulp", "differences")  # fmt: skip
    for (function, path), tally in sorted(tallies.items()):
        worst = ", ".join(f"{d} {u:.3g}" for d, u in sorted(tally.worst.items()) if u)
        counts = (tally.refused, tally.judged, tally.passed_over)
        by = "" if path == "default" else str(tally.by_kernel)
        found.add_row(function, path, str(tally.cases), by, *map(str, counts), worst,
                      str(tally.differences))  # fmt: skip
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--backend", choices=list(TRAITS), default="numpy")
    parser.add_argument("--cases", type=int, help=f"by default {CASES}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one case alone")
    parser.add_argument("--show", type=int, default=10, help="how many differences to print")
    given = parser.parse_args(argv)
    if why := BACKENDS[given.backend].missing():
        parser.error(why)
    backend = BACKENDS[given.backend]()
    warnings.simplefilter("error")
    count = given.cases or CASES[given.backend]
    numbers = range(count) if given.case is None else range(given.case, given.case + 1)
    console = Console()
    with Progress(console=console) as progress:
        tallies, failures = run(backend, given.seed, numbers, progress)
    console.print(table(tallies))
    seen: Counter[tuple[str, str]] = Counter()
    for failure in failures:
        key = failure.path.name, failure.case.function
        seen[key] += 1
        if seen[key] <= 3 and sum(min(n, 3) for n in seen.values()) <= given.show:
            print("\n" + str(failure))
    print(f"\n{len(numbers)} cases, {len(failures)} differences (seed {given.seed})")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
