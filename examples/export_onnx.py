"""Export a trained classifier with its loss and gradient to ONNX, and run it in ONNX Runtime.

    pip install "portable_softmax[ndonnx]"
    python examples/export_onnx.py [digits.onnx]

The classifier learns the handwritten digits of the package by NumPy. One graph, for a batch of any
size, then gives the probabilities, the loss and its gradient; ONNX Runtime's answers are compared
with those of the same code on NumPy, in units in the last place. Where torch and onnxscript are
installed, the size of what torch's exporter writes is shown.
"""

from __future__ import annotations

import argparse
import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ndonnx
import numpy as np
import onnxruntime

from portable_softmax import cross_entropy_value_and_grad, kernels, softmax

UNITS = 8
RATE, EPOCHS = 1.0, 60


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return 1797 images as rows of 64 pixels in [0, 1], and their labels."""
    with (files("portable_softmax") / "data" / "digits.npz").open("rb") as file:
        archive = np.load(file)
        images, labels = archive["images"], archive["labels"]
    return images.reshape(len(images), -1).astype(np.float32) / 16, labels.astype(np.int64)


def train(x: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of multinomial logistic regression, by gradient descent."""
    W, b = np.zeros((64, 10), np.float32), np.zeros(10, np.float32)
    for _ in range(EPOCHS):
        _, grad = cross_entropy_value_and_grad(x @ W + b, t)
        W -= RATE * (x.T @ grad)
        b -= RATE * grad.sum(axis=0)
    return W, b


def graph(W: np.ndarray, b: np.ndarray, gradient: bool = True) -> Any:
    """Return the ONNX model: pixels and labels to probabilities, losses and their gradient."""
    x = ndonnx.argument(shape=("batch", 64), dtype=ndonnx.float32)
    t = ndonnx.argument(shape=("batch",), dtype=ndonnx.int64)
    logits = x @ ndonnx.asarray(W) + ndonnx.asarray(b)
    loss, grad = cross_entropy_value_and_grad(logits, t, reduction="none")
    outputs = {"logits": logits, "softmax": softmax(logits), "loss": loss}
    if gradient:
        outputs["grad"] = grad
    return ndonnx.build({"x": x, "t": t}, outputs)


def units(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference in units in the last place."""
    assert actual.dtype == expected.dtype == np.float32
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    gap = np.abs(actual.astype(np.float64) - expected)
    return float((gap / np.spacing(np.abs(expected))).max())


def size(model: Any) -> tuple[int, int]:
    """Return the nodes and the bytes of an ONNX model, weights included."""
    return len(model.graph.node), model.ByteSize()


def size_of_torch(W: np.ndarray, b: np.ndarray) -> tuple[int, int]:
    """Return nodes and bytes of softmax and cross-entropy as torch exports them; no gradient."""
    import torch

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W, self.b = (
                torch.nn.Parameter(torch.tensor(W)),
                torch.nn.Parameter(torch.tensor(b)),
            )

        def forward(self, x: Any, t: Any) -> Any:
            logits = x @ self.W + self.b
            loss = torch.nn.functional.cross_entropy(logits, t, reduction="none")
            return logits, torch.softmax(logits, -1), loss

    given = (torch.zeros(2, 64), torch.zeros(2, dtype=torch.int64))
    batch = torch.export.Dim("batch")
    shapes = ({0: batch}, {0: batch})
    program = torch.onnx.export(
        Classifier(), given, dynamic_shapes=shapes, dynamo=True, verbose=False
    )
    return size(program.model_proto)


def main(arguments: list[str] | None = None) -> int:
    """Train, export, run, compare; return 1 if an answer is off."""
    parser = argparse.ArgumentParser(description="Export a trained classifier to ONNX, and run it.")
    parser.add_argument(
        "path", type=Path, nargs="?", default=Path("digits.onnx"), help="the ONNX file to write"
    )
    path = parser.parse_args(arguments).path
    x, t = digits()
    W, b = train(x, t)
    model = graph(W, b)
    path.write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(path)
    for rows in (len(x), 1):
        names = ["logits", "softmax", "loss", "grad"]
        given = {"x": x[:rows], "t": t[:rows]}
        logits, y, loss, grad = session.run(names, given)
        right = float((logits.argmax(axis=1) == t[:rows]).mean())
        # Of the same logits: what a matrix product rounds is no matter of these functions.
        # NumPy's kernels keep digits that the portable code, which the graph is made of, does not.
        with kernels.portable():
            expected_loss, expected_grad = cross_entropy_value_and_grad(
                logits, t[:rows], reduction="none"
            )
            expected = softmax(logits)
        worst = {
            "softmax": units(y, expected),
            "loss": units(loss, expected_loss),
            "gradient": units(grad, expected_grad),
        }
        print(f"{rows} digits, {right:.1%} right; units in the last place beside NumPy:")
        print("  " + ", ".join(f"{name} {value:.1f}" for name, value in worst.items()))
        if max(worst.values()) > UNITS:
            print(f"that is more than {UNITS}", file=sys.stderr)
            return 1
    sizes = {"with the gradient": size(model), "without": size(graph(W, b, gradient=False))}
    if all(map(find_spec, ("torch", "onnx", "onnxscript"))):
        # By ONNX's own Softmax and loss, with the rounding that they have.
        sizes["without, by torch's exporter"] = size_of_torch(W, b)
    for name, (nodes, octets) in sizes.items():
        print(f"{path} {name}: {nodes} nodes, {octets:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
