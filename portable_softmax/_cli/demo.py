"""``demo``: learn to read digits, check the gradient, compare the libraries, draw the result."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from portable_softmax._cli import digits
from portable_softmax._cli.backends import Place, open_place
from portable_softmax._cli.comparison import compare
from portable_softmax._cli.errors import CommandError
from portable_softmax._cli.gradient_check import check_gradient
from portable_softmax._cli.report import Report
from portable_softmax._cli.training import Training, train

FIGURE = "digits.png"


def run(
    *, backend: str, device: str | None, seed: int, epochs: int, out: Path, report: Report
) -> dict[str, Any]:
    """Run the demo, telling `report`, and return its results as plain data.

    Raises
    ------
    CommandError
        If something is missing; all of it is looked for before the training starts.
    """
    place = open_place(backend, device)
    draw = _drawing()
    _make_writable(out)
    split_seed, train_seed = np.random.SeedSequence(seed).spawn(2)
    data = digits.split(*digits.load(), np.random.default_rng(split_seed))

    def learn(place: Place, *, brief: bool = False) -> Training:
        with report.progress(str(place), epochs, brief=brief) as on_epoch:
            rng = np.random.default_rng(train_seed)
            return train(place, data, epochs=epochs, rng=rng, on_epoch=on_epoch)

    learnt, held_out = len(data.train_t), len(data.held_out_t)
    report.line(
        f"Softmax regression, x @ W + b -> SoftmaxWithLoss, on {learnt + held_out} handwritten "
        f"digits: {learnt} to learn from, {held_out} held out, seed {seed}"
    )
    trained = learn(place)
    last = trained.epochs[-1]
    check = check_gradient(trained, data)
    path = out / FIGURE
    try:
        draw(trained, data, path)
    except OSError as error:
        raise CommandError(f"can't write {path}: {error.strerror or error}") from error

    right = round(last.accuracy * held_out)
    report.line(f"Held-out loss      {last.loss:.4f}")
    report.line(f"Held-out accuracy  {last.accuracy:.2%} ({right} of {held_out})")
    report.line(
        f"Gradient           by hand and numerically: at most {check.difference:.1e} apart "
        f"in {check.entries} entries of up to {check.largest:.1e} ({check.dtype})"
    )
    report.line(f"Figure             {path}")
    rows = compare(trained, partial(learn, brief=True), report)
    return {
        "backend": place.name,
        "version": place.version,
        "device": place.device_name,
        "dtype": trained.W.dtype.name,
        "seed": seed,
        "train_size": learnt,
        "held_out_size": held_out,
        "loss": last.loss,
        "accuracy": last.accuracy,
        "seconds": trained.seconds,
        "gradient_check": check._asdict(),
        "epochs": [epoch._asdict() for epoch in trained.epochs],
        "figure": str(path),
        "comparison": rows,
    }


def _drawing() -> Callable[..., None]:
    try:
        from portable_softmax._cli.figure import draw
    except ImportError as error:
        raise CommandError(
            'the figure needs matplotlib: pip install "portable_softmax[demo]"'
        ) from error
    return draw


def _make_writable(folder: Path) -> None:
    """Find out before the training, not after it, whether the figure can be saved."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(
            f"can't write to the folder {folder}: {error.strerror or error}"
        ) from error
