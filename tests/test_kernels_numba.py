"""The kernels that Numba compiles: which of their paths ran, and that each is exact."""

from __future__ import annotations

import importlib
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import reference
from backends import ml_dtypes, np_dtype
from calls import as_tuple
from mpmath import mp

import portable_softmax as ps
from bench import exact
from portable_softmax import kernels
from portable_softmax.kernels import _threads

pytestmark = pytest.mark.numba

ROWS = ("softmax", "log_softmax", "logsumexp")
LOSSES = ("cross_entropy", "cross_entropy_value_and_grad")
DTYPES = ("float32", "float64", "float16", *(("bfloat16",) if ml_dtypes else ()))
_SLOW = pytest.mark.slow("Numba compiles every kernel for this dtype")
EVERY_DTYPE = [pytest.param(d, marks=_SLOW if "16" in d else ()) for d in DTYPES]
ONE_HALF_TYPE = EVERY_DTYPE[:3]
NAME = "numba rows: one pass in cache"


@pytest.fixture
def every_size():
    """Arrays of every size take the kernels."""
    with kernels.use("numba rows"):
        yield


def heavy(name):
    return importlib.import_module(f"portable_softmax.kernels._numba.{name}")


@pytest.fixture
def plans(monkeypatch):
    """How the calls were worked on: in which layout, and in how many pieces."""
    driver, seen = heavy("_driver"), []
    real = driver.plan

    def spy(*args, **options):
        seen.append(real(*args, **options))
        return seen[-1]

    monkeypatch.setattr(driver, "plan", spy)
    return seen


# --------------------------------------------------------------------------- accuracy


def families(n, dtype):
    """Rows on both sides of a remainder of 1, and the hard ones."""
    rng = np.random.default_rng(n)
    x = rng.standard_normal((64, n))
    x[8:16, 3] = x[8:16].max() + np.linspace(20, 100, 8)  # confident
    x[16:24] = rng.uniform(-80, 0, (8, n))
    x[24:32] = 0.0  # ties
    x[32:40] += 1e4
    # Remainders around 1, and around n * exp(-5), most of them differences that round alike.
    x[40:48] = 9.0 + np.linspace(-0.3, 0.3, 8)[:, None] - np.log(n)
    x[40:48, n // 2] = 9.0
    x[48:56, :] = -5.0 + np.linspace(-0.3, 0.3, 8)[:, None]
    x[48:56, 1] = 1e-3
    x[56:, 1:] = -np.inf
    x[56:, 2] = np.linspace(-100, 0, 8)
    return x.astype(np_dtype(dtype))


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.parametrize("n", [4, 5, 10, 16, 63, 79, 127, 128, 255, 256, 1003, 4097, 9000])
def test_every_kind_of_row_is_exact(every_size, plans, n, dtype):
    if not exact.measures(dtype):
        pytest.skip("np.longdouble is no longer than float64 on this machine")
    x = families(n, dtype)
    rng = np.random.default_rng(0)
    labels = np.where(np.arange(64) % 2, x.astype(np.float64).argmax(1), rng.integers(0, n, 64))
    labels = np.where(np.isinf(x[np.arange(64), labels].astype(np.float64)), 0, labels)
    with np.errstate(all="ignore"):
        answers = exact.solve(x, labels)
    half = dtype in ("float16", "bfloat16")
    unit = 2.0 ** -exact.FORMATS[dtype][0]
    m = x.astype(np.longdouble).max(-1)
    bounds = {
        "softmax": 7,  # not 5: equal terms round alike in each lane of a sum
        "log_softmax": 8,
        "logsumexp": np.maximum(
            6, 4 * unit * np.maximum(1, abs(m)) / exact.unit(answers.logsumexp, dtype)
        ),
        "cross_entropy": 8,
    }
    results = {
        "softmax": ps.softmax(x),
        "log_softmax": ps.log_softmax(x),
        "logsumexp": ps.logsumexp(x, axis=-1),
        "cross_entropy": ps.cross_entropy(x, labels, reduction="none"),
    }
    for name, result in results.items():
        answer = getattr(answers, name)
        same = result.astype(np.longdouble) == answer  # infinities
        with np.errstate(all="ignore"):
            error = np.abs(result.astype(np.longdouble) - answer) / exact.unit(answer, dtype)
        counted = ~same
        if name in ("log_softmax", "cross_entropy"):
            counted &= np.abs(answer) > exact.smallest_normal(dtype)
        bound = np.broadcast_to(0.51 if half else bounds[name], answer.shape)
        assert np.all(~counted | (error <= bound)), (name, float(np.max(error[counted])))
    driver = heavy("_driver")
    size = n * (8 if dtype == "float64" else 4)
    folds = "groups" if driver.SHORT <= size <= driver.MIDDLE else "rows"
    folds = "blocks" if size < driver.SHORT else folds
    folds = "narrow" if n <= driver.FEW else folds
    writes = "rows" if folds == "groups" and size > 1024 else folds
    assert [plan.layout for plan in plans[:4]] == [folds, writes, folds, folds]
    loss, grad = ps.cross_entropy_value_and_grad(x, labels, reduction="none")
    np.testing.assert_allclose(loss, results["cross_entropy"], rtol=4 * unit)
    got = grad[np.arange(64), labels].astype(np.longdouble)
    off = np.abs(got - answers.label_gradient)
    relative = 1e-5 if not half else 2 * unit
    # Each of n terms may round to 0 there, half a step; two steps for what rounds after them.
    subnormal = (2 + n / 2) * (2 * unit * exact.smallest_normal(dtype))
    assert np.all(off <= relative * np.abs(answers.label_gradient) + subnormal)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [10, 1000])
def test_a_confident_row_keeps_its_digits(every_size, n, dtype):
    """The rest is one exponential: the rounding error of its difference counts in full.

    The loss has the bits of log_softmax; a mean need not: of three equal numbers, it may be one
    unit off.
    """
    for gap in (30, 40, 64.3, 80.7):
        x = np.full((3, n), -1e4, dtype)
        x[:, 0], x[:, 1] = 0.1, 0.1 - gap
        d = np.longdouble(x[0, 1]) - np.longdouble(x[0, 0])
        truth = np.log1p(np.exp(d))
        losses = ps.cross_entropy(x, np.zeros(3, int), reduction="none")
        assert np.all(abs(losses - truth) <= 4 * np.spacing(losses))
        np.testing.assert_array_equal(-ps.log_softmax(x)[:, 0], losses)
        mean = ps.cross_entropy(x, np.zeros(3, int))
        np.testing.assert_array_max_ulp(mean, losses[0], maxulp=1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("apart", [1, 8, 16, 64, 128, 256])
def test_a_confident_row_with_its_maximum_at_any_place(every_size, apart, dtype):
    """The other class that counts is in its lane of the vectors or not, in its run of them or not.

    A second maximum there is no rest of a confident row.
    """
    n = 300
    places = np.arange(n)
    others = (places + apart) % n
    hidden = (places + 5) % n  # by a mask
    for gap in (24.75, 0.0):
        x = np.full((n, n), -1e4, dtype)
        x[places, places] = 0.25
        x[places, others] = 0.25 - gap
        truth = np.log1p(np.exp(-np.longdouble(gap)))
        y = x.copy()
        y[places, hidden] = 40.0
        found = {
            "loss": ps.cross_entropy(x, places, reduction="none"),
            "with its gradient": ps.cross_entropy_value_and_grad(x, places, reduction="none")[0],
            "masked": ps.cross_entropy(y, places, reduction="none", where=y < 40),
            "log_softmax": -ps.log_softmax(x)[places, places],
            "tempered": -ps.log_softmax(x * 4, temperature=4.0)[places, places],
        }
        for name, losses in found.items():
            assert np.all(abs(losses - truth) <= 4 * np.spacing(losses)), (name, gap)


@pytest.mark.parametrize("dtype", ONE_HALF_TYPE)
def test_long_rows_are_put_together(every_size, dtype):
    """Each part has a maximum of its own: rising, falling, nothing but -inf, infinite, nan."""
    part = heavy("_long").PART
    n = 3 * part + 5
    rng = np.random.default_rng(0)
    x = rng.standard_normal((14, n))
    steps = np.arange(n) // part
    x[0] += 10 * steps
    x[1] -= 10 * steps
    x[2] += 300 * steps
    x[3] -= 300 * steps
    x[4, :part] = -np.inf
    x[5, :-1] = -np.inf
    x[6, part : 3 * part] = -np.inf
    x[7] = -np.inf
    x[8, part + 3] = np.inf
    x[9, part + 3], x[9, 0] = np.inf, np.nan
    x[10, -1] = np.nan
    x[11, :part], x[11, 7] = -np.inf, np.nan
    x[12] = -500.0 - 100 * steps
    x[13], x[13, -1] = -60.0, 0.0
    x = x.astype(np_dtype(dtype))
    labels = np.where(np.isfinite(x).all(-1), n - 1, 0)
    labels[5] = n - 1
    with np.errstate(all="ignore"):
        for name in ROWS:
            assert kernels.explain(name, x, axis=-1).startswith(NAME)
            agree(lambda name=name: getattr(ps, name)(x, axis=-1), dtype)
        for options in ({}, {"label_smoothing": 0.2}, {"weight": np.ones(n, x.dtype)}):
            agree(
                lambda options=options: ps.cross_entropy_value_and_grad(
                    x, labels, reduction="none", **options
                ),
                dtype,
            )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("axis", [0, 1])
def test_logsumexp_of_log_probabilities(every_size, axis, dtype):
    """Near 0 the maximum and the logarithm cancel, but for what was rounded off the logarithm."""
    x = np.random.default_rng(1).normal(0, 2, (20_000, 100)).astype(np.longdouble)
    x = (x - np.log(np.exp(x).sum(1, keepdims=True))).astype(dtype)
    truth = np.log(np.exp(x.astype(np.longdouble)).sum(1))
    found = ps.logsumexp(x if axis else np.ascontiguousarray(x.T), axis=axis)
    assert np.all(abs(found - truth) <= 2 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("form", ["exp", "log_softmax_vjp", "log_softmax_vjp_of_many"])
def test_exp_and_log1p_are_exact(form, dtype):
    from numba import njit

    _exp, memory = heavy("_exp"), heavy("_memory")
    log1p, pointer, load, store = _exp.log1p, memory.pointer, memory.load, memory.store

    @heavy("_vectors").elementwise
    def exp(builder, x):
        return _exp.Writer(builder, x).exp_and_expm1(x)[0]

    if form != "exp":  # what is left beside an upstream gradient of 0 whose row's sum is -1
        vjp = getattr(_exp, form)
        exp = njit(lambda x: vjp(x, 0.0, -1.0))

    @njit
    def exps(x, y):
        for i in range(x.shape[0]):
            store(pointer(y), i, exp(load(pointer(x), i)))

    @njit
    def logs(x, y):
        for i in range(x.shape[0]):
            store(pointer(y), i, log1p(load(pointer(x), i)))

    rng = np.random.default_rng(0)
    lowest, highest = {"float32": (-104, 88.7), "float64": (-746, 709.7)}[dtype]
    x = rng.uniform(lowest, highest, 300_000).astype(dtype)
    y = np.empty_like(x)
    exps(x, y)
    truth = np.exp(x.astype(np.longdouble))
    smallest = np.longdouble(np.finfo(dtype).smallest_subnormal)
    # One unit of the least number below 1 is half of that above it.
    assert np.max(np.abs(y - truth) / np.maximum(exact.unit(truth, dtype), smallest)) < 1.05
    special = np.asarray([-np.inf, np.nan, 0.0, -1e30, lowest - 1, np.inf, 1e30, 1000.0], dtype)
    exps(special, y)
    # A gradient of 0 times infinity is no exponential.
    end = [np.inf if form == "exp" else np.nan] * 3
    np.testing.assert_array_equal(y[:8], np.asarray([0, np.nan, 1, 0, 0, *end], dtype))
    x = np.concatenate([10.0 ** rng.uniform(-30, 8, 100_000), rng.uniform(0, 3, 100_000)])
    x = x.astype(dtype)
    logs(x, y)
    truth = np.log1p(x.astype(np.longdouble))
    assert np.max(np.abs(y[: x.size] - truth) / exact.unit(truth, dtype)) < 2.2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tanh_and_its_slope_are_exact(dtype):
    """Read one by one and in vectors: what a lane reads as depends on that lane alone."""
    from numba import njit

    softcap, vectors, memory = heavy("_softcap"), heavy("_vectors"), heavy("_memory")
    capped, slopes, pointer = softcap.capped, softcap.sloped, memory.pointer
    load, store, read, write = memory.load, memory.store, vectors.read, vectors.write
    lanes = vectors.lanes

    @njit
    def numbers(x, y, slope, cap):
        for i in range(x.shape[0]):
            store(pointer(y), i, load(capped(pointer(x), cap, 0), i))
            store(pointer(slope), i, load(slopes(pointer(x), cap), i))

    @njit
    def whole(x, y, slope, cap):
        for i in range(0, x.shape[0], lanes(pointer(x))):
            write(pointer(y), i, read(capped(pointer(x), cap, 0), i, None, 0.0), None)
            write(pointer(slope), i, read(slopes(pointer(x), cap), i, None, 0.0), None)

    rng, cap = np.random.default_rng(0), np.dtype(dtype).type(1)
    sizes = [
        10.0 ** rng.uniform(-30, 1, 100_000),
        rng.uniform(0.9, 1.1, 100_000),
        np.linspace(0, 9, 99_984),
    ]
    x = np.concatenate([*sizes, [0.0, 1.0, 2.0, np.inf] * 4]).astype(dtype)
    x = rng.permutation(x * rng.choice([-1, 1], x.size).astype(dtype))
    y, slope = np.empty_like(x), np.empty_like(x)
    numbers(x, y, slope, cap)
    exactly = x.astype(np.longdouble)
    truth = np.tanh(exactly)
    assert np.max(abs(y - truth) / exact.unit(truth, dtype)) < 2.6
    truth = 1 / np.cosh(exactly) ** 2
    smallest = np.longdouble(np.finfo(dtype).smallest_normal)
    assert np.max(abs(slope - truth) / exact.unit(np.maximum(truth, smallest), dtype)) < 5.5
    in_vectors, its_slope = np.empty_like(x), np.empty_like(x)
    whole(x, in_vectors, its_slope, cap)
    np.testing.assert_array_equal(in_vectors, y)
    np.testing.assert_array_equal(its_slope, slope)


# --------------------------------------------------------------------------- every layout


def agree(call, dtype="float32", units=64):
    """Compare with the portable path, and return the answer."""
    taken = as_tuple(call())
    with kernels.portable():
        plain = as_tuple(call())
    for one, other in zip(taken, plain, strict=True):
        assert type(one) is type(other)
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
        half = dtype in ("float16", "bfloat16")
        unit = 2.0 ** (1 - exact.FORMATS[dtype][0])
        largest = np.max(np.abs(b[np.isfinite(b)]), initial=0)
        np.testing.assert_allclose(
            a, b, rtol=(2 if half else units) * unit, atol=(2 if half else 16) * unit * largest
        )
    return taken


LAYOUTS = [
    ((70, 33), -1),
    ((3, 5, 7), (1, 2)),
    ((3, 5, 7), None),
    ((40, 70), 0),
    ((2, 40, 3), 1),
    ((2, 3, 40, 30), (1, 2)),
    ((1, 200), -1),
    ((200, 1), -1),
    ((200, 1), 0),
    ((7,), 0),
    ((2000, 3), 0),
    ((300, 2), 1),
]


@pytest.mark.slow("Numba compiles each layout")
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS, ids=str)
def test_every_axis(every_size, shape, axis, dtype):
    """The two half types share the layouts: each has rows, columns and rows of few classes."""
    if ml_dtypes and dtype in ("float16", "bfloat16"):
        of_float16 = LAYOUTS.index((shape, axis)) in (0, 3, 4, 6, 7, 10)
        if of_float16 != (dtype == "float16"):
            pytest.skip("the other half type has this layout")
    rng = np.random.default_rng(1)
    x = (3 * rng.standard_normal(shape)).astype(np_dtype(dtype))
    dy = rng.standard_normal(shape).astype(np_dtype(dtype))
    before = x.tobytes(), dy.tobytes()
    for name in ROWS:
        assert kernels.explain(name, x, axis=axis).startswith(NAME)
        agree(lambda name=name: getattr(ps, name)(x, axis=axis), dtype)
    for name in ("softmax", "log_softmax"):
        agree(lambda name=name: getattr(ps, name)(x, axis=axis, temperature=0.7), dtype)
        y = getattr(ps, name)(x, axis=axis)
        assert kernels.explain(f"{name}_vjp", y, dy, axis=axis).startswith(NAME)
        agree(lambda name=name, y=y: getattr(ps, f"{name}_vjp")(y, dy, axis=axis), dtype)
    assert (x.tobytes(), dy.tobytes()) == before


def test_what_is_left_to_the_next_kernel(every_size):
    x = np.ones((4, 6, 5), np.float32)

    def why(operation, *arrays, **options):
        explained = kernels.explain(operation, *arrays, **options)
        return explained.partition("not numba rows: ")[2].partition("; not ")[0]

    t = np.zeros((4, 6), np.int64)

    unaligned = np.zeros(x.nbytes + 1, "u1")[1:].view(x.dtype).reshape(x.shape)
    assert why("softmax", unaligned) == "not in C order"
    assert why("logsumexp", x, b=x * 1j) == "options: complex weights"
    assert why("softmax", x.astype(">f4")) == "dtype float32 byteswapped"
    assert kernels.explain("softmax", x[:0]) == "portable: nothing to reduce"
    assert why("softmax_vjp", x, x.astype(float)) == "dtypes: float32 and float64"
    assert why("cross_entropy", x[..., 0], t[:, 0], softcap=1e30) == "a softcap of 1e+30"
    given = {"softcap": 2.0, "label_smoothing": 0.1, "axis": 2}
    assert why("cross_entropy", x, t, **given) == "options together: label_smoothing, softcap"
    given = {"where": x > 0, "label_smoothing": 0.1, "axis": 2}
    assert why("cross_entropy", x, t, **given) == "options together: label_smoothing, where"
    assert why("cross_entropy", x, x, weight=x[0, 0]) == "probabilities with weight"
    assert why("softmax", np.ones((20_000, 2)), axis=0).startswith("20,000 classes along an axis")


@pytest.mark.parametrize("dtype", ONE_HALF_TYPE)
@pytest.mark.parametrize("rows", [1, 15, 37])
def test_groups_of_rows_come_to_the_bits_of_single_rows(every_size, monkeypatch, rows, dtype):
    """The loss of a row and its log_softmax are of different layouts.

    What a group is folded by knows neither options nor labels: float32 meets all of them, and of
    the others each meets every second.
    """
    driver, n = heavy("_driver"), 300
    x = np.concatenate([families(n, dtype), families(n, dtype)[:9]])[:: 64 // rows][:rows]
    labels, mask = np.arange(rows) * 7 % n, np.random.default_rng(0).random(x.shape) < 0.7
    mask[np.arange(rows), labels] = True

    def every():
        found = []
        for call in chosen:
            found += call()
        return found

    def losses(**options):
        given = {"reduction": "none", **options}
        both = ps.cross_entropy_value_and_grad(x, labels, **given)
        return *both, ps.cross_entropy(x, labels, **given)

    q = np.abs(x.astype(np.float32))
    calls = (
        lambda: [ps.logsumexp(x, axis=-1)],
        lambda: [ps.logsumexp(x, axis=-1, where=mask)],
        lambda: [ps.softmax(x, where=mask)],
        lambda: [ps.softmax(x), ps.softmax(x, temperature=0.7)],
        losses,
        lambda: losses(softcap=5.0),
        lambda: losses(where=mask),
        lambda: losses(label_smoothing=0.1),
        lambda: ps.cross_entropy_value_and_grad(x, q / q.max(), reduction="none"),
    )
    chosen = {"float32": calls, "float64": calls[::2]}.get(dtype, calls[1::2])

    with np.errstate(all="ignore"):
        grouped = every()
        monkeypatch.setattr(driver, "MIDDLE", 0)
        for one, other in zip(grouped, every(), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("rows", "layout"), [(16, "groups"), (20, "rows")])
def test_no_group_crosses_the_end_of_a_repeated_mask(every_size, plans, rows, layout):
    rng = np.random.default_rng(0)
    x, mask = rng.standard_normal((3, rows, 300)), rng.random((rows, 300)) < 0.5
    found = ps.softmax(x, where=mask), ps.logsumexp(x, axis=-1, where=mask)
    assert [plan.layout for plan in plans] == [layout] * 2
    whole = np.broadcast_to(mask, x.shape).copy()
    whole[0, 0, 0] ^= True  # nothing is repeated
    expected = ps.softmax(x, where=whole), ps.logsumexp(x, axis=-1, where=whole)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one[1:], other[1:])
        np.testing.assert_array_equal(one[0, 1:], other[0, 1:])


def test_read_only_arrays_are_not_compiled_anew(every_size):
    x = np.random.default_rng(0).standard_normal((50, 7))
    t = np.arange(50) % 7
    writeable = ps.softmax(x), ps.cross_entropy(x, t)
    blocks = heavy("_kernels").LAYOUTS["blocks"]

    def compiled():
        return [len(blocks[name].overloads) for name in ("softmax", "cross_entropy")]

    before = compiled()
    for array in (x, t):
        array.flags.writeable = False
    np.testing.assert_array_equal(ps.softmax(x), writeable[0])
    assert ps.cross_entropy(x, t) == writeable[1]
    assert compiled() == before


@pytest.mark.parametrize(("shape", "axis"), [((40, 10), -1), ((6, 300), -1), ((2, 10, 9), 1)])
@pytest.mark.parametrize("upstream", [np.inf, np.nan])
def test_a_class_that_a_mask_left_out_passes_no_gradient_on(every_size, shape, axis, upstream):
    rng = np.random.default_rng(0)
    mask = rng.random(shape) < 0.3
    log_y = ps.log_softmax(rng.standard_normal(shape), axis=axis, where=~mask)
    dy = rng.standard_normal(shape)
    expected = ps.log_softmax_vjp(log_y, np.where(mask, 0, dy), axis=axis)
    assert np.all(expected[mask] == 0)
    dy[mask] = upstream
    assert kernels.explain("log_softmax_vjp", log_y, dy, axis=axis).startswith(NAME)
    np.testing.assert_array_equal(ps.log_softmax_vjp(log_y, dy, axis=axis), expected)


# --------------------------------------------------------------------------- temperature


@pytest.mark.slow("each layout is compiled for each dtype")
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.parametrize(("n", "axis"), [(10, -1), (300, -1), (9000, -1), (40, 0)])
@pytest.mark.parametrize("temperature", [0.1, 3.0, 1e3])
def test_a_tempered_row_is_exact(every_size, n, axis, dtype, temperature):
    if not exact.measures(dtype):
        pytest.skip("np.longdouble is no longer than float64 on this machine")
    x = families(n, dtype)
    given = np.ascontiguousarray(np.moveaxis(x, -1, axis))
    wide = x.astype(np.longdouble)
    m = wide.max(-1, keepdims=True)
    d = (wide - m) / np.longdouble(temperature)
    rest = np.exp(d).sum(-1, keepdims=True) - 1
    with np.errstate(all="ignore"):
        # Digits that the sum loses beside the maximum are summed without it.
        below = np.where(d == 0, 0, np.exp(d)).sum(-1, keepdims=True)
        rest = np.where(np.sum(d == 0, -1, keepdims=True) == 1, below, rest)
        log_y = d - np.log1p(rest)
        y = np.exp(log_y)
    half = dtype in ("float16", "bfloat16")
    smallest = exact.smallest_normal(dtype)
    for name, truth, bound in (
        ("softmax", y, 6),
        ("log_softmax", log_y, 8),
    ):
        result = getattr(ps, name)(given, axis=axis, temperature=temperature)
        result = np.moveaxis(result, axis, -1).astype(np.longdouble)
        with np.errstate(all="ignore"):
            error = np.abs(result - truth) / exact.unit(truth, dtype)
        counted = (result != truth) & (np.abs(truth) > smallest)
        assert np.all(~counted | (error <= (0.51 if half else bound))), (name, error[counted].max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "axis"), [(10, -1), (300, -1), (5000, -1), (40, 0)])
def test_a_temperature_beyond_the_range_gives_the_limit(every_size, n, axis, dtype):
    """Equal shares when it is large, all for the maximum when it is small; never a nan."""
    x = np.random.default_rng(0).standard_normal((4, n)).astype(np_dtype(dtype))
    x[0, 3], x[1, 0], x[:, 1] = 8.0, -30.0, -np.inf
    largest = np.argmax(x, axis=-1)
    given = np.ascontiguousarray(np.moveaxis(x, -1, axis))
    for temperature in (1e40, 1e300):
        shares = np.moveaxis(ps.softmax(given, axis=axis, temperature=temperature), axis, -1)
        logs = np.moveaxis(ps.log_softmax(given, axis=axis, temperature=temperature), axis, -1)
        assert np.all(shares[:, 1] == 0)
        assert np.all(logs[:, 1] == -np.inf)
        rtol = 1e-2 if dtype == "bfloat16" else 1e-3 if dtype == "float16" else 1e-6
        np.testing.assert_allclose(np.delete(shares, 1, -1).astype(float), 1 / (n - 1), rtol=rtol)
        np.testing.assert_allclose(np.delete(logs, 1, -1).astype(float), -np.log(n - 1), rtol=rtol)
    for temperature in (1e-40, 1e-300, 5e-324):
        shares = np.moveaxis(ps.softmax(given, axis=axis, temperature=temperature), axis, -1)
        np.testing.assert_array_equal(shares, np.eye(n)[largest])


def test_a_difference_beyond_the_range_is_divided_all_the_same(every_size):
    x = np.asarray([[3e38, -3e38, 0.0]], np.float32)
    truth = np.exp([0.0, -6.0, -3.0]) / np.exp([0.0, -6.0, -3.0]).sum()
    np.testing.assert_allclose(ps.softmax(x, temperature=1e38)[0], truth, rtol=1e-6)
    np.testing.assert_allclose(ps.log_softmax(x, temperature=1e38)[0], np.log(truth), rtol=1e-6)


# --------------------------------------------------------------------------- the same bits


def hostile(shape, dtype):
    """Rows along the last axis that want care, and some that are infinite or nan."""
    rng = np.random.default_rng(3)
    x = 3 * rng.standard_normal(shape)
    rows = x.reshape(-1, shape[-1])
    rows[1::7, 0] += 40
    rows[2::11, 1] = np.inf
    rows[3::13, -1] = np.nan
    rows[4::17] = -np.inf
    rows[5::19, ::2] = -np.inf
    rows[6::23, :1], rows[6::23, 1:2] = np.inf, np.nan
    return x.astype(np_dtype(dtype))


def answers(x, labels, axis):
    """What every operation says of rows, each by itself."""
    n = x.shape[axis]
    weight = np.linspace(0.5, 2.0, n)
    options = {"axis": axis, "reduction": "none", "ignore_index": 2}
    dy = np.where(np.isfinite(x.astype(float)), x, 0).astype(x.dtype)
    y, log_y = ps.softmax(dy, axis=axis), ps.log_softmax(x, axis=axis)
    return [
        ps.softmax(x, axis=axis),
        ps.softmax(x, axis=axis, temperature=0.7),
        log_y,
        ps.log_softmax(x, axis=axis, temperature=0.7),
        np.expand_dims(ps.logsumexp(x, axis=axis), axis),
        ps.softmax_vjp(y, dy, axis=axis),
        ps.log_softmax_vjp(log_y, dy, axis=axis),
        np.expand_dims(ps.cross_entropy(x, labels, **options), axis),
        *(
            np.expand_dims(a, axis) if a.ndim < x.ndim else a
            for more in ({}, {"weight": weight, "label_smoothing": 0.1, "z_loss": 0.01})
            for a in ps.cross_entropy_value_and_grad(x, labels, **options, **more)
        ),
    ]


# The last block, vector or part is not full.
SHAPES = [((131, 10), -1), ((150, 37), -1), ((40, 300), -1), ((5, 9001), -1), ((3, 40, 39), 1)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", ONE_HALF_TYPE)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_rows_in_another_order_have_the_same_bits(every_size, shape, axis, dtype):
    rng = np.random.default_rng(0)
    lengths = np.delete(shape, axis)
    x = np.ascontiguousarray(np.moveaxis(hostile((*lengths, shape[axis]), dtype), -1, axis))
    labels = rng.integers(0, shape[axis], lengths)
    before = answers(x, labels, axis)
    order = [rng.permutation(k) for k in lengths]
    for a, along in enumerate(order):
        at = a if a < axis % x.ndim else a + 1
        x, labels = np.take(x, along, at), np.take(labels, along, a)
        before = [np.take(one, along, at) for one in before]
    for one, other in zip(before, answers(x, labels, axis), strict=True):
        np.testing.assert_array_equal(one, other)
    if axis == -1:  # and alone
        for i in (0, len(x) - 1):
            for one, other in zip(
                before, answers(x[i : i + 1], labels[i : i + 1], axis), strict=True
            ):
                np.testing.assert_array_equal(one[i : i + 1], other)


@pytest.mark.parametrize("shape", [(1000, 10), (300, 300), (2, 40, 190)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_number_of_threads_changes_no_bit(every_size, plans, monkeypatch, shape, reduction):
    """Nor does who takes which piece."""
    monkeypatch.setattr(heavy("_driver"), "LARGEST", 1 << 12)
    monkeypatch.setattr(heavy("_driver"), "THREADED", 0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    weight = rng.random(shape[1])
    labels = rng.integers(0, shape[1], np.delete(shape, 1))
    results = []
    for threads in (1, 2, 3, 2, 1):
        monkeypatch.setattr(_threads, "limit", lambda threads=threads: threads)
        plans.clear()
        options = {"axis": 1, "weight": weight, "reduction": reduction}
        results.append(
            [
                ps.softmax(x, axis=1),
                ps.logsumexp(x, axis=1),
                ps.cross_entropy(x, labels, **options),
                *ps.cross_entropy_value_and_grad(x, labels, **options),
            ]
        )
        assert all(plan.pieces > 3 for plan in plans)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


DIGEST = """
import hashlib, sys, numpy as np, portable_softmax as ps
OPERATIONS = ("softmax", "log_softmax", "logsumexp")
def calls(x, t):
    yield from (getattr(ps, name)(x, axis=axis) for name in OPERATIONS for axis in (-1, 0))
    yield from ps.cross_entropy_value_and_grad(x, t)
    yield from ps.cross_entropy_value_and_grad(x, t, label_smoothing=0.1, reduction="none")
    yield ps.softmax_vjp(ps.softmax(x), x)
def arrays(*shapes):
    rng = np.random.default_rng(0)
    for rows, n in shapes:
        x = rng.standard_normal((rows, n))
        t = rng.integers(0, n, rows)
        yield from ((x.astype(dtype), t) for dtype in ("float32", "float64", "float16"))
if len(sys.argv) > 1:
    for x, t in arrays((7000, 10), (300, 300)):
        for _ in calls(x, t): pass
digest = hashlib.sha256()
for x, t in arrays((7, 10), (32, 300), (7001, 10), (257, 300)):
    for answer in calls(x, t): digest.update(np.asarray(answer).tobytes())
print(digest.hexdigest())
"""


@pytest.mark.slow("two fresh processes compile kernels of every layout")
def test_earlier_calls_change_no_bit():
    """Neither of small arrays nor of large ones, whatever is compiled by then."""
    run = [sys.executable, "-c", DIGEST]
    first, later = (
        subprocess.run([*run, *more], capture_output=True, text=True, check=True).stdout
        for more in ((), ("large calls first",))
    )
    assert first == later


# --------------------------------------------------------------------------- losses


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.parametrize(("shape", "axis"), [((90, 10), -1), ((30, 200), 1), ((2, 20, 9), 1)])
def test_every_option_of_a_loss(every_size, shape, axis, dtype):
    rng = np.random.default_rng(2)
    x = (3 * rng.standard_normal(shape)).astype(np_dtype(dtype))
    n = shape[axis]
    positions = np.delete(shape, axis)
    labels = rng.integers(0, n, positions)
    weight = rng.random(n)
    weight[1] = 0
    ignored = np.where(rng.random(positions) < 0.3, -1, labels)
    wrong = np.where(rng.random(positions) < 0.3, n + 5, labels)
    hostile = x.copy()
    np.moveaxis(hostile, axis, -1)[ignored == -1] = np.nan
    low = x.copy()
    np.moveaxis(low, axis, -1)[..., 1] = -np.inf
    for logits, t, options in (
        (x, labels, {}),
        (x, labels, {"weight": weight, "reduction": "sum"}),
        (hostile, ignored, {"ignore_index": -1}),
        (hostile, ignored, {"ignore_index": -1, "weight": weight, "z_loss": 0.1}),
        (hostile, ignored, {"ignore_index": -1, "weight": weight, "label_smoothing": 0.2}),
        (x, labels, {"label_smoothing": 1.0, "z_loss": 0.3, "reduction": "none"}),
        (low, labels, {"weight": weight, "label_smoothing": 0.2, "reduction": "none"}),
        (low, labels, {"reduction": "none"}),
        (x, wrong, {"check_labels": False, "reduction": "none"}),
        (x, wrong, {"check_labels": False, "weight": weight}),
        (x, labels, {"weight": np.zeros(n)}),
        (x, np.full(positions, -1), {"ignore_index": -1}),
        (x, np.full(positions, -1), {"ignore_index": -1, "reduction": "sum"}),
    ):
        for name in LOSSES:
            assert kernels.explain(name, logits, t, axis=axis, **options).startswith(NAME)
            taken = agree(
                lambda name=name, logits=logits, t=t, options=options: getattr(ps, name)(
                    logits, t, axis=axis, **options
                ),
                dtype,
                units=256,
            )
        if logits is hostile:
            assert np.all(np.moveaxis(taken[1], axis, -1)[ignored == -1] == 0)


@pytest.mark.parametrize("unused", [np.inf, np.nan])
@pytest.mark.parametrize(("shape", "axis"), [((40, 10), -1), ((6, 300), -1), ((2, 10, 9), 1)])
def test_a_weight_that_no_label_names_has_no_effect(every_size, shape, axis, unused):
    x = np.random.default_rng(0).standard_normal(shape)
    n = shape[axis]
    labels = np.arange(x.size // n).reshape(np.delete(shape, axis)) % (n - 1)
    weight = np.linspace(0.5, 2.0, n)
    expected = ps.cross_entropy_value_and_grad(x, labels, axis=axis, weight=weight)
    weight[-1] = unused
    found = ps.cross_entropy_value_and_grad(x, labels, axis=axis, weight=weight)
    for one, other in zip(found, expected, strict=True):
        assert np.all(np.isfinite(one))
        np.testing.assert_array_equal(one, other)
    assert ps.cross_entropy(x, labels, axis=axis, weight=weight) == expected[0]


@pytest.mark.parametrize("dtype", [f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64)])
def test_labels_of_every_dtype(every_size, dtype):
    x = np.random.default_rng(0).standard_normal((4, 6))
    labels = np.asarray([0, 5, 3, 1], dtype)
    expected = ps.cross_entropy(x, labels.astype(np.int64), reduction="none")
    got = ps.cross_entropy(x, labels, reduction="none", ignore_index=-1 if dtype[0] == "u" else 9)
    np.testing.assert_array_equal(got, expected)
    largest = np.iinfo(dtype).max
    labels[2] = largest
    ignored = ps.cross_entropy(x, labels, reduction="none", ignore_index=int(largest))
    np.testing.assert_array_equal(ignored, np.where([0, 0, 1, 0], 0, expected))
    message = rf"labels\[2\] is {largest}, outside \[0, 6\)"
    for options in ({}, {"ignore_index": -1}, {"ignore_index": -100, "weight": np.ones(6)}):
        for name in LOSSES:
            with pytest.raises(IndexError, match=message):
                getattr(ps, name)(x, labels, **options)
    assert np.isnan(ps.cross_entropy(x, labels, check_labels=False))


def test_the_mean_of_many_losses(every_size):
    x = np.random.default_rng(0).standard_normal((262_144, 4)).astype(np.float32)
    t = np.zeros(len(x), np.int64)
    truth = exact.solve(x, t).cross_entropy.mean()
    assert abs(ps.cross_entropy(x, t) - truth) <= np.spacing(np.float32(truth))


# --------------------------------------------------------------------------- running sums

RUNNING = "numba rows: a row in each lane"


@cache
def beginnings(dtype):
    """Rows longer than a part, their upstream gradients, and both answers from many digits."""
    rng = np.random.default_rng(0)
    n = 530
    x, dy = rng.standard_normal((2, 11, n))
    x[1] = np.arange(n) / 256  # a slow rise, and a fast one
    x[2] += np.arange(n) * 3.0
    x[3] -= np.arange(n) / 4
    x[4] = -40.0
    x[4, 520] = 0.0  # confident
    x[5, :515] = -np.inf
    x[6] = 0.25
    x[7] += 1e4
    x[8, ::3] = -np.inf
    x[9] = np.where(np.arange(n) % 100 == 50, np.arange(n) / 8, -60.0)
    x[10] *= 20
    x, dy = x.astype(np_dtype(dtype)), dy.astype(np_dtype(dtype))
    y, dx, size = (np.empty(x.shape, np.longdouble) for _ in range(3))
    with mp.workdps(40):
        for i in range(len(x)):
            exps = [mp.exp(v) for v in reference.exact(x[i])]
            upstream, sums = reference.exact(dy[i]), [exps[0]]
            for e in exps[1:]:
                sums.append(sums[-1] + e)
            behind = largest = mp.mpf(0)
            for j in reversed(range(n)):
                if sums[j]:
                    behind += upstream[j] / sums[j]
                    largest += abs(upstream[j]) / sums[j]
                log = mp.log(sums[j]) if sums[j] else -mp.inf
                y[i, j], dx[i, j], size[i, j] = (
                    np.longdouble(mp.nstr(v, 25))
                    for v in (log, exps[j] * behind, exps[j] * largest)
                )
    return x, dy, y, dx, size


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_running_sums_are_exact(every_size, dtype):
    """Any axis: eleven rows take two groups of lanes, the second one in part."""
    if not exact.measures(dtype):
        pytest.skip("np.longdouble is no longer than float64 on this machine")
    x, dy, y, dx, size = beginnings(dtype)
    finite, unit = np.isfinite(y), 2.0 ** -exact.FORMATS[dtype][0]
    top = np.where(finite, np.maximum.accumulate(x.astype(np.longdouble), axis=1), 0)
    # Half types and float32 are rounded once.
    step = exact.unit(np.where(finite, y, 1), dtype)
    slack = np.maximum(6 * step, 4 * unit * np.maximum(1, np.abs(top)))
    slack = slack if dtype == "float64" else 0.501 * step
    # The exponents are differences to a maximum.
    depth = np.where(np.isfinite(x.astype(float)), top - x.astype(np.longdouble), 0)
    slopes = unit * np.abs(dx) + 2.0**-53 * (4 + depth) * size
    slopes += exact.smallest_normal(dtype) * unit
    along = {
        1: lambda a: a,
        0: lambda a: np.ascontiguousarray(a.T),
        -2: lambda a: np.ascontiguousarray(np.stack([a.T, a.T])),
    }
    for axis, laid in along.items():
        given, upstream = laid(x), laid(dy)
        found = ps.logcumsumexp(given, axis=axis)
        assert found.dtype == x.dtype
        found = found.astype(np.longdouble)
        same = found == laid(y)
        off = np.where(same, 0, found) - np.where(same, 0, laid(y))
        assert (np.abs(off) <= laid(slack)).all(), axis
        found = ps.logcumsumexp_vjp(given, upstream, axis=axis)
        assert found.dtype == x.dtype
        assert (np.abs(found.astype(np.longdouble) - laid(dx)) <= laid(slopes)).all(), axis
        assert kernels.explain("logcumsumexp", given, axis=axis) == RUNNING
        assert kernels.explain("logcumsumexp_vjp", given, upstream, axis=axis) == RUNNING


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [1, 4, 12])
def test_long_running_sums_do_not_drift(every_size, plans_of_running, rows, dtype):
    """Few rows are cut into runs; beside others they are not."""
    if not exact.measures(dtype):
        pytest.skip("np.longdouble is no longer than float64 on this machine")
    n, unit = 100_003, 2.0 ** -exact.FORMATS[dtype][0]
    i = np.arange(1, n + 1).astype(np.longdouble)
    h = 2.0**-12 * i  # its geometric series is known
    # Equal numbers; a slow fall, and a slow rise; a few large numbers.
    jumps = np.where(np.arange(n) % (n // 9) == 5, 8.0, -8.0).astype(np.longdouble)
    x = np.stack([0 * i, -h, h, jumps])
    series = np.log(np.expm1(-h) / np.expm1(-h[0]))
    y = np.stack([np.log(i), series - h[0], series + h, np.log(np.cumsum(np.exp(jumps)))])
    x, y = (np.tile(a, (3, 1))[-rows:] for a in (x, y))
    softmax = np.exp(x - y[:, -1:])
    given, last = x.astype(dtype), np.zeros(x.shape, dtype)
    last[:, -1] = 1.0
    for axis in (1, 0):
        a, dy = (np.ascontiguousarray(b if axis else b.T) for b in (given, last))
        found = ps.logcumsumexp(a, axis=axis)
        found = found if axis else found.T
        assert (np.abs(found - y) <= 3 * unit * np.maximum(np.abs(y), 1)).all()
        found = ps.logcumsumexp_vjp(a, dy, axis=axis)
        found = found if axis else found.T
        assert (np.abs(found - softmax) <= 8 * unit * softmax).all()
    assert [plan.shape[3] < n for plan in plans_of_running] == [rows < 12] * 4


@pytest.fixture
def plans_of_running(monkeypatch):
    """How running sums were worked on."""
    driver, seen = heavy("_driver"), []
    real = driver.run

    def spy(operation, arrays, numbers, planned, compute):
        seen.append(planned)
        return real(operation, arrays, numbers, planned, compute)

    monkeypatch.setattr(driver, "run", spy)
    return seen


@pytest.mark.parametrize("n", [7, 9001])
def test_infinities_in_running_sums(every_size, n):
    """As the portable path answers, whether rows are cut or not."""
    inf, nan = np.inf, np.nan
    rows = [
        [-inf, -inf, 0, 1, 2, -inf, 3], [0, inf, 1, inf, -inf, 2, 3], [0, nan, inf, 0, -inf, 2, 3],
        [-inf, 0, 1, 2, 3, 4, nan], [inf, 0, 1, 2, 3, -inf, 1], [-inf] * 7, [inf] * 7, [nan] * 7,
        [-40, -40, 0, 1e-30, 0, 800, 1e4], [-1e3, 900, 0, 1, 2, inf, 0],
    ]  # fmt: skip
    x = np.repeat(rows, -(-n // 7), axis=1)[:, :n]
    dy = np.random.default_rng(0).standard_normal(x.shape)
    close = {"rtol": 1e-10, "atol": 1e-12}
    with kernels.portable(), np.errstate(all="ignore"):
        y, dx = ps.logcumsumexp(x), ps.logcumsumexp_vjp(x, dy)
    np.testing.assert_allclose(ps.logcumsumexp(x), y, rtol=1e-13)
    np.testing.assert_allclose(ps.logcumsumexp_vjp(x, dy), dx, **close)
    for row, upstream, value, slope in zip(x, dy, y, dx, strict=True):
        np.testing.assert_allclose(ps.logcumsumexp(row), value, rtol=1e-13)
        np.testing.assert_allclose(ps.logcumsumexp_vjp(row, upstream), slope, **close)


def test_running_sums_in_pieces_and_of_nothing(every_size, plans_of_running):
    x = np.random.default_rng(0).standard_normal((30_000, 40)).astype(np.float32)
    y = np.log(np.cumsum(np.exp(x.astype(float)), axis=1))
    np.testing.assert_allclose(ps.logcumsumexp(x), y, rtol=1e-6, atol=1e-6)
    assert plans_of_running[0].pieces > 1
    x.flags.writeable = False
    np.testing.assert_allclose(ps.logcumsumexp(x), y, rtol=1e-6, atol=1e-6)
    explained = kernels.explain("logcumsumexp_vjp", x, x.astype(float))
    assert "dtypes: float32 and float64" in explained
    assert "not in C order" in kernels.explain("logcumsumexp", x.T)
    for shape in ((2, 0), (0, 3)):
        empty = np.zeros(shape, np.float32)
        assert ps.logcumsumexp(empty).shape == ps.logcumsumexp_vjp(empty, empty).shape == shape


# --------------------------------------------------------------------------- switches


def test_one_kernel_can_be_left_out(every_size):
    x = np.ones((3, 4))
    assert kernels.explain("softmax", x).startswith(NAME)
    with kernels.without("numba rows"):
        found = kernels.explain("softmax", x)
        assert found == "numpy tiles: row tiles in cache"
        with kernels.without("numpy tiles"):
            assert kernels.explain("softmax", x) == (
                "portable: not numpy tiles: switched off by kernels.without(); "
                "not numba rows: switched off by kernels.without()"
            )
    assert kernels.explain("softmax", x).startswith(NAME)
    with (
        pytest.raises(
            ValueError, match="name is 'metal', expected one of 'numpy tiles' or 'numpy'"
        ),
        kernels.without("metal"),
    ):
        pass
