"""Backends to measure on: how data gets there and back, and when a result is really there."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from portable_softmax._cli.backends import BACKENDS, Place, open_place
from portable_softmax._cli.errors import CommandError

CHOICES = (*BACKENDS, "torch-cuda")

# Elements of an array that no kernel finds too small to be loaded for.
LARGE = 1 << 17


def open_backend(name: str) -> Place:
    """Return a backend ready to compute, JAX with its float64; CommandError says why not."""
    return _open("torch", "cuda") if name == "torch-cuda" else _open(name)


def _open(name: str, device: str | None = None) -> Place:
    place = open_place(name, device)
    if name == "jax":
        sys.modules["jax"].config.update("jax_enable_x64", True)
    return place


def is_gpu(place: Place) -> bool:
    return place.device_name.startswith(("cuda", "gpu"))


def others(place: Place) -> tuple[list[Place], list[str]]:
    """Return the other libraries on the same kind of device, and those that can't be used."""
    wanted = {"cupy": None, "torch": "cuda", "jax": "gpu"} if is_gpu(place) else _ON_CPU
    found, missing = [], []
    for name, device in wanted.items():
        if name != place.name:
            try:
                found.append(_open(name, device))
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
        return place.put(x.astype(np.float32)).to(place.xp.bfloat16)
    return place.put(x)


def get(place: Place, y: Any) -> np.ndarray:
    if place.name == "torch" and y.dtype == place.xp.bfloat16:
        y = y.float()
    return place.get(y)


def finish(place: Place, result: Any) -> None:
    """Wait until a result, or each of a tuple, has been computed."""
    if place.name == "jax":
        sys.modules["jax"].block_until_ready(result)
    elif place.name == "dask":
        sys.modules["dask"].compute(result)
    elif place.device_name.startswith("cuda"):
        library = sys.modules[place.name]
        (library.cuda if place.name == "torch" else library.cuda.Device()).synchronize()


def forget_compiled() -> None:
    """Drop what torch has compiled: it gives up on a function after eight shapes."""
    if torch := sys.modules.get("torch"):
        torch.compiler.reset()
