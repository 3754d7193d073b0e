"""Shards of torch's DTensors: a call on each, and all-reduces of one number per position.

Where a rank holds whole rows, its shard is a call of its own, with the kernel that such a tensor
takes (`_answers`). Where rows are cut, each shard is folded into its state, and two all-reduces,
of the maxima and of sums that then belong to one maximum, make the state of the whole rows
(`_rows`, `_losses`). Logits are never gathered. `_mesh` knows how shards lie.
"""

from __future__ import annotations


def missing() -> str:
    """Return what has to be installed: nothing, once there is a DTensor."""
    return ""
