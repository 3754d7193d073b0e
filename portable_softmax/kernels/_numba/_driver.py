"""Runs the compiled kernels on arrays, on as many threads as are free.

The arrays are NumPy's, C-contiguous, of shape (rows, n) or (outer * n, inner) as `_kernels` has
them, and of a dtype that it knows: float16 is handed over as uint16 and bfloat16 as int16. They may
be views of any library's memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from portable_softmax.kernels import _threads
from portable_softmax.kernels._numba import _long
from portable_softmax.kernels._numba._exp import temperature as prepared
from portable_softmax.kernels._numba._groups import SUMS
from portable_softmax.kernels._numba._jit import is_at_hand
from portable_softmax.kernels._numba._kernels import LAYOUTS, scan
from portable_softmax.kernels._numba._losses import EACH, IGNORING, OVER, SAMPLED
from portable_softmax.kernels._numba._losses import WEIGHTED as HAS_WEIGHTS
from portable_softmax.kernels._numba._values import size_of_values
from portable_softmax.kernels._request import (
    BESIDE_SINKS,
    BINARY,
    BY_Q,
    DIVERGENCES,
    ENTROPIES,
    RUNNING,
    WEIGHTED,
    WITH_SLOPES,
    Layout,
)

# Rows of fewer bytes, in the dtype of the computation, are worked on in blocks, vector by vector of
# many of them; up to so many in groups, row by row; and longer ones one by one. An operation that
# folds nothing gains less by a group, and log_softmax writes after the fold: so they have limits of
# their own (`python -m bench thresholds`).
SHORT, MIDDLE = 512, 4096
LIMITS = {"log_softmax": (512, 1024), "softmax_vjp": (512, 0), "log_softmax_vjp": (1024, 0)}
LIMITS |= {f"{name}_beside_sink": limits for name, limits in LIMITS.items()}
LIMITS |= dict.fromkeys(WEIGHTED, (0, 0))  # a row at once, whose weights may be those of all
# Rows of up to so many classes are worked on as columns are: a vector would hold little of one, and
# each reduction of a row takes as long as some vectors.
FEW = 7
FEW_OF = {**dict.fromkeys(ENTROPIES, 64), **dict.fromkeys((*DIVERGENCES, BY_Q), 24)}
FEW_OF |= dict.fromkeys(("softmax_vjp", "softmax_vjp_beside_sink"), 4)
FEW_OF |= dict.fromkeys(WEIGHTED, 48)
# So many vectors, of 64 bytes, of short rows and of columns are worked on side by side: columns are
# read in runs of so many lines. Where a tile of columns would have more bytes, one vector is.
VECTORS, COLUMN_VECTORS, TILE = 4, 8, 1 << 21
# A piece of work is such a part of the array, of so many bytes at most: threads that take one after
# the other share small arrays evenly, and write long stretches of large ones. Entries and running
# sums, which take longer than memory does, are cut into shorter ones.
PART_OF_ALL, LARGEST, SHORTEST = 16, 1 << 21, 1 << 18
# Smaller arrays than THREADED are left to one thread: to wake another takes as long as half of that
# (`python -m bench thresholds`). It pays sooner where an entry takes more time, as one of few
# classes does, and where XLA has called: its threads look for work before they sleep.
THREADED = 1 << 22
SOONER = dict.fromkeys((*ENTROPIES, *DIVERGENCES, BY_Q, *BINARY, *RUNNING), 4)
SOONER_OF_FEW = 8
SOONER_BY_XLA = 8
# From so many entries on, rows of running sums that do not fill a vector are cut into runs.
CUT = 1 << 12
# Arrays of which a group is in the workspace at once, where that is more than one.
TILES = {
    **dict.fromkeys(
        (
            *("logsumexp_vjp", WITH_SLOPES, "softmax_vjp", "log_softmax_vjp"),
            *(*BESIDE_SINKS, *WEIGHTED),
        ),
        2,
    ),
    "cross_entropy_value_and_grad": 2,
    "soft_cross_entropy": 2,
    "soft_cross_entropy_value_and_grad": 3,
    "kl_divergence": 2,
    "kl_divergence_value_and_grad": 3,
    BY_Q: 2,
}


class Loss(NamedTuple):
    """The options of a loss, as the kernels read them."""

    weight: Any  # of the computation's dtype, or None
    ignore: int | None
    smoothing: float
    z: float
    samples: Any = None  # of the computation's dtype, in the order of the rows, or None
    mask: Any = None  # bytes, as softmax takes them, or None
    cap: float | None = None


class Plan(NamedTuple):
    """How rows are worked on: it depends on the call alone."""

    layout: str
    shape: tuple[int, ...]  # n, inner and rows of a group, as `_kernels` has them
    workspace: int
    step: int  # groups of a piece
    groups: int

    @property
    def pieces(self) -> int:
        return -(-self.groups // self.step)


def are_short(n: int, compute: Any) -> bool:
    """Return whether rows of n classes, which may be masked, are in blocks, or as columns."""
    return n <= FEW or n * compute.itemsize < SHORT


def plan(
    operation: str,
    layout: Layout,
    dtype: Any,
    compute: Any,
    over: bool = False,
    capped: bool = False,
    mask: Any = None,
    by_xla: bool = False,
) -> Plan:
    """Choose how rows are worked on, and cut the work into pieces.

    A gradient `over` the logits has its exps in the workspace, as those of half types are, and one
    of `capped` logits the slopes of the softcap behind them. No group crosses the end of a mask
    that is repeated. One by one and in groups, a row comes to the same bits.
    """
    (outer, n, inner), tiles = layout, TILES.get(operation, 1)
    lanes = 64 // compute.itemsize
    exact = dtype.itemsize == compute.itemsize and not over
    in_workspace = 2 if capped else 0 if exact else 1  # arrays of a group's size
    length, (short, middle) = n * compute.itemsize, LIMITS.get(operation, (SHORT, MIDDLE))
    crossed = mask is not None and mask.size < outer * n and mask.size % (lanes * n) != 0
    if inner > 1:
        vectors = COLUMN_VECTORS if n * COLUMN_VECTORS * 64 <= TILE else 1
        height = lanes * min(vectors, -(-inner // lanes))
        name, groups, size = "columns", outer * -(-inner // height), n * min(height, inner)
        workspace = tiles * n * height
    elif n <= FEW_OF.get(operation, FEW):
        height = VECTORS * lanes
        name, groups, size = "narrow", -(-outer // height), n * height
        inner, workspace = outer, tiles * size
    elif length < short:
        height = VECTORS * lanes
        name, groups, size = "blocks", -(-outer // height), n * height
        inner, workspace = outer, height * lanes + in_workspace * size
    elif length <= middle and not crossed:
        height = lanes
        name, groups, size = "groups", -(-outer // height), n * height
        inner, workspace = outer, SUMS * height * lanes + in_workspace * size
    else:
        name, groups, size, height, inner = "rows", outer, n, 1, outer
        workspace = _long.space.py_func(n) + in_workspace * n
    workspace += size_of_values.py_func(height) + lanes  # the last ones to align it
    wanted = worth(operation, n, by_xla)
    step = _step(groups, groups * size * dtype.itemsize, wanted, LARGEST)
    return Plan(name, (n, inner, height), workspace, step, groups)


def _step(groups: int, size: int, wanted: int, largest: int) -> int:
    """Return how many groups are a piece of an array of so many bytes."""
    if size < wanted:
        return groups
    return max(1, groups * min(size // PART_OF_ALL, largest) // max(1, size))


def worth(operation: str, n: int, by_xla: bool) -> int:
    """Return from how many bytes on another thread pays for rows of n classes."""
    sooner = max(SOONER.get(operation, 1), SOONER_OF_FEW if n <= FEW else 1)
    return THREADED // sooner // (SOONER_BY_XLA if by_xla else 1)


def helpers(operation: str, n: int, size: int) -> int:
    """Return how many of XLA's threads it pays to ask for help with so many bytes."""
    return max(1, 2 * size // max(1, worth(operation, n, True)))


def compute_dtype(dtype: Any) -> Any:
    """Return what an array of a dtype is computed in."""
    return _DOUBLE if dtype.itemsize == 8 else _SINGLE


_SINGLE, _DOUBLE = np.dtype(np.float32), np.dtype(np.float64)


# While a call is explained: the kernels that it would compile.
_WAITED_FOR: ContextVar[dict[str, None] | None] = ContextVar("portable_softmax numba", default=None)


class _Explained(BaseException):
    """Ends a call that is only explained: there is no answer to go on with."""


def waited_for(call: Callable[[], Any]) -> list[str]:
    """Return the kernels that a call would have to compile; it ends where the last would run."""
    found: dict[str, None] = {}
    token = _WAITED_FOR.set(found)
    try:
        call()
    except _Explained:
        pass
    finally:
        _WAITED_FOR.reset(token)
    return list(found)


def _call(kernel: Any, *arguments: Any) -> Any:
    waited_for = _WAITED_FOR.get()
    if waited_for is None:
        return kernel(*arguments)
    if not is_at_hand(kernel, arguments):
        waited_for[kernel.__qualname__.rpartition("numba._")[2]] = None
    return 0.0


# Where the kernels of fewer calls are, which are loaded when one is first needed.
_ELSEWHERE = {
    **dict.fromkeys((*ENTROPIES, *DIVERGENCES, BY_Q), "_entropies"),
    BINARY[0]: "_entries",
    **dict.fromkeys(RUNNING, "_running"),
    **dict.fromkeys(BESIDE_SINKS, "_sinks"),
    **dict.fromkeys(WEIGHTED, "_weights"),
}


def kernels_of(operation: str) -> Any:
    """Return the kernels of the layouts, an operation's among them."""
    return _home(operation).LAYOUTS if operation in _ELSEWHERE else LAYOUTS


def tables() -> list[Any]:
    """Return the kernels of each module that has some, by their layouts."""
    homes = {module: _home(operation) for operation, module in _ELSEWHERE.items()}
    return [LAYOUTS, *(home.LAYOUTS for home in homes.values())]


def _home(operation: str) -> Any:
    return import_module(f"portable_softmax.kernels._numba.{_ELSEWHERE[operation]}")


def run(
    operation: str, arrays: tuple[Any, ...], numbers: tuple[Any, ...], planned: Plan, compute: Any
) -> None:
    """Run a compiled function on every piece: each thread calls it once."""
    kernel = kernels_of(operation)[planned.layout][operation]
    counter = np.zeros(1, np.int64)

    def work(groups: int) -> None:
        workspace = np.empty(planned.workspace, compute)
        _call(kernel, arrays, numbers, planned.shape, workspace, counter, planned.step, groups)

    if _WAITED_FOR.get() is not None:
        work(0)
        raise _Explained
    if planned.step >= planned.groups:
        work(planned.groups)
        return
    work(0)  # compiles, where that is to be done, and takes a piece that there is not
    counter[0] = 0
    _threads.run(work, [planned.groups] * min(planned.pieces, _threads.limit()))


def _run(
    operation: str, arrays: tuple[Any, ...], number: Any, layout: Layout, mask: Any = None
) -> None:
    dtype = arrays[0].dtype
    compute = compute_dtype(dtype)
    planned = plan(operation, layout, dtype, compute, mask=mask)
    run(operation, arrays, (number,), planned, compute)


def softmax(x: Any, out: Any, layout: Layout, temperature: float = 1.0, mask: Any = None) -> None:
    """One read of the array, and of the mask, and one write of the array's size.

    A mask is bytes in one axis, as `mask_of` makes them.
    """
    t = prepared(temperature, compute_dtype(x.dtype).type)
    _run("softmax", (x, out, mask), t, layout, mask)


def log_softmax(
    x: Any, out: Any, layout: Layout, temperature: float = 1.0, mask: Any = None
) -> None:
    """One read and one write."""
    t = prepared(temperature, compute_dtype(x.dtype).type)
    _run("log_softmax", (x, out, mask), t, layout, mask)


def beside_sink(
    operation: str, x: Any, out: Any, sinks: Any, shares: Any, layout: Layout, temperature: float,
    mask: Any,
) -> None:  # fmt: skip
    """One read and one write of softmax or log_softmax, which is not over the array.

    Sinks are read and their shares written, or the logarithms of these: a number of the
    computation's dtype for each row.
    """
    t = prepared(temperature, compute_dtype(x.dtype).type)
    _run(operation, (x, out, mask, sinks, shares), t, layout, mask)


def vjp_beside_sink(
    operation: str, y: Any, dy: Any, out: Any, shares: Any, sums: Any, layout: Layout
) -> None:
    """Two reads and one write; shares are read and sums of the upstream gradients written."""
    _run(operation, (y, dy, out, shares, sums), math.nan, layout)


def fold(
    x: Any, maxima: Any, rests: Any, layout: Layout, temperature: float, mask: Any = None
) -> None:
    """One read; the others have a number of the computation's dtype for each row."""
    t = prepared(temperature, compute_dtype(x.dtype).type)
    _run("fold", (x, maxima, rests, mask), t, layout, mask)


def logsumexp(x: Any, out: Any, layout: Layout, mask: Any = None) -> None:
    """One read."""
    _run("logsumexp", (x, out, mask), 0, layout, mask)


def weighted_sums(x: Any, b: Any, maxima: Any, tops: Any, others: Any, layout: Layout) -> None:
    """One read of the array, and of the weights, which are in one axis and of the computation's.

    The others have a number of the computation's dtype for each row.
    """
    _run(WEIGHTED[0], (x, b, maxima, tops, others), 0, layout)


def weighted_slopes(
    x: Any, b: Any, maxima: Any, factors: Any, by_x: Any, by_b: Any, layout: Layout, bound: float
) -> float:
    """Return how many logits are above their row's maximum by more than `bound`, or nan.

    One read of both arrays, and a write of their sizes, of `by_b` unless it is None.
    """
    beyond = np.empty_like(maxima)
    arrays = (x, b, maxima, factors, by_x, beyond)
    if by_b is None:
        _run(WEIGHTED[1], arrays, bound, layout)
    else:
        _run(WEIGHTED[2], (*arrays, by_b), bound, layout)
    return float(beyond.sum())


def logsumexp_vjp(x: Any, dy: Any, out: Any, layout: Layout, mask: Any = None) -> None:
    """One read of the array and one write of its size; `dy` has a number for each row."""
    _run("logsumexp_vjp", (x, dy, out, mask), 0, layout, mask)


def entropy(x: Any, out: Any, grad: Any, layout: Layout) -> None:
    """One read, and a write of the array's size if `grad` is not None."""
    operation = "entropy" if grad is None else "entropy_value_and_grad"
    _run(operation, (x, out) if grad is None else (x, out, grad), 0, layout)


def kl_divergence(
    x: Any, y: Any, out: Any, grads: tuple[Any, Any] | None, layout: Layout, temperature: float,
    scale: float,
) -> None:  # fmt: skip
    """One read of both arrays, and a write of their sizes if there are `grads`, times `scale`."""
    t = prepared(temperature, compute_dtype(x.dtype).type)
    operation = "kl_divergence" if grads is None else "kl_divergence_value_and_grad"
    _run(operation, (x, y, out, *(grads or ())), (t, scale), layout)


def softmax_vjp(y: Any, dy: Any, out: Any, layout: Layout, off: float) -> None:
    """Two reads and one write. The sum of a softmax may be `off` from 1."""
    _run("softmax_vjp", (y, dy, out), off, layout)


def log_softmax_vjp(log_y: Any, dy: Any, out: Any, layout: Layout, masked: bool = True) -> None:
    """Two reads and one write. What a mask left at -inf passes no gradient on; a logit does."""
    left_out = math.inf if masked else math.nan  # which nothing is equal to
    _run("log_softmax_vjp", (log_y, dy, out), left_out, layout)


def losses(
    x: Any, labels: Any, layout: Layout, loss: Loss, each: Any, grad: Any, mean: bool
) -> tuple[float, float, int]:
    """Return the sum of the losses, that of the labels' weights, and how many labels are wrong.

    `labels` are int64, in the order of the rows. Every loss goes to `each` and the gradient of
    the sum, or of the mean, to `grad`, unless they are None. One read of the logits, and a write
    of the gradient's size.
    """
    compute = compute_dtype(x.dtype)
    weighted = loss.weight is not None
    # Without weights they are read with smoothing only.
    ones = np.ones(layout.n if loss.smoothing else 1, compute)
    w = np.ascontiguousarray(loss.weight) if weighted else ones
    w = w if w.flags.writeable else w.copy()
    flags = (
        HAS_WEIGHTS * weighted | IGNORING * (loss.ignore is not None) | EACH * (each is not None)
    )
    flags |= SAMPLED * (loss.samples is not None)
    ignore = 0 if loss.ignore is None else loss.ignore
    scale = 1.0
    if mean and grad is not None:
        divisor = float(layout.rows)
        if flags & (HAS_WEIGHTS | IGNORING | SAMPLED):
            divisor = _call(scan, labels, w, loss.samples, layout.n, flags, ignore)
        scale = 1.0 / divisor if divisor else 0.0
    # Without smoothing no class but the label's counts, whatever its weight.
    classes = float(np.sum(w, dtype=np.float64)) if loss.smoothing else 0.0
    options = np.asarray([loss.smoothing, loss.z, classes, scale])
    each = np.empty(1, compute) if each is None else each
    operation = "cross_entropy" if grad is None else "cross_entropy_value_and_grad"
    flags |= OVER * (over := _is_over(grad, x))
    capped = grad is not None and loss.cap is not None
    planned = plan(operation, layout, x.dtype, compute, over, capped, loss.mask)
    sums = np.zeros((planned.pieces, 3))
    arrays: tuple[Any, ...] = (x, labels, each, w, options, sums, loss.mask, loss.samples)
    arrays = arrays if grad is None else (*arrays, grad)
    run(operation, arrays, (flags, ignore, loss.cap), planned, compute)
    if len(sums) == 1:
        total, weight, wrong = sums[0].tolist()
        return total, weight, int(wrong)
    return _sum(sums[:, 0]), _sum(sums[:, 1]), int(sums[:, 2].sum())


def soft_losses(
    x: Any, t: Any, layout: Layout, z: float, each: Any, grad: Any, mean: bool
) -> float:
    """Return the sum of the losses of distributions, which are of the computation's dtype.

    Every loss goes to `each` and the gradient of the sum, or of the mean, to `grad`, unless they
    are None. One read of both arrays, and a write of the gradient's size.
    """
    compute = compute_dtype(x.dtype)
    operation = "soft_cross_entropy" if grad is None else "soft_cross_entropy_value_and_grad"
    over = _is_over(grad, x)
    planned = plan(operation, layout, x.dtype, compute, over)
    sums, flags = np.zeros(planned.pieces), EACH * (each is not None) | OVER * over
    each = np.empty(1, compute) if each is None else each
    options = np.asarray([z, 1.0 / layout.rows if mean else 1.0])
    arrays: tuple[Any, ...] = (x, t, each, options, sums)
    arrays = arrays if grad is None else (*arrays, grad)
    run(operation, arrays, (flags,), planned, compute)
    return _sum(sums)


def binary_losses(
    z: Any, t: Any, weights: Any, yeses: Any, smoothing: float, each: Any, grad: Any, scale: float
) -> float:
    """Return the sum of the losses of yes-or-no labels, which are of the computation's dtype.

    All arrays have one axis. Weights of the entries and of yeses, where every loss goes, and where
    the gradient times `scale`, are None if there are none.
    """
    compute, planned = compute_dtype(z.dtype), plan_of_entries(z.size, z.dtype.itemsize)
    sums = np.zeros(planned.pieces)
    numbers = (1.0 - smoothing, smoothing / 2.0, scale)
    arrays = (z, t, weights, yeses, each, grad, sums)
    run("sigmoid_cross_entropy", arrays, (numbers,), planned, compute)
    return _sum(sums)


def plan_of_entries(n: int, item: int, by_xla: bool = False) -> Plan:
    """Return how so many logits are worked on; `item` is the size of one in bytes."""
    chunk = _home(BINARY[0]).CHUNK
    groups = -(-n // chunk)
    step = _step(groups, n * item, worth(BINARY[0], n, by_xla), SHORTEST)
    return Plan("rows", (n, 1, 1), 64, step, groups)


def running(x: Any, dy: Any, out: Any, layout: Layout) -> None:
    """Write logarithms of running sums, or the gradient through them if there is a `dy`.

    One read of each, another one of what the gradient of a long row needs, and two more of rows
    that are cut: those are too few to fill a vector, and too long for the cuts to matter.
    """
    operation = RUNNING[0] if dy is None else RUNNING[1]
    planned = plan_of_running(layout, out.nbytes)
    run(operation, (x, out) if dy is None else (x, dy, out), (), planned, _DOUBLE)


def plan_of_running(layout: Layout, size: int, by_xla: bool = False) -> Plan:
    """Return how running sums are worked on; `size` is that of the array, in bytes."""
    home = _home(RUNNING[0])
    (outer, n, inner), lanes, part = layout, 8, home.PART  # of float64, whatever is given
    groups, length = -(-outer // lanes) if inner == 1 else outer * -(-inner // lanes), n
    if n >= CUT and layout.rows * 2 <= groups * lanes:
        groups, length = layout.rows, -(-n // lanes)
    step = _step(groups, size, worth(RUNNING[0], n, by_xla), SHORTEST)
    # Three tiles, and the states of five vectors that the parts begin with.
    workspace = lanes * (3 * min(length, part) + home.STATE * (1 + -(-length // part)) + 1)
    return Plan("rows", (n, inner, outer, length), workspace, step, groups)


def _is_over(grad: Any, x: Any) -> bool:
    """Return whether a gradient goes to where the logits are."""
    if grad is None:
        return False
    first, second = (a.__array_interface__["data"][0] for a in (grad, x))
    return bool(first == second)


def _sum(parts: Any) -> float:
    """Return the sum of the pieces' sums, in their order."""
    try:
        return math.fsum(parts)
    except (ValueError, OverflowError):  # infinities of both signs, or one on the way
        return float(sum(parts))
