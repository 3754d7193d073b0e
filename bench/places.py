"""A library on one of its devices: how data gets there and back, and when a result is complete."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import portable_softmax
from bench.errors import CommandError, one_line


@dataclass(frozen=True)
class Place:
    """One library on one device."""

    name: str
    version: str
    device_name: str
    xp: Any
    device: Any
    """None where the library places its arrays itself."""

    def __str__(self) -> str:
        return f"{self.name} {self.version}, {self.device_name}"

    def dtypes(self) -> list[str]:
        """Return the floating dtypes in which softmax computes here."""
        return [name for name in ("float16", "bfloat16", "float32", "float64") if self._has(name)]

    def _has(self, name: str) -> bool:
        try:
            with warnings.catch_warnings(action="ignore"):
                y = portable_softmax.softmax(put(self, np.zeros(2, np_dtype(name))))
                halves = get(self, y)
            return str(y.dtype).rpartition(".")[2] == name and bool(np.all(halves == 0.5))
        except Exception:  # the exception for a missing dtype differs from library to library
            return False


def _host(_: Any, kind: str | None) -> tuple[str, Any]:
    return "cpu", None


def _torch_device(torch: Any, kind: str | None) -> tuple[str, Any]:
    if kind != "cuda":
        return "cpu", torch.device("cpu")
    if not torch.cuda.is_available():
        raise CommandError("torch has no device 'cuda' here")
    return "cuda:0", torch.device("cuda:0")


def _jax_device(_: Any, kind: str | None) -> tuple[str, Any]:
    jax = importlib.import_module("jax")
    # Else it takes three quarters of a GPU's memory, where other libraries are measured as well.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax.config.update("jax_enable_x64", True)
    device = jax.devices(kind)[0]
    return f"{device.platform}:{device.id}", device


def _cupy_device(cupy: Any, kind: str | None) -> tuple[str, Any]:
    cupy.cuda.runtime.getDeviceCount()  # raises where there is no driver
    return "cuda:0", cupy.cuda.Device(0)


def _strict_device(strict: Any, kind: str | None) -> tuple[str, Any]:
    return "CPU_DEVICE", strict.Device("CPU_DEVICE")


class Library(NamedTuple):
    """What differs between the libraries."""

    module: str
    """The module whose `asarray` makes arrays."""
    extra: str = ""
    """What installs it, of this package's extras."""
    device: Callable[[Any, str | None], tuple[str, Any]] = _host
    """Given the module and a kind of device, or None for the default: name and device."""


LIBRARIES = {
    "numpy": Library("numpy"),
    "torch": Library("torch", "torch", _torch_device),
    "cupy": Library("cupy", "cuda13", _cupy_device),
    "jax": Library("jax.numpy", "jax", _jax_device),
    "strict": Library("array_api_strict", "strict", _strict_device),
    "dask": Library("dask.array", "dask"),
}
CHOICES = (*LIBRARIES, "torch-cuda")


def open_backend(name: str) -> Place:
    """Return a backend ready to compute, JAX with float64 enabled; CommandError says why not."""
    return _open("torch", "cuda") if name == "torch-cuda" else _open(name)


def _open(name: str, kind: str | None = None) -> Place:
    if name not in LIBRARIES:
        raise CommandError(f"unknown backend {name!r}; choose from {', '.join(CHOICES)}")
    library = LIBRARIES[name]
    top = library.module.partition(".")[0]
    if not is_installed(name):
        raise CommandError(
            f"{top} is not installed: pip install 'portable_softmax[{library.extra}]'"
        )
    try:
        xp = importlib.import_module(library.module)
        device_name, device = library.device(xp, kind)
    except CommandError:
        raise
    except Exception as error:  # a broken installation may raise anything
        raise CommandError(f"{top} can't be used here: {one_line(error)}") from error
    return Place(name, sys.modules[top].__version__, device_name, xp, device)


def is_installed(name: str) -> bool:
    top = LIBRARIES[name].module.partition(".")[0]
    return importlib.util.find_spec(top) is not None


def is_gpu(place: Place) -> bool:
    return place.device_name.startswith(("cuda", "gpu"))


def others(place: Place) -> tuple[list[Place], list[str]]:
    """Return the other libraries on the same kind of device, and those that can't be used."""
    wanted = {"cupy": None, "torch": "cuda", "jax": "gpu"} if is_gpu(place) else _ON_CPU
    found, missing = [], []
    for name, kind in wanted.items():
        if name != place.name:
            try:
                found.append(_open(name, kind))
            except CommandError:
                missing.append(name)
    return found, missing


_ON_CPU = {"numpy": None, "torch": "cpu", "jax": "cpu"}


def np_dtype(name: str) -> np.dtype:
    """Return a dtype of NumPy by name; bfloat16 is that of ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def put(place: Place, x: np.ndarray) -> Any:
    if place.name == "torch" and x.dtype.name == "bfloat16":
        return put(place, x.astype(np.float32)).to(place.xp.bfloat16)
    if place.device is None or place.name == "cupy":
        return place.xp.asarray(x)
    return place.xp.asarray(x, device=place.device)


def get(place: Place, y: Any) -> np.ndarray:
    if place.name == "torch":
        y = y.detach().cpu()
        return np.asarray(y.float() if y.dtype == place.xp.bfloat16 else y)
    return np.asarray(y.get() if place.name == "cupy" else y)


def copy(place: Place, x: Any) -> Any:
    """Copy an array to fresh memory, as its library does."""
    match place.name:
        case "torch":
            return x.clone()
        case "dask":  # its own copy shares the memory
            return x.map_blocks(np.copy)
        case "jax" | "strict":
            return place.xp.asarray(x, copy=True)
    return x.copy()


def finish(place: Place, result: Any) -> None:
    """Wait until a result, or each of a tuple, has been computed."""
    if place.name == "jax":
        _wait_for(result)
    elif place.name == "dask":
        sys.modules["dask"].compute(result)
    elif place.device_name.startswith("cuda"):
        library = sys.modules[place.name]
        (library.cuda if place.name == "torch" else library.cuda.Device()).synchronize()


def _wait_for(result: Any) -> None:
    """Wait for arrays of JAX; its `block_until_ready` takes as long as some calls to find them."""
    if isinstance(result, tuple | list):
        for part in result:
            _wait_for(part)
    else:
        result.block_until_ready()


def forget_compiled() -> None:
    """Drop what torch has compiled: it gives up on a function after eight shapes."""
    if torch := sys.modules.get("torch"):
        torch.compiler.reset()
