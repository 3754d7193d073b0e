"""What noxfile.py computes by itself; its sessions are tested by running them."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import noxfile
from portable_softmax.kernels import _triton

pytestmark = pytest.mark.once

OUTCOMES = """\
import pytest

@pytest.fixture(scope="session", autouse=True)
def describe(record_testsuite_property):
    record_testsuite_property("left", 12)
    for name in ("cpu", "cuda"):
        record_testsuite_property("version", "2.13.0")
        record_testsuite_property("device", name)

@pytest.fixture
def broken():
    raise OSError

@pytest.mark.parametrize("device", [1, 2])
def test_skipped(device): pytest.skip("no second device")

@pytest.mark.xfail(reason="not yet")
def test_expected_to_fail(): assert False

def test_failed(): assert False

def test_error(broken): pass

def test_passed(): pass
"""
PASSED = '<testsuites><testsuite errors="0" failures="0" skipped="0" tests="7"/></testsuites>'


class Session:
    """As much of a nox session as the helpers use."""

    def __init__(self, location: Path | None = None):
        self.virtualenv = self
        self.location = location
        self.installed: list[tuple[str, ...]] = []

    def error(self, message: str):
        raise AssertionError(message)

    def install(self, *requirements: str):
        self.installed.append(requirements)


@pytest.fixture
def reports(tmp_path, monkeypatch):
    """An empty folder of reports, in a process that has run no tests."""
    monkeypatch.setattr(noxfile, "REPORTS", tmp_path)
    monkeypatch.setattr(noxfile, "runs", {})
    monkeypatch.setattr(noxfile, "asked", noxfile.Asked())
    return tmp_path


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report that pytest itself wrote, of each outcome."""
    folder = tmp_path_factory.mktemp("outcomes")
    (folder / "test_outcomes.py").write_text(OUTCOMES)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml=report.xml"]
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL)
    return (folder / "report.xml").read_text()


def cells(row: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(noxfile.HEADINGS, row, strict=True))


def test_it_runs_from_any_folder_and_lists_a_session_for_each_backend(tmp_path):
    command = [sys.executable, Path(noxfile.__file__), "--list"]
    listed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    for backend in noxfile.BACKENDS:
        assert f"- tests-{backend} ->" in listed.stdout
    assert "* demo-numpy ->" in listed.stdout
    assert not list(tmp_path.iterdir())


def test_each_backend_has_its_extra():
    extras = noxfile.PYPROJECT["project"]["optional-dependencies"]
    needed = {extra for extra in noxfile.BACKENDS.values() if extra} - {"cuda"}
    assert extras.keys() >= needed | {"cuda12", "cuda13"}


def test_lowest_can_pin_each_dependency():
    for dependency in noxfile.PYPROJECT["project"]["dependencies"]:
        assert re.fullmatch(r"[\w-]+>=[\d.]+", dependency)


def test_the_same_nox_is_asked_for_everywhere():
    (nox,) = noxfile.load_toml(noxfile.__file__)["dependencies"]
    assert nox in noxfile.group("test")
    assert nox in noxfile.PYPROJECT["project"]["optional-dependencies"]["dev"]


def test_without_venv_it_names_the_package_to_install(monkeypatch):
    monkeypatch.setattr(noxfile, "has_nox", lambda python: False)
    monkeypatch.setattr(noxfile, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="python3-venv"):
        noxfile.start_nox()


def test_an_unchanged_environment_is_not_installed_again(tmp_path):
    session = Session(tmp_path)
    for requirement in ("numpy", "numpy", "scipy"):
        noxfile.install(session, requirement)
    assert [requirement for *_, requirement in session.installed] == ["numpy", "scipy"]


@pytest.mark.parametrize(
    ("listed", "names"), [("", set()), ("cupy, torch-cuda,", {"cupy", "torch-cuda"})]
)
def test_required_backends(monkeypatch, listed, names):
    monkeypatch.setenv("PORTABLE_SOFTMAX_REQUIRE", listed)
    assert noxfile.required(Session()) == names


def test_an_unknown_required_backend_is_an_error(monkeypatch):
    monkeypatch.setenv("PORTABLE_SOFTMAX_REQUIRE", "cupy,cuppy")
    with pytest.raises(AssertionError, match="no backend of ours: cuppy"):
        noxfile.required(Session())


def test_a_report_is_read(reports, report):
    (reports / "torch.xml").write_text(report)
    assert noxfile.read_report(reports / "torch.xml") == noxfile.Report(
        version="2.13.0",
        device="cpu, cuda",
        passed=1,
        failed=2,
        skipped=3,
        reasons=Counter({"no second device": 2, "not yet": 1}),
        left="12",
    )


def test_a_row_shows_the_reasons_and_the_note(reports, report):
    (reports / "torch.xml").write_text(report)
    noxfile.runs["torch"] = noxfile.Run(finished=False, note="torch-cuda: no driver")
    row = cells(noxfile.row("torch", set()))
    assert [row[name] for name in noxfile.COUNTS] == ["1", "2", "3"]
    assert row["why"] == "2 x no second device\n1 x not yet\ntorch-cuda: no driver"


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"fast"}, "12 more are run by tests-slow"),
        ({"slow"}, "12 more are run by tests"),
        ({"fast", "slow"}, None),
        (set(), None),
    ],
)
def test_a_row_shows_what_the_other_part_runs(reports, report, asked, why):
    (reports / "numpy.xml").write_text(report)
    noxfile.runs["numpy"] = noxfile.Run(finished=True)
    noxfile.asked.parts |= asked
    shown = cells(noxfile.row("numpy", set()))["why"].splitlines()
    assert shown[2:] == ([why] if why else [])


def test_a_passed_row_needs_a_runner_that_finished(reports):
    (reports / "numpy.xml").write_text(PASSED)
    noxfile.runs["numpy"] = noxfile.Run(finished=True)
    assert cells(noxfile.row("numpy", set()))["failed"] == "0"
    noxfile.runs["numpy"] = noxfile.Run(finished=False)
    assert cells(noxfile.row("numpy", set()))["failed"] == "failed"


def test_a_report_of_an_earlier_run_is_not_shown(reports):
    (reports / "numpy.xml").write_text(PASSED)
    row = cells(noxfile.row("numpy", set()))
    assert (row["passed"], row["failed"]) == ("-", "failed")


@pytest.mark.parametrize("text", [None, "", PASSED[:30]])
def test_a_missing_or_broken_report_is_a_failure(reports, text):
    if text is not None:
        (reports / "jax.xml").write_text(text)
    noxfile.runs["jax"] = noxfile.Run()
    assert cells(noxfile.row("jax", set()))["failed"] == "failed"


def test_without_a_gpu_cupy_is_skipped_or_fails_where_it_is_required(monkeypatch):
    monkeypatch.setattr(noxfile, "cuda", lambda: noxfile.Cuda(None, "no CUDA driver"))
    skipped, failed = (cells(noxfile.row("cupy", must_run)) for must_run in (set(), {"cupy"}))
    assert (skipped["failed"], skipped["skipped"], skipped["why"]) == (
        "-",
        "skipped",
        "no CUDA driver",
    )
    assert (failed["failed"], failed["skipped"], failed["why"]) == ("failed", "-", "no CUDA driver")


def test_the_tests_of_a_backend_are_collected_where_it_cannot_run():
    """For CuPy every test of the matrix is there, on a machine without a device as well."""

    def matrix(backend: str) -> set[str]:
        files = [f"tests/test_{name}.py" for name in ("semantics", "values", "cross_entropy")]
        tests = {test for test in collected("--backend", backend, *files) if f"[{backend}" in test}
        return {test.replace(f"[{backend}", "[") for test in tests}

    found = matrix("cupy")
    assert len(found) > 100
    assert found == matrix("strict")


def collected(*arguments: str) -> set[str]:
    """The tests that pytest would run."""
    command = (sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments)
    done = subprocess.run(command, cwd=noxfile.ROOT, capture_output=True, text=True, check=True)
    return {line for line in done.stdout.splitlines() if "::" in line}


@pytest.mark.slow("it collects all tests three times")
def test_the_two_parts_are_all_the_tests():
    """What is left out of the fast part runs in the slow one, and only properties run in both."""
    fast, slow = (collected("--backend", "jax", "--part", part) for part in ("fast", "slow"))
    assert fast | slow == collected("--backend", "jax")
    assert {test.partition("::")[0] for test in fast & slow} == {"tests/test_properties.py"}
    assert fast - slow


def test_ci_runs_both_parts():
    commands = (noxfile.ROOT / ".ci" / "run").read_text().splitlines()
    runs = [line.removeprefix("python3 noxfile.py -s ") for line in commands if "noxfile" in line]
    sessions = [name for run in runs for name in run.split()]
    assert sessions[0] == "tests"
    assert sessions[-1] == "tests-slow"
    assert {"lint", "docs", "build", "lowest", "tests-triton-oldest"} <= {*sessions}


class Queue(Session):
    """A session that queues others."""

    def __init__(self):
        super().__init__()
        self.queued: list[str] = []

    def notify(self, name: str):
        self.queued.append(name)


def test_each_part_runs_on_every_backend(reports):
    fast, slow = Queue(), Queue()
    noxfile.start(fast, "fast")
    assert noxfile.part() == "fast"
    noxfile.start(slow, "slow")
    assert noxfile.part() == ""  # both were asked for: everything runs once
    assert fast.queued == slow.queued
    assert fast.queued[-1] == "tests-table"
    every = {*noxfile.BACKENDS, "triton"} - {*noxfile.BY_NAME}
    assert {f"tests-{name}" for name in every} <= {*fast.queued}
    assert noxfile.asked.names.keys() == every | {"triton-compiled"}
    assert not noxfile.asked.traced


def test_the_oldest_triton_is_that_of_the_extra():
    (extra,) = noxfile.PYPROJECT["project"]["optional-dependencies"]["triton"]
    assert extra == f"triton>={'.'.join(map(str, _triton.OLDEST))}"


def test_coverage_is_measured_where_the_tests_are_not_slow(reports):
    session = Queue()
    noxfile.coverage(session)
    assert session.queued == [*(f"tests-{name}" for name in noxfile.COVERED), "tests-table"]
    assert noxfile.part() == "fast"
    assert [*noxfile.asked.names] == [*noxfile.COVERED]
    assert noxfile.asked.traced


def test_the_table_is_aligned():
    rows = [
        ("numpy", "2.4.6", "cpu", "812", "0", "3", "2 x one\n1 x other"),
        ("cupy", "-", "-", "-", "-", "skipped", "no GPU"),
    ]
    assert noxfile.table(rows).splitlines() == [
        "backend  version  device  passed  failed  skipped  why",
        "numpy    2.4.6    cpu        812       0        3  2 x one",
        "                                                   1 x other",
        "cupy     -        -            -       -  skipped  no GPU",
    ]
