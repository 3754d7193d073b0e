"""dask.distributed: an array of twice a worker's memory is reduced in pieces."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

import portable_softmax as ps
from bench import memory_cell

LIMIT = 256 * 2**20
SHAPE = (65_536, 1024)  # float64: 512 MiB
CHUNKS = {"batch": (512, 1024), "batch and classes": (2048, 256)}  # of 4 MiB
PATIENCE = 600  # seconds


pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells memory there"),
    pytest.mark.libraries("dask"),
    pytest.mark.slow("gigabytes go through one worker process"),
]


@pytest.fixture(scope="module")
def client(backend_name):
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    import dask

    config = {
        # Nothing goes to disk, a worker that is killed for its memory fails the test, and none is
        # paused before: it would wait for memory that nothing is going to free.
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        "distributed.scheduler.allowed-failures": 0,
    }
    one = {"n_workers": 1, "threads_per_worker": 1, "memory_limit": LIMIT}
    with (
        dask.config.set(config),
        distributed.LocalCluster(processes=True, dashboard_address="127.0.0.1:0", **one) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_an_array_is_reduced_by_a_worker_that_could_not_hold_it(client, chunks):
    import dask.array as da

    def drawn():
        # Arrays of their own for each reduction: of tasks that it knows from an earlier graph the
        # scheduler keeps the priorities, and reads logits long before the labels they wait for.
        rng = da.random.default_rng(next(seeds))
        return rng.random(SHAPE, chunks=chunks), rng.integers(1, size=SHAPE[0], chunks=chunks[0])

    def computed(array):
        futures.append(client.compute(array))
        return futures[-1].result(timeout=PATIENCE)

    seeds, futures = itertools.count(), []
    x, _ = drawn()
    assert x.nbytes == 2 * LIMIT
    # Over uniform numbers the mean of exp is e - 1, and that of the label's own 1/2.
    assert abs(computed(ps.logsumexp(x)) - np.log(x.size * (np.e - 1))) < 1e-3
    loss = computed(ps.cross_entropy(*drawn()))
    assert abs(loss - (np.log(SHAPE[1] * (np.e - 1)) - 0.5)) < 1e-2
    _, grad = ps.cross_entropy_value_and_grad(*drawn(), ignore_index=1)
    for array in (ps.softmax(drawn()[0]), grad):
        assert 0 < computed(abs(array).max()) < 1
    (most,) = client.run(memory_cell.most_resident).values()
    assert most < LIMIT
