"""Triton's kernels, by its interpreter or on a device: which path is taken, at every threshold.

That they answer right is shown by the other tests, on the backends of Triton.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reference
from mpmath import mp, mpf
from numpy.testing import assert_allclose, assert_array_equal

import portable_softmax as ps
from portable_softmax import kernels
from portable_softmax.kernels import _switches
from portable_softmax.kernels._request import LOSSES, OPERATIONS, VJPS

pytestmark = pytest.mark.run_on("paths")

NAME = "triton rows: rows in registers, or folded as they pass by"
RNG = np.random.default_rng(11)


@pytest.fixture(autouse=True)
def _only_triton(backend_name):
    if backend_name not in ("triton", "triton-cuda"):
        pytest.skip("for Triton: TRITON_INTERPRET=1 pytest --backend triton, or triton-cuda")


@pytest.fixture
def launches(xp, monkeypatch):
    """The launches of a test: (kernel, pass)."""
    from portable_softmax.kernels._triton._launch import Plan

    seen, real = [], Plan.run

    def run(plan, kernel, *given):
        seen.append((kernel.__name__, plan.launch.way))
        return real(plan, kernel, *given)

    monkeypatch.setattr(Plan, "run", run)
    return seen


def arguments(xp, operation, shape=(3, 5), dtype="float32"):
    x = xp.asarray(RNG.normal(size=shape) * 3, dtype)
    if operation in LOSSES:
        return x, xp.asarray(RNG.integers(shape[-1], size=shape[:-1]))
    return (ps.softmax(x), x) if operation in VJPS else (x,)


# --------------------------------------------------------------------------- which path


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_path_that_explain_names_is_taken(xp, launches, operation):
    given = arguments(xp, operation)
    launches.clear()
    assert kernels.explain(operation, *given).startswith(NAME)
    getattr(ps, operation)(*given)
    assert len(launches) == 1
    with kernels.portable():
        assert kernels.explain(operation, *given) == "portable: forced by kernels.portable()"
        getattr(ps, operation)(*given)
    assert len(launches) == 1
    assert kernels.available()["triton rows"] == OPERATIONS


def test_what_is_refused_and_why(xp, launches):
    torch = xp.xp
    x = xp.asarray(np.ones((2, 3, 4)), "float32")
    labels, weight = xp.asarray(np.zeros((2, 3), int)), xp.asarray(np.ones(4)).requires_grad_()
    for why, operation, arrays, options in (
        ("traced: a lazily negated", "softmax", (torch._neg_view(x),), {}),
        ("too many classes for 32 bits", "softmax", (x[0, 0, :1].expand(2**31),), {}),
        ("options: extreme temperature", "softmax", (x,), {"temperature": 1e-60}),
        ("a softcap of 1e+40, beyond the range of float32", "cross_entropy", (x, labels),
         {"softcap": 1e40}),
        ("device meta", "softmax", (x.to("meta"),), {}),
        ("labels or weights that require gradients", "cross_entropy", (x, labels),
         {"weight": weight}),
    ):  # fmt: skip
        explained = kernels.explain(operation, *arrays, **options)
        assert not explained.startswith("triton")
        assert f"not triton rows: {why}" in explained
    assert not launches


def test_they_are_off_unless_they_are_asked_for(xp, launches):
    """They have not run on a device yet."""
    x = xp.asarray(np.ones((2, 3)))
    with _switches.switched(asked=(), off=("numba rows", "numpy tiles")):
        assert "off by default, see kernels.use('triton rows')" in kernels.explain("softmax", x)
        assert not kernels.explain("softmax", x).startswith("triton")
        ps.softmax(x)
    assert not launches
    with kernels.use("triton rows"):
        assert kernels.explain("softmax", x).startswith(NAME)


def test_transforms_step_aside(xp, launches):
    torch = xp.xp
    x = xp.asarray(RNG.normal(size=(3, 4)))
    assert torch.func.vmap(ps.softmax)(x).shape == (3, 4)
    torch.func.grad(ps.logsumexp)(x)
    torch.func.jvp(ps.log_softmax, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        ps.softmax(torch.autograd.forward_ad.make_dual(x, x))
    assert not launches


# --------------------------------------------------------------------------- thresholds


@pytest.fixture
def small(monkeypatch):
    """Thresholds at which the interpreter need not wait."""
    from portable_softmax.kernels._triton import _launch, _sizes

    monkeypatch.setattr(_launch, "_FRAMES", {})  # which keep launches
    for name, value in {
        "WARP": 32, "SHORT": (4, 8), "MANY_ROWS": 3, "REGISTERS": dict.fromkeys((2, 4, 8), 32),
        "COLUMN_CLASSES": (8, 16), "COLUMNS": dict.fromkeys((2, 4, 8), (4, 8)), "TILE": 128,
        "PART_CLASSES": 64, "MAX_PARTS": 4, "MAX_PARTS_COLUMNS": 2, "BUSY": 4, "LAG": 8, "STEPS": 2,
    }.items():  # fmt: skip
        monkeypatch.setattr(_sizes, name, value)


# Shape and axis on both sides of each threshold above, the pass that is taken, and that of what
# writes no more than one value per row, if it is another one.
SIDES = {
    "short": ((5, 8), 1, "registers"),
    "a row a program": ((5, 9), 1, "registers"),
    "the longest in registers": ((2, 32), 1, "registers"),
    "one part": ((3, 33), 1, "relay"),
    "two parts": ((3, 65), 1, "relay"),
    "longer parts": ((2, 300), 1, "relay"),
    "enough rows for a loop": ((4, 265), 1, "relay", "loop"),
    "more rows than the lag": ((9, 65), 1, "relay", "loop"),
    "columns in registers": ((8, 3), 0, "registers"),
    "columns in parts": ((17, 3), 0, "relay"),
    "many columns": ((33, 25), 0, "relay", "loop"),
    "an axis in the middle": ((4, 20, 5), 1, "relay", "loop"),
    "two axes": ((3, 2, 40), (1, 2), "relay"),
    "an odd number of tiles": ((1, 177), 1, "relay"),
}


def test_few_long_rows_are_shared_by_many_programs():
    """A row of 262,144 goes to 64 programs; where there are many rows, to as few as is good."""
    from portable_softmax.kernels._triton import _sizes

    def parts(lead, classes, along="classes"):
        how = {"once": False, "relay": True, "heavy": False}
        found = _sizes.launch(lead, 1, classes, along, 4, **how)
        assert found.parts <= found.max_parts <= 64  # the bits of a word
        return found.parts

    assert parts(1, 262_144) == 64
    assert parts(8, 131_072) == 32
    assert parts(1_024, 131_072) == 8
    assert parts(1, 10_000) == 3  # of a tile each
    assert parts(8, 1_000_000, "lead") == 64
    assert parts(100_000, 1_000, "lead") == 4


def side_of(name):
    """Its shape and axis, and the passes of what writes rows, and of what does not."""
    shape, axis, way, *once = SIDES[name]
    return shape, axis, way, (once or [way])[0]


@pytest.mark.slow("Triton interprets element by element")
@pytest.mark.parametrize(
    ("side", "dtype"), [*((s, "float32") for s in SIDES), ("longer parts", "bfloat16")]
)
def test_both_sides_of_every_threshold(xp, launches, small, side, dtype):
    """The answers are those of the portable path in float64, whatever the pass.

    Each function meets each side. Options and the two vjps, which are one kernel, take turns, so
    that they meet each pass in each layout.
    """
    shape, axis, way, once = side_of(side)
    values = RNG.normal(size=shape) * 5
    values.flat[0] = values.flat[-1] = 40.0  # a tie of two that dominate
    x, dy = xp.asarray(values, dtype), xp.asarray(RNG.normal(size=shape), dtype)
    mask = RNG.random(shape) < 0.7
    where = xp.asarray(mask)
    calls = (
        ("softmax", (x,), {"temperature": 2.0}),
        ("softmax", (x,), {"where": where}),
        ("log_softmax", (x,), {}),
        ("log_softmax", (x,), {"where": where, "temperature": 0.5}),
        ("logsumexp", (x,), {}),
        ("logsumexp", (x,), {"where": where}),
        ("softmax_vjp", (ps.softmax(x, axis=axis), dy), {}),
        ("log_softmax_vjp", (ps.log_softmax(x, axis=axis), dy), {}),
    )
    turn = ([*SIDES].index(side) + (dtype == "bfloat16")) % 2
    for operation, arrays, options in calls if way == "registers" else calls[turn::2]:
        launches.clear()
        actual = getattr(ps, operation)(*arrays, axis=axis, **options)
        assert [at for _, at in launches] == [once if operation == "logsumexp" else way]
        assert actual.dtype == x.dtype
        with kernels.portable():
            wide = (a.double() for a in arrays)
            expected = getattr(ps, operation)(*wide, axis=axis, **options)
        rounding = {"float32": 1e-6, "bfloat16": 2.0**-8}[dtype]
        scale = 8 if operation.endswith("vjp") else 1e-3
        assert_allclose(xp.numpy(actual), xp.numpy(expected), rtol=rounding, atol=rounding * scale)


@pytest.mark.slow("Triton interprets element by element")
@pytest.mark.parametrize("side", [s for s in SIDES if s != "two axes"])
def test_both_sides_of_every_threshold_of_the_loss(xp, launches, small, side):
    """Sides of the same pass take turns with the kinds of calls: each kind meets each pass."""
    shape, axis, way, once = side_of(side)
    x = xp.asarray(RNG.normal(size=shape) * 5, "float32")
    positions = (*shape[:axis], *shape[axis + 1 :])
    labels = RNG.integers(shape[axis], size=positions)
    mask = RNG.random(shape) < 0.7
    np.put_along_axis(mask, np.expand_dims(labels, axis), True, axis=axis)
    ignored = np.where(RNG.random(positions) < 0.3, -1, labels)
    ignored.flat[0] = labels.flat[0]
    weight = xp.asarray(RNG.random(shape[axis]) + 0.5)
    t = xp.asarray(RNG.random(shape), "float32")
    options = {"where": xp.asarray(mask), "z_loss": 0.1, "softcap": 20.0, "weight": weight}
    plain = (
        (xp.asarray(labels), {}),
        (xp.asarray(ignored), {"ignore_index": -1, **options}),
    )
    of_general = (
        (xp.asarray(labels), {"label_smoothing": 0.1, "reduction": "none"}),
        (t, {"reduction": "sum", **options}),
        (xp.asarray(ignored), {"ignore_index": -1, "label_smoothing": 0.1, **options}),
        (t, {"label_smoothing": 0.2}),
    )
    turn = [*SIDES].index(side)
    if way == "registers":
        chosen = (*plain, *of_general[2 * (turn % 2) :][:2])
    else:
        chosen = (*plain[turn % 2 :], of_general[turn % 4])  # options, at times nothing else
    for target, more in chosen:
        general = target is t or "label_smoothing" in more
        launches.clear()
        loss, grad = ps.cross_entropy_value_and_grad(x, target, axis=axis, **more)
        alone = ps.cross_entropy(x, target, axis=axis, **more)
        if general:
            assert launches == 2 * [("general", "registers" if way == "registers" else "loop")]
        else:
            assert launches == [("loss", way), ("loss", once)]
        with kernels.portable():
            wide = target.double() if target is t else target
            if "weight" in more:
                more = {**more, "weight": weight.double()}
            expected, slope = ps.cross_entropy_value_and_grad(x.double(), wide, axis=axis, **more)
        if general or way == once:
            assert_array_equal(xp.numpy(alone), xp.numpy(loss))
        else:  # another pass adds up in another order
            assert_allclose(xp.numpy(alone), xp.numpy(loss), rtol=1e-6)
        assert_allclose(xp.numpy(loss), xp.numpy(expected), rtol=4e-6)
        largest = float(slope.abs().max())
        assert_allclose(xp.numpy(grad), xp.numpy(slope), rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.slow("Triton interprets element by element")
@pytest.mark.parametrize("n", [8, 9, 33, 65])
def test_infinities_nan_and_masked_rows_in_every_pass(xp, small, n):
    rows = np.zeros((6, n))
    rows[0], rows[1, n // 2], rows[2, -1], rows[3, 0] = -np.inf, np.inf, np.nan, -np.inf
    rows[4, 0], rows[4, -1] = np.nan, np.inf
    mask = np.ones((6, n), bool)
    mask[5] = False
    x = xp.asarray(rows, "float32")
    parts = slice(0, 2), slice(2, 4), slice(4, 6)  # two rows at a time: few enough for parts
    for where in (None, xp.asarray(mask)):
        for f, part in itertools.product((ps.softmax, ps.log_softmax, ps.logsumexp), parts):
            options = {"axis": 1, "where": None if where is None else where[part]}
            actual = f(x[part], **options)
            with kernels.portable():
                expected = f(x[part], **options)
            assert_allclose(xp.numpy(actual), xp.numpy(expected), rtol=1e-6)


# --------------------------------------------------------------------------- relay


@pytest.fixture
def run_programs(xp, small, monkeypatch):
    """Set the order of programs, and their looks; the memory that they are given holds nan."""
    if xp.name != "triton":
        pytest.skip("a device runs programs in its own order")
    from triton.runtime.interpreter import interpreter_builder as builder

    from portable_softmax.kernels._triton import _launch, _sizes, _torch

    real, empty, current = builder.set_grid_idx, _torch.empty, {"order": "forward"}

    def program(x, y, z):
        n = builder.grid_dim[0]
        mixed = (*range(1, n, 2), *range(0, n, 2))[x]
        real({"forward": x, "backward": n - 1 - x, "odd first": mixed}[current["order"]], y, z)

    def configure(order, looks):
        current["order"] = order
        _launch._FRAMES.clear()  # which keep launches
        monkeypatch.setattr(_sizes, "LOOKS", looks)

    monkeypatch.setattr(_sizes, "LAG", 1)
    monkeypatch.setattr(builder, "set_grid_idx", program)
    monkeypatch.setattr(_torch, "empty", lambda *given: empty(*given).fill_(np.nan))
    return configure


def relay_calls(xp, shape, dtype):
    """Yield calls along the last axis of every operation that has a relay, and exact answers."""
    x, dy = (xp.asarray(RNG.normal(size=shape) * scale, dtype) for scale in (5, 1))
    label, mask = RNG.integers(shape[1], size=shape[0]), RNG.random(shape) < 0.7
    mask[np.arange(shape[0]), label] = True
    labels, where = xp.asarray(label), xp.asarray(mask)
    rows, everywhere = [reference.exact(row) for row in xp.numpy(x)], np.ones(shape, bool)

    def losses(z, cap, mask):
        found = []
        for i, row in enumerate(rows):
            t = np.eye(shape[1])[label[i]]
            found.append(reference.cross_entropy_row(row, t, np.ones(len(t)), 0, z, cap, mask[i]))
        return [loss for loss, _ in found], [grad for _, grad in found]

    yield "softmax", (x,), {"temperature": 2.0}, [[reference.softmax([v / 2 for v in row])
                                                   for row in rows]]  # fmt: skip
    yield "log_softmax", (x,), {}, [[reference.log_softmax(row) for row in rows]]
    yield "logsumexp", (x,), {"where": where}, [
        [reference.logsumexp([v for v, kept in zip(row, m, strict=True) if kept])
         for row, m in zip(rows, mask, strict=True)]
    ]  # fmt: skip
    y, d = (np.asarray(xp.numpy(a), float) for a in (ps.softmax(x), dy))
    yield "softmax_vjp", (ps.softmax(x), dy), {}, [y * (d - (y * d).sum(1, keepdims=True))]
    y = np.asarray(xp.numpy(ps.log_softmax(x)), float)
    yield "log_softmax_vjp", (ps.log_softmax(x), dy), {}, [d - np.exp(y) * d.sum(1, keepdims=True)]
    none = {"reduction": "none"}
    loss, grad = losses(0, None, everywhere)
    yield "cross_entropy", (x, labels), none, [loss]
    yield "cross_entropy_value_and_grad", (x, labels), none, [loss, grad]
    yield "cross_entropy_value_and_grad", (x, labels), {
        "where": where, "z_loss": 0.1, "softcap": 20.0, **none
    }, losses(mpf(0.1), 20, mask)  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 70), "bfloat16"),
        *(
            pytest.param(*case, marks=pytest.mark.slow("Triton interprets element by element"))
            for case in (((2, 70), "float32"), ((1, 70), "float64"), ((3, 40), "columns"))
        ),
    ],
)
def test_relay_in_any_order_of_programs(xp, launches, run_programs, shape, dtype):
    """Right answers, and the same bits, whichever programs find parts missing and fold them.

    Backwards, a row is finished before anyone else has folded a part of it; without a look, each
    program that finishes a row folds all of it.
    """
    rounding = 2.0**-8 if dtype == "bfloat16" else 1e-12 if dtype == "float64" else 2e-6
    columns = dtype == "columns"
    for operation, arrays, options, exact in relay_calls(
        xp, shape, "float32" if columns else dtype
    ):
        if columns:
            arrays = [a.T.contiguous() if a.ndim == 2 else a for a in arrays]
            options = {k: v.T.contiguous() if k == "where" else v for k, v in options.items()}
        answers = []
        for order, looks in (
            ("forward", 64), ("forward", 0), ("backward", 2), ("odd first", 1)
        ):  # fmt: skip
            run_programs(order, looks)
            launches.clear()
            found = getattr(ps, operation)(*arrays, axis=0 if columns else 1, **options)
            assert [way for _, way in launches] == ["relay"]
            found = [xp.numpy(a) for a in (found if isinstance(found, tuple) else (found,))]
            answers.append([a.T if columns else a for a in found])
        for answer in answers[1:]:
            for a, first in zip(answer, answers[0], strict=True):
                assert_array_equal(a, first)
        for a, e in zip(answers[0], exact, strict=True):
            assert_allclose(a, np.asarray(e, float), rtol=rounding, atol=rounding)


# --------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("n", [3, 33, 61])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_confident_rows_in_every_pass(xp, small, n, dtype):
    """Gaps of 30 and of 64 to 80, whose exponentials are where a rounded difference shows."""
    for gap in (30.0, 64.3, 71.7, 79.9):
        row = np.asarray(RNG.normal(size=n), dtype)
        row[n // 2] = gap
        x = xp.asarray(row[None], dtype)
        exact = [mpf(float(v)) for v in row]
        expected = reference.log_softmax(exact)
        assert reference.ulps(xp.numpy(ps.log_softmax(x))[0], expected) <= 8
        label = xp.asarray([n // 2])
        loss, grad = ps.cross_entropy_value_and_grad(x, label)
        assert reference.ulps(xp.numpy(loss)[None], [-expected[n // 2]]) <= 8
        others = np.delete(xp.numpy(grad)[0], n // 2).astype(float).sum()
        assert_allclose(xp.numpy(grad)[0, n // 2], -others, rtol=8 * np.finfo(dtype).eps)


@pytest.mark.slow("Triton interprets element by element")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("smoothed", [False, True])
def test_the_label_entry_of_many_confident_rows(xp, dtype, smoothed):
    """It is minus the sum of the others, wherever the maximum lies between two multiples."""
    rows = RNG.normal(size=(4_000, 5)).astype(dtype)
    rows[:, 2] += RNG.uniform(20, 80, size=4_000)
    rows += RNG.uniform(-100, 100, size=(4_000, 1))
    labels = np.full(4_000, 2)
    target = np.eye(5)[labels] if smoothed else labels  # a distribution: the general kernel
    _, grad = ps.cross_entropy_value_and_grad(
        xp.asarray(rows, dtype), xp.asarray(target), reduction="none"
    )
    grad = xp.numpy(grad).astype(np.longdouble)
    others = np.delete(grad, 2, axis=1).sum(axis=1)
    assert_allclose(grad[:, 2], -others, rtol=8 * np.finfo(dtype).eps)
    exact = [mpf(float(v)) for v in rows[7]]
    top = max(exact)
    rest = sum(mp.exp(v - top) for v in exact) - 1
    expected = np.float64(-rest / (1 + rest))
    assert_allclose(float(grad[7, 2]), expected, rtol=8 * np.finfo(dtype).eps)


def test_a_sum_is_not_shrunk_tile_by_tile(xp, launches, small):
    """The maximum comes first, and exp(max - max) as it is rounded would be off by half a unit.

    All that counts is in the lane of the maximum, in one tile after another.
    """
    m = RNG.uniform(0, 1, 100_000).astype(np.float32)
    tail = m - ((m + np.float32(768)) - np.float32(768))
    risen = (1 + tail.astype(float) + tail.astype(float) ** 2 / 2).astype(np.float32)
    m = m[risen * (1 - tail) != 1][:4]
    rows = np.full((4, 128 * 60), -np.inf, np.float32)
    rows[:, 64::64] = m[:, None] - np.float32(18)
    rows[:, 0] = m
    loss = ps.cross_entropy(xp.asarray(rows), xp.asarray(np.zeros(4, int)), reduction="none")
    assert launches == [("loss", "loop")]
    for i in range(4):
        gaps = (mpf(float(x)) - mpf(float(m[i])) for x in rows[i, 64::64])
        expected = mp.log1p(sum(map(mp.exp, gaps)))
        assert reference.ulps(xp.numpy(loss)[i : i + 1], [expected]) <= 8


# --------------------------------------------------------------------------- labels


def test_labels_are_read_back_only_when_they_are_checked(xp, launches, monkeypatch):
    """One flag, written by the kernel; unchecked, nothing is read from the device."""
    torch = xp.xp
    x, labels = xp.asarray(np.zeros((2, 3))), xp.asarray([0, 3])
    reads = []
    for name in ("item", "__int__", "__bool__", "__float__", "tolist", "cpu"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda t, *a, real=real, name=name: reads.append(name) or real(t, *a),
        )
    for options in ({"reduction": "mean"}, {"ignore_index": 0, "weight": xp.asarray(np.ones(3))}):
        loss, _ = ps.cross_entropy_value_and_grad(x, labels, check_labels=False, **options)
        assert reads == []
    ps.cross_entropy(x, labels % 3)
    assert reads == ["__int__"]
    with pytest.raises(IndexError, match=r"labels\[1\] is 3, outside \[0, 3\)"):
        ps.cross_entropy(x, labels)
    assert np.isnan(xp.numpy(loss))


# --------------------------------------------------------------------------- layouts


def test_layouts(xp, launches):
    """Rows and columns are taken as they lie; what has no unit stride is copied first."""
    values = RNG.normal(size=(4, 6, 8))
    x = xp.asarray(values)
    for view, axis in (
        (x, 0), (x, 1), (x, 2), (x.transpose(0, 2), 0), (x.transpose(0, 2), 2), (x[:, ::2], 1),
        (x[..., ::2], 2), (x[1:, 1:, 1:], 1), (x[:1].expand(4, 6, 8), 0), (x[:, :1], 1),
        (x.permute(1, 0, 2), 2), (x[:, :, :1], 0),
    ):  # fmt: skip
        plain = np.array(xp.numpy(view))
        e = np.exp(plain - plain.max(axis=axis, keepdims=True))
        expected = e / e.sum(axis=axis, keepdims=True)
        assert_allclose(xp.numpy(ps.softmax(view, axis=axis)), expected, rtol=1e-13)
        mask = xp.asarray(RNG.random(view.shape[-1]) < 2)  # all, broadcast over every row
        assert_allclose(xp.numpy(ps.softmax(view, axis=axis, where=mask)), expected, rtol=1e-13)
        assert_allclose(
            xp.numpy(ps.logsumexp(view, axis=axis)), np.log(np.exp(plain).sum(axis=axis)),
            rtol=1e-13,
        )  # fmt: skip


def test_a_view_that_is_negated_lazily(xp):
    x = xp.asarray([1.0 + 2.0j, 3.0 - 4.0j]).conj().imag
    assert x.is_neg()
    assert_allclose(xp.numpy(ps.softmax(x)), [np.exp(-6) / (1 + np.exp(-6)), 1 / (1 + np.exp(-6))])


# --------------------------------------------------------------------------- autograd, compile


OPERATORS = {
    "softmax": lambda x, t: ps.softmax(x, temperature=2.0),
    "log_softmax, another axis": lambda x, t: ps.log_softmax(x, axis=0),
    "logsumexp": lambda x, t: ps.logsumexp(x, axis=-1),
    "softmax_vjp": lambda x, t: ps.softmax_vjp(ps.softmax(x), x),
    "cross_entropy": ps.cross_entropy,
    "options": lambda x, t: ps.cross_entropy(
        x, t, ignore_index=1, softcap=3.0, z_loss=0.1, label_smoothing=0.1, reduction="none"
    ),
    "value and gradient": lambda x, t: ps.cross_entropy_value_and_grad(x.detach(), t)[1] * x,
}


@pytest.mark.parametrize("name", OPERATORS)
def test_torch_compile_traces_operators_once_for_all_sizes(xp, launches, name):
    import warnings

    torch, function = xp.xp, OPERATORS[name]
    graphs = []
    ps.softmax(
        xp.asarray([0.0])
    )  # from the first untraced call on, tensors are known by their type

    def backend(graph, _):
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph.forward

    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))  # torch's own
        step = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
        for n in (3, 5, 9):
            x = xp.asarray(RNG.normal(size=(n, n + 2))).requires_grad_()
            labels = xp.asarray(np.arange(n))
            launches.clear()
            y = step(x, labels)
            assert launches
            dy = xp.asarray(RNG.normal(size=tuple(y.shape)))
            (grad,) = torch.autograd.grad(y, x, dy)
            with kernels.portable():
                expected = function(x, labels)
                (slope,) = torch.autograd.grad(expected, x, dy)
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(grad, slope)
    torch.compiler.reset()
    (graph,) = graphs
    assert "portable_softmax.value.default" in graph


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_operators_are_what_torch_takes_them_for(xp):
    """Schemas, fakes, strides and derivatives, as torch checks them, of every operation."""
    from portable_softmax.kernels._torch import _operators

    torch = xp.xp
    x = xp.asarray(RNG.normal(size=(3, 4, 5)))
    labels = xp.asarray(RNG.integers(4, size=(3, 5)))
    for operation in OPERATIONS:
        axis = [1] if operation in LOSSES else [2]
        for array in (x, x.transpose(0, 2).contiguous().transpose(0, 2)):
            arrays = [array, None, labels if operation in LOSSES else None, None, None, None]
            if operation in VJPS:
                arrays[:2] = ps.softmax(array), array
            differentiable = operation != "cross_entropy_value_and_grad"
            arrays[0] = arrays[0].detach().requires_grad_(differentiable)
            arguments = (*arrays, "portable_softmax.kernels._triton", operation, axis)
            arguments += (1.0, None, 0.0, 0.0, None, "mean", None)
            tests = ("test_schema", "test_faketensor", "test_autograd_registration")
            torch.library.opcheck(_operators._value, arguments, test_utils=tests)


def test_compiled_code_differentiates_a_gradient_by_formula(xp, launches):
    """value_and_grad is no operator where its gradient is differentiated: autograd traces none."""
    torch, labels = xp.xp, xp.asarray([0, 1, 3])
    x = xp.asarray(RNG.normal(size=(3, 4))).requires_grad_()

    def step(x):
        return ps.cross_entropy_value_and_grad(x, labels)[1].square().sum()

    torch.compiler.reset()
    (grad,) = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="eager")(x), x)
    torch.compiler.reset()
    assert not launches
    torch.testing.assert_close(grad, torch.autograd.grad(step(x), x)[0])


def test_fake_tensors_take_no_kernel(xp, launches):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(xp.asarray(np.ones((3, 4)), "float32"))
        assert "not triton rows: traced: a FakeTensor" in kernels.explain("softmax", fake)
        assert ps.logsumexp(fake, axis=0).shape == (4,)
    assert not launches
