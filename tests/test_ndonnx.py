"""What only ndonnx has: graphs of any batch size, for ONNX Runtime and whatever else runs them."""

from __future__ import annotations

import numpy as np
import pytest
from calls import as_tuple

import portable_softmax as ps
from portable_softmax import online

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


OTHERS = np.asarray([[0.5, -2.0, 1.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
CLASSES = np.asarray([[1.0, 0.5, 0.0], [-1.0, 0.0, 2.0]])
DEEP, DEEP_LABELS = np.stack([LOGITS, OTHERS], axis=1), np.asarray([[0, 1], [1, 1], [0, 1]])
MASK = OTHERS < 1.0  # the last row is all there, the second empty
OPEN = {
    "kl_divergence": (lambda x, y: ps.kl_divergence(x, y), (LOGITS, OTHERS)),
    "kl_divergence_value_and_grad": (
        lambda x, y: ps.kl_divergence_value_and_grad(x, y, reduction="none"),
        (LOGITS, OTHERS),
    ),
    "linear_cross_entropy": (
        lambda h, c, t: ps.linear_cross_entropy(h, c, t, label_smoothing=0.1),
        (LOGITS, CLASSES, DEEP_LABELS[:, 0]),
    ),
    "linear_cross_entropy_value_and_grad": (
        lambda h, c, t, m: ps.linear_cross_entropy_value_and_grad(h, c, t, where=m)[1][:2],
        (LOGITS, CLASSES, DEEP_LABELS[:, 1], np.asarray([[False, True]] * 3)),
    ),
    "linear_cross_entropy of two axes": (
        lambda h, c, t, m: ps.linear_cross_entropy(h, c, t, where=m, reduction="none"),
        (DEEP, CLASSES, DEEP_LABELS, np.asarray([[[True, True], [False, True]]])),
    ),
    "linear_cross_entropy_value_and_grad of two axes": (
        lambda h, c, t: ps.linear_cross_entropy_value_and_grad(h, c, t)[1][:2],
        (DEEP, CLASSES, DEEP_LABELS),
    ),
    "logmeanexp": (lambda x, m: ps.logmeanexp(x, axis=1, where=m), (LOGITS, MASK)),
    "online": (
        lambda x, y: online.softmax(
            x, online.merge(online.identity(x), online.fold(x), online.fold(y))
        ),
        (LOGITS, OTHERS),
    ),
    "online.logsumexp": (lambda x: online.logsumexp(online.fold(x, axis=1)), (LOGITS,)),
    "entmax_loss": (lambda x, t: ps.entmax_loss(x, t), (LOGITS, MASK * 0.5)),
}


@pytest.mark.parametrize("name", OPEN)
def test_the_batch_of_every_function_may_be_open(xp, name):
    function, given = OPEN[name]
    onnx, names = xp.xp, [f"x{i}" for i in range(len(given))]
    arguments = {}
    for key, a in zip(names, given, strict=True):
        open_axes = a.ndim - 1 if a is not CLASSES else 0
        open_axes = a.ndim if a.dtype == np.int64 else open_axes
        # Where it repeats, a length is 1 and not open.
        shape = [n if n == 1 else f"N{i}" for i, n in enumerate(a.shape[:open_axes])]
        dtype = getattr(onnx, a.dtype.name)
        arguments[key] = onnx.argument(shape=(*shape, *a.shape[open_axes:]), dtype=dtype)
    found = as_tuple(function(*arguments.values()))
    outputs = {f"y{i}": y for i, y in enumerate(found)}
    for n in (1, 3):
        cut = [a if a is CLASSES else a[:n] for a in given]
        values = run(xp, arguments, outputs, **dict(zip(names, cut, strict=True)))
        for y, e in zip(values, as_tuple(function(*cut)), strict=True):
            np.testing.assert_allclose(y, e, rtol=1e-13, atol=1e-15)


def test_what_only_sums_over_the_classes_needs_no_number(xp):
    x = xp.xp.argument(shape=("N", "C"), dtype=xp.xp.float64)
    functions = {
        "softmax": ps.softmax,
        "entmax": ps.entmax,
        "divergence": lambda x: ps.kl_divergence(x, 2.0 * x),
        "loss": lambda x: ps.cross_entropy(x, x),
        "fenchel": lambda x: ps.entmax_loss(x, ps.softmax(x)),
    }
    outputs = {name: function(x) for name, function in functions.items()}
    values = run(xp, {"x": x}, outputs, x=LOGITS)
    for y, function in zip(values, functions.values(), strict=True):
        np.testing.assert_allclose(y, function(LOGITS), rtol=1e-13, atol=1e-15)


def test_a_mean_of_an_open_number(xp):
    """Of none it is nan."""
    x = xp.xp.argument(shape=("N", "C"), dtype=xp.xp.float64)
    means = {"a": ps.logmeanexp(x, axis=1), "b": ps.logmeanexp(x)}
    for n in (0, 1, 3):
        one, all_of_them = run(xp, {"x": x}, means, x=LOGITS[:, :n])
        np.testing.assert_allclose(one, ps.logmeanexp(LOGITS[:, :n], axis=1), rtol=1e-14)
        np.testing.assert_allclose(all_of_them, ps.logmeanexp(LOGITS[:, :n]), rtol=1e-14)


def test_what_counts_the_classes_asks_for_their_number(xp):
    onnx = xp.xp
    x = onnx.argument(shape=("N", "C"), dtype=onnx.float64)
    labels = onnx.argument(shape=("N",), dtype=onnx.int64)
    remedy = r"\(None, None\), expected a known number .* axis 1: give the argument"
    for f in (
        lambda x: ps.cross_entropy(x, labels),
        lambda x: ps.cross_entropy(x, x, label_smoothing=0.1),
        lambda x: ps.entmax_loss_value_and_grad(x, labels),
        lambda x: ps.logcumsumexp_vjp(x, x),
        *(ps.logcumsumexp, ps.softmax_jacobian),
    ):
        with pytest.raises(ValueError, match=remedy):
            f(x)
    classifier = onnx.argument(shape=("C", 3), dtype=onnx.float64)
    hidden = onnx.argument(shape=("N", 3), dtype=onnx.float64)
    with pytest.raises(ValueError, match=r"classifier has shape \(None, 3\).* along axis 0: give"):
        ps.linear_cross_entropy(hidden, classifier, labels)


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
