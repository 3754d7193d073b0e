"""The kernels of Numba as native handlers that XLA calls on a CPU, and their derivatives.

A call is one primitive, `rows`, with two lowerings. Where XLA compiles for one CPU, its rows go to
a handler; for every other platform, for several devices and for `jax.export` it is the function
of `_rules`, `_family` or `_losses` that the call would otherwise have been. So a traced call need
not know what it is compiled for. The first derivative is made of the kernels' answers, and every
other one is JAX's of that function.
"""

from __future__ import annotations

import re
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
from jax import numpy as jnp

from portable_softmax.kernels import _jax
from portable_softmax.kernels._jax import (
    _family,
    _lowering,  # noqa: F401 - it registers itself
    _sinks,
    _transforms,
)
from portable_softmax.kernels._jax._call import Arrays, Call, are_soft, handlers_of, rows
from portable_softmax.kernels._jax._fold import compiled
from portable_softmax.kernels._request import BINARY, DIVERGENCES, FOLD, LOSSES, SIGNED, Request

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
    if "b" in request.active:
        said = ["its gradient is left to XLA: weights", *said]
    if request.operation == "cross_entropy" and dtype != request.compute_dtype:
        smoothing = request.options.label_smoothing or None
        if are_soft(request.indices, smoothing):
            said = [f"its gradient is left to XLA: {dtype} and soft labels", *said]
    return "; ".join(said)


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
        handlers = handlers_of(engine)
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


# --------------------------------------------------------------------------- answers


def answer(engine: Any, request: Request) -> Any:
    """Answer by the primitive, in one compiled call."""
    _, arrays, static = _jax.program(request)
    if request.operation == "logmeanexp":
        leaves, tree = jax.tree.flatten((arrays, None))
        return _compiled_mean(*leaves, call=Call(engine.__name__, FOLD, tree, static))
    if request.operation in DIVERGENCES:
        return _divergence(engine.__name__, request, arrays, static)
    if request.operation == "logsumexp" and {"b", "return_sign"} & {*request.active}:
        return _weighted(engine.__name__, *arrays, *static)
    if "sink" in request.active:
        return _beside_sink(engine.__name__, request, arrays, static)
    leaves, tree = jax.tree.flatten((arrays, _temperature(engine.__name__, request)))
    found = _compiled(*leaves, call=Call(engine.__name__, request.operation, tree, static))
    return tuple(found) if len(found) > 1 else found[0]


def _weighted(
    engine: str, x: Any, b: Any, where: Any, axes: Any, compute: Any, answer: Any, with_sign: bool
) -> Any:
    """Answer with the logarithm of weighted terms, or with a sign beside it."""
    if b is None:
        leaves, tree = jax.tree.flatten(((x, where), None))
        call = Call(engine, "logsumexp", tree, (axes, compute, answer))
        return _compiled_sign(*leaves, call=call)
    call = Call(engine, SIGNED, jax.tree.structure(((x, b), None)), (axes, compute))
    return _compiled_weighted(x, b, where, call=call, rest=(answer, with_sign))


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


def _beside_sink(engine: str, request: Request, arrays: Arrays, static: Any) -> Any:
    """Answer without the share of the sink, which derivatives need."""
    x, sink, where, scale = arrays
    leaves, tree = jax.tree.flatten(((x, where, scale, sink), _temperature(engine, request)))
    operation = f"{request.operation}_beside_sink"
    return _compiled_beside_sink(*leaves, call=Call(engine, operation, tree, static))


def _temperature(engine: str, request: Request) -> Any:
    """Return a temperature as the kernels take it, so that no value is compiled in."""
    value = 1.0 if request.operation in (*LOSSES, *BINARY) else request.options.temperature
    return None if value == 1.0 else _jax.put(request, _prepared(engine, request))


def _prepared(engine: str, request: Request) -> Any:
    dtype = jnp.dtype(request.compute_dtype).type
    return handlers_of(engine).temperature(request.options.temperature, dtype)


@compiled("call")
def _compiled(*leaves: Any, call: Call) -> Any:
    return rows.bind(*leaves, call=call)


@compiled("call", "rest")
def _compiled_divergence(*leaves: Any, distilled: Any, call: Call, rest: Any) -> Any:
    each, *grads = rows.bind(*leaves, call=call)
    return _family.reduced(each, distilled, *rest), *grads


@compiled("call")
def _compiled_beside_sink(*leaves: Any, call: Call) -> Any:
    (x, *others, sink), numbers = jax.tree.unflatten(call.tree, leaves)
    axes, compute, _ = call.static
    each = _sinks.of_rows(sink, x, axes, compute)
    leaves = jax.tree.leaves(((x, *others, each), numbers))
    return rows.bind(*leaves, call=call)[0]


@compiled("call")
def _compiled_sign(*leaves: Any, call: Call) -> Any:
    (value,) = rows.bind(*leaves, call=call)
    return _family.beside_sign(value, value.dtype)


@compiled("call", "rest")
def _compiled_weighted(x: Any, b: Any, where: Any, call: Call, rest: Any) -> Any:
    def signed(x: Any, b: Any) -> Any:
        return tuple(rows.bind(x, b, call=call))

    return _family.weighted_by(signed, x, b, where, *call.static, *rest)


@compiled("call")
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
    t, whole = _transforms.counted(tangents[0], leaves, call), call._replace(operation="logsumexp")
    return _mean(call, *leaves), _transforms.jvp_of_logits(leaves, t, whole)[1]


def _eager(*leaves: Any, call: Call) -> Any:
    with jax.disable_jit(False):
        return _compiled(*leaves, call=call)


rows.def_impl(_eager)
