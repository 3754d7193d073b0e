"""The derivation: each step does what its docstring says, and fails where it says that it fails.

Expected values are closed forms, mpmath's, or finite differences; none was copied from the code.
"""

import re
import warnings

import mpmath
import numpy as np
import pytest

from portable_softmax import textbook
from portable_softmax.libraries import namespace
from portable_softmax.textbook import (
    Softmax,
    SoftmaxWithLoss,
    cross_entropy_error,
    softmax_batched,
    softmax_jacobian,
    softmax_naive,
    softmax_shifted,
    softmax_transposed,
)

pytestmark = pytest.mark.run_on("strict", "torch")

# The reference values of the lesson: exp(x_i) / sum exp(x_k), to eight digits.
SCORES = [[1.0, 2.0, 3.0, 4.0], [9.0, 10.0, 11.0, 13.0]]
PROBABILITIES = [
    [0.0320586, 0.08714432, 0.23688282, 0.64391426],
    [0.01521943, 0.0413707, 0.11245721, 0.83095266],
]
REFERENCE = {"rtol": 0, "atol": 5e-9}

EPS = 1e-7

one_sample = pytest.mark.parametrize(
    "softmax", [softmax_naive, softmax_shifted], ids=["naive", "shifted"]
)
one_batch = pytest.mark.parametrize(
    "softmax", [softmax_batched, softmax_transposed], ids=["batched", "transposed"]
)


def quiet():
    """Let NumPy overflow without a warning, in the threads of Dask as well."""
    return warnings.catch_warnings(action="ignore", category=RuntimeWarning)


def exact_softmax(row):
    with mpmath.workdps(50):
        e = [mpmath.exp(mpmath.mpf(float(v))) for v in row]
        return np.array([float(v / mpmath.fsum(e)) for v in e])


def exact_loss(row, label):
    """-log(softmax(row)[label]) to 50 digits."""
    with mpmath.workdps(50):
        e = [mpmath.exp(mpmath.mpf(float(v))) for v in row]
        return float(mpmath.log(mpmath.fsum(e)) - mpmath.mpf(float(row[label])))


def slope(f, x, h=1e-5):
    """Return d f(x) / d x by central differences: the axes of x come last."""
    x = np.asarray(x, dtype=np.float64)
    columns = []
    for index in np.ndindex(x.shape):
        nudge = np.zeros_like(x)
        nudge[index] = h
        columns.append((np.asarray(f(x + nudge)) - np.asarray(f(x - nudge))) / (2 * h))
    return np.stack(columns, axis=-1).reshape(columns[0].shape + x.shape)


def batch_of_scores(seed, shape=(5, 4), scale=3.0):
    return scale * np.random.default_rng(seed).standard_normal(shape)


# --------------------------------------------------------------------- steps 1 and 2: one sample


@one_sample
@pytest.mark.parametrize(("row", "expected"), list(zip(SCORES, PROBABILITIES, strict=True)))
def test_one_sample_gives_the_reference_values(xp, softmax, row, expected):
    y = xp.numpy(softmax(xp.asarray(row, dtype="float64")))
    np.testing.assert_allclose(y, expected, **REFERENCE)


@one_sample
def test_one_sample_agrees_with_mpmath(xp, softmax):
    row = batch_of_scores(0, shape=(7,))
    y = xp.numpy(softmax(xp.asarray(row, dtype="float64")))
    np.testing.assert_allclose(y, exact_softmax(row), rtol=1e-14)


@pytest.mark.parametrize(
    ("dtype", "level"),
    [("float64", 1000.0), ("float64", 710.0), ("float32", 89.0)],
)
def test_naive_overflows_and_shifted_does_not(xp, dtype, level):
    x = xp.asarray([level, level + 1, level + 2, level + 3], dtype=dtype)
    with quiet():
        assert np.isnan(xp.numpy(softmax_naive(x))).all()
    rtol = 1e-6 if dtype == "float32" else 5e-7  # eight printed digits
    np.testing.assert_allclose(xp.numpy(softmax_shifted(x)), PROBABILITIES[0], rtol=rtol)


def test_naive_is_right_below_the_documented_limit(xp):
    # XLA divides by way of 1 / S and takes 1 / exp(709) for 0, so stay a little further below.
    y = xp.numpy(softmax_naive(xp.asarray([700.0, 699.0], dtype="float64")))
    np.testing.assert_allclose(y, exact_softmax([700.0, 699.0]), rtol=1e-13)


def test_naive_divides_zero_by_zero_far_below_zero_and_shifted_does_not(xp):
    x = xp.asarray([-1000.0, -1001.0], dtype="float64")
    with quiet():
        assert np.isnan(xp.numpy(softmax_naive(x))).all()
    expected = [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))]
    np.testing.assert_allclose(xp.numpy(softmax_shifted(x)), expected, rtol=1e-14)


def test_numpy_warns_when_naive_overflows():
    with (
        pytest.warns(RuntimeWarning, match="overflow encountered in exp"),
        pytest.warns(RuntimeWarning, match="invalid value encountered in divide"),
    ):
        softmax_naive(np.array([1000.0, 1001.0]))


def test_softmax_sees_differences_only(xp):
    row = batch_of_scores(1, shape=(6,))
    expected = xp.numpy(softmax_shifted(xp.asarray(row, dtype="float64")))
    for level in (-1e4, -3.0, 500.0, 1e4):
        y = xp.numpy(softmax_shifted(xp.asarray(row + level, dtype="float64")))
        np.testing.assert_allclose(y, expected, rtol=1e-11)


def test_shifted_spreads_one_sum_over_a_whole_batch(xp):
    y = xp.numpy(softmax_shifted(xp.asarray([[0.0, 0.0], [0.0, 0.0]], dtype="float64")))
    np.testing.assert_array_equal(y, np.full((2, 2), 0.25))


# --------------------------------------------------------------------- steps 3 and 4: a batch


@one_batch
def test_batch_gives_the_reference_values(xp, softmax):
    y = xp.numpy(softmax(xp.asarray(SCORES, dtype="float64")))
    np.testing.assert_allclose(y, PROBABILITIES, **REFERENCE)


@pytest.mark.slow("XLA compiles many programs", "jax")
@one_batch
@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (3, 3), (2, 7)])
def test_batch_takes_each_row_as_a_sample(xp, softmax, shape):
    x = batch_of_scores(2, shape=shape)
    y = xp.numpy(softmax(xp.asarray(x, dtype="float64")))
    np.testing.assert_allclose(y, [exact_softmax(row) for row in x], rtol=1e-14)
    np.testing.assert_allclose(y.sum(axis=1), 1.0, rtol=1e-14)


@one_batch
def test_batch_gives_each_row_its_own_maximum(xp, softmax):
    # With one maximum for both rows the second would be 0 / 0.
    y = xp.numpy(softmax(xp.asarray([[1000.0, 1000.0], [-1000.0, -1000.0]], dtype="float64")))
    np.testing.assert_array_equal(y, np.full((2, 2), 0.5))


@one_batch
def test_batch_functions_take_a_single_sample(xp, softmax):
    y = softmax(xp.asarray(SCORES[1], dtype="float64"))
    assert tuple(y.shape) == (4,)
    np.testing.assert_allclose(xp.numpy(y), PROBABILITIES[1], **REFERENCE)
    large = softmax(xp.asarray([1000.0, 1000.0], dtype="float64"))
    np.testing.assert_array_equal(xp.numpy(large), [0.5, 0.5])


def test_transposed_equals_batched(xp):
    x = xp.asarray(batch_of_scores(3, shape=(6, 5), scale=20.0), dtype="float64")
    np.testing.assert_allclose(
        xp.numpy(softmax_transposed(x)), xp.numpy(softmax_batched(x)), rtol=1e-14
    )


def without_keepdims(x):
    """Softmax of a batch with the mistake that `softmax_batched` warns of."""
    library = namespace(x)
    e = library.exp(x - library.max(x, axis=1))
    return e / library.sum(e, axis=1)


def test_without_keepdims_a_square_batch_is_silently_wrong(xp):
    x = xp.asarray([[0.0, 0.0], [0.0, 2.0]], dtype="float64")
    wrong = xp.numpy(without_keepdims(x))
    # Row 0 by hand: its entries are divided by the sums of row 0 and of row 1.
    row_sums = 1 + np.exp(-2), 2.0
    np.testing.assert_allclose(wrong[0], [1 / row_sums[0], np.exp(-2) / row_sums[1]], rtol=1e-14)
    assert (abs(wrong.sum(axis=1) - 1) > 0.05).all()
    np.testing.assert_allclose(xp.numpy(softmax_batched(x)).sum(axis=1), 1.0, rtol=1e-14)


def test_without_keepdims_any_other_batch_is_an_error(xp):
    x = xp.asarray(SCORES, dtype="float64")
    # The class is the library's own.
    with pytest.raises(Exception, match=r"(?i)broadcast|shape|size|dimensions|chunks"):
        without_keepdims(x)


# --------------------------------------------------------------------- step 5: the Jacobian


def test_jacobian_has_the_two_cases_of_the_quotient_rule(xp):
    y = [0.5, 0.25, 0.125, 0.125]  # powers of two: every product is exact
    jacobian = xp.numpy(softmax_jacobian(xp.asarray(y, dtype="float64")))
    for i, y_i in enumerate(y):
        for j, y_j in enumerate(y):
            assert jacobian[i, j] == (y_i * (1 - y_i) if i == j else -y_i * y_j)


def test_jacobian_agrees_with_finite_differences(xp):
    row = batch_of_scores(4, shape=(5,), scale=1.0)
    y = softmax_shifted(xp.asarray(row, dtype="float64"))
    expected = slope(exact_softmax, row)
    np.testing.assert_allclose(xp.numpy(softmax_jacobian(y)), expected, rtol=0, atol=1e-9)


def test_jacobian_is_symmetric_and_its_rows_sum_to_0(xp):
    y = softmax_shifted(xp.asarray(batch_of_scores(5, shape=(6,)), dtype="float64"))
    jacobian = xp.numpy(softmax_jacobian(y))
    np.testing.assert_array_equal(jacobian, jacobian.T)
    np.testing.assert_allclose(jacobian.sum(axis=1), 0.0, atol=1e-15)


# --------------------------------------------------------------------- step 6: the layer


def test_layer_has_nothing_to_learn(xp):
    layer = Softmax()
    assert (layer.params, layer.grads, layer.out) == ([], [], None)
    layer.forward(xp.asarray(SCORES, dtype="float64"))
    assert (layer.params, layer.grads) == ([], [])


def test_layer_forward_keeps_its_output(xp):
    layer = Softmax()
    y = layer.forward(xp.asarray(SCORES, dtype="float64"))
    assert y is layer.out
    np.testing.assert_allclose(xp.numpy(y), PROBABILITIES, **REFERENCE)


def test_layer_takes_a_single_sample(xp):
    layer = Softmax()
    y = xp.numpy(layer.forward(xp.asarray(SCORES[1], dtype="float64")))
    np.testing.assert_allclose(y, PROBABILITIES[1], **REFERENCE)
    dy = np.array([1.0, -2.0, 0.5, 3.0])
    da = xp.numpy(layer.backward(xp.asarray(dy, dtype="float64")))
    np.testing.assert_allclose(da, (np.diag(y) - np.outer(y, y)) @ dy, atol=1e-15)


def test_layer_backward_is_the_jacobian_times_the_gradient(xp):
    x, dy = batch_of_scores(6), batch_of_scores(7)
    layer = Softmax()
    y = layer.forward(xp.asarray(x, dtype="float64"))
    da = xp.numpy(layer.backward(xp.asarray(dy, dtype="float64")))
    for n in range(x.shape[0]):
        jacobian = xp.numpy(softmax_jacobian(y[n, :]))
        np.testing.assert_allclose(da[n], jacobian.T @ dy[n], rtol=1e-12, atol=1e-14)


def test_layer_backward_agrees_with_finite_differences(xp):
    x, dy = batch_of_scores(8, scale=1.0), batch_of_scores(9, scale=1.0)
    layer = Softmax()
    layer.forward(xp.asarray(x, dtype="float64"))
    da = xp.numpy(layer.backward(xp.asarray(dy, dtype="float64")))

    def loss(a):
        return sum(exact_softmax(row) @ weights for row, weights in zip(a, dy, strict=True))

    np.testing.assert_allclose(da, slope(loss, x), rtol=0, atol=1e-9)


def test_layer_backward_before_forward_says_so(xp):
    with pytest.raises(RuntimeError, match=re.escape("call forward(a) first")):
        Softmax().backward(xp.asarray(SCORES, dtype="float64"))


# --------------------------------------------------------------------- step 7: the loss


@pytest.mark.parametrize("label_dtype", ["int64", "float64"])
def test_loss_is_the_mean_surprise(xp, label_dtype):
    y = xp.asarray([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], dtype="float64")
    t = xp.asarray([[1, 0, 0], [0, 1, 0]], dtype=label_dtype)
    expected = (np.log(2) - np.log(0.8)) / 2
    np.testing.assert_allclose(float(xp.numpy(cross_entropy_error(y, t))), expected, atol=2e-7)
    exact = float(xp.numpy(cross_entropy_error(y, t, eps=1e-300)))
    np.testing.assert_allclose(exact, expected, rtol=1e-14)


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.parametrize("label_dtype", ["int64", "float64"])
@pytest.mark.parametrize("classes", [1, 3, 5])  # 5 samples: a square batch among them
def test_one_hot_rows_equal_index_labels(xp, label_dtype, classes):
    y = xp.asarray(
        [exact_softmax(row) for row in batch_of_scores(10, (5, classes))], dtype="float64"
    )
    labels = np.array([0, 4, 2, 1, 1]) % classes
    by_index = cross_entropy_error(y, xp.asarray(labels, dtype="int64"))
    by_row = cross_entropy_error(y, xp.asarray(np.eye(classes)[labels], dtype=label_dtype))
    loss = float(xp.numpy(by_index))
    # A unit of rounding: labels of the two kinds may lie in different chunks.
    np.testing.assert_allclose(loss, float(xp.numpy(by_row)), rtol=4e-16)
    picked = xp.numpy(y)[np.arange(5), labels]
    np.testing.assert_allclose(loss, -np.log(picked + EPS).mean(), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("t", "dtype"), [(2, "int64"), ([0, 0, 1], "int64"), ([0.0, 0.0, 1.0], "float64")]
)
def test_loss_takes_a_single_sample(xp, t, dtype):
    y = xp.asarray([0.5, 0.25, 0.25], dtype="float64")
    loss = cross_entropy_error(y, xp.asarray(t, dtype=dtype))
    assert tuple(loss.shape) == ()
    np.testing.assert_allclose(float(xp.numpy(loss)), -np.log(0.25 + EPS), rtol=1e-14)


def test_loss_takes_a_distribution(xp):
    y, t = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    loss = cross_entropy_error(xp.asarray(y, dtype="float64"), xp.asarray(t, dtype="float64"))
    expected = 0.25 * np.log(2) + 0.75 * np.log(4)
    np.testing.assert_allclose(float(xp.numpy(loss)), expected, atol=1e-6)


def test_floating_classes_are_refused(xp):
    y = xp.asarray(PROBABILITIES, dtype="float64")
    with pytest.raises(TypeError, match=r"t holds .*float64 .*convert t to an integer dtype"):
        cross_entropy_error(y, xp.asarray([0.0, 1.0], dtype="float64"))


@pytest.mark.parametrize("t", [[0, 1, 2], [[0], [1]], [[1, 0], [0, 1]], 1])
def test_labels_of_another_shape_are_refused(xp, t):
    y = xp.asarray(PROBABILITIES, dtype="float64")
    with pytest.raises(ValueError, match=r"it must be \(2,\) \(classes\) or \(2, 4\)"):
        cross_entropy_error(y, xp.asarray(t, dtype="int64"))


def test_labels_of_another_library_are_refused(xp):
    if xp.library == "numpy":
        pytest.skip("the other backends each meet NumPy here")
    y = xp.asarray(PROBABILITIES, dtype="float64")
    with pytest.raises(TypeError, match=f"arrays of two libraries: {xp.library} and numpy"):
        cross_entropy_error(y, np.asarray([0, 1]))


@pytest.mark.parametrize("t", [0, [1.0, 0.0]], ids=["index", "one-hot"])
def test_without_eps_a_perfect_prediction_is_nan(xp, t):
    y = xp.asarray([1.0, 0.0], dtype="float64")
    t = xp.asarray(t, dtype="int64" if t == 0 else "float64")
    with quiet():
        assert np.isnan(float(xp.numpy(cross_entropy_error(y, t, eps=0.0))))
    assert np.isfinite(float(xp.numpy(cross_entropy_error(y, t))))


def test_with_eps_a_perfect_prediction_has_a_negative_loss(xp):
    y = xp.asarray([1.0, 0.0], dtype="float64")
    loss = float(xp.numpy(cross_entropy_error(y, xp.asarray(0, dtype="int64"))))
    np.testing.assert_allclose(loss, -np.log1p(EPS), rtol=1e-9)
    assert loss < 0


def test_with_eps_a_perfect_prediction_in_float32_is_off_by_a_whole_ulp(xp):
    y = xp.asarray([1.0, 0.0], dtype="float32")
    loss = float(xp.numpy(cross_entropy_error(y, xp.asarray(0, dtype="int64"))))
    np.testing.assert_allclose(loss, -np.log1p(2.0**-23), rtol=1e-6)


@pytest.mark.parametrize("score", [-20.0, -100.0, -1000.0])
def test_with_eps_the_loss_ends_at_16(xp, score):
    x = xp.asarray([0.0, score], dtype="float64")
    loss = cross_entropy_error(softmax_shifted(x), xp.asarray(1, dtype="int64"))
    assert float(xp.numpy(loss)) <= -np.log(EPS) < 16.1181
    assert exact_loss([0.0, score], 1) >= 20
    if score <= -100:
        np.testing.assert_allclose(float(xp.numpy(loss)), 16.118095650958319, rtol=1e-12)


@pytest.mark.parametrize("score", [-5.0, -16.118, -25.0])
def test_with_eps_the_slope_ends_too(xp, score):
    """A factor y_k / (y_k + eps) stands before y - t."""
    t = xp.asarray(1, dtype="int64")

    def loss(row):
        y = softmax_shifted(xp.asarray(row, dtype="float64"))
        return float(xp.numpy(cross_entropy_error(y, t)))

    y = exact_softmax([0.0, score])
    expected = y[1] / (y[1] + EPS) * (y - [0.0, 1.0])
    np.testing.assert_allclose(slope(loss, [0.0, score], h=1e-4), expected, rtol=1e-5, atol=1e-10)
    if score == -25.0:
        assert np.abs(expected).max() < 2e-4  # where y - t is [1, -1]


def test_a_probability_rounded_to_1_has_lost_its_loss(xp):
    row = [30.0, 0.0, 0.0]
    label = xp.asarray(0, dtype="int64")
    np.testing.assert_allclose(exact_loss(row, 0), 1.87e-13, rtol=1e-3)
    y = softmax_shifted(xp.asarray(row, dtype="float32"))
    assert float(xp.numpy(y)[0]) == 1.0
    # No eps can bring it back, whatever its size ...
    for eps in (1e-7, 1e-12, 1e-30):
        assert float(xp.numpy(cross_entropy_error(y, label, eps=eps))) <= 0
    # ... and in float64, where the digits of y would still tell, 1e-7 drowns them.
    y = softmax_shifted(xp.asarray(row, dtype="float64"))
    assert float(xp.numpy(cross_entropy_error(y, label))) < 0
    assert 0 < float(xp.numpy(cross_entropy_error(y, label, eps=1e-300))) < 1e-12


def test_the_formula_from_the_scores_keeps_what_eps_loses(xp):
    """(m - x_k) + log1p(r), as the docstring writes it, against 50 digits."""
    library = namespace(xp.asarray([0.0], dtype="float64"))
    for row, label in [([30.0, 0.0, 0.0], 0), ([1000.0, 0.0], 0), ([1000.0, 0.0], 1)]:
        x = xp.asarray(row, dtype="float64")  # the largest score comes first
        m = library.max(x)
        loss = (m - x[label]) + library.log1p(library.sum(library.exp(x[1:] - m)))
        np.testing.assert_allclose(float(xp.numpy(loss)), exact_loss(row, label), rtol=1e-14)


# --------------------------------------------------------------------- step 8: softmax with loss


LABELS = np.array([2, 0, 3, 1, 2])
KINDS = {
    "index": (LABELS, "int64"),
    "one-hot": (np.eye(4)[LABELS], "float64"),
    "integer one-hot": (np.eye(4)[LABELS], "int64"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def labels_of(xp, kind):
    values, dtype = KINDS[kind]
    return xp.asarray(values, dtype=dtype)


@each_kind
def test_loss_layer_agrees_with_mpmath(xp, kind):
    x = batch_of_scores(11)
    layer = SoftmaxWithLoss()
    loss = layer.forward(xp.asarray(x, dtype="float64"), labels_of(xp, kind))
    assert loss is layer.loss
    assert tuple(loss.shape) == ()
    expected = np.mean([exact_loss(row, k) for row, k in zip(x, LABELS, strict=True)])
    # eps lowers each loss by eps / y_k, and no y_k is below 1e-5 here.
    assert xp.numpy(layer.y)[np.arange(5), LABELS].min() > 1e-5
    np.testing.assert_allclose(float(xp.numpy(loss)), expected, atol=EPS / 1e-5)


@each_kind
def test_loss_layer_keeps_y_and_one_hot_t(xp, kind):
    x = batch_of_scores(12)
    layer = SoftmaxWithLoss()
    layer.forward(xp.asarray(x, dtype="float64"), labels_of(xp, kind))
    np.testing.assert_allclose(xp.numpy(layer.y), [exact_softmax(r) for r in x], rtol=1e-13)
    np.testing.assert_array_equal(xp.numpy(layer.t), np.eye(4)[LABELS])
    assert layer.t.dtype == layer.y.dtype


@each_kind
def test_loss_layer_backward_agrees_with_finite_differences_of_forward(xp, kind):
    x, t = batch_of_scores(13, scale=1.0), labels_of(xp, kind)

    def loss(x):
        return float(xp.numpy(SoftmaxWithLoss().forward(xp.asarray(x, dtype="float64"), t)))

    layer = SoftmaxWithLoss()
    layer.forward(xp.asarray(x, dtype="float64"), t)
    # eps shrinks the slope of forward by eps / y_k, and no y_k is below 1e-2 here.
    assert xp.numpy(layer.y)[np.arange(5), LABELS].min() > 1e-2
    np.testing.assert_allclose(xp.numpy(layer.backward()), slope(loss, x), atol=EPS / 1e-2)


def test_loss_layer_backward_agrees_with_finite_differences_of_the_exact_loss(xp):
    x = batch_of_scores(14)
    layer = SoftmaxWithLoss()
    layer.forward(xp.asarray(x, dtype="float64"), xp.asarray(LABELS, dtype="int64"))

    def loss(x):
        return np.mean([exact_loss(row, k) for row, k in zip(x, LABELS, strict=True)])

    np.testing.assert_allclose(xp.numpy(layer.backward()), slope(loss, x), atol=1e-9)


def test_loss_layer_backward_is_y_minus_t_over_the_batch(xp):
    x = np.log([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]])
    layer = SoftmaxWithLoss()
    layer.forward(xp.asarray(x, dtype="float64"), xp.asarray([0, 1], dtype="int64"))
    expected = np.array([[-0.25, 0.125, 0.125], [0.0625, -0.125, 0.0625]])
    np.testing.assert_allclose(xp.numpy(layer.backward()), expected, rtol=1e-14)
    np.testing.assert_allclose(xp.numpy(layer.backward(-2)), -2 * expected, rtol=1e-14)
    dout = xp.asarray(0.5, dtype="float64")
    np.testing.assert_allclose(xp.numpy(layer.backward(dout)), expected / 2, rtol=1e-14)


def test_loss_layer_gradient_sums_to_0_in_each_row(xp):
    layer = SoftmaxWithLoss()
    layer.forward(xp.asarray(batch_of_scores(15), dtype="float64"), labels_of(xp, "index"))
    np.testing.assert_allclose(xp.numpy(layer.backward()).sum(axis=1), 0, atol=1e-15)


def test_loss_layer_equals_its_two_halves_where_nothing_underflows(xp):
    x = xp.asarray(batch_of_scores(16), dtype="float64")
    fused, softmax = SoftmaxWithLoss(), Softmax()
    fused.forward(x, labels_of(xp, "one-hot"))
    y = softmax.forward(x)
    apart = softmax.backward(-labels_of(xp, "one-hot") / y / x.shape[0])
    np.testing.assert_allclose(xp.numpy(fused.backward()), xp.numpy(apart), rtol=1e-12, atol=1e-15)


def test_loss_layer_has_a_gradient_where_its_two_halves_have_none(xp):
    x = xp.asarray([[1000.0, 0.0]], dtype="float64")
    t = xp.asarray([[0.0, 1.0]], dtype="float64")
    fused, softmax = SoftmaxWithLoss(), Softmax()
    fused.forward(x, t)
    np.testing.assert_array_equal(xp.numpy(fused.backward()), [[1.0, -1.0]])
    with quiet():
        apart = xp.numpy(softmax.backward(-t / softmax.forward(x)))
    assert np.isnan(apart).all()


@pytest.mark.parametrize(
    ("t", "dtype"), [(1, "int64"), ([0, 1, 0], "int64"), ([0.0, 1.0, 0.0], "float64")]
)
def test_loss_layer_takes_a_single_sample(xp, t, dtype):
    x = np.log([0.5, 0.25, 0.25])
    layer = SoftmaxWithLoss()
    loss = layer.forward(xp.asarray(x, dtype="float64"), xp.asarray(t, dtype=dtype))
    assert tuple(loss.shape) == ()
    np.testing.assert_allclose(float(xp.numpy(loss)), np.log(4), atol=1e-6)
    dx = layer.backward()
    np.testing.assert_allclose(xp.numpy(dx), [0.5, -0.75, 0.25], rtol=1e-14)


def test_loss_layer_has_nothing_to_learn_and_nothing_kept_before_forward():
    layer = SoftmaxWithLoss()
    assert (layer.params, layer.grads) == ([], [])
    assert (layer.y, layer.t, layer.loss) == (None, None, None)


def test_loss_layer_backward_before_forward_says_so():
    with pytest.raises(RuntimeError, match=re.escape("call forward(x, t) first")):
        SoftmaxWithLoss().backward()


# --------------------------------------------------------------------- all steps


def every_step(x, t):
    """Run every public name on a batch of scores and labels, and return what it gives."""
    softmax, with_loss = Softmax(), SoftmaxWithLoss()
    y = softmax_batched(x)
    return {
        "softmax_naive": softmax_naive(x[0, :]),
        "softmax_shifted": softmax_shifted(x[0, :]),
        "softmax_batched": y,
        "softmax_transposed": softmax_transposed(x),
        "softmax_jacobian": softmax_jacobian(y[0, :]),
        "Softmax.forward": softmax.forward(x),
        "Softmax.backward": softmax.backward(x),
        "cross_entropy_error": cross_entropy_error(y, t),
        "SoftmaxWithLoss.forward": with_loss.forward(x, t),
        "SoftmaxWithLoss.backward": with_loss.backward(),
    }


def test_every_public_name_is_a_step():
    assert {step.partition(".")[0] for step in every_step(np.eye(2), np.array([0, 1]))} == set(
        textbook.__all__
    )


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@each_kind
def test_results_stay_in_the_library_device_and_dtype(xp, dtype, kind):
    x, t = xp.asarray(batch_of_scores(17), dtype=dtype), labels_of(xp, kind)
    for step, result in every_step(x, t).items():
        assert xp.is_ours(result), step
        assert result.dtype == x.dtype, step


@each_kind
def test_inputs_are_not_changed(xp, kind):
    x, t = xp.asarray(batch_of_scores(18), dtype="float64"), labels_of(xp, kind)
    before = xp.numpy(x).copy(), xp.numpy(t).copy()
    every_step(x, t)
    np.testing.assert_array_equal(xp.numpy(x), before[0])
    np.testing.assert_array_equal(xp.numpy(t), before[1])


@each_kind
def test_dask_stays_lazy(xp, da, kind):
    import dask

    def refuse(*args, **kwargs):
        raise AssertionError("something was computed")

    x, t = xp.asarray(batch_of_scores(19), dtype="float64"), labels_of(xp, kind)
    with dask.config.set(scheduler=refuse):
        results = every_step(x.rechunk((2, 3)), t.rechunk(2))
    for step, expected in every_step(x.compute(), t.compute()).items():
        np.testing.assert_allclose(xp.numpy(results[step]), expected, rtol=1e-13, err_msg=step)
