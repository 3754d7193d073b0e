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

BATCHED = (softmax_batched, softmax_transposed)
one_batch = pytest.mark.parametrize("softmax", BATCHED)
every_softmax = pytest.mark.parametrize("softmax", [softmax_naive, softmax_shifted, *BATCHED])


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


def array(xp, values, dtype="float64"):
    return xp.asarray(values, dtype=dtype)


def number(xp, loss):
    assert tuple(loss.shape) == ()
    return float(xp.numpy(loss))


# --------------------------------------------------------------------- steps 1 and 2: one sample


@every_softmax
def test_the_reference_values_and_those_of_mpmath(xp, softmax):
    """Of one sample, which functions of a batch take as well."""
    for scores, probabilities in zip(SCORES, PROBABILITIES, strict=True):
        y = softmax(array(xp, scores))
        assert tuple(y.shape) == (4,)
        np.testing.assert_allclose(xp.numpy(y), probabilities, **REFERENCE)
    row = batch_of_scores(0, shape=(7,))
    y = xp.numpy(softmax(array(xp, row)))
    np.testing.assert_allclose(y, exact_softmax(row), rtol=1e-14)


@pytest.mark.parametrize(
    ("dtype", "level"), [("float64", 1000.0), ("float64", 710.0), ("float32", 89.0)]
)
def test_naive_overflows_and_the_others_do_not(xp, dtype, level):
    x = array(xp, [level, level + 1, level + 2, level + 3], dtype)
    with quiet():
        assert np.isnan(xp.numpy(softmax_naive(x))).all()
    rtol = 1e-6 if dtype == "float32" else 5e-7  # eight printed digits
    for softmax in (softmax_shifted, softmax_batched, softmax_transposed):
        np.testing.assert_allclose(xp.numpy(softmax(x)), PROBABILITIES[0], rtol=rtol)


def test_naive_is_right_below_the_documented_limit(xp):
    # XLA divides by way of 1 / S and takes 1 / exp(709) for 0, so stay a little further below.
    y = xp.numpy(softmax_naive(array(xp, [700.0, 699.0])))
    np.testing.assert_allclose(y, exact_softmax([700.0, 699.0]), rtol=1e-13)


def test_naive_divides_zero_by_zero_far_below_zero_and_shifted_does_not(xp):
    x = array(xp, [-1000.0, -1001.0])
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
    expected = xp.numpy(softmax_shifted(array(xp, row)))
    for level in (-1e4, -3.0, 500.0, 1e4):
        y = xp.numpy(softmax_shifted(array(xp, row + level)))
        np.testing.assert_allclose(y, expected, rtol=1e-11)


def test_shifted_spreads_one_sum_over_a_whole_batch(xp):
    y = xp.numpy(softmax_shifted(array(xp, [[0.0, 0.0], [0.0, 0.0]])))
    np.testing.assert_array_equal(y, np.full((2, 2), 0.25))


# --------------------------------------------------------------------- steps 3 and 4: a batch


@pytest.mark.slow("XLA compiles many programs", "jax")
@one_batch
def test_batch_takes_each_row_as_a_sample(xp, softmax):
    for shape in ((1, 4), (4, 1), (3, 3), (2, 7)):
        x = batch_of_scores(2, shape=shape)
        y = xp.numpy(softmax(array(xp, x)))
        np.testing.assert_allclose(y, [exact_softmax(row) for row in x], rtol=1e-14)
    # With one maximum for both rows the second would be 0 / 0.
    y = xp.numpy(softmax(array(xp, [[1000.0, 1000.0], [-1000.0, -1000.0]])))
    np.testing.assert_array_equal(y, np.full((2, 2), 0.5))


def without_keepdims(x):
    """Softmax of a batch with the mistake that `softmax_batched` warns of."""
    library = namespace(x)
    e = library.exp(x - library.max(x, axis=1))
    return e / library.sum(e, axis=1)


def test_without_keepdims_a_square_batch_is_silently_wrong(xp):
    x = array(xp, [[0.0, 0.0], [0.0, 2.0]])
    wrong = xp.numpy(without_keepdims(x))
    # Row 0 by hand: its entries are divided by the sums of row 0 and of row 1.
    row_sums = 1 + np.exp(-2), 2.0
    np.testing.assert_allclose(wrong[0], [1 / row_sums[0], np.exp(-2) / row_sums[1]], rtol=1e-14)
    assert (abs(wrong.sum(axis=1) - 1) > 0.05).all()
    np.testing.assert_allclose(xp.numpy(softmax_batched(x)).sum(axis=1), 1.0, rtol=1e-14)


def test_without_keepdims_any_other_batch_is_an_error(xp):
    x = array(xp, SCORES)
    # The class is the library's own.
    with pytest.raises(Exception, match=r"(?i)broadcast|shape|size|dimensions|chunks"):
        without_keepdims(x)


# --------------------------------------------------------------------- step 5: the Jacobian


def test_jacobian_has_the_two_cases_of_the_quotient_rule(xp):
    y = [0.5, 0.25, 0.125, 0.125]  # powers of two: every product is exact
    jacobian = xp.numpy(softmax_jacobian(array(xp, y)))
    for i, y_i in enumerate(y):
        for j, y_j in enumerate(y):
            assert jacobian[i, j] == (y_i * (1 - y_i) if i == j else -y_i * y_j)


# --------------------------------------------------------------------- step 6: the layer


def test_layer_keeps_its_output_and_has_nothing_to_learn(xp):
    layer = Softmax()
    assert (layer.params, layer.grads, layer.out) == ([], [], None)
    y = layer.forward(array(xp, SCORES))
    assert y is layer.out
    assert (layer.params, layer.grads) == ([], [])
    np.testing.assert_allclose(xp.numpy(y), PROBABILITIES, **REFERENCE)


def test_layer_takes_a_single_sample(xp):
    layer = Softmax()
    y = xp.numpy(layer.forward(array(xp, SCORES[1])))
    np.testing.assert_allclose(y, PROBABILITIES[1], **REFERENCE)
    dy = np.array([1.0, -2.0, 0.5, 3.0])
    da = xp.numpy(layer.backward(array(xp, dy)))
    np.testing.assert_allclose(da, (np.diag(y) - np.outer(y, y)) @ dy, atol=1e-15)


def test_layer_backward_is_the_jacobian_times_the_gradient(xp):
    x, dy = batch_of_scores(6), batch_of_scores(7)
    layer = Softmax()
    y = layer.forward(array(xp, x))
    da = xp.numpy(layer.backward(array(xp, dy)))
    for n in range(x.shape[0]):
        jacobian = xp.numpy(softmax_jacobian(y[n, :]))
        np.testing.assert_allclose(da[n], jacobian.T @ dy[n], rtol=1e-12, atol=1e-14)


def test_backward_before_forward_says_so(xp):
    with pytest.raises(RuntimeError, match=re.escape("call forward(a) first")):
        Softmax().backward(array(xp, SCORES))
    with pytest.raises(RuntimeError, match=re.escape("call forward(x, t) first")):
        SoftmaxWithLoss().backward()


# --------------------------------------------------------------------- step 7: the loss


@pytest.mark.parametrize("label_dtype", ["int64", "float64"])
def test_loss_is_the_mean_surprise(xp, label_dtype):
    y = array(xp, [[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    t = array(xp, [[1, 0, 0], [0, 1, 0]], label_dtype)
    expected = (np.log(2) - np.log(0.8)) / 2
    np.testing.assert_allclose(number(xp, cross_entropy_error(y, t)), expected, atol=2e-7)
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
    by_index = cross_entropy_error(y, array(xp, labels, "int64"))
    by_row = cross_entropy_error(y, array(xp, np.eye(classes)[labels], label_dtype))
    loss = float(xp.numpy(by_index))
    # A unit of rounding: labels of the two kinds may lie in different chunks.
    np.testing.assert_allclose(loss, float(xp.numpy(by_row)), rtol=4e-16)
    picked = xp.numpy(y)[np.arange(5), labels]
    np.testing.assert_allclose(loss, -np.log(picked + EPS).mean(), rtol=1e-13, atol=1e-15)


def test_loss_takes_a_single_sample_and_a_distribution(xp):
    y = array(xp, [0.5, 0.25, 0.25])
    for t, dtype in ((2, "int64"), ([0, 0, 1], "int64"), ([0.0, 0.0, 1.0], "float64")):
        loss = number(xp, cross_entropy_error(y, array(xp, t, dtype)))
        np.testing.assert_allclose(loss, -np.log(0.25 + EPS), rtol=1e-14)
    loss = number(xp, cross_entropy_error(y, array(xp, [0.25, 0.25, 0.5])))
    np.testing.assert_allclose(loss, 0.25 * np.log(2) + 0.75 * np.log(4), atol=1e-6)


def test_floating_classes_are_refused(xp):
    y = array(xp, PROBABILITIES)
    with pytest.raises(TypeError, match=r"t holds .*float64 .*convert t to an integer dtype"):
        cross_entropy_error(y, array(xp, [0.0, 1.0]))


@pytest.mark.parametrize("t", [[0, 1, 2], [[0], [1]], [[1, 0], [0, 1]], 1])
def test_labels_of_another_shape_are_refused(xp, t):
    y = array(xp, PROBABILITIES)
    with pytest.raises(ValueError, match=r"it must be \(2,\) \(classes\) or \(2, 4\)"):
        cross_entropy_error(y, array(xp, t, "int64"))


def test_labels_of_another_library_are_refused(xp):
    y = array(xp, PROBABILITIES)
    with pytest.raises(TypeError, match=f"arrays of two libraries: {xp.library} and numpy"):
        cross_entropy_error(y, np.asarray([0, 1]))


def test_eps_keeps_a_perfect_prediction_from_nan_and_makes_it_negative(xp):
    """In float32 it is off by a whole unit."""
    for t, dtype in ((0, "int64"), ([1.0, 0.0], "float64")):
        y, t = array(xp, [1.0, 0.0]), array(xp, t, dtype)
        with quiet():
            assert np.isnan(number(xp, cross_entropy_error(y, t, eps=0.0)))
        loss = number(xp, cross_entropy_error(y, t))
        np.testing.assert_allclose(loss, -np.log1p(EPS), rtol=1e-9)
    loss = number(xp, cross_entropy_error(array(xp, [1.0, 0.0], "float32"), array(xp, 0, "int64")))
    np.testing.assert_allclose(loss, -np.log1p(2.0**-23), rtol=1e-6)


@pytest.mark.parametrize("score", [-20.0, -100.0, -1000.0])
def test_with_eps_the_loss_ends_at_16(xp, score):
    x = array(xp, [0.0, score])
    loss = cross_entropy_error(softmax_shifted(x), array(xp, 1, "int64"))
    assert number(xp, loss) <= -np.log(EPS) < 16.1181
    assert exact_loss([0.0, score], 1) >= 20
    if score <= -100:
        np.testing.assert_allclose(number(xp, loss), 16.118095650958319, rtol=1e-12)


@pytest.mark.parametrize("score", [-5.0, -16.118, -25.0])
def test_with_eps_the_slope_ends_too(xp, score):
    """A factor y_k / (y_k + eps) stands before y - t."""
    t = array(xp, 1, "int64")

    def loss(row):
        y = softmax_shifted(array(xp, row))
        return number(xp, cross_entropy_error(y, t))

    y = exact_softmax([0.0, score])
    expected = y[1] / (y[1] + EPS) * (y - [0.0, 1.0])
    np.testing.assert_allclose(slope(loss, [0.0, score], h=1e-4), expected, rtol=1e-5, atol=1e-10)
    if score == -25.0:
        assert np.abs(expected).max() < 2e-4  # where y - t is [1, -1]


def test_a_probability_rounded_to_1_has_lost_its_loss(xp):
    row = [30.0, 0.0, 0.0]
    label = array(xp, 0, "int64")
    np.testing.assert_allclose(exact_loss(row, 0), 1.87e-13, rtol=1e-3)
    y = softmax_shifted(array(xp, row, "float32"))
    assert float(xp.numpy(y)[0]) == 1.0
    # No eps can bring it back, whatever its size ...
    for eps in (1e-7, 1e-12, 1e-30):
        assert float(xp.numpy(cross_entropy_error(y, label, eps=eps))) <= 0
    # ... and in float64, where the digits of y would still tell, 1e-7 drowns them.
    y = softmax_shifted(array(xp, row))
    assert float(xp.numpy(cross_entropy_error(y, label))) < 0
    assert 0 < float(xp.numpy(cross_entropy_error(y, label, eps=1e-300))) < 1e-12


def test_the_formula_from_the_scores_keeps_what_eps_loses(xp):
    """(m - x_k) + log1p(r), as the docstring writes it, against 50 digits."""
    library = namespace(array(xp, [0.0]))
    for row, label in [([30.0, 0.0, 0.0], 0), ([1000.0, 0.0], 0), ([1000.0, 0.0], 1)]:
        x = array(xp, row)  # the largest score comes first
        m = library.max(x)
        loss = (m - x[label]) + library.log1p(library.sum(library.exp(x[1:] - m)))
        np.testing.assert_allclose(number(xp, loss), exact_loss(row, label), rtol=1e-14)


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
def test_loss_layer_agrees_with_mpmath_and_keeps_y_and_one_hot_t(xp, kind):
    x = batch_of_scores(11)
    layer = SoftmaxWithLoss()
    assert (layer.params, layer.grads) == ([], [])
    assert (layer.y, layer.t, layer.loss) == (None, None, None)
    loss = layer.forward(array(xp, x), labels_of(xp, kind))
    assert loss is layer.loss
    expected = np.mean([exact_loss(row, k) for row, k in zip(x, LABELS, strict=True)])
    # eps lowers each loss by eps / y_k, and no y_k is below 1e-5 here.
    assert xp.numpy(layer.y)[np.arange(5), LABELS].min() > 1e-5
    np.testing.assert_allclose(number(xp, loss), expected, atol=EPS / 1e-5)
    np.testing.assert_allclose(xp.numpy(layer.y), [exact_softmax(r) for r in x], rtol=1e-13)
    np.testing.assert_array_equal(xp.numpy(layer.t), np.eye(4)[LABELS])
    assert layer.t.dtype == layer.y.dtype


@each_kind
def test_loss_layer_backward_agrees_with_finite_differences_of_forward(xp, kind):
    x, t = batch_of_scores(13, scale=1.0), labels_of(xp, kind)

    def loss(x):
        return float(xp.numpy(SoftmaxWithLoss().forward(array(xp, x), t)))

    layer = SoftmaxWithLoss()
    layer.forward(array(xp, x), t)
    # eps shrinks the slope of forward by eps / y_k, and no y_k is below 1e-2 here.
    assert xp.numpy(layer.y)[np.arange(5), LABELS].min() > 1e-2
    np.testing.assert_allclose(xp.numpy(layer.backward()), slope(loss, x), atol=EPS / 1e-2)


def test_loss_layer_backward_is_y_minus_t_over_the_batch(xp):
    x = np.log([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]])
    layer = SoftmaxWithLoss()
    layer.forward(array(xp, x), array(xp, [0, 1], "int64"))
    expected = np.array([[-0.25, 0.125, 0.125], [0.0625, -0.125, 0.0625]])
    np.testing.assert_allclose(xp.numpy(layer.backward()), expected, rtol=1e-14)
    np.testing.assert_allclose(xp.numpy(layer.backward(-2)), -2 * expected, rtol=1e-14)
    dout = array(xp, 0.5)
    np.testing.assert_allclose(xp.numpy(layer.backward(dout)), expected / 2, rtol=1e-14)


def test_loss_layer_has_a_gradient_where_its_two_halves_have_none(xp):
    x = array(xp, [[1000.0, 0.0]])
    t = array(xp, [[0.0, 1.0]])
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
    loss = layer.forward(array(xp, x), array(xp, t, dtype))
    np.testing.assert_allclose(number(xp, loss), np.log(4), atol=1e-6)
    dx = layer.backward()
    np.testing.assert_allclose(xp.numpy(dx), [0.5, -0.75, 0.25], rtol=1e-14)


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
    """And the inputs are not changed."""
    x, t = array(xp, batch_of_scores(17), dtype), labels_of(xp, kind)
    before = xp.numpy(x).copy(), xp.numpy(t).copy()
    for step, result in every_step(x, t).items():
        assert xp.is_ours(result), step
        assert result.dtype == x.dtype, step
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
