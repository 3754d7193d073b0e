"""Sixteen threads at once: nothing is shared between two calls."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
from calls import every_call

import portable_softmax as ps
from portable_softmax import kernels

THREADS = 16


def at_once(function):
    """Return what each of the threads got, all of which start together."""
    start = Barrier(THREADS)

    def one(i):
        start.wait()
        return [function(i) for _ in range(4)]

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(one, range(THREADS)))


def bits(xp, outputs):
    return [xp.numpy(y).tobytes() for y in outputs]


# The other libraries schedule threads of their own.
threaded = pytest.mark.libraries("numpy", "torch")


@threaded
@every_call
def test_every_call_gives_the_same_bits(xp, call):
    expected = bits(xp, call.outputs(xp.from_numpy))
    for results in at_once(lambda _: bits(xp, call.outputs(xp.from_numpy))):
        assert results == [expected] * 4


@threaded
def test_large_arrays_give_the_same_bits(xp):
    """Many tiles, and a different array in each thread."""
    xs = [
        xp.asarray(np.random.default_rng(i).normal(size=(700, 999)), "float32")
        for i in range(THREADS)
    ]
    expected = [bits(xp, [ps.softmax(x), ps.log_softmax(x)]) for x in xs]
    results = at_once(lambda i: bits(xp, [ps.softmax(xs[i]), ps.log_softmax(xs[i])]))
    assert results == [[e] * 4 for e in expected]


def test_forcing_the_portable_path_is_a_thread_s_own_affair():
    x = np.zeros((2, 3))

    def explain(i):
        if i % 2:
            return kernels.explain("softmax", x)
        with kernels.portable():
            return kernels.explain("softmax", x)

    usual = kernels.explain("softmax", x)
    for i, results in enumerate(at_once(explain)):
        forced = [r.startswith("portable: forced") for r in results]
        assert forced == [i % 2 == 0] * 4
        assert i % 2 == 0 or results == [usual] * 4
