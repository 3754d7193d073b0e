"""Each bit of an answer depends on the call, the installed versions, the environment, the switches.

Never on earlier calls, on the number of threads, or on the rows beside a row.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import numpy as np
import pytest

import portable_softmax as ps

pytestmark = pytest.mark.run_on("paths")

ROWS = ("softmax", "log_softmax", "logsumexp")
_SLOW = pytest.mark.slow("Numba compiles every kernel for this dtype", "numba", "torch-numba")


# --------------------------------------------------------------------------- the rows beside a row


def different_rows(n: int, m: int, dtype: str) -> np.ndarray:
    """Rows that are ordinary, confident, tied, far from 0, and that hold each infinity or nan."""
    rng = np.random.default_rng(n * m)
    x = 3 * rng.normal(size=(n, m))
    kinds = np.arange(n) % 8
    x[kinds == 1, m // 2] = 40.0
    x[kinds == 2] = 1.25
    x[kinds == 3] += 500.0
    x[kinds == 4] *= 20.0
    x[kinds == 5, -1] = -np.inf
    x[5 % n, 0], x[6 % n, 0] = np.inf, np.nan
    x[7 % n] = -np.inf
    return x.astype(dtype)


@pytest.mark.slow("each function for each shape, compiled or as a graph", "jax", "dask")
@pytest.mark.parametrize("dtype", ["float32", "float64", pytest.param("float16", marks=_SLOW)])
@pytest.mark.parametrize(
    "shape", [(1, 5), (9, 3), (40, 10), (19, 257), (70, 130), (5, 5000)], ids=str
)
@pytest.mark.parametrize("last", [True, False], ids=["rows", "columns"])
def test_a_row_does_not_depend_on_the_rows_beside_it(xp, shape, dtype, last):
    """Permuted rows give permuted bits, and a part of the rows gives that part of the answer.

    JAX compiles them all: there each pair of shape, dtype and axis is met once, not each three.
    """
    if dtype == "float16" and "float16" not in xp.halves:
        pytest.skip("this backend has no float16")
    n, m = shape
    if xp.library == "jax" and (n + (dtype == "float16") + last) % 2:
        pytest.skip("the other axis meets this shape and dtype")
    x = different_rows(*shape, dtype)
    rng = np.random.default_rng(0)
    t = rng.integers(m, size=n)
    axis = 1 if last else 0

    def every(array, labels):
        found = [getattr(ps, name)(array, axis=axis) for name in ROWS]
        found += [ps.log_softmax(array, axis=axis, temperature=1.7)]
        found += [ps.softmax_vjp(found[0], array, axis=axis)]
        for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.01}):
            given = {"axis": axis, "reduction": "none", **options}
            found += [ps.cross_entropy(array, labels, **given)]
            found += ps.cross_entropy_value_and_grad(array, labels, **given)
        return found

    if xp.library == "jax":
        every = importlib.import_module("jax").jit(every)

    def answers(rows):
        array = xp.from_numpy(np.ascontiguousarray(x[rows] if last else x[rows].T))
        # The rows come first again, for NumPy to index.
        found = [xp.numpy(y) for y in every(array, xp.from_numpy(t[rows]))]
        return [y if last or y.ndim == 1 else y.T for y in found]

    all_rows = answers(np.arange(n))
    permutation = rng.permutation(n)
    for whole, permuted in zip(all_rows, answers(permutation), strict=True):
        same_bits_of_arrays(whole[permutation], permuted)


def same_bits_of_arrays(one: np.ndarray, other: np.ndarray) -> None:
    """Compare bit by bit; the sign and the payload of a nan say nothing."""
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(np.isnan(one), np.isnan(other))
    some = ~np.isnan(one)
    np.testing.assert_array_equal(
        np.ascontiguousarray(one[some]).view(f"u{one.itemsize}"),
        np.ascontiguousarray(other[some]).view(f"u{one.itemsize}"),
    )


# --------------------------------------------------------------------------- history and threads

# The digest of many calls: small and large, of each operation, dtype and layout.
DIGEST = """
import hashlib
import numpy as np
import portable_softmax as ps

def arrays(shape, dtype):
    rng = np.random.default_rng(sum(shape))
    x = (3 * rng.normal(size=shape)).astype(dtype)
    x[0, 0] = 60
    return x, rng.integers(shape[1], size=shape[0]), rng.random(shape[1]).astype(dtype)

def outputs(as_array, shape, dtype):
    x, t, w = arrays(shape, dtype)
    x, t, w = as_array(x), as_array(t), as_array(w)
    for axis in (0, 1):
        y = ps.softmax(x, axis=axis)
        yield from (y, ps.log_softmax(x, axis=axis), ps.logsumexp(x, axis=axis))
        yield ps.log_softmax(x, axis=axis, temperature=1.5)
        yield from (ps.softmax_vjp(y, x, axis=axis), ps.log_softmax_vjp(y, x, axis=axis))
    yield ps.cross_entropy(x, t)
    yield from ps.cross_entropy_value_and_grad(x, t)
    yield from ps.cross_entropy_value_and_grad(x, t, weight=w, label_smoothing=0.1)
    yield from ps.cross_entropy_value_and_grad(x, t, ignore_index=1, reduction="sum")

LARGE = [(300, 300), (30000, 4), (3, 70000), (4000, 64)]
SMALL = [(32, 10), (3, 4), (200, 30), (4, 4097), (64, 64)]
DTYPES = ("float32", "float64", "float16")

def digest(as_array, shapes, dtypes):
    found = {}
    for shape in shapes:
        for dtype in dtypes:
            state = hashlib.sha256()
            for y in outputs(as_array, shape, dtype):
                state.update(np.ascontiguousarray(np.asarray(y)).tobytes())
            found[f"{dtype} {shape}"] = state.hexdigest()[:16]
    return found
"""
NUMPY = "as_array = np.asarray"
TORCH = "import torch; as_array = torch.from_numpy"
SHOW = "for case, found in digest(as_array, {shapes}, DTYPES).items(): print(case, found)"


def show(library: str, shapes: str, before: str = "", **environment: str) -> dict[str, str]:
    code = "\n".join([DIGEST, library, before, SHOW.format(shapes=shapes)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())


SLOW = pytest.mark.slow("a fresh process compiles every kernel")
every_switch = pytest.mark.parametrize("kernels", ["before", "", "portable", "numba rows"])


def same_bits_of_processes(library, kernels):
    """Of small arrays after large calls of all kinds, in the order that is worst; of two threads.

    With `kernels` the large arrays are of one thread and of two, on these kernels.
    """
    if kernels == "before":
        one = show(library, "SMALL")
        two = show(library, "SMALL", before="digest(as_array, LARGE, DTYPES[::-1])")
    else:
        given = {"PORTABLE_SOFTMAX_KERNELS": kernels}
        one, two = (show(library, "LARGE", OMP_NUM_THREADS=n, **given) for n in ("1", "2"))
    assert one == two
    assert len(one) == (15 if kernels == "before" else 12)


@pytest.mark.numba
@SLOW
@every_switch
def test_calls_before_and_threads_change_no_bit(kernels):
    same_bits_of_processes(NUMPY, kernels)


@SLOW
@every_switch
def test_calls_before_and_threads_change_no_bit_of_a_tensor(torch, arrays_of, kernels):
    same_bits_of_processes(TORCH, kernels)
