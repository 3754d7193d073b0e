"""The programs under examples/, on little data."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import portable_softmax as ps

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def program(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow("it starts a cluster")
def test_score_files(da, xp, tmp_path, capfd):
    """The losses of a file, from workers in this process, are those of the array."""
    pytest.importorskip("distributed", reason="the group test-dask has it")
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((50, 7)), rng.integers(7, size=50)
    paths = [str(tmp_path / name) for name in ("logits.npy", "labels.npy", "losses.npy")]
    np.save(paths[0], x)
    np.save(paths[1], t)
    score_files = program("score_files")
    lazy = score_files.score(*paths[:2], block=800)  # 14 rows each
    assert lazy.chunks == ((14, 14, 14, 8),)
    arguments = [*paths[:2], "--out", paths[2]]
    found = score_files.main(arguments, processes=False, dashboard_address="127.0.0.1:0")
    expected = ps.cross_entropy(x, t, reduction="none")
    np.testing.assert_allclose(lazy.compute(scheduler="sync"), expected, rtol=1e-12)
    np.testing.assert_allclose(np.load(paths[2]), expected, rtol=1e-12)
    np.testing.assert_allclose(found, expected.mean(), rtol=1e-12)
    assert "mean loss of 50 positions" in capfd.readouterr().out


@pytest.mark.slow("it starts two processes")
@pytest.mark.libraries("ndonnx")
def test_export_onnx(arrays_of, tmp_path):
    """It compares its own answers, and fails where one is off by more than 8 units."""
    options = {"capture_output": True, "text": True, "timeout": 120, "cwd": tmp_path}
    command, target = [sys.executable, str(EXAMPLES / "export_onnx.py")], tmp_path / "digits.onnx"
    asked = subprocess.run([*command, "--help"], **options)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith("usage: export_onnx.py ")
    assert not [*tmp_path.iterdir()]
    done = subprocess.run([*command, str(target)], **options)
    assert done.returncode == 0, done.stderr
    assert "1797 digits, 94." in done.stdout
    assert "with the gradient: " in done.stdout
    assert target.stat().st_size < 200_000


@pytest.mark.slow("torch.compile calls a C++ compiler")
@pytest.mark.libraries("torch")
@pytest.mark.parametrize("mode", ["eager", "bfloat16", "compiled"])
def test_train_gpt(arrays_of, mode, capsys):
    """It compares the losses of the two models, which learn something."""
    (found,) = program("train_gpt").main(["--quick", "--mode", mode])
    assert found.mode == mode
    assert found.losses[1] < found.losses[0]
    assert found.ratio > 0
    assert "ours / torch" in capsys.readouterr().out
