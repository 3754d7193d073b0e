"""The sink of a softmax: one more logit of every row, that gets no probability."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from asserts import assert_close, assert_like
from mpmath import mpf
from test_values import ROWS, of_equal_length

import portable_softmax as ps
from portable_softmax import kernels

pytestmark = pytest.mark.run_on("paths")

FINITE = of_equal_length({k: v for k, v in ROWS.items() if k not in ("huge", "minus infinity")})
SINKS = (0.0, -3.5, 2, 60.0, -90.0, 1e5)


def exact(function, row, sink, t=1):
    """Return the answer for a row with the sink beside it, but for the sink itself."""
    return function([v / mpf(t) for v in [*reference.exact(row), mpf(sink)]])[:-1]


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FINITE)
def test_golden(xp, name, dtype):
    x = FINITE[name].astype(dtype)
    info = np.finfo(dtype)
    for sink in SINKS:
        y = assert_like(xp, ps.softmax(xp.asarray(x), sink=sink), x.shape, dtype)
        logs = assert_like(xp, ps.log_softmax(xp.asarray(x), sink=sink), x.shape, dtype)
        for actual, log, row in zip(y, logs, x, strict=True):
            expected = exact(reference.softmax, row, sink)
            span = 2 + 2 * (max(float(row.max()), float(sink)) - float(row.min()))
            for a, e in zip(actual, expected, strict=True):
                if e > info.tiny:  # XLA takes subnormal numbers for 0
                    assert reference.ulps(a, [e]) <= max(6, span)
                else:
                    assert a <= info.tiny
            kept = [
                (a, e)
                for a, e in zip(log, exact(reference.log_softmax, row, sink), strict=True)
                if -e > info.tiny
            ]
            if kept:
                assert reference.ulps(np.asarray([a for a, _ in kept]), [e for _, e in kept]) <= 8


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.parametrize("temperature", [0.3, 2.5, 1e6])
def test_the_temperature_divides_the_sink_as_well(xp, temperature):
    x = np.asarray([[1.0, 2.0, 4.0], [0.0, -30.0, 30.0]])
    for sink in (0.0, 7.0, -2.0):
        options = {"sink": sink, "temperature": temperature}
        for f, of in ((ps.softmax, reference.softmax), (ps.log_softmax, reference.log_softmax)):
            expected = [[float(v) for v in exact(of, row, sink, temperature)] for row in x]
            assert_close(xp, f(xp.asarray(x), **options), expected, rtol=1e-13)


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.parametrize("axis", [0, 1, -1, (0, 2), None])
def test_one_sink_for_each_row(xp, axis):
    """An array of sinks is a class more in an array with the axes side by side."""
    rng = np.random.default_rng(50)
    x = rng.normal(size=(3, 4, 5))
    picked = tuple(range(3)) if axis is None else tuple(np.atleast_1d(axis) % 3)
    shape = [1 if a in picked else n for a, n in enumerate(x.shape)]
    given, expected = [], []
    for kept in (shape, [1] * 3, shape[1:] if 0 in picked else shape):
        sink = rng.normal(size=kept)
        e, s = np.exp(x), np.exp(sink)
        y = e / (e.sum(axis=axis, keepdims=True) + s)
        for dtype, rtol in (("float64", 1e-13), ("float32", 1e-6)):
            given.append(((xp.asarray(x),), {"axis": axis, "sink": xp.asarray(sink, dtype)}))
            expected.append((y, rtol))
    for f, log in ((ps.softmax, np.asarray), (ps.log_softmax, np.log)):
        for found, (y, rtol) in zip(xp.calls(f, given), expected, strict=True):
            assert_close(xp, found, log(y), rtol=rtol)


def test_what_is_missing_to_one_is_the_sink_s(xp):
    x, sink = np.random.default_rng(51).normal(size=(6, 9)), 1.25
    y = xp.numpy(ps.softmax(xp.asarray(x), sink=sink))
    beside = np.concatenate([x, np.full((6, 1), sink)], axis=1)
    all_of_it = xp.numpy(ps.softmax(xp.asarray(beside)))
    np.testing.assert_allclose(y, all_of_it[:, :-1], rtol=1e-14)
    np.testing.assert_allclose(1 - y.sum(axis=1), all_of_it[:, -1], rtol=1e-13)


def test_half_types_are_rounded_once(xp):
    if not xp.halves:
        pytest.skip(f"{xp.name} has no half types")
    for dtype in xp.halves:
        x = xp.asarray(np.random.default_rng(52).normal(size=(3, 40)), dtype)
        wide = xp.asarray(xp.numpy(x).astype(np.float32))
        for f in (ps.softmax, ps.log_softmax):
            rounded = xp.asarray(xp.numpy(f(wide, sink=0.5)), dtype)
            actual = assert_like(xp, f(x, sink=0.5), (3, 40), dtype)
            np.testing.assert_array_equal(actual, xp.numpy(rounded))


def test_the_vjps_take_what_a_sink_has_left(xp):
    """They start from the output, and what a sink takes has no upstream gradient."""
    rng = np.random.default_rng(53)
    x, dy = rng.normal(size=(2, 5)), rng.normal(size=(2, 5))
    e = np.exp(x)
    p = e / (e.sum(axis=1, keepdims=True) + 1)
    jacobian = p[:, :, None] * (np.eye(5) - p[:, None, :])
    y, log_y = (f(xp.asarray(x), sink=0.0) for f in (ps.softmax, ps.log_softmax))
    expected = np.einsum("ni,nij->nj", dy, jacobian)
    assert_close(xp, ps.softmax_vjp(y, xp.asarray(dy)), expected, rtol=1e-12, atol=1e-16)
    expected = np.einsum("ni,nij->nj", dy, np.eye(5) - p[:, None, :])
    assert_close(xp, ps.log_softmax_vjp(log_y, xp.asarray(dy)), expected, rtol=1e-12, atol=1e-15)


def test_the_documented_gradient_of_the_sink(xp):
    if not xp.differentiates:
        pytest.skip(f"{xp.name} does not differentiate")
    rng = np.random.default_rng(54)
    x, dy, sink, t = rng.normal(size=5), rng.normal(size=5), np.asarray([0.75]), 1.5
    e = np.exp(x / t)
    y = e / (e.sum() + np.exp(sink / t))
    for f, expected in (
        (ps.softmax, -(1 - y.sum()) * (y * dy).sum() / t),
        (ps.log_softmax, -(1 - y.sum()) * dy.sum() / t),
    ):

        def total(s, f=f):
            return (f(xp.asarray(x), sink=s, temperature=t) * xp.asarray(dy)).sum()

        grad = xp.grad(total)(xp.asarray(sink))
        np.testing.assert_allclose(xp.numpy(grad), [expected], rtol=1e-13)


def test_which_path_takes_it(xp):
    paths = {"numpy": "numpy tiles", "torch": "numpy tiles"}
    paths |= dict.fromkeys(("numba", "torch-numba", "jax-numba"), "numba rows")
    paths |= dict.fromkeys(("dask", "cubed"), f"{xp.library} chunks")
    paths["jax"] = "jax rules"
    x = xp.asarray(np.zeros((2, 3)))
    for name in ("softmax", "log_softmax"):
        for sink in (0.0, xp.asarray(np.zeros((2, 1)))):
            path = paths.get(xp.name, "portable")
            assert kernels.explain(name, x, sink=sink).startswith(f"{path}: ")
