"""``python -m bench thresholds``: both sides of the sizes at which kernels change their way."""

from __future__ import annotations

import importlib
import json

import pytest

from bench import thresholds
from bench.__main__ import main
from portable_softmax import kernels


@pytest.mark.slow("Numba compiles kernels that the constants keep from small rows")
@pytest.mark.numba
def test_both_ways_are_timed_for_every_size(tmp_path, capsys):
    file = tmp_path / "sizes.json"
    driver = importlib.import_module(thresholds._HOME)
    before = driver.SHORT
    assert main(["thresholds", "--quick", "--dtypes", "float32", "--json", str(file)]) == 0
    assert before == driver.SHORT
    rows = json.loads(file.read_text())["rows"]
    assert {row["size"] for row in rows} == {size.name for size in thresholds.sizes()}
    for row in rows:
        assert row["taken"] in row["ways"]
        assert all(0 < seconds < 60 for seconds in row["seconds"])
    assert "/ other" in capsys.readouterr().out


@pytest.mark.slow("Numba compiles kernels that the constants keep from small rows")
@pytest.mark.numba
def test_each_way_is_the_one_that_is_named(monkeypatch):
    """The constant is what decides: on either side of it the other entry runs."""
    driver = importlib.import_module(thresholds._HOME)
    taken = []
    real = driver.plan
    monkeypatch.setattr(driver, "plan", lambda *a, **k: taken.append(real(*a, **k)) or taken[-1])
    for size in thresholds.sizes():
        taken.clear()
        n = 300 if size.name == "MIDDLE" else 64
        thresholds._measured(size, (20_000, n), "float32", "softmax", rounds=1)
        first, second = taken[0], taken[-1]
        assert first.layout != second.layout or first.pieces < second.pieces


def test_the_ratio_is_that_of_what_is_taken():
    for taken, ratio in (("a", 2.0), ("b", 0.5)):
        row = thresholds.Row("SHORT", (1, 2), "float32", "softmax", ("a", "b"), (2.0, 1.0), taken)
        assert row.ratio == ratio


def test_numba_is_needed(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "available", dict)
    assert main(["thresholds", "--quick"]) == 2
    assert "numba is not installed: pip install" in capsys.readouterr().err
