"""JAX on 4 devices: sharded calls, and the collectives that they compile to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("jax_sharded.py")
PATIENCE = 600  # seconds


@pytest.mark.slow("another process compiles each call for 4 devices")
def test_shards_of_batch_and_classes(jax, xp):
    """One all-reduce where the batch is cut and two where the classes are, and the same values."""
    if xp.name != "jax":
        pytest.skip("the process takes what JAX takes by default")
    if not (hasattr(jax, "shard_map") and hasattr(jax, "set_mesh")):
        pytest.skip("this version of JAX has no jax.shard_map or jax.set_mesh")
    done = subprocess.run(
        [sys.executable, str(PROGRAM)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
