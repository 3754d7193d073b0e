"""torch.distributed: classes that are sharded over ranks, by the code of the documentation."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "howto" / "files.md"
PATIENCE = 300  # seconds

SETUP = """
import datetime, sys
import torch
import torch.distributed as dist
import portable_softmax as ps

rank, size, store, dtype = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
dtype = getattr(torch, dtype)
unit = torch.finfo(dtype).eps
dist.init_process_group(
    "gloo", init_method=f"file://{store}", rank=rank, world_size=size,
    timeout=datetime.timedelta(seconds=120),
)
calls = []
for name in ("all_gather", "all_reduce"):
    real = getattr(dist, name)
    setattr(dist, name, lambda *a, f=real, name=name: calls.append(name) or f(*a))

torch.manual_seed(0)
logits = torch.randn(6, 11, dtype=dtype) * 5
labels = torch.tensor([0, 10, 4, 5, 6, 3])
logits[1] = 0.0
logits[1, 10] = 30.0  # a confident row
shards = logits.tensor_split(size, dim=1)  # uneven
shard, first = shards[rank], sum(s.shape[1] for s in shards[:rank])
"""

CHECK = """
expected, slopes = ps.cross_entropy_value_and_grad(logits, labels, reduction="none")
torch.testing.assert_close(losses, expected, rtol=8 * unit, atol=1e-28)
slopes = slopes[:, first : first + shard.shape[1]]
torch.testing.assert_close(gradient, slopes, rtol=64 * unit, atol=unit)
assert calls == ["all_gather", "all_reduce"], calls
print(*(loss.hex() for loss in losses.tolist()))
dist.destroy_process_group()
"""


@pytest.mark.run_on("torch")
@pytest.mark.slow("several processes import torch")
@pytest.mark.parametrize(("size", "dtype"), [(1, "float64"), (2, "float32"), (4, "float64")])
def test_classes_that_are_sharded_over_ranks(torch, xp, size, dtype, tmp_path):
    """The loss of the whole row, the same bits on each rank, from two collectives."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    command = [sys.executable, "-c", SETUP + code + CHECK]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(tmp_path / "store"), dtype],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        found = [rank.communicate(timeout=PATIENCE) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, error) in zip(ranks, found, strict=True):
        assert rank.returncode == 0, error
    assert len({out for out, _ in found}) == 1
