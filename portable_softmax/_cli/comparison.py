"""The same training on every library that is here, side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from portable_softmax._cli.backends import TRAINABLE, Place, is_installed, open_place
from portable_softmax._cli.errors import CommandError, one_line
from portable_softmax._cli.report import Report
from portable_softmax._cli.training import Training


def compare(
    trained: Training, learn: Callable[[Place], Training], report: Report
) -> list[dict[str, Any]]:
    """Train on the other libraries' default devices, and show how far all end from NumPy.

    Where NumPy is alone there is nothing to compare, and the answer is empty.
    """
    names = [name for name in TRAINABLE if is_installed(name)]
    if len(names) < 2:
        return []
    trainings: dict[str, Training] = {}
    failures: dict[str, str] = {}
    for name in names:
        try:
            own = name == trained.place.name
            trainings[name] = trained if own else learn(open_place(name))
        except CommandError as error:
            failures[name] = str(error)
        except Exception as error:  # what one library can't do must not cost the others' rows
            failures[name] = f"{name} failed: {one_line(error)}"
    rows = [_row(training, trainings["numpy"]) for training in trainings.values()]
    report.table(
        "The same training on each library here",
        ("backend", "device", "loss", "accuracy", "weights from NumPy's", "seconds"),
        [
            (
                f"{row['backend']} {row['version']}",
                row["device"],
                f"{row['loss']:.4f}",
                f"{row['accuracy']:.2%}",
                f"{row['weight_difference']:.1e}",
                f"{row['seconds']:.2f}",
            )
            for row in rows
        ],
    )
    for why in failures.values():
        report.line(why)
    return rows + [{"backend": name, "error": why} for name, why in failures.items()]


def _row(training: Training, reference: Training) -> dict[str, Any]:
    last = training.epochs[-1]
    pairs = (training.W, reference.W), (training.b, reference.b)
    return {
        "backend": training.place.name,
        "version": training.place.version,
        "device": training.place.device_name,
        "loss": last.loss,
        "accuracy": last.accuracy,
        "weight_difference": max(float(np.max(np.abs(one - other))) for one, other in pairs),
        "seconds": training.seconds,
    }
