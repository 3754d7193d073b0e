"""The kernels of Numba as native handlers that XLA calls on a CPU, and their derivatives.

A call is one primitive, `rows`, with two lowerings. Where XLA compiles for one CPU, its rows go to
a handler; for every other platform, for several devices and for `jax.export` it is the function
of `_rules` or `_losses` that the call would otherwise have been. So a traced call need not
know what it is compiled for. The first derivative is made of the kernels' answers, and every other
one is JAX's of that function.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jax.interpreters import ad, batching, mlir

from portable_softmax.kernels import _jax
from portable_softmax.kernels._jax import _losses, _rules
from portable_softmax.kernels._request import LOSSES, Request

Arrays = tuple[Any, ...]


class Call(NamedTuple):
    """What a call is compiled for."""

    engine: str  # the module that has the handlers
    operation: str
    tree: Any  # of the arrays
    static: tuple[Any, ...]  # of a `_jax.Program`
    batch: int = 0  # axes that vmap has put before those of the logits, labels and gradients

    @property
    def form(self) -> Any:
        """What a loss is compiled for."""
        return self.static[0]

    @property
    def axes(self) -> tuple[int, ...]:
        """The reduced axes."""
        axes = (self.form.axis,) if self.operation in LOSSES else self.static[0]
        return tuple(a + self.batch for a in axes)

    def arrays(self, leaves: Arrays) -> Any:
        """Return the arrays as the function takes them."""
        return jax.tree.unflatten(self.tree, leaves)


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
    ours = _handlers(engine).API
    try:
        header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
        found = re.findall(r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", header)
    except (OSError, RuntimeError):
        found = []
    if tuple(map(int, found)) != ours:
        return f"XLA's FFI has the version {'.'.join(found) or 'unknown'}, handlers that of {ours}"
    return ""


def _handlers(engine: str) -> Any:
    return import_module(f"{engine}._ffi")


# --------------------------------------------------------------------------- the primitive


def answer(engine: Any, request: Request) -> Any:
    """Answer by the primitive, in one compiled call."""
    _, arrays, static = _jax.program(request)
    leaves, tree = jax.tree.flatten(arrays)
    found = _compiled(*leaves, call=Call(engine.__name__, request.operation, tree, static))
    return tuple(found) if len(found) > 1 else found[0]


rows = import_module("jax.extend.core").Primitive("portable_softmax_rows")
rows.multiple_results = True


@partial(jax.jit, static_argnames="call")
def _compiled(*leaves: Any, call: Call) -> Any:
    return rows.bind(*leaves, call=call)


def _eager(*leaves: Any, call: Call) -> Any:
    with jax.disable_jit(False):
        return _compiled(*leaves, call=call)


def _by_xla(*leaves: Any, call: Call) -> list[Any]:
    """Answer by the function of `_rules` or `_losses`."""
    module = _losses if call.operation in LOSSES else _rules
    function = getattr(module, call.operation)

    def one(*leaves: Any) -> list[Any]:
        found = function(*call.arrays(leaves), *call.static)
        return list(found) if isinstance(found, tuple) else [found]

    batched = tuple(0 if own else None for own in _of_rows(call))
    for _ in range(call.batch):
        one = jax.vmap(one, in_axes=batched)
    return one(*leaves)


def _of_rows(call: Call) -> tuple[bool, ...]:
    """Return which leaves belong to the rows: the logits, and labels or an upstream gradient."""
    names = call.tree.unflatten(range(call.tree.num_leaves))
    second = names[1] if call.operation in LOSSES or call.operation.endswith("_vjp") else None
    return tuple(i in (0, second) for i in range(call.tree.num_leaves))


def _shapes(x: Any, *others: Any, call: Call) -> list[Any]:
    aval = jax.core.ShapedArray
    if call.operation not in LOSSES:
        shape = [1 if a in call.axes and call.operation == "logsumexp" else n
                 for a, n in enumerate(x.shape)]  # fmt: skip
        return [aval(tuple(shape), jnp.dtype(call.static[-1]))]
    (axis,), form = call.axes, call.form
    shape = x.shape[:axis] + x.shape[axis + 1 :]
    loss = shape if form.reduction == "none" else shape[: call.batch]
    found = [aval(loss, jnp.dtype(form.answer)), aval(x.shape, jnp.dtype(form.gradient))]
    return found[:1] if call.operation == "cross_entropy" else found


rows.def_impl(_eager)
rows.def_abstract_eval(_shapes)


# --------------------------------------------------------------------------- transforms


def _vmap(leaves: Arrays, axes: Arrays, *, call: Call) -> tuple[list[Any], list[int]]:
    own = _of_rows(call)
    size = next(a.shape[i] for a, i in zip(leaves, axes, strict=True) if i is not None)
    if any(i is not None for i, mine in zip(axes, own, strict=True) if not mine):
        found = jax.vmap(partial(_by_xla, call=call), in_axes=tuple(axes))(*leaves)
        return found, [0] * len(found)
    leaves = tuple(
        a
        if not mine
        else jnp.broadcast_to(a, (size, *a.shape))
        if i is None
        else jnp.moveaxis(a, i, 0)
        for a, i, mine in zip(leaves, axes, own, strict=True)
    )
    found = rows.bind(*leaves, call=call._replace(batch=call.batch + 1))
    return found, [0] * len(found)


batching.primitive_batchers[rows] = _vmap


def _jvp(primals: Arrays, tangents: Arrays, *, call: Call) -> tuple[list[Any], list[Any]]:
    moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]
    x, rule = primals[0], _FIRST.get(call.operation)
    compute = call.form.compute if call.operation in LOSSES else call.static[1]
    if rule is not None and moving == [0] and x.dtype == compute:
        found, change = rule(primals, tangents[0], call)
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
    (y,) = rows.bind(*leaves, call=call)
    return y, y * (t - jnp.sum(y * t, axis=call.axes, keepdims=True))


def _log_softmax_jvp(leaves: Arrays, t: Any, call: Call) -> tuple[Any, Any]:
    (y,) = rows.bind(*leaves, call=call)
    return y, t - jnp.sum(jnp.exp(y) * t, axis=call.axes, keepdims=True)


def _logsumexp_jvp(leaves: Arrays, t: Any, call: Call) -> tuple[Any, Any]:
    """Its derivative is softmax; a row of an infinite maximum has the derivative 0."""
    (y,) = rows.bind(*leaves, call=call)
    (p,) = rows.bind(*leaves, call=call._replace(operation="softmax"))
    p = jnp.where(jnp.isinf(y), 0.0, p)
    return y, jnp.sum(p * t, axis=call.axes, keepdims=True)


def _loss_jvp(leaves: Arrays, t: Any, call: Call) -> tuple[Any, Any]:
    """Make the gradient beside the loss."""
    loss, grad = rows.bind(*leaves, call=call._replace(operation="cross_entropy_value_and_grad"))
    if call.form.ignore_index is not None:  # an ignored row takes no upstream gradient
        labels = call.arrays(leaves)[1]
        _, counted = _losses.indices(labels, call.axes[0], call.form.ignore_index)
        t = t if counted is None else jnp.where(counted, t, 0.0)
    axes = call.axes if call.form.reduction == "none" else range(call.batch, t.ndim)
    return loss, jnp.sum(grad * t, axis=tuple(axes)).astype(loss.dtype)


_FIRST: dict[str, Callable[..., tuple[Any, Any]]] = {
    "softmax": _softmax_jvp,
    "log_softmax": _log_softmax_jvp,
    "logsumexp": _logsumexp_jvp,
    "cross_entropy": _loss_jvp,
}


# --------------------------------------------------------------------------- lowering


def _by_handler(*leaves: Any, call: Call) -> list[Any]:
    """Answer by a handler."""
    x, axes = leaves[0], call.axes
    outer, n, inner = (
        math.prod(part)
        for part in (x.shape[: min(axes)], [x.shape[a] for a in axes], x.shape[max(axes) + 1 :])
    )
    layout, like = (outer, n, inner), jax.ShapeDtypeStruct
    if call.operation not in LOSSES:
        (out,) = _shapes(*leaves, call=call)
        return _handled(call, layout, leaves, [like(out.shape, out.dtype)], None)
    return _loss(call, layout, leaves)


def _loss(call: Call, layout: tuple[int, int, int], leaves: Arrays) -> list[Any]:
    """Let XLA add the losses where vmap asks for several sums, else the handler."""
    (x, labels, *_), form, like = call.arrays(leaves), call.form, jax.ShapeDtypeStruct
    (axis,) = call.axes
    labels, ignore = _labels(labels, layout[1], form.ignore_index)
    each = form.reduction == "none" or call.batch > 0
    positions = x.shape[:axis] + x.shape[axis + 1 :]
    per_sum = math.prod(positions[call.batch :])
    divisors = None
    if form.reduction == "mean" and call.batch and ignore is not None:
        if call.operation != "cross_entropy" and x.dtype != form.compute:
            return _by_xla(*leaves, call=call)  # a half type is divided before it is rounded
        counted = (labels != ignore).reshape(*positions[: call.batch], -1)
        divisors = jnp.sum(counted, axis=-1).astype(form.compute)
    mean = form.reduction == "mean" and divisors is None
    results = [like(positions if each else (), form.compute)]
    if call.operation == "cross_entropy_value_and_grad":
        results.append(like(x.shape, x.dtype))
    handlers = _handlers(call.engine)
    loss = handlers.Loss(each, mean, ignore, 1.0 / per_sum if mean else 1.0)
    value, *grad = _handled(call, layout, (x, labels), results, loss)
    if each and form.reduction != "none":
        value = jnp.sum(value, axis=tuple(range(call.batch, value.ndim)))
        if mean:
            value = value / per_sum
    if divisors is not None:
        value = value / divisors
        scale = jnp.where(divisors == 0, 0.0, 1.0 / jnp.where(divisors == 0, 1.0, divisors))
        scale = scale.reshape(scale.shape + (1,) * (x.ndim - call.batch))
        grad = [(g.astype(form.compute) * scale).astype(g.dtype) for g in grad]
    return [value.astype(form.answer), *grad]


def _labels(labels: Any, n: int, ignore_index: int | None) -> tuple[Any, int | None]:
    """Return the labels as int32, and what is ignored among them.

    Of another dtype, a label without a class becomes n, and one that is ignored -1.
    """
    limits = jnp.iinfo(labels.dtype)
    ignores = ignore_index is not None and limits.min <= ignore_index <= limits.max
    if labels.dtype == jnp.int32:
        return labels, ignore_index if ignores else None
    has_class = labels >= 0
    if n <= limits.max:
        has_class &= labels < n
    found = jnp.where(has_class, jnp.where(has_class, labels, 0).astype(jnp.int32), n)
    if not ignores:
        return found, None
    return jnp.where(labels == jnp.asarray(ignore_index, labels.dtype), -1, found), -1


def _handled(
    call: Call, layout: tuple[int, int, int], arrays: Arrays, results: list[Any], loss: Any
) -> list[Any]:
    """Call a handler."""
    sizes = [math.prod(a.shape) for a in (*arrays, *results)]
    target = _handlers(call.engine).target(
        _register, call.operation, arrays[0].dtype.name, layout, sizes, loss
    )
    return list(jax.ffi.ffi_call(target.name, results)(*arrays, plan=target.plan))


def _register(name: str, address: int) -> None:
    capsule = jax.ffi.pycapsule(address)
    jax.ffi.register_ffi_target(name, capsule, platform="cpu", api_version=1)


def _lowered(context: Any, *values: Any, call: Call, on_cpu: bool) -> Any:
    native = on_cpu and _is_alone(context.module_context) and 0 not in context.avals_in[0].shape
    function = _by_handler if native else _by_xla
    lower = mlir.lower_fun(partial(function, call=call), multiple_results=True)
    return lower(context, *values)


def _is_alone(module: Any) -> bool:
    """Return whether a program runs where it is compiled, on one device."""
    devices = getattr(module.axis_context, "num_devices", None)
    return devices == 1 and not getattr(module.lowering_parameters, "for_export", True)


mlir.register_lowering(rows, partial(_lowered, on_cpu=False))
mlir.register_lowering(rows, partial(_lowered, on_cpu=True), platform="cpu")
