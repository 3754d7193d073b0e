"""What only ndonnx has: graphs of any batch size, for ONNX Runtime and whatever else runs them."""

from __future__ import annotations

import numpy as np
import pytest

import portable_softmax as ps

pytestmark = pytest.mark.libraries("ndonnx")

LOGITS = np.asarray([[2.0, 1.0, 0.0], [30.0, 0.0, 0.0], [-1.0, 0.5, 3.0]])
LABELS = np.asarray([0, 0, 1])


def run(xp, arguments, outputs, **values):
    """Return what a graph gives, run by ONNX Runtime."""
    model = xp.xp.build(arguments, outputs)
    session = xp.runtime.InferenceSession(model.SerializeToString())
    return session.run(list(outputs), values)


def test_the_batch_may_be_open(xp):
    """One graph for every number of rows, no row included."""
    onnx = xp.xp
    logits = onnx.argument(shape=("N", 3), dtype=onnx.float64)
    labels = onnx.argument(shape=("N",), dtype=onnx.int64)
    loss, grad = ps.cross_entropy_value_and_grad(logits, labels)
    outputs = {"softmax": ps.softmax(logits), "loss": loss, "grad": grad}
    arguments = {"logits": logits, "labels": labels}
    for n in (1, 3, 0):
        given = {"logits": LOGITS[:n], "labels": LABELS[:n]}
        y, loss, grad = run(xp, arguments, outputs, **given)
        expected, slope = ps.cross_entropy_value_and_grad(LOGITS[:n], LABELS[:n])
        np.testing.assert_allclose(y, ps.softmax(LOGITS[:n]), rtol=1e-14)
        np.testing.assert_allclose(loss, expected, rtol=1e-14)
        np.testing.assert_allclose(grad, slope, rtol=1e-13)


def test_labels_that_cannot_be_read_give_nan(xp):
    logits = xp.asarray(LOGITS)
    loss = xp.numpy(ps.cross_entropy(logits, xp.asarray([0, 3, -1]), reduction="none"))
    np.testing.assert_array_equal(np.isnan(loss), [False, True, True])


def test_a_constant_is_computed_at_once(xp):
    """ndonnx's own `asarray`: the answer has a value, without a graph being built."""
    y = ps.softmax(xp.xp.asarray(LOGITS)).unwrap_numpy()
    np.testing.assert_allclose(y, ps.softmax(LOGITS), rtol=1e-14)
