"""DTensors: calls on shards of 1, 2 and 4 ranks, beside the same calls on whole tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("dtensor_ranks.py")
PATIENCE = 600  # seconds


@pytest.mark.run_on("torch")
@pytest.mark.slow("several processes, each with hundreds of calls")
def test_shards_of_batch_and_classes(torch, xp, tmp_path):
    """Values, gradients, placements, collectives and refusals, over gloo."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    pytest.importorskip("torch.distributed.tensor", reason="torch has it from 2.5 on")
    if not hasattr(os, "fork"):
        pytest.skip("each rank is a fork")
    command = [sys.executable, str(PROGRAM), str(tmp_path), "1", "2", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
