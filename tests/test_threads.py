"""Eight threads at once: nothing is shared between two calls. And the threads of our own."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from threading import Barrier, Event, Thread, current_thread
from types import SimpleNamespace

import numpy as np
import pytest
from calls import every_call

import portable_softmax as ps
from portable_softmax import kernels
from portable_softmax.kernels import _threads

pytestmark = pytest.mark.run_on("paths")

THREADS = 8


def at_once(function):
    """Return what each of the threads got, all of which start together."""
    start = Barrier(THREADS)

    def one(i):
        start.wait()
        return [function(i) for _ in range(4)]

    # A new thread has no switches of its own: it gets those of this one.
    contexts = [copy_context() for _ in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda i: contexts[i].run(one, i), range(THREADS)))


def bits(xp, outputs):
    return [xp.numpy(y).tobytes() for y in outputs]


# The other libraries schedule threads of their own.
threaded = pytest.mark.libraries("numpy", "torch")


@threaded
@pytest.mark.slow("each call on each path", "numba", "torch", "torch-portable", "torch-numba")
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


# --------------------------------------------------------------------------- our own pool


@pytest.fixture
def two(monkeypatch):
    """Two threads, whatever this machine has."""
    monkeypatch.setattr(_threads, "limit", lambda: 2)


def names_of(pieces, expected=2, **options):
    """Return the threads that the pieces ran on; the first waits until a second one has come."""
    seen, met = set(), Event()

    def work(_):
        seen.add(current_thread().name)
        if len(seen) == 2 or not met.wait(10 if expected == 2 else 0.2):
            met.set()

    _threads.run(work, pieces, **options)
    return seen


def test_the_pieces_are_shared_out(two):
    assert len(names_of(range(8))) == 2
    assert len(names_of(range(1), expected=1)) == 1
    assert len(names_of(range(8), expected=1, at_most=1)) == 1
    done = []
    _threads.run(done.append, range(100))
    assert sorted(done) == list(range(100))


def test_a_call_within_a_call_stays_in_its_thread(two):
    threads = []

    def outer(_):
        here = current_thread().name
        _threads.run(lambda _: threads.append(current_thread().name == here), range(4))

    _threads.run(outer, range(4))
    assert threads == [True] * 16


def test_a_second_caller_works_alone(two):
    """Whoever already has threads is not given more."""
    busy, release = Event(), Event()

    def hold(_):
        busy.set()
        assert release.wait(10)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(_threads.run, hold, range(2))
        assert busy.wait(10)
        assert names_of(range(4), expected=1) == {current_thread().name}
        release.set()
        first.result(10)
    assert len(names_of(range(8))) == 2


@pytest.mark.parametrize("culprit", [0, 1, 5])
def test_an_exception_stops_the_rest_and_is_raised(two, culprit, monkeypatch):
    """The other thread ends the piece that it has, and begins none."""
    done, stopped = [], Event()

    class Left(_threads.deque):
        def clear(self):
            super().clear()
            stopped.set()

    def work(piece):
        if piece == culprit:
            raise ZeroDivisionError(piece)
        assert piece < culprit or stopped.wait(10)
        done.append(piece)

    monkeypatch.setattr(_threads, "deque", Left)
    with pytest.raises(ZeroDivisionError, match=str(culprit)):
        _threads.run(work, range(100))
    assert stopped.is_set()
    assert set(done) <= set(range(culprit + 2))
    assert len(names_of(range(8))) == 2  # the pool is free again


def test_a_signal_ends_no_wait_for_a_thread_that_is_at_work():
    """What it raises is raised when all have stopped."""
    release = Event()

    class Interrupted(Future):
        def exception(self, timeout=None):
            release.set()
            raise KeyboardInterrupt

    helper = Interrupted()

    def work():
        assert release.wait(10)
        helper.set_result(None)

    thread = Thread(target=work)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        _threads._wait_for([helper])
    assert helper.done()
    thread.join()


def test_workers_share_the_caller_s_errstate(two):
    both = Barrier(2)

    def work(_):
        both.wait(10)
        return np.float32(1) / np.zeros(1000, np.float32)

    with np.errstate(all="ignore"):
        _threads.run(work, range(8))
    with np.errstate(all="raise"), pytest.raises(FloatingPointError):
        _threads.run(work, range(8))


@pytest.mark.parametrize(
    ("text", "expected"), [("3", 3), ("2,4", 2), ("", None), ("0", None), ("many", None)]
)
def test_omp_num_threads(monkeypatch, text, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    monkeypatch.setattr(_threads, "_cores", lambda: 64)
    monkeypatch.setattr(_threads, "_threadpoolctl", lambda: sys.maxsize)
    monkeypatch.setattr(_threads, "_torch", lambda: sys.maxsize)
    assert _threads.limit() == (expected or 64)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000\n"}, sys.maxsize),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, sys.maxsize),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({}, sys.maxsize),
    ],
)
def test_the_control_group(tmp_path, monkeypatch, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(_threads, "_GROUP", tmp_path)
    assert _threads._quota(tmp_path) == expected
    monkeypatch.setattr(_threads.os, "sched_getaffinity", lambda pid: range(64), raising=False)
    assert _threads._cores() == min(expected, 64)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_the_affinity(monkeypatch):
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert _threads._cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_torch_is_asked_where_it_is_loaded(monkeypatch):
    monkeypatch.setattr(_threads, "_cores", lambda: 64)
    monkeypatch.setattr(_threads, "_openmp", lambda: sys.maxsize)
    monkeypatch.setattr(_threads, "_threadpoolctl", lambda: sys.maxsize)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert _threads.limit() == 64
    for half_imported in (None, SimpleNamespace()):
        monkeypatch.setitem(sys.modules, "torch", half_imported)
        assert _threads.limit() == 64
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(get_num_threads=lambda: 3))
    assert _threads.limit() == 3


def test_threadpoolctl_is_asked_where_it_is_loaded(monkeypatch):
    monkeypatch.delitem(sys.modules, "threadpoolctl", raising=False)
    assert _threads._threadpoolctl() == sys.maxsize

    class Controller:
        lib_controllers = (SimpleNamespace(num_threads=3), SimpleNamespace(num_threads=None))

        def select(self, user_api):
            assert user_api == "blas"
            return self

    module = SimpleNamespace(ThreadpoolController=Controller)
    monkeypatch.setitem(sys.modules, "threadpoolctl", module)
    _threads._linear_algebra.cache_clear()
    try:
        assert _threads._threadpoolctl() == 3
    finally:
        _threads._linear_algebra.cache_clear()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_threads_of_its_own():
    """The parent's do not exist there, and its lock may be taken."""
    code = """
import os, sys, threading, warnings
from portable_softmax.kernels import _threads
warnings.simplefilter("ignore")  # newer versions of Python warn of threads before a fork
_threads.limit = lambda: 2
_threads.run(lambda _: None, range(8))
_threads._pool.taken.acquire()
child = os.fork()
seen = set()
met = threading.Event()
def work(_):
    seen.add(threading.get_ident())
    if len(seen) == 2:
        met.set()
    met.wait(1)
if not child:
    _threads.run(work, range(8))
    os._exit(0 if len(seen) == 2 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_call_while_the_interpreter_shuts_down():
    code = """
import atexit, threading
from portable_softmax.kernels import _threads
_threads.limit = lambda: 2
done = []
def last():
    _threads.run(done.append, range(8))
    print(len(done))
atexit.register(last)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True
    )
    assert done.stdout.strip() == "8"
