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


def rows(function, x):
    """Apply a function of reference.py to each row."""
    return np.asarray([[float(v) for v in function(reference.exact(row))] for row in x])


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

INF, NAN = np.inf, np.nan
# Exponents, weights and the sum that they come to, which is exact where it is no number.
WEIGHTED = [
    ([1.0, 2.0, 3.0], [1.0, -1.0, 0.5], None),
    ([1.0, 2.0, 3.0], [1.0, 1.0, -1.0], None),
    ([0.0, 50.0, 0.0], [-1.0, -1.0, 0.0], None),
    ([1.0, 800.0, 0.0], [1.0, 0.0, 1.0], None),
    ([NAN, INF, 2.0], [0.0, 0.0, 1.0], None),
    ([5.0, 5.0, -20.0], [1.0, -1.0, 1.0], None),
    ([0.0, -40.0, -50.0], [1.0, 3.0, 0.0], None),
    ([0.0, 0.0, -60.0], [0.25, 0.75, 1.0], None),
    ([1.0, 1.0, 0.0], [1.0, -1.0, 0.0], 0.0),
    ([INF, 1000.0, 0.0], [1.0, -1.0, 0.0], INF),
    ([INF, 1.0, 0.0], [-1.0, 1.0, 0.0], -INF),
    ([INF, INF, 0.0], [1.0, -1.0, 0.0], NAN),
    ([-INF, -INF, 0.0], [2.0, -3.0, 0.0], 0.0),
    ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], 0.0),
    ([NAN, 2.0, 0.0], [1.0, 1.0, 0.0], NAN),
    # Infinite weights, as SciPy has them.
    ([0.0, 1.0, 0.0], [INF, 1.0, 0.0], INF),
    ([0.0, 1.0, 0.0], [-INF, 1.0, 0.0], -INF),
    ([0.0, 1.0, 0.0], [INF, -INF, 0.0], NAN),
    ([0.0, -INF, 0.0], [INF, INF, 0.0], NAN),
    ([0.0, -INF, 0.0], [INF, 1.0, 0.0], INF),
    ([0.0, NAN, 0.0], [INF, 1.0, 0.0], NAN),
    ([0.0, INF, 0.0], [INF, 1.0, 0.0], INF),
    ([0.0, INF, 0.0], [-INF, 1.0, 0.0], NAN),
    ([0.0, INF, 0.0], [1.0, -INF, 0.0], -INF),
    ([0.0, 1.0, 0.0], [NAN, 1.0, 0.0], NAN),
]


def weighted_sum(x, b):
    return mp.fsum(mpf(w) * mp.exp(mpf(v)) for v, w in zip(x, b, strict=True) if w != 0)


def test_logsumexp_with_weights(xp):
    """Each row by itself, also beside others that are infinite or nan."""
    x, b, sums = zip(*WEIGHTED, strict=True)
    sums = [weighted_sum(*row[:2]) if row[2] is None else mpf(row[2]) for row in WEIGHTED]
    log = [float(mp.log(abs(s))) if s else -INF for s in sums]
    sign = [float(mp.sign(s)) for s in sums]
    given, options = xp.asarray(np.asarray(x)), {"axis": 1, "b": xp.asarray(np.asarray(b))}
    value = ps.logsumexp(given, return_sign=True, **options)
    plain, (value, found) = xp.computed((ps.logsumexp(given, **options), value))
    assert_close(xp, value, log, rtol=1e-14)
    assert_close(xp, found, sign)
    assert_close(xp, plain, np.where(np.asarray(sign) < 0, NAN, log), rtol=1e-14)


def test_weights_of_each_kind(xp):
    """b broadcasts, may be integer, takes the dtype of x, and makes it complex."""
    x = RNG.normal(size=(2, 3))
    expected = np.log(([1, 2, 3] * np.exp(x)).sum(axis=1))
    for weights in (xp.asarray([1, 2, 3]), xp.asarray([1, 2, 3], "float32")):
        assert_close(xp, ps.logsumexp(xp.asarray(x), axis=1, b=weights), expected)
    b = xp.asarray(np.asarray([1 - 1j, 2.0, 0.0]))
    value = assert_like(xp, ps.logsumexp(xp.asarray([0.0, 1.0, 5.0]), b=b), (), "complex128")
    np.testing.assert_allclose(value, np.log(1 - 1j + 2 * np.e), rtol=1e-14)


def test_the_sign_of_a_complex_sum(xp):
    z = np.asarray([[1 + 2j, -1 - 3j, 0.5j], [700 + 3j, 699 - 3j, 1 + 0j]])
    sums = [mp.fsum(mp.exp(mpc(v)) for v in row) for row in z]
    size, sign = ps.logsumexp(xp.asarray(z), axis=1, return_sign=True)
    assert_close(xp, size, [float(mp.log(abs(s))) for s in sums], rtol=1e-14)
    unit = assert_like(xp, sign, (2,), "complex128")
    np.testing.assert_allclose(unit, [complex(s / abs(s)) for s in sums], rtol=1e-13)


def test_arrays_of_options_are_checked(xp):
    x, y = xp.asarray(np.zeros((2, 4))), ps.softmax(xp.asarray(np.zeros((2, 3))))
    ones = lambda *shape, dtype=float: xp.asarray(np.ones(shape, dtype))  # noqa: E731
    for error, match, call in (
        (ValueError, r"where has shape \(3, 1\)",
         lambda: ps.softmax(x, where=ones(3, 1, dtype=bool))),
        (TypeError, "where has dtype int64, expected bool",
         lambda: ps.softmax(x, where=ones(2, 4, dtype=np.int64))),
        (ValueError, r"b has shape \(3,\).*does not broadcast", lambda: ps.logsumexp(x, b=ones(3))),
        (TypeError, "b has dtype bool", lambda: ps.logsumexp(x, b=ones(4, dtype=bool))),
        (TypeError, "axis is None, expected an int", lambda: ps.softmax_jacobian(y, axis=None)),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
    for vjp, name in ((ps.softmax_vjp, "y"), (ps.log_softmax_vjp, "log_y")):
        with pytest.raises(ValueError, match=r"dy has shape \(3,\), expected \(2, 3\)"):
            vjp(y, ones(3))
        with pytest.raises(TypeError, match=f"{name} has dtype int64, expected a floating"):
            vjp(xp.asarray([[1, 0]]), ones(1, 2))
        with pytest.raises(TypeError, match="dy has dtype int64, expected a floating"):
            vjp(y, ones(2, 3, dtype=np.int64))


# --------------------------------------------------------------------------- gradients


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
@pytest.mark.parametrize(
    ("n", "axis"),
    [(2, 0), (5, 0), (40, 0), (300, 0), (2, 1), (5, 1), (40, 1), (300, 1), (30_000, 1)],
)
def test_the_gradient_through_a_confident_softmax(xp, axis, n):
    """Of dy - sum(y * dy) nothing is left where y rounds to 1: 1 - y is the sum of the others."""
    for dtype in ("float32", "float64", *xp.halves) if n < 1000 else ("float64",):
        x, dy, expected = confident(n, MARGINS[dtype] if n < 1000 else [20.0])
        if axis == 0:
            x, dy, expected = x.T, dy.T, expected.T
        y = ps.softmax(xp.asarray(x, dtype), axis=axis)
        dx = ps.softmax_vjp(y, xp.asarray(dy, dtype), axis=axis)
        assert_close(xp, dx, expected, dtype, rtol=(32 if n < 1000 else 64) * EPS[dtype])


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


def test_which_path_takes_a_sink(xp):
    paths = {"jax": "jax rules", **dict.fromkeys(("numpy", "torch", "triton"), "numpy tiles")}
    paths |= dict.fromkeys(("numba", "torch-numba", "jax-numba"), "numba rows")
    paths |= dict.fromkeys(("dask", "cubed"), f"{xp.library} chunks")
    x = xp.asarray(np.zeros((2, 3)))
    for name in ("softmax", "log_softmax"):
        for sink in (0.0, xp.asarray(np.zeros((2, 1)))):
            path = paths.get(xp.name, "portable")
            assert kernels.explain(name, x, sink=sink).startswith(f"{path}: ")


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


@pytest.mark.slow("kernels of each layout", "numba", "torch-numba", "jax-numba", "triton")
@pytest.mark.parametrize("n", [3, 40, 700])
def test_many_rows_of_every_infinity_and_nan(xp, n):
    """As in one row: of many, some libraries' sums and maxima are others, which may lose a nan."""
    rows = np.asarray(list(itertools.product([-np.inf, 0.0, 1.0, np.inf, np.nan], repeat=3)))
    values = np.concatenate([rows, np.full((len(rows), n - 3), -1.0)], axis=1)
    x, labels = xp.asarray(values, "float32"), xp.asarray(np.ones(len(rows), int))
    options = {"reduction": "none"}
    sums = (
        ps.logsumexp(x, axis=1),
        ps.logmeanexp(x, axis=1) + float(np.log(n)),
        ps.logsumexp(x, axis=1, b=xp.asarray(np.ones(n), "float32")),
    )
    shares = ps.softmax(x), ps.log_softmax(x), ps.log_softmax(x, temperature=2.0)
    shares += (ps.softmax(x, sink=0.0),)
    others = ps.entropy(x, axis=1), *ps.cross_entropy_value_and_grad(x, labels, **options)
    others += (ps.cross_entropy(x, labels, **options),)
    has_nan, above = np.isnan(values).any(axis=1), (values == np.inf).any(axis=1)
    finite = ~has_nan & ~above & (values > -np.inf).any(axis=1)
    log = np.log(np.exp(values[finite]).sum(axis=1))
    for i, y in enumerate((*sums, *shares, *others)):
        y = xp.numpy(y).astype(float)
        assert np.isnan(y[has_nan]).all(), i
        if i < len(sums):
            assert (y[above & ~has_nan] == np.inf).all(), i
            np.testing.assert_allclose(y[finite], log, rtol=1e-5, atol=1e-6)
        elif i < len(sums) + len(shares):
            assert np.isnan(y[above]).all(), i
    p = np.exp(values[finite] - log[:, None])
    np.testing.assert_allclose(xp.numpy(shares[0])[finite], p, rtol=1e-5, atol=1e-7)
