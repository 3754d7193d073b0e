"""Arrays: of one library, one device, of known dtypes and shapes that fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np

from portable_softmax import libraries
from portable_softmax._checks._numbers import number, real
from portable_softmax.libraries import Dtype, Library, dtype_name

FLOATING = frozenset({"real", "half"})
REAL = FLOATING | {"integer"}
_COMPLEX = REAL | {"complex"}

# Types whose arithmetic is not an array's: by the module that defines them, since none of these
# libraries is imported to recognise its type.
_REMEDIES = {
    "pandas": "pass its values, x.to_numpy()",
    "polars": "pass its values, x.to_numpy()",
    "xarray": "pass its values, x.data",
    "numpy.ma": "pass x.filled(...) or x.data, with where=~x.mask",
}

# How an array is converted that NumPy does not take as it stands.
_DENSE = {"sparse": "such as x.todense(), which takes the memory of all entries"}


def array(name: str, x: Any, *, complex_too: bool = False) -> tuple[Library, Dtype]:
    """Return the library and the dtype of `x`, a real (or complex) array."""
    cls = type(x)
    library = libraries.TENSORS.get(cls) or libraries.BY_TYPE.get(cls) or _library(name, x)
    dtype = library.dtype(x.dtype)
    if dtype.kind not in (_COMPLEX if complex_too else REAL):
        raise TypeError(dtype_message(name, x.dtype, dtype.kind, complex_too))
    return library, dtype


def companion(name: str, x: Any, of: str, like: Any, library: Library) -> None:
    """Check that `x` is an array of the library and device of `like`."""
    other = _library(name, x)
    if other is not library:
        raise TypeError(
            f"{name} is an array of {other.name} and {of} one of "
            f"{library.name}; both must come from one library: convert {name} first"
        )
    if not library.same_device(x, like):
        raise ValueError(
            f"{name} is on device {_device(x)} and {of} on {_device(like)}; "
            f"move {name} to the device of {of} first"
        )


def _library(name: str, x: Any) -> Library:
    cls = type(x)
    known = libraries.TENSORS.get(cls) or libraries.BY_TYPE.get(cls)
    if known is not None:
        return known
    remedy = ""
    if isinstance(x, np.ndarray):
        if isinstance(x, np.ma.MaskedArray):
            remedy = _REMEDIES["numpy.ma"].replace("x.", f"{name}.")
        elif cls is not np.memmap:
            remedy = f"pass numpy.asarray({name})"
    elif isinstance(x, list | tuple | Real | complex | str | bytes | dict) and not isinstance(
        x, np.generic
    ):
        remedy = f"pass an array, such as numpy.asarray({name})"
    elif x is None:
        remedy = "pass an array"
    else:
        remedy = _foreign(cls).replace("x.", f"{name}.")
    if not remedy:
        try:
            library = libraries.library_of(x)
        except TypeError:
            remedy = "pass an array of a library that follows the array API standard"
        else:
            if library.refused:
                raise TypeError(refusal(name, library, library.refused))
            if library.made_of_arrays:
                _made_of(name, library.made_of(x), library)
            return library
    raise TypeError(
        f"{name} is a {cls.__module__}.{cls.__qualname__}, which is no array: {remedy}".replace(
            "builtins.", ""
        )
    )


def _made_of(name: str, cls: type, library: Library) -> None:
    """Check the class of an array's chunks: NumPy's subclasses are refused there too."""
    if not issubclass(cls, np.ndarray) or cls is np.ndarray:
        return
    remedy = f"pass {name}.map_blocks(numpy.asarray)"
    if issubclass(cls, np.ma.MaskedArray):
        remedy = (
            f"pass {name}.map_blocks(numpy.ma.getdata), with "
            f"where=~{name}.map_blocks(numpy.ma.getmaskarray)"
        )
    raise TypeError(
        f"{name} is an array of {library.name} in chunks of {cls.__module__}.{cls.__qualname__}, "
        f"which is no array: {remedy}"
    )


def refusal(name: str, library: Library, why: str) -> str:
    remedy = _DENSE.get(library.name, f"such as numpy.asarray({name})").replace("x.", f"{name}.")
    return (
        f"{name} is an array of {library.name}, which cannot give the right answer: {why}; "
        f"convert {name} to an array of a library that follows the array API standard, {remedy}"
    )


def _foreign(cls: type) -> str:
    return _REMEDIES.get(cls.__module__.partition(".")[0], "")


def _device(x: Any) -> Any:
    return x.devices() if hasattr(x, "devices") else libraries.device(x)


def dtype_message(name: str, dtype: Any, kind: str, complex_too: bool) -> str:
    expected = "a floating" + (", complex" if complex_too else "") + " or integer dtype"
    remedy = {
        "bool": f"cast {name} to a floating dtype first",
        "complex": f"softmax is defined on real numbers: take the real part or abs of {name}",
    }.get(kind, f"cast {name} to float32 or float64 first")
    return f"{name} has dtype {dtype_name(dtype)}, expected {expected}: {remedy}"


def floating(name: str, x: Any, library: Library) -> None:
    """Check that `x` is real and floating: nothing else is an output of ours, or a gradient."""
    if library.dtype(x.dtype).kind not in FLOATING:
        raise TypeError(
            f"{name} has dtype {dtype_name(x.dtype)}, expected a floating dtype: "
            f"cast {name} to float32 or float64 first"
        )


def with_upstream(name: str, y: Any, dy: Any) -> tuple[Library, Dtype]:
    """Check an output and its upstream gradient; return their library and the output's dtype."""
    library, dtype = array(name, y)
    floating(name, y, library)
    companion("dy", dy, name, y, library)
    floating("dy", dy, library)
    like_shape("dy", dy, name, y)
    return library, dtype


def weights(name: str, x: Any, library: Library) -> None:
    """Check the dtype of the weights of a sum."""
    kind = library.dtype(x.dtype).kind
    if kind not in _COMPLEX:
        raise TypeError(dtype_message(name, x.dtype, kind, True))


def real_weights(name: str, x: Any, library: Library) -> None:
    """Check the dtype of real weights."""
    kind = library.dtype(x.dtype).kind
    if kind not in REAL:
        raise TypeError(dtype_message(name, x.dtype, kind, False))


def like_shape(name: str, x: Any, of: str, like: Any) -> None:
    """Check that `x` has the shape of `like`."""
    if x.shape == like.shape:
        return
    if not same_shape(x.shape, like.shape):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, expected {tuple(like.shape)}, the shape of {of}"
        )
    chunks_correspond(name, x, of, like, range(x.ndim))


def chunks_correspond(name: str, x: Any, of: str, like: Any, axes: Sequence[int]) -> None:
    """Check that no chunks of known lengths lie beside others whose lengths are unknown.

    The axes of `x` are those `axes` of `like`.
    """
    for i, a in enumerate(axes):
        n, m = x.shape[i], like.shape[a]
        if (n != n) != (m != m):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and {of} {tuple(like.shape)}, where nan stands "
                "for chunks of unknown lengths, which may not be those of the other: "
                f"call {name if n != n else of}.compute_chunk_sizes() first"
            )


def like_dtype(name: str, x: Any, of: str, like: Any, remedy: str) -> None:
    """Check that `x` has the dtype of `like`."""
    if x.dtype != like.dtype:
        raise TypeError(
            f"{name} has dtype {dtype_name(x.dtype)}, expected {dtype_name(like.dtype)}, as {of}: "
            f"{remedy}"
        )


def output(
    name: str, out: Any, of: str, x: Any, dtype: Any, library: Library, *inputs: Any
) -> None:
    """Check that an answer of the shape of `x` and of `dtype` can be written to `out`."""
    if not library.writes:
        raise TypeError(
            f"{name} is given, but arrays of {library.name} are not written to: leave it out and "
            "use what is returned"
        )
    companion(name, out, of, x, library)
    like_shape(name, out, of, x)
    if out.dtype != dtype:
        raise TypeError(
            f"{name} has dtype {dtype_name(out.dtype)}, expected {dtype_name(dtype)}, the dtype of "
            "the result: pass an array of that dtype"
        )
    if why := library.unwritable(out, x, *(a for a in inputs if a is not None)):
        raise ValueError(f"{name} cannot be written: {why}, or leave it out")


def state(name: str, value: Any, cls: type[tuple[Any, ...]]) -> Library:
    """Check that `value` is a state of `online`, and return its library."""
    if not isinstance(value, cls):
        raise TypeError(
            f"{name} is a {type(value).__qualname__}, expected a State: pass what online.fold or "
            "online.merge returned, or online.State(max, rest)"
        )
    m, rest = tuple(value)
    library, dtype = array(f"{name}.max", m)
    if dtype.kind != "real":
        raise TypeError(
            f"{name}.max has dtype {dtype_name(m.dtype)}, expected float32 or float64: "
            "pass what online.fold returned"
        )
    companion(f"{name}.rest", rest, f"{name}.max", m, library)
    floating(f"{name}.rest", rest, library)
    like_shape(f"{name}.rest", rest, f"{name}.max", m)
    return library


def upstream(dout: Any, shape: Any) -> None:
    """Check that the upstream gradient of a loss is one number or one for each position."""
    if dout.ndim and not same_shape(dout.shape, shape):
        expected = " or ".join(dict.fromkeys(("()", str(tuple(shape)))))
        raise ValueError(
            f"dout has shape {tuple(dout.shape)}, expected {expected}, the shape of the loss"
        )


def broadcastable(name: str, x: Any, shape: tuple[int, ...], of: str) -> None:
    """Check that `x` broadcasts to `shape` without making it larger."""
    if x.shape == shape:
        return
    ok = x.ndim <= len(shape) and all(
        have in (1, want) or _unknown(have) or _unknown(want)
        for have, want in zip(reversed(x.shape), reversed(shape), strict=False)
    )
    if not ok:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, which does not broadcast to the shape "
            f"{tuple(shape)} of {of}: give it that shape, or 1 where it repeats"
        )


def mask(where: Any, of: str, x: Any, library: Library) -> None:
    """Check the boolean mask `where`."""
    companion("where", where, of, x, library)
    mask_of_shape(where, of, x.shape, library)


def mask_of_shape(where: Any, of: str, shape: tuple[int, ...], library: Library) -> None:
    """Check the dtype and the shape of a mask."""
    if library.dtype(where.dtype).kind != "bool":
        raise TypeError(
            f"where has dtype {dtype_name(where.dtype)}, expected bool: "
            "pass a comparison, such as where != 0"
        )
    broadcastable("where", where, shape, of)


def answer_dtype(dtype: Any, library: Library) -> Any:
    """Return the floating dtype that an answer is asked for in, as the library's arrays have it."""
    try:
        found = library.own_dtype(dtype)
        kind = library.dtype(found).kind
    except (TypeError, ValueError):
        found, kind = dtype, "other"
    if kind not in ("real", "half"):
        raise TypeError(
            f"dtype is {dtype!r}, expected a real floating dtype of {library.name}: pass one such "
            "as its float32, or leave it out"
        )
    return found


def real_answer(dtype: Any, compute_dtype: Any, library: Library) -> None:
    """Check that an answer that is asked for in a dtype is real."""
    if library.dtype(compute_dtype).kind == "complex":
        raise TypeError(
            f"dtype is {dtype_name(dtype)}, but x or b is complex, and so is the result: leave "
            "dtype out and cast the result"
        )


def sink(value: Any, x: Any, axes: tuple[int, ...], library: Library) -> Any:
    """Return the sink of a softmax: a number below inf, or an array of one per row."""
    is_array = type(value) in libraries.TENSORS or type(value) in libraries.BY_TYPE
    if not is_array and not isinstance(value, bool) and isinstance(value, Real):
        one = float(real("sink", value, "[-inf, inf)"))
        if not one < math.inf:
            raise ValueError(f"sink is {one}, expected a number in [-inf, inf), or an array")
        return one
    companion("sink", value, "x", x, library)
    real_weights("sink", value, library)
    kept = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    broadcastable("sink", value, kept, "a sum over the axes of x that keeps them")
    return value


def not_of_shards(operation: str, why: str) -> TypeError:
    """Return the error for a call on a DTensor that no kernel takes."""
    return TypeError(
        f"{operation} takes no DTensor here ({why}): pass x.to_local(), the shard of this rank, or "
        "x.full_tensor()"
    )


def shards(name: str, x: Any, problem: str, remedy: str) -> TypeError:
    """Return the error for a DTensor that does not lie as a call needs it."""
    return TypeError(f"{name} has the placements {tuple(x.placements)}, {problem}: {remedy}")


def alpha(value: Any, x: Any = None, library: Library | None = None) -> Any:
    """Return the alpha of entmax, from 1 to inf; beside `x` an array in [1, 2] is one too."""
    if isinstance(value, Real) or library is None or not hasattr(value, "ndim"):
        return number("alpha", value, low=1.0, infinite=True)
    companion("alpha", value, "x", x, library)
    floating("alpha", value, library)
    if value.ndim > 0:
        raise ValueError(
            f"alpha has shape {tuple(value.shape)}, expected (), one number: call entmax once for "
            "each"
        )
    known = library.reads_values(value) and not library.transform(value)
    if known and not 1.0 <= float(library.constant(value)) <= 2.0:
        raise ValueError(
            f"alpha is an array that holds {float(value)}, expected [1, 2]: pass a Python number "
            "for more"
        )
    return value


def known_length(name: str, x: Any, axis: int) -> None:
    """Check that the length of an axis is known, as it is not in Dask after a boolean filter."""
    n = x.shape[axis]
    if n is None or n != n:
        remedy = (
            "give the argument of the graph that length in its shape, not a name"
            if n is None
            else f"call {name}.compute_chunk_sizes() first"
        )
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, expected a known number of classes along axis "
            f"{axis}: {remedy}"
        )


def layer(hidden: Any, classifier: Any, bias: Any) -> None:
    """Check the shapes of a linear layer."""
    if hidden.ndim == 0:
        raise ValueError("hidden has shape (), expected (..., H): give it an axis")
    h = hidden.shape[-1]
    if classifier.ndim != 2 or not same_shape(classifier.shape[1:], (h,)):
        transposed = classifier.ndim == 2 and same_shape(classifier.shape[:1], (h,))
        remedy = "pass its transpose" if transposed else "one row for each class"
        raise ValueError(
            f"classifier has shape {tuple(classifier.shape)}, expected (C, {h}), since hidden has "
            f"shape {tuple(hidden.shape)}: {remedy}"
        )
    if bias is not None and not same_shape(bias.shape, classifier.shape[:1]):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, expected ({classifier.shape[0]},): one number "
            "for each row of classifier"
        )


def same_shape(have: Any, want: Any) -> bool:
    if have == want:
        return True
    return len(have) == len(want) and all(
        a == b or _unknown(a) or _unknown(b) for a, b in zip(have, want, strict=True)
    )


def _unknown(length: Any) -> bool:
    """Return whether a length is nan, as in Dask, or None, as in a graph of ndonnx."""
    return length is None or length != length
