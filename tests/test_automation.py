"""What noxfile.py computes by itself; its sessions are tested by running them."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import conftest
import pytest
from backends import BACKENDS
from shard import Shard

import noxfile
from portable_softmax.kernels import _triton
from portable_softmax.testing import CASES

OUTCOMES = """\
import pytest

@pytest.fixture(autouse=True)
def describe(record_property):
    for pair in (("backend", "torch"), ("left", 12), ("version", "2.13"), ("device", "cpu")):
        record_property(*pair)

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
def results(monkeypatch):
    """Those of a process that has run no tests."""
    monkeypatch.setattr(noxfile, "results", noxfile.Results())
    return noxfile.results


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report that pytest itself wrote, of each outcome."""
    folder = tmp_path_factory.mktemp("outcomes")
    (folder / "test_outcomes.py").write_text(OUTCOMES)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml=report.xml"]
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL)
    return folder / "report.xml"


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


def test_required_backends(monkeypatch):
    for listed, names in (("", set()), ("cupy, torch-cuda,", {"cupy", "torch-cuda"})):
        monkeypatch.setenv("PORTABLE_SOFTMAX_REQUIRE", listed)
        assert noxfile.required(Session()) == names
    monkeypatch.setenv("PORTABLE_SOFTMAX_REQUIRE", "cupy,cuppy")
    with pytest.raises(AssertionError, match="no backend of ours: cuppy"):
        noxfile.required(Session())


def test_a_report_is_read_for_each_backend(report, tmp_path):
    rows, slowest = noxfile.read_reports([report])
    assert rows["torch"].counts == Counter(passed=1, failed=2, skipped=3)
    assert rows["torch"].reasons == Counter({"no second device": 2, "not yet": 1})
    assert (rows["torch"].version, rows["torch"].device) == ("2.13", "cpu")
    assert len(slowest) == 6
    assert slowest == sorted(slowest, reverse=True)
    (cells,) = noxfile.cells_of(rows, "fast")
    assert cells[:-2] == ("torch", "2.13", "cpu", "1", "2", "3")
    assert cells[-1] == "2 x no second device\n1 x not yet\n12 more are run by tests-slow"
    # Two reports of a backend are one row.
    rows, slowest = noxfile.read_reports([report, shutil.copy(report, tmp_path / "other.xml")])
    assert rows["torch"].counts == Counter(passed=2, failed=4, skipped=6)
    assert rows["torch"].left.total() == 24
    assert len(slowest) == 12


def test_a_missing_or_broken_report_is_a_failure(tmp_path):
    path = tmp_path / "cpu.xml"
    for text in (None, "", "<testsuites><testsuite"):
        if text is not None:
            path.write_text(text)
        rows, _ = noxfile.read_reports([path])
        assert rows["cpu"].counts["failed"] == 1


def test_a_run_that_failed_fails_the_session_after_the_table(results, report, capsys):
    results.reports.append(report)
    results.failed.append("cpu")
    with pytest.raises(AssertionError, match="failed: cpu"):
        noxfile.end(Session(), "fast")
    assert "2 x no second device" in capsys.readouterr().out


def test_without_a_gpu_cupy_is_skipped_or_fails_where_it_is_required(monkeypatch, results):
    monkeypatch.setattr(noxfile, "cuda", lambda: noxfile.Cuda(None, "no CUDA driver"))
    for must_run, outcome in ((set(), ("-", "skipped")), ({"cupy"}, ("failed", "-"))):
        (cells,) = noxfile.without_a_device(must_run)
        assert cells[4:6] == outcome
        assert cells[-1] == "no CUDA driver"
    monkeypatch.setenv("PORTABLE_SOFTMAX_REQUIRE", "cupy")
    with pytest.raises(AssertionError, match="required, and not run: cupy"):
        noxfile.end(Session(), "fast")


@pytest.mark.slow("it collects tests twice")
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


def test_ci_runs_the_tests_and_a_shard_of_the_slow_ones():
    commands = (noxfile.ROOT / ".ci" / "run").read_text().splitlines()
    runs = [line.removeprefix("python3 noxfile.py -s ") for line in commands if "noxfile" in line]
    sessions = [name for run in runs for name in run.split()]
    assert sessions[0] == "tests"
    assert sessions[-1] == "tests-shard"
    assert {"lint", "docs", "build", "lowest"} <= {*sessions}
    workflow = (noxfile.ROOT / ".github" / "workflows" / "whole.yml").read_text()
    weekly = set(re.findall(r"^ +- ([a-z-]+)$", workflow, re.M))
    assert weekly >= {"tests-slow", "tests-triton-oldest", "conformance", "mutants", "fuzz-numpy"}


class Recorded(Session):
    """A session that keeps what it would run."""

    posargs: tuple[str, ...] = ()

    def __init__(self):
        super().__init__()
        self.commands: list[tuple[str, ...]] = []

    def run(self, *command: str, **options):
        self.commands.append(command)


def test_each_part_runs_on_every_backend_and_path(monkeypatch, results):
    monkeypatch.setattr(noxfile, "together", lambda session: "python")
    monkeypatch.setattr(noxfile, "cuda", lambda: noxfile.Cuda(None, "no CUDA driver"))
    monkeypatch.setattr(noxfile, "end", lambda session, part: None)
    there_are = {name for name in BACKENDS if "cu" not in name or name == "cubed"}
    for part in ("fast", "slow"):
        session = Recorded()
        noxfile.everything(session, part)
        named = [command[command.index("--backend") + 1] for command in session.commands]
        ran = {name for names in named for name in names.split(",")}
        assert ran == there_are - {*noxfile.ALONE}
        assert all(command[command.index("--part") + 1] == part for command in session.commands)


def test_a_slow_test_falls_to_one_commit_in_eight_or_to_its_room(monkeypatch):
    monkeypatch.setattr(Shard, "_git", staticmethod(lambda root, *given: given[-1]))
    monkeypatch.setattr(Shard, "changed", {"portable_softmax/kernels/_triton/_loss.py"})
    shards = [Shard(noxfile.ROOT, str(number)) for number in range(800)]
    held = sum(shard.holds("tests/test_values.py::test_softmax[jax-numba]") for shard in shards)
    assert 60 < held < 140  # binomial, with a deviation of 9.4
    assert all(shard.holds("tests/test_triton.py::test_one[triton]") for shard in shards[:20])
    assert Shard(noxfile.ROOT, "").holds("tests/test_values.py::test_softmax[jax-numba]")


def test_what_a_test_runs_on_is_what_its_marks_say():
    backends = "numpy,strict,numba,torch"
    found = collected("--backend", backends, "tests/test_values.py", "tests/test_textbook.py")
    of_values = [test.partition("::")[2] for test in found if "test_values.py" in test]
    numpys, numbas = (
        {test.replace(f"[{name}", "[") for test in of_values if f"[{name}" in test}
        for name in ("numpy", "numba")
    )
    assert numpys  # of paths: the same on each
    assert numbas == numpys
    assert any("test_textbook.py" in test and "[strict" in test for test in found)
    assert not any("test_textbook.py" in test and "[numba" in test for test in found)


def test_each_test_that_must_reach_tritons_kernels_exists():
    tests = "".join(path.read_text() for path in (noxfile.ROOT / "tests").glob("test_*.py"))
    assert [name for name in conftest._ON_KERNELS if f"def {name}(" not in tests] == []
    assert {case.__name__[1:] for case in CASES.values()} >= conftest._CASES_ON_KERNELS


def test_the_oldest_triton_is_that_of_the_extra():
    (extra,) = noxfile.PYPROJECT["project"]["optional-dependencies"]["triton"]
    assert extra == f"triton>={'.'.join(map(str, _triton.OLDEST))}"


def test_the_table_is_aligned():
    rows = [
        ("numpy", "2.4.6", "cpu", "812", "0", "3", "9", "2 x one\n1 x other"),
        ("cupy", "-", "-", "-", "-", "skipped", "-", "no GPU"),
    ]
    assert noxfile.table(rows).splitlines() == [
        "backend  version  device  passed  failed  skipped  seconds  why",
        "numpy    2.4.6    cpu        812       0        3        9  2 x one",
        "                                                            1 x other",
        "cupy     -        -            -       -  skipped        -  no GPU",
    ]
