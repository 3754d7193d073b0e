"""The libraries that the command line can name: how to import one, reach its devices, fill it."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import portable_softmax
from portable_softmax import libraries
from portable_softmax._cli.errors import CommandError, one_line


@dataclass(frozen=True)
class Backend:
    """What the command line must know about one library, and nothing more."""

    module: str
    """Import name of the module whose ``asarray`` makes the library's arrays."""
    devices: Callable[[Any], dict[str, Any]]
    """Given the module: each device that can be reached, the default first, by name."""
    install: str = ""
    """What installs it, if that is not the extra of its name."""
    from_numpy: Callable[[Any, NDArray[Any]], dict[str, Any]] = lambda xp, array: {}
    """What ``asarray`` has to be told to keep the dtype of a NumPy array."""
    to_numpy: Callable[[Any], NDArray[Any]] = np.asarray
    activate: Callable[[Any], object] = lambda device: None
    """Make a device the current one, for a library that computes only there."""
    compile: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function
    """What the library's users wrap around a training step."""
    lazy: bool = False
    """Whether it would only write a graph longer, where a training step needs its numbers."""

    @property
    def library(self) -> str:
        """Name of the importable library itself."""
        return self.module.partition(".")[0]


@dataclass(frozen=True)
class Place:
    """One backend on one of its devices, ready to compute."""

    name: str
    version: str
    device_name: str
    xp: Any
    device: Any

    def __str__(self) -> str:
        return f"{self.name} {self.version}, {self.device_name}"

    def put(self, array: NDArray[Any]) -> Any:
        """Bring a NumPy array to this place."""
        more = BACKENDS[self.name].from_numpy(self.xp, array)
        return self.xp.asarray(array, device=self.device, **more)

    def get(self, array: Any) -> NDArray[Any]:
        """Bring an array of this place to NumPy."""
        return BACKENDS[self.name].to_numpy(array)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a pure function of arrays as the library's users would run it."""
        return BACKENDS[self.name].compile(function)

    def dtypes(self) -> list[str]:
        """Return the floating dtypes in which softmax really computes here."""
        return [name for name in ("float16", "bfloat16", "float32", "float64") if self._has(name)]

    def _has(self, name: str) -> bool:
        try:
            dtype = getattr(self.xp, name, None) or _numpy_dtype(name)
            with warnings.catch_warnings(action="ignore"):  # JAX without x64 warns, gives float32
                x = self.xp.asarray([0.0, 0.0], dtype=dtype, device=self.device)
                y = portable_softmax.softmax(x)
            return bool(y.dtype == dtype and self.xp.all(y + y == 1))
        except Exception:  # each library refuses a dtype or a device's lack of it in its own way
            return False


def reach(name: str) -> dict[str, Any]:
    """Import a backend and return its devices by name, the default first.

    Raises
    ------
    CommandError
        If the backend is unknown, not installed, broken, or reaches no device.
    """
    backend = BACKENDS.get(name)
    if backend is None:
        raise CommandError(f"unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
    if not is_installed(name):
        install = backend.install or f'pip install "portable_softmax[{name}]"'
        raise CommandError(f"{backend.library} is not installed: {install}")
    try:
        devices = backend.devices(importlib.import_module(backend.module))
    except Exception as error:  # a broken installation may raise anything
        raise CommandError(f"{backend.library} can't be used here: {one_line(error)}") from error
    if not devices:
        raise CommandError(f"{backend.library} can't be used here: it reaches no device")
    return devices


def open_place(name: str, device: str | None = None) -> Place:
    """Return a backend ready to compute on ``device``, or on its default device for None.

    Raises
    ------
    CommandError
        If `reach` raises it, or if there is no such device.
    """
    devices = reach(name)
    device_name = _match(device, list(devices))
    if device_name is None:
        raise CommandError(f"{name} has no device {device!r} here; it has {', '.join(devices)}")
    backend = BACKENDS[name]
    backend.activate(devices[device_name])
    return Place(
        name=name,
        version=_version(backend),
        device_name=device_name,
        xp=libraries.namespace(sys.modules[backend.module].asarray(0.0)),
        device=devices[device_name],
    )


def is_installed(name: str) -> bool:
    """Say whether the library of a backend could be imported, without importing it."""
    return libraries.is_installed(BACKENDS[name].library)


def _version(backend: Backend) -> str:
    # The package mlx is a folder of modules without one, which has no version; jax.numpy has none.
    modules = sys.modules[backend.module], sys.modules[backend.library]
    return next(str(m.__version__) for m in modules if hasattr(m, "__version__"))


def _match(wanted: str | None, names: list[str]) -> str | None:
    """Return the first name that is ``wanted`` or a numbered device of that kind."""
    if wanted is None:
        return names[0]
    return next((n for n in names if n == wanted or n.startswith(f"{wanted}:")), None)


def _numpy_dtype(name: str) -> Any:
    """Return the dtype for libraries that compute in NumPy's but don't name them all."""
    source = np if hasattr(np, name) else importlib.import_module("ml_dtypes")
    return np.dtype(getattr(source, name))


def _torch_devices(torch: Any) -> dict[str, Any]:
    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    names += ["mps"] if torch.backends.mps.is_available() else []
    return {name: torch.device(name) for name in names}


def _jax_devices(_: Any) -> dict[str, Any]:
    jax = importlib.import_module("jax")
    devices = jax.devices()
    with suppress(RuntimeError):  # JAX_PLATFORMS may leave the CPU out
        devices += jax.devices("cpu")
    return {f"{d.platform}:{d.id}": d for d in devices}


def _cupy_devices(cupy: Any) -> dict[str, Any]:
    count = cupy.cuda.runtime.getDeviceCount()
    return {f"cuda:{i}": cupy.cuda.Device(i) for i in range(count)}


def _mlx_devices(mx: Any) -> dict[str, Any]:
    kinds = [mx.cpu, *([mx.gpu] if mx.is_available(mx.gpu) else [])]
    return {str(kind).rpartition(".")[2]: kind for kind in kinds}


def _dpnp_devices(_: Any) -> dict[str, Any]:
    dpctl = importlib.import_module("dpctl")
    devices = {d.filter_string: d for d in dpctl.get_devices()}
    if not devices:  # no loader of OpenCL knows what pip installs
        raise OSError("no SYCL device; OCL_ICD_FILENAMES may name intel-opencl-rt's libintelocl.so")
    return devices


def _strict_devices(strict: Any) -> dict[str, Any]:
    # A device is written array_api_strict.Device('device1'): the name is between the quotes.
    return {str(d).split("'")[1]: d for d in strict.__array_namespace_info__().devices()}


def _strict_to_numpy(array: Any) -> NDArray[Any]:
    strict = sys.modules["array_api_strict"]
    return np.asarray(array.to_device(strict.Device("CPU_DEVICE")))


BACKENDS: dict[str, Backend] = {
    "numpy": Backend(
        module="numpy",
        install="pip install numpy",
        devices=lambda _: {"cpu": "cpu"},
    ),
    "torch": Backend(
        module="torch",
        devices=_torch_devices,
        to_numpy=lambda array: np.asarray(array.detach().cpu()),
    ),
    "cupy": Backend(
        module="cupy",
        install='pip install "portable_softmax[cuda13]" (or cuda12)',
        devices=_cupy_devices,
        to_numpy=lambda array: np.asarray(array.get()),
        activate=lambda device: device.use(),
    ),
    "jax": Backend(
        module="jax.numpy",
        devices=_jax_devices,
        compile=lambda function: sys.modules["jax"].jit(function),
    ),
    "strict": Backend(
        module="array_api_strict",
        devices=_strict_devices,
        to_numpy=_strict_to_numpy,
    ),
    "dask": Backend(
        module="dask.array",
        devices=lambda _: {"cpu": "cpu"},
        lazy=True,
    ),
    "ndonnx": Backend(
        module="ndonnx",
        devices=lambda _: {"onnx": None},
        lazy=True,
    ),
    "mlx": Backend(
        module="mlx.core",
        devices=_mlx_devices,
        # It makes float32 of float64 unless it is told otherwise.
        from_numpy=lambda xp, array: {"dtype": getattr(xp, array.dtype.name)},
        activate=lambda device: sys.modules["mlx.core"].set_default_device(device),
    ),
    "cubed": Backend(
        module="cubed.array_api",
        devices=lambda _: {"cpu": None},
        lazy=True,
    ),
    "dpnp": Backend(
        module="dpnp",
        devices=_dpnp_devices,
        to_numpy=lambda array: array.asnumpy(),
    ),
}

TRAINABLE = tuple(name for name, backend in BACKENDS.items() if not backend.lazy)
