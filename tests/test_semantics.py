"""The table of semantics on every backend.

Its rows are the documented cases of `portable_softmax.testing`, which `check_library` runs too, and
the tests here: the first line of a docstring is `case | answer`.
"""

from __future__ import annotations

import numpy as np
import pytest
import reference
from asserts import assert_close, assert_like, assert_same
from mpmath import mpf
from numpy.testing import assert_array_equal
from test_cross_entropy import three_outputs

import portable_softmax as ps
from portable_softmax import kernels, libraries
from portable_softmax.testing import CASES, RTOL, Arrays, _failure

pytestmark = pytest.mark.run_on("libraries", "paths")

INF, NAN = np.inf, np.nan
FAMILY = (ps.softmax, ps.log_softmax)


def ce(xp, logits, labels, **options):
    """Return the loss and the gradient, having checked that both functions agree on the loss."""
    alone, loss, grad = xp.call(three_outputs, logits, labels, **options)
    assert_same(xp, alone, loss)
    return xp.numpy(loss), xp.numpy(grad)


# --------------------------------------------------------------------------- single calls

# Few calls, so that they run on a library that compiles or plans each.
CHEAP = (
    *("_reduced_axis_of_length_0", "_0_d_input", "_a_row_of_minus_inf_only", "_integers"),
    *("_plus_inf_in_a_row", "_nan_in_a_row", "_options_out_of_range"),
)


# What is added up may be off by a few units more.
SUMMED = ("_sums", "_gradients", "_entropies", "_linear")


def every_case():
    """Yield the cases as parameters."""
    for name, case in CASES.items():
        marks = pytest.mark.cheap if case.__name__ in CHEAP else ()
        yield pytest.param(name, id=case.__name__[1:], marks=marks)


@pytest.mark.slow("Triton interprets element by element", "triton")
@pytest.mark.slow("compilers work on each call", "jax-numba", "numba", "torch-numba")
@pytest.mark.parametrize("case", [*every_case()])
def test_documented(xp, case, monkeypatch, record_property):
    monkeypatch.setitem(RTOL, "float64", 1e-14 if CASES[case].__name__ in SUMMED else 1e-15)
    record_property("row", CASES[case].__name__[1:])  # as the table of results names it
    namespace = libraries.library_of(xp.asarray([0.0])).xp
    for dtype in RTOL:
        arrays = Arrays(namespace, dtype, xp.from_numpy, xp.numpy)
        assert arrays.default == xp.default_float
        assert (found := _failure(case, CASES[case], arrays)) is None, str(found)


# --------------------------------------------------------------------------- dtypes


def assert_half(xp, actual, expected, dtype, slack=0.0):
    """Check that `actual` is within 0.51 units in the last place of `expected`.

    `slack` is what a difference of terms loses in float32, in units of the largest entry.
    """
    expected = np.asarray(expected)
    values = assert_like(xp, actual, expected.shape, dtype).astype(np.float64)
    digits, smallest = {"float16": (10, -24), "bfloat16": (7, -133)}[dtype]
    exponent = np.floor(np.log2(np.maximum(np.abs(expected), 1e-300)))
    unit = 2.0 ** np.maximum(exponent - digits, smallest)
    slack = slack * np.abs(expected).max()
    assert (np.abs(values - expected) <= 0.51 * unit + slack).all()


def test_other_types_of_numpy():
    """object, str, structured and dates on NumPy | TypeError that names the dtype and what to do"""
    for values in (
        np.asarray([1, None], dtype=object),
        np.asarray(["1", "2"]),
        np.zeros(2, dtype=[("a", "f4")]),
        np.asarray(["2020-01-01"], dtype="datetime64[D]"),
    ):
        with pytest.raises(TypeError, match=r"x has dtype .*cast x to float32 or float64 first"):
            ps.softmax(values)


def longdouble(values):
    """Return exact numbers as longdouble, which takes two floats."""
    high = np.asarray([float(v) for v in values])
    low = np.asarray([float(v - mpf(h)) for v, h in zip(values, high, strict=True)])
    return high.astype(np.longdouble) + low


@pytest.mark.parametrize("path", ["default", "portable"])
def test_longdouble(path):
    """longdouble on NumPy | computed and answered in longdouble"""
    x = (np.random.default_rng(4).normal(size=(3, 200)) * 20).astype(np.longdouble)
    x[0] /= 3  # digits that float64 has not
    x[1, 0] = 300  # a confident row
    exact = [[mpf(float(v)) + mpf(float(v - np.float64(v))) for v in row] for row in x]
    labels, ones = np.asarray([5, 0, 7]), np.ones(200, np.longdouble)
    logs = [reference.log_softmax(row) for row in exact]
    lse = [reference.logsumexp(row) for row in exact]
    losses = [-row[k] for row, k in zip(logs, labels, strict=True)]
    with kernels.portable() if path == "portable" else kernels.without("numba rows"):
        loss, grad = ps.cross_entropy_value_and_grad(x, labels, reduction="none")
        y, log_y = ps.softmax(x), ps.log_softmax(x)
        weighted = ps.logsumexp(x, axis=1, b=ones)
        for actual, expected in (
            (log_y, logs), (loss, losses), (ps.logsumexp(x, axis=1), lse), (weighted, lse),
        ):  # fmt: skip
            expected = longdouble(np.ravel(expected)).reshape(actual.shape)
            np.testing.assert_allclose(actual, expected, rtol=8 * np.finfo(np.longdouble).eps)
        jacobian = ps.softmax_jacobian(y)
        for one in (y, log_y, loss, grad, ps.softmax_vjp(y, x), ps.log_softmax_vjp(y, x), jacobian):
            assert one.dtype == np.longdouble
        for one in (ps.logsumexp(x * 1j), ps.logsumexp(x, b=1j * ones)):
            assert one.dtype == np.clongdouble


@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8", ">i4"])
def test_big_endian(dtype):
    """big-endian input | answered in native byte order"""
    x = np.asarray([[0, 1, 2], [3, 1, 0]], dtype)
    native = x.astype(x.dtype.newbyteorder("="))
    labels, weight = np.asarray([0, 2], ">i8"), np.asarray([1, 2, 3], ">f4")
    floating = dtype != ">i4"

    def calls(x):
        y = x if floating else x.astype(float)
        yield from (f(x) for f in FAMILY)
        yield from ps.logsumexp(x, b=weight, return_sign=True)
        yield ps.logsumexp(x, axis=1)
        yield ps.softmax(x[:, :0])
        yield from (f(y, y) for f in (ps.softmax_vjp, ps.log_softmax_vjp))
        yield ps.softmax_jacobian(y)
        for options in ({}, {"weight": weight, "ignore_index": 2}, {"softcap": 2.0}):
            yield from ps.cross_entropy_value_and_grad(x, labels, **options)
        yield from ps.cross_entropy_value_and_grad(x, x)

    for actual, expected in zip(calls(x), calls(native), strict=True):
        assert actual.dtype == expected.dtype
        assert actual.dtype.isnative
        np.testing.assert_allclose(actual, expected, rtol=1e-3 if dtype == ">f2" else 1e-6)


# --------------------------------------------------------------------------- what is an array


class Matrix(np.ndarray):
    """Stands for np.matrix, which warns when it is made: a subclass with another arithmetic."""


class Frame:
    """Stands for a pandas frame, which need not be installed."""

    __module__ = "pandas.core.frame"


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        ([1.0, 2.0], r"list.*numpy\.asarray\(x\)"),
        (1.0, r"float.*numpy\.asarray\(x\)"),
        (None, "NoneType.*pass an array"),
        (np.ma.masked_array([1.0, 2.0], [True, False]), r"MaskedArray.*where=~x\.mask"),
        (np.zeros((1, 2)).view(Matrix), r"atrix.*numpy\.asarray\(x\)"),
        (Frame(), r"pandas.*x\.to_numpy\(\)"),
        (object(), "object.*array API standard"),
    ],
    ids=["list", "scalar", "None", "masked array", "np.matrix", "pandas", "object"],
)
def test_list_scalar_masked_array_matrix_pandas(value, remedy):
    """list, scalar, masked array, np.matrix, pandas | TypeError that names the type and the fix"""
    for f in (*FAMILY, ps.logsumexp):
        with pytest.raises(TypeError, match=f"x is a .*{remedy}"):
            f(value)
    with pytest.raises(TypeError, match="logits is a "):
        ps.cross_entropy(value, np.asarray([0]))
    with pytest.raises(TypeError, match="labels is a "):
        ps.cross_entropy(np.zeros((1, 2)), value)


WRITTEN = ("numpy", "torch", "cupy")  # the libraries whose arrays are written to


def test_out(xp):
    """out: the input itself; part of its memory; another shape, dtype or library | in place; right all the same; ValueError; TypeError; TypeError"""  # noqa: E501
    values = np.random.default_rng(3).normal(size=(4, 5))
    x = xp.asarray(values.copy())
    if xp.library not in WRITTEN:
        with pytest.raises(TypeError, match=r"^out is given, but arrays of .* leave it out"):
            ps.softmax(x, out=x)
        return
    expected = np.exp(values) / np.exp(values).sum(axis=1, keepdims=True)
    assert ps.softmax(x, out=x) is x
    np.testing.assert_allclose(xp.numpy(x), expected, rtol=1e-14)
    both = xp.asarray(np.concatenate([values, values[:1]]))
    ps.softmax(both[:4], out=both[1:])
    np.testing.assert_allclose(xp.numpy(both[1:]), expected, rtol=1e-14)
    with pytest.raises(ValueError, match=r"^out has shape \(5, 5\), expected \(4, 5\)"):
        ps.softmax(x, out=both)
    with pytest.raises(TypeError, match=r"^out has dtype float32, expected float64"):
        ps.softmax(x, out=xp.asarray(values, "float32"))
    with pytest.raises(TypeError, match=r"^out is a list"):
        ps.softmax(x, out=values.tolist())


@pytest.mark.cheap
def test_arrays_of_two_libraries(xp):
    """arrays of two libraries | TypeError; before any computing, naming the argument"""
    if xp.library == "numpy":
        pytest.skip("the other backends each meet NumPy here")
    x = xp.asarray(np.zeros((2, 2)))
    foreign = np.asarray([0, 1])
    if xp.library != "dask":  # which takes labels of NumPy
        with pytest.raises(TypeError, match="labels is an array of numpy and logits one of"):
            ps.cross_entropy(x, foreign)
    with pytest.raises(TypeError, match=f"where is an array of numpy and x one of {xp.library};"):
        ps.softmax(x, where=np.ones((2, 2), bool))
    with pytest.raises(TypeError, match="dy is an array of numpy and y one of"):
        ps.softmax_vjp(x, np.zeros((2, 2)))
    with pytest.raises(TypeError, match="b is an array of numpy and x one of"):
        ps.logsumexp(x, b=np.zeros((2, 2)))
    with pytest.raises(TypeError, match="weight is an array of numpy and logits one of"):
        ps.cross_entropy(x, xp.asarray([0, 1]), weight=np.ones(2))


@pytest.mark.cheap
def test_arrays_of_two_devices(xp):
    """arrays of two devices | ValueError; before any computing, naming the argument"""
    x = xp.asarray(np.zeros((2, 2)))
    labels = xp.other_device(xp.asarray([0, 1]))
    if labels is None:
        pytest.skip(f"{xp.name} has one device here")
    with pytest.raises(ValueError, match=r"labels is on device .* move labels"):
        ps.cross_entropy(x, labels)
    with pytest.raises(ValueError, match="where is on device"):
        ps.softmax(x, where=xp.other_device(xp.asarray(np.ones((2, 2), bool))))
    with pytest.raises(ValueError, match="dy is on device"):
        ps.softmax_vjp(x, xp.other_device(x))


# --------------------------------------------------------------------------- options


def with_jit(xp, function):
    """Return a function of arrays, and under JAX what its compiler makes of it."""
    if xp.library != "jax":
        return (function,)
    import jax

    return function, jax.jit(function)


EXTREMES = (5e-324, 1e-320, 1e-310, 1e-46, 1e-40, 1e39, 1e40, 1e300, 1.7e308)


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.parametrize("temperature", EXTREMES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_temperature_beyond_the_range(xp, dtype, temperature):
    """temperature beyond the compute dtype's range | the limit: uniform, or shared by the maxima; never nan"""  # noqa: E501
    values = [[1.0, 0.0, 1.0, -INF], [0.5, 0.5, -0.5, 0.25]]
    x = xp.asarray(values, dtype)
    if temperature > 1:
        limit = [[1 / 3, 1 / 3, 1 / 3, 0.0], [0.25] * 4]
    else:
        limit = [[0.5, 0.0, 0.5, 0.0], [0.5, 0.5, 0.0, 0.0]]
    rtol = 1e-6 if dtype == "float32" else 1e-14
    for f in with_jit(xp, lambda x: ps.softmax(x, temperature=temperature)):
        assert_close(xp, f(x), limit, dtype)
    for f in with_jit(xp, lambda x: ps.log_softmax(x, temperature=temperature)):
        np.testing.assert_allclose(np.exp(xp.numpy(f(x))), limit, rtol=rtol)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_row_that_spans_more_than_the_range(xp, dtype):
    """x - max beyond the compute dtype's range | divided by the temperature before it overflows"""
    largest = float(np.finfo(dtype).max)
    x = np.asarray([[largest, -largest, 0.0]])
    for temperature in (1.5, largest / 8, largest):
        scaled = [mpf(v) / mpf(temperature) for v in x[0]]
        y = ps.softmax(xp.asarray(x, dtype), temperature=temperature)
        log_y = ps.log_softmax(xp.asarray(x, dtype), temperature=temperature)
        expected = [[float(v) for v in reference.softmax(scaled)]]
        assert_close(xp, y, expected, dtype)
        with np.errstate(over="ignore"):
            expected = np.asarray([[float(v) for v in reference.log_softmax(scaled)]])
            expected = expected.astype(dtype)
        assert_close(xp, log_y, expected, dtype)


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.parametrize("cap", [*EXTREMES, 1e30])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_softcap_beyond_the_range(xp, dtype, cap):
    """softcap beyond the compute dtype's range | the limit: no cap, or logits of 0; never nan"""
    values = np.asarray([[1.0, 1e-3, 0.0], [-2.0, 30.0, 0.5]])
    x, labels = xp.asarray(values, dtype), xp.asarray([0, 1])
    rtol = 1e-5 if dtype == "float32" else 1e-13
    if cap > 1:
        expected = ce(xp, x, labels, reduction="none")
    else:
        # Only at 0 does a logit still change what is capped.
        expected = np.full(2, np.log(3)), np.asarray([[0.0, 0.0, 1 / 3], [0.0] * 3])

    def capped(x):
        options = {"softcap": cap, "reduction": "none", "check_labels": False}
        return ps.cross_entropy_value_and_grad(x, labels, **options)

    for f in with_jit(xp, capped):
        for actual, e in zip(f(x), expected, strict=True):
            np.testing.assert_allclose(xp.numpy(actual), e, rtol=rtol)
    if xp.differentiates:
        grad = differentiated(
            xp, values.astype(dtype), labels, np.ones((), dtype), softcap=cap, reduction="sum"
        )
        np.testing.assert_allclose(grad, expected[1], rtol=rtol)


# --------------------------------------------------------------------------- labels


UPSTREAM = (INF, -INF, NAN)


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.parametrize("dout", UPSTREAM)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_an_ignored_row_with_an_infinite_or_nan_upstream_gradient(xp, reduction, dout):
    """an ignored row with an infinite or nan upstream gradient | gradient exactly 0"""
    x = np.asarray([[0.0, 1.0, 2.0], [NAN, INF, 3.0], [1.0, 1.0, 0.0]])
    labels = xp.asarray([0, -1, 2])
    upstream = np.asarray([1.0, dout, 1.0] if reduction == "none" else dout)
    for options in (
        {},
        {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 2.0},
        {"weight": xp.asarray([1.0, 2.0, 3.0])},
        {"sample_weight": xp.asarray([1.0, 0.0, 2.0]), "ignore_index": None},
    ):
        options = {"ignore_index": -1, "reduction": reduction, **options}
        layer = ps.SoftmaxWithLoss(**options)
        layer.forward(xp.asarray(x), labels)
        found = [xp.numpy(layer.backward(xp.asarray(upstream)))]
        if reduction != "none":
            found.append(xp.numpy(layer.backward(dout)))
        if xp.differentiates and xp.library != "mlx":  # whose `where` multiplies 0 by infinity
            with kernels.portable():
                found.append(differentiated(xp, x, labels, upstream, **options))
        for grad in found:
            assert_array_equal(grad[1], 0.0)
            # The other rows have what they should.
            assert np.isfinite(grad[[0, 2]]).all() == (reduction == "none")


def differentiated(xp, x, labels, upstream, **options):
    """Return the gradient of the loss as the library finds it by itself."""
    if xp.library != "torch":
        options["check_labels"] = False
    return pulled_back(xp, lambda x: ps.cross_entropy(x, labels, **options), x, upstream)


def pulled_back(xp, f, x, upstream):
    """Return the product of an upstream gradient and the Jacobian of f, by the library's means."""
    if xp.library == "torch":
        x = xp.asarray(x).requires_grad_()
        f(x).backward(xp.asarray(upstream))
        return xp.numpy(x.grad)
    if xp.library == "mlx":
        return xp.numpy(xp.xp.vjp(f, [xp.asarray(x)], [xp.asarray(upstream)])[1][0])
    import jax

    slope = xp.program(lambda x, upstream: jax.vjp(f, x)[1](upstream)[0])
    return xp.numpy(slope(xp.asarray(x), xp.asarray(upstream)))


@pytest.mark.slow("two compilers work on each call", "jax-numba")
@pytest.mark.cheap
def test_slopes_of_rows_with_infinities(xp):
    """derivatives of a row of -inf only; +inf in a row; nan in a row | of logsumexp 0; 0; nan; of a loss nan in that row only"""  # noqa: E501
    if not xp.differentiates:
        pytest.skip(f"{xp.name} has no derivatives of its own")
    half, third, nan = [0.5, 0.5], [1 / 3] * 3, [NAN] * 3
    for values, of_logsumexp in (
        ([[-INF, -INF], [0.0, 0.0]], [[0.0, 0.0], half]),
        ([[INF, 0.0], [INF, INF], [INF, -INF], [0.0, 0.0]], [[0.0, 0.0]] * 3 + [half]),
        ([[NAN, 0.0, INF], [0.0, 0.0, 0.0], [1.0, NAN, -INF]], [nan, third, nan]),
    ):
        bad = ~np.isfinite(values).all(axis=1)
        for dtype in ("float32", "float64"):
            x, upstream = np.asarray(values, dtype), np.ones(len(values), dtype)
            slopes = pulled_back(xp, lambda x: ps.logsumexp(x, axis=1), x, upstream)
            np.testing.assert_allclose(slopes, of_logsumexp, rtol=1e-6)
            for label in range(x.shape[1]):
                labels = xp.asarray(np.full(len(x), label))
                slopes = np.isnan(differentiated(xp, x, labels, upstream, reduction="none"))
                assert_array_equal(slopes.all(axis=1), bad)
                assert_array_equal(slopes.any(axis=1), bad)


# --------------------------------------------------------------------------- the rest of the family


def flat(answers):
    """Return all arrays of an answer, nested tuples included, in order."""
    return [a for part in answers for a in flat(part)] if type(answers) is tuple else [answers]


@pytest.mark.slow("XLA compiles many programs", "jax", "jax-numba")
@pytest.mark.slow("Numba compiles every kernel for two half types", "numba", "torch-numba")
@pytest.mark.slow("a graph for each call and dtype", "dask")
def test_half_types(xp):
    """float16, bfloat16 | computed in float32, rounded once to the input's dtype"""
    if not xp.halves:
        pytest.skip(f"{xp.name} has no half types")
    rng = np.random.default_rng(14)
    labels, n = np.arange(4), {"reduction": "none"}
    in_one = (
        lambda x, y, p, w, t: (ps.softmax(x), ps.log_softmax(x), ps.logsumexp(x, axis=1)),
        lambda x, y, p, w, t: ps.cross_entropy(x, t, **n),
        lambda x, y, p, w, t: (ps.entropy(x), ps.kl_divergence(x, y, **n)),
        lambda x, y, p, w, t: (ps.logmeanexp(x, axis=1), ps.logcumsumexp(x)),
        lambda x, y, p, w, t: ps.sigmoid_cross_entropy(x, y, **n),
        lambda x, y, p, w, t: ps.softmax_jacobian(p),
    )
    with_differences = (
        lambda x, y, p, w, t: (ps.entmax(x), ps.sparsemax(x), ps.entmax_vjp(p, y)),
        lambda x, y, p, w, t: ps.entmax_loss_value_and_grad(x, t, sample_weight=w, **n),
        lambda x, y, p, w, t: ps.cross_entropy_value_and_grad(x, t, sample_weight=w, **n),
        lambda x, y, p, w, t: (ps.softmax(x, sink=0.5), ps.log_softmax(x, sink=0.5)),
        lambda x, y, p, w, t: ps.sigmoid_cross_entropy_value_and_grad(x, p, **n),
        lambda x, y, p, w, t: ps.kl_divergence_value_and_grad(x, y, **n),
        lambda x, y, p, w, t: (ps.entropy_value_and_grad(x), ps.logcumsumexp_vjp(x, y)),
    )
    for dtype in xp.halves:
        given = rng.normal(size=(4, 20)), rng.normal(size=(4, 20)), rng.dirichlet(np.ones(20), 4)
        half = [xp.asarray(a, dtype) for a in (*given, [0.5, 1.0, 2.0, 0.25])]
        wide = [xp.numpy(a).astype(np.float64) for a in half]
        for functions, slack in ((in_one, 0.0), (with_differences, 2.0**-20)):
            for f in functions:
                exact = flat(f(*wide, labels))
                found = flat(f(*half, xp.asarray(labels)))
                for actual, expected in zip(found, exact, strict=True):
                    assert_half(xp, actual, expected, dtype, slack)
        many, ones = xp.asarray(np.zeros((4096, 2)), dtype), xp.asarray(np.zeros(100_000), dtype)
        assert_array_equal(xp.numpy(ps.softmax(many, axis=0)).astype(float).sum(axis=0), [1, 1])
        assert_half(xp, ps.logsumexp(ones), np.log(1e5), dtype)
