"""Sinks in the kernels of NumPy's arrays: in every layout, beside masks and temperatures."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

import portable_softmax as ps
from portable_softmax import kernels
from portable_softmax.kernels import _threads

OPERATIONS = ("softmax", "log_softmax")
_SLOW = pytest.mark.slow("Numba compiles each layout")
# Rows one by one, in groups, in blocks, of few classes and across memory; longer than a part.
SHAPES = [
    *[((40, 1500), -1), ((40, 300), -1), ((90, 30), -1), ((90, 3), -1), ((5, 7, 19), 1)],
    *[((4, 9000), -1), ((6, 50, 3), (0, 1))],
]
PATHS = [
    pytest.param("numpy tiles", marks=pytest.mark.once),
    pytest.param("numba rows", marks=[pytest.mark.numba, _SLOW]),
]
every_path = pytest.mark.parametrize("path", PATHS)
every_shape = pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
RTOL = {"float64": 1e-13, "float32": 3e-6, "float16": 1e-3}


@pytest.fixture(autouse=True)
def _every_size(path):
    with kernels.use(path):
        yield


def case(shape, axis, dtype, seed=0):
    """Return logits, and sinks of which some are the largest of their rows, and some nothing."""
    rng = np.random.default_rng(seed)
    axes = {a % len(shape) for a in np.atleast_1d(axis)}
    x = 3 * rng.standard_normal(shape)
    sink = 9 * rng.standard_normal([1 if a in axes else n for a, n in enumerate(shape)])
    flat = sink.reshape(-1)
    flat[::5], flat[1::5] = -np.inf, 25.0
    return x.astype(dtype), sink.astype("float32" if dtype == "float16" else dtype)


def formula(operation, x, sink, axis, t=1.0, mask=None):
    """Return the answer in longdouble, the sink being one more entry of its row."""
    x, sink = x.astype(np.longdouble) / t, sink.astype(np.longdouble) / t
    x = x if mask is None else np.where(mask, x, -np.inf)
    top = np.maximum(x.max(axis=axis, keepdims=True), sink)
    log = np.log(np.exp(x - top).sum(axis=axis, keepdims=True) + np.exp(sink - top))
    return np.exp(x - top - log) if operation == "softmax" else x - top - log


@every_path
@every_shape
@pytest.mark.parametrize("dtype", list(RTOL))
def test_a_sink_is_one_more_entry_of_its_row(path, shape, axis, dtype):
    """Numba compiles one of the options for each case, in turn, so that each two values meet."""
    x, sink = case(shape, axis, dtype)
    mask = np.random.default_rng(1).random(shape) < 0.8
    every = ({}, {"where": mask}, {"temperature": 0.75})
    turn = SHAPES.index((shape, axis)) + [*RTOL].index(dtype)
    for number, operation in enumerate(OPERATIONS):
        for options in every if path == "numpy tiles" else [every[(turn + number) % 3]]:
            given = {"axis": axis, "sink": sink, **options}
            assert kernels.explain(operation, x, **given).startswith(f"{path}: ")
            y = getattr(ps, operation)(x, **given)
            assert y.dtype == x.dtype
            assert y.shape == x.shape
            t, where = options.get("temperature", 1.0), options.get("where")
            expected = formula(operation, x, sink, axis, t, where)
            np.testing.assert_allclose(
                y, expected.astype(x.dtype), rtol=RTOL[dtype], atol=RTOL[dtype] / 10
            )


@every_path
def test_a_number_and_what_is_repeated_are_sinks_of_all_rows(path):
    x = np.random.default_rng(2).standard_normal((4, 6, 5, 300))
    for heads in (np.asarray([0.5]), np.random.default_rng(3).standard_normal((6, 1, 1))):
        whole = np.broadcast_to(heads, (4, 6, 5, 1)).copy()
        for operation in OPERATIONS:
            expected = getattr(ps, operation)(x, sink=whole)
            for sink in (heads, 0.5) if heads.size == 1 else (heads,):
                y = getattr(ps, operation)(x, sink=sink)
                np.testing.assert_array_equal(y, expected)


@every_path
@every_shape
def test_rows_without_an_answer(path, shape, axis):
    """A row of -inf, with a sink and without; with a nan; with +inf; and masked as a whole."""
    x, sink = case(shape, axis, "float64")
    axes = sorted({a % len(shape) for a in np.atleast_1d(axis)})
    order = [*(a for a in range(len(shape)) if a not in axes), *axes]
    back, rows = np.argsort(order), x.transpose(order)
    lengths, rows = rows.shape, rows.reshape(sink.size, -1).copy()
    mask, sinks = np.ones_like(rows, bool), sink.reshape(-1)
    rows[0], rows[1, 1:], rows[2, 1] = -np.inf, -np.inf, np.inf
    rows[1, 0] = np.nan
    sinks[:3] = 1.0, 1.0, 2.0
    if len(rows) > 3:
        mask[3], rows[3] = False, np.nan
    x, mask = (a.reshape(lengths).transpose(back).copy() for a in (rows, mask))
    sink = sinks.reshape(sink.shape)
    for operation, nothing in (("softmax", 0.0), ("log_softmax", -np.inf)):
        function = getattr(ps, operation)
        for options in ({}, {"where": mask}):
            y = function(x, axis=axis, sink=sink, **options)
            found = y.transpose(order).reshape(rows.shape)
            assert np.all(found[0] == nothing)
            assert np.isnan(found[1]).all()
            assert np.isnan(found[2]).all()
            if options and len(rows) > 3:
                assert np.all(found[3] == nothing)
        assert np.isnan(function(np.full_like(x, -np.inf), axis=axis, sink=-np.inf)).all()


@every_path
def test_a_confident_row_keeps_its_digits_beside_a_sink(path):
    """Whether an entry is confident or the sink: log_softmax is -log1p of the others."""
    x = np.zeros((3, 300))
    x[:, 7] = [40.0, 40.0, -30.0]
    sink = np.asarray([[-5.0], [-np.inf], [60.0]])
    y = ps.log_softmax(x, sink=sink)
    np.testing.assert_allclose(y[0, 7], -(299 + np.exp(-5.0)) * np.exp(-40.0), rtol=1e-14)
    np.testing.assert_allclose(y[1, 7], -299 * np.exp(-40.0), rtol=1e-14)
    np.testing.assert_allclose(ps.softmax(x, sink=sink)[2, 7], np.exp(-90.0), rtol=1e-13)
    far = np.full((2, 300), -1e4, np.float32)
    p = ps.softmax(far, sink=np.asarray([[-1e4 + 80], [-1e4 - 80]], np.float32))
    np.testing.assert_allclose(p[0], np.exp(-80.0), rtol=1e-5)
    np.testing.assert_allclose(p[1], 1 / 300, rtol=1e-6)


@every_path
@pytest.mark.parametrize("order", ["F", "strided", "reversed"])
def test_other_layouts_in_memory(path, order):
    x = np.random.default_rng(4).standard_normal((24, 14, 33))
    sink = np.random.default_rng(5).standard_normal((24, 1, 33))
    if order == "F":
        x = np.asfortranarray(x)
    elif order == "strided":
        x, sink = x[::2, ::2], sink[::2]
    else:
        x = x[::-1, :, ::-1]
    for operation in OPERATIONS:
        y = getattr(ps, operation)(x, axis=1, sink=sink)
        np.testing.assert_allclose(
            y, formula(operation, x, sink, 1).astype(float), rtol=1e-13, atol=1e-15
        )


@every_path
def test_in_place_and_in_another_array(path):
    for shape, axis in (((40, 300), -1), ((5, 30, 20), 1), ((90, 3), -1)):
        x, sink = case(shape, axis, "float64")
        for operation in OPERATIONS:
            expected = getattr(ps, operation)(x, axis=axis, sink=sink)
            for out in (np.empty_like(x), x.copy()):
                given = out if np.array_equal(out, x) else x
                assert getattr(ps, operation)(given, axis=axis, sink=sink, out=out) is out
                np.testing.assert_array_equal(out, expected)


@pytest.mark.numba
@_SLOW
@pytest.mark.parametrize("path", ["numba rows"])
@pytest.mark.parametrize(("shape", "axis"), [((1000, 10), 1), ((300, 300), 1), ((2, 40, 190), 1)])
def test_the_number_of_threads_changes_no_bit(path, monkeypatch, shape, axis):
    driver = importlib.import_module("portable_softmax.kernels._numba._driver")
    monkeypatch.setattr(driver, "LARGEST", 1 << 12)
    monkeypatch.setattr(driver, "THREADED", 0)
    x, sink = case(shape, axis, "float32")
    results = []
    for threads in (1, 2, 3, 1):
        monkeypatch.setattr(_threads, "limit", lambda threads=threads: threads)
        results.append([getattr(ps, name)(x, axis=axis, sink=sink) for name in OPERATIONS])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)
