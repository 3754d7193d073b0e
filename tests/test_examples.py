"""The programs of examples/, each run as a user would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.libraries("ndonnx")
def test_export_onnx(arrays_of, tmp_path):
    """It compares its own answers, and fails where one is off by more than 8 units."""
    script, target = EXAMPLES / "export_onnx.py", tmp_path / "digits.onnx"
    command = [sys.executable, str(script), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "1797 digits, 94." in done.stdout
    assert "with the gradient: " in done.stdout
    assert target.stat().st_size < 200_000
