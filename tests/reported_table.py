"""Write docs/reported.md: faults reported upstream, and who answers them how in a run.

python -m pytest tests/conformance/reported.py --junitxml=.nox/reports/reported.xml
python tests/reported_table.py .nox/reports/reported.xml docs/reported.md
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from conformance.reported import REPORTS, UNTESTED, Report
from semantics_table import _backend, _outcome

INTRODUCTION = """\
# Faults reported upstream

Reports of 2025 and 2026 about confident rows and infinities, each as a test of
[tests/conformance/reported.py](../tests/conformance/reported.py): what is expected, the backends on
which this package answers it, and what the installed library answers.

This file is generated, by `python3 noxfile.py -s conformance`.
"""


class Run:
    """The outcomes of a run."""

    def __init__(self, path: Path) -> None:
        suite = ElementTree.parse(path).find("testsuite")
        properties = [(p.get("name"), p.get("value")) for p in suite.iter("property")]
        self.backends = list(dict.fromkeys(v for name, v in properties if name == "backend"))
        self.ours: dict[str, dict[str, str]] = {}
        self.peers: dict[str, ElementTree.Element] = {}
        for one in suite.iter("testcase"):
            test, _, variant = one.get("name").partition("[")
            backend = _backend(variant, self.backends) or ""
            name = variant.removeprefix(f"{backend}-").removesuffix("]")
            if test == "test_ours":
                self.ours.setdefault(name, {})[backend] = _outcome(one)
            else:
                self.peers[name] = one


def _properties(one: ElementTree.Element) -> dict[str, str]:
    return {p.get("name"): p.get("value") for p in one.iter("property")}


def _number(value: object) -> str:
    if isinstance(value, str):
        return value
    return np.array2string(np.asarray(value), precision=4, separator=", ")


def document(run: Run) -> str:
    """Return docs/reported.md."""
    lines = ["| report | what | expected | this package | the library |", "|---|---|---|---|---|"]
    lines += [_row(report, run) for report in REPORTS]
    why = [f"- {name}: {reason}." for name, reason in UNTESTED.items()]
    table = "\n".join(lines)
    parts = [INTRODUCTION.rstrip(), table, "Named beside these, without a test:"]
    return "\n\n".join([*parts, "\n".join(why)]) + "\n"


def _row(report: Report, run: Run) -> str:
    passed = [b for b, outcome in run.ours.get(report.name, {}).items() if outcome == "passed"]
    failed = [b for b in run.ours.get(report.name, {}) if b not in passed]
    ours = f"right on {', '.join(passed)}" if passed else ""
    if failed:
        ours += f"{'; ' if ours else ''}wrong on {', '.join(failed)}"
    one = run.peers.get(report.name)
    found = {} if one is None else _properties(one)
    if "answer" in found:
        theirs = f"{found['peer']}: {found['answer']}"
    else:
        theirs = "not run" if one is None else _outcome(one)
    name = f"[{report.name}]({report.link})"
    return f"| {name} | {report.what} | {_number(report.expected)} | {ours} | {theirs} |"


def main(source: str, target: str) -> int:
    """Write the file."""
    Path(target).write_text(document(Run(Path(source))), encoding="utf-8")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
