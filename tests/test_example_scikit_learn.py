"""The example of scikit-learn: it runs, ours take the places, and they are given back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn", "1.9", "scikit-learn 1.9 is not installed")
pytestmark = pytest.mark.slow("scikit-learn in processes of its own")
ROOT = Path(__file__).parents[1]


def run(*arguments: str | Path) -> str:
    """Run Python in a process of its own: scikit-learn asks for a variable before SciPy."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = {"capture_output": True, "text": True, "env": environment, "cwd": ROOT}
    done = subprocess.run([sys.executable, *arguments], check=False, **options)
    assert not done.returncode, done.stderr
    return done.stdout


def test_it_prints_a_table_and_saves_a_plot(tmp_path):
    small = ("--samples", "60", "--features", "4", "--classes", "3", "--repeat", "1")
    image = tmp_path / "plot.png"
    printed = run("examples/scikit_learn.py", *small, "--libraries", "numpy", "--plot", image)
    assert all(words in printed for words in ("60 x 4, 3 classes", "before", "after"))
    assert image.read_bytes().startswith(b"\x89PNG")


PLACES = """
import numpy as np
from examples.scikit_learn import PLACES, MultinomialLoss, data, fit, replaced
from sklearn.linear_model import _logistic
from sklearn.utils import extmath

calls = []
loss_gradient = MultinomialLoss.loss_gradient
MultinomialLoss.loss_gradient = lambda *a, **k: calls.append(1) or loss_gradient(*a, **k)
theirs = extmath.softmax
X, y = data(False, 60, 4, 3)
before = fit("array_api_strict", X, y, 1)
assert not calls
with replaced():
    assert _logistic.softmax is extmath.softmax is PLACES[theirs] is not theirs
    after = fit("array_api_strict", X, y, 1)
assert _logistic.softmax is extmath.softmax is theirs
assert len(calls) >= after.iterations > 0
np.testing.assert_allclose(after.coefficients, before.coefficients, atol=1e-4)
np.testing.assert_allclose(after.probabilities, before.probabilities, atol=1e-5)
"""


def test_ours_take_the_places_and_give_them_back():
    pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")
    run("-c", PLACES)
