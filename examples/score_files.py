"""Score logits in a file that may be larger than the memory of all workers, with Dask.

    pip install "portable_softmax[dask]" distributed
    python examples/score_files.py logits.npy labels.npy --workers 2 --memory 1GB --out losses.npy

The file of logits holds an array of shape (N, C), that of labels N class indices. Each task maps
the rows that it needs; logits are not sent between processes. The mean loss is printed, and each
position's loss goes to a file if `--out` names one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
from distributed import Client, progress

from portable_softmax import cross_entropy

BLOCK = 1 << 26  # bytes of logits per task


def rows_of(path: str, block_info: Any) -> Any:
    """Return the rows of one block."""
    start, stop = block_info[None]["array-location"][0]
    return np.asarray(np.load(path, mmap_mode="r")[start:stop])


def logits_in(path: Path, block: int = BLOCK) -> Any:
    """Return the array in a file, in chunks of whole rows of about `block` bytes."""
    file = np.load(path, mmap_mode="r")
    n, classes = file.shape
    step = max(1, block // (classes * file.dtype.itemsize))
    lengths = tuple(min(step, n - i) for i in range(0, n, step))
    return da.map_blocks(
        rows_of, str(path.resolve()), chunks=(lengths, (classes,)), dtype=file.dtype,
        meta=np.empty((0, 0), file.dtype),
    )  # fmt: skip


def score(logits: Path, labels: Path, block: int = BLOCK) -> Any:
    """Return the losses of all positions, a lazy array."""
    return cross_entropy(logits_in(logits, block), np.load(labels), reduction="none")


def main(arguments: list[str] | None = None, **cluster: Any) -> float:
    """Score the files that the command line names and return the mean loss."""
    parser = argparse.ArgumentParser(description="Score a file of logits.")
    parser.add_argument("logits", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--memory", default="1GB", help="of each worker")
    parser.add_argument("--out", type=Path, help="where the loss of each position goes")
    given = parser.parse_args(arguments)
    cluster = {"n_workers": given.workers, "threads_per_worker": 1, **cluster}
    with Client(memory_limit=given.memory, **cluster) as client:
        if client.dashboard_link:
            print(f"dashboard: {client.dashboard_link}")
        future = client.compute(score(given.logits, given.labels))
        progress(future, notebook=False)
        losses = future.result()
    print(f"\nmean loss of {losses.size:,} positions: {losses.mean():.6f}")
    if given.out is not None:
        np.save(given.out, losses)
    return float(losses.mean())


if __name__ == "__main__":
    main()
