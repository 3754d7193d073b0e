"""What only cubed has: a bound on memory, which its plan is checked against before it computes."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from calls import CALLS, IMPOSSIBLE, WITH_IMPOSSIBLE, as_tuple

import portable_softmax as ps
from portable_softmax import kernels
from portable_softmax.kernels import _decide

pytestmark = pytest.mark.libraries("cubed")

MEGABYTE = 1_000_000


def zeros(xp, shape, chunks, allowed):
    """Return logits and labels of 0, of which cubed stores none."""
    spec = xp.cubed.Spec(work_dir=xp.folder.name, allowed_mem=allowed)
    return (
        xp.xp.zeros(shape, dtype=xp.xp.float32, chunks=chunks, spec=spec),
        xp.xp.zeros(shape[:1], dtype=xp.xp.int64, chunks=chunks[:1], spec=spec),
    )


@pytest.mark.parametrize("rows", [512, 4096])
def test_projected_memory_is_within_what_is_allowed(xp, rows):
    """The chunks decide it; cubed fuses steps as far as they fit."""
    x, labels = zeros(xp, (rows, 512), (256, 256), 4 * MEGABYTE)
    loss, grad = ps.cross_entropy_value_and_grad(x, labels)
    for array in (ps.softmax(x), ps.logsumexp(x, axis=1), loss, grad):
        plan = array.plan()
        assert 0 < plan.max_projected_mem <= plan.allowed_mem == 4 * MEGABYTE


@pytest.mark.parametrize("chunks", [(128, 1024), (256, 256)], ids=["whole rows", "parts of rows"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_task_takes_no_more_memory_than_its_plan_says(xp, chunks, dtype):
    """Zarr's own buffers, and what Python keeps, are what Spec's `reserved_mem` is for."""
    given = np.random.default_rng(0).normal(size=(256, 1024)).astype(dtype)
    spec = xp.cubed.Spec(work_dir=xp.folder.name, allowed_mem=100 * MEGABYTE)
    x = xp.cubed.from_array(given, chunks=chunks, spec=spec)
    labels = xp.xp.asarray(np.arange(256) % 7, chunks=chunks[:1], spec=spec)
    loss, grad = ps.cross_entropy_value_and_grad(x, labels)
    for array in (ps.softmax(x), ps.log_softmax(x), ps.logsumexp(x, axis=1), loss, grad):
        plan = array.plan()
        kept = np.prod(array.shape) * array.dtype.itemsize  # the answer, which is returned
        xp.numpy(array)  # whatever is loaded at the first call
        tracemalloc.start()
        xp.numpy(array)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak - kept <= plan.max_projected_mem


def test_a_chunk_that_does_not_fit_is_refused_before_anything_is_computed(xp):
    x, labels = zeros(xp, (1024, 512), (512, 512), 2 * MEGABYTE)
    with pytest.raises(ValueError, match="exceeds allowed_mem"):
        ps.cross_entropy(x, labels).compute()


def test_loss_and_gradient_in_chunks_are_those_of_the_whole(xp):
    """Stored as Zarr's files, which the other tests keep in memory."""
    rng = np.random.default_rng(5)
    given, labels = rng.normal(size=(6, 10)), rng.integers(0, 10, size=6)
    spec = xp.cubed.Spec(work_dir=xp.folder.name, allowed_mem=MEGABYTE)
    x = xp.xp.asarray(given, chunks=(4, 3), spec=spec)
    found = ps.cross_entropy_value_and_grad(x, xp.xp.asarray(labels, chunks=4, spec=spec))
    lse, expected = ps.logsumexp(given, axis=1), ps.cross_entropy_value_and_grad(given, labels)
    same(xp, (*found, ps.logsumexp(x, axis=1)), (*expected, lse))


BY_FUNCTION = {
    function: [name for name in CALLS if name.partition("(")[0] == function]
    for function in kernels.available().get("cubed chunks", ())
}
BY_FUNCTION = {function: names for function, names in BY_FUNCTION.items() if names}
slow = pytest.mark.slow("cubed runs a plan of many tasks for each case")


@pytest.mark.parametrize(
    "name",
    [
        name if name == max(names, key=len) else pytest.param(name, marks=slow)
        for names in BY_FUNCTION.values()
        for name in names
    ],
)
def test_chunks_of_whole_rows(xp, name):
    """As in NumPy, which each chunk's call goes to."""

    def cut(array):
        chunks = (1, *array.shape[1:]) if array.ndim > 1 else array.shape
        return xp.xp.asarray(array, chunks=chunks, spec=xp.spec)

    same(xp, CALLS[name].outputs(cut), CALLS[name].outputs(np.asarray))


@slow
@pytest.mark.parametrize("name", [*itertools.chain(*BY_FUNCTION.values())])
def test_chunks_of_parts_of_rows(xp, name):
    """Their states merge by cubed's own reduction."""
    same(xp, CALLS[name].outputs(xp.from_numpy), CALLS[name].outputs(np.asarray))


def same(xp, found, expected):
    for y, e in zip(found, expected, strict=True):
        assert xp.is_ours(y)
        assert (y.dtype, y.shape) == (e.dtype, e.shape)
        np.testing.assert_allclose(xp.numpy(y), e, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("function", "whole", "parts"),
    [
        (lambda x, _: ps.softmax(x), 1, 2),
        (lambda x, _: ps.log_softmax(x), 1, 2),
        (lambda x, _: ps.logsumexp(x, axis=1), 1, 1),
        (lambda x, _: ps.softmax_vjp(x, x), 1, 2),
        (lambda x, _: ps.entropy(x), 1, None),
        (ps.cross_entropy, 1, 1),
        (lambda x, labels: ps.cross_entropy_value_and_grad(x, labels)[1], 1, 2),
    ],
)
def test_tasks_a_chunk(xp, function, whole, parts):
    """Those that fold or finish a chunk; beside them merges, and steps of what is small."""
    for cut, each in (((1, 12), whole), ((1, 3), parts)):
        x = xp.xp.asarray(np.ones((32, 12)), chunks=cut, spec=xp.spec)
        labels = xp.xp.asarray(np.arange(32) % 7, chunks=cut[:1], spec=xp.spec)
        if each is not None:
            small = 3 * 32 if cut[1] < 12 else 40  # merges, and what there is one of a position
            assert function(x, labels).plan().num_tasks <= each * x.npartitions + small


def test_a_chunk_takes_the_kernel_of_its_library(xp, monkeypatch):
    from portable_softmax.kernels import _numpy

    seen = []
    for name in ("softmax", "cross_entropy_value_and_grad"):
        real = getattr(_numpy, name)
        monkeypatch.setattr(_numpy, name, lambda r, f=real: seen.append(r.operation) or f(r))
    monkeypatch.setattr(_decide, "_ROUTES", {})
    x = xp.xp.asarray(np.ones((4, 6)), chunks=(2, 6), spec=xp.spec)
    labels = xp.xp.asarray(np.arange(4), chunks=(2,), spec=xp.spec)
    y, (_, grad) = ps.softmax(x), ps.cross_entropy_value_and_grad(x, labels)
    assert seen == []
    xp.numpy(y)
    assert seen == ["softmax"] * 2
    xp.numpy(grad)
    assert seen[2:] == ["cross_entropy_value_and_grad"] * 2


@pytest.mark.parametrize("cut", [(2, 6), (2, 4)], ids=["whole rows", "parts of rows"])
def test_what_answers_share_may_be_computed_for_each(xp, cut):
    """Also where each is stored in a file: cubed 0.27 cannot write a structured dtype twice."""
    spec = xp.cubed.Spec(work_dir=xp.folder.name, allowed_mem=MEGABYTE)
    x = xp.xp.asarray(np.ones((4, 6)), chunks=cut, spec=spec)
    labels = xp.xp.asarray(np.arange(4), chunks=(2,), spec=spec)
    loss, grad = ps.cross_entropy_value_and_grad(x, labels, ignore_index=2)
    first = [xp.numpy(a) for a in as_tuple((loss, grad))]
    for a, b in zip(first, (loss, grad), strict=True):
        np.testing.assert_array_equal(a, xp.numpy(b))


@pytest.mark.parametrize("chunks", [(2, 4), (2, 2)], ids=["whole rows", "parts"])
@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_impossible_class_raises_no_warning_of_numpy(xp, name, chunks):
    """Though a chunk of a row, or a row of its chunk, holds no other."""

    def cut(a):
        return xp.xp.asarray(a, chunks=chunks[: a.ndim], spec=xp.spec)

    x, f = np.asarray(WITH_IMPOSSIBLE), np.random.default_rng(0).normal(size=(4, 4))
    answers = as_tuple(IMPOSSIBLE[name](cut(x), cut(f)))
    found = xp.cubed.compute(*answers, executor=xp.executor)
    for y, e in zip(found, as_tuple(IMPOSSIBLE[name](x, f)), strict=True):
        np.testing.assert_allclose(y, e, rtol=1e-12, atol=1e-14)


def test_arrays_of_two_specs_are_refused(xp):
    x, _ = zeros(xp, (4, 4), (2, 2), 10 * MEGABYTE)
    _, labels = zeros(xp, (4, 4), (2, 2), 11 * MEGABYTE)
    with pytest.raises(ValueError, match="labels"):
        ps.cross_entropy(x, labels)
