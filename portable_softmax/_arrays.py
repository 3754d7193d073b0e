"""What differs between array libraries, and nothing else: the only importer of array_api_compat.

A library is recognised by the type of its array and never imported for it: an array of a library
can only exist after somebody else has imported that library.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import array_api_compat as compat
import numpy as np

from portable_softmax._typing import Namespace

__all__ = [
    "cast",
    "complex_dtype",
    "compute_dtype",
    "constant",
    "default_float",
    "default_int",
    "device",
    "differentiates",
    "dtype_name",
    "gathers",
    "is_chunked",
    "is_known",
    "kind",
    "library",
    "namespace",
    "quiet",
    "reads_values",
    "reduce_chunks",
    "same_device",
    "scalar",
    "scalar_if_0d",
    "sums_in_blocks",
    "take_along_axis",
]

# NumPy 2 is itself a namespace of the standard. Taking it as it is saves importing
# array_api_compat.numpy (0.06 s) and a call for each array.
_NAMESPACES: dict[type, Namespace] = {np.ndarray: np}
# Keyed by the namespace's name: torch.compile cannot compare modules.
_LIBRARIES: dict[str, str] = {"numpy": "numpy"}


def namespace(*arrays: Any) -> Namespace:
    """Return the array API namespace that all `arrays` belong to.

    Raises
    ------
    TypeError
        If an argument is no array, or the arrays belong to two libraries.
    """
    found = None
    for array in arrays:
        cls = type(array)
        xp = _NAMESPACES[cls] if _is_registered(cls) else _look_up(array)
        if found is not None and xp is not found:
            raise TypeError(f"arrays of two libraries: {library(found)} and {library(xp)}")
        found = xp
    if found is None:
        raise TypeError("no array was given")
    return found


def _is_registered(cls: type) -> bool:
    """Return whether the namespace of a type of array is known; that of torch's always is."""
    if cls in _NAMESPACES:
        return True
    torch = sys.modules.get("torch")
    if torch is None or not issubclass(cls, torch.Tensor):
        return False
    _NAMESPACES[cls] = import_module("array_api_compat.torch")
    return True


def _look_up(array: Any) -> Namespace:
    if compat.is_numpy_array(array):
        return np
    xp = _NAMESPACES[type(array)] = compat.array_namespace(array)
    return xp


def library(xp: Namespace) -> str:
    """Return the short name of the library behind a namespace, such as ``"torch"``."""
    name = _LIBRARIES.get(xp.__name__)
    if name is None:
        parts = xp.__name__.split(".")
        # array_api_compat.torch, array_api_compat.dask.array, jax.numpy, array_api_strict, ...
        name = parts[1] if parts[0] == "array_api_compat" else parts[0]
        name = {"array_api_strict": "strict"}.get(name, name)
        _LIBRARIES[xp.__name__] = name
    return name


def device(x: Any) -> Any:
    """Return the device that `x` lives on, or None where its library has no use for one."""
    name = library(namespace(x))
    if name in ("numpy", "dask", "jax"):
        return None
    # compat.device would make torch.compile warn of the caches that it traces through.
    return x.device if name == "torch" else compat.device(x)


def same_device(xp: Namespace, x: Any, other: Any) -> bool:
    """Return whether two arrays of one library may be computed with together."""
    name = library(xp)
    if name in ("numpy", "dask"):
        return True
    if name == "jax":
        # JAX moves uncommitted arrays as it likes, and a tracer has no device yet.
        if not all(reads_values(xp, a) and a.committed for a in (x, other)):
            return True
        return bool(x.devices() == other.devices())
    return bool(device(x) == device(other))


# --------------------------------------------------------------------------- dtypes


def default_float(xp: Namespace, x: Any) -> Any:
    """Return the floating dtype that the library gives to a Python float today."""
    if xp is np:
        return np.dtype(np.float64)
    return xp.empty(0, device=device(x)).dtype  # a version before 2023.12 has no inspection


def default_int(xp: Namespace, x: Any) -> Any:
    """Return the integer dtype that the library gives to a Python int today."""
    if xp is np:
        return np.dtype(np.int64)
    return xp.arange(0, device=device(x)).dtype


def dtype_name(dtype: Any) -> str:
    """Return a dtype's bare name: ``float32`` for ``torch.float32`` and ``dtype('>f4')`` alike."""
    return str(getattr(dtype, "name", None) or dtype).rpartition(".")[2]


# One table a library: comparing the dtypes of two libraries may warn.
_KINDS: dict[str, dict[Any, str]] = {}


def kind(xp: Namespace, dtype: Any) -> str:
    """Sort a dtype into real, half, integer, complex, bool or other."""
    kinds = _KINDS.get(xp.__name__)
    if kinds is None:
        kinds = _KINDS[xp.__name__] = {}
    found = kinds.get(dtype)
    if found is None:
        found = kinds[dtype] = _sort(xp, dtype)
    return found


# torch.compile takes their answers for constants: a trace that reads or fills a table would be
# guarded by what is in it, and be compiled again after the next entry. (This is
# torch.compiler.assume_constant_result, which would have to import torch.)
for _function in (_is_registered, library, kind):
    _function.__dict__["_dynamo_marked_constant"] = True


def _sort(xp: Namespace, dtype: Any) -> str:
    # ml_dtypes registers bfloat16 with NumPy as a void type, so names come before kinds.
    name = dtype_name(dtype)
    if name in ("float16", "bfloat16"):
        return "half"
    if name.startswith(("float8_", "float6_", "float4_")):
        return "other"
    try:
        for answer, question in (
            ("bool", "bool"),
            ("integer", "integral"),
            ("real", "real floating"),
            ("complex", "complex floating"),
        ):
            if xp.isdtype(dtype, question):
                return answer
    except (TypeError, ValueError):  # a dtype that the library itself cannot place
        pass
    return "other"


def compute_dtype(xp: Namespace, x: Any) -> tuple[Any, Any]:
    """Return the dtype to compute in and the dtype to answer in.

    Half types are computed in float32 and rounded once; integers become the library's default
    floating dtype before anything is subtracted; any other byte order becomes the machine's.
    """
    sort = kind(xp, x.dtype)
    if sort == "integer":
        answer = default_float(xp, x)
        return answer, answer
    answer = x.dtype if xp is not np or x.dtype.isnative else x.dtype.newbyteorder("=")
    if sort == "half":
        return (np.dtype(np.float32) if xp is np else xp.float32), answer
    return answer, answer


def complex_dtype(xp: Namespace, dtype: Any) -> Any:
    """Return the complex dtype that holds a real or complex `dtype`."""
    return xp.result_type(dtype, xp.complex64)


# --------------------------------------------------------------------------- building blocks


def cast(xp: Namespace, x: Any, dtype: Any) -> Any:
    """Return `x` in `dtype`, itself where it has that already."""
    if x.dtype == dtype:
        return x
    # NumPy 2.0's own astype takes no NumPy scalar, which is what its reductions return.
    return x.astype(dtype) if xp is np else xp.astype(x, dtype)


def scalar_if_0d(xp: Namespace, y: Any) -> Any:
    """Return `y`, as a scalar where it has no axis and NumPy's own functions answer with one."""
    return y[()] if xp is np and y.ndim == 0 else y


def scalar(xp: Namespace, value: float, like: Any) -> Any:
    """Return `value` as a 0-d array with the dtype and device of `like`.

    Versions of the standard before 2024.12 take no Python scalars in functions such as `where`.
    """
    if library(xp) == "torch":
        # torch.compile has symbols for lengths that change, of which `asarray` makes constants.
        return xp.full((), value, dtype=like.dtype, device=device(like))
    return xp.asarray(value, dtype=like.dtype, device=device(like))


def constant(xp: Namespace, x: Any) -> Any:
    """Return `x` with its derivative cut off, in the libraries that differentiate."""
    if xp is np:
        return x
    name = library(xp)
    if name == "torch":
        return x.detach()
    if name == "jax":
        return sys.modules["jax"].lax.stop_gradient(x)
    return x


def differentiates(xp: Namespace) -> bool:
    """Return whether the library may differentiate through what is computed."""
    return library(xp) in ("torch", "jax")


def gathers(xp: Namespace) -> bool:
    """Return whether picking one entry a row costs less than a masked sum over the row.

    XLA fuses the masked sum into the pass that runs anyway (and keeps a sharded class axis where
    it is), Dask has no gather, and array-api-strict has one in its newest versions only.
    """
    return library(xp) in ("numpy", "cupy", "torch")


def take_along_axis(xp: Namespace, x: Any, index: Any, axis: int) -> Any:
    """Return the entries of `x` at `index` along `axis`; other axes have the same lengths."""
    if library(xp) == "torch":
        # The standard's take_along_dim broadcasts: torch.compile compiles it for one batch size.
        return x.gather(axis, index)
    return xp.take_along_axis(x, index, axis=axis)


def sums_in_blocks(xp: Namespace, x: Any, axis: int) -> bool:
    """Return whether the library's own sum along `axis` keeps its digits, however long the axis.

    NumPy sums pairwise only where the axis is the innermost in memory, and adds row after row
    elsewhere; an array of array-api-strict is NumPy's, but does not show its strides. torch sums in
    blocks along every axis. Others do along the last axis.
    """
    name = library(xp)
    if name == "numpy":
        stride = abs(x.strides[axis])
        return stride > 0 and all(
            stride < abs(other)
            for a, (other, n) in enumerate(zip(x.strides, x.shape, strict=True))
            if a != axis and n > 1
        )
    if name == "torch":
        # Code generated for CPUs adds row after row.
        return axis == x.ndim - 1 or not sys.modules["torch"].compiler.is_compiling()
    return name != "strict" and axis == x.ndim - 1


def is_known(xp: Namespace, number: Any) -> bool:
    """Return whether a length or number is known, rather than a symbol of a compiler."""
    if library(xp) == "torch":
        torch = sys.modules["torch"]
        if torch.compiler.is_compiling():
            # Under torch.compile a symbol has the type of a number.
            shapes = torch.fx.experimental.symbolic_shapes
            return hasattr(shapes, "has_static_value") and shapes.has_static_value(number)
    return isinstance(number, int | float)


def is_chunked(xp: Namespace) -> bool:
    """Return whether arrays are split into chunks, so that slicing one adds to a task graph."""
    return library(xp) == "dask"


def reduce_chunks(x: Any, axes: tuple[int, ...], function: Callable[..., Any]) -> Any:
    """Fold the chunks of `x` over `axes` in a tree, the axes kept with length 1.

    ``function(chunk, axis=..., keepdims=...)`` folds one chunk, and then what chunks gave.
    """
    reduction = sys.modules["dask.array"].reduction
    return reduction(x, chunk=function, aggregate=function, axis=axes, keepdims=True, dtype=x.dtype)


# --------------------------------------------------------------------------- reading values


def reads_values(xp: Namespace, x: Any) -> bool:
    """Return whether the values of `x` can be looked at now: not traced, not lazy, not abstract."""
    if xp is np:
        return True
    name = library(xp)
    if name == "torch":
        return _torch_reads_values(x)
    if name == "jax":
        return not isinstance(x, sys.modules["jax"].core.Tracer)
    return not compat.is_lazy_array(x)


def _torch_reads_values(x: Any) -> bool:
    torch = sys.modules["torch"]
    if torch.compiler.is_compiling():
        return False
    # Inside a functional transform a tensor may be batched (vmap) and has no single value.
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if x.device.type == "meta":
        return False
    return type(x).__name__ not in ("FakeTensor", "FunctionalTensor")


def quiet(xp: Namespace) -> AbstractContextManager[Any]:
    """Return a context in which documented infinities and nans raise no warnings.

    NumPy, and the libraries that compute with it, warn for each of them otherwise; the table of
    semantics says what they mean. The user's own ``numpy.seterr`` is back afterwards.
    """
    if xp is np or library(xp) == "strict":
        return np.errstate(all="ignore")
    return nullcontext()
