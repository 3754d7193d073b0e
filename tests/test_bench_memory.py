"""``bench memory`` measures the peak of any allocator, and compares ours with its ceilings."""

import json
import mmap
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import pytest

from bench import memory, memory_cell, places, providers
from bench.__main__ import main

pytestmark = pytest.mark.skipif(bool(memory.why_not()), reason="memory is measured on Linux only")

MB = 2**20
ARGUMENTS = ("memory", "--quick", "--peers", "none")


# --------------------------------------------------------------------------- what is measured


def _mapped():
    """Take memory that tracemalloc does not see, and keep half of it."""
    maps = [mmap.mmap(-1, 40 * MB) for _ in range(2)]
    for one in maps:
        np.frombuffer(one, np.uint8)[:] = 1
    maps[1].close()
    return maps[0]


def _by_a_thread():
    held = []
    thread = threading.Thread(target=lambda: held.append(np.ones(40 * MB // 8)))
    thread.start()
    thread.join()
    return [*held, np.ones(40 * MB // 8)]


def _nothing():
    return None


def _peak(call):
    gauge = memory_cell.gauge(places.open_backend("numpy"))
    return memory_cell.peak_of(call, lambda result: None, gauge)


def test_the_peak_holds_what_any_allocator_and_thread_took():
    # In a process of its own, as a cell is: memory that other tests freed may be taken once more.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for call, expected in ((_nothing, 0), (_mapped, 80)):
            assert pool.submit(_peak, call).result() / MB == pytest.approx(expected, abs=4)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(_peak, _by_a_thread).result() / MB == pytest.approx(80, abs=4)


def test_the_first_call_is_not_measured_and_the_largest_counts():
    finished, peaks = [], iter([5, 9, 7])
    gauge = memory_cell.Gauge(lambda: 1, lambda: next(peaks))
    calls = iter("abcd")
    assert memory_cell.peak_of(lambda: next(calls), finished.append, gauge) == 8
    assert finished == list("abcd")


class _Library:
    """What the gauges use of torch and of CuPy."""

    def __init__(self):
        self.told, self.held = [], 100
        self.cuda = self
        self.synchronize = lambda device: self.told.append("synchronize")
        self.reset_peak_memory_stats = lambda device: self.told.append("reset")
        self.free_all_blocks = lambda: self.told.append("free")
        self.memory_allocated, self.max_memory_allocated = lambda device: 100, lambda device: 300
        self.total_bytes, self.get_default_memory_pool = lambda: self.held, lambda: self


def test_a_gpu_is_asked_for_its_allocator():
    torch, cupy = _Library(), _Library()
    gauge = memory_cell._torch(torch, "cuda:0")
    assert (gauge.start(), gauge.peak()) == (100, 300)
    assert torch.told == ["synchronize", "reset"]
    gauge = memory_cell._cupy(cupy, "cuda:0")
    assert gauge.start() == 100
    cupy.held = 400
    assert gauge.peak() == 400
    assert cupy.told == ["free"]


def test_the_peak_of_a_process_does_not_begin_with_that_of_its_parent():
    held = np.ones(600 * MB // 8)
    script = "from bench.memory_cell import most_resident; print(most_resident())"
    ran = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=True)
    assert 10 * MB < int(ran.stdout) < held.nbytes


# --------------------------------------------------------------------------- the command


@pytest.mark.slow("a process for each call")
@pytest.mark.libraries("numpy", "array_api_strict", "torch", "jax", "dask")
def test_memory_runs_on_every_backend(arrays_of, tmp_path, capsys):
    path = tmp_path / "memory.json"
    assert main([*ARGUMENTS, "--backend", arrays_of, "--ops", "softmax", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["benchmark"] == "memory"
    assert {"command", "commit", "machine", "threads", "versions"} <= document.keys()
    assert document["cells"][0]["ours"]
    assert document["cells"][0]["path"]
    for cell in document["cells"]:
        assert not cell["problem"]
        assert cell["held"]
        # At least the result; a lazy or compiled one may not have been kept.
        assert 0.9 <= cell["ratio"] < 20
    assert "every ceiling held" in capsys.readouterr().out


def _found(monkeypatch, **by_path):
    """Measure nothing: each path of ours is said to take so many units of the input."""

    def in_a_process(backend, cell):
        path = "portable" if "portable" in cell.provider else "numpy tiles"
        return {"peak_bytes": by_path[path.split()[-1]] * cell.input_bytes, "path": path}

    monkeypatch.setattr(memory, "_in_a_process", in_a_process)


def test_a_kernel_has_a_ceiling_and_the_portable_path_none(monkeypatch, capsys):
    for operation, ratio, status in (
        ("softmax", 1.1, 0),
        ("softmax", 1.2, 1),
        ("logsumexp", 0.1, 0),
        ("logsumexp", 0.2, 1),
        ("cross_entropy", 0.2, 1),
        ("cross_entropy_value_and_grad", 1.2, 1),
    ):
        _found(monkeypatch, tiles=ratio, portable=9.0)
        assert main([*ARGUMENTS, "--ops", operation]) == status
        out = capsys.readouterr().out
        assert ("1 ceilings broken" in out) == bool(status)
        assert "9.00" in out


def _measured(some):
    return list(memory.measure("numpy", some, ["softmax"], [(4, 3)], ["float32"]))


def test_autograd_has_no_ceiling(monkeypatch):
    _found(monkeypatch, tiles=9.0)
    offers = {"ours": providers.ours, "ours, autograd": partial(providers.ours)}
    place = places.open_backend("numpy")
    cells = _measured([providers.Provider(n, place, o, ours=True) for n, o in offers.items()])
    assert [cell.held for cell in cells] == [False, True]


def test_a_path_that_is_the_same_is_measured_once(monkeypatch):
    monkeypatch.setattr(memory, "_in_a_process", lambda *_: {"peak_bytes": 1.0, "path": "portable"})
    cells = _measured(providers.our_providers(places.open_backend("numpy")))
    assert [(cell.provider, cell.held) for cell in cells] == [("ours", True)]


def test_a_process_that_fails_says_why():
    cell = memory.Cell("softmax", (4, 3), "float32", "nobody", True, 48)
    assert "ValueError" in memory._in_a_process("numpy", cell)["problem"]
    cell = memory.Cell("softmax", (4, 3), "int7", "ours", True, 48)
    memory._fill(cell, memory._in_a_process("numpy", cell))
    assert cell.problem.startswith("TypeError")
    assert not cell.held
    (line,) = memory.cells([cell])
    assert cell.problem in line
