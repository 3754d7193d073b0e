"""The kernels of Numba as native handlers that XLA calls on a CPU, and their derivatives.

A call is one primitive, `rows`, with two lowerings. Where XLA compiles for one CPU, its rows go to
a handler; for every other platform, for several devices and for `jax.export` it is the function
of `_rules`, `_family` or `_losses` that the call would otherwise have been. So a traced call need
not know what it is compiled for. The first derivative is made of the kernels' answers, and every
other one is JAX's of that function.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jax.interpreters import ad, batching, mlir

from portable_softmax.kernels import _jax
from portable_softmax.kernels._jax import _family, _fold, _losses, _rules
from portable_softmax.kernels._request import (
    BY_Q,
    DIVERGENCES,
    ENTROPIES,
    FOLD,
    LOSSES,
    RUNNING,
    VJPS,
    Layout,
    Request,
)

Arrays = tuple[Any, ...]

# Derivatives, which are linear in the last of their arrays, and the transpose of each.
_TRANSPOSE = {
    "softmax_vjp": "softmax_vjp",
    "log_softmax_jvp": "log_softmax_pullback",
    "logsumexp_jvp": "logsumexp_pullback",
    "cross_entropy_jvp": "cross_entropy_pullback",
    "logcumsumexp_jvp": "logcumsumexp_pullback",
}
_OF_AN_OUTPUT = (*VJPS, "log_softmax_jvp", "log_softmax_pullback")
_RUNNING = (*RUNNING, "logcumsumexp_jvp", "logcumsumexp_pullback")
_DIVERGENCES = (*DIVERGENCES, BY_Q)
# Those of which every array belongs to the rows.
_PLAIN = (*_OF_AN_OUTPUT, *_RUNNING, *ENTROPIES)


class Call(NamedTuple):
    """What a call is compiled for."""

    engine: str  # the module that has the handlers
    operation: str
    tree: Any  # of the arrays of a `_jax.Program`, and of what handlers alone take
    static: tuple[Any, ...]  # of a `_jax.Program`
    batch: int = 0  # axes that vmap has put before those of the logits, labels and gradients
    kept: bool = False  # whether a derivative needs the answer again
    over: int | None = None  # the array that the answer is written over

    @property
    def form(self) -> Any:
        """What a loss is compiled for."""
        return self.static[0]

    @property
    def of_loss(self) -> bool:
        """Whether it is a loss or its derivative."""
        return self.operation.startswith("cross_entropy")

    @property
    def derivative(self) -> str:
        """The kind of a derivative that starts from the logits; empty for other operations."""
        kind = self.operation.rpartition("_")[2]
        is_one = kind in ("jvp", "pullback") and self.operation not in _OF_AN_OUTPUT
        return kind if is_one else ""

    @property
    def axes(self) -> tuple[int, ...]:
        """The reduced axes."""
        axes = (self.form.axis,) if self.of_loss else self.static[0]
        return tuple(a + self.batch for a in axes)

    @property
    def compute(self) -> Any:
        """What it is computed in."""
        return jnp.dtype(self.form.compute if self.of_loss else self.static[1])

    def arrays(self, leaves: Arrays) -> Any:
        """Return the arrays as the function takes them."""
        return jax.tree.unflatten(self.tree, leaves)[0]

    def numbers(self, leaves: Arrays) -> Any:
        """Return a temperature as the kernels take it; None for none."""
        return jax.tree.unflatten(self.tree, leaves)[1]

    def where(self, leaves: Arrays) -> Any:
        """Return the mask with as many axes as the logits, or None."""
        arrays = self.arrays(leaves)
        if self.operation in (*_PLAIN, *_DIVERGENCES):
            return None
        where = arrays[3 if self.of_loss else 1]
        return None if where is None else _rules.mask_like(where, arrays[0].ndim)


# --------------------------------------------------------------------------- what is taken


def declines(engine: Any, request: Request, asked: bool) -> str:
    """Return why a call is left to XLA alone."""
    x, library = request.x, request.library
    if not all(map(library.is_known, x.shape)):
        return "symbolic shapes"
    if why := _elsewhere(x) or engine.declines_options(request):
        return str(why)
    if request.dy is not None and request.dy.dtype != x.dtype:
        return f"dtypes: {x.dtype} and {request.dy.dtype}"
    why = engine.declines_shape(x.shape, request.axes)
    return why or _no_handlers(engine.__name__)


def remark(engine: Any, request: Request) -> str:
    """Return what `explain` says of a gradient and of where handlers are kept."""
    said, dtype = engine.remarks_of_folders(), request.x.dtype
    if request.operation == "cross_entropy" and dtype != request.compute_dtype:
        smoothing = request.options.label_smoothing or None
        if _soft(request.indices, smoothing):
            said = [f"its gradient is left to XLA: {dtype} and soft labels", *said]
    return "; ".join(said)


def _soft(indices: bool, smoothing: Any) -> bool:
    """Return whether labels are soft: no kernel takes weights of positions beside these."""
    return not indices or smoothing is not None


def _elsewhere(x: Any) -> str:
    """Return on how many devices an array is, or may be, if not on one."""
    if isinstance(x, jax.core.Tracer):
        return "" if jax.device_count() == 1 else "traced, with several devices"
    return "" if len(x.devices()) == 1 else "several devices"


@cache
def _no_handlers(engine: str) -> str:
    """Return why this JAX calls no handler, or none that reads its frames."""
    if not hasattr(jax, "ffi"):
        return f"jax {jax.__version__} has no jax.ffi"
    if sys.platform == "win32":
        return "handlers are made for POSIX systems"
    try:
        handlers = _handlers(engine)
    except (ImportError, AttributeError) as error:  # another version of Numba
        return f"{engine}._ffi cannot be imported: {error}"
    first, last = handlers.API, handlers.LAST_API
    try:
        header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
        found = re.findall(r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", header)
    except (OSError, RuntimeError):
        found = []
    if not first <= tuple(map(int, found)) <= last:
        known = f"handlers those from {first} to {last}"
        return f"XLA's FFI has the version {'.'.join(found) or 'unknown'}, {known}"
    return ""


def _handlers(engine: str) -> Any:
    return import_module(f"{engine}._ffi")


# --------------------------------------------------------------------------- the primitive


def answer(engine: Any, request: Request) -> Any:
    """Answer by the primitive, in one compiled call."""
    _, arrays, static = _jax.program(request)
    if request.operation == "logmeanexp":
        leaves, tree = jax.tree.flatten((arrays, None))
        return _compiled_mean(*leaves, call=Call(engine.__name__, FOLD, tree, static))
    if request.operation in DIVERGENCES:
        return _divergence(engine.__name__, request, arrays, static)
    leaves, tree = jax.tree.flatten((arrays, _temperature(engine.__name__, request)))
    found = _compiled(*leaves, call=Call(engine.__name__, request.operation, tree, static))
    return tuple(found) if len(found) > 1 else found[0]


def _divergence(engine: str, request: Request, arrays: Arrays, static: Any) -> Any:
    """Answer with the reduced divergence, and its gradients."""
    numbers, compute = _temperature(engine, request), request.compute_dtype
    x, y, scale, distilled, *factor = arrays
    axes, compute, answer, reduction, *dtypes = static
    if factor:
        numbers = _jax.put(
            request,
            [*([] if numbers is None else _prepared(engine, request)), _jax.factor(request)],
        )
    leaves, tree = jax.tree.flatten(((x, y, scale, *factor), numbers))
    call = Call(engine, request.operation, tree, (axes, compute, *dtypes))
    found = _compiled_divergence(*leaves, distilled=distilled, call=call, rest=(answer, reduction))
    return tuple(found) if factor else found[0]


def _temperature(engine: str, request: Request) -> Any:
    """Return a temperature as the kernels take it, so that no value is compiled in."""
    value = 1.0 if request.operation in LOSSES else request.options.temperature
    return None if value == 1.0 else _jax.put(request, _prepared(engine, request))


def _prepared(engine: str, request: Request) -> Any:
    dtype = jnp.dtype(request.compute_dtype).type
    return _handlers(engine).temperature(request.options.temperature, dtype)


rows = import_module("jax.extend.core").Primitive("portable_softmax_rows")
rows.multiple_results = True


@partial(jax.jit, static_argnames="call", inline=True)
def _compiled(*leaves: Any, call: Call) -> Any:
    return rows.bind(*leaves, call=call)


@partial(jax.jit, static_argnames=("call", "rest"), inline=True)
def _compiled_divergence(*leaves: Any, distilled: Any, call: Call, rest: Any) -> Any:
    each, *grads = rows.bind(*leaves, call=call)
    return _family.reduced(each, distilled, *rest), *grads


@partial(jax.jit, static_argnames="call", inline=True)
def _compiled_mean(*leaves: Any, call: Call) -> Any:
    return _mean(call, *leaves)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _mean(call: Call, *leaves: Any) -> Any:
    m, rest = rows.bind(*leaves, call=call)
    axes, _, answer = call.static
    return _family.mean_of(m, rest, *call.arrays(leaves), axes, answer)


@_mean.defjvp  # type: ignore[untyped-decorator]
def _mean_jvp(call: Call, leaves: Arrays, tangents: Arrays) -> tuple[Any, Any]:
    """Differentiate logsumexp: the logarithm of what it is divided by is a constant."""
    x, *others = leaves

    def whole(x: Any) -> Any:
        return rows.bind(x, *others, call=call._replace(operation="logsumexp"))[0]

    return _mean(call, *leaves), jax.jvp(whole, (x,), (tangents[0],))[1]


def _eager(*leaves: Any, call: Call) -> Any:
    with jax.disable_jit(False):
        return _compiled(*leaves, call=call)


def _by_xla(*leaves: Any, call: Call) -> list[Any]:
    """Answer by the function of `_rules` or `_losses`, or by JAX's derivative of it."""
    kind = call.derivative
    if call.operation in _BY_RULE:
        kind = ""
    function = _function(call.operation.removesuffix(f"_{kind}"))

    def one(*leaves: Any) -> list[Any]:
        arrays = call.arrays(leaves)
        if not kind:
            found = function(*arrays, *call.static)
            return list(found) if isinstance(found, tuple) else [found]
        x, *others, last = arrays

        def of_logits(x: Any) -> Any:
            return function(x, *others, *call.static)

        if kind == "jvp":
            return [jax.jvp(of_logits, (x,), (last,))[1]]
        return list(jax.vjp(of_logits, x)[1](last))

    own, mask = _of_rows(call)
    batch = leaves[0].shape[: call.batch]
    leaves = tuple(
        jnp.broadcast_to(a, batch + a.shape[call.batch :]) if i == mask else a
        for i, a in enumerate(leaves)
    )
    for _ in range(call.batch):
        one = jax.vmap(one, in_axes=tuple(0 if i in own else None for i in range(len(leaves))))
    return one(*leaves)


# A derivative that has a function of its own.
_BY_RULE = ("logcumsumexp_pullback",)


def _function(operation: str) -> Any:
    """Return the function of XLA's operations."""
    if operation in _DIVERGENCES:  # not reduced yet
        return getattr(_family, operation.removeprefix("kl_"))
    return _jax.function(operation)


def _of_rows(call: Call) -> tuple[tuple[int, ...], int | None]:
    """Return which leaves belong to the rows, and which of them is a mask.

    What belongs to the rows has an axis for each batch. That of a mask may be of length 1.
    """
    arrays, _ = call.tree.unflatten(range(call.tree.num_leaves))
    if call.operation in _PLAIN:
        return arrays, None
    if call.operation in _DIVERGENCES:
        return arrays[:2], None
    own, mask = arrays[:1], arrays[3 if call.of_loss else 1]
    if call.of_loss:
        own += arrays[1], arrays[2].samples
    if call.derivative:
        own += arrays[-1:]
    return tuple(i for i in (*own, mask) if i is not None), mask


def _shapes(x: Any, *others: Any, call: Call) -> list[Any]:
    aval = jax.core.ShapedArray
    if call.derivative == "pullback":
        return [aval(x.shape, x.dtype)]
    if call.operation in (*ENTROPIES, *_DIVERGENCES, FOLD):
        shape = [n for a, n in enumerate(x.shape) if a not in call.axes]
        dtypes = (call.static[2],) * 2 if call.operation in ENTROPIES else call.static[1:]
        shapes = tuple(shape), *(x.shape,) * (len(dtypes) - 1)
        if call.operation == FOLD:
            return [aval(tuple(shape), jnp.dtype(call.compute))] * 2
        found = list(map(aval, shapes, map(jnp.dtype, dtypes)))
        return found[:1] if call.operation in (ENTROPIES[0], DIVERGENCES[0]) else found
    if not call.of_loss:
        reduced = call.operation in ("logsumexp", "logsumexp_jvp")
        shape = [1 if reduced and a in call.axes else n for a, n in enumerate(x.shape)]
        return [aval(tuple(shape), jnp.dtype(call.static[-1]))]
    (axis,), form = call.axes, call.form
    shape = x.shape[:axis] + x.shape[axis + 1 :]
    loss = shape if form.reduction == "none" else shape[: call.batch]
    found = [aval(loss, jnp.dtype(form.answer)), aval(x.shape, jnp.dtype(form.gradient))]
    return found if call.operation == "cross_entropy_value_and_grad" else found[:1]


rows.def_impl(_eager)
rows.def_abstract_eval(_shapes)


# --------------------------------------------------------------------------- transforms


def _vmap(leaves: Arrays, axes: Arrays, *, call: Call) -> tuple[list[Any], list[int]]:
    own, mask = _of_rows(call)
    size = next(a.shape[i] for a, i in zip(leaves, axes, strict=True) if i is not None)
    if any(axis is not None and i not in own for i, axis in enumerate(axes)):
        found = jax.vmap(partial(_by_xla, call=call), in_axes=tuple(axes))(*leaves)
        return found, [0] * len(found)
    ndim = leaves[0].ndim + (axes[0] is None)

    def batched(i: int, a: Any, axis: int | None) -> Any:
        if i not in own:
            return a
        a = jnp.expand_dims(a, 0) if axis is None else jnp.moveaxis(a, axis, 0)
        if i == mask:
            return jnp.expand_dims(a, tuple(range(1, 1 + ndim - a.ndim)))
        return jnp.broadcast_to(a, (size, *a.shape[1:])) if axis is None else a

    leaves = tuple(batched(i, a, axes[i]) for i, a in enumerate(leaves))
    found = rows.bind(*leaves, call=call._replace(batch=call.batch + 1))
    return found, [0] * len(found)


batching.primitive_batchers[rows] = _vmap


def _jvp(primals: Arrays, tangents: Arrays, *, call: Call) -> tuple[list[Any], list[Any]]:
    moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]
    if call.operation == DIVERGENCES[0] and max(moving) < 2:
        return _divergence_jvp(primals, [tangents[i] for i in moving], moving, call)
    x, rule = primals[0], _FIRST.get(call.operation)
    if x.dtype != call.compute:
        rule = _OF_LOGITS.get(call.operation)
    if rule is not None and moving == [0]:
        t, where = tangents[0], call.where(primals)
        t = t if where is None else jnp.where(where, t, 0.0)  # the others' may be infinite
        found, change = rule(primals, t, call)
        return [found], [change]

    def some(*moved: Any) -> list[Any]:
        every = list(primals)
        for i, value in zip(moving, moved, strict=True):
            every[i] = value
        return _by_xla(*every, call=call)

    found, changes = jax.jvp(some, [primals[i] for i in moving], [tangents[i] for i in moving])
    return found, changes


ad.primitive_jvps[rows] = _jvp


def _softmax_jvp(leaves: Arrays, t: Any, call: Call) -> tuple[Any, Any]:
    (y,) = rows.bind(*leaves, call=call._replace(kept=True))
    change = _linear("softmax_vjp", (y,), t, call)
    return y, _over_temperature(change, call.arrays(leaves)[2])


def _log_softmax_jvp(leaves: Arrays, t: Any, call: Call) -> tuple[Any, Any]:
    (y,) = rows.bind(*leaves, call=call._replace(kept=True))
    change = _linear("log_softmax_jvp", (y,), t, call)
    where = call.where(leaves)
    change = change if where is None else jnp.where(where, change, 0.0)
    return y, _over_temperature(change, call.arrays(leaves)[2])


def _linear(operation: str, arrays: Arrays, t: Any, call: Call) -> Any:
    """Return a derivative, a function that is linear in `t`."""
    leaves, tree = jax.tree.flatten(((*arrays, t), None))
    (found,) = rows.bind(*leaves, call=call._replace(operation=operation, tree=tree))
    return found


def _transposed(cotangents: list[Any], *leaves: Any, call: Call) -> list[Any]:
    """Transpose such a function."""
    (ct,), t = cotangents, leaves[-1]
    if type(ct) is not ad.Zero:
        *arrays, _ = call.arrays(leaves)
        ct = _linear(_TRANSPOSE[call.operation], tuple(arrays), ct, call)
    return [*[None] * (len(leaves) - 1), ad.Zero(t.aval) if type(ct) is ad.Zero else ct]


ad.primitive_transposes[rows] = _transposed


def _over_temperature(change: Any, scale: Any) -> Any:
    return change if scale is None else change * _fold.inverse_temperature(scale)


def _jvp_of_logits(leaves: Arrays, t: Any, call: Call) -> tuple[Any, Any]:
    """Start from the logits again, so that a gradient of a half type is rounded once."""
    (y,) = rows.bind(*leaves, call=call)
    return y, _linear(f"{call.operation}_jvp", call.arrays(leaves), t, call)


def _loss_jvp(leaves: Arrays, t: Any, call: Call) -> tuple[Any, Any]:
    """Make the gradient beside the loss."""
    loss, grad = rows.bind(*leaves, call=call._replace(operation="cross_entropy_value_and_grad"))
    _, labels, weights, _, _ = call.arrays(leaves)
    (axis,) = call.axes
    parts = []  # an ignored row takes no upstream gradient
    if call.form.ignore_index is not None:
        parts.append(_losses.indices(labels, call.form.ignore_index)[1])
    if weights.samples is not None:
        parts.append(weights.samples != 0)
    for counted in parts:
        t = t if counted is None else jnp.where(jnp.expand_dims(counted, axis), t, 0.0)
    axes = call.axes if call.form.reduction == "none" else range(call.batch, t.ndim)
    return loss, jnp.sum(grad * t, axis=tuple(axes)).astype(loss.dtype)


def _entropy_jvp(leaves: Arrays, t: Any, call: Call) -> tuple[Any, Any]:
    """Make the slopes beside the entropy, in the dtype of the computation."""
    axes, compute, answer = call.static
    of_slopes = call._replace(operation=ENTROPIES[1], static=(axes, compute, compute))
    h, slopes = rows.bind(leaves[0].astype(compute), call=of_slopes)
    change = jnp.sum(slopes * t.astype(compute), axis=call.axes)
    return h.astype(answer), change.astype(answer)


def _divergence_jvp(
    leaves: Arrays, t: list[Any], moving: list[int], call: Call
) -> tuple[list[Any], list[Any]]:
    """Make the slopes beside the divergence, in the dtype of the computation."""
    x, y, scale = call.arrays(leaves)
    axes, compute = call.static
    numbers = call.numbers(leaves)
    factor = jnp.ones((), compute) if scale is None else _fold.inverse_temperature(scale)
    numbers = jnp.stack([factor]) if numbers is None else jnp.append(numbers, factor)
    found = ((x.astype(compute), y.astype(compute), scale, factor), numbers)
    slopes, tree = jax.tree.flatten(found)
    # Of q alone, as of a student's logits, which are all that a distillation differentiates.
    operation, n = (BY_Q, 2) if moving == [1] else (DIVERGENCES[1], 3)
    of_slopes = call._replace(operation=operation, tree=tree, static=(axes, *[compute] * n))
    k, *by = rows.bind(*slopes, call=of_slopes)
    by = by if moving != [0] else by[:1]
    parts = [
        jnp.sum(slope * one.astype(compute), axis=call.axes)
        for slope, one in zip(by, t, strict=True)
    ]
    return [k], [sum(parts[1:], parts[0])]


_OF_LOGITS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "logsumexp": _jvp_of_logits,
    "cross_entropy": _jvp_of_logits,
    "logcumsumexp": _jvp_of_logits,
    "entropy": _entropy_jvp,
}
_FIRST = {
    **_OF_LOGITS,
    "softmax": _softmax_jvp,
    "log_softmax": _log_softmax_jvp,
    "cross_entropy": _loss_jvp,
}


# --------------------------------------------------------------------------- lowering


def _by_handler(*leaves: Any, call: Call) -> list[Any]:
    """Answer by a handler."""
    x, axes = leaves[0], call.axes
    layout = Layout(
        math.prod(x.shape[: min(axes)]),
        math.prod([x.shape[a] for a in axes]),
        math.prod(x.shape[max(axes) + 1 :]),
    )
    if call.of_loss:
        return (_loss_pullback if call.derivative else _loss)(call, layout, leaves)
    buffers = {"x": x, "numbers": call.numbers(leaves), "mask": _mask(call, layout, leaves)}
    if call.operation in (*_OF_AN_OUTPUT, *_RUNNING[1:]):
        buffers["second"] = call.arrays(leaves)[-1]
    elif call.operation in _DIVERGENCES:
        buffers["second"] = call.arrays(leaves)[1]
    elif call.derivative:
        buffers["second"] = call.arrays(leaves)[-1].astype(call.compute)
    results = dict(zip(("out", "grad", "other"), _shapes(*leaves, call=call), strict=False))
    return _handled(call, layout, buffers, results, None)


def _mask(call: Call, layout: Layout, leaves: Arrays) -> Any:
    """Return the mask in one axis that repeats along the logits, or None."""
    where, shape = call.where(leaves), leaves[0].shape
    if where is None:
        return None
    engine = import_module(call.engine)
    same = engine.repeated(where.shape, call.axes, layout, call.compute)
    return jnp.broadcast_to(where.reshape(where.shape[same:]), shape[same:]).reshape(-1)


def _loss(call: Call, layout: Layout, leaves: Arrays, factor: Any = None) -> list[Any]:
    """Let XLA add the losses where vmap asks for several sums, else the handler.

    A factor takes the place of the positions' weights, and ignores none where it is 0.
    """
    (x, labels, weights, _, numbers), form = call.arrays(leaves), call.form
    (axis,), compute, like = call.axes, call.compute, jax.ShapeDtypeStruct
    weight, samples = (a if a is None else a.astype(compute) for a in weights)
    ignore = None
    if form.indices:
        labels, ignore = _labels(labels, layout.n, form.ignore_index, samples)
    else:
        labels = labels.astype(compute)
    each = form.reduction == "none" or call.batch > 0
    positions = x.shape[:axis] + x.shape[axis + 1 :]
    per_sum = math.prod(positions[call.batch :])
    divisors = None
    uneven = any(part is not None for part in (weight, samples, ignore))
    if form.reduction == "mean" and call.batch and uneven:
        if call.operation != "cross_entropy" and x.dtype != compute:
            return _by_xla(*leaves, call=call)  # a half type is divided before it is rounded
        counted = _counted(labels, weight, samples, ignore).reshape(*positions[: call.batch], -1)
        divisors = jnp.sum(counted, axis=-1).astype(compute)
    mean = form.reduction == "mean" and divisors is None
    if weight is None and numbers.label_smoothing is not None:
        weight = jnp.ones(layout.n, compute)
    given = {
        "x": x, "second": labels, "mask": _mask(call, layout, leaves), "weight": weight,
        "samples": samples if factor is None else factor, "numbers": _stacked(numbers, compute),
    }  # fmt: skip
    results = {"out": like(positions if each else (), compute)}
    if call.operation == "cross_entropy_value_and_grad":
        results["grad"] = like(x.shape, x.dtype)
    loss = _handlers(call.engine).Loss(
        form.indices, each, mean, ignore, 1.0 / per_sum if mean else 1.0,
        weights.classes is not None, numbers.softcap is not None,
    )  # fmt: skip
    value, *grad = _handled(call, layout, given, results, loss)
    if each and form.reduction != "none":
        value = jnp.sum(value, axis=tuple(range(call.batch, value.ndim)))
        if mean:
            value = value / per_sum
    if divisors is not None:
        none = divisors == 0
        value = jnp.where(none, jnp.nan, value / jnp.where(none, 1.0, divisors))
        scale = jnp.where(none, 0.0, 1.0 / jnp.where(none, 1.0, divisors))
        scale = jnp.expand_dims(scale, tuple(range(call.batch, x.ndim)))
        grad = [(g.astype(compute) * scale).astype(g.dtype) for g in grad]
    return [value.astype(form.answer), *grad]


def _loss_pullback(call: Call, layout: Layout, leaves: Arrays) -> list[Any]:
    """Let upstream be the weights of the positions: the gradient is multiplied, then rounded."""
    (x, labels, weights, where, numbers, dy), form = call.arrays(leaves), call.form
    if _soft(form.indices, numbers.label_smoothing):
        return _by_xla(*leaves, call=call)
    (axis,), compute, samples = call.axes, call.compute, weights.samples
    positions = x.shape[:axis] + x.shape[axis + 1 :]
    batch = positions[: call.batch]
    factor = dy.astype(compute)
    if form.reduction == "mean":
        known = form.ignore_index is None and weights.classes is None and samples is None
        divisor = jnp.asarray(math.prod(positions[call.batch :]), compute)
        if not known:
            own, ignore = _labels(labels, layout.n, form.ignore_index, samples)
            counted = _counted(own, weights.classes, samples, ignore)
            divisor = jnp.sum(counted.reshape(*batch, -1), axis=-1).astype(compute)
        factor = jnp.where(divisor == 0, 0.0, factor / jnp.where(divisor == 0, 1.0, divisor))
    if form.reduction != "none":
        factor = jnp.expand_dims(factor, tuple(range(call.batch, len(positions))))
    factor = jnp.broadcast_to(factor, positions)
    factor = factor if samples is None else factor * samples.astype(compute)
    found, tree = jax.tree.flatten(((x, labels, weights, where, numbers), None))
    one = call._replace(
        operation="cross_entropy_value_and_grad", tree=tree,
        static=(form._replace(reduction="none", gradient=x.dtype),),
    )  # fmt: skip
    return _loss(one, layout, tuple(found), factor)[1:]


def _stacked(numbers: Any, compute: Any) -> Any:
    """Return smoothing, z and softcap in one array; None where there is none."""
    if all(number is None for number in numbers):
        return None
    return jnp.stack([jnp.zeros((), compute) if a is None else a for a in numbers])


def _labels(labels: Any, n: int, ignore_index: int | None, samples: Any) -> tuple[Any, int | None]:
    """Return the labels as int32, and what is ignored among them.

    If they are of another dtype, or positions have weights, a label without a class becomes n, and
    one that is ignored, or whose position has the weight 0, -1.
    """
    limits = jnp.iinfo(labels.dtype)
    ignores = ignore_index is not None and limits.min <= ignore_index <= limits.max
    if labels.dtype == jnp.int32 and samples is None:
        return labels, ignore_index if ignores else None
    has_class = labels >= 0
    if n <= limits.max:
        has_class &= labels < n
    found = jnp.where(has_class, jnp.where(has_class, labels, 0).astype(jnp.int32), n)
    if ignores:
        found = jnp.where(labels == jnp.asarray(ignore_index, labels.dtype), -1, found)
    if samples is not None:
        found = jnp.where(samples == 0, -1, found)
    return found, -1 if ignores or samples is not None else None


def _counted(labels: Any, weight: Any, samples: Any, ignore: int | None) -> Any:
    """Return what each label counts in the mean."""
    counted = jnp.ones(labels.shape, bool) if ignore is None else labels != ignore
    if weight is not None:
        counted = jnp.where(counted, jnp.take(weight, labels, mode="clip"), 0.0)
    return counted if samples is None else jnp.where(counted != 0, counted * samples, 0.0)


def _handled(
    call: Call, layout: Layout, given: dict[str, Any], results: dict[str, Any], loss: Any
) -> list[Any]:
    """Call a handler."""
    handlers, buffers = _handlers(call.engine), {**given, **results}
    used = {role: buffers[role] for role in handlers.ROLES if buffers.get(role) is not None}
    target = handlers.target(_register, call.operation, layout, used, loss)
    arguments = [a for role, a in used.items() if role not in results]
    out = [jax.ShapeDtypeStruct(a.shape, a.dtype) for r, a in used.items() if r in results]
    over = None if call.over is None else {call.over: 0}
    found = jax.ffi.ffi_call(target.name, out, input_output_aliases=over)
    return list(found(*arguments, plan=target.plan))


def _register(name: str, address: int) -> None:
    capsule = jax.ffi.pycapsule(address)
    jax.ffi.register_ffi_target(name, capsule, platform="cpu", api_version=1)


def _lowered(context: Any, *values: Any, call: Call, on_cpu: bool) -> Any:
    native = on_cpu and _is_alone(context.module_context) and 0 not in context.avals_in[0].shape
    native = native and not call.operation.endswith("_jvp")  # forward mode has no kernel
    function = _by_handler if native else _by_xla
    if native and (i := _written_over(call, context.avals_in)) is not None and _is_new(values[i]):
        call = call._replace(over=i)
    lower = mlir.lower_fun(partial(function, call=call), multiple_results=True)
    return lower(context, *values)


# What an answer may be written over: logits and upstream gradients, which are rarely read again.
# XLA copies one that is.
_OVER = {
    "softmax": 0,
    "log_softmax": 0,
    "softmax_vjp": 1,
    "log_softmax_vjp": 1,
    "log_softmax_pullback": 1,
}


def _written_over(call: Call, avals: Any) -> int | None:
    """Return the array that may be written over; None where that has been seen to be slower.

    Fresh memory takes as long as the work. But where the answer is kept, it is what comes next
    that is given fresh memory.
    """
    i = None if call.kept else _OVER.get(call.operation)
    (out,) = _shapes(*avals, call=call) if i is not None else (None,)
    return i if out is not None and out.dtype == avals[i].dtype else None


def _is_new(value: Any) -> bool:
    """Return whether a program has made an array by arithmetic; XLA copies another one."""
    return getattr(value.owner, "name", "") in _ARITHMETIC  # an argument's owner has no name


_ARITHMETIC = {
    f"stablehlo.{name}"
    for name in ("add", "subtract", "multiply", "divide", "select", "dot_general", "convert")
}


def _is_alone(module: Any) -> bool:
    """Return whether a program runs where it is compiled, on one device."""
    devices = getattr(module.axis_context, "num_devices", None)
    return devices == 1 and not getattr(module.lowering_parameters, "for_export", True)


# A lowering that JAX keeps for other calls doesn't see what has made the arrays of this one.
_OF_THIS_CALL: dict[str, Any] = {"cacheable": False}
if "cacheable" not in signature(mlir.register_lowering).parameters:
    _OF_THIS_CALL = {}
for _platform in (None, "cpu"):
    _lower = partial(_lowered, on_cpu=_platform == "cpu")
    mlir.register_lowering(rows, _lower, platform=_platform, **_OF_THIS_CALL)
