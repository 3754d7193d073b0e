"""Draw docs/_static/confident-row.svg, the figure of README.md and of the home page.

    python docs/figure.py

It needs matplotlib, and makes the same bytes again.
"""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from portable_softmax import cross_entropy

TARGET = Path(__file__).resolve().parent / "_static" / "confident-row.svg"


def main():
    """Compare the loss of a confident row with the logarithm of its rounded probability."""
    lead = np.linspace(0, 40, 161, dtype=np.float32)
    rows = np.stack([lead, 0 * lead, 0 * lead], axis=1)
    ours = cross_entropy(rows, np.zeros(len(lead), int), reduction="none")
    e = np.exp(rows - rows.max(axis=1, keepdims=True))
    rounded = -np.log(e[:, 0] / e.sum(axis=1))
    exact = np.log1p(2 * np.exp(-lead.astype(np.float64)))

    mpl.rcParams.update({"svg.hashsalt": "confident row", "font.size": 10})
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    axis = figure.subplots()
    axis.semilogy(lead, exact, color="#9ca3af", linewidth=6, label="exact")
    axis.semilogy(lead, ours, color="#1d4ed8", label="cross_entropy(x, 0)")
    seen = rounded > 0
    axis.semilogy(lead[seen], rounded[seen], color="#dc2626", label="-log(softmax(x)[0])")
    axis.annotate("0 from here on", (lead[seen][-1], rounded[seen][-1]), (18.5, 1e-6),
                  color="#dc2626")  # fmt: skip
    axis.set(xlabel="d", ylabel="loss", title="The loss of x = [d, 0, 0] in float32")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(TARGET, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
