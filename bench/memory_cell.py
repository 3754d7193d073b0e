"""The peak of memory of one call, in a process of its own: ``python -m bench.memory_cell JSON``.

The call is made once before, so that what is compiled, imported and kept for later calls is there
already; then what it freed is given back to the system and the mark of the peak is lowered. So
buffers that a kernel keeps from call to call do not count, unless they are made in each.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from bench import places, providers, speed
from bench.errors import one_line
from bench.places import Place

_REPEATS = 3


class Gauge(NamedTuple):
    """Measures the peak between two points."""

    start: Callable[[], int]
    """Give back what is free, forget the peak so far, and return the bytes in use."""
    peak: Callable[[], int]
    """Return the largest number of bytes in use since."""


def peak_of(
    call: Callable[[], Any],
    finish: Callable[[Any], None],
    gauge: Gauge,
    repeats: int = _REPEATS,
) -> int:
    """Return the bytes at the peak of a call beyond those before, the largest of a few calls."""
    finish(call())
    peaks = []
    for _ in range(repeats):
        gc.collect()
        before = gauge.start()
        result = call()
        finish(result)
        peaks.append(gauge.peak() - before)
        del result
    return max(0, *peaks)


def gauge(place: Place) -> Gauge:
    """Return the gauge of a place: the library's allocator on a GPU, the process elsewhere."""
    if places.is_gpu(place) and place.name in _ON_GPU:
        return _ON_GPU[place.name](sys.modules[place.name], place.device)
    return Gauge(_start_resident, most_resident)


def _start_resident() -> int:
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # lowers VmHWM to VmRSS
    return _status("VmRSS")


def most_resident() -> int:
    """Return the most memory that this process has had since it started or since `Gauge.start`.

    `ru_maxrss` would begin with that of the process that started it.
    """
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def _torch(torch: Any, device: Any) -> Gauge:
    def start() -> int:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))

    return Gauge(start, lambda: int(torch.cuda.max_memory_allocated(device)))


def _cupy(cupy: Any, device: Any) -> Gauge:
    """Read the size of the pool, which only grows until it is freed."""
    pool = cupy.get_default_memory_pool()

    def start() -> int:
        pool.free_all_blocks()
        return int(pool.total_bytes())

    return Gauge(start, lambda: int(pool.total_bytes()))


_ON_GPU: dict[str, Callable[[Any, Any], Gauge]] = {"torch": _torch, "cupy": _cupy}


def measured(asked: dict[str, Any]) -> dict[str, Any]:
    """Return the peak and the path of one cell."""
    place = places.open_backend(asked["backend"])
    all_providers, _ = providers.all_providers(place, "own")
    (provider,) = [provider for provider in all_providers if provider.name == asked["provider"]]
    operation = asked["operation"]
    problem = speed.Problem(tuple(asked["shape"]), asked["dtype"])
    x = problem.at(place, "x")
    second = problem.at(place, problem.second(operation))
    call = provider.offer(-1, "mean")[operation]
    with provider.context():
        peak = peak_of(lambda: call(x, second), lambda r: places.finish(place, r), gauge(place))
    path = providers.path_taken(provider, operation, x, second) if provider.ours else ""
    return {"peak_bytes": peak, "path": path}


def main(argv: list[str], measured: Callable[[Any], dict[str, Any]] = measured) -> int:
    warnings.simplefilter("ignore")
    try:
        found = measured(json.loads(argv[0]))
    except Exception as error:  # the exception for a missing dtype differs between libraries
        found = {"problem": one_line(error)}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
