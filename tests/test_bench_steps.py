"""``python -m bench steps``: training steps with ours and with torch's functions."""

from __future__ import annotations

import json

import pytest

from bench import peers, places, steps
from bench.__main__ import main
from bench.errors import CommandError


@pytest.mark.slow("torch.compile calls a C++ compiler")
@pytest.mark.libraries("torch")
def test_every_step_is_timed_in_both_ways(arrays_of, tmp_path, capsys):
    if why := peers.why_not_compiled(places.open_backend(arrays_of)):
        pytest.skip(why)
    file = tmp_path / "steps.json"
    assert main(["steps", "--quick", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    found = [(row["step"], row["mode"]) for row in rows]
    assert found == [
        *(("small GPT", mode) for mode in ("eager", "bfloat16", "compiled")),
        ("layer 2048x64", "compiled"),
    ]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ours_s"] / row["torch_s"])
    assert "/ torch" in capsys.readouterr().out


def test_a_step_over_its_goal_fails(monkeypatch, capsys):
    rows = [steps.Row("small GPT", "eager", 2.0, 1.0, 0.75), steps.Row("layer", "", 1.0, 2.0, 0.9)]
    monkeypatch.setattr(steps, "check", lambda: None)
    monkeypatch.setattr(steps, "measure", lambda quick: iter(rows))
    assert main(["steps"]) == 1
    assert main(["steps", "--quick"]) == 0
    assert capsys.readouterr().out.count("OVER") == 2
    del rows[0]
    assert main(["steps"]) == 0


def test_torch_and_a_compiler_are_needed(monkeypatch):
    monkeypatch.setattr(places, "is_installed", lambda name: False)
    with pytest.raises(CommandError, match=r"portable_softmax\[torch\]"):
        steps.check()
