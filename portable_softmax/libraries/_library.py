"""What any library of the array API standard does; a subclass states what one does differently."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import array_api_compat as compat
import numpy as np

from portable_softmax._typing import Namespace


class Dtype(NamedTuple):
    """What a call needs to know of an array's dtype."""

    name: str
    """The bare name, such as ``float32``; a byte order other than the machine's is told apart."""
    kind: str
    """One of real, half, integer, complex, bool and other."""
    computed: tuple[Any, Any] | None
    """What is computed in and what is answered in; None for an integer, see `compute_dtype`."""


REPEATED = "its entries may share memory; pass an array without repeated or interleaved axes"


def is_one_to_one(shape: Any, strides: Any, size: int) -> bool:
    """Return whether no two entries of an array share memory, given strides and an entry's size.

    Arrays whose axes interleave are not among these, though some could be.
    """
    last = size - 1
    if 0 in shape:
        return True
    for stride, n in sorted((abs(s), n) for s, n in zip(strides, shape, strict=True) if n != 1):
        if stride <= last:
            return False
        last += stride * (n - 1)
    return True


# A running sum of n equal terms is off by about n/16 units in the last place (measured on NumPy,
# axis 0, float32); up to this length that stays under one unit.
RUNNING_SUM = 16


def numpy_dtype(dtype: Any) -> Any:
    """Return what a user names as a dtype of NumPy, in the machine's byte order."""
    return np.dtype(dtype).newbyteorder("=")


def dtype_name(dtype: Any) -> str:
    """Return a dtype's bare name: ``float32`` for ``torch.float32`` and ``dtype('>f4')`` alike."""
    return str(getattr(dtype, "name", None) or dtype).rpartition(".")[2]


def selected(xp: Namespace, first: Any, x: Any, y: Any) -> Any:
    """Return `x` where it is the first of both or nan, `y` elsewhere."""
    return xp.where(first | (x != x), x, y)


class Library:
    """A library of the standard, of which nothing else is known.

    An instance stands for one namespace. Nothing here imports a library: an array can only exist
    after somebody else has imported the library that made it.
    """

    differentiates = False
    """Whether the library may differentiate through what is computed."""
    gathers = False
    """Whether picking one entry per row costs less than a masked sum over the row."""
    sharded = False
    """Whether an array is one shard a rank, so that a call needs a kernel that knows the ranks."""
    lazy = False
    """Whether nothing is computed, nor a value to be read, before it is asked for."""
    chunked = False
    """Whether arrays are split into chunks, so that slicing one adds to a task graph."""
    made_of_arrays = False
    """Whether arrays are made of arrays of another class, which has to be looked at as well."""
    stores_chunks = False
    """Whether what a task gives for a chunk is stored as one array."""
    writes = False
    """Whether an answer can be written to an array that is given."""
    looks_at_subnormals = True
    """Whether what subnormal numbers cost a sum may be looked for: not where that waits for a
    device, nor where they are taken for 0 anyway."""
    numpy_dtypes = False
    """Whether dtypes are NumPy's: whatever NumPy takes for one is one."""
    tile = 1 << 26
    """The bytes of a tile of a linear layer's logits: two of them stay well below what a process
    holds anyway, and a product of one is long enough to run at full speed."""
    only_device = ""
    """The kind of the one device that a library has, of which its arrays know nothing."""
    team: Any = None
    """What calls a function in so many of the library's own threads; None where it has none, or
    nobody knows how: `kernels._threads.on_team`."""
    kernels: tuple[Any, ...] = ()
    """Rows of `portable_softmax.kernels.Kernel`, of a class that a package of its own registers."""

    probed = False
    """Whether a library of which no class is known has been tried."""
    refused = ""
    """Why the library cannot give the right answers."""
    refused_labels = ""
    """Why it cannot give those of losses of class indices."""

    def __init__(self, xp: Namespace, name: str) -> None:
        self.xp = xp
        self.name = name
        self._dtypes: dict[Any, Dtype] = {}  # one table each: comparing across libraries may warn

    def __repr__(self) -> str:
        return f"<{self.name}>"

    # ----------------------------------------------------------------------- writing

    def unwritable(self, out: Any, *inputs: Any) -> str:
        """Return why the answer of a call with these inputs cannot go to `out`; empty if it can."""
        return "" if is_one_to_one(out.shape, out.strides, out.itemsize) else REPEATED

    def write(self, out: Any, answer: Any) -> None:
        """Copy an answer to `out`."""
        out[...] = answer

    def may_share_memory(self, x: Any, y: Any) -> bool:
        """Return whether two arrays may have memory in common."""
        return True

    def same_entries(self, x: Any, y: Any) -> bool:
        """Return whether two arrays are the same entries of the same memory."""
        return False

    # ----------------------------------------------------------------------- memory order

    small = 0
    """Arrays of up to so many elements are copied with their reduced axes last, which costs less
    than to reduce another."""

    def strides(self, x: Any) -> Any:
        """Return how far apart entries lie along each axis; None for an array in C order.

        Empty where a library's arrays have no order that can be told.
        """
        return ()

    def copy(self, x: Any) -> Any:
        """Return a copy in C order."""
        return self.xp.asarray(x, copy=True)

    # ----------------------------------------------------------------------- devices

    def device(self, x: Any) -> Any:
        """Return the device that `x` lives on, or None where the library has no use for one."""
        return None if self.only_device else compat.device(x)

    def device_type(self, x: Any) -> str:
        """Return the kind of device that `x` lives on, such as ``"cpu"`` or ``"cuda"``."""
        return self.only_device or str(self.device(x))

    def same_device(self, x: Any, other: Any) -> bool:
        """Return whether two arrays may be computed with together."""
        return bool(self.only_device or compat.device(x) == compat.device(other))

    def adopt(self, labels: Any, logits: Any, axis: int) -> Any:
        """Return `labels`, as an array of the library where it takes those of another."""
        return labels

    def shape(self, x: Any) -> Any:
        """Return the shape of `x`, as the library's functions take one."""
        return x.shape

    def made_of(self, x: Any) -> type:
        """Return the class of the arrays that `x` is made of, its own if it is of none."""
        return type(x)

    def size(self, x: Any) -> int:
        """Return the number of elements."""
        return math.prod(x.shape)

    # ----------------------------------------------------------------------- dtypes

    def dtype(self, dtype: Any) -> Dtype:
        """Return what is known of a dtype."""
        found = self._dtypes.get(dtype)
        if found is None:
            found = self._dtypes[dtype] = self._describe(dtype)
        return found

    def _describe(self, dtype: Any) -> Dtype:
        name, kind = self._name(dtype), self._kind(dtype)
        if kind == "integer":
            return Dtype(name, kind, None)  # the default may change from call to call
        native = self._native(dtype)
        return Dtype(
            name, kind, (self._native(self.xp.float32) if kind == "half" else native, native)
        )

    def _name(self, dtype: Any) -> str:
        return dtype_name(dtype)

    def _kind(self, dtype: Any) -> str:
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
                if self.xp.isdtype(dtype, question):
                    return answer
        except (TypeError, ValueError):  # a dtype that the library itself cannot place
            pass
        return "other"

    def _native(self, dtype: Any) -> Any:
        return numpy_dtype(dtype) if self.numpy_dtypes else dtype

    def own_dtype(self, dtype: Any) -> Any:
        """Return a dtype that a user names as arrays have it; TypeError for no dtype."""
        if self.numpy_dtypes:
            return numpy_dtype(dtype)
        if isinstance(dtype, str):
            raise TypeError(dtype)
        return dtype

    def loss_dtype(self, x: Any) -> Any:
        """Return the dtype of losses of `x`, a half type, where the library has a rule for it."""
        return None

    def compute_dtype(self, x: Any) -> tuple[Any, Any]:
        """Return the dtype to compute in and the dtype to answer in.

        Half types are computed in float32 and rounded once; integers become the library's default
        floating dtype before anything is subtracted; any other byte order becomes the machine's.
        """
        computed = self.dtype(x.dtype).computed
        if computed is None:
            default = self.default_float(x)
            return self.dtype(default).computed or (default, default)
        return computed

    def complex_dtype(self, dtype: Any) -> Any:
        """Return the complex dtype that holds a real or complex `dtype`."""
        return self.xp.result_type(dtype, self.xp.complex64)

    def wider_dtype(self, x: Any) -> Any:
        """Return a floating dtype with twice the digits of that of `x`, or its own without one."""
        wider = x.dtype == self.xp.float32 and self.has_float64(x)
        return self.xp.float64 if wider else x.dtype

    def has_float64(self, x: Any) -> bool:
        """Return whether the device of `x` has float64."""
        inspection = getattr(self.xp, "__array_namespace_info__", None)
        if inspection is None:  # a version of the standard before 2023.12
            return True
        found = inspection().dtypes(device=self.device(x), kind="real floating")
        return "float64" in found

    def default_float(self, x: Any) -> Any:
        """Return the floating dtype that the library gives to a Python float today."""
        # A version of the standard before 2023.12 has no inspection.
        return self.xp.empty(0, device=self.device(x)).dtype

    def default_int(self, x: Any) -> Any:
        """Return the integer dtype that the library gives to a Python int today."""
        return self.xp.arange(0, device=self.device(x)).dtype

    # ----------------------------------------------------------------------- building blocks

    def alike(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return both as new arrays lie in memory, themselves where they do so already."""
        x, y = (self.xp.reshape(self.xp.reshape(a, (-1,)), a.shape) for a in (x, y))
        return x, y

    def cast(self, x: Any, dtype: Any) -> Any:
        """Return `x` in `dtype`, itself where it has that already."""
        return x if x.dtype == dtype else self.xp.astype(x, dtype)

    def scalar_if_0d(self, y: Any) -> Any:
        """Return `y`, as a scalar where it is 0-d and the library's own functions return one."""
        return y

    def constant(self, x: Any) -> Any:
        """Return `x` with its derivative cut off."""
        return x

    def maximum(self, x: Any, y: Any) -> Any:
        """Return the greater of two entries, nan where one is."""
        # The standard has had it and `minimum` since 2023.12.
        known = getattr(self.xp, "maximum", None)
        return selected(self.xp, x >= y, x, y) if known is None else known(x, y)

    def minimum(self, x: Any, y: Any) -> Any:
        """Return the smaller of two entries, nan where one is."""
        known = getattr(self.xp, "minimum", None)
        return selected(self.xp, x <= y, x, y) if known is None else known(x, y)

    def scalar(self, value: float, like: Any) -> Any:
        """Return `value` as a 0-d array with the dtype and device of `like`.

        Versions of the standard before 2024.12 take no Python scalars in functions such as `where`.
        """
        return self.xp.asarray(value, dtype=like.dtype, device=self.device(like))

    def concat(self, arrays: Sequence[Any], axis: int) -> Any:
        """Return arrays one after another along an axis; others may have an unknown length."""
        return self.xp.concat(arrays, axis=axis)

    def squeeze(self, x: Any, axes: tuple[int, ...]) -> Any:
        """Return `x` without these axes of length 1."""
        return self.xp.squeeze(x, axis=axes)

    def take_along_axis(self, x: Any, index: Any, axis: int) -> Any:
        """Return the entries of `x` at `index` along `axis`; other axes have the same lengths."""
        return self.xp.take_along_axis(x, index, axis=axis)

    def put_along_axis(self, x: Any, index: Any, values: Any, axis: int) -> Any:
        """Return `x`, which may be written to, with one entry along `axis` replaced."""
        shape = [1] * x.ndim
        shape[axis] = x.shape[axis]
        numbers = self.xp.arange(x.shape[axis], dtype=index.dtype, device=self.device(x))
        return self.xp.where(self.xp.reshape(numbers, tuple(shape)) == index, values, x)

    def barrier(self, *arrays: Any) -> tuple[Any, ...]:
        """Return these arrays; a compiler fuses nothing across."""
        return arrays

    def product(self, a: Any, b: Any, out: Any = None) -> Any:
        """Return a @ b, in the memory of `out` if the library writes there."""
        return self.xp.matmul(a, b)

    def add_product(self, so_far: Any, a: Any, b: Any) -> Any:
        """Return so_far + a @ b, in the memory of `so_far` if the library writes there."""
        return so_far + self.xp.matmul(a, b)

    def longest_sum(self, x: Any, axis: int) -> float:
        """Return how long an axis may be for the library's own sum to keep its digits."""
        return math.inf if axis == x.ndim - 1 else RUNNING_SUM

    def is_known(self, number: Any) -> bool:
        """Return whether a length or number is known, and no symbol that a compiler has for any."""
        return isinstance(number, int | float)

    def reduce_chunks(self, x: Any, axes: tuple[int, ...], function: Callable[..., Any]) -> Any:
        """Fold the chunks of `x` over `axes` in a tree, the axes kept with length 1.

        ``function(chunk, axis=..., keepdims=...)`` folds one chunk, and then what chunks gave.
        """
        return function(x, axis=axes, keepdims=True)

    def of_whole_rows(
        self, x: Any, axes: tuple[int, ...], function: Callable[..., Any], number: Any
    ) -> Any:
        """Return what `function` makes of `x` and a number or 0-d array.

        It is of the shape and dtype of `x`, and needs whole rows.
        """
        return function(x, number)

    def entrywise(self, function: Callable[..., Any], x: Any, *others: Any) -> Any:
        """Return ``function(x, *others)``, arithmetic of entries that gives the dtype of `x`."""
        return function(x, *others)

    def iterate(self, step: Callable[[Any], tuple[Any, Any]], x: Any, most: int) -> Any:
        """Return x after steps, each of which tells whether it changed anything; `most` at most.

        Without a derivative. Where values cannot be read, `most` steps are taken.
        """
        for _ in range(most):
            x, moves = step(x)
            if self.reads_values(moves) and not bool(moves):
                break
        return x

    # ----------------------------------------------------------------------- reading values

    def reads_values(self, x: Any) -> bool:
        """Return whether the values of `x` can be looked at now: not traced, lazy or abstract."""
        return not (self.lazy or compat.is_lazy_array(x))

    def looks_again(self, x: Any) -> bool:
        """Return whether a rare case that costs another pass is looked for in `x`."""
        return self.looks_at_subnormals and self.reads_values(x)

    def tracing(self, *arrays: Any) -> str:
        """Return what follows or replaces the values of these arrays; empty for ordinary ones.

        A kernel takes ordinary arrays, and of the others those that it declares.
        """
        return "" if all(self.reads_values(x) for x in arrays) else "lazy"

    def follows(self, *values: Any) -> bool:
        """Return whether a derivative with respect to one of these values may be asked for."""
        return False

    def transform(self, *arrays: Any) -> str:
        """Return which transform follows these arrays, traced or not; empty if none does."""
        return ""

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` as one compiled call, in a library that compiles a single function."""
        return function

    def quietly(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call ``function(*args)`` where documented infinities and nans raise no warnings."""
        return function(*args)
