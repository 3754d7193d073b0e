"""``python -m bench arrays`` and ``fresh``, and the figures of ratios."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from bench import arrays, fresh, ratio_plots, transforms
from bench.__main__ import main
from bench.errors import CommandError

DOCUMENT = {"machine": {"cpu": "a processor", "cores": 2}}
PNG = b"\x89PNG"


@pytest.mark.slow("it starts a process for each library")
def test_scipy_takes_each_librarys_own_arrays(tmp_path):
    """In a process of its own: scipy looks at SCIPY_ARRAY_API when it is imported."""
    pytest.importorskip("scipy")
    json_file, figure = tmp_path / "arrays.json", tmp_path / "arrays.png"
    files = ["--json", str(json_file), "--plot", str(figure)]
    command = [sys.executable, "-m", "bench", "arrays", "--quick", "--shapes", "8x5", *files]
    env = {name: value for name, value in os.environ.items() if name != "SCIPY_ARRAY_API"}
    subprocess.run(command, check=True, capture_output=True, env=env)
    rows = json.loads(json_file.read_text())["rows"]
    assert {row["operation"] for row in rows} == {"softmax", "log_softmax", "logsumexp"}
    assert {row["library"] for row in rows} >= {"numpy"}
    for row in rows:
        assert not row["problem"]
        assert row["ratio"] == pytest.approx(row["seconds"] / row["other_seconds"])
    assert figure.read_bytes().startswith(PNG)


def test_scipy_must_not_be_there_before(monkeypatch):
    pytest.importorskip("scipy")
    monkeypatch.setenv("SCIPY_ARRAY_API", "0")
    with pytest.raises(CommandError, match="SCIPY_ARRAY_API=1"):
        arrays.prepare()
    monkeypatch.setenv("SCIPY_ARRAY_API", "1")
    arrays.prepare()


def test_a_goal_is_that_of_the_library():
    call = "softmax", (2, 3), ""
    slow, wrong = arrays.Row("jax", *call, 0.7, 1.0), arrays.Row("numpy", *call, 0.1, 1.0, "wrong")
    assert slow.missed
    assert wrong.missed
    assert not arrays.Row("torch", *call, 0.7, 1.0).missed
    assert [line[7] for line in arrays.cells([slow, wrong])] == ["OVER", "OVER"]


def test_fresh_processes_take_turns(monkeypatch, tmp_path, capsys):
    pytest.importorskip("scipy")
    cells = [cell for cell in fresh._cells() if cell.operation == "softmax"][:2]
    assert [cell.peer for cell in cells] == ["numpy by hand", "scipy.special"]
    monkeypatch.setattr(fresh, "_cells", lambda: cells)
    first = fresh.Row("first call, nothing compiled", "numpy float32", 2.0, "1 s", 1.0, 1.0)
    monkeypatch.setattr(fresh, "_first_calls", lambda: iter([first]))
    file = tmp_path / "fresh.json"
    assert main(["fresh", "--quick", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["beside"] for row in rows[:2]] == [cell.peer for cell in cells]
    assert all(0 < row["ratio"] < 1e3 and not row["problem"] for row in rows)
    assert "OVER" in capsys.readouterr().out or not importable("numba")


def importable(name):
    return subprocess.run([sys.executable, "-c", f"import {name}"], check=False).returncode == 0


def test_the_first_call_is_timed_cold_and_warm(monkeypatch):
    """What is timed comes from the process itself, and the second finds what the first has kept."""
    monkeypatch.setattr(fresh, "_FIRST", "import os; print(len(os.environ['NUMBA_CACHE_DIR']))")
    cold, warm = fresh._first_calls()
    assert cold.seconds == warm.seconds > 0
    assert (cold.goal, warm.goal) == (1.0, 0.25)


def test_jax_has_a_panel_for_each_form(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        transforms.Row("softmax", "random", form, shape, path, ratio, "jax.nn", 1.0)
        for form in transforms.FORMS
        for shape in ((4, 3), (8, 5))
        for path, ratio in (("jax rules", 1.4), ("numba rows", 0.3), ("numba rows", 0.5))
    ]
    path = tmp_path / "jax.png"
    ratio_plots.save_jax(rows, DOCUMENT, path)
    assert path.read_bytes().startswith(PNG)
