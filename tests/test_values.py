"""The softmax family against exact values, on every backend."""

from __future__ import annotations

import importlib
import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import reference
from asserts import assert_close, assert_like
from mpmath import mp, mpc, mpf

import portable_softmax as ps
from bench import exact
from portable_softmax import kernels, online
from portable_softmax.compat import scipy_special, torch_functional

pytestmark = pytest.mark.run_on("paths")

RNG = np.random.default_rng(20240607)
ROWS = {
    "plain": RNG.normal(size=(3, 5)),
    "spread": RNG.uniform(-80, 0, size=(3, 5)),
    "offset": 1e4 + RNG.normal(size=(3, 5)),
    "ties": np.asarray([[2.0, 2.0, 2.0], [1.0, 1.0, 0.0]]),
    "confident": np.asarray([[0.0, 33.25, 1.125], [100.0, 0.0, -3.0], [-5.5, -5.25, 40.0]]),
    "one class": np.asarray([[3.0], [-2.0]]),
    "log-probabilities": np.log(RNG.dirichlet(np.ones(6), size=4)),
    "huge": np.asarray([[1e308, -1e308, 0.0], [1e5, -1e5, 1e5]]),
    "minus infinity": np.asarray([[0.0, -np.inf, 1.0]]),
}


def of_equal_length(groups):
    """Join groups of rows with as many classes, for libraries that compile for each shape."""
    joined = {}
    for name, x in groups.items():
        joined.setdefault(x.shape[1], {})[name] = x
    return {", ".join(some): np.concatenate([*some.values()]) for some in joined.values()}


def rows(function, x):
    """Apply a function of reference.py to each row."""
    return np.asarray([[float(v) for v in function(reference.exact(row))] for row in x])


@pytest.mark.parametrize("name", ROWS)
def test_softmax(xp, name):
    x = ROWS[name]
    assert_close(xp, ps.softmax(xp.asarray(x)), rows(reference.softmax, x), rtol=2e-14)


@pytest.mark.parametrize("name", ROWS)
def test_log_softmax(xp, name):
    x = ROWS[name]
    expected = rows(reference.log_softmax, x)
    assert_close(xp, ps.log_softmax(xp.asarray(x)), expected, rtol=2e-15)


@pytest.mark.parametrize("name", ROWS)
def test_logsumexp(xp, name):
    x = ROWS[name]
    expected = [float(reference.logsumexp(reference.exact(row))) for row in x]
    assert_close(xp, ps.logsumexp(xp.asarray(x), axis=1), expected, rtol=1e-15, atol=1e-15)


def test_known_values(xp):
    """The values of the lesson."""
    y = ps.softmax(xp.asarray([[1.0, 2.0, 3.0, 4.0], [9.0, 10.0, 11.0, 13.0]]))
    expected = [
        [0.0320586, 0.08714432, 0.23688282, 0.64391426],
        [0.01521943, 0.0413707, 0.11245721, 0.83095266],
    ]
    assert_close(xp, y, expected, rtol=0, atol=5e-9)


def test_a_confident_row_keeps_its_digits(xp):
    """The entry of [30, 0, 0] at 30 is log1p(2 exp(-30)), where 1 + 2 exp(-30) rounds badly."""
    expected = float(-mp.log1p(2 * mp.exp(-30)))
    for dtype, rtol in (("float64", 1e-15), ("float32", 5e-7)):
        x = xp.asarray([30.0, 0.0, 0.0], dtype)
        actual = assert_like(xp, ps.log_softmax(x), (3,), dtype)
        np.testing.assert_allclose(actual[0], expected, rtol=rtol)
        loss = ps.cross_entropy(x, xp.asarray(np.asarray(0)))
        assert_close(xp, loss, -expected, dtype, rtol=rtol)


def test_the_rounding_of_the_shift_is_put_back(xp):
    """In float32, 80.3 - 0.0123 is off by up to 4e-6, which is 32 units of exp(-80.3)."""
    x = np.asarray([80.3, 0.0123, -0.987], np.float32)
    exact = reference.exact(x)
    expected = reference.log_softmax(exact)
    actual = assert_like(xp, ps.log_softmax(xp.asarray(x)), (3,), "float32")
    assert reference.ulps(actual, expected) <= 4


# Where half a unit of x - max counts; other paths lose what a row spans.
FUSED = ("numpy tiles", "numba rows", "jax rules", "triton rows")


@pytest.mark.slow("XLA compiles each shape", "jax")
@pytest.mark.slow("Numba compiles every layout", "numba", "torch-numba", "jax-numba")
@pytest.mark.slow("Triton interprets element by element", "triton")
@pytest.mark.skipif(not exact.measures("float64"), reason="np.longdouble is float64 here")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("n", "axis"), [(3, 1), (10, 1), (512, 1), (5000, 1), (150, 0)])
def test_probabilities_keep_their_digits_at_any_spread(xp, n, axis, dtype):
    """In float32 half a unit of a difference of 64 is 32 units of its exponential."""
    if xp.name == "jax-numba" and (dtype == "float64") == (n in (10, 5000)):
        pytest.skip("XLA calls the kernels of `numba`: each layout meets one of the dtypes")
    n = n // 2 if xp.name == "triton" else n  # its interpreter takes part after part
    rng = np.random.default_rng(n)
    x = rng.uniform(-100, 0, (30, n))
    x[15:] = 20 * rng.standard_normal((15, n))
    # Near 0 and far, on both sides: an exponential that is subtracted from, or not, or whose
    # difference is exact. The last row has its maximum in another part than the first.
    x += np.linspace(-200, 300, 30)[:, None] - x.max(1, keepdims=True)
    x[:6] += np.asarray([[1e4], [-1e4], [199.7], [200.3], [180.1], [245.3]])
    x[-1] = np.linspace(-90, 250, n)
    x = x.astype(dtype)
    labels = rng.integers(0, n, 30)
    answer = exact.solve(x, labels).softmax
    if axis == 0:
        x, answer = x.T.copy(), answer.T
    arrays = xp.asarray(x), xp.asarray(labels)
    y = xp.numpy(ps.softmax(arrays[0], axis=axis))
    _, grad = ps.cross_entropy_value_and_grad(*arrays, axis=axis, reduction="none")
    fused = kernels.explain("softmax", arrays[0], axis=axis).startswith(FUSED)
    span = np.ptp(x, axis=axis, keepdims=True)
    bound = 5 if fused else np.maximum(6, 2 + 2 * span)
    # XLA's exp of a double is off by more, and the remainder is made of its squares.
    bounds = bound, 7 if xp.library == "jax" and fused else bound
    counted = answer > 1.01 * exact.smallest_normal(dtype)  # XLA takes subnormal numbers for 0
    elsewhere = np.expand_dims(labels, axis) != np.arange(n).reshape(-1, *(1,) * (1 - axis))
    found = (y, counted), (xp.numpy(grad), counted & elsewhere)
    for (values, some), bound in zip(found, bounds, strict=True):
        units = np.abs(values.astype(np.longdouble) - answer) / exact.unit(answer, dtype)
        assert np.all(units <= bound, where=some), np.max(units, where=some, initial=0)


@pytest.mark.slow("Triton interprets element by element", "triton")
@pytest.mark.skipif(not exact.measures("float64"), reason="np.longdouble is float64 here")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_maximum_may_lie_anywhere(xp, dtype):
    """XLA takes the inverse of a sum near the end of the range for 0."""
    rng = np.random.default_rng(3)
    ends = [np.linspace(e - 12, e + 12, 200) for e in (-745, -103, -88, 0, 88, 176, 709, 1418)]
    m = np.concatenate([*ends, np.linspace(-1500, 1500, 401)])
    x = rng.standard_normal((len(m), 3))
    x = (x + m[:, None] - x.max(1, keepdims=True)).astype(dtype)
    labels = rng.integers(0, 3, len(m))
    answer = exact.solve(x, labels).softmax
    arrays = xp.asarray(x), xp.asarray(labels)
    _, grad = ps.cross_entropy_value_and_grad(*arrays, reduction="none")
    tiny = 32 * np.finfo(dtype).eps
    np.testing.assert_allclose(xp.numpy(ps.softmax(arrays[0])), answer, rtol=tiny)
    expected = answer - np.eye(3)[labels]
    np.testing.assert_allclose(xp.numpy(grad), expected, rtol=tiny)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_maximum_of_any_size(xp, dtype):
    """A step of the maximum's own size may be larger than any that exp has a number for."""
    size = 2.0 ** np.arange(12, np.finfo(dtype).maxexp - 1)
    m = np.concatenate([size, 1.25 * size, np.nextafter(2 * size.astype(dtype), 0)])
    x = (m[:, None] * np.asarray([1.0, 1.0, -1.0, 0.0])).astype(dtype)
    p = np.broadcast_to([0.5, 0.5, 0.0, 0.0], x.shape)
    labels, given = np.zeros(len(x), np.int64), xp.asarray(x)
    assert_close(xp, ps.softmax(given), p, dtype, rtol=1e-6)
    assert_close(xp, ps.softmax(xp.asarray(x.T), axis=0).T, p, dtype, rtol=1e-6)
    loss, grad = ps.cross_entropy_value_and_grad(given, xp.asarray(labels), reduction="none")
    assert_close(xp, loss, np.full(len(x), np.log(2)), dtype, rtol=1e-6)
    assert_close(xp, grad, p - [1.0, 0.0, 0.0, 0.0], dtype, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_difference_may_overflow_beside_any_row(xp, dtype):
    """As that of the ends of the range does, in an array with a row of some moderate maximum."""
    largest = float(np.finfo(dtype).max)
    for moderate in (-100.0, 0.0, 60.0, 100.0, 200.0, 650.0, 1000.0):
        x = np.asarray([[largest, -largest], [moderate, moderate]], dtype)
        expected = [[1.0, 0.0], [0.5, 0.5]]
        assert_close(xp, ps.softmax(xp.asarray(x)), expected, dtype, rtol=1e-6)
        assert_close(xp, ps.softmax(xp.asarray(x.T), axis=0).T, expected, dtype, rtol=1e-6)
        loss, grad = ps.cross_entropy_value_and_grad(xp.asarray(x), xp.asarray(np.asarray([0, 1])))
        assert_close(xp, loss, np.log(2) / 2, dtype, rtol=1e-6)
        assert_close(xp, grad, [[0.0, 0.0], [0.25, -0.25]], dtype, rtol=1e-6)


@pytest.mark.slow("Triton interprets element by element", "triton")
@pytest.mark.parametrize("path", ["default", "portable"])
def test_a_long_remainder_keeps_its_digits(xp, path):
    """A sum of many equal terms, one after another or in short blocks, loses hundreds of units."""
    n = 30_000 if xp.name == "triton" else 300_000  # its interpreter takes part after part
    x = np.full((2, n + 1), -16.3, np.float32)
    x[:, 7] = 0
    remainder = -mp.log1p(n * mp.exp(float(x[0, 0])))
    with kernels.portable() if path == "portable" else nullcontext():
        y = xp.numpy(ps.log_softmax(xp.asarray(x)))
        loss = xp.numpy(ps.cross_entropy(xp.asarray(x), xp.asarray([7, 7])))
    assert reference.ulps(y[:, 7], [remainder] * 2) <= 8
    assert reference.ulps(loss, [-remainder]) <= 8


@pytest.mark.parametrize("path", ["default", "portable"])
def test_a_remainder_over_several_axes_keeps_its_digits(xp, path):
    """Sums that are short along each axis are long along all of them."""
    gaps = np.linspace(20, 30, 20, dtype=np.float32)
    x = np.repeat(-gaps[None], 16 * 15 * 15, axis=0).reshape(16, 15, 15, 20)
    x[3, 2, 1] = 0
    remainders = [-mp.log1p((x[..., 0].size - 1) * mp.exp(-float(gap))) for gap in gaps]
    with kernels.portable() if path == "portable" else nullcontext():
        y = xp.numpy(ps.log_softmax(xp.asarray(x), axis=(0, 1, 2)))
    assert reference.ulps(y[3, 2, 1], remainders) <= 8


@pytest.mark.slow("Numba compiles columns and long rows", "numba", "torch-numba")
@pytest.mark.parametrize("path", ["default", "portable"])
@pytest.mark.parametrize(
    ("dtype", "gap", "others", "rows"),
    [
        ("float32", 90.25, 64, 2),
        ("float32", 95.3, 4096, 40),
        ("float32", 99.7, 300_000, 1),
        ("float64", 712.3, 200, 3),
    ],
)
def test_a_remainder_of_subnormal_terms_keeps_its_digits(xp, path, dtype, gap, others, rows):
    """The sum of many exponentials is a normal number where each of them is a subnormal one."""
    on_device = xp.name == "torch-cuda" or (xp.name == "triton-cuda" and path == "portable")
    if xp.library not in ("numpy", "torch", "array_api_strict") or xp.name == "triton" or on_device:
        pytest.skip("XLA takes them for 0; devices and Dask are not asked whether there are any")
    x = np.full((rows, others + 1), -gap, dtype)
    x[:, 7] = 0
    labels = xp.asarray(np.full(rows, 7))
    remainder = -mp.log1p(others * mp.exp(float(x[0, 0])))
    with kernels.portable() if path == "portable" else nullcontext():
        for temperature in (1.0, 0.5):
            scaled = xp.asarray(x * np.asarray(temperature, dtype))
            y = ps.log_softmax(scaled, temperature=temperature)
            actual = assert_like(xp, y, x.shape, dtype)
            assert reference.ulps(actual[:, 7], [remainder] * rows) <= 8
        columns = ps.log_softmax(xp.asarray(np.ascontiguousarray(x.T)), axis=0)
        actual = assert_like(xp, columns, x.T.shape, dtype)
        assert reference.ulps(actual[7], [remainder] * rows) <= 8
        loss, grad = ps.cross_entropy_value_and_grad(xp.asarray(x), labels, reduction="none")
        assert reference.ulps(assert_like(xp, loss, (rows,), dtype), [-remainder] * rows) <= 8
        actual = assert_like(xp, grad, x.shape, dtype)[:, 7]
        assert reference.ulps(actual, [mp.expm1(remainder)] * rows) <= 8


@pytest.mark.slow("XLA compiles each axis", "jax")
@pytest.mark.parametrize("axis", [0, 1, 2, -1, (0, 2), (2, 0, 1), None])
def test_axes(xp, axis):
    """Any axis is the last axis of the array with that axis moved there."""
    x = RNG.normal(size=(3, 4, 5))
    picked = range(3) if axis is None else np.atleast_1d(axis) % 3
    kept = [a for a in range(3) if a not in picked]
    flat = np.transpose(x, [*kept, *picked])
    flat = flat.reshape(*(x.shape[a] for a in kept), -1)
    e = np.exp(flat - flat.max(axis=-1, keepdims=True))
    shape = [x.shape[a] for a in (*kept, *picked)]
    y = (e / e.sum(axis=-1, keepdims=True)).reshape(shape)
    y = np.transpose(y, np.argsort([*kept, *picked]))
    lse = np.log(np.exp(flat).sum(axis=-1))
    assert_close(xp, ps.softmax(xp.asarray(x), axis=axis), y, rtol=1e-13)
    assert_close(xp, ps.log_softmax(xp.asarray(x), axis=axis), np.log(y), rtol=1e-13)
    assert_close(xp, ps.logsumexp(xp.asarray(x), axis=axis), lse, rtol=1e-13)
    kept_shape = [1 if a in picked else n for a, n in enumerate(x.shape)]
    assert_like(
        xp, ps.logsumexp(xp.asarray(x), axis=axis, keepdims=True), tuple(kept_shape), "float64"
    )


@pytest.mark.parametrize("temperature", [0.1, 1, 2.5, 1e6, 1e-250])
def test_temperature(xp, temperature):
    """Softmax of x / T, also where x / T is out of all proportion."""
    x = np.asarray([[1.0, 2.0, 4.0], [0.0, -30.0, 30.0]])
    scaled = [[mpf(v) / mpf(temperature) for v in row] for row in x]
    expected = [[float(v) for v in reference.softmax(row)] for row in scaled]
    assert_close(xp, ps.softmax(xp.asarray(x), temperature=temperature), expected)
    logs = [[float(v) for v in reference.log_softmax(row)] for row in scaled]
    assert_close(xp, ps.log_softmax(xp.asarray(x), temperature=temperature), logs)


@pytest.mark.slow("XLA compiles each shape", "jax")
@pytest.mark.parametrize("path", ["default", "portable"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_log_softmax_with_a_temperature_keeps_its_digits(xp, dtype, path):
    """A quotient of 80 that is off by a unit is 80 units of a confident row's remainder."""
    rng = np.random.default_rng(11)
    furthest = 85 if dtype == "float32" else 700
    for temperature in (0.1, 1 / 3, 0.7, 1.1, 3.0, np.pi, 1e-3, 1e-30, 1e20):
        gaps = temperature * np.concatenate([[0.0], rng.uniform(0.5, 1, 5) * furthest])
        near = temperature * np.concatenate([[0.0], rng.uniform(6, 9, 5)])
        x = (np.stack([gaps, near]) * -1).astype(dtype)

        def function(x, temperature=temperature):
            return ps.log_softmax(x, temperature=temperature)

        if xp.library == "jax" and path == "default":  # XLA merges constants and divisions
            function = importlib.import_module("jax").jit(function)
        with kernels.portable() if path == "portable" else nullcontext():
            y = function(xp.asarray(x))
        actual = assert_like(xp, y, x.shape, dtype)
        for got, row in zip(actual, x, strict=True):
            tempered = [v / mpf(temperature) for v in reference.exact(row)]
            with mp.workdps(700):
                assert reference.ulps(got, reference.log_softmax(tempered)) <= 8


def test_where(xp):
    """Masked entries take no part, whatever they hold."""
    x = np.asarray([[1.0, np.nan, 2.0, np.inf], [0.5, 3.0, -1.0, -np.inf]])
    mask = np.asarray([[True, False, True, False], [True, True, False, False]])
    y = np.zeros((2, 4))
    y[0, [0, 2]] = [float(v) for v in reference.softmax([mpf(1), mpf(2)])]
    y[1, :2] = [float(v) for v in reference.softmax([mpf(0.5), mpf(3)])]
    with np.errstate(divide="ignore"):
        log_y = np.log(y)
    lse = [float(reference.logsumexp(r)) for r in ([mpf(1), mpf(2)], [mpf(0.5), mpf(3)])]
    where = xp.asarray(mask)
    assert_close(xp, ps.softmax(xp.asarray(x), where=where), y)
    assert_close(xp, ps.log_softmax(xp.asarray(x), where=where), log_y)
    assert_close(xp, ps.logsumexp(xp.asarray(x), axis=1, where=where), lse)
    # A mask of one row broadcasts.
    first = xp.asarray(np.asarray([True, False, False, False]))
    assert_close(xp, ps.softmax(xp.asarray(x), where=first), [[1.0, 0, 0, 0]] * 2)
    with pytest.raises(ValueError, match=r"where has shape \(3, 1\)"):
        ps.softmax(xp.asarray(x), where=xp.asarray(np.ones((3, 1), bool)))
    with pytest.raises(TypeError, match="where has dtype int64, expected bool"):
        ps.softmax(xp.asarray(x), where=xp.asarray(np.ones((2, 4), np.int64)))


def test_arrays_of_options_where_nothing_is_reduced(xp):
    """Each entry is a row of its own, a mask or weight of a row one of each."""
    x = np.asarray([[1.0, np.nan, 2.0], [0.5, 3.0, -1.0]])
    given, where = xp.asarray(x), xp.asarray(np.asarray([True, False, True]))
    assert_close(xp, ps.softmax(given, axis=(), where=where), [[1.0, 0.0, 1.0]] * 2)
    assert_close(xp, ps.log_softmax(given, axis=(), where=where), [[0.0, -np.inf, 0.0]] * 2)
    kept = np.where([True, False, True], x, -np.inf)
    assert_close(xp, ps.logsumexp(given, axis=(), where=where), kept)
    sink = np.asarray([0.0, 1.0, -2.0])
    y = ps.softmax(given, axis=(), sink=xp.asarray(sink))
    assert_close(xp, y, 1 / (1 + np.exp(sink - x)))
    b = np.asarray([[2.0], [-0.5]])
    log, sign = ps.logsumexp(given, axis=(), b=xp.asarray(b), return_sign=True)
    assert_close(xp, log, x + np.log(np.abs(b)))
    assert_close(xp, sign, np.where(np.isnan(x), x, np.sign(b)))


# --------------------------------------------------------------------------- weights and signs

WEIGHTED = {
    "positive": ([1.0, 2.0, 3.0], [0.5, 1.0, 2.0]),
    "one negative": ([1.0, 2.0, 3.0], [1.0, -1.0, 0.5]),
    "negative sum": ([1.0, 2.0, 3.0], [1.0, 1.0, -1.0]),
    "all negative": ([0.0, 50.0], [-1.0, -1.0]),
    "zero at the maximum": ([1.0, 800.0, 0.0], [1.0, 0.0, 1.0]),
    "zero hides nan and inf": ([1.0, np.nan, np.inf, 2.0], [1.0, 0.0, 0.0, 1.0]),
    "cancelling maxima": ([5.0, 5.0, -20.0], [1.0, -1.0, 1.0]),
    "a confident row": ([0.0, -40.0], [1.0, 3.0]),
    "maxima that sum to 1": ([0.0, 0.0, -60.0], [0.25, 0.75, 1.0]),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_logsumexp_with_weights(xp, name):
    x, b = WEIGHTED[name]
    terms = [mpf(w) * mp.exp(mpf(v)) for v, w in zip(x, b, strict=True) if w != 0]
    s = mp.fsum(terms)
    options = {"b": xp.asarray(b)}
    value, sign = ps.logsumexp(xp.asarray(x), return_sign=True, **options)
    assert_close(xp, value, float(mp.log(abs(s))), rtol=1e-14)
    assert_close(xp, sign, float(mp.sign(s)))
    plain = ps.logsumexp(xp.asarray(x), **options)
    assert_close(xp, plain, float(mp.log(s)) if s > 0 else np.nan, rtol=1e-14)


@pytest.mark.parametrize(
    ("x", "b", "value", "sign"),
    [
        ([1.0, 1.0], [1.0, -1.0], -np.inf, 0.0),
        ([np.inf, 1000.0], [1.0, -1.0], np.inf, 1.0),
        ([np.inf, 1.0], [-1.0, 1.0], np.inf, -1.0),
        ([np.inf, np.inf], [1.0, -1.0], np.nan, np.nan),
        ([-np.inf, -np.inf], [2.0, -3.0], -np.inf, 0.0),
        ([1.0, 2.0], [0.0, 0.0], -np.inf, 0.0),
        ([np.nan, 2.0], [1.0, 1.0], np.nan, np.nan),
        # Infinite weights, as SciPy has them.
        ([0.0, 1.0], [np.inf, 1.0], np.inf, 1.0),
        ([0.0, 1.0], [-np.inf, 1.0], np.inf, -1.0),
        ([0.0, 1.0], [np.inf, 0.0], np.inf, 1.0),
        ([0.0, 1.0], [np.inf, -np.inf], np.nan, np.nan),
        ([0.0, -np.inf], [np.inf, np.inf], np.nan, np.nan),
        ([0.0, -np.inf], [np.inf, 1.0], np.inf, 1.0),
        ([0.0, np.nan], [np.inf, 1.0], np.nan, np.nan),
        ([0.0, np.inf], [np.inf, 1.0], np.inf, 1.0),
        ([0.0, np.inf], [-np.inf, 1.0], np.nan, np.nan),
        ([0.0, np.inf], [1.0, -np.inf], np.inf, -1.0),
        ([0.0, 1.0], [np.nan, 1.0], np.nan, np.nan),
    ],
)
def test_logsumexp_with_weights_at_the_edges(xp, x, b, value, sign):
    given, options = xp.asarray(x), {"b": xp.asarray(b)}
    actual, plain = xp.computed(
        (ps.logsumexp(given, return_sign=True, **options), ps.logsumexp(given, **options))
    )
    assert_close(xp, actual[0], value)
    assert_close(xp, actual[1], sign)
    assert_close(xp, plain, np.nan if sign < 0 else value)


def test_an_infinite_weight_changes_no_other_row(xp):
    x = RNG.normal(size=(2, 3))
    b = np.asarray([[1.0, 2.0, 3.0], [1.0, np.inf, 3.0]])
    actual = ps.logsumexp(xp.asarray(x), axis=1, b=xp.asarray(b))
    assert_close(xp, actual, [np.log((b[0] * np.exp(x[0])).sum()), np.inf])


def test_sign_without_weights(xp):
    x = xp.asarray([[0.0, 1.0], [-np.inf, -np.inf], [np.nan, 0.0], [np.inf, 0.0]])
    value, sign = ps.logsumexp(x, axis=1, return_sign=True)
    assert_close(xp, value, [np.log1p(np.e), -np.inf, np.nan, np.inf])
    assert_close(xp, sign, [1.0, 0.0, np.nan, 1.0])


def test_weights_of_each_kind(xp):
    """b broadcasts, may be integer, and takes the dtype of x."""
    x = RNG.normal(size=(2, 3))
    b = np.asarray([1, 2, 3])
    expected = np.log((b * np.exp(x)).sum(axis=1))
    for weights in (xp.asarray(b), xp.asarray(b, "float32")):
        assert_close(xp, ps.logsumexp(xp.asarray(x), axis=1, b=weights), expected)
    with pytest.raises(ValueError, match=r"b has shape \(4,\).*does not broadcast"):
        ps.logsumexp(xp.asarray(x), b=xp.asarray(np.ones(4)))
    with pytest.raises(TypeError, match="b has dtype bool"):
        ps.logsumexp(xp.asarray(x), b=xp.asarray(np.ones(3, bool)))


def test_complex_logsumexp(xp):
    z = np.asarray([[1 + 2j, -1 - 3j, 0.5j], [700 + 3j, 699 - 3j, 1 + 0j]])
    sums = [mp.fsum(mp.exp(mpc(v)) for v in row) for row in z]
    value = assert_like(xp, ps.logsumexp(xp.asarray(z), axis=1), (2,), "complex128")
    np.testing.assert_allclose(value, [complex(mp.log(s)) for s in sums], rtol=1e-14)
    size, sign = ps.logsumexp(xp.asarray(z), axis=1, return_sign=True)
    assert_close(xp, size, [float(mp.log(abs(s))) for s in sums], rtol=1e-14)
    unit = assert_like(xp, sign, (2,), "complex128")
    np.testing.assert_allclose(unit, [complex(s / abs(s)) for s in sums], rtol=1e-13)
    b = np.asarray([1 - 1j, 2.0, 0.0])
    weighted = ps.logsumexp(xp.asarray([0.0, 1.0, 5.0]), b=xp.asarray(b))
    value = assert_like(xp, weighted, (), "complex128")
    np.testing.assert_allclose(value, np.log(1 - 1j + 2 * np.e), rtol=1e-14)


# --------------------------------------------------------------------------- gradients


def test_vjps_against_the_jacobian(xp):
    x, dy = RNG.normal(size=(2, 4)), RNG.normal(size=(2, 4))
    p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    jacobian = p[:, :, None] * (np.eye(4) - p[:, None, :])
    y = ps.softmax(xp.asarray(x))
    assert_close(xp, ps.softmax_jacobian(y), jacobian, rtol=1e-12)
    expected = np.einsum("ni,nij->nj", dy, jacobian)
    assert_close(xp, ps.softmax_vjp(y, xp.asarray(dy)), expected, rtol=1e-12, atol=1e-16)
    # d log y_i / dx_j = delta_ij - y_j
    expected = np.einsum("ni,nij->nj", dy, np.eye(4) - p[:, None, :])
    log_y = ps.log_softmax(xp.asarray(x))
    actual = ps.log_softmax_vjp(log_y, xp.asarray(dy))
    assert_close(xp, actual, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_gradient_through_a_confident_log_softmax(xp, dtype, axis):
    """Of dy - y * sum(dy) nothing is left where y rounds to 1; the output has it, as log y."""
    margins = [0.25, 1.0, 4.0, 17.0, 30.0, 60.0]
    rests = [2 * mp.exp(-margin) / (1 + 2 * mp.exp(-margin)) for margin in margins]
    expected = np.asarray([[float(rest), float(-2 * rest), float(rest)] for rest in rests])
    x, dy = np.zeros((6, 3)), np.zeros((6, 3))
    x[:, 1], dy[:, 1] = margins, -2.0
    if axis == 0:
        x, dy, expected = x.T, dy.T, expected.T
    log_y = ps.log_softmax(xp.asarray(x, dtype), axis=axis)
    dx = ps.log_softmax_vjp(log_y, xp.asarray(dy, dtype), axis=axis)
    assert_close(xp, dx, expected, dtype, rtol=16 * np.finfo(dtype).eps)


def confident(n: int, margins: list[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return logits, upstream gradients and exact gradients through a softmax of n classes.

    The maximum is so far above the others, two of which have the same upstream gradient as it.
    """
    x, dy = np.zeros((2, len(margins), n))
    x[:, 1], dy[:, 1] = margins, 2.0
    dy[:, 2:4], dy[:, 0] = 2.0, -1.0
    expected = np.empty_like(x)
    for row, margin in enumerate(margins):
        small = mp.exp(-margin) / (1 + (n - 1) * mp.exp(-margin))
        mean = 2 - small * mp.fsum(2 - mpf(d) for d in np.delete(dy[row], 1))
        p = [small] * n
        p[1] = 1 - (n - 1) * small
        expected[row] = [float(q * (mpf(d) - mean)) for q, d in zip(p, dy[row], strict=True)]
    return x, dy, expected


MARGINS = {
    "float64": [2.0, 10.0, 37.0, 60.0],
    "float32": [2.0, 10.0, 17.0, 40.0],
    "bfloat16": [2.0, 6.0, 10.0, 20.0],
    "float16": [2.0, 3.0, 4.5],
}
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}


@pytest.mark.slow("XLA compiles each shape", "jax")
@pytest.mark.parametrize("n", [2, 5, 40, 300])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", MARGINS)
def test_the_gradient_through_a_confident_softmax(xp, dtype, axis, n):
    """Of dy - sum(y * dy) nothing is left where y rounds to 1: 1 - y is the sum of the others."""
    if dtype not in ("float32", "float64", *xp.halves):
        pytest.skip(f"{xp.name} has no {dtype}")
    if xp.name == "jax-numba" and n != (2, 5, 40, 300)[[*MARGINS].index(dtype) - 2 * axis]:
        pytest.skip("XLA calls the kernels of `numba`: each axis meets each dtype and each n")
    x, dy, expected = confident(n, MARGINS[dtype])
    if axis == 0:
        x, dy, expected = x.T, dy.T, expected.T
    y = ps.softmax(xp.asarray(x, dtype), axis=axis)
    dx = ps.softmax_vjp(y, xp.asarray(dy, dtype), axis=axis)
    assert_close(xp, dx, expected, dtype, rtol=32 * EPS[dtype])


def test_the_gradient_through_a_long_confident_row(xp):
    x, dy, expected = confident(100_000, [20.0])
    dx = ps.softmax_vjp(ps.softmax(xp.asarray(x)), xp.asarray(dy))
    assert_close(xp, dx, expected, rtol=64 * EPS["float64"])


def test_the_gradient_of_what_is_no_softmax(xp):
    """A row with an entry above 3/4 that does not sum to 1, such as beside a sink; an infinite dy.

    For two entries that sum to 1 with a negative one, a constant of dy changes nothing either.
    """
    y = np.asarray([[0.9, 0.05, 0.0], [1.0, 1.0, 0.5], [2.0, -1.5, 0.5], [1.0, 1.0, -1.0]])
    dy = np.asarray([[1.0, 2.0, 3.0], [-1.0, 2.0, 0.5], [1.0, 1.0, 2.0], [3.0, -1.0, 2.0]])
    expected = y * (dy - (y * dy).sum(axis=1, keepdims=True))
    assert_close(xp, ps.softmax_vjp(xp.asarray(y), xp.asarray(dy)), expected, rtol=1e-14)
    y, dy = [[1.0, 1e-20, 0.0], [1.0, 1e-20, 0.0]], [[np.inf, 0.0, 0.0], [1.0, np.nan, 0.0]]
    expected = [[np.nan, -np.inf, np.nan], [np.nan] * 3]
    assert_close(xp, ps.softmax_vjp(xp.asarray(y), xp.asarray(dy)), expected)


@pytest.mark.parametrize("axis", [0, (0, 2), None])
def test_vjps_over_any_axes(xp, axis):
    """Central differences of the forward functions in 50 digits would be slower: NumPy's do."""
    x, dy = RNG.normal(size=(2, 3, 2)), RNG.normal(size=(2, 3, 2))
    pairs = ((ps.softmax, ps.softmax_vjp), (ps.log_softmax, ps.log_softmax_vjp))
    for forward, vjp in pairs:
        expected = np.empty_like(x)
        for index in np.ndindex(x.shape):
            step = np.zeros_like(x)
            step[index] = 1e-5
            slope = (forward(x + step, axis=axis) - forward(x - step, axis=axis)) / 2e-5
            expected[index] = (slope * dy).sum()
        out = forward(xp.asarray(x), axis=axis)
        assert_close(xp, vjp(out, xp.asarray(dy), axis=axis), expected, rtol=1e-6, atol=1e-9)


def test_jacobian_of_any_axis_and_of_a_confident_row(xp):
    x = RNG.normal(size=(3, 2))
    y = ps.softmax(xp.asarray(x), axis=0)
    transposed = ps.softmax(xp.asarray(np.ascontiguousarray(x.T)))
    by_axis = assert_like(xp, ps.softmax_jacobian(y, axis=0), (2, 3, 3), "float64")
    np.testing.assert_allclose(by_axis, xp.numpy(ps.softmax_jacobian(transposed)), rtol=1e-14)
    confident = ps.softmax(xp.asarray([40.0, 0.0], "float32"))
    expected = float(mp.exp(-40) / (1 + mp.exp(-40)) ** 2)
    assert_close(
        xp, ps.softmax_jacobian(confident), np.asarray([[1, -1], [-1, 1]]) * expected, "float32"
    )


def test_vjps_check_their_arguments(xp):
    y = ps.softmax(xp.asarray(np.zeros((2, 3))))
    for vjp, name in ((ps.softmax_vjp, "y"), (ps.log_softmax_vjp, "log_y")):
        with pytest.raises(ValueError, match=r"dy has shape \(3,\), expected \(2, 3\)"):
            vjp(y, xp.asarray(np.zeros(3)))
        with pytest.raises(TypeError, match=f"{name} has dtype int64, expected a floating"):
            vjp(xp.asarray([[1, 0]]), xp.asarray([[1.0, 0.0]]))
        with pytest.raises(TypeError, match="dy has dtype int64, expected a floating"):
            vjp(y, xp.asarray(np.zeros((2, 3), np.int64)))
    with pytest.raises(TypeError, match="axis is None, expected an int"):
        ps.softmax_jacobian(y, axis=None)


# --------------------------------------------------------------------------- sums

# Before NumPy 2.3 a sum is one of pieces of 8,192 terms, which are added one after the other.
BUFFERED = np.lib.NumpyVersion(np.__version__) < "2.3.0"

LAYOUTS = {
    "as given": lambda x: x,
    "transposed": lambda x: x.T,
    "reversed": lambda x: x[::-1, ::-1],
    "every other row": lambda x: x[::2, ...],
    "every other class": lambda x: x[..., ::2],
    "axes in another order": lambda x: x.reshape(x.shape[0], 2, -1).transpose(2, 0, 1),
    "rows repeated": lambda x: np.broadcast_to(x[:1], x.shape),
    "columns repeated": lambda x: np.broadcast_to(x[:, :1], x.shape),
}


@pytest.mark.slow("XLA compiles each layout", "jax")
@pytest.mark.slow("Triton interprets element by element", "triton")
@pytest.mark.parametrize("path", ["default", "portable"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_keep_their_digits_in_every_layout(xp, layout, path):
    """In Fortran order a sum over the last axis adds one entry after another: 158 units are lost.

    What NumPy lays out differently comes to most libraries in C order, and all get a transposed
    view of their own as well.
    """
    if layout.startswith("columns") and xp.lazy:
        pytest.skip("a chunk of it is an ordinary array")
    n = 200 if xp.name == "triton" else 9_000  # its interpreter takes program after program
    values = np.random.default_rng(3).uniform(0, 1, size=(8, n)).astype(np.float32)
    orders = "CF" if xp.library in ("numpy", "array_api_strict", "cupy", "dpnp") else "C"
    for order in orders:
        x = LAYOUTS[layout](np.asarray(values, order=order))
        arrays = [xp.from_numpy(x)]
        if x.ndim == 2:
            arrays.append(xp.from_numpy(np.ascontiguousarray(x.T)).T)
        for axis in range(x.ndim):
            exact = x.astype(np.longdouble)
            terms = np.exp(exact)
            total = terms.sum(axis=axis, keepdims=True)
            lse = np.log(total)
            for array in arrays:
                with kernels.portable() if path == "portable" else nullcontext():
                    y, log_y = (f(array, axis=axis) for f in (ps.softmax, ps.log_softmax))
                    value = ps.logsumexp(array, axis=axis, keepdims=True)
                assert units(xp.numpy(y), terms / total) <= (8 if BUFFERED else 6)
                assert units(xp.numpy(log_y), exact - lse) <= 8
                assert units(xp.numpy(value), lse) <= 6


def units(actual, expected):
    """Return the largest error in units in the last place of float32."""
    return np.max(np.abs(actual - expected) / np.spacing(np.abs(expected).astype(np.float32)))


@pytest.mark.slow("Triton interprets element by element", "triton")
def test_long_columns_keep_their_digits(xp):
    """A running sum of 100 000 rows in float32 is off by thousands of units; ours by a few."""
    n = 10_000 if xp.name == "triton" else 100_000
    x = np.full((n, 2), 0.1, np.float32)
    x[:, 1] = np.linspace(0, 1, n, dtype=np.float32)
    exact = x.astype(np.longdouble)
    lse = np.log(np.exp(exact).sum(axis=0))
    value = assert_like(xp, ps.logsumexp(xp.asarray(x), axis=0), (2,), "float32")
    assert (np.abs(value - lse) <= 4 * np.spacing(lse.astype(np.float32))).all()
    y = assert_like(xp, ps.softmax(xp.asarray(x), axis=0), (n, 2), "float32")
    expected = np.exp(exact - lse)
    assert (np.abs(y - expected) <= 6 * np.spacing(expected.astype(np.float32))).all()


# --------------------------------------------------------------------------- empty axes


def test_an_empty_axis_stays_in_the_graph(xp, torch):
    """The empty result is differentiated as any other, and gives an empty gradient."""
    x = torch.zeros((2, 0, 3), requires_grad=True)
    labels = torch.full((2, 3), -1)
    for y in (
        *(f(x, axis=1) for f in (ps.softmax, ps.log_softmax, ps.logsumexp)),
        ps.logsumexp(x, axis=1, b=torch.ones(1)),
        *ps.logsumexp(x, axis=1, return_sign=True)[:1],
        ps.cross_entropy(x, labels, axis=1, ignore_index=-1),
        ps.cross_entropy(x, torch.zeros((2, 0, 3)), axis=1),
    ):
        assert y.requires_grad
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.shape == x.shape


# --------------------------------------------------------------------------- NumPy's warnings


def backward(dtype, dout):
    layer = ps.SoftmaxWithLoss()
    layer.forward(np.zeros((1, 2), dtype), np.asarray([0]))
    return layer.backward(dout)


def test_documented_infinities_and_nans_raise_no_warnings():
    nll_loss = torch_functional.nll_loss
    zeros, labels = np.zeros((2, 3)), np.asarray([0, 0])
    half = np.asarray([[40000.0, -40000.0]], np.float16)
    small = np.asarray([[0.0, -17.0]], np.float16)
    capped = ps.SoftmaxWithLoss(softcap=30.0)
    capped.forward(small, labels[:1])
    with np.errstate(all="raise"):
        found = [
            (nll_loss(zeros, np.asarray([-100, -100])), np.nan),
            (nll_loss(zeros[:0], labels[:0]), np.nan),
            (nll_loss(zeros - 1e308, labels, reduction="sum"), np.inf),
            (nll_loss(np.float32(zeros) - 1, labels, np.asarray([1e300, 1, 1]), None, -1, None,
                        "none"), [np.inf, np.inf]),
            (nll_loss(np.float16(zeros) - 40000, labels, reduction="sum"), np.inf),
            (scipy_special.logsumexp(np.zeros(2, np.float16), b=1e10), np.inf),
            (online.log_softmax(half, online.fold(half)), [[0.0, -np.inf]]),
            (online.softmax(small, online.fold(small))[:, 0], [1.0]),
            (online.cross_entropy(online.fold(half), half[:, 1:]), [[np.inf]]),
            (backward(np.float16, 2.0**17), [[-np.inf, np.inf]]),
            (backward(np.float32, 1e300), [[-np.inf, np.inf]]),
            (backward(np.float32, np.asarray(1e300)), [[-np.inf, np.inf]]),
            (capped.y[:, 0], [1.0]),
        ]  # fmt: skip
    for answer, expected in found:
        np.testing.assert_array_equal(answer, expected)


@pytest.mark.slow("kernels of each layout", "numba", "torch-numba", "jax-numba")
@pytest.mark.parametrize("n", [3, 40, 700])
def test_many_rows_of_every_infinity_and_nan(xp, n):
    """As in one row: of many, some libraries' sums and maxima are others, which may lose a nan."""
    rows = np.asarray(list(itertools.product([-np.inf, 0.0, 1.0, np.inf, np.nan], repeat=3)))
    values = np.concatenate([rows, np.full((len(rows), n - 3), -1.0)], axis=1)
    x, labels = xp.asarray(values, "float32"), xp.asarray(np.ones(len(rows), int))
    found = {
        "softmax": ps.softmax(x),
        "log_softmax": ps.log_softmax(x),
        "tempered": ps.log_softmax(x, temperature=2.0),
        "beside a sink": ps.softmax(x, sink=0.0),
        "logsumexp": ps.logsumexp(x, axis=1),
        "logmeanexp": ps.logmeanexp(x, axis=1),
        "weighted": ps.logsumexp(x, axis=1, b=xp.asarray(np.ones(n), "float32")),
        "entropy": ps.entropy(x, axis=1),
        "loss": ps.cross_entropy(x, labels, reduction="none"),
        "gradient": ps.cross_entropy_value_and_grad(x, labels, reduction="none")[1],
    }
    has_nan, above = np.isnan(values).any(axis=1), (values == np.inf).any(axis=1)
    finite = ~has_nan & ~above & (values > -np.inf).any(axis=1)
    log = np.log(np.exp(values[finite]).sum(axis=1))
    for name, y in found.items():
        y = xp.numpy(y).astype(float)
        assert np.isnan(y[has_nan]).all(), name
        if name in ("logsumexp", "logmeanexp", "weighted"):
            assert (y[above & ~has_nan] == np.inf).all(), name
            shift = np.log(n) if name == "logmeanexp" else 0.0
            np.testing.assert_allclose(y[finite], log - shift, rtol=1e-5, atol=1e-6)
        elif name in ("softmax", "log_softmax", "tempered", "beside a sink"):
            assert np.isnan(y[above]).all(), name
    p = np.exp(values[finite] - log[:, None])
    np.testing.assert_allclose(xp.numpy(found["softmax"])[finite], p, rtol=1e-5, atol=1e-7)
