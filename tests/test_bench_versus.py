"""``bench versus`` compares two checkouts in turns, each in a process of its own."""

import json
import math
import shutil
from pathlib import Path

import pytest

import portable_softmax
from bench import report, speed, versus
from bench.__main__ import main
from bench.errors import CommandError

KEY = versus.Key("numpy", (4, 3), "float32", "softmax", "ours")
SLOWER = """
def _slower(function):
    import functools, time
    @functools.wraps(function)
    def call(*args, **options):
        time.sleep(0.003)
        return function(*args, **options)
    return call

softmax = _slower(softmax)
"""
WRONG = "\nsoftmax = log_softmax\n"


@pytest.fixture
def other(tmp_path):
    """Another checkout of the package."""
    source = Path(portable_softmax.__file__).parent
    shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def change(folder: Path, text: str) -> None:
    with (folder / "portable_softmax" / "__init__.py").open("a") as file:
        file.write(text)


def run(folder: Path, *arguments: str) -> int:
    few = ("--quick", "--dtypes", "float32", "--ops", "softmax", "--path", "ours")
    return main(["versus", str(folder), *few, *arguments])


@pytest.mark.slow("it measures in two other processes")
@pytest.mark.parametrize("mode", [("--shapes", "4x3"), ("--shapes", "4x3", "--fresh")])
def test_each_tree_runs_its_own_package(other, mode, tmp_path, capsys):
    change(other, SLOWER)
    path = tmp_path / "versus.json"
    assert run(other, *mode, "--json", str(path)) == 0
    document = json.loads(path.read_text())
    (cell,) = document["cells"]
    assert cell["key"] == ["numpy", [4, 3], "float32", "softmax", "ours"]
    assert cell["ratio"] == pytest.approx(cell["now_s"] / cell["before_s"])
    assert cell["before_s"] > 0.003 > 2 * cell["now_s"]
    assert {"commit", "machine", "versions", "backends", "other"} <= document.keys()
    printed = capsys.readouterr()
    assert "1 cells, geometric mean" in printed.out
    assert printed.err.startswith("numpy  softmax  4x3  float32  ours  ")


@pytest.mark.slow("it measures in two other processes")
def test_a_cell_over_the_limit_fails(other, monkeypatch, tmp_path, capsys):
    """The load that is reported is that before any process of the run."""
    started, start = [], versus.Tree.__init__
    monkeypatch.setattr(versus.Tree, "__init__", lambda *a: started.append(a) or start(*a))
    monkeypatch.setattr(report, "load", lambda: 100.0 * len(started))
    path = tmp_path / "versus.json"
    assert run(other, "--shapes", "4x3", "--limit", "0.01", "--json", str(path)) == 1
    assert started
    assert json.loads(path.read_text())["machine"]["load_before"] == 0
    out = capsys.readouterr().out
    assert "SLOWER" in out
    assert "1 over 0.01 or wrong" in out


def test_a_wrong_result_is_not_timed(other, capsys):
    change(other, WRONG)
    assert run(other, "--shapes", "4x3") == 0
    assert "before: wrong: relative error" in capsys.readouterr().out
    assert not versus.Cell(KEY, before_problem="wrong").fails(1.1)
    assert versus.Cell(KEY, problem="wrong").fails(1.1)


def test_what_cannot_be_compared_is_one_line(other, capsys):
    face = other / "portable_softmax" / "__init__.py"
    source = face.read_text()
    for text, arguments, message in (
        ("", ("--path", "ours, quick"), "unknown path 'ours, quick'"),
        ("", ("--ops", "logsumexp+backward"), "nothing to compare"),
        ("__file__ = '/elsewhere/portable_softmax/__init__.py'", (), "that was imported is"),
        ("raise SystemExit", (), "ended early, see above"),
        (None, (), "is no checkout of portable_softmax"),
    ):
        face.write_text(f"{source}\n{text}\n")
        if text is None:
            shutil.rmtree(other / "portable_softmax")
        assert run(other, *arguments) == 2
        captured = capsys.readouterr()
        assert not captured.out
        assert message in captured.err
        assert captured.err.count("\n") == 1


# --------------------------------------------------------------------------- taking turns


class FakeTree:
    """A process that answers from a list of seconds, and logs its turns."""

    def __init__(self, name, seconds, log):
        self.name, self.seconds, self.log = name, iter(seconds), log

    def send(self, request):
        self.log.append((self.name, request))

    def receive(self):
        return next(self.seconds)


def test_the_trees_take_turns_and_the_fastest_round_counts():
    log = []
    before, now = FakeTree("before", (4.0, 2.0, 3.0), log), FakeTree("now", (3.0, 9.0, 5.0), log)
    cell = versus.Cell(KEY)
    assert math.isnan(cell.ratio)  # without a time
    versus._take_turns(cell, before, now, speed.Effort(seconds=0.0, rounds=3, most=9))
    assert [name for name, _ in log] == ["before", "now", "now", "before", "before", "now"]
    assert (cell.before_s, cell.now_s) == (2.0, 3.0)
    assert cell.ratio == 1.5


def test_rounds_go_on_until_the_time_is_used_up():
    log = []
    trees = [FakeTree(name, (0.1,) * 9, log) for name in ("before", "now")]
    versus._take_turns(versus.Cell(KEY), *trees, speed.Effort(seconds=0.45, rounds=2, most=9))
    assert len(log) == 2 * 5


def test_a_fresh_cell_has_processes_of_its_own_and_a_slow_one_gets_more(monkeypatch):
    seen = []

    def measure(other, cells, effort):
        seen.append([cell.key.path for cell in cells])
        for cell in cells:
            cell.before_s, cell.now_s = 1.0, 2.0 if cell.key.path == "b" else 1.0

    monkeypatch.setattr(versus, "_measure", measure)
    keys = [KEY._replace(path=path) for path in "ab"]
    pairs, more = versus.FRESH_PAIRS, versus.MORE
    alone = [["a"]] * pairs + [["b"]] * (pairs + more)
    for fresh, groups in ((False, [["a", "b"], ["b"], ["b"]]), (True, alone)):
        seen.clear()
        found = versus.measure(Path(), keys, limit=1.1, fresh=fresh, effort=speed.QUICK)
        assert [cell.ratio for cell in found] == [1.0, 2.0]
        assert seen == groups


def test_the_bench_of_this_tree_measures_both(other):
    (other / "bench").mkdir()
    (other / "bench" / "__init__.py").write_text("raise SystemExit")
    version, offered = versus.paths(other, "numpy")
    assert version.startswith("numpy ")
    assert ("ours", "softmax") in offered
    with versus.Tree(other) as tree:
        tree.send("no such request")
        with pytest.raises(CommandError, match="ended early"):
            tree.receive()
