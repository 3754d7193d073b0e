"""scikit-learn's own tests, with its softmax, logsumexp and multinomial loss replaced by ours.

    python tests/conformance/scikit_learn.py [array_api|scipy_special] [options of pytest]

scikit-learn ships these tests, and nothing of it is copied here. They run where they lie, with the
replacement; then those that called it or did not pass run as they are, in another process. The same
must pass, and each function must have been called: the calls are counted. Without the name of a
suite both run, at the same time.

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
from collections.abc import Callable, Container, Mapping
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


class Record:
    """A plugin of pytest: runs what is asked for, and notes what passes and what calls ours."""

    def __init__(self, calls: Counter[str], only: Container[str] | None) -> None:
        self.calls, self.only = calls, only
        self.ran: list[str] = []
        self.passed: list[str] = []
        self.called: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out what is not asked for."""
        if self.only is not None:
            items[:] = [item for item in items if item.nodeid in self.only]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        """Note one test, and whether it or its fixtures call ours."""
        before = self.calls.total()
        answer = yield
        self.ran.append(item.nodeid)
        if self.calls.total() > before:
            self.called.append(item.nodeid)
        return answer

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note one test that passed."""
        if report.when == "call" and report.passed:
            self.passed.append(report.nodeid)


def run(suite: str, which: str, folder: str, *options: str) -> int:
    """Run a suite in this process; leave what is known of its tests in `folder`."""
    calls: Counter[str] = Counter()
    replacement: AbstractContextManager[None] = nullcontext()
    only = None
    if which == "ours":
        places = {"array_api": array_api, "scipy_special": scipy_special}[suite](calls)
        from examples.scikit_learn import replaced

        replacement = replaced(places)
    else:
        ours = json.loads(Path(folder, "ours.json").read_text())
        only = {*ours["ran"]} - {*ours["passed"]} | {*ours["called"]}
    import sklearn

    tests = Path(sklearn.__file__).parent
    record = Record(calls, only)
    # Neither our configuration nor a cache beside the installed tests.
    alone = ("-c", os.devnull, "--rootdir", str(tests.parent), "-p", "no:cacheprovider")
    paths = [str(tests / name) for name in SUITES[suite]]
    with replacement:
        status = pytest.main([*alone, "-q", "--no-header", *options, *paths], plugins=[record])
    found = {name: getattr(record, name) for name in ("ran", "passed", "called", "calls")}
    Path(folder, f"{which}.json").write_text(json.dumps(found))
    return int(status)


def both(*options: str) -> int:
    """Run the suites at the same time, and print what they say one after the other."""
    running = [
        subprocess.Popen(
            [sys.executable, __file__, suite, *options],
            stdout=subprocess.PIPE if number else None,
            text=True,
        )
        for number, suite in enumerate(SUITES)
    ]
    failed = False
    for one in running:
        said, _ = one.communicate()
        print(said or "", flush=True)
        failed |= one.returncode != 0
    return int(failed)


def compare(suite: str, *options: str) -> int:
    """Run a suite with ours, and what that may have changed as it is; compare."""
    answers, broken = {}, False
    with tempfile.TemporaryDirectory() as folder:
        for which in ("ours", "theirs"):
            print(f"--- scikit-learn's tests, suite {suite}, with {which}", flush=True)
            command = [sys.executable, __file__, "--run", suite, which, folder, *options]
            broken |= subprocess.call(command) > pytest.ExitCode.TESTS_FAILED
            answers[which] = json.loads(Path(folder, f"{which}.json").read_text())
    ours, theirs = answers["ours"], answers["theirs"]
    passed = {*ours["passed"]} & {*theirs["ran"]}, {*theirs["passed"]}
    calls = ours["calls"]
    print(f"passed with ours: {len(ours['passed']):,}")
    print(
        f"called ours or did not pass: {len(theirs['ran']):,}, "
        f"of which {len(passed[0]):,} pass with ours and {len(passed[1]):,} with theirs"
    )
    listed = ", ".join(f"{count:,} of {name}" for name, count in calls.items())
    print(f"calls of ours: {sum(calls.values()):,} ({listed})")
    for test in sorted(passed[0] ^ passed[1]):
        print(f"passed with {'ours' if test in passed[0] else 'theirs'} only: {test}")
    never = [name for name, count in calls.items() if not count]
    if never:
        print(f"never called: {', '.join(never)}")
    never_at_all = never and not options  # a part of the tests need not call each
    return int(bool(broken or never_at_all or passed[0] != passed[1]))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--run", suite, which, folder, *options]:
            sys.exit(run(suite, which, folder, *options))
        case [suite, *options] if suite in SUITES:
            sys.exit(compare(suite, *options))
        case options:
            sys.exit(both(*options))
