"""Write docs/semantics.md: the documented cases, and how each fared on each backend.

    python3 noxfile.py -s tests tests-slow tests-dpnp
    python tests/semantics_table.py .nox/reports docs/semantics.md

A row is a documented case of `portable_softmax.testing`, or the first line of the docstring of a
test of test_semantics.py, ``case | answer``. The outcomes are those of the JUnit reports that the
tests leave.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from backends import LIBRARIES

from portable_softmax import testing

HERE = Path(__file__).resolve().parent
HEADINGS = ("case", "answer", "test")

INTRODUCTION = """\
# Semantics

What the package answers in each case, and whether it did on each library. A row is a test of
[tests/test_semantics.py](../tests/test_semantics.py). Those of `test_documented` are cases of
`portable_softmax.testing.check_library`, which runs on any library; the docstring of each other
test gives the case and the answer. An outcome comes from a run of that test, over all of its
parameters.

This file is generated, after `python3 noxfile.py -s tests tests-slow tests-dpnp`, by

    python tests/semantics_table.py .nox/reports docs/semantics.md

- *passed*: in each of its variants. A number in parentheses is the reason why it was skipped.
- *not run*: that backend left no report of it, since its library or its device was not at hand.
- *NumPy only*: the case is about NumPy's own arrays or types, and is tested on those.

What holds for one library alone has tests of its own: autograd, `torch.func` and `torch.compile`
in [tests/test_torch.py](../tests/test_torch.py), `jit`, `grad` and `vmap` in
[tests/test_jax.py](../tests/test_jax.py), the versions and devices of the standard in
[tests/test_strict.py](../tests/test_strict.py).
"""


class Case(NamedTuple):
    """One test of the table."""

    case: str
    answer: str
    test: str
    every_backend: bool
    """Whether it takes the fixture `xp`; else it is about NumPy only."""


@dataclass
class Reports:
    """What the reports say."""

    backends: dict[str, str] = field(default_factory=dict)
    """The version by backend, of those that ran."""
    outcomes: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    """By test and backend: passed, failed, or the reason for skipping, one for each variant."""


def cases() -> Iterator[Case]:
    """Yield the rows: the single calls, then the tests of test_semantics.py in its order."""
    for name, answer in testing.ANSWERS.items():
        yield Case(name, answer, _documented(testing.CASES[name].__name__[1:]), True)
    tree = ast.parse((HERE / "test_semantics.py").read_text(encoding="utf-8"))
    for node in tree.body:
        is_test = isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if is_test and node.name != "test_documented":
            line = (ast.get_docstring(node) or "").partition("\n")[0]
            case, bar, answer = line.partition(" | ")
            if not bar or "|" in answer:
                raise SystemExit(f"{node.name}: expected a docstring `case | answer`, not {line!r}")
            arguments = [argument.arg for argument in node.args.args]
            yield Case(case, answer, node.name, "xp" in arguments)


def read(folder: Path) -> Reports:
    """Read every report of a folder."""
    reports = Reports()
    for path in sorted(folder.glob("*.xml")):
        suite = ElementTree.parse(path).find("testsuite")
        for one in suite.iter("testcase"):
            said = {p.get("name"): p.get("value") for p in one.iter("property")}
            backend = said.get("backend", "numpy")
            if "version" in said:
                reports.backends[backend] = said["version"]
            if one.get("classname", "").rpartition(".")[2] == "test_semantics":
                row, (test, _, _) = said.get("row"), one.get("name").partition("[")
                test = _documented(row) if row else test
                backend = "numpy" if backend == "none" else backend
                reports.outcomes.setdefault((test, backend), []).append(_outcome(one))
    return reports


def _documented(row: str) -> str:
    return f"test_documented[{row}]"


def _outcome(one: ElementTree.Element) -> str:
    if one.find("failure") is not None or one.find("error") is not None:
        return "failed"
    skipped = one.find("skipped")
    return "passed" if skipped is None else skipped.get("message")


def document(rows: list[Case], reports: Reports) -> str:
    """Return docs/semantics.md."""
    reasons: list[str] = []
    lines = [(*HEADINGS, *LIBRARIES), ("---",) * (len(HEADINGS) + len(LIBRARIES))]
    for row in rows:
        cells = [_cell(row, backend, reports, reasons) for backend in LIBRARIES]
        lines.append((row.case, row.answer, f"`{row.test}`", *cells))
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    why = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    ran = ", ".join(f"{b} {reports.backends[b]}" for b in LIBRARIES if b in reports.backends)
    parts = [INTRODUCTION.rstrip(), table]
    if why:
        parts += ["Why a test was skipped:", why]
    return "\n\n".join([*parts, f"This was {ran}."]) + "\n"


def _cell(row: Case, backend: str, reports: Reports, reasons: list[str]) -> str:
    if not row.every_backend and backend != "numpy":
        return "NumPy only"
    found = Counter(reports.outcomes.get((row.test, backend), ()))
    if not found:
        return "not run"
    if found["failed"]:
        return "FAILED"
    if set(found) == {"passed"}:
        return "passed"
    for reason in found:
        if reason != "passed" and reason not in reasons:
            reasons.append(reason)
    parts = [
        (f"{count} " if len(found) > 1 else "")
        + ("passed" if outcome == "passed" else f"skipped ({reasons.index(outcome) + 1})")
        for outcome, count in found.items()
    ]
    return ", ".join(parts)


def main(folder: str, target: str) -> int:
    """Write the file; return 1 if a test failed, or 2 if there are no reports."""
    reports = read(Path(folder))
    if not reports.outcomes:
        print(f"{folder} holds no report of the tests: run them first", file=sys.stderr)
        return 2
    text = document(list(cases()), reports)
    Path(target).write_text(text, encoding="utf-8")
    return 1 if "FAILED" in text else 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
