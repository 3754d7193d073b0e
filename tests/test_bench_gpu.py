"""The clocks of `bench`, with stand-ins for the events of a GPU."""

import pytest

from bench import gpu, places


class _Event:
    """An event that is recorded when it is told to, as a stream would."""

    def __init__(self, log):
        self.log, self.at = log, None

    def record(self):
        self.log.append("record")
        self.at = len(self.log)

    def synchronize(self):
        self.log.append("synchronize")


@pytest.mark.parametrize(("host", "flushes"), [(0.004, 1), (0.026, 6), (9.0, 16)])
def test_events_enclose_the_call_and_the_flush_stays_outside(host, flushes):
    """The flush, of 10 ms here, is repeated until it takes as long as the host does twice."""
    log, times = [], iter([1.0, 1.0 + host])
    clock = gpu.EventClock(
        event=lambda: _Event(log),
        milliseconds=lambda start, end: 5.0 * (end.at - start.at),
        flush=lambda: log.append("flush"),
        now=lambda: next(times),
    )
    seconds = clock.seconds(lambda: log.append("call"), 2)
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

    def __init__(self):
        self.buffers = []
        self.cuda = self
        self.int8 = "int8"

    def get_device_properties(self, device):
        return type("Properties", (), {"L2_cache_size": 50})

    attributes = {"L2CacheSize": 50}  # noqa: RUF012 - a device of CuPy

    def empty(self, size, **options):
        self.buffers.append(size)
        return self

    def zero_(self):
        self.buffers.append("written")

    def fill(self, value):
        self.buffers.append("written")

    Event = get_elapsed_time = None


@pytest.mark.parametrize("library", ["torch", "cupy"])
def test_what_is_flushed_exceeds_the_cache(library):
    cuda = _Cuda()
    clock = gpu._EVENTS[library](cuda, cuda)
    clock.flush()
    assert cuda.buffers == [100, "written"]


def test_the_state_of_a_gpu_is_read(monkeypatch):
    place = places.open_backend("numpy")
    on_gpu = places.Place("numpy", place.version, "cuda:1", place.xp, "cuda:1")
    asked = []

    def run(command, **options):
        asked.append(command)
        return type("Done", (), {"stdout": "NVIDIA X, 570.1, 1980 MHz, 2619 MHz, 41, 70.5 W\n"})

    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    state = gpu.state(on_gpu, run)
    assert state["clocks.sm"] == "1980 MHz"
    assert state["temperature.gpu"] == "41"
    assert asked[0][-2:] == ["-i", "1"]
    assert gpu.state(place, run) is None

    def broken(command, **options):
        raise OSError

    assert gpu.state(on_gpu, broken) is None
