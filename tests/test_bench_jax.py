"""``python -m bench jax`` and ``compile``: JAX beside its peers, and what XLA compiles."""

from __future__ import annotations

import json

import numpy as np
import pytest

import portable_softmax as ps
from bench import compilation, programs, transforms
from bench.__main__ import main

pytestmark = pytest.mark.slow("XLA compiles each function, and Numba two handlers")


@pytest.fixture(autouse=True)
def _two_calls(jax, monkeypatch):
    pytest.importorskip("optax")
    some = [call for call in transforms.calls() if call.operation in ("softmax", "cross_entropy")]
    monkeypatch.setattr(transforms, "calls", lambda: iter(some))


def test_each_path_is_timed_beside_the_faster_peer(tmp_path, capsys):
    file = tmp_path / "jax.json"
    assert main(["jax", "--quick", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    cells = {(row["call"], row["logits"], row["form"]) for row in rows}
    assert len(cells) == 2 * len(transforms.LOGITS) * len(transforms.FORMS)
    assert {row["path"] for row in rows} == {*transforms.paths()}
    for row in rows:
        assert not row["problem"]
        assert row["ratio"] == row["seconds"] / row["peer_seconds"]
    assert {row["peer"] for row in rows if row["call"] == "softmax"} == {"jax.nn"}
    printed = capsys.readouterr().out
    assert "geometric mean" in printed
    assert "numba rows" in printed


def test_the_summary_is_of_each_path_and_shape():
    rows = [
        transforms.Row("softmax", "random", "jit", shape, path, seconds, "jax.nn", 1.0)
        for path, shape, seconds in (("a", (2, 3), 0.5), ("a", (4, 3), 2.0), ("b", (2, 3), 3.0))
    ]
    assert [line[:5] for line in transforms.summary(rows)] == [
        ["a", "2x3", "1", "0.50", "0.50"],
        ["a", "4x3", "1", "2.00", "2.00"],
        ["a", "all", "2", "1.00", "2.00"],
        ["b", "2x3", "1", "3.00", "3.00"],
        ["b", "all", "1", "3.00", "3.00"],
    ]


def test_a_wrong_result_fails(monkeypatch, capsys):
    monkeypatch.setattr(ps, "softmax", lambda x, **_: x * 0)
    assert main(["jax", "--quick"]) == 1
    assert "wrong result" in capsys.readouterr().out


def test_programs_are_timed_beside_the_peers(tmp_path, capsys):
    file = tmp_path / "programs.json"
    assert main(["programs", "--quick", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {row["path"] for row in rows} == {*transforms.paths()}
    assert len({row["call"] for row in rows}) == 9
    for row in rows:
        assert not row["problem"]
        assert row["ratio"] == row["seconds"] / row["peer_seconds"]
    assert "program: softmax(x * scale + bias) @ v" in capsys.readouterr().out


def test_a_goal_is_that_of_a_program_or_of_a_call_alone():
    calls = ("program: f", "numba rows"), ("f", "numba rows"), ("f", "jax rules")
    lines = programs.cells(
        [
            transforms.Row(call, "random", "jit", (2, 3), path, 0.95, "jax.nn", 1.0)
            for call, path in calls
        ]
    )
    assert [line[-2:] for line in lines] == [["1.00", ""], ["0.90", "OVER"], ["", ""]]


def test_compile_counts_time_and_instructions(tmp_path, capsys):
    file = tmp_path / "compile.json"
    assert main(["compile", "--quick", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {row["path"] for row in rows} == {*transforms.paths()}
    for row in rows:
        assert 0 < row["seconds"] <= row["first"]
        assert row["instructions"] > 0
        assert row["peer"] == ("jax.nn" if row["call"] == "softmax" else "optax")
    assert "instructions" in capsys.readouterr().out


def test_the_instructions_are_those_of_the_program(jax):
    def of(f):
        return compilation._compiled(lambda x, _: f(x), [np.ones(3, np.float32), None])[1]

    assert of(lambda x: -(x + x)) == of(lambda x: x + x) + 1
