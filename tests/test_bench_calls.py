"""``python -m bench options``: what options cost."""

from __future__ import annotations

import json

import numpy as np
import pytest

import portable_softmax as ps
from bench import options
from bench.__main__ import main

pytestmark = pytest.mark.once


def test_every_call_is_timed_in_three_ways(tmp_path, capsys):
    file = tmp_path / "options.json"
    assert main(["options", "--quick", "--dtypes", "float32", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {row["call"] for row in rows} >= {"softmax, where", "loss and gradient, probabilities"}
    for row in rows:
        assert not row["problem"]
        assert all(0 < row[way] < 60 for way in ("seconds", "plain", "by_hand"))
    assert "/ by hand" in capsys.readouterr().out


def test_a_wrong_result_is_named_instead_of_timed(monkeypatch, capsys):
    monkeypatch.setattr(ps, "softmax", lambda x, **_: np.zeros_like(x))
    rows = [row for row in options.measure(["float64"], quick=True) if row.problem]
    assert [row.call for row in rows] == ["softmax, where", "softmax, causal"]
    assert options.cells(rows)[0][3] == "wrong result"
    assert main(["options", "--quick", "--dtypes", "float64"]) == 1
