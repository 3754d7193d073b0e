"""The kernels that Numba compiles: which of their paths ran, and that each is exact."""

from __future__ import annotations

import importlib
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


@pytest.mark.parametrize("dtype", ["float32", *(pytest.param(d, marks=_SLOW) for d in DTYPES[1:])])
@pytest.mark.parametrize("n", [4, 7, 8, 63, 79, 127, 128, 255, 1003, 9000])
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
    of_sums = 4 * unit * np.maximum(1, abs(m)) / exact.unit(answers.logsumexp, dtype)
    tiny = exact.smallest_normal(dtype)
    found = ps.softmax(x), ps.log_softmax(x), ps.logsumexp(x, axis=-1)
    found += (ps.cross_entropy(x, labels, reduction="none"),)
    for name, result, bound, least in (
        ("softmax", found[0], 7, 0),  # not 5: equal terms round alike in each lane of a sum
        ("log_softmax", found[1], 8, tiny),
        ("logsumexp", found[2], np.maximum(6, of_sums), 0),
        ("cross_entropy", found[3], 8, tiny),
    ):
        answer, result = getattr(answers, name), result.astype(np.longdouble)
        with np.errstate(all="ignore"):
            error = np.abs(result - answer) / exact.unit(answer, dtype)
        counted = (result != answer) & ((np.abs(answer) > least) | (least == 0))  # or infinite
        assert np.all(~counted | (error <= (0.51 if half else bound))), (name, np.max(error))
    driver = heavy("_driver")
    size = n * (8 if dtype == "float64" else 4)
    folds = "groups" if driver.SHORT <= size <= driver.MIDDLE else "rows"
    folds = "blocks" if size < driver.SHORT else folds
    folds = "narrow" if n <= driver.FEW else folds
    writes = "rows" if folds == "groups" and size > 1024 else folds
    assert [plan.layout for plan in plans[:4]] == [folds, writes, folds, folds]
    loss, grad = ps.cross_entropy_value_and_grad(x, labels, reduction="none")
    np.testing.assert_allclose(loss, found[3], rtol=4 * unit)
    got = grad[np.arange(64), labels].astype(np.longdouble)
    off = np.abs(got - answers.label_gradient)
    relative = 1e-5 if not half else 2 * unit
    # Each of n terms may round to 0 there, half a step; two steps for what rounds after them.
    subnormal = (2 + n / 2) * (2 * unit * exact.smallest_normal(dtype))
    assert np.all(off <= relative * np.abs(answers.label_gradient) + subnormal)


@pytest.mark.parametrize("dtype", ["float32", *(pytest.param(d, marks=_SLOW) for d in DTYPES[1:3])])
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


def agree(call, dtype):
    """Compare with the portable path."""
    taken = as_tuple(call())
    with kernels.portable():
        plain = as_tuple(call())
    half, unit = "16" in dtype, 2.0 ** (1 - exact.FORMATS[dtype][0])
    for one, other in zip(taken, plain, strict=True):
        assert (type(one), one.dtype, one.shape) == (type(other), other.dtype, other.shape)
        a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
        atol = (2 if half else 16) * unit * np.max(np.abs(b[np.isfinite(b)]), initial=0)
        np.testing.assert_allclose(a, b, rtol=(2 if half else 64) * unit, atol=atol)


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


@pytest.mark.slow("every kernel is compiled")
@pytest.mark.parametrize("dtype", DTYPES[:3])
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


# --------------------------------------------------------------------------- temperature


# --------------------------------------------------------------------------- the same bits


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


# --------------------------------------------------------------------------- losses


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
