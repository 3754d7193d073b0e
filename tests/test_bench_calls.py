"""``python -m bench calls``: calls that people make, beside what they use instead."""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest

import portable_softmax as ps
from bench import calls
from bench.__main__ import main


def test_every_call_is_timed_beside_another(tmp_path, capsys):
    file = tmp_path / "calls.json"
    assert main(["calls", "--quick", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    found = {(row["call"], row["beside"]) for row in rows}
    assert found >= {
        ("softmax, where", "plain"),
        ("cross_entropy_value_and_grad, softcap", "by hand"),
        ("logsumexp, confident", "plain"),
        ("softmax, out", "plain"),
        ("softmax, sink of each head", "by hand"),
    }
    if find_spec("scipy"):
        assert ("logsumexp, sign", "scipy.special") in found
    for row in rows:
        assert not row["problem"]
        assert all(0 < row[way] < 60 for way in ("seconds", "other_seconds"))
        assert row["ratio"] == pytest.approx(row["seconds"] / row["other_seconds"])
    assert "by hand" in capsys.readouterr().out


def test_a_wrong_result_is_named_instead_of_timed(monkeypatch, capsys):
    monkeypatch.setattr(ps, "softmax", lambda x, **_: np.zeros_like(x))
    monkeypatch.setattr(calls, "cases", lambda quick: calls._with_options("float64", quick=quick))
    rows = [row for row in calls.measure(quick=True) if row.problem]
    assert [row.call for row in rows] == [
        *("softmax, where", "softmax, causal", "softmax, sink", "softmax, sink of each head")
    ]
    assert all(row.missed for row in rows)
    assert calls.cells(rows)[0][2] == "wrong result"
    assert main(["calls", "--quick"]) == 1


def test_a_missed_goal_fails(monkeypatch):
    row = calls.Row("softmax, where", "numpy", (2, 3), "float32", "plain", 1.5, "", 2.0, 1.0)
    monkeypatch.setattr(calls, "measure", lambda quick: iter([row]))
    assert main(["calls", "--quick"]) == 0
    assert main(["calls"]) == 1
    row.goal = 2.5
    assert main(["calls"]) == 0
