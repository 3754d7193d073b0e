"""Figures of `scale`: one for each of its parts but the worker's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bench import scale_chunks, scale_linear, scale_ranks
from bench.plots import FAINT, MUTED, legend, new_figure, plain

_COLOURS = {
    "ours, numpy": "#1d4ed8",
    "ours, torch": "#0891b2",
    "ours, jax": "#7c3aed",
    "ours stored, numpy": "#a9c2f8",
    "stored, torch": "#dc2626",
    "chunked, torch": "#f2a0a0",
    "stored, jax": "#15803d",
    "scanned, jax": "#86c99a",
    scale_chunks.OURS: "#1d4ed8",
    scale_chunks.KERNEL: "#9aa7b4",
    scale_chunks.NOTHING: "#d5dbe1",
    scale_chunks.MAPPED: "#f59e0b",
    scale_chunks.LAZY: "#8a5a1f",
}


def save(found: dict[str, list[Any]], document: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the parts that have a figure and return where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = document["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores"
    written = []
    for part, rows in found.items():
        rows = [row for row in rows if not row.problem]
        if part not in _DRAW or not rows:
            continue
        path = folder / f"{part}.png"
        _DRAW[part](rows, where).savefig(path, dpi=110)
        written.append(path)
    return written


def _linear(rows: list[scale_linear.Row], where: str) -> Any:
    """Draw time and memory against the number of classes, a line per provider."""
    n, h, _ = rows[0].size
    title = f"the loss of a linear layer and its gradients, ({n}, {h}), float32, {where}"
    subtitle = (
        "by number of classes: time in units of the bare products of the same library, and memory "
        "beyond inputs and gradients"
    )
    drawn = new_figure(14, 5.6, title, subtitle)
    time, memory = drawn.subplots(1, 2)
    for name in dict.fromkeys(row.provider for row in rows if row.role != scale_linear.PRODUCTS):
        mine = [row for row in rows if row.provider == name and not row.problem]
        classes = [row.size.classes for row in mine]
        ours = mine and mine[0].role == scale_linear.OURS
        style = {
            "color": _COLOURS[name], "label": name, "marker": "o",
            "linewidth": 2.6 if ours else 1.5, "zorder": 4 if ours else 3,
        }  # fmt: skip
        time.plot(classes, [row.of_products for row in mine], **style)
        memory.plot(classes, [max(row.beyond_bytes, 1e6) / 1e6 for row in mine], **style)
    memory.axhline(
        scale_linear.CEILING / 1e6, color=MUTED, linestyle="--", label="what ours may take"
    )
    for axes in (time, memory):
        axes.set_yscale("log")
    for axes, name in ((time, "time / products"), (memory, "MB beyond")):
        axes.set_xscale("log")
        classes = sorted({row.size.classes for row in rows})
        axes.set_xticks(classes, [f"{c:,}" for c in classes], minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(axis="y", color=FAINT)
        plain(axes, name)
    legend(drawn, [memory])
    return drawn


def _chunks(rows: list[scale_chunks.Row], where: str) -> Any:
    """Draw bars of time and memory, a group per operation."""
    (n, c), chunks = rows[0].shape, rows[0].chunks
    title = f"Dask, ({n}, {c}) float32 in {chunks} chunks, {where}"
    drawn = new_figure(
        14, 5.6, title, "the time of all chunks, and the memory of finding the largest entry"
    )
    panels = drawn.subplots(1, 2)
    operations = list(dict.fromkeys(row.operation for row in rows))
    names = list(dict.fromkeys(row.provider for row in rows))
    of = {(row.operation, row.provider): row for row in rows}
    width = 0.84 / len(names)
    for axes, name, number in zip(
        panels, ("seconds", "MB"), (lambda r: r.min_s, lambda r: r.peak_bytes / 1e6), strict=True
    ):
        for i, provider in enumerate(names):
            here = [(k, of.get((o, provider))) for k, o in enumerate(operations)]
            some = [(k, number(row)) for k, row in here if row and not math.isnan(number(row))]
            if some:
                at = [k - 0.42 + (i + 0.5) * width for k, _ in some]
                heights = [value for _, value in some]
                axes.bar(at, heights, width * 0.9, color=_COLOURS[provider], label=provider)
        labels = [operation.replace("_value", "\n_value") for operation in operations]
        axes.set_xticks(range(len(operations)), labels)
        axes.grid(axis="y", color=FAINT)
        plain(axes, name)
    legend(drawn, [panels[0]])
    return drawn


def _ranks(rows: list[scale_ranks.Row], where: str) -> Any:
    """Draw what is measured and what is modelled against the number of ranks."""
    n, h, c = rows[0].size
    title = f"one rank's loss and gradients, ({n}, {h}) x {c:,} classes in all, {where}"
    subtitle = (
        "seconds by number of ranks, both axes log; solid: its own work, measured; "
        "dashed: A MODEL of the network, not measured"
    )
    drawn = new_figure(14, 9.2, title, subtitle)
    pairs = list(dict.fromkeys((row.call, row.cut) for row in rows))
    panels = list(drawn.subplots(2, 2, squeeze=False).flat)
    for axes, pair in zip(panels, pairs, strict=False):
        mine = [row for row in rows if (row.call, row.cut) == pair and not row.problem]
        ranks = [row.ranks for row in mine]
        axes.plot(ranks, [r.work_s for r in mine], color="#1d4ed8", marker="o", label="own work")
        several = [row for row in mine if row.ranks > 1]
        model = {"linestyle": "--", "marker": "."}
        axes.plot(
            [r.ranks for r in several], [r.model_s for r in several], color="#7c3aed",
            label="model: its all-reduces", **model,
        )  # fmt: skip
        if pair[1] == "classes":
            axes.plot(
                [r.ranks for r in several], [r.gather_s for r in several], color="#dc2626",
                label="model: gathered logits", **model,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ranks, [f"{p:,}" for p in ranks])
        axes.grid(axis="y", color=FAINT)
        plain(axes, f"{pair[0]}, {pair[1]} cut")
    legend(drawn, panels)
    return drawn


_DRAW = {"linear": _linear, "chunks": _chunks, "ranks": _ranks}
