"""NumPy in tiles: the shape of the tiles, the form that a row takes, and what it costs."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

import portable_softmax as ps
from portable_softmax import kernels
from portable_softmax.kernels import _cuts, _threads
from portable_softmax.kernels._numpy import _general, _layout, _losses, _maths, _rows, _small

RNG = np.random.default_rng(21)


@pytest.fixture
def seen(monkeypatch):
    """The functions that ran, of those that tell the ways apart."""
    ps.softmax(np.zeros(3))  # the shortcuts come with the first call
    names = []

    def spied(module, name):
        real = getattr(module, name)

        def spy(*args, **kwargs):
            names.append(f"{module.__name__.rpartition('.')[2]}.{name}")
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, spy)

    for module, name in (
        (_general, "rows"),
        (_general, "losses"),
        (_rows, "softmax"),
        (_rows, "log_softmax"),
        (_losses, "losses"),
        (_maths, "fold"),
        (_threads, "run"),
    ):
        spied(module, name)
    return names


# --------------------------------------------------------------------------- which way


def test_the_ways_of_an_array(seen):
    """Small in rows: a shortcut. One block in memory: tiles. Anything else: the portable form."""

    def way(x, **options):
        seen.clear()
        ps.log_softmax(x, **options)
        return seen

    assert way(np.zeros((100, 10))) == []
    assert way(np.zeros((_small.SMALL // 100, 100))) == []
    assert way(np.zeros((_small.SMALL // 100 + 1, 100))) == ["_rows.log_softmax"]
    assert way(np.zeros((_small._SMALL_SHORT // 4, 4))) == []
    assert "_rows.log_softmax" in way(np.zeros((_small._SMALL_SHORT // 4 + 1, 4)))
    assert way(np.zeros((10, 10)), axis=0) == way(np.zeros((10, 10)).T) == []
    assert "_rows.log_softmax" in way(np.zeros((1000, 100)), axis=0)
    assert "_rows.log_softmax" in way(np.zeros((10, 10), np.float16))
    assert way(np.zeros((10, 20))[:, ::2]) == way(np.zeros((10, 20), int)) == []
    assert "_rows.log_softmax" in way(np.zeros((100, 20, 30)), axis=(0, 2))
    assert way(np.zeros((10, 20)), where=np.ones((10, 20), bool)) == []
    assert way(np.zeros((10, 20)), temperature=0.7) != []
    mask = np.ones((10, _small.SMALL), bool)
    assert "_general.rows" in way(np.zeros(mask.shape), where=mask)


def test_the_ways_of_a_softmax_with_a_temperature(seen):
    def way(x, temperature=0.7, **options):
        seen.clear()
        ps.softmax(x, temperature=temperature, **options)
        return seen

    assert way(np.zeros((10, 20))) == way(np.zeros((10, 20)), where=np.eye(10, 20) == 0) == []
    for extreme in (1e-30, 1e30):
        assert "_rows.softmax" in way(np.zeros((10, 20)), extreme)
    for far in (np.inf, -np.inf, np.nan, 3e38):
        assert "_rows.softmax" in way(np.full((10, 20), far, np.float32))
    assert "_rows.softmax" in way(np.zeros((_small.SMALL // 100 + 1, 100)))


def test_the_ways_of_a_loss(seen):
    x, t = RNG.normal(size=(3000, 100)), RNG.integers(0, 100, 3000)

    def way(*args, **options):
        seen.clear()
        ps.cross_entropy_value_and_grad(*args, **options)
        return [name for name in seen if name != "_threads.run"]

    assert way(x[:9], t[:9]) == []
    assert way(x, t) == ["_losses.losses"]
    assert way(x, t, weight=np.ones(100), ignore_index=3) == ["_losses.losses"]
    assert way(x, np.where(t == 3, -1, t), ignore_index=-1) == ["_losses.losses"]
    assert way(x, t, label_smoothing=0.1) == ["_general.losses"]
    assert way(x, np.where(t == 3, -1, t), check_labels=False) == ["_general.losses"]
    with pytest.raises(IndexError, match="labels"):
        ps.cross_entropy(x, np.where(t == 3, 100, t))


def test_threads_are_for_large_arrays(seen):
    rows = _cuts.THREADED_BYTES // 8000
    ps.softmax(np.zeros((rows, 1000)))
    assert "_threads.run" not in seen
    ps.softmax(np.zeros((rows + 1, 1000)))
    assert "_threads.run" in seen


@pytest.mark.parametrize(
    ("shape", "axis", "expected"),
    [
        ((5000, 10), 1, "short"),
        ((5000, _layout.SHORT - 1), 1, "short"),
        ((5000, _layout.SHORT), 1, "rows"),
        ((50, 4000), 0, "columns"),
        ((70, 40, 33), 1, "stacked"),
        ((3, 40, 9000), 1, "columns"),
    ],
)
def test_layouts(shape, axis, expected):
    x = RNG.normal(size=shape).astype(np.float32)
    found = _layout.layout(x, (axis,), x.dtype)
    kind = "stacked" if found.stacked else "columns"
    if found.rows:
        kind = "rows" if found.axis == 1 else "short"
    assert kind == expected
    # The pieces cover the array, each entry once.
    count = np.zeros(found.x.shape, np.int8)
    for piece in found.pieces:
        found.view(count, piece)[...] += 1
    assert (count == 1).all()


# --------------------------------------------------------------------------- which form


def test_the_precise_form_is_taken_by_the_rows_that_need_it(seen, monkeypatch):
    far, _ = _maths.RANGES[np.dtype(np.float32)]
    folded = []
    real = _maths.fold
    monkeypatch.setattr(
        _maths, "fold", lambda x, *a, **k: folded.append(x.shape) or real(x, *a, **k)
    )
    for shape in ((100, 10), (3000, 10), (1000, 200)):
        x = RNG.normal(size=shape).astype(np.float32)
        n = shape[1]
        for value, needs in ((far - 1, False), (far + 1, True), (np.nan, True), (-np.inf, False)):
            folded.clear()
            changed = x.copy()
            changed[5, 3] = value
            ps.log_softmax(changed)
            assert bool(folded) == needs
            assert all(shape in ((1, n), (n, 1)) for shape in folded)


# --------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize("dtype", ["float32", "float16", ">f8", "int32"])
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 300), (1, 70_000), (70_000, 1), (300, 40)])
def test_the_input_is_never_handed_back(shape, dtype):
    """A transposed row is contiguous as it is, and no copy by itself."""
    x = (RNG.normal(size=shape) * 9).astype(dtype)
    before = x.tobytes()
    for axis in (0, 1):
        t = np.zeros(x.shape[1 - axis], np.int8)
        found = [f(x, axis=axis) for f in (ps.softmax, ps.log_softmax, ps.logsumexp)]
        found += ps.cross_entropy_value_and_grad(x, t, axis=axis)[1:]
        assert not any(np.shares_memory(x, y) for y in found)
    assert x.tobytes() == before


@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize("shape", [(1 << 18, 64), (1 << 14, 1024), (1 << 10, 1 << 14)])
def test_scratch_is_a_small_share_of_the_array(shape, confident):
    x = np.zeros(shape, np.float32)  # 64 MB
    if confident:
        x[:, 5] = 60  # beyond the plain form
    t = np.zeros(len(x), np.int64)
    for most, function in (
        (1.15, lambda: ps.softmax(x)),
        (1.15, lambda: ps.log_softmax(x)),
        (1.15, lambda: ps.cross_entropy_value_and_grad(x, t)),
        (0.15, lambda: ps.logsumexp(x, axis=1)),
        (0.15, lambda: ps.cross_entropy(x, t)),
    ):
        tracemalloc.start()
        try:
            function()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak <= most * x.nbytes


def test_a_small_softmax_shifts_the_rows_that_need_it(monkeypatch):
    """Others are exps over their sum, without the rounding of x - max."""
    shifted, real = [], _small.maxima
    monkeypatch.setattr(_small, "maxima", lambda x: shifted.append(x.copy()) or real(x))
    plain = np.random.default_rng(16).uniform(-80, 0, (50, 10)).astype(np.float32)
    high, low = plain + np.float32(120), plain - np.float32(20)
    x = np.concatenate([plain, high, low])
    y = ps.softmax(x)
    e = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    exact = e / e.sum(axis=1, keepdims=True)
    units = np.abs(y - exact) / np.spacing(exact.astype(np.float32))
    assert units.max() < 5
    (seen,) = shifted
    # An exp beyond the range, or a subnormal one beside a small sum.
    with np.errstate(over="ignore"):
        e = np.exp(x)
    sums = e.sum(axis=1, dtype=np.float64)
    beyond = (sums > np.finfo(np.float32).max) | ((sums < np.exp(-1)) & (e.min(axis=1) < 1e-38))
    assert beyond.any()
    assert not beyond[:50].any()
    assert {row.tobytes() for row in x[beyond]} == {row.tobytes() for row in seen}
    for row, found in zip(x, y, strict=True):
        np.testing.assert_array_equal(ps.softmax(row), found)


@pytest.mark.parametrize("shape", [(2000, 100), (300, 1000)])
def test_log_softmax_vjp_of_any_size_is_for_tiles(shape):
    """Of long rows and short ones, beyond small arrays and below large ones."""
    x = np.zeros(shape)
    with kernels.without("numba rows"):
        assert kernels.explain("log_softmax_vjp", x, x).startswith("numpy tiles: ")
        assert kernels.explain("softmax_vjp", x, x).startswith("portable: ")


def test_numpy_is_silenced_with_and_without_its_private_names():
    """As `np.errstate` does it: nothing warns, and the caller's settings are back afterwards."""
    from numpy._core import _ufunc_config

    from portable_softmax.libraries import _numpy

    assert all(hasattr(_ufunc_config, name) for name in _numpy.PRIVATE)
    assert _numpy._quiet_by(SimpleNamespace()) is _numpy._quiet_by_errstate
    with np.errstate(all="raise"):
        for quietly in (_numpy.quietly, _numpy._quiet_by_errstate):
            assert quietly(np.log, np.zeros(1))[0] == -np.inf
            with pytest.raises(FloatingPointError):
                np.log(np.zeros(1))
