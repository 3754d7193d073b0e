"""Each operation on the host: layout, launch table, outputs, launches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import triton.language as tl

from portable_softmax import _arrays
from portable_softmax.kernels._calls import LossCall, RowsCall, VjpCall
from portable_softmax.kernels._triton import _cupy, _layout, _loss, _rows, _sizes, _torch


def _library(call: Any) -> ModuleType:
    return _cupy if _arrays.library(call.xp) == "cupy" else _torch


# Triton's type for the dtype of the computation.
TYPES = {"float32": tl.float32, "float64": tl.float64}


class Plan:
    """The arrays of one call, seen as rows, and how its kernel is launched on them.

    `full` have the shape of the first, `masks` broadcast to it, and `rows` hold one entry for each
    position, with the length 1 along the reduced axes. What `out` names is made: a tensor like
    the first in `full`, or one like `rows`.
    """

    def __init__(
        self,
        call: Any,
        axes: tuple[int, ...],
        full: dict[str, Any],
        masks: dict[str, Any],
        rows: dict[str, Any],
        out: dict[str, tuple[str, Any]],
    ) -> None:
        lib = self.library = _library(call)
        full, masks, rows = ({k: lib.bare(a) for k, a in d.items()} for d in (full, masks, rows))
        shape = tuple(call.x.shape)
        kept = tuple(1 if a in axes else n for a, n in enumerate(shape))
        # Strides that do not merge, or no neighbours in memory: one copy, and once more.
        for attempt in ("as they are", "in C order"):
            if attempt == "in C order":
                full = {k: lib.contiguous(a) for k, a in full.items()}
                masks = {k: lib.contiguous(lib.broadcast(a, shape)) for k, a in masks.items()}
                rows = {k: lib.contiguous(a) for k, a in rows.items()}
            first = next(iter(full.values()))
            made = {
                k: lib.empty_like(first, dtype) if kind == "full" else lib.empty(kept, dtype, first)
                for k, (kind, dtype) in out.items()
            }
            whole = {**full, **{k: a for k, a in made.items() if out[k][0] == "full"}}
            rest = {**masks, **rows, **{k: a for k, a in made.items() if k not in whole}}
            strides = [
                *(lib.strides(a) for a in whole.values()),
                *(lib.strides(lib.broadcast(a, shape)) for a in rest.values()),
            ]
            wide = max(16 // a.dtype.itemsize for a in whole.values())
            found = _layout.layout(shape, axes, strides, len(whole), wide)
            if found is not None:
                break
        else:
            raise AssertionError(f"no layout for shape {shape} and axes {axes}")
        self.layout, self.arrays = found, {**whole, **rest}
        self.whole = frozenset(whole)
        self.compute = TYPES[_arrays.dtype_name(call.compute)]
        sizes = found.lead, found.other, found.classes, found.along
        self.launch = _sizes.launch(*sizes, call.compute.itemsize)
        self.call = call

    def numbers(self) -> dict[str, int]:
        """Return the strides of each array as the arguments of a kernel."""
        found: dict[str, int] = {}
        rows, unit = self.layout.along == "classes", self.layout.unit
        for name, strides in zip(self.arrays, self.layout.strides, strict=True):
            lead, other, c = strides
            if name in self.whole:  # the unit stride itself is no argument
                lead, other, c = lead // unit, other // unit, c // unit
            found |= {f"{name}_lead": lead, f"{name}_other": other, f"{name}_class": c}
        found["lead_count"] = self.layout.lead if rows else self.layout.lead // unit
        found["classes"] = self.layout.classes // unit if rows else self.layout.classes
        return found

    def run(
        self, kernel: Any, arrays: Sequence[Any], numbers: dict[str, Any], *, once: bool = False
    ) -> None:
        """Launch a kernel: a program for each block of rows, and where they are split each part.

        `once`: what finishes split rows needs one program a row, as it writes nothing longer.
        """
        at, launch = self.layout, self.launch
        if at.lead * at.other == 0:
            return
        blocks = -(-at.lead // launch.rows)
        accepted = set(kernel.arg_names)
        given = {k: v for k, v in {**self.numbers(), **numbers}.items() if k in accepted}
        given |= dict.fromkeys(accepted.intersection(_ABSENT) - given.keys(), 0)
        for way in ("fold", "finish") if launch.way == "split" else (launch.way,):
            parts = 1 if once and way == "finish" else launch.parts
            self.library.run(
                kernel,
                (blocks * at.other, parts),
                tuple(arrays),
                {
                    **given,
                    "lead_blocks": blocks,
                    "PASS": way,
                    "PARTS": launch.parts,
                    "ALONG": at.along,
                    "UNIT": at.unit,
                    "DTYPE": self.compute,
                    "ROWS": launch.rows,
                    "CLASSES": launch.classes,
                    "DEPTH": _sizes.DEPTH,
                    "num_warps": launch.warps,
                    "maxnreg": launch.registers,
                    # Contracted to fma, the error of a difference would come out as 0.
                    "enable_fp_fusion": False,
                },
            )

    def run_small(self, kernel: Any, arrays: Sequence[Any], numbers: dict[str, Any]) -> None:
        """Launch a kernel that has one entry a row to work on."""
        at, rows = self.layout, _sizes.SMALL_ROWS
        blocks = -(-at.lead // rows)
        given = {**self.numbers(), **numbers, "lead_blocks": blocks, "ROWS": rows}
        given |= {"ALONG": at.along, "UNIT": at.unit}
        given = {k: v for k, v in given.items() if k in kernel.arg_names}
        self.library.run(kernel, (blocks * at.other,), tuple(arrays), given)

    def states(self, count: int) -> list[Any]:
        """Return room for what the parts of each row leave, if there are parts."""
        first = next(iter(self.arrays.values()))
        if self.launch.way != "split":
            return [first] * count
        size = self.layout.lead * self.layout.other * self.launch.parts
        return [self.library.empty((size,), self.call.compute, first) for _ in range(count)]


# The strides of an array that a call may lack.
_ABSENT = frozenset(f"{name}_{axis}" for name in "wtlg" for axis in ("lead", "other", "class"))


def forward(call: RowsCall) -> Any:
    """softmax, log_softmax or logsumexp, the reduced axes of the last kept with length 1."""
    masks = {} if call.where is None else {"w": call.where}
    kind = "rows" if call.operation == "logsumexp" else "full"
    plan = Plan(call, call.axes, {"x": call.x}, masks, {}, {"y": (kind, call.answer)})
    x, y, where = plan.arrays["x"], plan.arrays["y"], plan.arrays.get("w", plan.arrays["x"])
    options = {
        "temperature": call.temperature,
        "OP": call.operation,
        "MASKED": bool(masks),
        "TEMPERED": call.temperature != 1.0,
    }
    plan.run(_rows.forward, (x, y, where, *plan.states(2)), options, once=kind == "rows")
    return y


def pull_back(call: VjpCall) -> Any:
    """softmax_vjp or log_softmax_vjp."""
    full = {"x": call.x, "d": call.dy}
    plan = Plan(call, call.axes, full, {}, {}, {"y": ("full", call.answer)})
    arrays = (plan.arrays["x"], plan.arrays["d"], plan.arrays["y"], *plan.states(1))
    plan.run(_rows.pull_back, arrays, {"OP": call.operation})
    return plan.arrays["y"]


def losses(call: LossCall, *, gradient: bool) -> tuple[Any, Any, Any]:
    """Return the loss of each position, the gradient as the reduction scales it, and the weights.

    The weights are those of the labels, for the mean to divide by, where they are not all 1. With
    `check_labels` one flag is read back, which waits for the device; nothing else does.
    """
    xp, options, lib = call.xp, call.options, _library(call)
    full, rows, out = {"x": call.x}, {}, {"o": ("rows", call.compute)}
    masks = {} if options.where is None else {"w": options.where}
    if call.indices:
        rows["l"] = xp.expand_dims(lib.bare(call.labels), axis=call.axis)
    else:
        full["t"] = call.labels
    if gradient:
        out["g"] = ("full", call.answer)
    plan = Plan(call, (call.axis,), full, masks, rows, out)
    numbers = _numbers(call)
    if plan.launch.way == "split" and (numbers["SMOOTH"] or not call.indices):
        # Its loss is a sum over the classes, which the parts would have to merge as well.
        plan.launch = plan.launch._replace(way="loop", parts=1)
    x, loss = plan.arrays["x"], plan.arrays["o"]
    weight = x if options.weight is None else lib.contiguous(lib.bare(options.weight))
    weights, divisor, how = None, x, "none"
    if call.indices and (options.weight is not None or options.ignore_index is not None):
        weights = lib.empty_like(loss, call.compute)
        plan.run_small(_loss.label_weights, (plan.arrays["l"], weight, weights), numbers)
    if gradient and options.reduction == "mean":
        how, divisor = ("count", x) if weights is None else ("sum", xp.sum(weights))
    check = call.check_labels and call.indices
    flag = lib.zeros((1,), xp.int32, x) if check else x
    arrays = (
        *(x, plan.arrays.get("l", x), plan.arrays.get("t", x), plan.arrays.get("w", x)),
        *(weight, divisor, loss, plan.arrays.get("g", x), flag, *plan.states(2)),
    )
    numbers |= {"GRAD": gradient, "CHECK": check, "DIVISOR": how}
    numbers["positions"] = float(math.prod(loss.shape))
    plan.run(_loss.loss, arrays, numbers, once=not gradient)
    if check and int(flag[0]):
        call.target()  # raises, naming the label
    if weights is not None:
        weights = xp.squeeze(weights, axis=call.axis)
    return xp.squeeze(loss, axis=call.axis), plan.arrays.get("g"), weights


def reduced(call: LossCall, loss: Any, weights: Any) -> Any:
    """Reduce the losses of the positions, without reading anything back."""
    xp, reduction = call.xp, call.options.reduction
    if reduction == "none":
        return loss
    total = xp.sum(loss)
    if reduction == "sum":
        return total
    if weights is None:
        return total / math.prod(loss.shape)
    divisor = xp.sum(weights)
    # Smoothing may leave a loss where the labels' weights sum to 0, which is no infinite mean.
    return xp.where(divisor == 0, math.nan, total / divisor)


def _numbers(call: LossCall) -> dict[str, Any]:
    """Return the options as a kernel takes them."""
    options = call.options
    ignore = options.ignore_index
    if ignore is not None:
        # An index that the labels' dtype cannot hold matches none.
        limits = call.xp.iinfo(call.labels.dtype)
        ignore = ignore if limits.min <= ignore <= limits.max else None
    return {
        "ignore": 0 if ignore is None else ignore,
        "smoothing": options.label_smoothing,
        "z_loss": options.z_loss,
        "cap": 1.0 if options.softcap is None else options.softcap,
        "INDEX": call.indices,
        "IGNORING": ignore is not None,
        "WEIGHTED": options.weight is not None,
        "SMOOTH": options.label_smoothing != 0.0,
        "Z": options.z_loss != 0.0,
        "CAPPED": options.softcap is not None,
        "MASKED": options.where is not None,
    }
