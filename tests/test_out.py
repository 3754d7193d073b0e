"""`out=` and `grad_out=`: where an answer is written, on every path of the libraries that write."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

import portable_softmax as ps
from portable_softmax import kernels
from portable_softmax.kernels import _decide
from portable_softmax.kernels._request import OUT
from portable_softmax.kernels._table import TABLE

pytestmark = pytest.mark.run_on("paths")

RNG = np.random.default_rng(13)

OPERATIONS = ("softmax", "log_softmax", "softmax_vjp", "log_softmax_vjp", "indices", "soft")

# Small rows, tiles of rows, of columns and of short rows, blocks; some rows are confident.
SHAPES = (((4, 3), -1), ((20, 4000), -1), ((3, 300, 7), 1), ((3000, 5), -1), ((900, 80), -1))

LAYOUTS = {
    "C order": lambda a: a,
    "Fortran order": lambda a: a.T.copy().T,
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "reversed": lambda a: a[::-1],
    "misaligned": lambda a: np.zeros(a.nbytes + 1, "u1")[1:].view(a.dtype).reshape(a.shape),
}


def arrays_of(operation, shape, axis):
    """Return the arrays that an operation takes, as NumPy's in float32."""
    x = RNG.normal(size=shape).astype(np.float32)
    x[::3] *= 40
    if operation.endswith("_vjp"):
        y = getattr(ps, operation.removesuffix("_vjp"))(x, axis=axis)
        return y, RNG.normal(size=shape).astype(np.float32)
    if operation == "indices":
        positions = [n for a, n in enumerate(shape) if a != axis % len(shape)]
        return x, RNG.integers(shape[axis], size=positions)
    return (x, ps.softmax(x[::-1].copy(), axis=axis)) if operation == "soft" else (x,)


def call(operation, arrays, axis, out=None):
    """Return what is written of an answer; `out` itself if that is given."""
    if operation in ("indices", "soft"):
        options = {"axis": axis, "reduction": "sum", "grad_out": out}
        return ps.cross_entropy_value_and_grad(*arrays, **options)[1]
    return getattr(ps, operation)(*arrays, axis=axis, out=out)


def assert_near(operation, given, axis, actual, expected):
    if operation != "log_softmax_vjp":
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-6)
        return
    # Both of dy - y * sum(dy) are rounded, the sum to units of its terms, and may cancel.
    log_y, dy = given
    terms = abs(dy) + np.exp(log_y) * abs(dy).sum(axis=axis, keepdims=True)
    assert np.max(abs(actual - expected) / terms) <= 4 * np.finfo(np.float32).eps


@pytest.mark.slow("Numba compiles every layout", "numba", "torch-numba")
@pytest.mark.libraries("numpy", "torch", "cupy")
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_written_are_the_bits_of_a_new_array(xp, operation, shape, axis):
    given = arrays_of(operation, shape, axis)
    arrays = [xp.asarray(a) for a in given]
    expected = xp.numpy(call(operation, arrays, axis))
    made = [xp.asarray(np.full(shape, 7, np.float32))]
    if xp.library == "numpy":
        made = [lay_out(made[0]) for lay_out in LAYOUTS.values()]
    elif xp.library == "torch":
        made += [made[0].mT.contiguous().mT, made[0].repeat_interleave(2, -1)[..., ::2]]
    for out in made:
        assert call(operation, arrays, axis, out) is out
        if out is made[0] or "numba" not in xp.name:
            np.testing.assert_array_equal(xp.numpy(out), expected)
        else:  # another layout is left to the tiles
            assert_near(operation, given, axis, xp.numpy(out), expected)
    for mine, theirs in zip(arrays, given, strict=True):
        np.testing.assert_array_equal(xp.numpy(mine), theirs)
    for which in range(1 if operation == "indices" else len(given)):
        arrays = [xp.asarray(a.copy()) for a in given]
        assert call(operation, arrays, axis, arrays[which]) is arrays[which]
        np.testing.assert_array_equal(xp.numpy(arrays[which]), expected)


@pytest.mark.slow("Numba compiles each layout", "numba", "torch-numba")
@pytest.mark.libraries("numpy", "torch", "cupy")
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_answer_beside_arrays_of_the_same_order(xp, operation, axis):
    """Which is not C order: a kernel sees the axes of all of them in another order."""
    given = arrays_of(operation, (900, 80), axis)
    expected = xp.numpy(call(operation, [xp.asarray(a) for a in given], axis))

    def in_order(a):
        a = xp.asarray(a)
        return a if a.ndim == 1 else (a.T.copy() if xp.library != "torch" else a.T.contiguous()).T

    arrays, out = [in_order(a) for a in given], in_order(np.full((900, 80), 7, np.float32))
    assert call(operation, arrays, axis, out) is out
    assert_near(operation, given, axis, xp.numpy(out), expected)
    assert call(operation, arrays, axis, arrays[0]) is arrays[0]
    assert_near(operation, given, axis, xp.numpy(arrays[0]), expected)


@pytest.mark.slow("Numba compiles the options", "numba", "torch-numba")
@pytest.mark.libraries("numpy", "torch", "cupy")
@pytest.mark.parametrize("shape", [(300, 40), (7, 500), (2, 20_000)], ids=str)
def test_in_place_of_logits_with_the_options(xp, shape):
    """Confident rows too, whose logits and exps are read again."""
    rng = np.random.default_rng(5)
    x, labels = rng.normal(size=shape), rng.integers(shape[1], size=shape[0])
    x[::2, 3] += 30.0
    mask = rng.random(shape) < 0.7
    mask[np.arange(shape[0]), labels] = True
    labels, where = xp.asarray(labels), xp.asarray(mask)
    weight = xp.asarray(rng.random(shape[1]), "float32")
    samples = xp.asarray(rng.random(shape[0]), "float32")
    for options in (
        {"softcap": 20.0},
        {"softcap": 20.0, "where": where, "reduction": "sum"},
        {"where": where, "z_loss": 1e-3},
        {"label_smoothing": 0.1, "weight": weight, "ignore_index": 3},
        {"sample_weight": samples, "reduction": "none"},
    ):
        logits = xp.asarray(x, "float32")
        loss, expected = ps.cross_entropy_value_and_grad(logits, labels, **options)
        same, grad = ps.cross_entropy_value_and_grad(logits, labels, **options, grad_out=logits)
        assert grad is logits
        np.testing.assert_array_equal(xp.numpy(same), xp.numpy(loss))
        np.testing.assert_array_equal(xp.numpy(grad), xp.numpy(expected))


@pytest.mark.libraries("numpy", "torch", "cupy")
@pytest.mark.parametrize("shape", [(40, 500), (400, 500), (4, 50_000)], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_memory_that_an_input_has_in_part(xp, operation, shape):
    """In one tile and in several, which would read what others have written."""
    n = shape[0] * shape[1]
    given = arrays_of(operation, shape, -1)
    expected = xp.numpy(call(operation, [xp.asarray(a) for a in given], -1))
    for which in range(1 if operation == "indices" else len(given)):
        for start, there in ((500, 0), (0, 500), (1, 0)):
            memory = xp.asarray(np.zeros(n + 500, np.float32))
            arrays = [xp.asarray(a.copy()) for a in given]
            arrays[which] = memory[start : start + n].reshape(shape)
            arrays[which][...] = xp.asarray(given[which])
            out = memory[there : there + n].reshape(shape)
            call(operation, arrays, -1, out)
            np.testing.assert_array_equal(xp.numpy(out), expected)


@pytest.mark.libraries("numpy")
def test_memory_of_a_mask(xp):
    x = RNG.normal(size=(8, 64))
    memory = np.zeros(x.nbytes, np.uint8)
    where = memory[: x.size].view(bool).reshape(x.shape)
    where[:, ::2] = True
    expected = ps.softmax(x, where=where)
    out = memory.view(np.float64).reshape(x.shape)
    np.testing.assert_array_equal(ps.softmax(x, where=where, out=out), expected)


@pytest.mark.libraries("numpy", "torch", "cupy")
def test_with_the_options(xp):
    x, where = xp.asarray(RNG.normal(size=(6, 5))), xp.asarray(RNG.random((6, 5)) < 0.7)
    sink = xp.asarray(RNG.normal(size=(6, 1)))
    for f in (ps.softmax, ps.log_softmax):
        for options in ({"where": where}, {"temperature": 0.7}, {"sink": sink}, {"axis": None}):
            out = xp.asarray(np.zeros((6, 5)))
            assert f(x, **options, out=out) is out
            np.testing.assert_array_equal(xp.numpy(out), xp.numpy(f(x, **options)))
    wide = xp.asarray(np.zeros((6, 5)))
    half = xp.asarray(RNG.normal(size=(6, 5)), "float16")
    ps.softmax(half, dtype=wide.dtype, out=wide)
    np.testing.assert_array_equal(xp.numpy(wide), xp.numpy(ps.softmax(half, dtype=wide.dtype)))
    one = xp.asarray(np.zeros(()))
    assert ps.softmax(one, axis=None, out=one) is one
    assert float(one) == 1.0
    none = xp.asarray(np.zeros((0, 3)))
    assert ps.softmax(none, out=none) is none
    labels = xp.asarray(np.asarray([0, 4, 9, 1, 2, 3]))
    options = {"weight": xp.asarray(RNG.random(5)), "ignore_index": 9, "label_smoothing": 0.1}
    out = xp.asarray(np.zeros((6, 5)))
    loss, grad = ps.cross_entropy_value_and_grad(x, labels, **options, grad_out=out)
    alone, expected = ps.cross_entropy_value_and_grad(x, labels, **options)
    assert grad is out
    assert float(loss) == float(alone)
    np.testing.assert_array_equal(xp.numpy(out), xp.numpy(expected))


@pytest.mark.libraries("numpy", "torch", "cupy")
def test_a_label_without_a_class_leaves_logits_in_place_as_they_are(xp):
    x, labels = RNG.normal(size=(40, 500)), np.full(40, 3)
    labels[7] = 500
    logits = xp.asarray(x)
    with pytest.raises(IndexError, match=r"^labels\[7\] is 500"):
        ps.cross_entropy_value_and_grad(logits, xp.asarray(labels), grad_out=logits)
    np.testing.assert_array_equal(xp.numpy(logits), x)


@pytest.mark.libraries("numpy", "torch", "cupy")
def test_explaining_writes_nothing(xp):
    x, out = xp.asarray(np.zeros((4, 3))), xp.asarray(np.full((4, 3), 7.0))
    assert kernels.explain("softmax", x, out=out) == kernels.explain("softmax", x)
    assert (xp.numpy(out) == 7.0).all()


def test_what_cannot_be_written(xp):
    x, labels = xp.asarray(np.zeros((4, 3))), xp.asarray(np.zeros(4, np.int64))
    calls = (
        lambda out: ps.softmax(x, out=out),
        lambda out: ps.log_softmax(x, out=out),
        lambda out: ps.softmax_vjp(x, x, out=out),
        lambda out: ps.log_softmax_vjp(x, x, out=out),
        lambda out: ps.cross_entropy_value_and_grad(x, labels, grad_out=out),
    )
    for f in calls:
        if xp.library not in ("numpy", "torch", "cupy"):
            with pytest.raises(TypeError, match=r"out is given, but arrays of .* are not written"):
                f(x)
            continue
        with pytest.raises(TypeError, match=r"out has dtype float32, expected float64"):
            f(xp.asarray(np.zeros((4, 3)), "float32"))
        with pytest.raises(ValueError, match=r"out has shape \(3,\), expected \(4, 3\)"):
            f(xp.asarray(np.zeros(3)))
        with pytest.raises(TypeError, match=r"out is a list, which is no array"):
            f([[0.0] * 3] * 4)
        if (elsewhere := xp.other_device(x)) is not None:
            with pytest.raises(ValueError, match=r"out is on device"):
                f(elsewhere)


def test_memory_of_numpy_that_cannot_be_written():
    x = np.zeros((4, 3))
    frozen = x.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match=r"^out cannot be written: it is read-only; pass a copy"):
        ps.softmax(x, out=frozen)
    for strides in ((0, 8), (24, 0), (8, 8)):
        repeated = np.lib.stride_tricks.as_strided(np.zeros(12), (4, 3), strides, writeable=True)
        with pytest.raises(ValueError, match=r"^out cannot be written: its entries may share"):
            ps.softmax(x, out=repeated)
    with pytest.raises(TypeError, match=r"^out has dtype"):
        ps.softmax(x, out=np.zeros((4, 3), ">f8"))


def test_what_torch_follows_is_not_written(torch, xp):
    x, out = torch.zeros(4, 3), torch.zeros(4, 3)
    leaf = torch.zeros(4, 3, requires_grad=True)
    for args, target in (((leaf,), out), ((x,), leaf)):
        with pytest.raises(ValueError, match=r"^out cannot be written: torch records a gradient"):
            ps.softmax(*args, out=target)
    with pytest.raises(ValueError, match=r"torch records a gradient"):
        ps.softmax_vjp(x, leaf, out=out)
    with pytest.raises(ValueError, match=r"^grad_out cannot be written: torch records"):
        ps.cross_entropy_value_and_grad(leaf, torch.zeros(4, dtype=torch.int64), grad_out=out)
    with pytest.raises(ValueError, match=r"torch follows the call \(a functional transform\)"):
        torch.func.vmap(lambda row: ps.softmax(row, out=out[0]))(x)
    with pytest.raises(ValueError, match=r"its entries may share memory"):
        ps.softmax(x, out=torch.zeros(1, 3).expand(4, 3))
    with torch.inference_mode():
        inference = torch.zeros(4, 3)
        assert ps.softmax(x, out=inference) is inference
    with pytest.raises(ValueError, match=r"it was made under torch.inference_mode"):
        ps.softmax(x, out=inference)
    with torch.no_grad():
        assert ps.softmax(leaf, out=leaf) is leaf
    assert leaf.requires_grad


def test_a_graph_of_torch_sees_what_was_written(torch, xp):
    kept, leaf = torch.zeros(4, 3), torch.ones(4, 3, requires_grad=True)
    product = (leaf * kept).sum()
    ps.softmax(torch.zeros(4, 3), out=kept)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.libraries("numpy")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_second_array_is_made(xp, operation):
    """Scratch is a few tiles; a new array is as large as the input."""
    arrays = arrays_of(operation, (4000, 1000), -1)
    out = np.zeros_like(arrays[0])
    call(operation, [a[:100] for a in arrays], -1, out[:100])  # compiles, if anything is to be
    tracemalloc.start()
    try:
        call(operation, arrays, -1, out)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < out.nbytes / 2


def test_a_kernel_that_does_not_declare_it_is_not_given_one(monkeypatch):
    x, out = np.zeros((4, 3)), np.zeros((4, 3))
    undeclared = [k._replace(options=[o for o in k.options if o != OUT]) for k in TABLE]
    monkeypatch.setattr(_decide, "table", lambda: undeclared)
    monkeypatch.setattr(_decide, "_ROUTES", {})
    assert kernels.explain("softmax", x) == "numpy tiles: row tiles in cache"
    assert kernels.explain("softmax", x, out=out).startswith("portable: not numpy tiles: options")
    assert ps.softmax(x, out=out) is out
    np.testing.assert_array_equal(out, np.full((4, 3), 1 / 3))
