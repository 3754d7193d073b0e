"""The clocks of `bench`, with stand-ins for the events of a GPU."""

from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from bench import gpu, places


def test_events_enclose_the_call_and_the_flush_stays_outside():
    """The flush, of 10 ms here, is repeated until it takes as long as the host does twice."""

    def event(log):
        """An event that is recorded when it is told to, as a stream would."""
        one = SimpleNamespace(synchronize=lambda: log.append("synchronize"))
        one.record = lambda: log.append("record") or vars(one).update(at=len(log))
        return one

    for host, flushes in ((0.004, 1), (0.026, 6), (9.0, 16)):
        log, times = [], iter([1.0, 1.0 + host])
        clock = gpu.EventClock(
            event=partial(event, log),
            milliseconds=lambda start, end: 5.0 * (end.at - start.at),
            flush=partial(log.append, "flush"),
            now=partial(next, times),
        )
        seconds = clock.seconds(partial(log.append, "call"), 2)
        before = ["record", "flush", "record", "synchronize", "call"]
        each = [*["flush"] * flushes, "record", "call", "record"]
        assert log == [*before, *each, *each, "synchronize"]
        assert seconds == pytest.approx(0.01)  # a mean, of milliseconds


def test_the_host_waits_for_each_result():
    finished, ticks = [], iter([1.0, 7.0])
    clock = gpu.HostClock(finished.append, lambda: next(ticks))
    assert clock.seconds(lambda: "result", 3) == 2.0
    assert finished == ["result"] * 3


def test_events_are_taken_where_the_library_has_them(monkeypatch):
    made = gpu.EventClock(None, None, None)
    monkeypatch.setitem(gpu._EVENTS, "numpy", lambda module, device: made)
    place = places.open_backend("numpy")
    assert gpu.clock(place).name == "perf_counter"
    on_gpu = places.Place("numpy", place.version, "cuda:0", place.xp, "cuda:0")
    assert gpu.clock(on_gpu) is made


class _Cuda:
    """What the clocks use of torch and of CuPy."""

    int8, Event, get_elapsed_time = "int8", None, None
    attributes = {"L2CacheSize": 50}  # noqa: RUF012 - a device of CuPy

    def __init__(self):
        self.buffers, self.cuda = [], self
        self.get_device_properties = lambda device: SimpleNamespace(L2_cache_size=50)
        self.empty = lambda size, **options: self.buffers.append(size) or self
        self.zero_ = lambda: self.buffers.append("written")
        self.fill = lambda value: self.buffers.append("written")


def test_what_is_flushed_exceeds_the_cache():
    for library in ("torch", "cupy"):
        cuda = _Cuda()
        gpu._EVENTS[library](cuda, cuda).flush()
        assert cuda.buffers == [100, "written"]


def test_the_state_of_a_gpu_is_read(monkeypatch):
    place = places.open_backend("numpy")
    on_gpu = places.Place("numpy", place.version, "cuda:1", place.xp, "cuda:1")
    said = "NVIDIA X, 570.1, 1980 MHz, 2619 MHz, 41, 70.5 W\n"
    run = Mock(return_value=SimpleNamespace(stdout=said))
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    state = gpu.state(on_gpu, run)
    assert (state["clocks.sm"], state["temperature.gpu"]) == ("1980 MHz", "41")
    assert run.call_args.args[0][-2:] == ["-i", "1"]
    assert gpu.state(place, run) is None
    assert gpu.state(on_gpu, Mock(side_effect=OSError)) is None
