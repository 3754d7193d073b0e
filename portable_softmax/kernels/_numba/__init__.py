"""Fused row kernels in Numba: a row is read from memory once and worked on in cache.

This module loads nothing but NumPy. The kernels behind it are compiled when an array that is
large enough to be worth it first needs them, one operation, dtype and layout at a time.
"""

from __future__ import annotations

from functools import cache, partial
from importlib import import_module
from typing import Any

import numpy as np

from portable_softmax.kernels import _means, _weighted
from portable_softmax.kernels._numba import _support
from portable_softmax.kernels._request import (
    BINARY,
    DIVERGENCES,
    LOSSES,
    RUNNING,
    VJPS,
    Layout,
    Request,
)

# Rows across memory are copied to a tile, which has to stay small.
LONGEST_ACROSS = 1 << 14

# What the kernels read, and as what they are handed over.
HANDED: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.uint16),
    "bfloat16": np.dtype(np.int16),
}

TENSORS = False  # kernels on NumPy's arrays
ANY_LAYOUT = ()  # the operations that are never declined

missing = _support.missing


def remark(request: Request) -> str:
    """Return what `explain` says of a call that is taken: what it waits for; empty if nothing."""
    answer = globals()[request.operation]
    waiting = _compiled().waited_for(partial(answer, request))
    said = [f"compiles {', '.join(waiting)} first, a second or so each"] if waiting else []
    return "; ".join([*said, *remarks_of_folders()])


def remarks_of_folders() -> list[str]:
    """Return what there is to say of where compiled kernels are kept."""
    found = import_module("portable_softmax.kernels._numba._folders").folders()
    said = [f"{why}: no compiled code is loaded from there" for why in found.refused]
    if found.written is None and not found.read:
        said.append("compiled in each process, for seconds, as no folder can keep it")
    return said


def declines(request: Request, asked: bool) -> str:
    """Return why a call is left to the next kernel."""
    x = request.x
    if why := declines_options(request):
        return why
    arrays = [a for a in (x, request.dy, request.out) if a is not None]
    if not all(a.flags.c_contiguous and a.flags.aligned for a in arrays):
        return "not in C order"
    if request.operation in _OF_TWO and request.dy.dtype != x.dtype:
        return f"dtypes: {x.dtype} and {request.dy.dtype}"
    if request.operation in (*BINARY, *RUNNING):
        return _support.refusal()
    if request.labels is not None and not request.labels.dtype.isnative:
        return f"dtype of labels: {request.labels.dtype}"
    return declines_shape(x.shape, request.axes)


def declines_options(request: Request) -> str:
    """Return why an operation is not taken with options that another is taken with."""
    if "dtype" in request.active and request.operation not in _OF_LOSSES:
        return "dtype of the answer"
    if request.operation not in LOSSES:
        return ""
    # Each of these is a number for each class or position, and a pass reads one of them.
    read = [name for name in _READ if name in request.active]
    if "label_smoothing" in request.active and {"where", "sample_weight", "softcap"} & {*read}:
        return f"options together: {', '.join(read)}"
    if not request.indices and read:
        return f"probabilities with {', '.join(read)}"
    cap = request.options.softcap
    if cap is not None and not 2.0**-60 < cap < 2.0**60:
        return f"a softcap of {cap}"
    return ""


_OF_LOSSES = (*LOSSES, *DIVERGENCES, *BINARY)
_OF_TWO = (*VJPS, *DIVERGENCES, RUNNING[1])
_READ = ("weight", "label_smoothing", "where", "sample_weight", "softcap")


def declines_shape(shape: tuple[int, ...], axes: tuple[int, ...]) -> str:
    """Return why arrays of a shape are left to the next kernel, in C order too."""
    if not axes:  # entry by entry
        return _support.refusal()
    first, last = min(axes), max(axes)
    if last - first + 1 != len(axes):
        return "axes apart from each other"
    n = inner = 1
    for a in axes:  # torch.compile traces no math.prod of its sizes
        n *= shape[a]
    for size in shape[last + 1 :]:
        inner *= size
    if inner > 1 and n > LONGEST_ACROSS:
        return f"{n:,} classes along an axis that is not the last"
    return _support.refusal()


@cache
def _compiled() -> Any:
    return import_module("portable_softmax.kernels._numba._driver")


class _Alias:
    """The memory of a read-only array, as one that may be written.

    Numba tells their types apart and would compile everything twice. The kernels write to their
    outputs alone.
    """

    def __init__(self, x: Any) -> None:
        self.owner = x
        self.__array_interface__ = {
            "shape": x.shape,
            "typestr": x.dtype.str,
            "data": (x.__array_interface__["data"][0], False),
            "version": 3,
        }


@cache
def _bits(dtype: Any) -> Any:
    """Return as what a dtype is handed over; the name of a dtype takes NumPy a microsecond."""
    return HANDED[dtype.name]


def _handed(x: Any, layout: Layout) -> Any:
    """Return an array as the kernels take it."""
    outer, n, inner = layout
    x = np.asarray(x).view(_bits(x.dtype))
    x = x.reshape((outer, n) if inner == 1 else (outer * n, inner))
    return x if x.flags.writeable else np.asarray(_Alias(x))


def _layout(request: Request) -> Layout:
    found = request.layout()
    assert found is not None  # declined
    return found


def _out(request: Request) -> Any:
    """Return the array that an answer of the shape of `x` is written to."""
    return np.empty(request.x.shape, request.result_dtype) if request.out is None else request.out


def _mask(request: Request, layout: Layout) -> Any:
    """Return the mask as bytes in one axis that repeat along the logits, None without a mask."""
    where, shape = request.options.where, request.x.shape
    if where is None:
        return None
    lengths = (1,) * (len(shape) - where.ndim) + where.shape
    same = repeated(lengths, request.axes, layout, request.compute_dtype)
    where = np.ascontiguousarray(np.broadcast_to(where.reshape(lengths[same:]), shape[same:]))
    where = where if where.flags.writeable else np.asarray(_Alias(where))
    return where.view(np.uint8).reshape(-1)


def repeated(
    lengths: tuple[int, ...], axes: tuple[int, ...], layout: Layout, compute_dtype: Any
) -> int:
    """Return for how many of the first axes a mask need not be repeated.

    It is the same for each index of them. Blocks begin at any row: for these there are none.
    """
    if layout.inner == 1 and _compiled().are_short(layout.n, compute_dtype):
        return 0
    same = next((a for a, n in enumerate(lengths) if n > 1), len(lengths))
    return min(same, *axes)


def _row_by_row(request: Request) -> Any:
    """softmax or log_softmax over the axes."""
    if request.options.sink is not None:
        return _beside_sink(request)[0]
    drive, layout, x = _compiled(), _layout(request), request.x
    out = _out(request)
    function, temperature = getattr(drive, request.operation), request.options.temperature
    arrays = _handed(x, layout), _handed(out, layout)
    function(*arrays, layout, temperature, _mask(request, layout))
    return out


softmax = log_softmax = _row_by_row


def _beside_sink(request: Request) -> tuple[Any, Any]:
    """Return softmax or log_softmax, and the share of the sink, or its logarithm.

    It is not over the logits, which may have to be looked at once more.
    """
    drive, layout, x = _compiled(), _layout(request), request.x
    out = np.empty(x.shape, request.result_dtype) if request.in_place() else _out(request)
    sinks = _of_rows(request, request.options.sink)
    shares = np.empty(request.reduced_shape(), request.compute_dtype)
    drive.beside_sink(
        f"{request.operation}_beside_sink", _handed(x, layout), _handed(out, layout), sinks,
        shares.reshape(-1), layout, request.options.temperature, _mask(request, layout),
    )  # fmt: skip
    return out, shares


def _of_rows(request: Request, numbers: Any) -> Any:
    """Return numbers that broadcast to a reduction, one for each row, that Numba may write to."""
    numbers = np.broadcast_to(numbers, request.reduced_shape())
    return _flat(numbers, request.compute_dtype)


def _vjp_beside_sink(request: Request) -> tuple[Any, Any]:
    """Return the gradient from an output, and sum(y * dy), or that of dy, of each row.

    The request has the shares of the sinks for sinks, where they are read.
    """
    drive, layout, out = _compiled(), _layout(request), _out(request)
    arrays = [_handed(a, layout) for a in (request.x, request.dy, out)]
    shares, sums = (
        _of_rows(request, request.options.sink),
        np.empty(request.reduced_shape(), request.compute_dtype),
    )
    drive.vjp_beside_sink(request.operation, *arrays, shares, sums.reshape(-1), layout)
    return out, sums


softmax_beside_sink = log_softmax_beside_sink = _beside_sink
softmax_vjp_beside_sink = log_softmax_vjp_beside_sink = _vjp_beside_sink


def fold(request: Request) -> Any:
    """Maxima and rests over the axes, kept with length 1."""
    drive, layout, x = _compiled(), _layout(request), request.x
    m, rest = (np.empty(request.reduced_shape(), request.compute_dtype) for _ in range(2))
    flat = m.reshape(-1), rest.reshape(-1)
    temperature, mask = request.options.temperature, _mask(request, layout)
    drive.fold(_handed(x, layout), *flat, layout, temperature, mask)
    return m, rest.astype(np.float64, copy=False)


logmeanexp = partial(_means.logmeanexp, fold)


def logsumexp(request: Request) -> Any:
    """Logsumexp over the axes, kept with length 1."""
    if request.options.b is not None:
        return _weighted.answer(_sums, request)
    if request.options.return_sign:
        return _weighted.with_sign(logsumexp(_unsigned(request)))
    drive, layout, x = _compiled(), _layout(request), request.x
    out = np.empty(request.reduced_shape(), request.result_dtype)
    flat: Any = out.view(_bits(x.dtype)).reshape(-1)
    drive.logsumexp(_handed(x, layout), flat, layout, _mask(request, layout))
    return out


def _unsigned(request: Request) -> Request:
    return request._replace(options=request.options._replace(return_sign=False))


def _sums(request: Request, b: Any) -> tuple[Any, Any, Any]:
    """Return the maxima of what counts, and the sums of weights at them and of other terms."""
    drive, layout = _compiled(), _layout(request)
    m, tops, others = (np.empty(request.reduced_shape(), request.compute_dtype) for _ in range(3))
    flat = (a.reshape(-1) for a in (m, tops, others))
    b = _repeated_weights(request, b, layout)
    drive.weighted_sums(_handed(request.x, layout), b, *flat, layout)
    return m, tops, others


def _repeated_weights(request: Request, b: Any, layout: Layout) -> Any:
    """Return weights in one axis that repeat along the logits."""
    shape, compute = request.x.shape, request.compute_dtype
    lengths = (1,) * (len(shape) - b.ndim) + b.shape
    same = repeated(lengths, request.axes, layout, compute)
    return _flat(np.broadcast_to(b.reshape(lengths[same:]), shape[same:]), compute)


weighted = partial(_weighted.parts, _sums)


def weighted_slopes(request: Request, m: Any, factor: Any, by_b: bool) -> Any:
    """Return what `_weighted.slopes` does."""
    drive, layout, compute = _compiled(), _layout(request), request.compute_dtype
    by_x = np.empty(request.x.shape, request.result_dtype)
    found = np.empty(request.x.shape, compute) if by_b else None
    beyond = drive.weighted_slopes(
        _handed(request.x, layout), _repeated_weights(request, _weighted.weights(request), layout),
        _of_rows(request, m), _of_rows(request, factor), _handed(by_x, layout),
        None if found is None else _handed(found, layout), layout, _weighted.bound(compute) - 8.0,
    )  # fmt: skip
    if beyond:
        return None
    return by_x, _weighted.seen_of(request, found)


def logsumexp_vjp(request: Request) -> Any:
    """Softmax times upstream, which has the reduced axes with length 1."""
    drive, layout, x = _compiled(), _layout(request), request.x
    out = _out(request)
    dy = np.ascontiguousarray(request.dy, request.compute_dtype).reshape(-1)
    dy = dy if dy.flags.writeable else dy.copy()
    arrays = _handed(x, layout), dy, _handed(out, layout)
    drive.logsumexp_vjp(*arrays, layout, _mask(request, layout))
    return out


def _from_output(request: Request, *number: Any) -> Any:
    """softmax_vjp or log_softmax_vjp over the axes, with the kernel's number."""
    drive, layout, x = _compiled(), _layout(request), request.x
    out = _out(request)
    arrays = (_handed(a, layout) for a in (x, request.dy, out))
    getattr(drive, request.operation)(*arrays, layout, *number)
    return out


def softmax_vjp(request: Request) -> Any:
    """y * (dy - sum(y * dy)), with the digits of confident rows."""
    return _from_output(request, request.off_one)


def log_softmax_vjp(request: Request, *masked: bool) -> Any:
    """dy - exp(log_y) * sum(dy); `masked` tells whether an entry of -inf is a masked one."""
    return _from_output(request, *masked)


def _entropy(request: Request) -> Any:
    """Return the entropy; with it the gradient if that is asked for."""
    drive, layout, x = _compiled(), _layout(request), request.x
    h = np.empty(_positions(request), request.result_dtype)
    flat: Any = h.view(_bits(x.dtype)).reshape(-1)
    if request.operation == "entropy":
        drive.entropy(_handed(x, layout), flat, None, layout)
        return h
    grad = _out(request)
    drive.entropy(_handed(x, layout), flat, _handed(grad, layout), layout)
    return h, grad


entropy = entropy_value_and_grad = _entropy


def _divergence(request: Request) -> Any:
    """Return the reduced divergence; with it the gradients if they are asked for."""
    drive, layout, options = _compiled(), _layout(request), request.options
    t, distilled = options.temperature, options.distillation
    each = np.empty(_positions(request), request.compute_dtype)
    given = _handed(request.x, layout), _handed(request.dy, layout), each.reshape(-1)
    grads = None
    if request.operation == "kl_divergence":
        drive.kl_divergence(*given, None, layout, t, 1.0)
    else:
        grads = _out(request), _out(request)
        scale = (t if distilled else 1.0 / t) / (each.size if options.reduction == "mean" else 1)
        handed = _handed(grads[0], layout), _handed(grads[1], layout)
        drive.kl_divergence(*given, handed, layout, t, scale)
    if distilled:
        each *= t * t
    if options.reduction != "none":
        whole = np.sum(each, dtype=np.float64)
        each = np.asarray(whole / each.size if options.reduction == "mean" else whole)
    each = each.astype(request.answer_dtype, copy=False)
    return each if grads is None else (each, *grads)


kl_divergence = kl_divergence_value_and_grad = _divergence


def sigmoid_cross_entropy(request: Request) -> Any:
    """Return the reduced loss of yes-or-no labels; with it the gradient if that is asked for."""
    drive, x, compute, options = _compiled(), request.x, request.compute_dtype, request.options
    t, weight, yeses = (
        None if a is None else _flat(np.broadcast_to(a, x.shape), compute)
        for a in (request.labels, options.weight, options.pos_weight)
    )
    with_grad = request.operation == "sigmoid_cross_entropy_value_and_grad"
    each = np.empty(x.shape, compute) if options.reduction == "none" else None
    grad = _out(request) if with_grad else None
    loss = drive.binary_losses(
        _handed_flat(x), t, weight, yeses, options.label_smoothing,
        None if each is None else each.reshape(-1), None if grad is None else _handed_flat(grad),
        1.0 / x.size if options.reduction == "mean" else 1.0,
    )  # fmt: skip
    if each is None:
        each = np.asarray(loss / x.size if options.reduction == "mean" else loss)
    each = each.astype(request.answer_dtype, copy=False)
    return each if grad is None else (each, grad)


sigmoid_cross_entropy_value_and_grad = sigmoid_cross_entropy


def _of_beginnings(request: Request) -> Any:
    """Return the logarithms of running sums, or the gradient through them."""
    drive, layout, out = _compiled(), _layout(request), _out(request)
    dy = None if request.dy is None else _handed(request.dy, layout)
    drive.running(_handed(request.x, layout), dy, _handed(out, layout), layout)
    return out


logcumsumexp = logcumsumexp_vjp = _of_beginnings


def _flat(x: Any, dtype: Any) -> Any:
    """Return an array in one axis and of a dtype, that may be written for Numba."""
    x = np.ascontiguousarray(x, dtype).reshape(-1)
    return x if x.flags.writeable else np.asarray(_Alias(x))


def _handed_flat(x: Any) -> Any:
    return _handed(x, Layout(1, x.size, 1))[0]


def _positions(request: Request) -> tuple[int, ...]:
    """Return the shape of `x` without the reduced axes."""
    return tuple([n for a, n in enumerate(request.x.shape) if a not in request.axes])


def _loss(request: Request) -> Any:
    """Return the reduced loss; with it the gradient if that is asked for."""
    drive, layout, x, options = _compiled(), _layout(request), request.x, request.options
    compute_dtype = request.compute_dtype
    each = np.empty(_positions(request), compute_dtype) if options.reduction == "none" else None
    wants_gradient = request.operation == "cross_entropy_value_and_grad"
    if request.in_place() and request.check_labels:
        request.target()  # an error leaves the logits as they are
    grad = _out(request) if wants_gradient else None
    out = (
        None if each is None else each.reshape(-1),
        None if grad is None else _handed(grad, layout),
        options.reduction == "mean",
    )
    if request.indices:
        labels, ignore, samples = _labels(request)
        loss, weights, wrong = drive.losses(
            _handed(x, layout),
            labels,
            layout,
            drive.Loss(
                options.weight,
                ignore,
                options.label_smoothing,
                options.z_loss,
                samples,
                _mask(request, layout),
                options.softcap,
            ),
            *out,
        )
        if wrong and request.check_labels:
            request.target()
    else:
        t = np.ascontiguousarray(request.labels, compute_dtype)
        arrays = _handed(x, layout), _handed(t, layout)
        loss = drive.soft_losses(*arrays, layout, options.z_loss, *out)
        weights = layout.rows
    if each is None:
        if options.reduction == "mean":
            loss = loss / weights if weights else np.nan
        each = np.asarray(loss, compute_dtype)
    each = each.astype(request.answer_dtype, copy=False)
    return each if grad is None else (each, grad)


cross_entropy = cross_entropy_value_and_grad = _loss


def _labels(request: Request) -> tuple[Any, int | None, Any]:
    """Return the labels as int64, what is ignored among them, and their own weights or None.

    They are in the order of the rows. An index that their dtype cannot hold is in none of them; an
    unsigned label beyond int64 has no class, whatever it wraps around to. A position of weight 0 is
    ignored.
    """
    labels, ignore = request.labels, request.options.ignore_index
    samples, n = request.options.sample_weight, request.x.shape[request.axis]
    limits = np.iinfo(labels.dtype)
    if ignore is not None and not limits.min <= ignore <= limits.max:
        ignore = None
    if labels.dtype == np.uint64:
        beyond = labels >= n
        if ignore is not None and ignore >= n:
            beyond &= labels != ignore
            labels = np.where(labels == ignore, np.uint64(n + 1), labels)
            ignore = n + 1
        labels = np.where(beyond, np.uint64(n), labels)
    if samples is not None:
        samples = np.ascontiguousarray(samples).reshape(-1)
        unweighted = samples == 0
        if unweighted.any():
            labels = labels.reshape(-1).astype(np.int64)
            if ignore is None:
                ignore = np.iinfo(np.int64).min
                labels[labels == ignore] = n
            labels[unweighted] = ignore
        samples = samples if samples.flags.writeable else samples.copy()
    labels = np.ascontiguousarray(labels, np.int64).reshape(-1)
    return (labels if labels.flags.writeable else labels.copy()), ignore, samples
