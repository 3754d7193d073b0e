"""The table of kernels: what is there, which path a call takes, and that both answer alike."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import numpy as np
import pytest

import portable_softmax as ps
from portable_softmax import kernels
from portable_softmax.kernels import _numpy, _table

FAMILY = ("softmax", "log_softmax", "logsumexp")
LOSSES = ("cross_entropy", "cross_entropy_value_and_grad")


@pytest.fixture
def calls(monkeypatch):
    """Which kernel functions ran."""
    seen = []

    def spied(name, real):
        def spy(*args, **kwargs):
            seen.append(name)
            return real(*args, **kwargs)

        return spy

    for name in (*FAMILY, *LOSSES):
        monkeypatch.setattr(_numpy, name, spied(name, getattr(_numpy, name)))
    return seen


@pytest.mark.parametrize("operation", [*FAMILY, *LOSSES])
def test_the_path_that_explain_names_is_taken(calls, operation):
    x = np.ones((2, 3), np.float16)  # no shortcut
    arguments = (x, np.asarray([0, 1])) if operation in LOSSES else (x,)
    assert kernels.explain(operation, x).startswith("numpy tiles: row tiles in cache; not numba")
    getattr(ps, operation)(*arguments)
    assert calls == [operation]
    with kernels.portable():
        assert kernels.explain(operation, x) == "portable: forced by kernels.portable()"
        getattr(ps, operation)(*arguments)
    assert calls == [operation]
    getattr(ps, operation)(*arguments)
    assert calls == [operation] * 2


def test_every_kernel_of_the_table_exists():
    for kernel in _table.TABLE:
        module = importlib.import_module(kernel.module)
        for operation in kernel.operations:
            assert operation in _table.OPERATIONS
            assert callable(getattr(module, operation))
        if not _table._missing(kernel.module):
            assert kernels.available()[kernel.name] == kernel.operations


def test_what_each_library_has(xp):
    x = xp.asarray(np.ones((2, 3)))
    explained = kernels.explain("softmax", x)
    with_numba = xp.name in ("numba", "torch-numba")
    if with_numba:
        assert explained == "numba rows: one pass in cache"
    elif xp.library == "numpy":
        assert explained.startswith("numpy tiles: row tiles in cache; not numba rows: ")
    elif xp.name == "torch":
        assert explained.startswith("portable: not numba rows: left out of this test; not triton")
    elif xp.name in ("strict", "dask", "jax"):
        assert explained == f"portable: no kernel for softmax on {xp.name}"
    with pytest.raises(ValueError, match="operation is 'relu', expected one of 'softmax'"):
        kernels.explain("relu", x)


@pytest.mark.once
@pytest.mark.parametrize(
    "shape",
    [(3, 5), (100_000, 3), (3, 100_000), (70, 40, 33), (2, 0), (5, 1), (1, 70_000), (70_000, 1)],
)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int16"])
def test_tiles_answer_as_the_portable_path(shape, dtype):
    """On both sides of the size of a tile, for every axis, with and without a mask."""
    rng = np.random.default_rng(9)
    x = (rng.normal(size=shape) * 5).astype(dtype)
    mask = rng.random(shape) > 0.3
    compute = np.float32 if dtype in ("float16", "float32") else np.float64
    axes = [*range(len(shape)), None, tuple(range(len(shape)))[:2]]
    for axis in axes:
        for name in FAMILY:
            for options in ({}, {"where": mask}):
                function = getattr(ps, name)
                tiled = function(x, axis=axis, **options)
                with kernels.portable():
                    plain = function(x, axis=axis, **options)
                assert tiled.dtype == plain.dtype
                unit = np.finfo(tiled.dtype).eps
                tolerance = 8 * np.finfo(compute).eps + (unit if dtype == "float16" else 0)
                np.testing.assert_allclose(tiled, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.once
@pytest.mark.parametrize("shape", [(3, 5), (100_000, 3), (3, 100_000), (70, 40, 33), (0, 4)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_tiles_of_a_loss_answer_as_the_portable_path(shape, dtype):
    """Every option is cut like the logits, whatever the class axis."""
    rng = np.random.default_rng(10)
    x = (rng.normal(size=shape) * 5).astype(dtype)
    compute = np.float32 if dtype == "float16" else x.dtype
    for axis in range(len(shape)):
        n = shape[axis]
        if n == 0:
            continue
        positions = (*shape[:axis], *shape[axis + 1 :])
        labels = rng.integers(n, size=positions)
        t = rng.random(shape)
        mask = rng.random(shape) < 0.8
        if labels.size:
            np.put_along_axis(mask, np.expand_dims(labels, axis), True, axis=axis)
        ignored = np.where(rng.random(positions) < 0.2, -1, labels)
        for target, options in (
            (labels, {}),
            (ignored, {"ignore_index": -1, "weight": rng.random(n), "where": mask, "z_loss": 0.1}),
            (labels, {"label_smoothing": 0.1, "softcap": 3.0, "reduction": "sum"}),
            (np.where(labels == 0, n, labels), {"check_labels": False, "reduction": "none"}),
            (t, {"weight": rng.random(n), "reduction": "none"}),
            (t, {"where": mask[:1], "label_smoothing": 0.2}),
        ):
            tiled = ps.cross_entropy_value_and_grad(x, target, axis=axis, **options)
            alone = ps.cross_entropy(x, target, axis=axis, **options)
            with kernels.portable():
                plain = ps.cross_entropy_value_and_grad(x, target, axis=axis, **options)
            np.testing.assert_array_equal(alone, tiled[0])
            for one, other in zip(tiled, plain, strict=True):
                assert one.dtype == other.dtype
                assert one.shape == other.shape
                unit = 64 * np.finfo(compute).eps + 2 * np.finfo(dtype).eps
                # p * Q - q of a distribution cancels: what is left is as exact as its terms.
                terms = (
                    8
                    * np.finfo(compute).eps
                    * np.max(np.abs(other), initial=0, where=other == other)
                )
                # A subnormal half is rounded to a whole unit, to either side of a tie.
                terms += np.finfo(dtype).smallest_subnormal
                np.testing.assert_allclose(one, other, rtol=unit, atol=terms)


def test_a_one_row_tile_is_no_view_of_the_input():
    """Working in place on it would change the user's array."""
    for shape in ((1, 70_000), (70_000, 1), (1, 5), (5, 1)):
        x = np.random.default_rng(0).normal(size=shape)
        before = x.copy()
        for axis in (0, 1):
            y = ps.softmax(x, axis=axis)
            assert not np.shares_memory(x, y)
            np.testing.assert_array_equal(x, before)


def run(code, value):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PORTABLE_SOFTMAX_KERNELS": value},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_environment_variable():
    code = (
        "import numpy as np; from portable_softmax import kernels; "
        "print(kernels.explain('softmax', np.ones(3)))"
    )
    forced = run(code, "portable")
    assert forced.stdout.strip() == "portable: forced by PORTABLE_SOFTMAX_KERNELS=portable"
    assert run(code, "").stdout.startswith("numpy tiles: row tiles in cache; not numba rows: ")
    wrong = run(code, "fused")
    assert "PORTABLE_SOFTMAX_KERNELS is 'fused', expected 'portable'" in wrong.stderr
