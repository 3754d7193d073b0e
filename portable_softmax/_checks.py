"""Every validation and every error message.

A message names the argument, its value, what was expected, and the remedy. All checks run before
any computing; those that look at the values of labels only where values can be looked at.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np

from portable_softmax import libraries
from portable_softmax._typing import Namespace
from portable_softmax.libraries import Dtype, Library, dtype_name, traced_as_constant

REDUCTIONS = ("mean", "sum", "none")

_FLOATING = frozenset({"real", "half"})
_REAL = _FLOATING | {"integer"}
_COMPLEX = _REAL | {"complex"}

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


# --------------------------------------------------------------------------- arrays


def array(name: str, x: Any, *, complex_too: bool = False) -> tuple[Library, Dtype]:
    """Return the library and the dtype of `x`, a real (or complex) array."""
    cls = type(x)
    library = libraries.TENSORS.get(cls) or libraries.BY_TYPE.get(cls) or _library(name, x)
    dtype = library.dtype(x.dtype)
    if dtype.kind not in (_COMPLEX if complex_too else _REAL):
        raise TypeError(_dtype_message(name, x.dtype, dtype.kind, complex_too))
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
                raise TypeError(_refusal(name, library, library.refused))
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


def _refusal(name: str, library: Library, why: str) -> str:
    remedy = _DENSE.get(library.name, f"such as numpy.asarray({name})").replace("x.", f"{name}.")
    return (
        f"{name} is an array of {library.name}, which cannot give the right answer: {why}; "
        f"convert {name} to an array of a library that follows the array API standard, {remedy}"
    )


@traced_as_constant
def _foreign(cls: type) -> str:
    return _REMEDIES.get(cls.__module__.partition(".")[0], "")


def _device(x: Any) -> Any:
    return x.devices() if hasattr(x, "devices") else libraries.device(x)


def _dtype_message(name: str, dtype: Any, kind: str, complex_too: bool) -> str:
    expected = "a floating" + (", complex" if complex_too else "") + " or integer dtype"
    remedy = {
        "bool": f"cast {name} to a floating dtype first",
        "complex": f"softmax is defined on real numbers: take the real part or abs of {name}",
    }.get(kind, f"cast {name} to float32 or float64 first")
    return f"{name} has dtype {dtype_name(dtype)}, expected {expected}: {remedy}"


def floating(name: str, x: Any, library: Library) -> None:
    """Check that `x` is real and floating: nothing else is an output of ours, or a gradient."""
    if library.dtype(x.dtype).kind not in _FLOATING:
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
        raise TypeError(_dtype_message(name, x.dtype, kind, True))


def like_shape(name: str, x: Any, of: str, like: Any) -> None:
    """Check that `x` has the shape of `like`."""
    if x.shape == like.shape:
        return
    if not _same_shape(x.shape, like.shape):
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
    if dout.ndim and not _same_shape(dout.shape, shape):
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
        number = float(real("sink", value, "[-inf, inf)"))
        if not number < math.inf:
            raise ValueError(f"sink is {number}, expected a number in [-inf, inf), or an array")
        return number
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


# --------------------------------------------------------------------------- axes and numbers

_AXIS = "an int, or where several are allowed a tuple of ints or None"


def axes(axis: Any, ndim: int) -> tuple[int, ...]:
    """Return `axis`, an int, a tuple of ints or None for all, as non-negative ints."""
    if axis is None:
        return tuple(range(ndim))
    if type(axis) is int and -ndim <= axis < ndim:
        return (axis % ndim,)
    given = axis if isinstance(axis, tuple) else (axis,)
    if ndim == 0 and given:
        raise _axis_error(_int("axis", given[0], _AXIS), ndim, "pass axis=None")
    found = tuple(one_axis(a, ndim) for a in given)
    if len(set(found)) != len(found):
        raise ValueError(f"axis is {axis}, which names an axis twice: name each axis once")
    return found


def one_axis(axis: Any, ndim: int) -> int:
    """Return the int `axis` as a non-negative one."""
    index = _int("axis", axis, _AXIS)
    if not -ndim <= index < ndim:
        raise _axis_error(index, ndim)
    return index % ndim


def _int(name: str, value: Any, expected: str) -> int:
    """Return `value` as an int, which a bool is not."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, expected {expected}") from None


def _axis_error(axis: Any, ndim: int, remedy: str = "") -> Exception:
    # NumPy's AxisError is both a ValueError and an IndexError, whichever a caller catches.
    if not remedy:
        remedy = f"pass an axis from {-ndim} to {ndim - 1}" if ndim else "give the array an axis"
    return np.exceptions.AxisError(f"axis is {axis}, but the array has {ndim} dimensions: {remedy}")


def number(
    name: str,
    value: Any,
    *,
    low: float,
    high: float = math.inf,
    open_low: bool = False,
    infinite: bool = False,
) -> float:
    """Return `value` as a float inside the range, which holds no nan, and infinity if asked."""
    open_high = high == math.inf and not infinite
    inside = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name} is {value!r}, expected a Python number in {inside}: an array cannot be taken, "
            "scale the array instead"
        )
    answer = float(real(name, value, inside))
    above = answer > low if open_low else answer >= low
    if not (above and answer <= high and not (open_high and answer == math.inf)):
        raise ValueError(f"{name} is {answer}, expected a number in {inside}")
    return answer


def real(name: str, value: Any, inside: str = "(-inf, inf)") -> Any:
    """Return a number as a float; a NumPy scalar keeps its digits."""
    if isinstance(value, np.floating):
        return value
    try:
        return float(value)
    except OverflowError:  # a large int or Fraction, whose digits would fill the screen
        raise ValueError(
            f"{name} is beyond the range of a float, expected a number in {inside}"
        ) from None


def temperature(value: Any) -> float:
    """Return the temperature, a positive finite number."""
    return number("temperature", value, low=0.0, open_low=True)


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


def reduction(value: Any) -> str:
    """Return the reduction, one of `REDUCTIONS`."""
    if value not in REDUCTIONS:
        raise ValueError(
            f"reduction is {value!r}, expected one of {', '.join(map(repr, REDUCTIONS))}"
        )
    return str(value)


def ignore_index(value: Any, indices: bool) -> int | None:
    """Return `ignore_index` as an int."""
    if value is None:
        return None
    if not indices:
        raise ValueError(
            f"ignore_index is {value}, but labels are a distribution, which no index can leave "
            "out: set those rows of labels to 0, or pass class indices"
        )
    return _int("ignore_index", value, "an int or None: pass int(ignore_index)")


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


# --------------------------------------------------------------------------- linear layers


def layer(hidden: Any, classifier: Any, bias: Any) -> None:
    """Check the shapes of a linear layer."""
    if hidden.ndim == 0:
        raise ValueError("hidden has shape (), expected (..., H): give it an axis")
    h = hidden.shape[-1]
    if classifier.ndim != 2 or not _same_shape(classifier.shape[1:], (h,)):
        transposed = classifier.ndim == 2 and _same_shape(classifier.shape[:1], (h,))
        remedy = "pass its transpose" if transposed else "one row for each class"
        raise ValueError(
            f"classifier has shape {tuple(classifier.shape)}, expected (C, {h}), since hidden has "
            f"shape {tuple(hidden.shape)}: {remedy}"
        )
    if bias is not None and not _same_shape(bias.shape, classifier.shape[:1]):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, expected ({classifier.shape[0]},): one number "
            "for each row of classifier"
        )


def tile(value: Any) -> int:
    """Return the largest number of bytes of a tile."""
    found = _int("tile", value, "a number of bytes, an int, or None: pass int(tile)")
    if found < 1:
        raise ValueError(f"tile is {found}, expected a positive number of bytes, or None")
    return found


# --------------------------------------------------------------------------- labels


def labels_are_indices(logits: Any, labels: Any, axis: int, library: Library) -> bool:
    """Return whether `labels` are class indices, or else a distribution over the classes."""
    if library.refused_labels:
        raise TypeError(_refusal("logits", library, library.refused_labels))
    kind = library.dtype(labels.dtype).kind
    shape = logits.shape
    positions = shape[:axis] + shape[axis + 1 :]
    if kind == "integer" and labels.shape == positions:
        return True
    if kind in ("bool", "complex", "other"):
        raise TypeError(
            f"labels have dtype {dtype_name(labels.dtype)}, expected integers for class indices, "
            "or integers or floats for a distribution: cast them first"
        )
    if _same_shape(labels.shape, shape):
        return False
    if _same_shape(labels.shape, positions):
        if kind != "integer":
            raise TypeError(
                f"labels have dtype {dtype_name(labels.dtype)} and the shape "
                f"{tuple(labels.shape)} of class indices, which must be integers: cast them to an "
                f"integer dtype, or pass a distribution of shape {tuple(shape)}"
            )
        return True
    swapped = kind != "integer" and library.dtype(logits.dtype).kind == "integer"
    raise ValueError(_label_shape_message(logits, labels, axis, tuple(positions), swapped))


def chunks_of_labels(labels: Any, logits: Any, axis: int, indices: bool) -> None:
    """Check that chunks of labels and of logits are both of known lengths, or both not."""
    axes = [a for a in range(logits.ndim) if not (indices and a == axis)]
    chunks_correspond("labels", labels, "logits", logits, axes)


def _same_shape(have: Any, want: Any) -> bool:
    if have == want:
        return True
    return len(have) == len(want) and all(
        a == b or _unknown(a) or _unknown(b) for a, b in zip(have, want, strict=True)
    )


def _unknown(length: Any) -> bool:
    """Return whether a length is nan, as in Dask, or None, as in a graph of ndonnx."""
    return length is None or length != length


def _label_shape_message(
    logits: Any, labels: Any, axis: int, positions: tuple[int, ...], swapped: bool
) -> str:
    have, shape = tuple(labels.shape), tuple(logits.shape)
    message = (
        f"labels have shape {have}, expected {positions} for class indices or {shape} for a "
        f"distribution, since logits have shape {shape} and axis is {axis}"
    )
    if swapped and len(have) > len(shape):
        return f"{message}: pass the logits first, then the labels"
    for other in range(len(shape)):
        if other != axis and _same_shape(have, (*shape[:other], *shape[other + 1 :])):
            return f"{message}: pass axis={other} if that is the class axis"
    kept = (*shape[:axis], 1, *shape[axis + 1 :])
    if _same_shape(have, kept):
        return f"{message}: squeeze axis {axis} of labels"
    return f"{message}: reshape labels"


def label_values(
    xp: Namespace,
    labels: Any,
    valid: Any,
    axis: int,
    n: int,
    where: Any,
    start: tuple[int, ...] = (),
) -> None:
    """Raise for the first label without a class; `valid` says which have one.

    `start` is where a shard of the labels begins.
    """
    if bool(xp.all(valid)):
        return
    valid = xp.squeeze(valid, axis=axis)
    flat = xp.reshape(libraries.cast(xp, ~valid, xp.int8), (-1,))
    position = np.unravel_index(int(xp.argmax(flat)), tuple(valid.shape))
    starts = start or (0,) * len(position)
    at = ", ".join(str(int(i) + first) for i, first in zip(position, starts, strict=True))
    value = labels[tuple(int(i) for i in position)]
    # The integer of a torch tensor goes through 64 bits with a sign; not every library has `item`.
    value = int(value.item() if hasattr(value, "item") else value)
    label = f"labels[{at}] is {value}" if at else f"the label is {value}"
    if 0 <= value < n and where is not None:
        raise IndexError(
            f"{label}, a class that where masks out there: unmask it, or name it as ignore_index"
        )
    raise IndexError(
        f"{label}, outside [0, {n}) for the {n} classes of axis {axis} of logits: correct it, "
        "name it as ignore_index to leave such positions out, or pass check_labels=False to get "
        "nan there"
    )


def binary_labels(labels: Any, logits: Any, library: Library) -> None:
    """Check labels that are yes or no, or between them, one for each logit."""
    companion("labels", labels, "logits", logits, library)
    kind = library.dtype(labels.dtype).kind
    if kind not in _REAL | {"bool"}:
        raise TypeError(
            f"labels have dtype {dtype_name(labels.dtype)}, expected booleans, integers or floats "
            "from 0 to 1: cast them first"
        )
    if labels.shape == logits.shape:
        return
    if not _same_shape(labels.shape, logits.shape):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, expected {tuple(logits.shape)}, one label "
            "for each logit: reshape labels, or make them one-hot"
        )
    chunks_correspond("labels", labels, "logits", logits, range(logits.ndim))


def real_weights(name: str, x: Any, library: Library) -> None:
    """Check the dtype of real weights."""
    kind = library.dtype(x.dtype).kind
    if kind not in _REAL:
        raise TypeError(_dtype_message(name, x.dtype, kind, False))


def sample_weight(weight: Any, logits: Any, axis: int, library: Library) -> None:
    """Check the array of one weight per position, of the library and device of the logits."""
    real_weights("sample_weight", weight, library)
    positions = (*logits.shape[:axis], *logits.shape[axis + 1 :])
    if not _same_shape(weight.shape, positions):
        raise ValueError(
            f"sample_weight has shape {tuple(weight.shape)}, expected {positions}: one weight for "
            f"each position, in the shape of logits without axis {axis}"
        )


def class_weight(weight: Any, logits: Any, axis: int, library: Library) -> None:
    """Check the array of one weight per class, of the library and device of the logits."""
    real_weights("weight", weight, library)
    n = logits.shape[axis]
    if tuple(weight.shape) != (n,):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected ({n},): one weight for each class "
            f"of axis {axis} of logits"
        )
