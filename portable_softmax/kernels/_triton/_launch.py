"""Each operation on the host: layout, launch table, outputs, launches."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import triton.language as tl

from portable_softmax import libraries
from portable_softmax.kernels._request import Request
from portable_softmax.kernels._triton import (
    _cupy,
    _general,
    _layout,
    _loss,
    _rows,
    _sizes,
    _torch,
)

# What a launch needs of a library, by its name in the table.
_GLUE: dict[str, ModuleType] = {"cupy": _cupy, "torch": _torch}


def _library(call: Any) -> ModuleType:
    return _GLUE[call.library.name]


# Triton's type for the dtype of the computation.
TYPES = {"float32": tl.float32, "float64": tl.float64}


# Launches a compiled kernel on arrays, with scalars that may be others each time.
Launcher = Callable[[tuple[Any, ...], dict[str, Any]], None]


class Frame:
    """What all calls with arrays of the same shapes, strides and so on have in common."""

    def __init__(self, found: _layout.Layout, launch: _sizes.Launch, copies: bool) -> None:
        self.layout, self.launch, self.copies = found, launch, copies
        self.blocks = -(-found.lead // launch.rows)
        self.launchers: dict[Any, Launcher] = {}


# Made once for each signature of a call: what a launch takes of the host's time counts.
_FRAMES: dict[Any, Frame] = {}
_MOST_FRAMES = 4_096


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
        *,
        relay: bool = True,
        heavy: bool = False,
    ) -> None:
        lib = self.library = _library(call)
        self.call, self.compute = call, TYPES[libraries.dtype_name(call.compute_dtype)]
        self.quick = call.x.dtype.itemsize == 2
        self.once = all(kind != "full" for kind, _ in out.values())
        full, masks, rows = ({k: lib.bare(a) for k, a in d.items()} for d in (full, masks, rows))
        shape = call.x.shape
        row_shape = tuple(1 if a in axes else n for a, n in enumerate(shape))
        inputs = {**full, **masks, **rows}
        key = (axes, relay, heavy, call.compute_dtype, *out.items(), *inputs)
        key += tuple(lib.signature(a) for a in inputs.values())
        frame = _FRAMES.get(key)
        for copies in (False, True) if frame is None else (frame.copies,):
            if copies:
                full = {k: lib.contiguous(a) for k, a in full.items()}
                masks = {k: lib.contiguous(lib.broadcast(a, shape)) for k, a in masks.items()}
                rows = {k: lib.contiguous(a) for k, a in rows.items()}
            first = next(iter(full.values()))
            made = {
                k: lib.empty_like(first, dtype)
                if kind == "full"
                else lib.empty(row_shape, dtype, first)
                for k, (kind, dtype) in out.items()
            }
            whole = {**full, **{k: a for k, a in made.items() if out[k][0] == "full"}}
            self.arrays = {**whole, **masks, **rows, **made}
            if frame is None:
                frame = self._frame(tuple(shape), axes, len(whole), copies, relay, heavy)
                if frame is not None:
                    if len(_FRAMES) >= _MOST_FRAMES:
                        _FRAMES.clear()
                    _FRAMES[key] = frame
                    break
        if frame is None:
            raise AssertionError(f"no layout for shape {tuple(shape)} and axes {axes}")
        self.frame, self.layout, self.launch = frame, frame.layout, frame.launch
        self.blocks, self.whole = frame.blocks, len(whole)

    def _frame(
        self, shape: tuple[int, ...], axes: tuple[int, ...], whole: int, copies: bool, relay: bool,
        heavy: bool,
    ) -> Frame | None:  # fmt: skip
        """Return how the arrays lie, or None where strides do not merge or nothing is a neighbour.

        Then they are copied to C order, which always does.
        """
        lib, arrays = self.library, tuple(self.arrays.values())
        strides = [
            lib.strides(a if i < whole else lib.broadcast(a, shape)) for i, a in enumerate(arrays)
        ]
        wide = max(16 // a.dtype.itemsize for a in arrays[:whole])
        found = _layout.layout(shape, axes, strides, whole, wide)
        if found is None:
            return None
        launch = _sizes.launch(
            *(found.lead, found.other, found.classes, found.along, self.call.x.dtype.itemsize),
            once=self.once,
            relay=relay,
            heavy=heavy,
        )
        return Frame(found, launch, copies)

    def numbers(self) -> dict[str, int]:
        """Return the strides of each array as the arguments of a kernel."""
        found: dict[str, int] = {}
        rows, unit = self.layout.along == "classes", self.layout.unit
        for i, (name, strides) in enumerate(zip(self.arrays, self.layout.strides, strict=True)):
            lead, other, c = strides
            if i < self.whole:  # the unit stride itself is no argument
                lead, other, c = lead // unit, other // unit, c // unit
            found |= {f"{name}_lead": lead, f"{name}_other": other, f"{name}_class": c}
        found["lead_count"] = self.layout.lead if rows else self.layout.lead // unit
        found["classes"] = self.layout.classes // unit if rows else self.layout.classes
        return found

    def run(
        self,
        kernel: Any,
        arrays: tuple[Any, ...],
        constants: dict[str, Any],
        scalars: dict[str, Any],
        more: Any = None,
    ) -> None:
        """Launch a kernel: a program for each block of rows, and in a relay for each part twice.

        What finishes a block of a relay is one program where nothing longer than a row's value is
        written. `more` tells apart arrays that the plan knows nothing of; `scalars` are what may be
        another with each call.
        """
        key = (kernel, more, *constants.values())
        launcher = self.frame.launchers.get(key)
        if launcher is None:
            launcher = self._launcher(kernel, arrays, {**constants, **scalars})
            self.frame.launchers[key] = launcher
        launcher(arrays, scalars)

    def _launcher(self, kernel: Any, arrays: tuple[Any, ...], numbers: dict[str, Any]) -> Launcher:
        at, launch = self.layout, self.launch
        programs = self.blocks * at.other
        given = {**self.numbers(), **numbers, "lead_blocks": self.blocks}
        if launch.way == "relay":
            finishers = 1 if self.once else launch.parts
            lag = min(programs, -(-_sizes.LAG // (launch.parts + finishers)))
            given |= {"parts": launch.parts, "finishers": finishers, "lag": lag}
            programs = (programs + lag) * (launch.parts + finishers)
        given |= {
            "PASS": launch.way,
            "MAX_PARTS": launch.max_parts,
            "LOOKS": _sizes.LOOKS,
            "ALONG": at.along,
            "UNIT": at.unit,
            "QUICK": self.quick,
            "DTYPE": self.compute,
            "ROWS": launch.rows,
            "CLASSES": launch.classes,
            "STEPS": _sizes.STEPS,
        }
        options = {
            "num_warps": launch.warps,
            "maxnreg": launch.registers,
            # Contracted to fma, the error of a difference would come out as 0.
            "enable_fp_fusion": False,
        }
        return self._prepared(kernel, programs, arrays, given, options)

    def _prepared(
        self, kernel: Any, programs: int, arrays: tuple[Any, ...], given: dict[str, Any],
        options: dict[str, Any],
    ) -> Launcher:  # fmt: skip
        names = kernel.arg_names[len(arrays) :]
        # The strides of an array that a call lacks, and the parts where there is no relay, are 0.
        numbers = {name: given.get(name, 0) for name in names}
        found: Launcher = self.library.launcher(kernel, (programs, 1, 1), arrays, numbers, options)
        return found

    def run_small(
        self,
        kernel: Any,
        arrays: tuple[Any, ...],
        constants: dict[str, Any],
        scalars: dict[str, Any],
        more: Any,
    ) -> None:
        """Launch a kernel that has one entry a row to work on."""
        key = (kernel, more, *constants.values())
        launcher = self.frame.launchers.get(key)
        if launcher is None:
            at, rows = self.layout, _sizes.SMALL_ROWS
            blocks = -(-at.lead // rows)
            given = {**self.numbers(), **constants, **scalars, "lead_blocks": blocks, "ROWS": rows}
            given |= {"ALONG": at.along, "UNIT": at.unit}
            launcher = self._prepared(kernel, blocks * at.other, arrays, given, {})
            self.frame.launchers[key] = launcher
        launcher(arrays, scalars)

    def states(self, count: int, numbers: int = 1) -> list[Any]:
        """Return room for what the parts of each row leave in a relay, so many numbers each."""
        first = next(iter(self.arrays.values()))
        if self.launch.way != "relay":
            return [first] * count
        size = self.layout.lead * self.layout.other * self.launch.parts * numbers
        return [self.library.empty((size,), self.call.compute_dtype, first) for _ in range(count)]

    def flags(self, more: int = 0) -> Any:
        """Return zeros: `more`, and the words of a relay, which have a bit for each part."""
        xp, first = self.call.xp, next(iter(self.arrays.values()))
        words = self.blocks * self.layout.other if self.launch.way == "relay" else 0
        return self.library.zeros((more + words,), xp.int64, first) if more + words else first


def forward(call: Request, dy: Any = None) -> Any:
    """softmax, log_softmax or logsumexp, the reduced axes of the last kept with length 1.

    With `dy`, which has the shape of a logsumexp, the gradient of that.
    """
    operation = call.operation if dy is None else "logsumexp_vjp"
    masks = {} if call.options.where is None else {"w": call.options.where}
    rows = {} if dy is None else {"d": dy}
    kind = "rows" if operation == "logsumexp" else "full"
    out = {"y": (kind, call.result_dtype)}
    heavy = bool(masks) or (operation == "log_softmax" and call.result_dtype.itemsize == 2)
    plan = Plan(call, call.axes, {"x": call.x}, masks, rows, out, heavy=heavy)
    x, y = plan.arrays["x"], plan.arrays["y"]
    tempered = call.options.temperature != 1.0
    constants = {"OP": operation, "MASKED": bool(masks), "TEMPERED": tempered}
    arrays = (x, y, plan.arrays.get("w", x), plan.arrays.get("d", x), *plan.states(2))
    scalars = {"temperature": call.options.temperature}
    plan.run(_rows.forward, (*arrays, plan.flags()), constants, scalars)
    return y


def pull_back(call: Request, *, masked: bool = True) -> Any:
    """softmax_vjp or log_softmax_vjp, over the temperature of the forward function.

    `masked` tells whether an entry of log_softmax at -inf is a masked one, with the gradient 0.
    """
    temperature = call.options.temperature
    full = {"x": call.x, "d": call.dy}
    heavy = call.operation == "log_softmax_vjp" and call.result_dtype.itemsize == 2
    plan = Plan(call, call.axes, full, {}, {}, {"y": ("full", call.result_dtype)}, heavy=heavy)
    arrays = (plan.arrays["x"], plan.arrays["d"], plan.arrays["y"], *plan.states(1, numbers=5))
    operation = call.operation
    if operation == "log_softmax_vjp" and not masked:
        operation = "log_softmax_gradient"
    constants = {"OP": operation, "TEMPERED": temperature != 1.0, "OFF": call.off_one}
    scalars = {"temperature": temperature}
    plan.run(_rows.pull_back, (*arrays, plan.flags()), constants, scalars)
    return plan.arrays["y"]


def losses(call: Request, *, gradient: bool, upstream: Any = None) -> tuple[Any, Any, Any]:
    """Return the loss of each position, the gradient as the reduction scales it, and the weights.

    The weights are those of the labels, for the mean to divide by, where they are not all 1.
    `upstream`, which has the shape of the reduced loss, multiplies the gradient. With
    `check_labels` one flag is read back, which waits for the device; nothing else does.
    """
    xp, options, lib = call.xp, call.options, _library(call)
    constants, scalars = _constants_and_scalars(call)
    plain = call.indices and not constants["SMOOTH"]
    full, rows, out = {"x": call.x}, {}, {"o": ("rows", call.compute_dtype)}
    masks = {} if options.where is None else {"w": options.where}
    if call.indices:
        rows["l"] = xp.expand_dims(lib.bare(call.labels), axis=call.axis)
    else:
        full["t"] = call.labels
    if gradient:
        out["g"] = ("full", call.result_dtype)
    if upstream is not None:
        rows["d"] = lib.empty(tuple(call.reduced_shape()), call.compute_dtype, call.x)
        each = options.reduction == "none"
        rows["d"][...] = xp.expand_dims(upstream, axis=call.axis) if each else upstream
    heavy = not plain or constants["MASKED"] or constants["CAPPED"]
    plan = Plan(call, (call.axis,), full, masks, rows, out, relay=plain, heavy=heavy)
    x, loss = plan.arrays["x"], plan.arrays["o"]
    scalars["positions"] = float(math.prod(loss.shape))
    weight = x if options.weight is None else lib.contiguous(lib.bare(options.weight))
    more = lib.signature(weight)[-1]
    weights, divisor, how = None, x, "none"
    weighs = call.indices and (options.weight is not None or options.ignore_index is not None)
    if weighs and (upstream is None or options.reduction == "mean"):
        weights = lib.empty_like(loss, call.compute_dtype)
        small = (plan.arrays["l"], weight, weights)
        plan.run_small(_loss.label_weights, small, constants, {"ignore": scalars["ignore"]}, more)
    if gradient and options.reduction == "mean":
        how, divisor = ("count", x) if weights is None else ("sum", xp.sum(weights))
    if upstream is not None:
        scales = plan.arrays["d"]
        if options.reduction == "mean":
            count = scalars["positions"] if weights is None else divisor
            scales /= count if weights is None else xp.where(count == 0, math.inf, count)
        how, divisor = "given", scales
    check = call.check_labels and call.indices
    flags = plan.flags(1 if check or plan.launch.way == "relay" else 0)
    constants |= {"GRAD": gradient, "CHECK": check, "DIVISOR": how}
    labels, where = plan.arrays.get("l", x), plan.arrays.get("w", x)
    grad = plan.arrays.get("g")
    tail = (where, weight, divisor, loss, x if grad is None else grad, flags)
    if plain:
        del scalars["smoothing"]
        plan.run(_loss.loss, (x, labels, *tail, *plan.states(2)), constants, scalars, more)
    else:
        arrays = (x, labels, plan.arrays.get("t", x), *tail)
        plan.run(_general.general, arrays, constants, scalars, more)
    if check and int(flags[0]):
        call.target()  # raises, naming the label
    if weights is not None:
        weights = xp.squeeze(weights, axis=call.axis)
    return xp.squeeze(loss, axis=call.axis), grad, weights


def reduced(call: Request, loss: Any, weights: Any) -> Any:
    """Reduce the losses of the positions, without reading anything back."""
    xp, reduction = call.xp, call.options.reduction
    if reduction == "none":
        return loss
    if reduction == "sum":
        return xp.sum(loss)
    if weights is None:
        return xp.mean(loss)
    divisor = xp.sum(weights)
    # Smoothing may leave a loss where the labels' weights sum to 0, which is no infinite mean.
    return xp.where(divisor == 0, math.nan, xp.sum(loss) / divisor)


def _constants_and_scalars(call: Request) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options as a kernel takes them."""
    options = call.options
    ignore = options.ignore_index
    if ignore is not None:
        # An index that the labels' dtype cannot hold matches none.
        limits = call.xp.iinfo(call.labels.dtype)
        ignore = ignore if limits.min <= ignore <= limits.max else None
    constants = {
        "INDEX": call.indices,
        "IGNORING": ignore is not None,
        "WEIGHTED": options.weight is not None,
        "SMOOTH": options.label_smoothing != 0.0,
        "Z": options.z_loss != 0.0,
        "CAPPED": options.softcap is not None,
        "MASKED": options.where is not None,
    }
    scalars = {
        # As labels are loaded, with 64 bits and a sign: a launch takes no larger number.
        "ignore": 0 if ignore is None else (ignore + 2**63) % 2**64 - 2**63,
        "smoothing": options.label_smoothing,
        "z_loss": options.z_loss,
        "cap": 1.0 if options.softcap is None else options.softcap,
    }
    return constants, scalars
