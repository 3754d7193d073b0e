"""scikit-learn's own tests, with its softmax, logsumexp and multinomial loss replaced by ours.

    python tests/conformance/scikit_learn.py array_api|scipy_special [options of pytest]

scikit-learn ships these tests. They run where they lie, twice, each in a process of its own: as
they are, and with the replacement. The same tests must pass, and each function must have been
called: the calls are counted. Nothing of scikit-learn's is copied here.

- `array_api`: what `examples/scikit_learn.py` replaces, in the modules that compute on any library.
- `scipy_special`: `scipy.special`'s three functions, and scikit-learn's copies of two of them,
  replaced by those of `portable_softmax.compat.scipy_special`. The mixtures and classifiers of
  scikit-learn 1.9 call the copies, and their tests call SciPy's.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

os.environ["SCIPY_ARRAY_API"] = "1"  # scikit-learn asks for it, before SciPy is imported
os.environ.setdefault("SKLEARN_TESTS_GLOBAL_RANDOM_SEED", "42")

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for `examples`, which is not installed

ARRAY_API = (
    *("_loss", "utils/tests/test_array_api.py", "utils/tests/test_extmath.py"),
    *("linear_model/tests/test_logistic.py", "linear_model/tests/test_linear_loss.py"),
    *("mixture", "tests/test_naive_bayes.py", "tests/test_calibration.py"),
)
SCIPY_SPECIAL = (
    *("mixture", "tests/test_naive_bayes.py", "tests/test_discriminant_analysis.py"),
    *("tests/test_calibration.py", "neural_network", "ensemble/tests/test_weight_boosting.py"),
)
SUITES = {"array_api": ARRAY_API, "scipy_special": SCIPY_SPECIAL}


def counted(function: Callable[..., Any], name: str, calls: Counter[str]) -> Callable[..., Any]:
    """Return `function`, which counts its calls under a name."""
    calls[name] = 0

    @functools.wraps(function)
    def call(*args, **options):
        calls[name] += 1
        return function(*args, **options)

    return call


def array_api(calls: Counter[str]) -> Mapping[Any, Any]:
    """Return what takes whose place in the suite ``array_api``."""
    from examples.scikit_learn import PLACES, MultinomialLoss

    for name in ("_compute_loss", "loss_gradient"):
        method = getattr(MultinomialLoss, name)
        setattr(MultinomialLoss, name, counted(method, f"MultinomialLoss.{name}", calls))
    return {
        theirs: ours if ours is MultinomialLoss else counted(ours, ours.__name__, calls)
        for theirs, ours in PLACES.items()
    }


def scipy_special(calls: Counter[str]) -> Mapping[Any, Any]:
    """Replace the functions of `scipy.special`, and return what takes the copies' place."""
    import scipy.special

    from portable_softmax.compat import scipy_special

    ours = {
        name: counted(getattr(scipy_special, name), name, calls) for name in scipy_special.__all__
    }
    for name, function in ours.items():
        setattr(scipy.special, name, function)
    del calls["log_softmax"]  # scikit-learn calls it nowhere

    from sklearn.utils import _array_api, extmath

    return {
        _array_api._logsumexp: lambda array, axis=None, xp=None: ours["logsumexp"](array, axis),
        extmath.softmax: lambda X, copy=True: ours["softmax"](X, axis=1),
    }


class Passed:
    """A plugin of pytest: notes which tests pass."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note one test."""
        if report.when == "call" and report.passed:
            self.ids.append(report.nodeid)


def run(suite: str, which: str, answer: str, *options: str) -> int:
    """Run a suite in this process; leave what passed, and the calls, in a file."""
    calls: Counter[str] = Counter()
    replacement: AbstractContextManager[None] = nullcontext()
    if which == "ours":
        places = {"array_api": array_api, "scipy_special": scipy_special}[suite](calls)
        from examples.scikit_learn import replaced

        replacement = replaced(places)
    import sklearn

    tests = Path(sklearn.__file__).parent
    passed = Passed()
    # Neither our configuration nor a cache beside the installed tests.
    alone = ("-c", os.devnull, "--rootdir", str(tests.parent), "-p", "no:cacheprovider")
    paths = [str(tests / name) for name in SUITES[suite]]
    with replacement:
        status = pytest.main([*alone, "-q", "--no-header", *options, *paths], plugins=[passed])
    Path(answer).write_text(json.dumps({"passed": passed.ids, "calls": calls}))
    return int(status)


def main(suite: str, *options: str) -> int:
    """Run a suite as it is and with ours, and compare."""
    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        for which in ("theirs", "ours"):
            print(f"--- scikit-learn's tests, suite {suite}, with {which}", flush=True)
            path = Path(folder, f"{which}.json")
            command = [sys.executable, __file__, "--run", suite, which, str(path), *options]
            failed = subprocess.call(command)
            answers[which] = json.loads(path.read_text())
    passed = {which: set(answer["passed"]) for which, answer in answers.items()}
    calls = answers["ours"]["calls"]
    print(f"passed: {len(passed['theirs']):,} with theirs, {len(passed['ours']):,} with ours")
    listed = ", ".join(f"{count:,} of {name}" for name, count in calls.items())
    print(f"calls of ours: {sum(calls.values()):,} ({listed})")
    for test in sorted(passed["theirs"] - passed["ours"]):
        print(f"passed with theirs only: {test}")
    never = [name for name, count in calls.items() if not count]
    if never:
        print(f"never called: {', '.join(never)}")
    never_at_all = never and not options  # a part of the tests need not call each
    return int(bool(failed or never_at_all or passed["theirs"] != passed["ours"]))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--run", suite, which, answer, *options]:
            sys.exit(run(suite, which, answer, *options))
        case [suite, *options] if suite in SUITES:
            sys.exit(main(suite, *options))
        case _:
            sys.exit(__doc__)
