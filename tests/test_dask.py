"""Dask: nothing is computed before it is asked for, whatever the chunks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from calls import CALLS, IMPOSSIBLE, WITH_IMPOSSIBLE, as_tuple, every_call
from numpy.testing import assert_allclose
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
    """What Dask says of a block that it has not seen is in native byte order, as in NumPy."""
    expected = call.outputs(np.asarray)
    outputs = call.outputs(lambda a: xp.from_numpy(a.astype(a.dtype.newbyteorder(">"))))
    for y, e in zip(outputs, expected, strict=True):
        assert isinstance(y, da.Array)
        assert (y.shape, y.dtype, y._meta.dtype) == (e.shape, e.dtype, e.dtype)
    with pytest.raises(AssertionError, match="somebody computed"):
        outputs[0].compute()


TABLE = np.random.default_rng(0).normal(size=(8, 12))
LABELS = np.arange(8) % 12


@pytest.mark.parametrize("chunks", [(4, 1), (2, 3), (1, 40)], ids=str)
def test_a_confident_row_in_parts_keeps_the_digits_of_its_gradient(da, xp, chunks):
    for dtype in MARGINS.keys() & {"float32", "float64", *xp.halves}:
        x, dy, expected = confident(40, MARGINS[dtype])
        y = ps.softmax(da.from_array(xp.numpy(xp.asarray(x, dtype)), chunks))
        dx = ps.softmax_vjp(y, da.from_array(xp.numpy(xp.asarray(dy, dtype)), chunks))
        assert_allclose(xp.numpy(dx).astype(float), expected, rtol=32 * EPS[dtype])


ON_CHUNKS = [
    name for name in CALLS if name.partition("(")[0] in kernels.available().get("dask chunks", ())
]


@pytest.mark.parametrize("name", ON_CHUNKS)
def test_chunks_of_whole_rows(da, name):
    """As in NumPy, which each chunk's call goes to."""
    import dask

    def cut(array):
        return da.from_array(array, chunks=(1, *array.shape[1:]) if array.ndim > 1 else -1)

    expected = CALLS[name].outputs(np.asarray)
    found = dask.compute(*CALLS[name].outputs(cut), scheduler="synchronous")
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


def losses(x, labels=None, **options):
    labels = indices(x) if labels is None else labels
    return ps.cross_entropy_value_and_grad(x, labels, **options)


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
        (losses, 3, 1),
        (lambda x: ps.cross_entropy(x, indices(x), ignore_index=2), 1, 2),
        (lambda x: losses(x, ignore_index=2), 3, 2),
        (lambda x: losses(x, weight=ones(x, 1)), 3, 2),
        (lambda x: losses(x, sample_weight=ones(x, 0)), 3, 2),
    ],
)
def test_tasks_a_chunk(da, function, each, trees):
    """Those that fold or finish a chunk; a tree of merges has one for each eight chunks more.

    A mean has two of them if not every position counts as much: of losses, and of what they count.
    """
    for parts in (1, 4):
        x = da.from_array(np.random.default_rng(0).normal(size=(64, 12)), chunks=(1, 12 // parts))
        merges = 10 * trees
        if parts > 1:
            each, merges = 2, merges + 3 * 64
        assert tasks_of(*as_tuple(function(x))) <= each * x.npartitions + merges


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


FILTERS = {
    "an empty chunk": [0, 0, 0, 1, 1, 0, 1, 1],
    "an empty chunk in the middle": [1, 0, 1, 0, 0, 0, 1, 0],
    "nothing but empty chunks": [0] * 8,
}


@pytest.mark.parametrize("kept", FILTERS.values(), ids=FILTERS)
def test_a_filter_that_leaves_an_empty_chunk(da, xp, computes_nothing, kept):
    """Of chunks whose lengths nobody knows; a mean of nothing is nan, without a warning."""
    kept, weight = np.asarray(kept, bool), np.arange(1.0, 13.0)

    def outputs(x, labels, weight):
        mask = x > -1.0
        for f in (ps.softmax, ps.log_softmax):
            yield from (f(x, axis=axis) for axis in (1, 0, None, (0, 1)))
            yield f(x, axis=0, where=mask, temperature=0.7)
        for axis in (1, 0, None):
            yield ps.logsumexp(x, axis=axis, keepdims=axis == 0)
            yield from ps.logsumexp(x, axis=axis, b=x, where=mask, return_sign=True)
            yield ps.logsumexp(x * 1j, axis=axis)
            yield ps.logmeanexp(x, axis=axis)
            yield from (f(x, x, axis=axis) for f in (ps.softmax_vjp, ps.log_softmax_vjp))
        yield from (ps.softmax_jacobian(x), ps.logcumsumexp(x), ps.logcumsumexp_vjp(x, x))
        for reduction in ("mean", "sum", "none"):
            for options in (
                {"weight": weight, "ignore_index": 6},
                {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0},
            ):
                yield ps.cross_entropy(x, labels, reduction=reduction, **options)
                yield from ps.cross_entropy_value_and_grad(
                    x, labels, reduction=reduction, **options
                )
            yield ps.cross_entropy(x, x, reduction=reduction)
            layer = ps.SoftmaxWithLoss(reduction=reduction, ignore_index=6)
            loss = layer.forward(x, labels)
            yield from (layer.y, layer.backward(loss))

    x, labels, some = da.from_array(TABLE, (3, 5)), da.from_array(LABELS, 3), da.from_array(kept, 3)
    assert np.isnan(x[some].shape[0])
    found = outputs(x[some], labels[some], da.from_array(weight))
    for y, e in zip(found, outputs(TABLE[kept], LABELS[kept], weight), strict=True):
        y = xp.numpy(y)
        assert y.shape == e.shape
        assert_allclose(y, e, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("whole", [True, False])
def test_chunks_of_known_and_of_unknown_lengths(da, computes_nothing, whole):
    """Nobody knows whether they are the same."""
    kept = da.from_array(TABLE[:, 0] > 0, 3)
    known, labels = da.from_array(TABLE, (3, -1 if whole else 5)), da.from_array(LABELS, 3)
    x, t = known[kept], labels[kept]

    def linear(x, t):
        return ps.linear_cross_entropy(x, known, t)

    unknown = [(f, x, labels, "call logits") for f in (ps.cross_entropy, ps.entmax_loss)]
    for f, some, other, message in (
        *unknown,
        *((f, x, labels.rechunk(-1), message) for f, _, _, message in unknown),
        *((f, x, LABELS, message) for f, _, _, message in unknown),
        (linear, x, labels, "call hidden"),  # which takes no labels of NumPy
        (linear, x, labels.rechunk(-1), "call hidden"),
        *((f, known, t, "call labels") for f in (ps.cross_entropy, ps.entmax_loss, linear)),
        (ps.cross_entropy, x, ps.softmax(known), "labels has .* call logits"),
        (ps.sigmoid_cross_entropy, x, ps.softmax(known), "labels has .* call logits"),
        (ps.softmax_vjp, x, known, "dy has .* call y"),
        (ps.kl_divergence, known, x, "call logits_q"),
    ):
        with pytest.raises(ValueError, match=rf"{message}\.compute_chunk_sizes\(\)"):
            f(some, other)


def test_an_unknown_number_of_classes(da):
    """What only sums over the classes needs no number; what counts them asks for it."""
    x = da.from_array(TABLE, (3, 5))[:, da.from_array(TABLE[0] > 0, 5)]
    labels, weight = da.from_array(LABELS, 3), da.from_array(np.ones(3))
    remedy = r"\(8, nan\), expected a known number .* axis 1: call .*compute_chunk_sizes\(\)"
    for f in (
        *(ps.softmax_jacobian, ps.logcumsumexp, ps.entmax, ps.sparsemax),
        lambda x: ps.logcumsumexp_vjp(x, x),
        lambda x: ps.entmax_loss(x, labels),
        lambda x: ps.cross_entropy(x, labels),
        lambda x: ps.cross_entropy(x, x, label_smoothing=0.1),
        lambda x: ps.cross_entropy(x, x, weight=weight),
    ):
        with pytest.raises(ValueError, match=remedy):
            f(x)
    expected = ps.cross_entropy(TABLE[:, TABLE[0] > 0], LABELS % 2)
    actual = ps.cross_entropy(x.compute_chunk_sizes(), labels % 2)
    assert_allclose(actual.compute(scheduler="synchronous"), expected)


@pytest.mark.parametrize("along", ["batch", "classes"])
@pytest.mark.parametrize(
    "function",
    [
        *(ps.softmax, ps.log_softmax, ps.logsumexp),
        lambda x: ps.cross_entropy(x, x[:, 0].astype(np.int64)),
        lambda x: ps.cross_entropy_value_and_grad(x, x),
    ],
    ids=["softmax", "log_softmax", "logsumexp", "loss", "gradient"],
)
def test_the_number_of_tasks_grows_linearly(da, function, along):
    def tasks(n):
        x = da.zeros((4 * n, 8) if along == "batch" else (4, 8 * n), chunks=(4, 8))
        return sum(len(dict(y.__dask_graph__())) for y in as_tuple(function(x)))

    # The tree of a reduction makes one more level of each eightfold number, hence not exactly 8.
    assert tasks(64) <= 8 * 1.1 * tasks(8)


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


@pytest.mark.parametrize(
    "function",
    [
        lambda x, _t, _w: ps.logsumexp(x, axis=1),
        lambda x, _t, _w: ps.softmax(x),
        lambda x, t, _w: ps.cross_entropy(x, t),
        lambda x, t, _w: ps.cross_entropy_value_and_grad(x, t)[1],
        lambda x, t, w: losses(x, t, ignore_index=3, z_loss=0.1, weight=w)[1],
    ],
    ids=["logsumexp", "softmax", "loss", "gradient", "gradient with options"],
)
def test_a_part_of_rows_is_made_by_kernels(da, function, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("made in the library's own operations")

    x = np.random.default_rng(0).normal(size=(8, 30)).astype(np.float32)
    labels, weight = np.arange(8) * 3, np.linspace(0.5, 2.0, 30)
    parts = da.from_array(x, chunks=(4, 10)).map_blocks(np.ascontiguousarray)
    want = function(x, labels, weight)
    for name in ("fold_part", "softmax_of"):
        monkeypatch.setattr(f"portable_softmax.portable.{name}", refuse)
    found = function(parts, *map(da.from_array, (labels, weight))).compute(scheduler="sync")
    np.testing.assert_allclose(found, want, rtol=2e-6, atol=1e-9)
