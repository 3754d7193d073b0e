"""Dask: nothing is computed before it is asked for, whatever the chunks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from calls import CALLS, IMPOSSIBLE, WITH_IMPOSSIBLE, as_tuple, every_call
from numpy.testing import assert_allclose, assert_array_equal
from test_values import EPS, MARGINS, confident

import portable_softmax as ps
from portable_softmax import kernels
from portable_softmax.kernels import _decide


@pytest.fixture(autouse=True)
def _only_dask(da):
    """Skip this module for the other libraries."""


@pytest.fixture
def computes_nothing():
    """Raise for whoever computes."""
    import dask

    def scheduler(*_args, **_options):
        raise AssertionError("somebody computed")

    with dask.config.set(scheduler=scheduler):
        yield


@every_call
def test_nothing_is_computed_before_it_is_asked_for(da, xp, computes_nothing, call):
    outputs = call.outputs(xp.from_numpy)
    for y, e in zip(outputs, call.outputs(np.asarray), strict=True):
        assert isinstance(y, da.Array)
        # What Dask says of a block that it has not seen.
        assert (y.shape, y.dtype, y._meta.dtype) == (e.shape, e.dtype, e.dtype)
    with pytest.raises(AssertionError, match="somebody computed"):
        outputs[0].compute()


@every_call
def test_big_endian_chunks_are_answered_in_native_byte_order(da, xp, call):
    """As NumPy answers; so Dask says before, too."""
    import dask

    def swapped(a):
        return xp.from_numpy(a.astype(a.dtype.newbyteorder(">")))

    outputs = call.outputs(swapped)
    found = dask.compute(*outputs, scheduler="synchronous")
    for y, a, e in zip(outputs, found, call.outputs(np.asarray), strict=True):
        assert y.dtype == y._meta.dtype == a.dtype == e.dtype
        assert_allclose(a, e, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_a_complex_sum_is_declared_as_a_real_logarithm_and_a_sign(da, dtype):
    x = np.asarray([[1 + 2j, 0.5], [-3j, 1 - 1j]], dtype)
    outputs = ps.logsumexp(da.asarray(x), axis=1, return_sign=True)
    for y, e in zip(outputs, ps.logsumexp(x, axis=1, return_sign=True), strict=True):
        assert (y.dtype, y._meta.dtype, y.compute().dtype) == (e.dtype,) * 3
        assert_allclose(y.compute(), e, rtol=1e-6)


CHUNKS = {"batch": (2, 12), "classes": (8, 5), "both": (3, 4), "one": (8, 12), "single": (1, 1)}
TABLE = np.random.default_rng(0).normal(size=(8, 12))
LABELS = np.arange(8) % 12


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_chunks_do_not_change_the_values(da, xp, chunks):
    x, labels = da.from_array(TABLE, chunks), da.from_array(LABELS, chunks[0])
    for f in (
        ps.softmax,
        ps.log_softmax,
        lambda x: ps.softmax(x, axis=None),
        lambda x: ps.logsumexp(x, axis=0),
        ps.logsumexp,
    ):
        assert_allclose(xp.numpy(f(x)), f(TABLE), rtol=1e-13)
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0}
    for more in ({}, options, {"reduction": "none", "ignore_index": 3}):
        actual = ps.cross_entropy_value_and_grad(x, labels, **more)
        expected = ps.cross_entropy_value_and_grad(TABLE, LABELS, **more)
        for a, e in zip(actual, expected, strict=True):
            assert_allclose(xp.numpy(a), e, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("chunks", [(4, 1), (2, 3), (1, 40)], ids=str)
@pytest.mark.parametrize("dtype", MARGINS)
def test_a_confident_row_in_parts_keeps_the_digits_of_its_gradient(da, xp, dtype, chunks):
    if dtype not in ("float32", "float64", *xp.halves):
        pytest.skip(f"{xp.name} has no {dtype}")
    x, dy, expected = confident(40, MARGINS[dtype])
    y = ps.softmax(da.from_array(xp.numpy(xp.asarray(x, dtype)), chunks))
    dx = ps.softmax_vjp(y, da.from_array(xp.numpy(xp.asarray(dy, dtype)), chunks))
    assert_allclose(xp.numpy(dx).astype(float), expected, rtol=32 * EPS[dtype])


TAKEN = kernels.available().get("dask chunks", ())
ON_CHUNKS = [name for name in CALLS if name.partition("(")[0] in TAKEN]


@pytest.mark.parametrize("name", ON_CHUNKS)
def test_chunks_of_whole_rows(da, name):
    """As in NumPy, which each chunk's call goes to."""
    import dask

    call = CALLS[name]

    def cut(array):
        return da.from_array(array, chunks=(1, *array.shape[1:]) if array.ndim > 1 else -1)

    expected = call.outputs(np.asarray)
    with dask.config.set(scheduler="synchronous"):
        found = dask.compute(*call.outputs(cut))
    for y, e in zip(found, expected, strict=True):
        assert (y.dtype, y.shape) == (e.dtype, e.shape)
        assert_allclose(y, e, rtol=1e-12, atol=1e-14)


def tasks_of(*arrays):
    """Return how many tasks there are of each name, but for those that make the arrays."""
    import dask

    seen = Counter()

    def scheduler(graph, keys, **_):
        graph = dict(getattr(graph, "__dask_graph__", lambda: graph)())  # newer Dask, older Dask
        names = ((k[0] if isinstance(k, tuple) else k).rpartition("-")[0] for k in graph)
        seen.update(name for name in names if name.partition("-")[0] not in SOURCES)
        return dask.get(graph, keys)

    dask.compute(*arrays, scheduler=scheduler)
    return seen.total()


SOURCES = ("array", "finalize", "arange", "mod", "mul", "ones_like", "rechunk")


def indices(x):
    return np.arange(len(x)) % 7


def ones(x, axis):
    import dask.array as da

    return da.ones(x.shape[axis], chunks=(x.chunks[axis],))


def losses(x, **options):
    return ps.cross_entropy_value_and_grad(x, indices(x), **options)


FAMILY = {
    "entmax": (lambda x: ps.entmax(x, alpha=1.25), 1),
    "sparsemax": (ps.sparsemax, 1),
    "entmax_vjp": (lambda x: ps.entmax_vjp(x, x), 1),
    "logcumsumexp": (ps.logcumsumexp, 1),
    "logcumsumexp_vjp": (lambda x: ps.logcumsumexp_vjp(x, x), 1),
    "logmeanexp": (lambda x: ps.logmeanexp(x, axis=1), 1),
    "entropy": (ps.entropy, 1),
    "entropy_value_and_grad": (ps.entropy_value_and_grad, 3),
    "kl_divergence": (lambda x: ps.kl_divergence(x, 2 * x, temperature=2.0), 1),
    "kl_divergence(none)": (lambda x: ps.kl_divergence(x, 2 * x, reduction="none"), 1),
    "kl_divergence_value_and_grad": (lambda x: kl_divergence(x, distillation=True), 4),
    "kl_divergence_value_and_grad(none)": (lambda x: kl_divergence(x, reduction="none"), 4),
    "entmax_loss": (lambda x: ps.entmax_loss(x, indices(x), ignore_index=2), 1),
    "entmax_loss(probabilities)": (lambda x: ps.entmax_loss(x, ps.softmax(x)), 2),
    "entmax_loss_value_and_grad": (lambda x: ps.entmax_loss_value_and_grad(x, indices(x)), 3),
}


def kl_divergence(x, **options):
    value, grads = ps.kl_divergence_value_and_grad(x, 2 * x, **options)
    return value, *grads


@pytest.mark.parametrize("name", FAMILY)
def test_the_rest_of_the_family_is_answered_chunk_by_chunk(da, xp, name):
    """In so many tasks, beside those of merges, and as NumPy answers the whole."""
    function, each = FAMILY[name]
    table = np.random.default_rng(0).normal(size=(64, 12))
    x = da.from_array(table, chunks=(1, -1))
    found = as_tuple(function(x))
    assert tasks_of(*found) <= each * 64 + 20
    for y, e in zip(found, as_tuple(function(table)), strict=True):
        assert (y.dtype, y.shape) == (e.dtype, e.shape)
        assert_allclose(xp.numpy(y), e, rtol=1e-12, atol=1e-14)
    if "loss" in name:
        return  # its labels would have to be chosen as well
    kept = np.arange(64) % 8 > 5  # the first chunks are empty
    x = da.from_array(table, chunks=(2, -1))[da.from_array(kept, chunks=2)]
    for y, e in zip(as_tuple(function(x)), as_tuple(function(table[kept])), strict=True):
        assert_allclose(xp.numpy(y), e, rtol=1e-12, atol=1e-14)


def test_a_mean_of_half_types_is_rounded_once(da, xp):
    """The sum of a chunk would be inf in float16."""
    x = (np.random.default_rng(0).normal(size=(40_000, 6)) * 8).astype(np.float16)
    labels = np.arange(40_000) % 6
    cut = da.from_array(x, chunks=(20_000, -1))
    for function in (
        lambda x: ps.kl_divergence_value_and_grad(x, -x),
        lambda x: ps.entmax_loss_value_and_grad(x, labels),
        lambda x: ps.cross_entropy_value_and_grad(x, labels, ignore_index=0),
    ):
        (loss, grad), (want, slope) = function(cut), function(x.astype(np.float64))
        grads, slopes = as_tuple(grad), as_tuple(slope)
        for y, e in zip((loss, *grads), (want, *slopes), strict=True):
            assert y.dtype == np.float16
            assert_allclose(xp.numpy(y), e, rtol=0.51 * 2.0**-10, atol=0.51 * 2.0**-24)


@pytest.mark.parametrize(
    ("function", "each", "trees"),
    [
        (ps.softmax, 1, 0),
        (ps.log_softmax, 1, 0),
        (lambda x: ps.logsumexp(x, axis=1), 1, 1),
        (lambda x: ps.softmax_vjp(x, x), 1, 1),
        (lambda x: ps.cross_entropy(x, indices(x)), 1, 1),
        (lambda x: ps.cross_entropy_value_and_grad(x, indices(x)), 3, 1),
        (lambda x: ps.cross_entropy(x, indices(x), ignore_index=2), 1, 2),
        (lambda x: losses(x, ignore_index=2), 3, 2),
        (lambda x: losses(x, weight=ones(x, 1)), 3, 2),
        (lambda x: losses(x, sample_weight=ones(x, 0)), 3, 2),
    ],
)
@pytest.mark.parametrize("parts", [1, 4])
def test_tasks_a_chunk(da, function, each, trees, parts):
    """Those that fold or finish a chunk; a tree of merges has one for each eight chunks more.

    A mean has two of them if not every position counts as much: of losses, and of what they count.
    """
    x = da.from_array(np.random.default_rng(0).normal(size=(64, 12)), chunks=(1, 12 // parts))
    chunks = x.npartitions
    merges = 10 * trees
    if parts > 1:
        each, merges = 2, merges + 3 * 64
    assert tasks_of(*as_tuple(function(x))) <= each * chunks + merges


def test_a_chunk_takes_the_kernel_of_its_library(da, xp, monkeypatch):
    """Once for each chunk, and as the switches were when the call was made."""
    from portable_softmax.kernels import _numpy

    seen = []
    for name in ("softmax", "cross_entropy_value_and_grad"):
        real = getattr(_numpy, name)
        monkeypatch.setattr(_numpy, name, lambda r, f=real: seen.append(r.operation) or f(r))
    monkeypatch.setattr(_decide, "_ROUTES", {})
    x, labels = da.from_array(TABLE, (2, 12)), da.from_array(LABELS, 2)
    with kernels.without("numpy tiles"):
        plain = ps.softmax(x)
    assert_allclose(plain.compute(scheduler="threads"), ps.softmax(TABLE), rtol=1e-13)
    assert seen == ["softmax"]
    del seen[:]
    y, loss = ps.softmax(x), ps.cross_entropy_value_and_grad(x, labels)[0]
    assert seen == []
    y.compute(scheduler="threads")
    assert seen == ["softmax"] * 4
    loss.compute(scheduler="threads")
    assert seen[4:] == ["cross_entropy_value_and_grad"] * 4


@pytest.mark.parametrize("dtype", ["float64", "float16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1, "z_loss": 0.1},
        {"weight": np.linspace(0.5, 3, 12), "ignore_index": 3},
        {"sample_weight": np.arange(8) % 3, "softcap": 3.0},
        {"sample_weight": np.zeros(8)},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_a_kernel_writes_the_gradient_of_the_mean(da, xp, monkeypatch, options, dtype):
    """In the chunk's own dtype: nobody divides it, or rounds it, once it is there."""
    from portable_softmax.kernels import _numba, _numpy

    written = []

    def spied(real):
        def cross_entropy_value_and_grad(request):
            loss, grad = real(request)
            written.append(grad.copy())
            return loss, grad

        return cross_entropy_value_and_grad

    name = "cross_entropy_value_and_grad"
    for module in (_numpy, _numba):
        monkeypatch.setattr(module, name, spied(getattr(module, name)))
    monkeypatch.setattr(_decide, "_ROUTES", {})
    table = TABLE.astype(dtype)
    loss, grad = ps.cross_entropy_value_and_grad(
        da.from_array(table, (2, 12)), LABELS, **on_dask(da, options)
    )
    grad = grad.compute(scheduler="synchronous")
    assert grad.dtype == dtype
    assert len(written) == 4
    for part in np.split(grad, 4):
        assert any(np.array_equal(part, one) for one in written)
    want, slope = ps.cross_entropy_value_and_grad(table.astype(np.float64), LABELS, **options)
    unit = np.finfo(dtype).eps
    assert_allclose(loss.compute(), want, rtol=8 * unit)
    assert_allclose(grad, slope, rtol=8 * unit, atol=unit / 2**14)


def on_dask(da, options):
    return {k: da.asarray(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}


@pytest.mark.parametrize("chunks", [(3, 12), (3, 5)])
def test_labels_of_numpy(da, xp, computes_nothing, chunks):
    x = da.from_array(TABLE, chunks)
    for labels in (LABELS, np.abs(TABLE)):
        found = ps.cross_entropy_value_and_grad(x, labels)
        for y, e in zip(found, ps.cross_entropy_value_and_grad(TABLE, labels), strict=True):
            assert_allclose(xp.numpy(y), e, rtol=1e-12, atol=1e-15)
    with pytest.raises(TypeError, match="labels is a list"):
        ps.cross_entropy(x, [0] * 8)
    with pytest.raises(ValueError, match="labels have shape"):
        ps.cross_entropy(x, LABELS[:3])


def test_chunks_of_masked_arrays_are_refused_as_those_are(da, xp, computes_nothing):
    """Their masked values would take part; the remedy gives what NumPy gives for the same."""
    hidden = TABLE > 1.0
    given = np.ma.masked_array(TABLE, hidden)
    x, plain = da.from_array(given, (3, 5), asarray=False), da.from_array(TABLE, (3, 5))
    wrong = r"{0} is an array of dask in chunks of numpy\.ma\.\S*MaskedArray, .*{0}\.map_blocks"
    for f in (ps.softmax, ps.logsumexp, ps.sparsemax, ps.online.fold):
        with pytest.raises(TypeError, match=wrong.format("x")):
            f(x)
    with pytest.raises(TypeError, match=wrong.format("logits")):
        ps.entropy(x)
    with pytest.raises(TypeError, match=wrong.format("labels")):
        ps.cross_entropy(plain, x)
    other = da.from_array(TABLE.view(type("Other", (np.ndarray,), {})), (3, 5), asarray=False)
    with pytest.raises(TypeError, match=r"Other, .*pass x\.map_blocks\(numpy\.asarray\)"):
        ps.softmax(other)
    where = ~x.map_blocks(np.ma.getmaskarray)
    y = ps.softmax(x.map_blocks(np.ma.getdata), where=where)
    assert_allclose(xp.numpy(y), ps.softmax(TABLE, where=~hidden), rtol=1e-13)


def test_equal_calls_are_one_computation(da):
    x, labels = da.from_array(TABLE, (3, 5)), da.from_array(LABELS, 3)
    for f in (ps.softmax, lambda x: ps.cross_entropy_value_and_grad(x, labels)[1]):
        assert f(x).name == f(x).name


def test_unknown_chunk_sizes_along_the_batch(da, xp, computes_nothing):
    x, labels = da.from_array(TABLE, (3, 5)), da.from_array(LABELS, 3)
    keep, kept = x[:, 0] > 0, TABLE[:, 0] > 0
    some, few = x[keep], labels[keep]
    assert np.isnan(some.shape[0])
    weight = np.arange(1.0, 13.0)
    weighted = {"weight": da.from_array(weight), "ignore_index": 2}
    for actual, expected in (
        (ps.softmax(some), ps.softmax(TABLE[kept])),
        (ps.log_softmax(some), ps.log_softmax(TABLE[kept])),
        (ps.logsumexp(some, axis=1), ps.logsumexp(TABLE[kept], axis=1)),
        (ps.logsumexp(some), ps.logsumexp(TABLE[kept])),
        (ps.cross_entropy(some, few), ps.cross_entropy(TABLE[kept], LABELS[kept])),
        (
            ps.cross_entropy_value_and_grad(some, few, **weighted)[1],
            ps.cross_entropy_value_and_grad(
                TABLE[kept], LABELS[kept], **{**weighted, "weight": weight}
            )[1],
        ),
        (ps.cross_entropy(some, some), ps.cross_entropy(TABLE[kept], TABLE[kept])),
    ):
        assert_allclose(xp.numpy(actual), expected, rtol=1e-12, atol=1e-15)


FILTERS = {
    "an empty chunk": [0, 0, 0, 1, 1, 0, 1, 1],
    "an empty chunk in the middle": [1, 0, 1, 0, 0, 0, 1, 0],
    "nothing but empty chunks": [0] * 8,
}


@pytest.mark.parametrize("kept", FILTERS.values(), ids=FILTERS)
def test_a_filter_that_leaves_an_empty_chunk(da, xp, computes_nothing, kept):
    kept = np.asarray(kept, bool)
    weight = np.arange(1.0, 13.0)

    def outputs(x, labels, weight):
        mask = x > -1.0
        for f in (ps.softmax, ps.log_softmax):
            yield from (f(x, axis=axis) for axis in (1, 0, None, (0, 1)))
            yield f(x, axis=0, where=mask, temperature=0.7)
        for axis in (1, 0, None):
            yield ps.logsumexp(x, axis=axis, keepdims=axis == 0)
            yield from ps.logsumexp(x, axis=axis, b=x, where=mask, return_sign=True)
            yield ps.logsumexp(x * 1j, axis=axis)
            yield from (f(x, x, axis=axis) for f in (ps.softmax_vjp, ps.log_softmax_vjp))
        yield ps.softmax_jacobian(x)
        for reduction in ("mean", "sum", "none"):
            for options in (
                {},
                {"weight": weight, "ignore_index": 6},
                {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0},
            ):
                options = {"reduction": reduction, **options}
                yield ps.cross_entropy(x, labels, **options)
                yield from ps.cross_entropy_value_and_grad(x, labels, **options)
            yield ps.cross_entropy(x, x, reduction=reduction)
            layer = ps.SoftmaxWithLoss(reduction=reduction, ignore_index=6)
            loss = layer.forward(x, labels)
            yield from (layer.y, layer.backward(loss))

    x, labels, some = da.from_array(TABLE, (3, 5)), da.from_array(LABELS, 3), da.from_array(kept, 3)
    expected = outputs(TABLE[kept], LABELS[kept], weight)
    for actual, e in zip(
        outputs(x[some], labels[some], da.from_array(weight)), expected, strict=True
    ):
        actual = xp.numpy(actual)
        assert actual.shape == e.shape
        assert_allclose(actual, e, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("chunks", [(3, 12), (3, 5)])
def test_running_sums_of_an_unknown_number_of_rows(da, chunks):
    kept = TABLE[:, 0] > 0
    x = da.from_array(TABLE, chunks)[da.from_array(kept, 3)]
    for f in (ps.logcumsumexp, lambda x: ps.logcumsumexp_vjp(x, x)):
        assert_allclose(f(x).compute(scheduler="synchronous"), f(TABLE[kept]), rtol=1e-12)


@pytest.mark.parametrize("whole", [True, False])
def test_chunks_of_known_and_of_unknown_lengths(da, computes_nothing, whole):
    """Nobody knows whether they are the same."""
    kept = da.from_array(TABLE[:, 0] > 0, 3)
    known, labels = da.from_array(TABLE, (3, -1 if whole else 5)), da.from_array(LABELS, 3)
    x, t = known[kept], labels[kept]
    losses = (
        (ps.cross_entropy, "logits"),
        (ps.entmax_loss, "logits"),
        (lambda x, t: ps.linear_cross_entropy(x, known, t), "hidden"),
    )
    for f, name in losses:
        for given in (labels, labels.rechunk(-1), LABELS):
            if given is LABELS and name == "hidden":
                continue  # which takes no labels of NumPy
            with pytest.raises(ValueError, match=rf"call {name}\.compute_chunk_sizes\(\)"):
                f(x, given)
        with pytest.raises(ValueError, match=r"call labels\.compute_chunk_sizes\(\)"):
            f(known, t)
    for f in (ps.cross_entropy, ps.sigmoid_cross_entropy):
        with pytest.raises(ValueError, match=r"labels has .* call logits\.compute_chunk_sizes\(\)"):
            f(x, ps.softmax(known))
    with pytest.raises(ValueError, match=r"dy has .* call y\.compute_chunk_sizes\(\)"):
        ps.softmax_vjp(x, known)
    with pytest.raises(ValueError, match=r"call logits_q\.compute_chunk_sizes\(\)"):
        ps.kl_divergence(known, x)


@pytest.mark.parametrize("kept", [0, 1, 2])
@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("chunks", [(1, 3), (2, 2)])
def test_a_mean_of_an_unknown_number(da, chunks, axis, kept):
    """Of none it is nan, without a warning."""
    some = da.from_array(np.arange(2) < kept, chunks[0])
    x = da.from_array(TABLE[:2, :3], chunks)[some]
    found = ps.logmeanexp(x, axis=axis).compute(scheduler="synchronous")
    assert_allclose(found, ps.logmeanexp(TABLE[:kept, :3], axis=axis), rtol=1e-14)


def test_an_unknown_number_of_classes(da):
    """What only sums over the classes needs no number; what counts them asks for it."""
    x = da.from_array(TABLE, (3, 5))[:, da.from_array(TABLE[0] > 0, 5)]
    labels = da.from_array(LABELS, 3)
    remedy = r"\(8, nan\), expected a known number .* axis 1: call .*compute_chunk_sizes\(\)"
    with pytest.raises(ValueError, match=remedy):
        ps.softmax_jacobian(x)
    for f in (ps.logcumsumexp, ps.entmax, ps.sparsemax, lambda x: ps.logcumsumexp_vjp(x, x)):
        with pytest.raises(ValueError, match=remedy):
            f(x)
    with pytest.raises(ValueError, match=remedy):
        ps.entmax_loss(x, labels)
    for given, options in (
        (labels, {}),
        (x, {"label_smoothing": 0.1}),
        (x, {"weight": da.from_array(np.ones(3))}),
    ):
        with pytest.raises(ValueError, match=remedy):
            ps.cross_entropy(x, given, **options)
    known = x.compute_chunk_sizes()
    expected = ps.cross_entropy(TABLE[:, TABLE[0] > 0], LABELS % 2)
    actual = ps.cross_entropy(known, labels % 2)
    assert_allclose(actual.compute(scheduler="synchronous"), expected)


@pytest.mark.parametrize("along", ["batch", "classes"])
@pytest.mark.parametrize(
    "name",
    [
        "softmax()",
        "log_softmax()",
        "logsumexp()",
        "cross_entropy(index int64: )",
        "cross_entropy_value_and_grad(distribution float64: )",
    ],
)
def test_the_number_of_tasks_grows_linearly(da, name, along):
    function = CALLS[name].function

    def tasks(n):
        shape, chunks = ((4 * n, 8), (4, 8)) if along == "batch" else ((4, 8 * n), (4, 8))
        x = da.zeros(shape, chunks=chunks)
        more = {
            "index": [da.zeros(shape[0], chunks=4, dtype=np.int64)],
            "distribution": [x],
        }.get(name.partition("(")[2].split()[0], [])
        return sum(len(dict(y.__dask_graph__())) for y in as_tuple(function(x, *more)))

    # The tree of a reduction makes one more level of each eightfold number, hence not exactly 8.
    assert tasks(64) <= 8 * 1.1 * tasks(8)


def test_a_label_out_of_range_is_nan_when_it_is_computed(da, xp, computes_nothing):
    labels = LABELS.copy()
    labels[5] = 12
    x, labels = da.from_array(TABLE, (3, 5)), da.from_array(labels, 3)
    loss, grad = ps.cross_entropy_value_and_grad(x, labels, reduction="none")
    assert_array_equal(np.isnan(xp.numpy(loss)), np.arange(8) == 5)
    assert_array_equal(np.isnan(xp.numpy(grad)).all(axis=1), np.arange(8) == 5)


@pytest.mark.parametrize("hidden", [np.nan, np.inf, -np.inf])
def test_what_a_mask_hides_reaches_no_gradient(da, xp, hidden):
    values = np.where(np.eye(4, dtype=bool), hidden, 1.0)
    mask = ~np.eye(4, dtype=bool)
    mask[2] = False
    x, where = da.from_array(values, (3, 2)), da.from_array(mask, (3, 2))
    labels = da.from_array(np.asarray([1, 2, -1, 0]), 3)
    _, grad = ps.cross_entropy_value_and_grad(x, labels, where=where, ignore_index=-1)
    grad = xp.numpy(grad)
    assert np.isfinite(grad).all()
    assert_array_equal(grad[~mask], 0.0)


@pytest.mark.parametrize("chunks", [(2, -1), (2, 2)], ids=["whole rows", "parts"])
@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_impossible_class_raises_no_warning_of_numpy(da, name, chunks):
    """Though a chunk of a row, or a row of its chunk, holds no other."""
    import dask

    def cut(a):
        return da.from_array(a, chunks[: a.ndim])

    x, f = np.asarray(WITH_IMPOSSIBLE), TABLE[:4, :4]
    found = dask.compute(*as_tuple(IMPOSSIBLE[name](cut(x), cut(f))), scheduler="synchronous")
    for y, e in zip(found, as_tuple(IMPOSSIBLE[name](x, f)), strict=True):
        assert_allclose(y, e, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunks", [(2, -1), (2, 2)], ids=["whole rows", "parts"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_chunks_answer_in_the_dtype_asked_for(da, chunks, dtype):
    """numpy.dtype("float64") equals None."""
    other = "float32" if dtype == "float64" else "float64"
    x = da.from_array(np.arange(12, dtype=other).reshape(3, 4), chunks=chunks)
    labels = da.from_array(np.asarray([0, 1, 2]))
    for found in (
        ps.softmax(x, dtype=dtype),
        ps.log_softmax(x, dtype=np.dtype(dtype)),
        ps.logsumexp(x, axis=1, dtype=dtype),
        ps.cross_entropy(x, labels, dtype=dtype),
        ps.cross_entropy(x, labels, dtype=dtype, reduction="none"),
        ps.cross_entropy_value_and_grad(x, labels, dtype=dtype)[0],
    ):
        assert found.dtype == found.compute().dtype == dtype


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (ps.logsumexp, {"axis": 1}),
        (ps.softmax, {}),
        (ps.cross_entropy, {}),
        (lambda *args, **options: ps.cross_entropy_value_and_grad(*args, **options)[1], {}),
        (
            lambda *args, **options: ps.cross_entropy_value_and_grad(*args, **options)[1],
            {"ignore_index": 3, "z_loss": 0.1, "weight": np.linspace(0.5, 2.0, 30)},
        ),
    ],
    ids=["logsumexp", "softmax", "loss", "gradient", "gradient with options"],
)
def test_a_part_of_rows_is_made_by_kernels(da, function, options, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("made in the library's own operations")

    x = np.random.default_rng(0).normal(size=(8, 30)).astype(np.float32)
    parts = da.from_array(x, chunks=(4, 10)).map_blocks(np.ascontiguousarray)
    labels = [] if function in (ps.logsumexp, ps.softmax) else [np.arange(8) * 3]
    want = function(x, *labels, **options)
    for name in ("fold_part", "softmax_of"):
        monkeypatch.setattr(f"portable_softmax.portable.{name}", refuse)
    lazy = {n: da.from_array(v) if isinstance(v, np.ndarray) else v for n, v in options.items()}
    found = function(parts, *map(da.from_array, labels), **lazy).compute(scheduler="sync")
    np.testing.assert_allclose(found, want, rtol=2e-6, atol=1e-9)
