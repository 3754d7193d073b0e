"""logsumexp with weights in the kernels of NumPy's arrays: in every layout, of any sign."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import reference
from mpmath import mp, mpf

import portable_softmax as ps
from portable_softmax import kernels
from portable_softmax.kernels import _threads

_SLOW = pytest.mark.slow("Numba compiles each layout")
# Rows one by one, of few classes and across memory; longer than a part; all of an array.
SHAPES = [
    *[((40, 300), -1), ((90, 30), -1), ((90, 3), -1), ((5, 7, 19), 1)],
    *[((4, 9000), -1), ((6, 50, 3), (0, 1)), ((30, 40), None)],
]
PATHS = [
    pytest.param("numpy tiles", marks=pytest.mark.once),
    pytest.param("numba rows", marks=[pytest.mark.numba, _SLOW]),
]
every_path = pytest.mark.parametrize("path", PATHS)
every_shape = pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
RTOL = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-3}


@pytest.fixture(autouse=True)
def _every_size(path):
    with kernels.use(path):
        yield


def case(shape, dtype, of_weights=None, seed=0):
    """Return exponents, and weights of both signs, of which some are 0."""
    rng = np.random.default_rng(seed)
    x = (3 * rng.standard_normal(shape)).astype(dtype)
    b = rng.uniform(0.5, 2.0, shape if of_weights is None else of_weights)
    b[rng.random(b.shape) < 0.3] *= -0.125
    b[rng.random(b.shape) < 0.2] = 0.0
    return x, b.astype("float32" if dtype == "float16" else dtype)


def formula(x, b, axis):
    """Return log|s| and the sign of s in longdouble."""
    x, b = x.astype(np.longdouble), b.astype(np.longdouble)
    top = x.max(axis=axis, keepdims=True)
    s = (b * np.exp(x - top)).sum(axis=axis)
    with np.errstate(divide="ignore"):  # a sum of 0
        return np.log(np.abs(s)) + top.squeeze(axis), np.sign(s)


@every_path
@every_shape
@pytest.mark.parametrize("dtype", list(RTOL))
def test_the_sum_of_weighted_terms(path, shape, axis, dtype):
    x, b = case(shape, dtype)
    mask = np.random.default_rng(1).random(shape) < 0.8
    for where in (None, mask):
        given = {"axis": axis, "b": b, "where": where}
        assert kernels.explain("logsumexp", x, **given).startswith(f"{path}: ")
        value, sign = ps.logsumexp(x, **given, return_sign=True)
        kept = b if where is None else np.where(where, b, 0)
        expected, expected_sign = formula(x, kept, axis)
        assert value.dtype == sign.dtype == x.dtype
        assert value.shape == sign.shape == expected.shape
        np.testing.assert_array_equal(sign, expected_sign)
        tolerance = {"rtol": RTOL[dtype], "atol": 10 * RTOL[dtype]}
        np.testing.assert_allclose(value, expected.astype(float), **tolerance)
        plain = ps.logsumexp(x, **given, keepdims=True)
        assert plain.shape == ps.logsumexp(x, axis=axis, keepdims=True).shape
        of_negative = np.where(sign < 0, np.nan, value)
        np.testing.assert_array_equal(plain.reshape(np.shape(value)), of_negative)


@every_path
def test_the_last_digits_beside_exact_answers(path):
    """A dominant entry, which the others add little to, and terms that cancel in part."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(30, 200))
    b = rng.uniform(0.5, 2.0, (30, 200))
    x[:10, 3], b[:10, 3] = -np.log(b[:10, 3]), b[:10, 3]  # near 0 as a whole
    x[:10, :3], x[:10, 4:] = x[:10, :3] - 30, x[:10, 4:] - 30
    b[20:, ::3] *= -1
    value, sign = ps.logsumexp(x, axis=-1, b=b, return_sign=True)
    for v, one, row, w in zip(value, sign, x, b, strict=True):
        terms = [
            c * mp.exp(e) for c, e in zip(reference.exact(w), reference.exact(row), strict=True)
        ]
        s, size = mp.fsum(terms), mp.fsum(abs(t) for t in terms)
        assert one == (1 if s > 0 else -1)
        # What a rounded sum of the terms may be off, and the logarithm and the maximum.
        bound = 2.0**-52 * (8 * float(size / abs(s)) + 4 * max(1.0, abs(float(row.max()))))
        assert abs(mpf(float(v)) - mp.log(abs(s))) <= bound


@every_path
def test_maxima_of_both_signs_cancel(path):
    """What is left of them has its digits, and a sum of 0 is none."""
    x = np.full((2, 600), -30.0)
    x[:, [5, 70]] = 4.0
    b = np.zeros((2, 600))
    b[:, 5], b[:, 70] = 1.0, -1.0
    b[0, 9:12] = 2.0
    value, sign = ps.logsumexp(x, axis=-1, b=b, return_sign=True)
    np.testing.assert_allclose(value[0], np.log(6.0) - 30.0, rtol=1e-14)
    np.testing.assert_array_equal(sign, [1.0, 0.0])
    assert value[1] == -np.inf


@every_path
@every_shape
def test_infinities_and_what_does_not_count(path, shape, axis):
    if axis is None:
        pytest.skip("one row")
    x, b = case(shape, "float64")
    b = np.abs(b) + 0.25
    axes = sorted({a % len(shape) for a in np.atleast_1d(axis)})
    order = [*(a for a in range(len(shape)) if a not in axes), *axes]
    back, lengths = np.argsort(order), x.transpose(order).shape
    n = int(np.prod([shape[a] for a in axes]))
    rows, weights = (a.transpose(order).reshape(-1, n).copy() for a in (x, b))
    expected = formula(rows, weights, -1)[0].astype(float)
    answers = [np.inf, np.nan, -np.inf]
    rows[0, 1], rows[1, 2], rows[2] = np.inf, np.nan, -np.inf
    if len(rows) > 3:
        rows[3, :2], weights[3, :2] = (np.nan, np.inf), 0.0
        answers.append(formula(rows[3:4, 2:], weights[3:4, 2:], -1)[0][0])
    expected[: len(answers)] = answers
    x, b = (a.reshape(lengths).transpose(back).copy() for a in (rows, weights))
    value, sign = ps.logsumexp(x, axis=axis, b=b, return_sign=True)
    np.testing.assert_allclose(value.reshape(-1), expected, rtol=1e-12, atol=1e-12)
    expected_sign = np.where(np.isnan(expected), np.nan, expected > -np.inf)
    np.testing.assert_array_equal(sign.reshape(-1), expected_sign)
    weightless = ps.logsumexp(x, axis=axis, b=np.zeros_like(b), return_sign=True)
    np.testing.assert_array_equal(weightless[0], -np.inf)
    np.testing.assert_array_equal(weightless[1], 0.0)


@every_path
@pytest.mark.parametrize("weight", [np.inf, -np.inf, np.nan])
def test_a_weight_that_is_no_number(path, weight):
    x, b = case((20, 300), "float64")
    b[4, 7] = weight
    value, sign = ps.logsumexp(x, axis=-1, b=b, return_sign=True)
    expected = np.sign(weight)
    np.testing.assert_array_equal(value[4], abs(weight))
    np.testing.assert_array_equal(sign[4], expected)
    rest = np.arange(20) != 4
    np.testing.assert_allclose(value[rest], formula(x[rest], b[rest], -1)[0].astype(float))


@every_path
@pytest.mark.parametrize(
    ("shape", "axis", "of_weights"),
    [
        ((6, 5, 300), -1, (300,)),
        ((6, 5, 300), -1, (6, 1, 300)),
        ((6, 5, 300), -1, (5, 1)),
        ((6, 5, 300), -1, ()),
        ((6, 30, 40), 1, (30, 1)),
        ((6, 30, 40), 1, (40,)),
        ((60, 20), 1, (20,)),
        ((60, 60), 1, (60,)),
        ((6, 30, 4), (1, 2), (30, 4)),
    ],
    ids=str,
)
def test_weights_are_repeated(path, shape, axis, of_weights):
    x, b = case(shape, "float64", of_weights or (1,))
    b = np.asarray(np.abs(b.reshape(of_weights)) + 0.5)
    whole = np.broadcast_to(b, shape).copy()
    expected = ps.logsumexp(x, axis=axis, b=whole)
    np.testing.assert_array_equal(ps.logsumexp(x, axis=axis, b=b), expected)
    b.flags.writeable = x.flags.writeable = False
    np.testing.assert_array_equal(ps.logsumexp(x, axis=axis, b=b), expected)
    whole_numbers = np.ones(of_weights, np.int64)
    plain = ps.logsumexp(x, axis=axis)
    np.testing.assert_allclose(ps.logsumexp(x, axis=axis, b=whole_numbers), plain, rtol=1e-13)


@every_path
@pytest.mark.parametrize("order", ["F", "strided", "reversed"])
def test_other_layouts_in_memory(path, order):
    x, b = case((24, 14, 33), "float64")
    if order == "F":
        x = np.asfortranarray(x)
    elif order == "strided":
        x, b = x[::2, ::2], b[::2, ::2]
    else:
        x = x[::-1, :, ::-1]
    value, sign = ps.logsumexp(x, axis=1, b=b, return_sign=True)
    expected, expected_sign = formula(x, b, 1)
    np.testing.assert_allclose(value, expected.astype(float), rtol=1e-11, atol=1e-12)
    np.testing.assert_array_equal(sign, expected_sign)


@every_path
def test_a_sign_without_weights(path):
    x = np.random.default_rng(5).standard_normal((5, 300))
    x[1], x[2, 3], x[3, 3] = -np.inf, np.nan, np.inf
    assert kernels.explain("logsumexp", x, axis=1, return_sign=True).startswith(f"{path}: ")
    value, sign = ps.logsumexp(x, axis=1, return_sign=True)
    np.testing.assert_array_equal(value, ps.logsumexp(x, axis=1))
    np.testing.assert_array_equal(sign, [1.0, 0.0, np.nan, 1.0, 1.0])


@pytest.mark.numba
@_SLOW
@pytest.mark.parametrize("path", ["numba rows"])
@pytest.mark.parametrize(("shape", "axis"), [((1000, 10), 1), ((300, 300), 1), ((2, 40, 190), 1)])
def test_the_number_of_threads_changes_no_bit(path, monkeypatch, shape, axis):
    driver = importlib.import_module("portable_softmax.kernels._numba._driver")
    monkeypatch.setattr(driver, "LARGEST", 1 << 12)
    monkeypatch.setattr(driver, "THREADED", 0)
    x, b = case(shape, "float32")
    results = []
    for threads in (1, 2, 3, 1):
        monkeypatch.setattr(_threads, "limit", lambda threads=threads: threads)
        results.append(ps.logsumexp(x, axis=axis, b=b, return_sign=True))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)
