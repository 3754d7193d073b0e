"""What differs between array libraries, and nothing else: one class per library, one file each.

This room is the only importer of array_api_compat. A library is recognised by the type of its
array and never imported for it: an array can only exist after somebody else has imported the
library that made it. A library that is not in `CLASSES` has the class that an installed package
registers for it, or is taken as one of the standard.

Mathematics that takes `xp` asks `of(xp)`; what it asks all the time has a function below.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import array_api_compat as compat
import numpy as np

from portable_softmax._typing import Namespace
from portable_softmax.libraries import _probe
from portable_softmax.libraries._cubed import Cubed
from portable_softmax.libraries._cupy import CuPy
from portable_softmax.libraries._dask import Dask
from portable_softmax.libraries._dpnp import Dpnp
from portable_softmax.libraries._dtensor import NAME as _SHARDED
from portable_softmax.libraries._dtensor import DTensors
from portable_softmax.libraries._jax import Jax
from portable_softmax.libraries._library import Dtype, Library, dtype_name
from portable_softmax.libraries._mlx import Mlx
from portable_softmax.libraries._ndonnx import Ndonnx
from portable_softmax.libraries._numpy import NumPy
from portable_softmax.libraries._strict import Strict
from portable_softmax.libraries._torch import Torch, traced_as_constant

__all__ = [
    "BY_TYPE",
    "CLASSES",
    "TENSORS",
    "Dtype",
    "Library",
    "cast",
    "constant",
    "device",
    "dtype_name",
    "is_installed",
    "library_of",
    "namespace",
    "of",
    "scalar",
    "traced_as_constant",
]

# By the name of the package that defines the namespace: a new library is a file and a row here.
# Classes that installed packages register join them when an array of their library comes.
CLASSES: dict[str, type[Library]] = {
    "numpy": NumPy,
    "torch": Torch,
    "jax": Jax,
    "dask": Dask,
    "cupy": CuPy,
    "array_api_strict": Strict,
    "ndonnx": Ndonnx,
    "mlx": Mlx,
    "cubed": Cubed,
    "dpnp": Dpnp,
}

_NUMPY = NumPy(np, "numpy")
BY_TYPE: dict[type, Library] = {np.ndarray: _NUMPY}
# Apart from others: code of torch.compile is compiled again whenever a class joins them.
TENSORS: dict[type, Library] = {}
# Keyed by the namespace's name: torch.compile cannot compare modules.
_BY_NAMESPACE: dict[str, Library] = {"numpy": _NUMPY}


def of(xp: Namespace) -> Library:
    """Return the library behind a namespace."""
    found = _BY_NAMESPACE.get(xp.__name__)
    if found is None:
        # array_api_compat.torch, array_api_compat.dask.array, jax.numpy, array_api_strict, ...
        parts = xp.__name__.split(".")
        package = parts[1] if parts[0] == "array_api_compat" else parts[0]
        cls = CLASSES.get(package) or _registered(package) or Library
        found = _BY_NAMESPACE[xp.__name__] = cls(xp, package)
    return found


def _registered(package: str) -> type[Library] | None:
    """Return the class that an installed package registers for a library, or None."""
    from importlib.metadata import entry_points  # only a library that is not ours needs it

    found = entry_points(group="portable_softmax.libraries", name=package)
    if not found:
        return None
    if len(found) > 1:
        named = ", ".join(sorted(one.value for one in found))
        raise RuntimeError(f"several packages register {package}: {named}; uninstall all but one")
    cls = next(iter(found)).load()
    if not (isinstance(cls, type) and issubclass(cls, Library)):
        raise TypeError(
            f"the entry point {package} is {cls!r}; expected a subclass of "
            "portable_softmax.libraries.Library"
        )
    CLASSES[package] = cls
    return cls


def is_installed(name: str) -> bool:
    """Return whether a library can be imported, without importing it."""
    package = (_SHARDED if name == "dtensor" else name).partition(".")[0]
    return sys.modules.get(package) is not None or find_spec(package) is not None


def library_of(array: Any) -> Library:
    """Return the library of an array; TypeError for anything else."""
    cls = type(array)
    found = TENSORS.get(cls) or BY_TYPE.get(cls)
    if found is None:
        if name := _tensor_namespace(cls):
            found = _BY_NAMESPACE[name]
            if found.sharded:
                BY_TYPE[cls] = found
            elif found.tracing(array) != "torch.compile":
                _know_tensors(found)
            return found
        if compat.is_numpy_array(array):
            return _NUMPY
        if compat.is_jax_array(array):
            # array_api_compat makes an array to find it, which JAX's transfer guard may forbid.
            found = of(sys.modules["jax"].numpy)
        else:
            found = of(compat.array_namespace(array))
        if found.refused or found.made_of_arrays:
            return found
        if type(found) is Library and _is_refused(found):
            return found
        BY_TYPE[cls] = found
    return found


def _is_refused(library: Library) -> bool:
    """Try a library that nobody has tested, once."""
    if not library.probed:
        library.refused = _probe.of_rows(library.xp)
        library.refused_labels = library.refused or _probe.of_labels(library.xp)
        library.probed = True
    return bool(library.refused)


@traced_as_constant
def _tensor_namespace(cls: type) -> str:
    """Return the name of torch's namespace for a class of its tensors, and "" for any other.

    torch.compile may trace the first call of all: the lookup of a namespace has caches, of which
    it warns, and it takes strings for constants but no objects with methods.
    """
    torch = sys.modules.get("torch")
    if torch is None or not issubclass(cls, torch.Tensor):
        return ""
    xp = import_module("array_api_compat.torch")
    of(xp)
    tensors = sys.modules.get(_SHARDED)
    if tensors is None or not issubclass(cls, tensors.DTensor):
        return xp.__name__
    if _SHARDED not in _BY_NAMESPACE:
        _BY_NAMESPACE[_SHARDED] = DTensors(xp, "dtensor")
    return _SHARDED


def _know_tensors(library: Library) -> None:
    """Recognise tensors from now on, as far as their class is one of torch's own."""
    torch: Any = sys.modules["torch"]
    TENSORS[torch.Tensor] = TENSORS[torch.nn.Parameter] = library


if "torch" in sys.modules:  # else a call that is traced before any other may be traced twice
    _know_tensors(_BY_NAMESPACE[_tensor_namespace(sys.modules["torch"].Tensor)])


def namespace(array: Any, *others: Any) -> Namespace:
    """Return the array API namespace that all arrays belong to.

    Raises
    ------
    TypeError
        If an argument is no array, or the arrays belong to two libraries.
    """
    library = library_of(array)
    for other in map(library_of, others):
        if other is not library:
            raise TypeError(f"arrays of two libraries: {library.name} and {other.name}")
    return library.xp


# --------------------------------------------------------------------------- by namespace


def device(x: Any) -> Any:
    """Return the device that `x` lives on, or None where its library has no use for one."""
    return library_of(x).device(x)


def cast(xp: Namespace, x: Any, dtype: Any) -> Any:
    """Return `x` in `dtype`, itself where it has that already."""
    return of(xp).cast(x, dtype)


def scalar(xp: Namespace, value: float, like: Any) -> Any:
    """Return `value` as a 0-d array with the dtype and device of `like`."""
    return of(xp).scalar(value, like)


def constant(xp: Namespace, x: Any) -> Any:
    """Return `x` with its derivative cut off, in the libraries that differentiate."""
    return of(xp).constant(x)
