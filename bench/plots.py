"""Figures of the measured speeds: GB/s against the length of a row, and all providers beside ours.

Everything is drawn on a `Figure` of its own: pyplot, with its state shared by the whole process, is
never imported.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bench import tables
from bench.speed import COPY, OURS, Row
from bench.summary import is_large

INK, MUTED, FAINT = "#1f2933", "#5f6b78", "#e4e8ec"

# A provider has the same colour in every figure; ours are shades of blue.
_COLOURS = {
    "ours": "#1d4ed8",
    "ours, jit": "#1d4ed8",
    "ours, jit, portable": "#a9c2f8",
    "ours, jit, XLA": "#5b84ee",
    "ours, compiled": "#0891b2",
    "ours, autograd": "#7c3aed",
    "ours, jit, vjp": "#7c3aed",
    "ours, Numba": "#312e81",
    "ours, jit, Numba": "#312e81",
    "ours, no Numba": "#5b84ee",
    "ours, Triton": "#0f766e",
    "ours, portable": "#a9c2f8",
    "numpy by hand": "#b8a67a",
    "scipy.special": "#f59e0b",
    "sklearn": "#8a5a1f",
    "torch": "#dc2626",
    "torch, compiled": "#f2a0a0",
    "jax.nn, jit": "#15803d",
    "optax, jit": "#86c99a",
    "cupyx.scipy": "#f59e0b",
    "entmax": "#be123c",
    "entmax, k=100": "#fda4af",
    "entmax, bisection": "#881337",
    COPY: "#9aa7b4",
}
_SPARE = ("#db2777", "#65a30d", "#be185d", "#a16207")
_COLUMNS = 3


def save(rows: list[Row], document: dict[str, Any], folder: Path) -> list[Path]:
    """Draw two figures for each dtype and return where they are."""
    machine, library = document["machine"], document["backend"]
    where = f"{document['device']}: {machine.get('cpu')}, {machine.get('cores')} cores"
    title = f"ours on {library} {document['versions'].get(library, '')}, {where}"
    folder.mkdir(parents=True, exist_ok=True)
    colours = _colours(rows)
    written = []
    for dtype in dict.fromkeys(row.dtype for row in rows):
        some = [row for row in rows if row.dtype == dtype and not row.problem]
        for name, draw in (("bandwidth", _bandwidth), ("ratios", _ratios)):
            path = folder / f"{name}-{dtype}.png"
            draw(some, f"{dtype}, {title}", colours).savefig(path, dpi=110)
            written.append(path)
    return written


def _colours(rows: list[Row]) -> dict[str, str]:
    names = list(dict.fromkeys(row.provider for row in rows if row.role != COPY))
    spare = [name for name in names if name not in _COLOURS]
    return _COLOURS | {name: _SPARE[i % len(_SPARE)] for i, name in enumerate(spare)}


def new_figure(width: float, height: float, title: str, subtitle: str) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    head = 0.75 / height  # as high as two lines, whatever the figure
    foot = 0.45 / height
    layout = ConstrainedLayoutEngine(
        w_pad=0.08, h_pad=0.08, rect=(0.005, foot, 0.99, 1 - head - foot)
    )
    figure = Figure(figsize=(width, height), facecolor="white", layout=layout)
    figure.text(
        0.012, 1 - 0.3 / height, title, fontsize=13, fontweight="bold", color=INK, va="center"
    )
    figure.text(0.012, 1 - 0.58 / height, subtitle, fontsize=10, color=MUTED, va="center")
    return figure


def legend(figure: Any, axes: list[Any]) -> None:
    """Put one legend for all panels at the foot."""
    handles = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="lower left", bbox_to_anchor=(0.008, 0.004),
        ncols=len(handles), fontsize=9, frameon=False, columnspacing=1.2, handlelength=1.4,
    )  # fmt: skip


def plain(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=9, which="both")
    axes.set_axisbelow(True)


# --------------------------------------------------------------------------- GB/s


def _bandwidth(rows: list[Row], title: str, colours: dict[str, str]) -> Any:
    """Draw GB/s against the length of a row: a panel per operation, a line per provider."""
    large = [row for row in rows if is_large(row)] or rows
    operations = list(dict.fromkeys(row.operation for row in large))
    down = math.ceil(len(operations) / _COLUMNS)
    subtitle = (
        "GB/s of the bytes that must move, by classes in a row, both axes log; arrays over 1 MB"
    )
    figure = new_figure(14, 1.2 + 3.6 * down, title, subtitle)
    panels = list(figure.subplots(down, _COLUMNS, squeeze=False).flat)
    for panel, operation in zip(panels, operations, strict=False):
        _lines(panel, [row for row in large if row.operation == operation], colours)
        plain(panel, operation)
    for panel in panels[len(operations) :]:
        panel.set_visible(False)
    legend(figure, panels[: len(operations)])
    return figure


def _lines(axes: Any, rows: list[Row], colours: dict[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    shapes = sorted({row.shape for row in rows}, key=lambda shape: (shape[1], shape[0]))
    classes = [shape[1] for shape in shapes]
    best = [max(r.gb_per_s for r in rows if r.role == COPY and r.shape == s) for s in shapes]
    axes.plot(classes, best, color=colours[COPY], linewidth=2, linestyle="--", label="best copy")
    for name in dict.fromkeys(row.provider for row in rows if row.role != COPY):
        mine = {row.shape: row for row in rows if row.provider == name}
        points = [(shape[1], mine[shape].gb_per_s) for shape in shapes if shape in mine]
        is_ours = name.startswith(OURS)
        axes.plot(
            *zip(*points, strict=True), color=colours[name], label=name, marker="o",
            markersize=5 if is_ours else 3.5, linewidth=2.6 if is_ours else 1.5,
            zorder=4 if is_ours else 3,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(classes, [f"{n:,}" for n in classes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=FAINT)
    low, high = axes.get_ylim()
    axes.fill_between(classes, best, high, color=FAINT, alpha=0.6, linewidth=0)  # beyond a copy
    axes.set_ylim(low, high)


# --------------------------------------------------------------------------- ratios


def _ratios(rows: list[Row], title: str, colours: dict[str, str]) -> Any:
    """Draw each provider's time / ours: a panel per operation, a group of bars per shape."""
    timed = [row for row in rows if row.role != COPY]
    operations = list(dict.fromkeys(row.operation for row in timed))
    subtitle = "time in units of our first path's, log scale: a bar upwards is slower than ours"
    figure = new_figure(16, 1.2 + 2.5 * len(operations), title, subtitle)
    panels = list(figure.subplots(len(operations), 1, squeeze=False).flat)
    for panel, operation in zip(panels, operations, strict=True):
        _bars(panel, [row for row in timed if row.operation == operation], colours)
        plain(panel, operation)
    legend(figure, panels)
    return figure


def _bars(axes: Any, rows: list[Row], colours: dict[str, str]) -> None:
    shapes = list(dict.fromkeys(row.shape for row in rows))
    first = next((row.provider for row in rows if row.role == OURS), None)
    names = [n for n in dict.fromkeys(row.provider for row in rows) if n != first]
    times = {(row.provider, row.shape): row.min_s for row in rows}
    ratios = {
        (name, shape): times[name, shape] / times[first, shape]
        for name, shape in times
        if name != first and (first, shape) in times
    }
    grouped(axes, ratios, names, shapes, colours)


def grouped(
    axes: Any,
    ratios: dict[tuple[str, tuple[int, int]], float],
    names: list[str],
    shapes: list[tuple[int, int]],
    colours: dict[str, str],
) -> None:
    """Draw bars from 1 to each ratio, a group per shape and in it a bar per name."""
    from matplotlib.ticker import NullFormatter, NullLocator

    width = 0.84 / max(1, len(names))
    for i, name in enumerate(names):
        at = {group: ratios[name, s] for group, s in enumerate(shapes) if (name, s) in ratios}
        places = [group - 0.42 + (i + 0.5) * width for group in at]
        bottoms = [ratio - 1 for ratio in at.values()]
        axes.bar(places, bottoms, width * 0.9, bottom=1, color=colours[name], label=name)
        for place, ratio in zip(places, at.values(), strict=True):
            up = ratio >= 1
            axes.annotate(
                _short(ratio), (place, ratio),
                xytext=(0, 2 if up else -2), textcoords="offset points", fontsize=7.5,
                color=INK, ha="center", va="bottom" if up else "top",
            )  # fmt: skip
    axes.axhline(1, color=_COLOURS[OURS], linewidth=2)
    axes.set_yscale("log")
    low, high = min([0.5, *ratios.values()]), max([2.0, *ratios.values()])
    room = (high / low) ** 0.14  # for the numbers
    low, high = low / room, high * room
    axes.set_ylim(low, high)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    ticks = [t for t in (0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 100, 1000) if low < t < high]
    axes.set_yticks(ticks, [f"{t:g}x" for t in ticks])
    axes.grid(axis="y", color=FAINT)
    axes.set_xticks(range(len(shapes)), [tables.shape(shape) for shape in shapes])
    axes.set_xlim(-0.5, len(shapes) - 0.5)
    axes.tick_params(axis="x", length=0)


def _short(ratio: float) -> str:
    """Format a number to fit over a narrow bar."""
    if ratio < 1:
        return f"{ratio:.2f}".removeprefix("0")
    return f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"
