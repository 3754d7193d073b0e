"""softmax and log_softmax with a sink, and the gradients through them.

A sink is one more logit of its row. Beside the answer there is its share, the probability that it
takes, or the logarithm of that: the gradient by the sink starts from it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from portable_softmax import portable
from portable_softmax.kernels._cuts import on_cuts
from portable_softmax.kernels._numpy import _maths, _small
from portable_softmax.kernels._numpy._layout import Buffers, Layout, layout
from portable_softmax.kernels._request import Request


def softmax(request: Request, shared: bool = True) -> Any:
    """Return the probabilities and the share of the sink, which is anything if not `shared`."""
    return _row_by_row(request, _softmax_of_few, _softmax_in_tiles, shared)


def log_softmax(request: Request, shared: bool = True) -> Any:
    """Return the logarithms of both."""
    return _row_by_row(request, _log_softmax_of_few, _log_softmax_in_tiles, shared)


def _row_by_row(request: Request, few: Any, in_tiles: Any, shared: bool) -> Any:
    if request.active == ("sink",):
        rows = _small.rows_of(request)
        if rows is not None:
            return _of_few(request, rows, few)
        found = layout(request.x, request.axes, request.compute_dtype)
        if found is not None:
            return in_tiles(request, found, _sinks_of(request))
    return _in_general(request, shared)


def _sinks_of(request: Request) -> Any:
    """Return the sinks, of the shape of a reduction that keeps its axes."""
    sinks = np.asarray(request.options.sink, request.compute_dtype)
    shape = tuple(request.reduced_shape())
    return sinks if sinks.shape == shape else np.broadcast_to(sinks, shape)


# --------------------------------------------------------------------------- small arrays


def _of_few(request: Request, rows: Any, few: Any) -> tuple[Any, Any]:
    sinks = _sinks_of(request).reshape(-1)
    y, shares, unfit = few(rows, sinks)
    if unfit is not None:
        some, beside = rows[unfit], sinks[unfit, None]
        y[unfit] = getattr(portable, request.operation)(np, some, (1,), sink=beside)
        shares[unfit] = _shares(request.operation, some, (1,), sink=beside)[:, 0]
    return y.reshape(request.x.shape), shares.reshape(request.reduced_shape())


def _softmax_of_few(rows: Any, sinks: Any) -> tuple[Any, Any, Any]:
    """As `_small.softmax`, with one more term of the sum."""
    e, more = np.exp(rows), np.exp(sinks)
    s = _small.sums(e)
    s += more
    unfit = _small.unfit_of(e, s)
    more /= s
    e /= s[:, None]
    return e, more, unfit


def _log_softmax_of_few(rows: Any, sinks: Any) -> tuple[Any, Any, Any]:
    """(x - max) - log1p(rest), where the sink may be the maximum."""
    at, m = _small.maxima(rows)
    e, unit = np.exp(rows), np.exp(sinks)
    flat = e.ravel()
    grown = flat[at]
    flat[at] = 0.0
    rest = _small.sums(e)
    beyond = sinks > m
    rest += np.where(beyond, grown, unit)
    top = np.where(beyond, sinks, m)
    far, tiny = _maths.RANGES[rows.dtype]
    fit = (top <= far) & (rest >= tiny)
    rest /= np.where(beyond, unit, grown)
    log = np.log1p(rest, rest)
    d = rows - top[:, None]
    d -= log[:, None]
    return d, (sinks - top) - log, None if fit.all() else np.flatnonzero(~fit)


# --------------------------------------------------------------------------- tiles


def _softmax_in_tiles(request: Request, found: Layout, sinks: Any) -> tuple[Any, Any]:
    shares, answers, given, axis = *_of_positions(request, found), sinks, found.axis
    given = given.reshape(found.shape)

    def work(x: Any, y: Any, piece: Any, buffers: Buffers) -> None:
        sink = np.expand_dims(found.positions(given, piece).reshape(-1), axis)
        s, more = _maths.exps_beside(x, y, axis, buffers, sink)
        found.positions(answers, piece)[...] = np.divide(more, s).reshape(-1)
        np.divide(y, s, out=y)

    return found.fill(request, request.answer_dtype, work), shares


def _log_softmax_in_tiles(request: Request, found: Layout, sinks: Any) -> tuple[Any, Any]:
    shares, answers, given, axis = *_of_positions(request, found), sinks, found.axis
    given = given.reshape(found.shape)

    def work(x: Any, y: Any, piece: Any, buffers: Buffers) -> None:
        sink = np.expand_dims(found.positions(given, piece).reshape(-1), axis)
        m, rest, grown, total, unfit = _maths.plain(x, None, axis, buffers)
        far = _maths.RANGES[x.dtype].far
        unit, beyond = np.exp(sink), sink > m
        top = np.where(beyond, sink, m)
        rest = np.where(beyond, total / unit, rest + unit / grown)
        log = np.log1p(rest, out=rest)
        share = ((sink - top) - log).reshape(-1)
        if not top.max() <= far:
            beyond = ~(top <= far).reshape(-1)
            if unfit is not None:
                beyond[unfit] = True
            unfit = np.flatnonzero(beyond)
        np.subtract(x, top, out=y)
        np.subtract(y, log, out=y)
        if unfit is not None:
            some = np.expand_dims(sink.reshape(-1)[unfit], axis)

            def precise(x: Any, y: Any) -> None:
                y[...] = portable.log_softmax(np, x, (axis,), sink=some)
                share[unfit] = _shares("log_softmax", x, (axis,), sink=some).reshape(-1)

            found.redo(piece, unfit, y, buffers, precise)
        found.positions(answers, piece)[...] = share

    return found.fill(request, request.answer_dtype, work), shares


def _of_positions(request: Request, found: Layout) -> tuple[Any, Any]:
    """Return an array of a number for each row, and the same as the array is cut."""
    numbers = np.empty(request.reduced_shape(), request.compute_dtype)
    return numbers, numbers.reshape(found.shape)


# --------------------------------------------------------------------------- any other call


def _in_general(request: Request, shared: bool) -> tuple[Any, Any]:
    """Return both by the portable functions on tiles."""
    x, axes, options, compute = request.x, request.axes, request.options, request.compute_dtype
    where = None if options.where is None else np.broadcast_to(options.where, x.shape)
    sinks, shares = _sinks_of(request), np.empty(request.reduced_shape(), compute)
    out = np.empty(x.shape, request.answer_dtype) if request.out is None else request.out
    function = getattr(portable, request.operation)

    def work(cut: Any) -> None:
        tile = x[cut].astype(compute, order="C", copy=False)
        given = {
            "where": None if where is None else where[cut],
            "temperature": options.temperature,
            "sink": sinks[cut],
        }
        if shared:  # before the logits are written over
            shares[cut] = _shares(request.operation, tile, axes, **given)
        out[cut] = function(np, tile, axes, **given)

    on_cuts(work, x, axes, compute)
    return out, shares


def _shares(operation: str, x: Any, axes: tuple[int, ...], **options: Any) -> Any:
    logs = portable.log_share_of_sink(np, x, axes, **options)
    return np.exp(logs) if operation == "softmax" else logs


# --------------------------------------------------------------------------- gradients


def softmax_vjp(request: Request) -> tuple[Any, Any]:
    """Return y * (dy - sum(y * dy)) and that sum; the request has the shares as its sinks.

    In a confident row less its constant c of dy, of which the sum has c * (1 - share).
    """
    axes, shares = request.axes, request.options.sink
    upstream = _small.upstream_of(request)
    if upstream is not None:
        return _softmax_vjp_of_few(request, upstream)

    def slopes(y: Any, dy: Any, cut: Any) -> tuple[Any, Any]:
        s = portable.total(np, y * dy, axes)
        if y.max() <= portable.CONFIDENT:
            return y * (dy - s), s
        c = portable.total(np, np.where(y > portable.CONFIDENT, dy, dy.dtype.type(0)), axes)
        c = np.where(np.isfinite(c), c, dy.dtype.type(0))
        less = dy - c
        beside = portable.total(np, y * less, axes) - c * shares[cut]
        return y * (less - np.where(c == 0, s, beside)), s

    return _vjp(request, slopes)


def _softmax_vjp_of_few(request: Request, dy: Any) -> tuple[Any, Any]:
    y, shape = request.x.reshape(dy.shape), request.x.shape
    d = y * dy
    s = _small.sums(d)
    np.subtract(dy, s[:, None], d)
    d *= y
    at = np.flatnonzero(y > portable.CONFIDENT)
    if at.size:
        c = dy.ravel()[at]
        at = at[np.isfinite(c)]
        row, c = at // dy.shape[1], dy.ravel()[at]
        less, some = dy[row] - c[:, None], y[row]
        beside = _small.sums(some * less) - c * request.options.sink.reshape(-1)[row]
        d[row] = some * (less - beside[:, None])
    return d.reshape(shape), s.reshape(request.reduced_shape())


def log_softmax_vjp(request: Request) -> tuple[Any, Any]:
    """Return dy - exp(log_y) * sum(dy), and that sum."""
    upstream = _small.upstream_of(request)
    if upstream is not None:
        s = _small.sums(upstream).reshape(request.reduced_shape())
        return _small.log_softmax_vjp(request, upstream, False), s

    def slopes(log_y: Any, dy: Any, _: Any) -> tuple[Any, Any]:
        s = portable.total(np, dy, request.axes)
        return _maths.mended(log_y, dy, s), s

    return _vjp(request, slopes)


def _vjp(request: Request, slopes: Any) -> tuple[Any, Any]:
    x, upstream, compute = request.x, request.dy, request.compute_dtype
    out, sums = np.empty(x.shape, request.result_dtype), np.empty(request.reduced_shape(), compute)

    def work(cut: Any) -> None:
        y, dy = (a[cut].astype(compute, order="C", copy=False) for a in (x, upstream))
        out[cut], sums[cut] = slopes(y, dy, cut)

    on_cuts(work, x, request.axes, compute)
    return out, sums
