"""How the primitive `rows` is compiled: for one CPU by a handler, elsewhere by XLA."""

from __future__ import annotations

import math
from functools import partial
from importlib import import_module
from inspect import signature
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.interpreters import mlir

from portable_softmax.kernels._jax._call import (
    CHANGES_BESIDE_SINKS,
    DIVERGENCES_OF_ROWS,
    OF_AN_OUTPUT,
    RUNNING_SUMS,
    Arrays,
    Call,
    are_soft,
    by_xla,
    handlers_of,
    rows,
    shapes,
)
from portable_softmax.kernels._jax._family import signed_from_sums
from portable_softmax.kernels._request import BESIDE_SINKS, BINARY, SIGNED, WITH_SLOPES, Layout

FORWARD = "logsumexp_jvp"


def _by_handler(*leaves: Any, call: Call) -> list[Any]:
    """Answer by a handler."""
    if call.of_entries:
        return _of_entries(call, leaves)
    x, axes = leaves[0], call.axes
    layout = Layout(
        math.prod(x.shape[: min(axes)]),
        math.prod([x.shape[a] for a in axes]),
        math.prod(x.shape[max(axes) + 1 :]),
    )
    if call.of_loss:
        return (_loss_pullback if call.derivative else _loss)(call, layout, leaves)
    if call.operation in BESIDE_SINKS[2:]:
        return _through_sinks(call, layout, leaves)
    if call.operation == FORWARD:
        return _logsumexp_jvp(call, leaves)
    if call.operation == SIGNED:
        return _signed(call, layout, leaves)
    buffers = {"x": x, "numbers": call.numbers(leaves), "mask": _mask(call, layout, leaves)}
    if call.operation in (*OF_AN_OUTPUT, *RUNNING_SUMS[1:]):
        buffers["second"] = call.arrays(leaves)[-1]
    elif call.operation in DIVERGENCES_OF_ROWS:
        buffers["second"] = call.arrays(leaves)[1]
    elif call.operation in BESIDE_SINKS:
        buffers["weight"] = call.arrays(leaves)[-1]
    elif call.derivative:
        buffers["second"] = call.arrays(leaves)[-1].astype(call.compute)
    results = dict(zip(("out", "grad", "other"), shapes(*leaves, call=call), strict=False))
    return _handled(call, layout, buffers, results, None)


def _through_sinks(call: Call, layout: Layout, leaves: Arrays) -> list[Any]:
    """Let the kernel sum upstream gradients: a sink takes its share with the other sign."""
    y, share, of_share, dy = call.arrays(leaves)
    if of_share is not None:
        return by_xla(*leaves, call=call)
    given = {"x": y, "second": dy.astype(y.dtype), "weight": share}
    results = dict(zip(("out", "grad"), shapes(*leaves, call=call), strict=True))
    dx, sums = _handled(call, layout, given, results, None)
    share = jnp.exp(share) if call.operation.startswith("log") else share
    return [dx, -share * sums]


def _logsumexp_jvp(call: Call, leaves: Arrays) -> list[Any]:
    """Let XLA sum the change of each logit, which the kernel has the slopes for."""
    (x, where, t), (axes, compute, answer) = call.arrays(leaves), call.static
    found, tree = jax.tree.flatten(((x.astype(compute), where), None))
    static = axes, compute, compute
    _, slopes = _by_handler(
        *found, call=call._replace(operation=WITH_SLOPES, tree=tree, static=static)
    )
    change = jnp.sum(slopes * t.astype(compute), axis=call.axes, keepdims=True)
    return [change.astype(answer)]


def _signed(call: Call, layout: Layout, leaves: Arrays) -> list[Any]:
    """Let the kernel sum. Rows with +inf, an infinite weight or a nan have XLA do it all."""
    x, b = call.arrays(leaves)
    shape = [n for a, n in enumerate(x.shape) if a not in call.axes]
    results = {role: jax.ShapeDtypeStruct(shape, call.compute) for role in ("out", "grad", "other")}
    sums = _handled(call, layout, {"x": x, "weight": _repeated(call, layout, b, x)}, results, None)
    m, at_max, others = sums
    fit = jnp.all((m < math.inf) & jnp.isfinite(at_max + others))
    found = lax.cond(
        fit, lambda: signed_from_sums(*sums), lambda: tuple(by_xla(*leaves, call=call))
    )
    return list(found)


def _of_entries(call: Call, leaves: Arrays) -> list[Any]:
    """Let XLA add the losses where vmap asks for several sums, else the handler."""
    (x, labels, weight, yeses, numbers), form = call.arrays(leaves), call.form
    compute, like, reduced = call.compute, jax.ShapeDtypeStruct, form.reduction != "none"
    each, mean = not reduced or call.batch > 0, form.reduction == "mean"
    per_sum = math.prod(x.shape[call.batch :])
    weight, yeses = (
        a if a is None else jnp.broadcast_to(a.astype(compute), x.shape) for a in (weight, yeses)
    )
    given = {
        "x": x, "second": labels.astype(compute), "weight": weight, "samples": yeses,
        "numbers": numbers,
    }  # fmt: skip
    results = {"out": like(x.shape if each else (), compute)}
    if call.operation == BINARY[1]:
        results["grad"] = like(x.shape, x.dtype)
    scale = 1.0 / per_sum if mean else 1.0
    loss = handlers_of(call.engine).Loss(True, each, mean and not each, None, scale, False, False)
    value, *grad = _handled(call, Layout(math.prod(x.shape), 1, 1), given, results, loss)
    if each and reduced:
        value = jnp.sum(value, axis=tuple(range(call.batch, x.ndim)))
        value = value / per_sum if mean else value
    return [value.astype(form.answer), *grad]


def _mask(call: Call, layout: Layout, leaves: Arrays) -> Any:
    """Return the mask in one axis that repeats along the logits, or None."""
    where = call.where(leaves)
    return None if where is None else _repeated(call, layout, where, leaves[0])


def _repeated(call: Call, layout: Layout, a: Any, x: Any) -> Any:
    """Return what broadcasts to the logits in one axis that repeats along them."""
    same = import_module(call.engine).repeated(a.shape, call.axes, layout, call.compute)
    return jnp.broadcast_to(a.reshape(a.shape[same:]), x.shape[same:]).reshape(-1)


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
            return by_xla(*leaves, call=call)  # a half type is divided before it is rounded
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
    loss = handlers_of(call.engine).Loss(
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
    if are_soft(form.indices, numbers.label_smoothing):
        return by_xla(*leaves, call=call)
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
    handlers, buffers = handlers_of(call.engine), {**given, **results}
    used = {role: buffers[role] for role in handlers.ROLES if buffers.get(role) is not None}
    target = handlers.target(register, call.operation, layout, used, loss)
    arguments = [a for role, a in used.items() if role not in results]
    out = [jax.ShapeDtypeStruct(a.shape, a.dtype) for r, a in used.items() if r in results]
    over = None if call.over is None else {call.over: 0}
    found = jax.ffi.ffi_call(target.name, out, input_output_aliases=over)
    return list(found(*arguments, plan=target.plan))


def register(name: str, address: int) -> None:
    capsule = jax.ffi.pycapsule(address)
    jax.ffi.register_ffi_target(name, capsule, platform="cpu", api_version=1)


def _lowered(context: Any, *values: Any, call: Call, on_cpu: bool) -> Any:
    native = on_cpu and _is_alone(context.module_context) and 0 not in context.avals_in[0].shape
    # Forward mode has no other kernel.
    native = native and (call.operation == FORWARD or not call.operation.endswith("_jvp"))
    native = native and call.operation not in CHANGES_BESIDE_SINKS
    function = _by_handler if native else by_xla
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
    (out,) = shapes(*avals, call=call) if i is not None else (None,)
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
