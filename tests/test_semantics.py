"""The table of semantics: one test per row, named after it, on every backend.

The first line of each docstring is the row: `case | answer`.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import reference
from asserts import assert_close, assert_like, assert_same
from covering import combined
from mpmath import mp, mpf
from numpy.testing import assert_array_equal
from test_cross_entropy import three_outputs

import portable_softmax as ps
from portable_softmax import kernels

pytestmark = pytest.mark.run_on("libraries", "paths")

INF, NAN = np.inf, np.nan
FAMILY = (ps.softmax, ps.log_softmax)


def ce(xp, logits, labels, **options):
    """Return the loss and the gradient, having checked that both functions agree on the loss."""
    alone, loss, grad = xp.call(three_outputs, logits, labels, **options)
    assert_same(xp, alone, loss)
    return xp.numpy(loss), xp.numpy(grad)


# --------------------------------------------------------------------------- shapes


@pytest.mark.cheap
def test_reduced_axis_of_length_0(xp):
    """reduced axis of length 0 | softmax, log_softmax: empty; logsumexp: -inf"""
    x = xp.asarray(np.zeros((2, 0, 3)), "float32")
    for f in FAMILY:
        assert_like(xp, f(x, axis=1), (2, 0, 3), "float32")
    assert_close(xp, ps.logsumexp(x, axis=1), np.full((2, 3), -INF), "float32")
    value, sign = ps.logsumexp(x, axis=1, keepdims=True, return_sign=True)
    assert_close(xp, value, np.full((2, 1, 3), -INF), "float32")
    assert_close(xp, sign, np.zeros((2, 1, 3)), "float32")
    assert_close(xp, ps.logsumexp(xp.asarray(np.zeros(0))), np.asarray(-INF))


def test_empty_batch(xp):
    """empty batch | empty result; mean loss nan, sum 0; gradient empty"""
    x = xp.asarray(np.zeros((0, 3)))
    for f in FAMILY:
        assert_like(xp, f(x, axis=1), (0, 3), "float64")
    assert_like(xp, ps.logsumexp(x, axis=1), (0,), "float64")
    labels = xp.asarray(np.zeros(0), "int64")
    for reduction, expected in (("mean", NAN), ("sum", 0.0)):
        loss, grad = ps.cross_entropy_value_and_grad(x, labels, reduction=reduction)
        assert_close(xp, loss, expected)
        assert_like(xp, grad, (0, 3), "float64")
    assert_like(xp, ps.cross_entropy(x, labels, reduction="none"), (0,), "float64")


@pytest.mark.cheap
def test_0_d_input(xp):
    """0-d input | axis=None works; an axis raises, as an out-of-range axis does"""
    x = xp.asarray(3.0)
    assert_close(xp, ps.softmax(x, axis=None), 1.0)
    assert_close(xp, ps.log_softmax(x, axis=None), 0.0)
    assert_close(xp, ps.logsumexp(x), 3.0)
    assert_close(xp, ps.softmax_vjp(xp.asarray(1.0), xp.asarray(5.0), axis=None), 0.0)
    for f in (*FAMILY, ps.logsumexp):
        with pytest.raises(ValueError, match="axis is 0, but the array has 0 dimensions"):
            f(x, axis=0)
        with pytest.raises(IndexError, match="axis is 2, but the array has 2 dimensions"):
            f(xp.asarray(np.zeros((2, 2))), axis=2)
        with pytest.raises(TypeError, match="axis is '0', expected an int"):
            f(x, axis="0")


def test_no_axis_at_all(xp):
    """axis=() | nothing is reduced: softmax 1, log_softmax 0, logsumexp the input"""
    x = np.asarray([[1.0, -2.0], [3.0, 0.5]])
    assert_close(xp, ps.softmax(xp.asarray(x), axis=()), np.ones((2, 2)))
    assert_close(xp, ps.log_softmax(xp.asarray(x), axis=()), np.zeros((2, 2)))
    assert_close(xp, ps.logsumexp(xp.asarray(x), axis=()), x)


def test_no_class_at_all(xp):
    """class axis of length 0 | every label but ignore_index is out of range"""
    x, labels = xp.asarray(np.zeros((2, 0))), xp.asarray([-1, -1])
    for reduction, expected in (("mean", NAN), ("sum", 0.0), ("none", [0.0, 0.0])):
        for options in ({}, {"label_smoothing": 0.1}, {"z_loss": 0.1, "softcap": 2.0}):
            loss, grad = ce(xp, x, labels, ignore_index=-1, reduction=reduction, **options)
            assert_array_equal(loss, expected)
            assert grad.shape == (2, 0)
    if not xp.lazy:
        with pytest.raises(IndexError, match=r"labels\[0\] is -1, outside \[0, 0\)"):
            ps.cross_entropy(x, labels)
    loss, _ = ce(xp, x, labels, reduction="none", check_labels=False)
    assert_array_equal(loss, [NAN, NAN])


# --------------------------------------------------------------------------- infinities and nan


@pytest.mark.cheap
def test_a_row_of_minus_inf_only(xp):
    """a row of -inf only | softmax nan, logsumexp -inf, as every peer; its gradient 0"""
    values = [[-INF, -INF], [0.0, 0.0]]
    x = xp.asarray(values)
    for t in (1.0, 2.0):
        assert_close(xp, ps.softmax(x, temperature=t), [[NAN, NAN], [0.5, 0.5]])
        assert_close(xp, ps.log_softmax(x, temperature=t), [[NAN, NAN], [-np.log(2)] * 2])
    assert_close(xp, ps.logsumexp(x, axis=1), [-INF, np.log(2)])
    check_slopes(xp, values, [[0.0, 0.0], [0.5, 0.5]])


def test_a_row_fully_masked_by_where(xp):
    """a row fully masked by `where` | softmax 0, log_softmax -inf, logsumexp -inf, gradient 0"""
    x = xp.asarray([[1.0, NAN], [0.0, 0.0]])
    mask = xp.asarray([[False, False], [True, False]])
    y = ps.softmax(x, where=mask)
    log_y = ps.log_softmax(x, where=mask)
    assert_close(xp, y, [[0.0, 0.0], [1.0, 0.0]])
    assert_close(xp, log_y, [[-INF, -INF], [0.0, -INF]])
    assert_close(xp, ps.logsumexp(x, axis=1, where=mask), [-INF, 0.0])
    value, sign = ps.logsumexp(x, axis=1, where=mask, return_sign=True)
    assert_close(xp, value, [-INF, 0.0])
    assert_close(xp, sign, [0.0, 1.0])
    dy = xp.asarray([[3.0, 4.0], [5.0, 6.0]])
    assert_close(xp, ps.softmax_vjp(y, dy), np.zeros((2, 2)))
    assert_close(xp, ps.log_softmax_vjp(log_y, dy), np.zeros((2, 2)))


@pytest.mark.cheap
def test_plus_inf_in_a_row(xp):
    """+inf in a row | softmax nan; logsumexp +inf, its gradient 0"""
    values = [[INF, 0.0], [INF, INF], [INF, -INF], [0.0, 0.0]]
    x = xp.asarray(values)
    expected = np.full((4, 2), NAN)
    expected[3] = 0.5
    for t in (1.0, 2.0):
        assert_close(xp, ps.softmax(x, temperature=t), expected)
        assert_close(xp, ps.log_softmax(x, temperature=t), np.log(expected))
    assert_close(xp, ps.logsumexp(x, axis=1), [INF, INF, INF, np.log(2)])
    check_slopes(xp, values, [[0.0, 0.0]] * 3 + [[0.5, 0.5]])


def test_nan_in_a_row(xp):
    """nan in a row | that row nan, no other row touched"""
    values = [[NAN, 0.0, INF], [0.0, 0.0, 0.0], [1.0, NAN, -INF]]
    x = xp.asarray(values)
    third = 1 / 3
    for t in (1.0, 2.0):
        assert_close(xp, ps.softmax(x, temperature=t), [[NAN] * 3, [third] * 3, [NAN] * 3])
        logs = [[NAN] * 3, [-np.log(3)] * 3, [NAN] * 3]
        assert_close(xp, ps.log_softmax(x, temperature=t), logs)
    assert_close(xp, ps.logsumexp(x, axis=1), [NAN, np.log(3), NAN])
    check_slopes(xp, values, [[NAN] * 3, [third] * 3, [NAN] * 3])
    loss, grad = ce(xp, x, xp.asarray([0, 0, 0]), reduction="none")
    assert_array_equal(np.isnan(loss), [True, False, True])
    assert_array_equal(np.isnan(grad).all(axis=1), [True, False, True])
    assert not np.isnan(grad[1]).any()


# --------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8"])
@pytest.mark.cheap
def test_integers(xp, dtype):
    """integers | promoted to the library's default floating dtype before anything is subtracted"""
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    ends = [[high, low]] if dtype in ("int8", "uint8") else [[100, 30]]
    x = xp.asarray(ends, dtype)
    wide = np.asarray(ends, np.float64)
    gap = wide[0, 0] - wide[0, 1]
    default = xp.default_float
    tiny = 0.0 if default == "float32" and gap > 104 else np.exp(-gap)  # below float32's range
    assert_close(xp, ps.softmax(x), [[1.0, tiny]], default)
    assert_close(xp, ps.log_softmax(x), [[-tiny, -gap]], default)
    assert_close(xp, ps.logsumexp(x, axis=1), [wide[0, 0]], default)
    loss, _ = ps.cross_entropy_value_and_grad(x, xp.asarray([1]))
    assert_close(xp, loss, gap, default)


@pytest.mark.slow("Numba compiles every kernel for two half types", "numba", "torch-numba")
def test_half_types(xp):
    """float16, bfloat16 | computed in float32, rounded once to the input's dtype"""
    if not xp.halves:
        pytest.skip(f"{xp.name} has no half types")
    rng = np.random.default_rng(0)
    for dtype in xp.halves:
        x = xp.asarray(rng.normal(size=(4, 300)), dtype)
        exact = xp.numpy(x).astype(np.float64)
        e = np.exp(exact - exact.max(axis=1, keepdims=True))
        assert_half(xp, ps.softmax(x), e / e.sum(axis=1, keepdims=True), dtype)
        lse = np.log(np.exp(exact).sum(axis=1, keepdims=True))
        assert_half(xp, ps.logsumexp(x, axis=1, keepdims=True), lse, dtype)
        assert_half(xp, ps.log_softmax(x), exact - lse, dtype)
        labels = np.arange(4)
        loss, grad = ps.cross_entropy_value_and_grad(x, xp.asarray(labels), reduction="none")
        assert_half(xp, loss, (lse - exact)[labels, labels], dtype)
        assert_like(xp, grad, (4, 300), dtype)
        many = xp.asarray(np.zeros((4096, 2)), dtype)
        columns = xp.numpy(ps.softmax(many, axis=0)).astype(np.float64).sum(axis=0)
        assert_array_equal(columns, [1.0, 1.0])
        ones = xp.asarray(np.zeros(100_000), dtype)
        assert_half(xp, ps.logsumexp(ones), np.log(1e5), dtype)


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


@pytest.mark.parametrize("answer", ["float32", "float64"])
def test_dtype(xp, answer):
    """dtype | the result's, out of the precision that is computed in or, if it is wider, in dtype; the gradient keeps the logits' dtype"""  # noqa: E501
    rng = np.random.default_rng(12)
    limit = {"float32": 8 * 2.0**-24, "float64": 8 * 2.0**-53}[answer]
    dtype = xp.asarray(np.zeros(()), answer).dtype
    for given in ("float32", "float64", *xp.halves):
        x = xp.asarray(rng.normal(size=(3, 4)), given)
        exact = [reference.exact(row) for row in xp.numpy(x)]
        logs = np.asarray([[float(v) for v in reference.log_softmax(row)] for row in exact])
        lse = [float(reference.logsumexp(row)) for row in exact]
        assert_close(xp, ps.log_softmax(x, dtype=dtype), logs, answer, rtol=limit)
        assert_close(xp, ps.softmax(x, dtype=dtype), np.exp(logs), answer, rtol=limit)
        assert_close(xp, ps.logsumexp(x, axis=1, dtype=dtype), lse, answer, rtol=limit)
        options = {"reduction": "none", "dtype": dtype}
        loss, grad = ps.cross_entropy_value_and_grad(x, xp.asarray([0, 1, 3]), **options)
        assert_close(xp, loss, -logs[[0, 1, 2], [0, 1, 3]], answer, rtol=limit)
        assert_like(xp, grad, (3, 4), given)


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex128"])
def test_dtype_that_is_not_floating(xp, dtype):
    """dtype that is no real floating one of the library | TypeError"""
    x, wrong = xp.asarray(np.zeros((2, 2))), xp.asarray(np.zeros(()), dtype).dtype
    for f in (*FAMILY, ps.logsumexp):
        for given in (wrong, "float33"):
            with pytest.raises(TypeError, match=r"dtype is .*expected a real floating dtype"):
                f(x, dtype=given)
    with pytest.raises(TypeError, match=rf"(?i)dtype is .*{dtype}"):
        ps.cross_entropy(x, xp.asarray([0, 1]), dtype=wrong)


@pytest.mark.parametrize("dtype", ["bool", "complex128"])
def test_bool_complex_object_str(xp, dtype):
    """bool, complex (logsumexp takes complex, as SciPy), object, str | TypeError that names the dtype and what to do"""  # noqa: E501
    x = xp.asarray(np.ones((2, 2)), dtype)
    for f in (*FAMILY, ps.softmax_jacobian):
        with pytest.raises(TypeError, match=rf"has dtype {dtype}, expected .*: "):
            f(x)
    with pytest.raises(TypeError, match=f"logits has dtype {dtype}"):
        ps.cross_entropy(x, xp.asarray([0, 1]))
    if dtype == "bool":
        with pytest.raises(TypeError, match="x has dtype bool"):
            ps.logsumexp(x)
    else:
        assert_like(xp, ps.logsumexp(x), (), "complex128")


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
    rng = np.random.default_rng(4)
    x = (rng.normal(size=(3, 200)) * 20).astype(np.longdouble)
    x[0] /= 3  # digits that float64 has not
    x[1, 0] = 300  # a confident row
    exact = [[mpf(float(v)) + mpf(float(v - np.float64(v))) for v in row] for row in x]
    labels = np.asarray([5, 0, 7])
    ulp = np.finfo(np.longdouble).eps
    by_span = (2 + 2 * float(np.ptp(x, axis=1).max())) * ulp  # what softmax keeps

    def check(actual, expected, rtol=8 * ulp):
        assert actual.dtype == np.longdouble
        expected = longdouble(np.ravel(expected)).reshape(np.shape(actual))
        np.testing.assert_allclose(actual, expected, rtol=rtol)

    with kernels.portable() if path == "portable" else kernels.without("numba rows"):
        for temperature in (1.0, 0.7):
            rows = [[v / mpf(temperature) for v in row] for row in exact]
            y, log_y = (f(x, temperature=temperature) for f in FAMILY)
            check(y, [reference.softmax(row) for row in rows], 2 * by_span)
            check(log_y, [reference.log_softmax(row) for row in rows])
        check(ps.logsumexp(x, axis=1), [reference.logsumexp(row) for row in exact])
        ones = np.ones(200, np.longdouble)
        check(ps.logsumexp(x, axis=1, b=ones), [reference.logsumexp(row) for row in exact])
        losses = [-reference.log_softmax(row)[k] for row, k in zip(exact, labels, strict=True)]
        loss, grad = ps.cross_entropy_value_and_grad(x, labels, reduction="none")
        check(loss, losses)
        assert_array_equal(loss, ps.cross_entropy(x, labels, reduction="none"))
        slopes = [reference.softmax(row) for row in exact]
        for row, k in zip(slopes, labels, strict=True):
            row[k] = -mp.fsum(v for j, v in enumerate(row) if j != k)
        check(grad, slopes, by_span)
        y, log_y = ps.softmax(x), ps.log_softmax(x)
        for f, out in ((ps.softmax_vjp, y), (ps.log_softmax_vjp, log_y)):
            assert f(out, x).dtype == np.longdouble
        assert ps.softmax_jacobian(y).dtype == np.longdouble
        assert ps.logsumexp(x * 1j).dtype == np.clongdouble
        assert ps.logsumexp(x, b=1j * ones).dtype == np.clongdouble


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


LAYOUTS = {
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "reversed": lambda a: np.ascontiguousarray(a[::-1, ::-1])[::-1, ::-1],
    "Fortran-order": np.asfortranarray,
    "read-only": lambda a: _frozen(a.copy()),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "offset": lambda a: np.concatenate([a[:1], a])[1:],
}


def _frozen(a):
    a.flags.writeable = False
    return a


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 7), (300, 700), (1, 9), (9, 1)])
def test_strided_reversed_fortran_read_only_big_endian(layout, shape):
    """strided, reversed, Fortran-order, read-only, big-endian input | right answer; input bytes never change"""  # noqa: E501
    rng = np.random.default_rng(1)
    plain = rng.normal(size=shape)
    x = LAYOUTS[layout](plain)
    labels = rng.integers(shape[1], size=shape[0])
    before = x.tobytes(), labels.tobytes()
    for axis in (0, 1):
        for f in (*FAMILY, ps.logsumexp):
            y = f(x, axis=axis)
            np.testing.assert_allclose(y, f(plain, axis=axis), rtol=1e-13)
            assert y.dtype == np.float64
            assert y.dtype.isnative
    y, dy = ps.softmax(x), LAYOUTS[layout](plain[::-1].copy())
    np.testing.assert_allclose(
        ps.softmax_vjp(y, dy), ps.softmax_vjp(ps.softmax(plain), dy.astype("f8")), atol=1e-15
    )
    loss, grad = ps.cross_entropy_value_and_grad(x, labels)
    expected = ps.cross_entropy_value_and_grad(plain, labels)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-13)
    np.testing.assert_allclose(grad, expected[1], rtol=1e-13)
    assert (x.tobytes(), labels.tobytes()) == before


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


def test_torch_and_jax_views_and_inputs(xp):
    """transposed views and inputs of every library | right answer; inputs never change"""
    rng = np.random.default_rng(2)
    values = rng.normal(size=(6, 5))
    x = xp.asarray(values)
    for f in FAMILY:
        np.testing.assert_allclose(
            xp.numpy(f(x.T, axis=0)), xp.numpy(f(x, axis=1)).T, rtol=1e-14, atol=0
        )
    labels, weight = xp.asarray([0, 1, 2, 3, 4, -1]), xp.asarray(np.arange(1.0, 6.0))
    mask = xp.asarray(np.asarray([[True, True, True, True, True]]))
    ps.cross_entropy_value_and_grad(
        x, labels, weight=weight, where=mask, ignore_index=-1, softcap=3.0, z_loss=0.1
    )
    assert_array_equal(xp.numpy(x), values)
    assert_array_equal(xp.numpy(labels), [0, 1, 2, 3, 4, -1])
    assert_array_equal(xp.numpy(weight), np.arange(1.0, 6.0))


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


@pytest.mark.parametrize("value", [0, 0.0, -1.0, NAN, INF, -INF])
def test_temperature_out_of_range(xp, value):
    """temperature <= 0 or nan | ValueError naming value and range"""
    for f in FAMILY:
        with pytest.raises(ValueError, match=rf"temperature is {value}.*\(0, inf\)"):
            f(xp.asarray([0.0, 1.0]), temperature=value)


@pytest.mark.cheap
def test_options_out_of_range(xp):
    """label_smoothing outside [0, 1]; unknown reduction; z_loss < 0; softcap <= 0 | ValueError naming value and range"""  # noqa: E501
    x, labels = xp.asarray(np.zeros((2, 3))), xp.asarray([0, 1])
    for options, message in (
        ({"label_smoothing": 1.5}, r"label_smoothing is 1\.5.*\[0, 1\]"),
        ({"label_smoothing": -0.1}, r"label_smoothing is -0\.1"),
        ({"label_smoothing": NAN}, "label_smoothing is nan"),
        ({"reduction": "avg"}, "reduction is 'avg'.*'mean', 'sum', 'none'"),
        ({"reduction": None}, "reduction is None"),
        ({"z_loss": -1.0}, r"z_loss is -1\.0.*\[0, inf\)"),
        ({"softcap": 0.0}, r"softcap is 0\.0.*\(0, inf\)"),
        ({"softcap": -3}, r"softcap is -3"),
    ):
        with pytest.raises(ValueError, match=message):
            ps.cross_entropy(x, labels, **options)


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


@pytest.mark.parametrize(
    "number",
    [10**400, -(10**400), 10**5000, Fraction(10**400, 3)],
    ids=["1e400", "-1e400", "1e5000", "Fraction"],
)
def test_a_number_too_large_for_a_float(xp, number):
    """a number too large for a float | ValueError naming the argument and its range"""
    x, labels = xp.asarray(np.zeros((2, 3))), xp.asarray([0, 1])
    for f in FAMILY:
        with pytest.raises(ValueError, match=r"temperature is beyond .* float, .*\(0, inf\)"):
            f(x, temperature=number)
    for name in ("softcap", "label_smoothing", "z_loss"):
        with pytest.raises(ValueError, match=f"{name} is beyond the range of a float"):
            ps.cross_entropy(x, labels, **{name: number})


# --------------------------------------------------------------------------- labels


@pytest.mark.parametrize("bad", [3, -1, 127])
@pytest.mark.parametrize("dtype", ["int8", "int64"])
def test_label_out_of_range(xp, bad, dtype):
    """label >= C or < 0 and not ignore_index | IndexError naming the label, its position and C; under tracing and lazily, nan there"""  # noqa: E501
    x = xp.asarray(np.zeros((2, 2, 3)))
    labels = xp.asarray([[0, 1], [2, bad]], dtype)
    expected = [[np.log(3), np.log(3)], [np.log(3), NAN]]
    if not xp.lazy:
        with pytest.raises(IndexError, match=rf"labels\[1, 1\] is {bad}, outside \[0, 3\)"):
            ps.cross_entropy(x, labels)
        single = xp.asarray(np.asarray(bad), dtype)
        with pytest.raises(IndexError, match=rf"the label is {bad}"):
            ps.cross_entropy(xp.asarray(np.zeros(3)), single)
    unchecked = {} if xp.lazy else {"check_labels": False}
    loss, grad = ce(xp, x, labels, reduction="none", **unchecked)
    np.testing.assert_allclose(loss, expected, rtol=1e-14)
    assert np.isnan(grad[1, 1]).all()
    assert not np.isnan(np.delete(grad.reshape(4, 3), 3, axis=0)).any()


def test_negative_label_beside_many_classes(xp):
    """label -1 in int8 beside 300 classes | an error like any other label out of range"""
    x, labels = xp.asarray(np.zeros((2, 300))), xp.asarray([5, -1], "int8")
    if not xp.lazy:
        with pytest.raises(IndexError, match=r"labels\[1\] is -1, outside \[0, 300\)"):
            ps.cross_entropy(x, labels)
    unchecked = {} if xp.lazy else {"check_labels": False}
    loss, grad = ce(xp, x, labels, reduction="none", **unchecked)
    np.testing.assert_allclose(loss, [np.log(300), NAN], rtol=1e-14)
    assert np.isnan(grad[1]).all()


def test_label_of_a_masked_class(xp):
    """label of a class that `where` masks out | an error like a label out of range"""
    x = xp.asarray(np.zeros((2, 3)))
    mask = xp.asarray([[True, True, False], [True, True, True]])
    labels = xp.asarray([2, 2])
    if not xp.lazy:
        with pytest.raises(IndexError, match=r"labels\[0\] is 2, a class that where masks out"):
            ps.cross_entropy(x, labels, where=mask)
    loss, grad = ce(xp, x, labels, where=mask, reduction="none", check_labels=False)
    np.testing.assert_allclose(loss, [NAN, np.log(3)], rtol=1e-14)
    assert_array_equal(np.isnan(grad[1]), [False] * 3)


@pytest.mark.parametrize("dtype", ["bool", "float32", "float64"])
def test_label_dtype_bool_or_floating(xp, dtype):
    """label dtype bool or floating of index shape | TypeError"""
    with pytest.raises(TypeError, match=f"labels have dtype {dtype}.*cast them"):
        ps.cross_entropy(xp.asarray(np.zeros((2, 3))), xp.asarray([0, 1], dtype))


@pytest.mark.slow("XLA compiles each dtype of labels", "jax")
def test_ignore_index(xp):
    """ignore_index | may lie outside [0, C); compared without wrap-around for unsigned labels"""
    x = np.asarray([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0], [0.0, 5.0, 0.0]])
    lse = np.log(np.exp(x).sum(axis=1))
    for ignored in (-100, 1, 3, 255):
        labels = xp.asarray([2, ignored, 0])
        loss, grad = ce(xp, xp.asarray(x), labels, ignore_index=ignored)
        np.testing.assert_allclose(loss, ((lse[0] - 2.0) + lse[2]) / 2, rtol=1e-13)
        assert_array_equal(grad[1], 0.0)
    # 255 is what -1 would become in eight unsigned bits.
    unsigned = xp.asarray([2, 255, 0], "uint8")
    if not xp.lazy:
        with pytest.raises(IndexError, match=r"labels\[1\] is 255"):
            ps.cross_entropy(xp.asarray(x), unsigned, ignore_index=-1)
    loss, _ = ce(xp, xp.asarray(x), unsigned, ignore_index=-1, check_labels=False, reduction="none")
    assert_array_equal(np.isnan(loss), [False, True, False])
    loss, _ = ce(xp, xp.asarray(x), unsigned, ignore_index=255, reduction="none")
    np.testing.assert_allclose(loss, [lse[0] - 2.0, 0.0, lse[2]], rtol=1e-13)
    # As int64 it would be another number, as which labels are compared only by mistake.
    for ignored in (2**63, 2**63 + 5, 2**64 - 1):
        wide = xp.asarray(np.asarray([2, ignored, 0], np.uint64))
        for weight in (None, xp.asarray(np.ones(3))):
            loss, grad = ce(
                xp, xp.asarray(x), wide, ignore_index=ignored, reduction="none", weight=weight
            )
            np.testing.assert_allclose(loss, [lse[0] - 2.0, 0.0, lse[2]], rtol=1e-13)
            assert_array_equal(grad[1], 0.0)


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.parametrize("hidden", [NAN, INF, -INF])
def test_a_position_of_weight_0(xp, hidden):
    """sample_weight 0 | the position is ignored: no effect on loss and mean, gradient exactly 0, whatever its logits and label"""  # noqa: E501
    x = np.asarray([[0.0, 1.0, 2.0], [hidden, hidden, 0.0], [3.0, 0.0, hidden]])
    x[2] = 1.0, 0.5, -2.0
    samples, t = xp.asarray([2.0, 0.0, 0.5]), np.eye(3)[[0, 1, 2]]
    t[1] = hidden
    kinds = {"index": np.asarray([0, 7, 2]), "probabilities": t}
    terms = {
        "": {},
        "more": {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 4.0},
        "weight": {"weight": xp.asarray([1.0, 3.0, 0.5])},
    }
    for kind, reduction, name in combined(
        xp, (*kinds,), ("mean", "sum", "none"), (*terms,), strength=2
    ):
        labels, options = kinds[kind], {"reduction": reduction, **terms[name]}
        loss, grad = ce(xp, xp.asarray(x), xp.asarray(labels), sample_weight=samples, **options)
        kept = xp.asarray(x[[0, 2]]), xp.asarray(labels[[0, 2]])
        few = xp.asarray([2.0, 0.5])
        alone, slope = ce(xp, *kept, sample_weight=few, **options)
        if reduction == "none":
            assert loss[1] == 0.0
            loss = loss[[0, 2]]
        np.testing.assert_allclose(loss, alone, rtol=1e-14)
        assert_array_equal(grad[1], 0.0)
        np.testing.assert_allclose(grad[[0, 2]], slope, rtol=1e-14)


def test_sample_weight_of_another_kind(xp):
    """sample_weight of another shape, or of dtype bool or complex | ValueError; TypeError"""
    x, labels = xp.asarray(np.zeros((2, 3))), xp.asarray([0, 1])
    for wrong in (np.ones(3), np.ones((2, 1)), np.ones(()), np.ones((2, 3))):
        with pytest.raises(ValueError, match=r"sample_weight has shape .*, expected \(2,\): one"):
            ps.cross_entropy(x, labels, sample_weight=xp.asarray(wrong))
    for dtype in ("bool", "complex128"):
        with pytest.raises(TypeError, match=f"sample_weight has dtype {dtype}, expected"):
            ps.cross_entropy(x, labels, sample_weight=xp.asarray(np.ones(2), dtype))


@pytest.mark.parametrize("hidden", [NAN, INF, -INF])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_ignored_row_holding_nan_or_inf(xp, hidden, smoothing):
    """an ignored row holding nan or inf | no effect on the loss; gradient exactly 0"""
    x = np.asarray([[0.0, 1.0], [hidden, hidden], [1.0, hidden]])
    options = {"label_smoothing": smoothing, "z_loss": 0.1, "softcap": 4.0}
    alone, grad_alone = ce(xp, xp.asarray(x[:1]), xp.asarray([0]), **options)
    for weight in (None, xp.asarray([0.5, 2.0])):
        more = {"ignore_index": -1, "weight": weight, **options}
        loss, grad = ce(xp, xp.asarray(x), xp.asarray([0, -1, -1]), **more)
        assert_array_equal(grad[1:], 0.0)
        assert np.isfinite(loss)
        if weight is None:
            np.testing.assert_allclose(loss, alone, rtol=1e-15)
            np.testing.assert_allclose(grad[:1], grad_alone, rtol=1e-15)


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
        if xp.differentiates and xp.library != "mlx":
            with kernels.portable():
                found.append(differentiated(xp, x, labels, upstream, **options))
        for grad in found:
            assert_array_equal(grad[1], 0.0)
            # The other rows have what they should.
            assert np.isfinite(grad[[0, 2]]).all() == (reduction == "none")
    if xp.library == "mlx":
        pytest.skip("MLX's own derivative of `where` multiplies 0 by infinity; the formula passed")


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


def check_slopes(xp, values, of_logsumexp):
    """Check the library's derivatives: that of a loss is nan in every row but the finite ones."""
    if not xp.differentiates:
        return
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


@pytest.mark.slow("Triton interprets element by element", "triton")
@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.parametrize("odd", UPSTREAM)
def test_an_infinite_or_nan_weight_of_a_class_that_no_label_names(xp, odd):
    """an infinite or nan weight of a class that no label names, without smoothing | no effect, loss and gradient finite"""  # noqa: E501
    x = np.random.default_rng(6).normal(size=(3, 4))
    labels = np.asarray([0, 2, 0])
    kinds = {
        "index": (labels, {}),
        "probabilities": (np.eye(4)[labels], {}),
        "one-hot": (np.eye(4, dtype=np.int64)[labels], {}),
        # The last names the class, and is ignored.
        "ignored": (np.asarray([0, 2, 1]), {"ignore_index": 1}),
    }
    for kind, reduction, z_loss in combined(
        xp, (*kinds,), ("mean", "sum", "none"), (0.0, 0.1), strength=2
    ):
        given, more = kinds[kind]
        calls = [
            ce(
                *(xp, xp.asarray(x), xp.asarray(given)),
                **{"weight": xp.asarray(weight), "z_loss": z_loss, "reduction": reduction, **more},
            )
            for weight in ([0.5, odd, 2.0, 1.0], [0.5, 1.0, 2.0, 1.0])
        ]
        for actual, expected in zip(*calls, strict=True):
            assert np.isfinite(actual).all()
            np.testing.assert_allclose(actual, expected, rtol=1e-14)


@pytest.mark.slow("XLA compiles each reduction", "jax")
def test_all_ignored_or_weights_summing_to_0(xp):
    """all ignored, or weights summing to 0 | mean nan, sum 0, gradient 0"""
    nothing = xp.asarray([0.0, 0.0])
    x = xp.asarray([[0.0, 1.0], [2.0, 3.0]])
    ignored = (xp.asarray([-1, -1]), {"ignore_index": -1})
    weightless = (xp.asarray([1, 1]), {"weight": xp.asarray([1.0, 0.0])})
    unweighted = (xp.asarray([1, 0]), {"sample_weight": nothing})
    spread = (xp.asarray([[0.5, 0.5], [0.0, 1.0]]), {"sample_weight": nothing})
    for labels, options in (ignored, weightless, unweighted, spread):
        for reduction, expected in (("mean", NAN), ("sum", 0.0), ("none", [0.0, 0.0])):
            loss, grad = ce(xp, x, labels, reduction=reduction, **options)
            assert_array_equal(loss, expected)
            assert_array_equal(grad, np.zeros((2, 2)))
    # Smoothing spreads a loss over classes that have a weight; its mean is over nothing still.
    loss, grad = ce(xp, x, weightless[0], label_smoothing=0.1, **weightless[1])
    assert_array_equal(loss, NAN)
    assert_array_equal(grad, np.zeros((2, 2)))


def test_probability_0_at_a_logit_of_minus_inf(xp):
    """probability 0 at a logit of -inf | contributes 0"""
    x = xp.asarray([[0.0, -INF, 0.0]])
    loss, grad = ce(xp, x, xp.asarray([[0.5, 0.0, 0.5]]))
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-14)
    np.testing.assert_allclose(grad, np.zeros((1, 3)), atol=1e-16)
    loss, grad = ce(xp, x, xp.asarray([0]))
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-14)
    np.testing.assert_allclose(grad, [[-0.5, 0.0, 0.5]], rtol=1e-14)
    for impossible in ([[0.0, 1.0, 0.0]], [1]):
        loss, grad = ce(xp, x, xp.asarray(impossible))
        assert_array_equal(loss, INF)
        np.testing.assert_allclose(grad, [[0.5, -1.0, 0.5]], rtol=1e-14)


def test_probabilities_with_ignore_index(xp):
    """probabilities with ignore_index | ValueError"""
    x = xp.asarray([[0.0, 1.0]])
    with pytest.raises(ValueError, match="ignore_index is -100, but labels are a distribution"):
        ps.cross_entropy(x, xp.asarray([[0.5, 0.5]]), ignore_index=-100)


# --------------------------------------------------------------------------- the rest of the family


def test_entropy_of_infinities(xp):
    """entropy: probability 0, a row of -inf only, +inf or nan, an empty row | contributes 0; nan; nan; 0"""  # noqa: E501
    x = xp.asarray(
        [[0.0, -INF, 0.0], [-INF] * 3, [INF, 0.0, 0.0], [NAN, 0.0, 0.0], [5.0, -INF, -INF]]
    )
    assert_close(xp, ps.entropy(x), [np.log(2), NAN, NAN, NAN, 0.0])
    assert_close(xp, ps.entropy(xp.asarray(np.zeros((2, 0)))), [0.0, 0.0])
    assert_like(xp, ps.entropy(xp.asarray(np.zeros((0, 3)))), (0,), "float64")
    assert_close(xp, ps.entropy(xp.asarray(3.0), axis=None), 0.0)
    assert_close(xp, ps.entropy(xp.asarray([1, 1, 1, 1], "int32")), np.log(4), _default(xp))


def _default(xp):
    """Return the default floating dtype, in which integers are answered."""
    return xp.default_float


def test_divergence_of_infinities(xp):
    """kl_divergence: p 0; q 0 where p is not; both 0; +inf or nan in a row | contributes 0; inf; contributes 0; nan"""  # noqa: E501
    p = xp.asarray([[0.0, -INF], [0.0, 0.0], [0.0, -INF], [INF, 0.0], [0.0, 0.0]])
    q = xp.asarray([[0.0, 0.0], [0.0, -INF], [3.0, -INF], [0.0, 0.0], [NAN, 0.0]])
    expected = [np.log(2), INF, 0.0, NAN, NAN]
    assert_close(xp, ps.kl_divergence(p, q, reduction="none"), expected, rtol=1e-15)
    empty = xp.asarray(np.zeros((0, 3)))
    assert_close(xp, ps.kl_divergence(empty, empty), NAN)
    assert_close(xp, ps.kl_divergence(empty, empty, reduction="sum"), 0.0)
    nothing = xp.asarray(np.zeros((2, 0)))
    assert_close(xp, ps.kl_divergence(nothing, nothing, reduction="none"), [0.0, 0.0])


def test_gradients_of_entropy_and_divergence_at_the_edges(xp):
    """entropy_value_and_grad, kl_divergence_value_and_grad: a probability of 0; -inf only; no class; no position | gradient 0; nan; empty; mean nan, gradient empty"""  # noqa: E501
    x = xp.asarray([[0.0, -INF, 0.0], [-INF] * 3])
    h, grad = ps.entropy_value_and_grad(x)
    assert_close(xp, h, [np.log(2), NAN])
    assert_close(xp, grad, [[0.0] * 3, [NAN] * 3], atol=1e-16)
    flat = xp.asarray(np.zeros((2, 3)))
    k, (by_p, by_q) = ps.kl_divergence_value_and_grad(x, flat, reduction="sum")
    assert_close(xp, k, NAN)
    assert_close(xp, by_p, [[0.0] * 3, [NAN] * 3], atol=1e-16)
    assert_close(xp, by_q, [[-1 / 6, 1 / 3, -1 / 6], [NAN] * 3])
    for shape in ((0, 3), (2, 0)):
        empty = xp.asarray(np.zeros(shape))
        assert_like(xp, ps.entropy_value_and_grad(empty)[1], shape, "float64")
        k, (by_p, by_q) = ps.kl_divergence_value_and_grad(empty, empty)
        assert_close(xp, k, NAN if shape[0] == 0 else 0.0)
        assert_like(xp, by_p, shape, "float64")
        assert_like(xp, by_q, shape, "float64")
    assert_close(xp, ps.entropy_value_and_grad(xp.asarray(3.0), axis=None)[1], 0.0)
    narrow, wide = xp.asarray([0.0, 1.0], "float32"), xp.asarray([0.0, 1.0])
    _, (by_p, by_q) = ps.kl_divergence_value_and_grad(narrow, wide)
    assert (xp.dtype_name(by_p), xp.dtype_name(by_q)) == ("float32", "float64")


def test_divergence_of_others(xp):
    """kl_divergence of shapes that differ, or a wrong option | ValueError, TypeError naming it"""
    x = xp.asarray(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"logits_q has shape \(3,\), expected \(2, 3\)"):
        ps.kl_divergence(x, xp.asarray(np.zeros(3)))
    with pytest.raises(TypeError, match="logits_q has dtype bool"):
        ps.kl_divergence(x, xp.asarray(np.ones((2, 3), bool)))
    with pytest.raises(ValueError, match="reduction is 'batchmean'"):
        ps.kl_divergence(x, x, reduction="batchmean")
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        ps.kl_divergence(x, x, temperature=0.0)


def test_log_of_a_mean(xp):
    """logmeanexp: an empty or fully masked row; -inf only; +inf; nan | nan; -inf; +inf; nan"""
    x = np.asarray([[-INF, -INF], [INF, 0.0], [NAN, INF], [-INF, 0.0], [7.0, 7.0]])
    expected = [-INF, INF, NAN, -np.log(2), 7.0]
    assert_close(xp, ps.logmeanexp(xp.asarray(x), axis=1), expected)
    mask = xp.asarray([[False, False], [False, True], [False, True], [False, True], [True, True]])
    expected = [NAN, 0.0, INF, 0.0, 7.0]
    assert_close(xp, ps.logmeanexp(xp.asarray(x), axis=1, where=mask), expected)
    assert_close(xp, ps.logmeanexp(xp.asarray(np.zeros((2, 0))), axis=1), [NAN, NAN])
    assert_close(xp, ps.logmeanexp(xp.asarray(3.0)), 3.0)
    assert_close(xp, ps.logmeanexp(xp.asarray([2, 2], "int8")), 2.0, _default(xp))


def test_running_sums_of_infinities(xp):
    """logcumsumexp: -inf at first; after +inf; after nan; an empty axis | -inf; +inf; nan; empty"""
    x = [[-INF, -INF, 0.0, 0.0], [0.0, INF, INF, -INF], [0.0, NAN, INF, 0.0], [0.0, -INF, 0.0, NAN]]
    two = np.log(2)
    expected = [
        [-INF, -INF, 0.0, two], [0.0, INF, INF, INF], [0.0, NAN, NAN, NAN], [0.0, 0.0, two, NAN],
    ]  # fmt: skip
    assert_close(xp, ps.logcumsumexp(xp.asarray(x)), expected)
    assert_like(xp, ps.logcumsumexp(xp.asarray(np.zeros((2, 0)))), (2, 0), "float64")
    assert_close(xp, ps.logcumsumexp(xp.asarray([0, 0])), [0.0, two], _default(xp))
    with pytest.raises(TypeError, match="axis is None, expected an int"):
        ps.logcumsumexp(xp.asarray(x), axis=None)


def test_half_types_of_the_family(xp):
    """entropy, kl_divergence, logmeanexp, logcumsumexp, sigmoid_cross_entropy of float16, bfloat16 | computed in float32, rounded once"""  # noqa: E501
    if not xp.halves:
        pytest.skip(f"{xp.name} has no half types")
    rng = np.random.default_rng(13)
    for dtype in xp.halves:
        x, y = (xp.asarray(rng.normal(size=(4, 50)), dtype) for _ in range(2))
        wide = [xp.numpy(a).astype(np.float64) for a in (x, y)]
        for f, arrays in (
            (ps.entropy, 1),
            (lambda *a: ps.kl_divergence(*a, reduction="none"), 2),
            (lambda a: ps.logmeanexp(a, axis=1), 1),
            (ps.logcumsumexp, 1),
            (lambda *a: ps.sigmoid_cross_entropy(*a, reduction="none"), 2),
        ):
            assert_half(xp, f(*(x, y)[:arrays]), f(*wide[:arrays]), dtype)


def flat(answers):
    """Return all arrays of an answer, nested tuples included, in order."""
    return [a for part in answers for a in flat(part)] if type(answers) is tuple else [answers]


@pytest.mark.slow("XLA compiles many programs", "jax", "jax-numba")
@pytest.mark.slow("Numba compiles every kernel for two half types", "numba", "torch-numba")
@pytest.mark.slow("a graph for each call and dtype", "dask")
def test_half_types_of_probabilities_and_gradients(xp):
    """entmax, sparsemax, entmax_loss, a sink, sample_weight, and all gradients of the family, of float16, bfloat16 | computed in float32, rounded once"""  # noqa: E501
    if not xp.halves:
        pytest.skip(f"{xp.name} has no half types")
    rng = np.random.default_rng(14)
    labels, n = np.arange(4), {"reduction": "none"}
    for dtype in xp.halves:
        given = rng.normal(size=(4, 20)), rng.normal(size=(4, 20)), rng.dirichlet(np.ones(20), 4)
        half = [xp.asarray(a, dtype) for a in (*given, [0.5, 1.0, 2.0, 0.25])]
        wide = [xp.numpy(a).astype(np.float64) for a in half]
        for f in (
            lambda x, y, p, w, t: ps.entmax(x),
            lambda x, y, p, w, t: ps.sparsemax(x),
            lambda x, y, p, w, t: ps.entmax_vjp(p, y),
            lambda x, y, p, w, t: ps.entmax_loss_value_and_grad(x, t, sample_weight=w, **n),
            lambda x, y, p, w, t: ps.cross_entropy_value_and_grad(x, t, sample_weight=w, **n),
            lambda x, y, p, w, t: (ps.softmax(x, sink=0.5), ps.log_softmax(x, sink=0.5)),
            lambda x, y, p, w, t: ps.sigmoid_cross_entropy_value_and_grad(x, p, **n),
            lambda x, y, p, w, t: ps.kl_divergence_value_and_grad(x, y, **n),
            lambda x, y, p, w, t: ps.entropy_value_and_grad(x),
            lambda x, y, p, w, t: ps.logcumsumexp_vjp(x, y),
        ):
            exact = flat(f(*wide, labels))
            for actual, expected in zip(flat(f(*half, xp.asarray(labels))), exact, strict=True):
                assert_half(xp, actual, expected, dtype, slack=2.0**-20)


@pytest.mark.slow("XLA compiles many programs", "jax", "jax-numba")
def test_integers_of_the_family(xp):
    """sink, entmax, sparsemax, entmax_loss, sigmoid_cross_entropy, kl_divergence, entropy, logmeanexp, logcumsumexp of integers; a vjp of integers | promoted to the default floating dtype before anything is subtracted; TypeError"""  # noqa: E501
    x = xp.asarray([[127, -128]], "int8")
    label = xp.asarray([1])
    for answer, expected in (
        (ps.log_softmax(x, sink=127.0), [[-np.log(2), -255 - np.log(2)]]),
        (ps.entmax(x), [[1.0, 0.0]]),
        (ps.sparsemax(x), [[1.0, 0.0]]),
        (ps.entmax_loss(x, label, alpha=2), 255.0),
        (ps.entmax_loss_value_and_grad(x, label)[1], [[1.0, -1.0]]),
        (ps.sigmoid_cross_entropy(x, xp.asarray([[0, 1]]), reduction="none"), [[127.0, 128.0]]),
        (ps.kl_divergence(x, xp.asarray([[-128, 127]], "int8")), 255.0),
        (ps.entropy(xp.asarray([[-128] * 4], "int8")), [np.log(4)]),
        (ps.logmeanexp(x, axis=1), [127 - np.log(2)]),
        (ps.logcumsumexp(xp.asarray([-128, 127], "int8")), [-128.0, 127.0]),
    ):
        assert_close(xp, answer, expected, _default(xp))
    for f in (ps.entmax_vjp, ps.logcumsumexp_vjp):
        with pytest.raises(TypeError, match="has dtype int8, expected"):
            f(x, x)


@pytest.mark.slow("XLA compiles many programs", "jax", "jax-numba")
def test_ties_of_the_family(xp):
    """entmax, entmax_vjp, entropy, kl_divergence, logcumsumexp: ties | share alike; gradients alike; log n; 0; log i"""  # noqa: E501
    x = xp.asarray([[2.0, -60.0, 2.0], [5.0, 5.0, 5.0]])
    shared = [[0.5, 0.0, 0.5], [1 / 3] * 3]
    for alpha in (1.5, 2.0, INF):
        assert_close(xp, ps.entmax(x, alpha=alpha), shared, rtol=1e-14)
    slope = [[0.5, 0.0, -0.5], [0.0] * 3]
    dy = xp.asarray([[1.0, 9.0, 0.0], [4.0, 4.0, 4.0]])
    assert_close(xp, ps.entmax_vjp(xp.asarray(shared), dy, alpha=2.0), slope, atol=1e-15)
    value, grad = ps.entropy_value_and_grad(x)
    assert_close(xp, value, np.log([2.0, 3.0]), rtol=1e-14)
    assert_close(xp, grad, np.zeros((2, 3)), atol=1e-16)
    assert_close(xp, ps.kl_divergence(x, x, reduction="none"), [0.0, 0.0])
    assert_close(xp, ps.logcumsumexp(xp.asarray(np.zeros(5))), np.log(np.arange(1.0, 6.0)))


def test_gradients_of_running_sums_at_the_edges(xp):
    """logcumsumexp_vjp: an entry of -inf; an empty axis or batch | gradient 0; empty"""
    x = xp.asarray([-INF, 0.0, 0.0, -INF])
    dx = ps.logcumsumexp_vjp(x, xp.asarray([7.0, 1.0, 1.0, 1.0]))
    assert_close(xp, dx, [0.0, 2.0, 1.0, 0.0])
    for shape in ((2, 0), (0, 3)):
        empty = xp.asarray(np.zeros(shape))
        assert_like(xp, ps.logcumsumexp_vjp(empty, empty), shape, "float64")


@pytest.mark.slow("XLA compiles many programs", "jax", "jax-numba")
def test_entmax_loss_of_nothing_and_of_weights(xp):
    """entmax_loss: no class, every position ignored; sample_weight 0 beside nan; weights summing to 0 | mean nan, gradient empty; no effect, gradient 0; mean nan, sum 0"""  # noqa: E501
    f = ps.entmax_loss_value_and_grad
    nothing = xp.asarray(np.zeros((2, 0))), xp.asarray([-1, -1])
    loss, grad = f(*nothing, ignore_index=-1)
    assert_close(xp, loss, NAN)
    assert_like(xp, grad, (2, 0), "float64")
    x, labels = [[0.0, 0.25], [NAN, INF]], xp.asarray([0, 7])
    loss, grad = f(xp.asarray(x), labels, alpha=2, sample_weight=xp.asarray([3.0, 0.0]))
    # p = (3/8, 5/8): the loss of label 0 is (1 + 1/4)^2 / 4.
    assert_close(xp, loss, 25 / 64)
    assert_close(xp, grad, [[-5 / 8, 5 / 8], [0.0, 0.0]])
    for reduction, expected in (("mean", NAN), ("sum", 0.0)):
        weightless = {"sample_weight": xp.asarray([0.0, 0.0]), "reduction": reduction}
        loss, grad = f(xp.asarray(x), labels, **weightless)
        assert_close(xp, loss, expected)
        assert_close(xp, grad, np.zeros((2, 2)))


def test_sigmoid_cross_entropy_of_infinities(xp):
    """sigmoid_cross_entropy: an infinite logit that is right; one that is wrong; nan; weight 0; no entry | 0; inf; nan; no effect; mean nan, sum 0"""  # noqa: E501
    z = np.asarray([INF, -INF, INF, -INF, NAN])
    t = np.asarray([1, 0, 0, 1, 1])
    for gamma in (0.0, 0.5, 2.0):
        options = {"reduction": "none", "focal_gamma": gamma}
        arguments = xp.asarray(z), xp.asarray(t)
        loss, grad = ps.sigmoid_cross_entropy_value_and_grad(*arguments, **options)
        assert_close(xp, loss, [0.0, 0.0, INF, INF, NAN])
        assert_close(xp, grad, [0.0, 0.0, 1.0, -1.0, NAN])
        weight = xp.asarray([1.0, 1.0, 0.0, 0.0, 0.0])
        both = ps.sigmoid_cross_entropy_value_and_grad(*arguments, weight=weight, **options)
        for found in both:
            assert_array_equal(np.abs(xp.numpy(found)), np.zeros(5))
    empty = xp.asarray(np.zeros((0, 3)))
    for reduction, expected in (("mean", NAN), ("sum", 0.0)):
        loss, grad = ps.sigmoid_cross_entropy_value_and_grad(empty, empty, reduction=reduction)
        assert_close(xp, loss, expected)
        assert_like(xp, grad, (0, 3), "float64")
    loss = ps.sigmoid_cross_entropy(xp.asarray([0, 0]), xp.asarray([0, 1]))
    assert_close(xp, loss, np.log(2), _default(xp))


def test_sigmoid_cross_entropy_of_others(xp):
    """sigmoid_cross_entropy: labels of another shape, or complex; numbers out of range | ValueError; TypeError; ValueError"""  # noqa: E501
    z, t = xp.asarray(np.zeros((2, 3))), xp.asarray(np.zeros((2, 3)))
    f = ps.sigmoid_cross_entropy
    with pytest.raises(ValueError, match=r"labels have shape \(2,\), expected \(2, 3\)"):
        f(z, xp.asarray([0, 1]))
    with pytest.raises(TypeError, match="labels have dtype complex128, expected booleans"):
        f(z, xp.asarray(np.zeros((2, 3)), "complex128"))
    for name in ("weight", "pos_weight"):
        with pytest.raises(ValueError, match=rf"{name} has shape \(2,\), which does not broadcast"):
            f(z, t, **{name: xp.asarray([1.0, 1.0])})
        with pytest.raises(TypeError, match=f"{name} has dtype bool"):
            f(z, t, **{name: xp.asarray(np.ones(3, bool))})
    for options, message in (
        ({"focal_gamma": -1.0}, r"focal_gamma is -1\.0.*\[0, inf\)"),
        ({"label_smoothing": 1.5}, r"label_smoothing is 1\.5.*\[0, 1\]"),
        ({"reduction": "avg"}, "reduction is 'avg'"),
    ):
        with pytest.raises(ValueError, match=message):
            f(z, t, **options)


def test_a_sink(xp):
    """sink: a row of -inf only, or masked as a whole; +inf or nan in a row; sink -inf | softmax 0, log_softmax -inf; nan; as without a sink"""  # noqa: E501
    x = xp.asarray([[-INF, -INF], [INF, 0.0], [NAN, 0.0], [0.0, 0.0]])
    third = 1 / 3
    expected = np.asarray([[0.0, 0.0], [NAN, NAN], [NAN, NAN], [third, third]])
    sinks = xp.asarray(np.zeros((4, 1)))
    for sink in (0.0, sinks):
        assert_close(xp, ps.softmax(x, sink=sink), expected)
        logs = xp.numpy(ps.log_softmax(x, sink=sink))
        np.testing.assert_allclose(np.exp(logs), expected, rtol=1e-15)
    mask = xp.asarray([[False, False], [False, True], [False, True], [True, True]])
    masked = [[0.0, 0.0], [0.0, 0.5], [0.0, 0.5], [third, third]]
    assert_close(xp, ps.softmax(x, where=mask, sink=0.0), masked)
    logs = xp.numpy(ps.log_softmax(x, where=mask, sink=0.0))
    np.testing.assert_allclose(np.exp(logs), masked, rtol=1e-15)
    finite = xp.asarray([[1.0, 2.0, -3.0], [5.0, 5.0, 5.0]])
    for f in FAMILY:
        assert_close(xp, f(finite, sink=-INF), xp.numpy(f(finite)), rtol=1e-15)
        assert_like(xp, f(xp.asarray(np.zeros((2, 0))), sink=1.0), (2, 0), "float64")
        assert_close(
            xp, f(xp.asarray(0.0), axis=None, sink=0.0), 0.5 if f is ps.softmax else -np.log(2)
        )


def test_a_sink_of_another_kind(xp):
    """sink that is nan or inf, or does not broadcast; or is no array | ValueError; TypeError"""
    x = xp.asarray(np.zeros((2, 3)))
    for f in FAMILY:
        for wrong in (NAN, INF):
            with pytest.raises(ValueError, match=rf"sink is {wrong}, expected a number in \[-inf"):
                f(x, sink=wrong)
        for shape in ((3,), (2, 3), (2,), (1, 2, 1)):
            with pytest.raises(ValueError, match=r"sink has shape .*does not broadcast"):
                f(x, sink=xp.asarray(np.zeros(shape)))
        with pytest.raises(TypeError, match="sink has dtype bool"):
            f(x, sink=xp.asarray(np.ones(1, bool)))
        with pytest.raises(TypeError, match="sink is a list"):
            f(x, sink=[0.0])


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0, 3.0, INF])
def test_entmax_of_infinities(xp, alpha):
    """entmax: -inf in a row; a row of -inf only, +inf or nan in a row; an empty axis | 0; nan; empty"""  # noqa: E501
    x = xp.asarray([[0.0, -INF, 0.0], [-INF] * 3, [INF, 0.0, 1.0], [NAN, 0.0, 0.0], [3.0] * 3])
    expected = [[0.5, 0.0, 0.5], [NAN] * 3, [NAN] * 3, [NAN] * 3, [1 / 3] * 3]
    functions = [lambda x, **o: ps.entmax(x, alpha=alpha, **o)]
    functions += [ps.sparsemax] if alpha == 2 else []
    for f in functions:
        assert_close(xp, f(x), expected, rtol=1e-14)
        assert_like(xp, f(xp.asarray(np.zeros((2, 0, 3))), axis=1), (2, 0, 3), "float64")
        assert_like(xp, f(xp.asarray(np.zeros((0, 3)))), (0, 3), "float64")
        assert_close(xp, f(xp.asarray(2.0), axis=None), 1.0)
        assert_close(xp, f(xp.asarray([7, 7])), [0.5, 0.5], _default(xp))
    zero = xp.asarray([0.25, 0.75, 0.0])
    dx = xp.numpy(
        ps.entmax_vjp(zero, xp.asarray([1.0, 2.0, INF if alpha > 1 else 3.0]), alpha=alpha)
    )
    assert np.isfinite(dx).all()
    assert dx[2] == 0.0


def test_alpha_out_of_range(xp):
    """alpha below 1 or nan, or an array above 2 or of several; that is no number | ValueError; TypeError"""  # noqa: E501
    x = xp.asarray([0.0, 1.0])
    for f in (ps.entmax, lambda x, alpha: ps.entmax_vjp(x, x, alpha=alpha)):
        for wrong in (0.5, -1, NAN, -INF):
            with pytest.raises(ValueError, match=r"alpha is .*expected a number in \[1, inf\]"):
                f(x, alpha=wrong)
        with pytest.raises(TypeError, match=r"alpha is '2'.*expected a Python number"):
            f(x, alpha="2")
    if not xp.lazy:
        with pytest.raises(ValueError, match=r"an array that holds 2.5, expected \[1, 2\]"):
            ps.entmax(x, alpha=xp.asarray(2.5))
    with pytest.raises(ValueError, match=r"alpha has shape \(2,\), expected \(\)"):
        ps.entmax(x, alpha=x)
    with pytest.raises(TypeError, match="alpha has dtype int64"):
        ps.entmax(x, alpha=xp.asarray(np.asarray(2), "int64"))


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, 3.0, INF])
def test_entmax_loss_at_the_edges(xp, alpha):
    """entmax_loss: an ignored row holding nan; a label out of range; a label at -inf; no position | no effect, gradient 0; as cross_entropy; inf; mean nan"""  # noqa: E501
    x = np.asarray([[0.0, 1.0, 2.0], [NAN, INF, 0.0], [1.0, 0.5, -INF]])
    options = {"alpha": alpha, "ignore_index": -1}
    f = ps.entmax_loss_value_and_grad
    some = xp.asarray(x[[0, 2]]), xp.asarray([2, 0])
    (loss, grad), (kept, slope) = xp.calls(
        f,
        [
            ((xp.asarray(x), xp.asarray([2, -1, 0])), options),
            (some, {"alpha": alpha}),
        ],
    )
    np.testing.assert_allclose(xp.numpy(loss), xp.numpy(kept), rtol=1e-14)
    np.testing.assert_allclose(xp.numpy(grad)[[0, 2]], xp.numpy(slope), rtol=1e-14)
    assert_array_equal(xp.numpy(grad)[1], 0.0)
    loss = ps.entmax_loss(xp.asarray(x[2:]), xp.asarray([2]), alpha=alpha)
    assert_close(xp, loss, INF)
    bad = xp.asarray(x[:1]), xp.asarray([3])
    if not xp.lazy:
        with pytest.raises(IndexError, match=r"labels\[0\] is 3, outside \[0, 3\)"):
            f(*bad, alpha=alpha)
    loss, grad = xp.call(f, *bad, alpha=alpha, check_labels=False)
    assert np.isnan(xp.numpy(loss))
    assert np.isnan(xp.numpy(grad)).all()
    nothing = xp.asarray(np.zeros((0, 3))), xp.asarray(np.zeros(0), "int64")
    for reduction, expected in (("mean", NAN), ("sum", 0.0)):
        assert_close(xp, ps.entmax_loss(*nothing, alpha=alpha, reduction=reduction), expected)
