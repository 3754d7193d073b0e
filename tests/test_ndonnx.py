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


def test_a_constant_close_to_1_needs_an_optimizer_less(xp):
    """ONNX Runtime 1.32 leaves out a product with what float32 rounds to 1, unless told not to."""
    cap = 1 + 2.0**-26
    logits = xp.xp.argument(shape=LOGITS.shape, dtype=xp.xp.float64)
    loss = ps.cross_entropy(logits, xp.xp.asarray(LABELS), softcap=cap, reduction="none")
    model = xp.xp.build({"logits": logits}, {"loss": loss}).SerializeToString()
    session = xp.runtime.InferenceSession(model, disabled_optimizers=["NoopElimination"])
    (found,) = session.run(None, {"logits": LOGITS})
    expected = ps.cross_entropy(LOGITS, LABELS, softcap=cap, reduction="none")
    np.testing.assert_allclose(found, expected, rtol=1e-14)


@pytest.mark.parametrize("alpha", [1.25, 3.0])
def test_steps_are_a_loop_of_the_graph(xp, alpha):
    """Of any batch size; a constant is computed step by step instead."""
    logits = xp.xp.argument(shape=("N", 3), dtype=xp.xp.float64)
    model = xp.xp.build({"logits": logits}, {"y": ps.entmax(logits, alpha=alpha)})
    assert sum(node.op_type == "Loop" for node in model.graph.node) == (1 if alpha < 2 else 2)
    assert len(model.graph.node) < 200
    expected = ps.entmax(LOGITS, alpha=alpha)
    session = xp.runtime.InferenceSession(model.SerializeToString())
    np.testing.assert_allclose(session.run(None, {"logits": LOGITS})[0], expected, rtol=1e-14)
    from spox import _future as spox

    with spox.value_prop_backend(spox.ValuePropBackend.ONNXRUNTIME):  # ndonnx's own
        constant = ps.entmax(xp.xp.asarray(LOGITS), alpha=alpha)
    np.testing.assert_allclose(constant.unwrap_numpy(), expected, rtol=1e-14)
