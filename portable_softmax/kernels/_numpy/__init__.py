"""NumPy in tiles: every pass but the first finds its tile in cache, on several threads.

The portable mathematics walks an array once for each operation, which is fine in cache and slow
in memory. `_layout` cuts an array into tiles, `_rows`, `_vjps` and `_losses` work on them in place
with `_maths`, in scratch that is made once per thread. `_small` answers for small arrays, where the
calls cost more than the numbers, and `_general` runs the portable functions on tiles for the rest.
`_sparse` packs what entmax may leave above 0.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from portable_softmax.kernels import _means, _weighted
from portable_softmax.kernels._numpy import (
    _entries,
    _few_calls,
    _general,
    _losses,
    _rows,
    _sinks,
    _small,
    _sparse,
    _vjps,
)
from portable_softmax.kernels._numpy._layout import Layout, layout
from portable_softmax.kernels._request import (
    BINARY,
    DIVERGENCES,
    ENTMAX_LOSSES,
    ENTROPIES,
    FOLD,
    LOSSES,
    ROWS,
    RUNNING,
    SPARSE,
    VJPS,
    Request,
)

# From here on tiles of softmax_vjp win, measured on rows of 1000, or of 16 and 100: timeit with and
# without kernels.portable(). Those of log_softmax_vjp, which takes more passes, always do.
_LONG_ROWS, _SHORT_ROWS = 1 << 23, 1 << 24

TENSORS = False  # kernels on NumPy's arrays
# The operations that are never declined.
ANY_LAYOUT = (*ROWS, *LOSSES, *SPARSE, *ENTMAX_LOSSES, *BINARY, *ENTROPIES, *RUNNING)


def missing() -> str:
    """Return what has to be installed: nothing."""
    return ""


def declines(request: Request, asked: bool) -> str:
    """Return why a call is not for tiles."""
    if request.operation in DIVERGENCES:
        p, q = request.x.dtype, request.dy.dtype
        return "" if p == q else f"dtypes: {p} and {q}"
    if request.operation == FOLD or (request.operation == "logmeanexp" and not _is_small(request)):
        found = layout(request.x, request.axes, request.compute_dtype)
        return "not one block in memory with the axes together" if found is None else ""
    if request.operation not in VJPS:
        return ""
    if _small.upstream_of(request) is not None:
        return ""
    both = _both(request)
    if both is None:
        return "not two blocks in memory with the axes together"
    if asked or request.operation == "log_softmax_vjp":
        return ""
    # Three passes cost less than a transpose of two arrays.
    at_least = _SHORT_ROWS if both[0].axis == 0 else _LONG_ROWS
    return "neither small nor large" if request.x.nbytes < at_least else ""


def declines_options(request: Request) -> str:
    """Return why an operation is not taken with options that another is taken with."""
    return ""


def declines_shape(shape: tuple[int, ...], axes: tuple[int, ...]) -> str:
    """Return why a vector-Jacobian product is not taken where only its shape is known."""
    return "tiles of a vector-Jacobian product are chosen by what lies in memory"


def softmax(request: Request) -> Any:
    """Softmax over the axes."""
    if request.options.sink is not None:
        return _sinks.softmax(request, False)[0]
    rows = _small.tempered_logits_of(request)
    return _row_by_row(request, _rows.softmax) if rows is None else _small.softmax(request, rows)


def log_softmax(request: Request) -> Any:
    """log_softmax over the axes."""
    if request.options.sink is not None:
        return _sinks.log_softmax(request, False)[0]
    rows = _small.logits_of(request)
    if rows is None:
        return _row_by_row(request, _rows.log_softmax)
    return _small.log_softmax(request, rows)


def fold(request: Request) -> Any:
    """Maxima and rests over the axes, kept with length 1."""
    found = layout(request.x, request.axes, request.compute_dtype)
    assert found is not None  # declined
    return _rows.fold(request, found)


def logmeanexp(request: Request) -> Any:
    """Logarithm of the mean over the axes, kept with length 1."""
    if _is_small(request):
        return _few_calls.logmeanexp(request)
    return _means.logmeanexp(fold, request)


def _is_small(request: Request) -> bool:
    return bool(request.x.size <= _small.SMALL)


def logsumexp(request: Request) -> Any:
    """Logsumexp over the axes, kept with length 1."""
    if request.options.b is not None:
        return _weighted.answer(_sums, request)
    if request.options.return_sign:
        plain = request._replace(
            options=request.options._replace(return_sign=False),
            active=tuple([name for name in request.active if name != "return_sign"]),
        )
        return _weighted.with_sign(logsumexp(plain))
    rows = _small.logits_of(request)
    if rows is None:
        return _row_by_row(request, _rows.logsumexp)
    return _small.logsumexp(request, rows)


def _sums(request: Request, b: Any) -> tuple[Any, Any, Any]:
    rows = _small.rows_of(request)
    return _weighted.sums(request, b) if rows is None else _small.weighted_sums(request, rows, b)


weighted, weighted_slopes = partial(_weighted.parts, _sums), _weighted.slopes


def logsumexp_vjp(request: Request) -> Any:
    """Softmax times upstream, which has the reduced axes with length 1."""
    wide, active = request.compute_dtype, tuple(name for name in request.active if name != "dtype")
    of_softmax = request._replace(
        operation="softmax", x=request.x.astype(wide, copy=False), dtype=wide.name,
        result_dtype=wide, options=request.options._replace(dtype=None), active=active,
    )  # fmt: skip
    p = softmax(of_softmax)
    p *= request.dy
    # A row whose maximum is infinite has the softmax nan, and the derivative 0 in every entry.
    first = p[tuple([slice(0, 1) if a in request.axes else slice(None) for a in range(p.ndim)])]
    if np.isnan(first.item(first.argmin())):  # a nan is the least entry
        where = True if request.options.where is None else request.options.where
        m = np.max(of_softmax.x, request.axes, keepdims=True, initial=-np.inf, where=where)
        p[np.broadcast_to(np.isinf(m), p.shape)] = 0.0
    return p.astype(request.result_dtype, copy=False)


def _row_by_row(request: Request, tiled: Any) -> Any:
    found = None
    if request.options.where is None:
        found = layout(request.x, request.axes, request.compute_dtype)
    return _general.rows(request) if found is None else tiled(request, found)


def softmax_vjp(request: Request) -> Any:
    """y * (dy - sum(y * dy))."""
    dy = _small.upstream_of(request)
    if dy is None:
        return _vjps.softmax_vjp(request, *(_both(request) or ()))
    return _small.softmax_vjp(request, dy)


def log_softmax_vjp(request: Request, masked: bool = True) -> Any:
    """dy - exp(log_y) * sum(dy), where an entry of -inf is a masked one if any can be."""
    dy = _small.upstream_of(request)
    if dy is None:
        return _vjps.log_softmax_vjp(request, *(_both(request) or ()), masked=masked)
    return _small.log_softmax_vjp(request, dy, masked)


softmax_beside_sink, log_softmax_beside_sink = _sinks.softmax, _sinks.log_softmax
softmax_vjp_beside_sink = _sinks.softmax_vjp
log_softmax_vjp_beside_sink = _sinks.log_softmax_vjp
sigmoid_cross_entropy = sigmoid_cross_entropy_value_and_grad = _entries.losses
entropy = entropy_value_and_grad = _few_calls.entropy
kl_divergence = kl_divergence_value_and_grad = _few_calls.divergence
logcumsumexp = logcumsumexp_vjp = _few_calls.running
entmax = sparsemax = _sparse.entmax  # the latter has an alpha of 2
entmax_vjp = _sparse.entmax_vjp
entmax_loss = entmax_loss_value_and_grad = _sparse.entmax_loss


def _both(request: Request) -> tuple[Layout, Layout] | None:
    """Return how the output and the upstream gradient are cut: alike, since their shapes are."""
    x = layout(request.x, request.axes, request.compute_dtype)
    dy = layout(request.dy, request.axes, request.compute_dtype)
    return None if x is None or dy is None else (x, dy)


def cross_entropy(request: Request) -> Any:
    """Return the reduced loss."""
    return _cast(_losses_of(request, with_grad=False)[0], request)


def cross_entropy_value_and_grad(request: Request) -> tuple[Any, Any]:
    """Return the reduced loss and its gradient."""
    loss, grad = _losses_of(request, with_grad=True)
    return _cast(loss, request), grad


def _cast(loss: Any, request: Request) -> Any:
    answer = request.answer_dtype
    return loss if loss.dtype == answer else loss.astype(answer)


def _losses_of(request: Request, *, with_grad: bool) -> tuple[Any, Any]:
    small: tuple[Any, Any] | None = _small.losses(request, with_grad=with_grad)
    if small is not None:
        return small
    found = layout(request.x, request.axes, request.compute_dtype)
    labels = _losses.labels_of(request, found)
    if found is None or labels is None:
        return _general.losses(request)
    return _losses.losses(request, found, labels, with_grad=with_grad)
