"""The clocks: events on a GPU, the host's clock elsewhere.

A call to a GPU returns before its work is done. There the device's own events mark begin and end,
and before each call a buffer larger than the L2 cache is written, so that no call finds its input
there. The device is busy with that write while the host prepares the call, and it is repeated
until it takes longer than the host: the time to launch a kernel is hidden.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter, process_time
from typing import Any, Protocol

from bench import places
from bench.places import Place

# More than any L2 cache, for a device that does not report its own.
_FLUSHED = 256 * 2**20
# A call that waits for the device takes the host as long as it takes the device.
_MOST_FLUSHES = 16


class Clock(Protocol):
    """Times a call without arguments."""

    name: str

    def seconds(self, call: Callable[[], Any], repeats: int) -> float:
        """Return the mean of `repeats` calls."""


@dataclass(frozen=True)
class HostClock:
    """The host's time until a result is complete."""

    finish: Callable[[Any], None]
    now: Callable[[], float] = perf_counter
    name: str = "perf_counter"

    def seconds(self, call: Callable[[], Any], repeats: int) -> float:
        started = self.now()
        for _ in range(repeats):
            self.finish(call())
        return (self.now() - started) / repeats


@dataclass(frozen=True)
class EventClock:
    """The device's time between two events of its stream."""

    event: Callable[[], Any]
    milliseconds: Callable[[Any, Any], float]
    flush: Callable[[], object]
    now: Callable[[], float] = perf_counter
    name: str = "CUDA events, L2 flushed"

    def seconds(self, call: Callable[[], Any], repeats: int) -> float:
        flushes = self._flushes(call)
        pairs = []
        for _ in range(repeats):
            for _ in range(flushes):
                self.flush()
            pairs.append(self._marked(call))
        pairs[-1][1].synchronize()  # a stream works in order: after the last event all are complete
        return sum(self.milliseconds(*pair) for pair in pairs) / repeats / 1e3

    def _marked(self, call: Callable[[], Any]) -> tuple[Any, Any]:
        start, end = self.event(), self.event()
        start.record()
        call()
        end.record()
        return start, end

    def _flushes(self, call: Callable[[], Any]) -> int:
        """Return how often to flush, so that the device is busy while the host prepares a call."""
        start, end = self._marked(self.flush)
        end.synchronize()
        busy = max(self.milliseconds(start, end) / 1e3, 1e-6)
        began = self.now()
        call()
        return min(_MOST_FLUSHES, 1 + int(2 * (self.now() - began) / busy))


def clock(place: Place, *, cpu_time: bool = False) -> Clock:
    """Return the clock of a place: events where its library has them, the host's elsewhere.

    That of the process counts what its threads work, and not what they wait for others.
    """
    if places.is_gpu(place) and place.name in _EVENTS:
        return _EVENTS[place.name](sys.modules[place.name], place.device)
    finish = partial(places.finish, place)
    return HostClock(finish, process_time, "process_time") if cpu_time else HostClock(finish)


def _torch_events(torch: Any, device: Any) -> EventClock:
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    buffer = torch.empty(2 * cache or _FLUSHED, dtype=torch.int8, device=device)
    return EventClock(
        event=lambda: torch.cuda.Event(enable_timing=True),
        milliseconds=lambda start, end: start.elapsed_time(end),
        flush=buffer.zero_,
    )


def _cupy_events(cupy: Any, device: Any) -> EventClock:
    cache = device.attributes.get("L2CacheSize", 0)
    buffer = cupy.empty(2 * cache or _FLUSHED, dtype=cupy.int8)
    return EventClock(
        event=cupy.cuda.Event,
        milliseconds=cupy.cuda.get_elapsed_time,
        flush=lambda: buffer.fill(0),
    )


_EVENTS: dict[str, Callable[[Any, Any], EventClock]] = {
    "torch": _torch_events,
    "cupy": _cupy_events,
}

_QUERY = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw",
)  # fmt: skip


def state(place: Place, run: Callable[..., Any] = subprocess.run) -> dict[str, str] | None:
    """Return the GPU's clocks and temperature now; None off a GPU or without nvidia-smi."""
    if not places.is_gpu(place) or shutil.which("nvidia-smi") is None:
        return None
    index = place.device_name.partition(":")[2] or "0"
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(_QUERY)}",
        "--format=csv,noheader",
        "-i",
        index,
    ]
    try:
        said = run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in said.splitlines()[0].split(",")]
    return dict(zip(_QUERY, values, strict=True))
