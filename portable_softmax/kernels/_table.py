"""The table of kernels: what each one takes.

A kernel declares its libraries, operations, dtypes, options, devices, and what may trace a call;
whatever is not declared goes to the next kernel, and at last to the portable path. So a new option,
dtype or library is refused by every kernel until it is declared here, or in the class that another
package registers for its library.

The module of a kernel is small and loads nothing but NumPy, so that it can be asked about every
call; what it needs beyond that, it imports when it is used. It holds

    missing()                  what has to be installed or plugged in; empty if nothing
    declines(request, asked)   why it leaves a call to the next kernel that no declaration can say,
                               a layout; empty if it takes it. `asked` tells that
                               `kernels.use` names the kernel: then no size is too small

and a function of a `Request` for each of its operations, under the operation's name. Both are
functions of the call alone: nothing that ran before changes an answer.
"""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

from portable_softmax.kernels._request import (
    BINARY,
    COMPLEX,
    DIVERGENCES,
    ENTMAX_LOSSES,
    ENTROPIES,
    EXTREME,
    FAMILY,
    INTEGERS,
    LINEAR,
    OPERATIONS,
    OTHER_DTYPE,
    OUT,
    PARTS,
    PROBABILITIES,
    RUNNING,
    SPARSE,
)
from portable_softmax.libraries import CLASSES

Names = tuple[str, ...]  # torch.compile cannot look into sets that it takes for constants

FLOATS = ("float32", "float64", "float16", "bfloat16")
LABELS_AND_WEIGHTS = ("ignore_index", "reduction", "weight")
LOSS_OPTIONS = (*LABELS_AND_WEIGHTS, "label_smoothing", "z_loss", "softcap", "where")
ROW_OPTIONS = ("temperature", "sink", "b", "return_sign")
SAMPLES = "sample_weight"
# As Triton reads it, when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


class Kernel(NamedTuple):
    """What a fused implementation takes of one library's calls.

    What is not declared goes to the next kernel.

    Parameters
    ----------
    name
        Two words, by which `use` and `explain` know it; `use` takes the first alone, too. Rows of
        the table may share a name.
    why
        What it does, in some words: `explain` shows them.
    library
        The package of the arrays that it takes.
    module
        The name of the module that holds it: ``missing()``, ``declines(request, asked)``, and a
        function for each operation, under the operation's name.
    operations
        The names of the functions that it answers.
    dtypes
        The names of the dtypes of the first array that it takes.
    options
        The options that it takes with values other than their neutral ones; none by default.
    devices
        The types of device that it runs on, such as ``"cpu"``; any if this is empty.
    tracing
        The transforms and compilers under which it runs, such as ``"torch.compile"``; none by
        default.
    at_least, at_most
        Arrays with fewer elements or with more are left to others, unless `use` names it.
    adapter
        The name of the module that stands between the library and the kernel, or empty. It has
        ``declines`` and ``answer``, both of the module and a request, and is imported for an array
        of the library.
    on_by_default
        Whether it is taken where neither `use` nor PORTABLE_SOFTMAX_KERNELS names it.

    Examples
    --------
    >>> from portable_softmax.kernels import Kernel
    >>> kernel = Kernel(
    ...     name="shelf rows", why="one pass", library="shelf", module="shelf_kernels",
    ...     operations=("softmax",), dtypes=("float32",), options=("temperature",),
    ... )
    >>> kernel.undeclared(dtype="float32", active=("temperature", "where"), tracing="")
    'options: where'

    """

    name: str
    why: str
    library: str
    module: str
    operations: tuple[str, ...] = OPERATIONS
    dtypes: Names = FLOATS
    options: Names = ()
    devices: Names = ()
    tracing: Names = ()
    at_least: int = 0
    at_most: float = math.inf
    adapter: str = ""
    on_by_default: bool = True

    def undeclared(self, dtype: str, active: Names, tracing: str) -> str:
        """Return what of a call is not declared, whatever its arrays hold; empty if nothing."""
        if tracing and tracing not in self.tracing:
            return f"traced: {tracing}"
        if dtype not in self.dtypes:
            return f"dtype {dtype}"
        undeclared = [name for name in active if name not in self.options]
        return f"options: {', '.join(undeclared)}" if undeclared else ""


_HERE = "portable_softmax.kernels"

_TORCH = f"{_HERE}._torch"
_SMALL = (1 << 16) - 1  # not worth a compilation, nor a second thread

# What calls on chunks and on shards pass on to the kernels of their parts.
_OF_PARTS = (
    *(*LOSS_OPTIONS, PROBABILITIES, "temperature", EXTREME, "dtype", OTHER_DTYPE, SAMPLES),
    *("sink", "b", "return_sign", COMPLEX, "alpha"),
)
_NUMBA = Kernel(
    name="numba rows",
    why="one pass in cache",
    library="numpy",
    module=f"{_HERE}._numba",
    options=(*LOSS_OPTIONS, SAMPLES, PROBABILITIES, *ROW_OPTIONS, "dtype", OUT),
    at_least=_SMALL + 1,
)
_OF_DISTRIBUTIONS = _NUMBA._replace(
    operations=(*ENTROPIES, *DIVERGENCES),
    options=("temperature", "distillation", "reduction", "dtype"),
)
_OF_ENTRIES = _NUMBA._replace(
    operations=BINARY,
    why="one pass",
    options=("weight", "pos_weight", "label_smoothing", "reduction", "dtype"),
)
_OF_BEGINNINGS = _NUMBA._replace(operations=RUNNING, why="a row in each lane", options=())
_TILES = Kernel(
    name="numpy tiles",
    why="row tiles in cache",
    library="numpy",
    module=f"{_HERE}._numpy",
    dtypes=(*FLOATS, *INTEGERS),
    options=(*LOSS_OPTIONS, PROBABILITIES, *ROW_OPTIONS, EXTREME, "dtype", SAMPLES, OUT),
)
_OF_MEANS = (
    _NUMBA._replace(operations=("logmeanexp",), options=("where",)),
    _TILES._replace(operations=("logmeanexp",), options=(), dtypes=FLOATS),
)
_SMALL_ENTRIES = _TILES._replace(
    operations=BINARY,
    why="few calls",
    dtypes=("float32", "float64"),
    options=("reduction",),
    at_most=_SMALL,
)
_SMALL_SUMS = _TILES._replace(
    operations=(*ENTROPIES, *DIVERGENCES, *RUNNING),
    why="few calls",
    dtypes=FLOATS,
    options=("temperature", "distillation", "reduction", "dtype"),
    at_most=_SMALL,
)
_FORMULAS = Kernel(
    name="lent formulas",
    why="the portable formulas, on NumPy's view of a small tensor",
    library="torch",
    module=f"{_HERE}._formulas",
    operations=(*DIVERGENCES, *BINARY, *SPARSE, *ENTMAX_LOSSES),
    options=(
        *("temperature", EXTREME, "distillation", "reduction", "weight", "pos_weight"),
        *("label_smoothing", "focal_gamma", "alpha", "ignore_index", PROBABILITIES, SAMPLES),
        "dtype",
    ),
    devices=("cpu",),
    at_most=_SMALL,
    adapter=_TORCH,
)
_ON_PARTS = (
    _NUMBA._replace(operations=PARTS, options=("temperature", "where")),
    _TILES._replace(operations=PARTS, options=()),
)
_PACKED = _TILES._replace(
    name="packed rows",
    why="only the entries near the maximum",
    operations=SPARSE,
    options=("alpha",),
    at_least=1 << 15,  # below it, the rows' packing costs more than their numbers
)
_PACKED_LOSS = _PACKED._replace(
    operations=ENTMAX_LOSSES, options=("alpha", "ignore_index", "reduction", SAMPLES, "dtype")
)
_LENT: dict[str, Any] = {
    "library": "torch",
    "adapter": _TORCH,
    "devices": ("cpu",),
    "dtypes": FLOATS,
}
# By handlers that XLA calls.
_HANDLED: dict[str, Any] = {
    "library": "jax",
    "adapter": f"{_HERE}._jax._rows",
    "devices": ("cpu",),
    "tracing": ("traced",),
}
# In compiled code an operator costs more than a small tensor does: those are left to the compiler.
_TRACED: dict[str, Any] = {**_LENT, "at_least": _SMALL + 1, "tracing": ("torch.compile",)}

_RULES = Kernel(
    name="jax rules",
    why="one compiled call, without a branch",
    library="jax",
    module=f"{_HERE}._jax",
    operations=(*OPERATIONS, *LINEAR, *ENTROPIES),
    dtypes=(*FLOATS, *INTEGERS),
    options=(*LOSS_OPTIONS, PROBABILITIES, "temperature", "dtype", OTHER_DTYPE, SAMPLES),
    tracing=("traced",),
)
_LINEAR = Kernel(
    name="linear tiles",
    why="the library's products, with its row kernels between them",
    library="numpy",
    module=f"{_HERE}._linear",
    operations=LINEAR,
    options=(*LOSS_OPTIONS, PROBABILITIES, "dtype", OTHER_DTYPE, SAMPLES),
)
_CHUNKS = Kernel(
    name="dask chunks",
    why="each chunk by the kernel of its own library",
    library="dask",
    module=f"{_HERE}._chunks",
    operations=(*OPERATIONS, *LINEAR, *FAMILY),
    dtypes=(*FLOATS, *INTEGERS, "complex64", "complex128", "float128"),
    options=(*_OF_PARTS, "distillation"),
    tracing=("lazy",),
)

# For each library the first one that takes a call has it. Small arrays come to the tiles at once.
TABLE = (
    _TILES._replace(at_most=_SMALL),
    _NUMBA,
    _TILES,
    _TILES._replace(**_LENT, at_most=_SMALL),
    _NUMBA._replace(**_TRACED),
    _TILES._replace(**_TRACED),
    _NUMBA._replace(
        **_HANDLED,
        options=(*LOSS_OPTIONS, SAMPLES, PROBABILITIES, *ROW_OPTIONS, "dtype"),
    ),
    _OF_DISTRIBUTIONS,
    _OF_DISTRIBUTIONS._replace(**_LENT),
    _OF_DISTRIBUTIONS._replace(**_HANDLED),
    _OF_ENTRIES,
    _OF_ENTRIES._replace(**_LENT),
    _OF_ENTRIES._replace(**_HANDLED),
    _OF_BEGINNINGS,
    _OF_BEGINNINGS._replace(**_LENT),
    _OF_BEGINNINGS._replace(**_HANDLED),
    _OF_MEANS[0]._replace(**_HANDLED),
    _PACKED,
    _PACKED._replace(**_LENT),
    _PACKED_LOSS,
    _PACKED_LOSS._replace(**_LENT),
    _RULES,
    _RULES._replace(operations=DIVERGENCES, options=_OF_DISTRIBUTIONS.options),
    _RULES._replace(operations=BINARY, options=_OF_ENTRIES.options),
    _RULES._replace(operations=("logmeanexp",), options=("where",)),
    _RULES._replace(
        operations=("softmax", "log_softmax"),
        options=("sink", "where", "temperature", "dtype", OTHER_DTYPE),
    ),
    _RULES._replace(
        operations=("logsumexp",), options=("b", "return_sign", "where", "dtype", OTHER_DTYPE)
    ),
    *(
        Kernel(
            name="triton rows",
            why="rows in registers, or folded as they pass by",
            library=library,
            module=f"{_HERE}._triton",
            adapter=adapter,
            options=(*LOSS_OPTIONS, PROBABILITIES, "temperature"),
            # Triton's interpreter runs on the CPU: that is how the kernels are tested.
            devices=("cuda", "cpu") if INTERPRETED else ("cuda",),
            tracing=("torch.compile",) if adapter else (),
            on_by_default=False,  # they have not run on a device yet
        )
        for library, adapter in (("torch", _TORCH), ("cupy", ""))
    ),
    _CHUNKS,
    _CHUNKS._replace(name="cubed chunks", library="cubed", operations=(*OPERATIONS, *FAMILY)),
    Kernel(
        name="dtensor shards",
        why="each shard by the kernel of its own, then all-reduces of one number per position",
        library="dtensor",
        module=f"{_HERE}._dtensor",
        adapter=f"{_HERE}._dtensor._answers",
        operations=(*OPERATIONS, *LINEAR, *SPARSE, *RUNNING, "logmeanexp"),
        dtypes=(*FLOATS, *INTEGERS, "complex64", "complex128"),
        options=_OF_PARTS,
    ),
    _SMALL_ENTRIES,
    _SMALL_ENTRIES._replace(**_LENT | {"dtypes": _SMALL_ENTRIES.dtypes}),
    _SMALL_SUMS,
    _SMALL_SUMS._replace(**_LENT),
    _FORMULAS,
    *(*_OF_MEANS, *_ON_PARTS),
    *(row._replace(**_LENT) for row in (*_OF_MEANS, *_ON_PARTS)),
    _LINEAR,
    _LINEAR._replace(library="cupy"),
    _LINEAR._replace(library="torch", adapter=f"{_TORCH}._linear", tracing=("torch.compile",)),
)


def table() -> tuple[Kernel, ...]:
    """Return the table, and what the classes of other packages' libraries add to it."""
    added = [_checked(row, name) for name, cls in CLASSES.items() for row in cls.kernels]
    return (*TABLE, *added)


def _checked(row: Any, library: str) -> Kernel:
    if not (isinstance(row, Kernel) and row.library == library):
        raise TypeError(
            f"the class of {library} has the kernel {row!r}; expected a "
            f"portable_softmax.kernels.Kernel whose library is {library!r}"
        )
    return row


def names() -> tuple[str, ...]:
    """Return the name of each kernel, once."""
    return tuple(dict.fromkeys(kernel.name for kernel in table()))
