"""The picture that the demo leaves: how it learnt, what it confuses, what it misread.

Everything is drawn on a `Figure` of its own: pyplot, with its state shared by the whole process,
is never imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure, FigureBase, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from portable_softmax._cli.digits import Split
from portable_softmax._cli.training import Training

INK, MUTED, FAINT = "#1f2933", "#5f6b78", "#e4e8ec"
TRAIN, HELD_OUT, RIGHT, WRONG = "#9aa7b4", "#2166ac", "#1f8a4c", "#cc3d50"
TITLE: dict[str, Any] = {"fontsize": 14, "fontweight": "bold", "color": INK}
ROWS, COLUMNS = 2, 5


def draw(trained: Training, data: Split, path: Path) -> None:
    """Draw a training and save it as a PNG."""
    truth, predicted = data.held_out_t, trained.probabilities.argmax(axis=1)
    wrong = np.flatnonzero(predicted != truth)
    layout = ConstrainedLayoutEngine(w_pad=0.07, h_pad=0.07, rect=(0.01, 0.01, 0.98, 0.98))
    figure = Figure(figsize=(14, 10.4), facecolor="white", layout=layout)
    header, above, below = _parts(figure, [0.95, 5.1, 4.1], [1])
    _headline(header, trained, len(truth) - len(wrong))
    curves, confusion = _parts(above, [1], [9, 5.3])
    _curves(curves, trained)
    _confusion(confusion, truth, predicted, trained.probabilities.shape[1])
    _misread(below, trained.probabilities, predicted, wrong, data)
    figure.savefig(path, dpi=120)


def _parts(whole: FigureBase, heights: Sequence[float], widths: Sequence[float]) -> list[SubFigure]:
    grid = whole.subfigures(
        len(heights), len(widths), squeeze=False, height_ratios=heights, width_ratios=widths
    )
    return list(grid.flat)


def _headline(part: SubFigure, trained: Training, right: int) -> None:
    how = (
        "x @ W + b \N{RIGHTWARDS ARROW} SoftmaxWithLoss, gradients by hand, "
        f"after epoch {len(trained.epochs)}, {trained.seconds:.1f} s, on {trained.place}"
    )
    title = f"Softmax reads {right} of {len(trained.probabilities)} digits that it never saw"
    part.text(0.012, 0.64, title, fontsize=22, fontweight="bold", color=INK, va="center")
    part.text(0.012, 0.16, how, fontsize=12, color=MUTED, va="center")


def _curves(part: SubFigure, trained: Training) -> None:
    number, train_loss, train_accuracy, loss, accuracy = zip(*trained.epochs, strict=True)
    left, right = part.subplots(1, 2)
    left.set_yscale("log")
    # Before the curves, which would otherwise be measured with ticks that are never drawn.
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_minor_formatter(NullFormatter())
    _curve(left, "Loss", number, (train_loss, loss), "{x:.3g}")
    _curve(right, "Accuracy", number, (train_accuracy, accuracy), "{x:.1%}")


def _curve(
    axes: Axes,
    title: str,
    number: Sequence[int],
    curves: tuple[Sequence[float], Sequence[float]],
    form: str,
) -> None:
    axes.set_title(title, loc="left", **TITLE)
    for values, colour, name in zip(curves, (TRAIN, HELD_OUT), ("train", "held out"), strict=True):
        label = f"{name} {form.format(x=values[-1])}"
        axes.plot(number, values, color=colour, linewidth=2.2, label=label)
        axes.plot(number[-1], values[-1], "o", color=colour, markersize=6)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(form)
    axes.legend(frameon=False, fontsize=12, labelcolor="linecolor", handlelength=1.2)
    axes.set_xlabel("epoch", color=MUTED, fontsize=11)
    axes.grid(color=FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=MUTED, length=0, which="both")


def _confusion(part: SubFigure, truth: NDArray[Any], predicted: NDArray[Any], classes: int) -> None:
    counts = np.zeros((classes, classes), dtype=int)
    np.add.at(counts, (truth, predicted), 1)
    axes = part.subplots()
    axes.set_title("What is taken for what", loc="left", **TITLE)
    # The square root keeps a single mistake visible beside forty right answers.
    axes.imshow(counts, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=counts.max()))
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if row == column else WRONG
            axes.text(
                column, row, str(count), color=colour, fontweight="bold", ha="center", va="center"
            )
    axes.set_xticks(range(classes))
    axes.set_yticks(range(classes))
    axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0, colors=INK, labelsize=11)
    axes.set_xlabel("read as", color=MUTED, fontsize=11)
    axes.set_ylabel("written", color=MUTED, fontsize=11)


def _misread(
    part: SubFigure,
    probabilities: NDArray[Any],
    predicted: NDArray[Any],
    wrong: NDArray[Any],
    data: Split,
) -> None:
    """Show the misread digits, the most confident mistakes first, with their probabilities."""
    shown = wrong[np.argsort(-probabilities[wrong, predicted[wrong]])][: ROWS * COLUMNS]
    which = "All" if len(shown) == len(wrong) else f"The {len(shown)} most confident of"
    title = f"{which} {len(wrong)} misread digits" if len(wrong) else "No digit misread"
    part.suptitle(title, x=0.012, ha="left", **TITLE)
    for cell, index in zip(_parts(part, [1] * ROWS, [1] * COLUMNS), shown, strict=False):
        image, bars = cell.subplots(1, 2)
        truth, read = data.held_out_t[index], predicted[index]
        _digit(image, data.held_out_x[index], truth)
        _bars(bars, probabilities[index], truth, read)


def _digit(axes: Axes, pixels: NDArray[Any], truth: int) -> None:
    axes.imshow(pixels.reshape(8, 8), cmap="Greys", vmin=0, vmax=1)
    axes.set_title(f"written {truth}", fontsize=11, color=RIGHT, fontweight="bold")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color(FAINT)


def _bars(axes: Axes, probabilities: NDArray[Any], truth: int, read: int) -> None:
    classes = range(len(probabilities))
    colours = [TRAIN for _ in classes]
    colours[truth], colours[read] = RIGHT, WRONG
    axes.barh(classes, probabilities, color=colours, height=0.78)
    for label in (truth, read):
        axes.text(
            probabilities[label] + 0.04, label, f"{probabilities[label]:.0%}",
            color=colours[label], fontsize=8, va="center",
        )  # fmt: skip
    axes.set_title(f"read as {read}", fontsize=11, color=WRONG, fontweight="bold")
    axes.set_box_aspect(1)  # as high as the image beside it
    axes.set_xlim(0, 1.3)  # the percentage stands behind a full bar
    axes.set_ylim(len(probabilities) - 0.4, -0.6)
    axes.set_yticks(classes, map(str, classes), fontsize=8)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=MUTED, pad=1)
