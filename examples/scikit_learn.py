"""scikit-learn's LogisticRegression, with its copies of the softmax family replaced by ours.

    pip install "portable_softmax[demo,numba,strict,torch]" "scikit-learn==1.9.*"
    python examples/scikit_learn.py                     # 20,000 x 50, 100 classes
    python examples/scikit_learn.py --digits            # the handwritten digits of scikit-learn

scikit-learn 1.9 computes on any library of the array API standard, and keeps three copies for it:
`_logsumexp`, `softmax`, and a multinomial loss with its gradient. The first part of this file is
all that takes their place. The rest fits the same model before and after on each library that is
installed, prints times and coefficients, and saves a plot.

On NumPy a fit keeps scikit-learn's loss in Cython, and only `predict_proba` calls what is replaced.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

os.environ["SCIPY_ARRAY_API"] = "1"  # scikit-learn asks for it, before SciPy is imported

import numpy as np
import sklearn
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from sklearn._loss.loss import HalfMultinomialLoss, HalfMultinomialLossArrayAPI
from sklearn.datasets import load_digits, make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.utils import _array_api, extmath

import portable_softmax as ps

# --- What takes the place of scikit-learn's own -------------------------------------------------


def _logsumexp(array, axis=None, xp=None):
    """Return the logarithm of a sum of exponentials."""
    return ps.logsumexp(array, axis=axis)


def softmax(X, copy=True):
    """Return the softmax of each row; `X` is kept, which `copy=False` does not ask for."""
    return ps.softmax(X, axis=1)


class MultinomialLoss(HalfMultinomialLossArrayAPI):
    """The multinomial loss: no offsets and no one-hot labels to keep, and one pass for both."""

    def _compute_loss(self, y_true, raw_prediction, sample_weight=None):
        return ps.cross_entropy(
            raw_prediction, self._labels(y_true), **self._options, sample_weight=sample_weight
        )

    def _compute_gradient(self, y_true, raw_prediction, sample_weight=None):
        return self.loss_gradient(y_true, raw_prediction, sample_weight)[1]

    def loss_gradient(
        self,
        y_true,
        raw_prediction,
        sample_weight=None,
        loss_out=None,
        gradient_out=None,
        n_threads=1,
    ):
        """Return the loss of each row and its gradient."""
        return ps.cross_entropy_value_and_grad(
            raw_prediction, self._labels(y_true), **self._options, sample_weight=sample_weight
        )

    # The labels come out of an encoder: they lie in the range.
    _options: ClassVar[dict[str, Any]] = {"reduction": "none", "check_labels": False}

    def _labels(self, y_true):
        return self.xp.astype(y_true, self.xp.int64)


PLACES = {
    _array_api._logsumexp: _logsumexp,
    extmath.softmax: softmax,
    HalfMultinomialLossArrayAPI: MultinomialLoss,
}


@contextmanager
def replaced(places: Mapping[Any, Any] = PLACES) -> Iterator[None]:
    """Put ours in the place of scikit-learn's in each of its modules that is loaded."""
    names = [
        (module, name, value)
        for module in list(sys.modules.values())
        if module.__name__.partition(".")[0] == "sklearn"
        for name, value in list(vars(module).items())
        if isinstance(value, Hashable) and value in places
    ]
    for module, name, value in names:
        setattr(module, name, places[value])
    try:
        yield
    finally:
        for module, name, value in names:
            setattr(module, name, value)


# --- Before and after ---------------------------------------------------------------------------

LIBRARIES = ("numpy", "torch", "array_api_strict")


class Fit(NamedTuple):
    """One fitted model."""

    seconds: float
    """The shortest time of a fit."""
    loss_and_gradient: float
    """How many of these seconds were spent in the loss and its gradient."""
    coefficients: np.ndarray
    probabilities: np.ndarray
    iterations: int


@contextmanager
def timed(calls: list[float]) -> Iterator[None]:
    """Add the seconds of each call of the multinomial loss and gradient to `calls`."""
    losses = (HalfMultinomialLoss, HalfMultinomialLossArrayAPI, MultinomialLoss)
    before = {cls: cls.loss_gradient for cls in losses}

    def stopwatch(function):
        def call(*args, **options):
            start = time.perf_counter()
            answer = function(*args, **options)
            calls.append(time.perf_counter() - start)
            return answer

        return call

    for cls, function in before.items():
        cls.loss_gradient = stopwatch(function)
    try:
        yield
    finally:
        for cls, function in before.items():
            cls.loss_gradient = function


def fit(library: str, X: np.ndarray, y: np.ndarray, repeat: int) -> Fit:
    """Fit the model to arrays of a library, `repeat` times, and return the fastest."""
    xp = importlib.import_module(library)
    X, y = xp.asarray(X), xp.asarray(y)
    times = []
    with sklearn.config_context(array_api_dispatch=True):
        for _ in range(repeat):
            calls: list[float] = []
            model = LogisticRegression(C=1.0, tol=1e-6, max_iter=1_000)
            with timed(calls):
                start = time.perf_counter()
                model.fit(X, y)
                times.append((time.perf_counter() - start, sum(calls)))
        probabilities = model.predict_proba(X)
    on_cpu = {"device": xp.Device("CPU_DEVICE")} if library == "array_api_strict" else {}
    return Fit(
        *min(times),
        *(np.asarray(xp.asarray(a, **on_cpu)) for a in (model.coef_, probabilities)),
        int(model.n_iter_[0]),
    )


def data(digits: bool, samples: int, features: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and their classes: the digits, or clusters drawn from a seed."""
    if digits:
        X, y = load_digits(return_X_y=True)
        return X / 16, y
    return make_classification(
        samples,
        features,
        n_informative=features,
        n_redundant=0,
        n_classes=classes,
        n_clusters_per_class=1,
        random_state=0,
    )


def table(fits: Mapping[str, tuple[Fit, Fit]], title: str) -> Table:
    """Lay out each library before and after."""
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column("library")
    table.add_column("")
    headings = ("fit", "loss and\ngradient", "steps", "largest\ncoef_", "largest\ndifference")
    for heading in headings:
        table.add_column(heading, justify="right")
    for library, (old, new) in fits.items():
        largest = np.unravel_index(np.abs(old.coefficients).argmax(), old.coefficients.shape)
        difference = f"{np.abs(new.coefficients - old.coefficients).max():.1e}"
        for one, *words, last in ((old, library, "before", ""), (new, "", "after", difference)):
            seconds = (f"{one.seconds:.3f} s", f"{one.loss_and_gradient:.3f} s")
            coefficient = f"{one.coefficients[largest]:+.6f}"
            table.add_row(*words, *seconds, str(one.iterations), coefficient, last)
    return table


def plot(fits: Mapping[str, tuple[Fit, Fit]], path: Path, title: str) -> None:
    """Draw the times of a fit, and the coefficients after over those before."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    times, coefficients = figure.subplots(1, 2)
    places = np.arange(len(fits))
    for which, (label, offset) in enumerate((("before", -0.2), ("after", 0.2))):
        chosen = [pair[which] for pair in fits.values()]
        loss = np.asarray([one.loss_and_gradient for one in chosen])
        rest = np.asarray([one.seconds for one in chosen]) - loss
        color = f"C{which}"
        times.bar(places + offset, loss, 0.38, color=color, label=f"{label}: loss and gradient")
        times.bar(
            places + offset, rest, 0.38, loss, color=color, alpha=0.35, label=f"{label}: the rest"
        )
    times.set(title=title, ylabel="seconds a fit", xticks=places, xticklabels=list(fits))
    times.legend()
    for marker, (library, (old, new)) in zip("osx^", fits.items(), strict=False):
        coefficients.plot(
            old.coefficients.ravel(), new.coefficients.ravel(), marker, ms=4, alpha=0.5,
            label=library,
        )  # fmt: skip
    coefficients.set(title="Coefficients", xlabel="before", ylabel="after", aspect="equal")
    coefficients.legend()
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    """Fit before and after on each library, print the table and save the plot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--digits", action="store_true", help="the digits instead of random data")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--features", type=int, default=50)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=3, help="fits of each, of which the fastest")
    parser.add_argument("--libraries", default=",".join(LIBRARIES), help="comma list")
    parser.add_argument("--plot", type=Path, default=Path("scikit_learn.png"))
    given = parser.parse_args(arguments)
    X, y = data(given.digits, given.samples, given.features, given.classes)
    title = f"{X.shape[0]:,} x {X.shape[1]}, {len(np.unique(y))} classes"

    fits = {}
    for library in given.libraries.split(","):
        if importlib.util.find_spec(library) is None:
            print(f"{library} is not installed: left out", file=sys.stderr)
            continue
        old = fit(library, X, y, given.repeat)
        with replaced():
            fits[library] = old, fit(library, X, y, given.repeat)
    Console().print(table(fits, f"LogisticRegression, {title}"))
    plot(fits, given.plot, title)
    print(f"plot: {given.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
