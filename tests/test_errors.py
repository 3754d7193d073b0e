"""Wrong calls that users of the other libraries stumble on: each message teaches the right one.

The rows of the table of semantics that are errors are in test_semantics.py.
"""

from __future__ import annotations

import operator

import numpy as np
import pytest

import portable_softmax as ps

pytestmark = pytest.mark.run_on("libraries")


def message(error, function, *arguments, **options) -> str:
    """Return the message of the error that a call raises."""
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    return str(caught.value)


def test_labels_of_shape_n_1(xp):
    """A column of labels, as a table of data gives it."""
    logits, labels = xp.asarray(np.zeros((4, 3))), xp.asarray(np.zeros((4, 1), np.int64))
    assert message(ValueError, ps.cross_entropy, logits, labels) == (
        "labels have shape (4, 1), expected (4,) for class indices or (4, 3) for a distribution, "
        "since logits have shape (4, 3) and axis is 1: squeeze axis 1 of labels"
    )


def test_the_class_axis_of_images_forgotten(xp):
    """torch has the classes of images on axis 1; here it is an argument."""
    logits = xp.asarray(np.zeros((2, 3, 8, 8)))
    labels = xp.asarray(np.zeros((2, 8, 8), np.int64))
    assert message(ValueError, ps.cross_entropy, logits, labels) == (
        "labels have shape (2, 8, 8), expected (2, 3, 8) for class indices or (2, 3, 8, 8) for a "
        "distribution, since logits have shape (2, 3, 8, 8) and axis is 3: pass axis=1 if that is "
        "the class axis"
    )


def test_labels_of_a_shape_that_fits_nothing(xp):
    logits, labels = xp.asarray(np.zeros((4, 3))), xp.asarray(np.zeros(5, np.int64))
    assert message(ValueError, ps.cross_entropy, logits, labels).endswith(
        "since logits have shape (4, 3) and axis is 1: reshape labels"
    )


def test_labels_before_logits(xp):
    """scikit-learn and Keras take the truth first."""
    labels, logits = xp.asarray(np.zeros(4, np.int64)), xp.asarray(np.zeros((4, 3)))
    for function in (ps.cross_entropy, ps.cross_entropy_value_and_grad, ps.entmax_loss):
        assert message(ValueError, function, labels, logits) == (
            "labels have shape (4, 3), expected () for class indices or (4,) for a distribution, "
            "since logits have shape (4,) and axis is 0: pass the logits first, then the labels"
        )


def test_class_indices_as_floats(xp):
    """As read from a file of numbers."""
    logits, labels = xp.asarray(np.zeros((2, 3))), xp.asarray([0.0, 1.0])
    assert message(TypeError, ps.cross_entropy, logits, labels) == (
        "labels have dtype float64 and the shape (2,) of class indices, which must be integers: "
        "cast them to an integer dtype, or pass a distribution of shape (2, 3)"
    )


def test_a_boolean_one_hot(xp):
    """``classes == y`` makes one."""
    logits, labels = xp.asarray(np.zeros((2, 3))), xp.asarray(np.eye(3, dtype=bool)[:2])
    assert message(TypeError, ps.cross_entropy, logits, labels) == (
        "labels have dtype bool, expected integers for class indices, or integers or floats for a "
        "distribution: cast them first"
    )


def test_a_label_out_of_range(xp):
    """Labels that count from 1, and padding that nobody declared."""
    if xp.lazy:
        pytest.skip(f"{xp.name} cannot look at labels before it computes")
    logits = xp.asarray(np.zeros((3, 2)))
    assert message(IndexError, ps.cross_entropy, logits, xp.asarray([1, 2, 1])) == (
        "labels[1] is 2, outside [0, 2) for the 2 classes of axis 1 of logits: correct it, name it "
        "as ignore_index to leave such positions out, or pass check_labels=False to get nan there"
    )
    text = message(IndexError, ps.cross_entropy, logits, xp.asarray([1, 0, -100]))
    assert text.startswith("labels[2] is -100, outside [0, 2)")


def test_weight_of_the_wrong_length(xp):
    logits, labels = xp.asarray(np.zeros((2, 3))), xp.asarray([0, 1])
    for n in (2, 4):
        weight = xp.asarray(np.ones(n))
        assert message(ValueError, ps.cross_entropy, logits, labels, weight=weight) == (
            f"weight has shape ({n},), expected (3,): one weight for each class of axis 1 of logits"
        )
    weight = xp.asarray(np.ones(3, bool))
    assert message(TypeError, ps.cross_entropy, logits, labels, weight=weight).startswith(
        "weight has dtype bool, expected a floating or integer dtype"
    )


def test_axis_of_the_wrong_type(xp):
    x = xp.asarray(np.zeros((2, 3)))
    assert message(TypeError, ps.softmax, x, axis=1.0) == (
        "axis is 1.0, expected an int, or where several are allowed a tuple of ints or None"
    )
    assert message(TypeError, ps.softmax, x, axis=True).startswith("axis is True, expected an int")
    assert message(TypeError, ps.cross_entropy, x, xp.asarray([0, 1]), axis=(1,)).startswith(
        "axis is (1,), expected an int"
    )
    assert message(ValueError, ps.softmax, x, axis=(1, -1)) == (
        "axis is (1, -1), which names an axis twice: name each axis once"
    )
    assert message(ValueError, ps.softmax, x, axis=2).endswith("pass an axis from -2 to 1")


def test_options_of_the_wrong_type(xp):
    x, labels = xp.asarray(np.zeros((2, 3))), xp.asarray([0, 1])
    assert message(TypeError, ps.softmax, x, temperature="2") == (
        "temperature is '2', expected a Python number in (0, inf): an array cannot be taken, "
        "scale the array instead"
    )
    assert message(TypeError, ps.cross_entropy, x, labels, label_smoothing=None).startswith(
        "label_smoothing is None, expected a Python number in [0, 1]"
    )
    assert message(TypeError, ps.cross_entropy, x, labels, ignore_index=1.0) == (
        "ignore_index is 1.0, expected an int or None: pass int(ignore_index)"
    )


def test_a_0_d_array_of_logits(xp):
    text = message(ValueError, ps.cross_entropy, xp.asarray(1.0), xp.asarray(np.asarray(0)))
    assert text == "axis is -1, but the array has 0 dimensions: give the array an axis"


def test_nothing_is_computed_before_the_checks(xp, monkeypatch):
    """The last option is wrong, and no mathematics has run when that is noticed."""

    def computed(*args, **kwargs):
        pytest.fail("the mathematics ran")

    for name in ("cross_entropy", "cross_entropy_value_and_grad", "index_target", "softmax"):
        monkeypatch.setattr(ps.portable, name, computed)
    x, labels = xp.asarray(np.zeros((2, 3))), xp.asarray([0, 1])
    for f in (ps.cross_entropy, ps.cross_entropy_value_and_grad):
        message(ValueError, f, x, labels, reduction="average")
        message(ValueError, f, x, labels, softcap=-1.0)
    message(ValueError, ps.softmax, x, temperature=0.0)


X, CLASSES, CLASSIFIER = np.zeros((2, 3)), np.asarray([0, 1]), np.zeros((4, 3))
# Of each function the first arrays, and a right one of each that comes beside them.
ARRAYS = {
    "softmax": ((X,), {"where": X == 0, "sink": np.zeros((2, 1))}),
    "log_softmax": ((X,), {"where": X == 0, "sink": np.zeros((2, 1))}),
    "logsumexp": ((X,), {"where": X == 0, "b": X}),
    "logmeanexp": ((X,), {"where": X == 0}),
    "online.fold": ((X,), {"where": X == 0}),
    **{f"{name}_vjp": ((X, X), {"dy": X}) for name in ("softmax", "log_softmax", "entmax")},
    "logcumsumexp_vjp": ((X, X), {"dy": X}),
    "kl_divergence": ((X, X), {"logits_q": X}),
    "cross_entropy": (
        (X, CLASSES),
        {"labels": CLASSES, "weight": np.ones(3), "where": X == 0, "sample_weight": np.ones(2)},
    ),
    "entmax_loss": ((X, CLASSES), {"labels": CLASSES, "sample_weight": np.ones(2)}),
    "sigmoid_cross_entropy": ((X, X), {"labels": X, "weight": X, "pos_weight": np.ones(3)}),
    "linear_cross_entropy": (
        (X, CLASSIFIER, CLASSES),
        {
            "classifier": CLASSIFIER,
            "labels": CLASSES,
            "bias": np.ones(4),
            "weight": np.ones(4),
            "where": np.ones((2, 4), bool),
            "sample_weight": np.ones(2),
        },
    ),
}


POSITIONAL = ("dy", "logits_q", "labels", "classifier")


@pytest.mark.parametrize("name", ARRAYS)
def test_each_array_of_each_function_is_checked(xp, name):
    """Its library, its dtype and its shape: the message begins with the name of the argument."""
    first, others = ARRAYS[name]
    functions = [operator.attrgetter(name)(ps)]
    if (both := getattr(ps, f"{name}_value_and_grad", None)) is not None:
        functions.append(both)
    for argument, right in others.items():
        wrong = [
            (TypeError, right.tolist()),
            (ValueError, xp.asarray(np.zeros((7, 5), right.dtype))),
        ]
        if xp.library != "numpy" and not (xp.library == "dask" and argument == "labels"):
            wrong.append((TypeError, right))
        if (name, argument) != ("sigmoid_cross_entropy", "labels"):  # they may be yes and no
            other = right.astype("int64" if right.dtype == bool else "bool")
            wrong.append((TypeError, xp.asarray(other)))
        for error, value in wrong:
            arrays, options = [xp.asarray(a) for a in first], {argument: value}
            if argument in POSITIONAL:
                place = -1 if argument == "labels" else 1
                arrays[place], options = value, {}
            for function in functions:
                assert message(error, function, *arrays, **options).startswith(f"{argument} ")
