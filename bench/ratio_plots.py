"""Figures of ratios to one peer: scipy.special on each library's arrays, and JAX's transforms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import arrays, tables, transforms
from bench.plots import FAINT, INK, MUTED, grouped, legend, new_figure, plain
from bench.summary import geometric_mean

_COLOURS = {"numpy": "#1d4ed8", "torch": "#dc2626", "jax": "#15803d", "dask": "#f59e0b"}
_OF_PATH = {"numba rows": "#1d4ed8", "jax rules": "#15803d"}
_LABELS = {"numba rows": "ours, Numba", "jax rules": "ours, XLA alone"}


def save_arrays(rows: list[arrays.Row], document: dict[str, Any], path: Path) -> None:
    """Draw the time in units of scipy.special's: a panel per operation, a bar per library."""
    timed = [row for row in rows if not row.problem]
    operations, libraries, shapes = (
        list(dict.fromkeys(getattr(row, name) for row in timed))
        for name in ("operation", "library", "shape")
    )
    title = f"ours beside scipy.special on the same arrays, float32, {_where(document)}"
    subtitle = "our time in units of scipy.special's, log scale: a bar downwards is faster"
    figure = new_figure(14, 1.2 + 2.4 * len(operations), title, subtitle)
    panels = list(figure.subplots(len(operations), 1, squeeze=False).flat)
    for panel, operation in zip(panels, operations, strict=True):
        some = [row for row in timed if row.operation == operation]
        ratios = {(row.library, row.shape): row.ratio for row in some}
        grouped(panel, ratios, libraries, shapes, _COLOURS)
        plain(panel, operation)
    legend(figure, panels)
    figure.savefig(path, dpi=110)


def save_jax(rows: list[transforms.Row], document: dict[str, Any], path: Path) -> None:
    """Draw the time in units of the faster peer's: a panel per form, a column of dots per shape."""
    timed = [row for row in rows if not row.problem]
    forms, shapes = (list(dict.fromkeys(getattr(r, n) for r in timed)) for n in ("form", "shape"))
    title = f"JAX, compiled, float32, {_where(document)}"
    subtitle = (
        "our time in units of the faster of jax.nn and optax, log scale: a dot per call, values, "
        "gradients and autodiff; the bar is their geometric mean"
    )
    figure = new_figure(14, 4.6, title, subtitle)
    panels = list(figure.subplots(1, len(forms), sharey=True, squeeze=False).flat)
    for panel, form in zip(panels, forms, strict=True):
        _dots(panel, [row for row in timed if row.form == form], shapes)
        plain(panel, {"rows": "vmap over rows"}.get(form, form))
    legend(figure, panels)
    figure.savefig(path, dpi=110)


def _dots(axes: Any, rows: list[transforms.Row], shapes: list[tuple[int, int]]) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    paths = list(dict.fromkeys(row.path for row in rows))
    for i, name in enumerate(paths):
        label = _LABELS.get(name, name)
        for group, shape in enumerate(shapes):
            ratios = [row.ratio for row in rows if (row.path, row.shape) == (name, shape)]
            if not ratios:
                continue
            at = group + 0.36 * (i - (len(paths) - 1) / 2)
            wide = [at + 0.2 * (k / max(len(ratios) - 1, 1) - 0.5) for k in range(len(ratios))]
            axes.scatter(
                wide, sorted(ratios), s=12, color=_OF_PATH[name], alpha=0.55, linewidths=0,
                label=label,
            )  # fmt: skip
            mean = geometric_mean(ratios)
            axes.plot([at - 0.16, at + 0.16], [mean, mean], color=_OF_PATH[name], linewidth=2.4)
            axes.annotate(
                f"{mean:.2f}", (at, mean), xytext=(0, 3), textcoords="offset points",
                fontsize=7.5, color=INK, ha="center", va="bottom",
            )  # fmt: skip
    axes.axhline(1, color=MUTED, linewidth=1.2)
    axes.set_yscale("log")
    ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10]
    axes.set_yticks(ticks, [f"{t:g}x" for t in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color=FAINT)
    axes.set_xticks(range(len(shapes)), [tables.shape(shape) for shape in shapes])
    axes.set_xlim(-0.5, len(shapes) - 0.5)
    axes.tick_params(axis="x", length=0)


def _where(document: dict[str, Any]) -> str:
    machine = document["machine"]
    return f"cpu: {machine.get('cpu')}, {machine.get('cores')} cores"
