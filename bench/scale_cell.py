"""What `scale` measures in a process of its own: ``python -m bench.scale_cell JSON``."""

from __future__ import annotations

import sys
from typing import Any

from bench import memory_cell, scale_chunks, scale_linear, scale_ranks

PARTS = {
    "linear": scale_linear.peaks,
    "times of chunks": scale_chunks.times,
    "peaks of chunks": scale_chunks.peaks,
    "ranks": scale_ranks.counted,
}


def measured(asked: dict[str, Any]) -> dict[str, Any]:
    """Return what one part of `scale` asks for."""
    return PARTS[asked["part"]](asked)


if __name__ == "__main__":
    sys.exit(memory_cell.main(sys.argv[1:], measured))
