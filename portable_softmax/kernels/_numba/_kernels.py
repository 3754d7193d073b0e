"""What is compiled: a kernel for each operation and layout, which works on groups of rows.

Arrays are C-contiguous, of shape (rows, n) or, for columns, (outer * n, inner). A piece is `step`
groups; threads take pieces by a counter, until there are none left. `workspace` has the dtype of
the computation and the size that `_driver` gives it; `numbers` depend on the operation.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from portable_softmax.kernels._numba import _blocks, _columns, _losses, _operations, _rows
from portable_softmax.kernels._numba._compensation import compensated
from portable_softmax.kernels._numba._jit import function, kernel
from portable_softmax.kernels._numba._losses import EACH
from portable_softmax.kernels._numba._memory import (
    ahead,
    aligned,
    copy,
    fill,
    pointer,
    store,
    take_next,
)
from portable_softmax.kernels._numba._values import LOGSUMEXP, LOSS, values


def _threaded(name: str, work: Any) -> Any:
    """Return the function that Python calls from each thread."""
    work = function(work)

    @kernel(name)
    def run(arrays, numbers, shape, workspace, counter, step, groups):
        """`shape` is (n, inner, rows of a group); but for columns, `inner` is all rows."""
        following, start = pointer(counter), aligned(pointer(workspace))
        piece = take_next(following)
        while piece * step < groups:
            lo, hi = piece * step, min((piece + 1) * step, groups)
            work(arrays, numbers, shape, start, lo, hi, piece)
            piece = take_next(following)

    return run


def _row_by_row(layout: ModuleType, operation: str, inputs: int) -> Any:
    """Return an operation whose result has the shape of its inputs; numbers = (one,)."""
    body, has_two = getattr(_operations, f"{operation}_of")(layout), inputs == 2

    def work(arrays, numbers, shape, workspace, lo, hi, piece):
        p, q, o = pointer(arrays[0]), pointer(arrays[1]), pointer(arrays[inputs])
        n, inner, T = shape[0], shape[1], layout.height(workspace, shape[2])
        for i in range(lo, hi):
            at, rows, _ = layout.place(i, T, n, inner)
            x = layout.fetch(ahead(p, at), 0, workspace, T, n, inner, rows)
            y = layout.target(ahead(o, at), 0, workspace, T, n)
            if has_two:
                dy = layout.fetch(ahead(q, at), 1, workspace, T, n, inner, rows)
                body(x, dy, y, n, rows, T, workspace, numbers[0])
            else:
                body(x, y, n, rows, T, workspace, numbers[0])
            layout.deliver(y, ahead(o, at), T, n, inner, rows)

    return _threaded(f"{layout.__name__}.{operation}", work)


def _logsumexp(layout: ModuleType) -> Any:
    body = _operations.logsumexp_of(layout)

    def work(arrays, numbers, shape, workspace, lo, hi, piece):
        p, o = pointer(arrays[0]), pointer(arrays[1])
        n, inner, T = shape[0], shape[1], layout.height(workspace, shape[2])
        for i in range(lo, hi):
            at, rows, first = layout.place(i, T, n, inner)
            x = layout.fetch(ahead(p, at), 0, workspace, T, n, inner, rows)
            body(x, n, rows, T, workspace)
            copy(values(workspace, LOGSUMEXP, T), ahead(o, first), rows)

    return _threaded(f"{layout.__name__}.logsumexp", work)


def _cross_entropy(layout: ModuleType, gradient: bool) -> Any:
    """Return the loss; arrays = (logits, labels, losses, weights, options, sums, gradient or not).

    The sums of a piece are that of the losses, that of the labels' weights, and how many labels are
    wrong. numbers = (flags, the index that is ignored).
    """
    write_losses, write_gradients = _losses.losses_of(layout), _losses.gradients_of(layout)
    write_zeros = _losses.zeros_of(layout)

    def work(arrays, numbers, shape, workspace, lo, hi, piece):
        p, labels, each = pointer(arrays[0]), pointer(arrays[1]), pointer(arrays[2])
        w, totals, o = pointer(arrays[3]), pointer(arrays[5]), pointer(arrays[-1])
        n, inner, T = shape[0], shape[1], layout.height(workspace, shape[2])
        c, (flags, ignore) = _losses.constants(w, n, arrays[4]), numbers
        losses = values(workspace, LOSS, T)
        loss, weight, wrong = _losses.no_sum(), _losses.no_sum(), 0
        for i in range(lo, hi):
            at, rows, first = layout.place(i, T, n, inner)
            some = ahead(labels, first)
            u, bad, ignored = _losses.write_weights(some, rows, T, workspace, w, n, flags, ignore)
            weight, wrong = _losses.with_term(weight, u), wrong + bad
            if gradient:
                y = layout.target(ahead(o, at), 1, workspace, T, n)
                e = layout.scratch(y, workspace, T, n)
            else:
                e = 0
            if ignored < rows:
                x = layout.fetch(ahead(p, at), 0, workspace, T, n, inner, rows)
                value = write_losses(x, e, some, rows, T, workspace, w, n, c, flags, ignore)
                loss = _losses.with_term(loss, value)
                if gradient:
                    write_gradients(e, y, some, rows, T, workspace, w, n, c, flags)
            else:  # nothing of them is read
                fill(losses, rows, 0.0)
            if gradient:
                write_zeros(y, some, rows, workspace, n, flags, ignore)
                layout.deliver(y, ahead(o, at), T, n, inner, rows)
            if flags & EACH:
                copy(losses, ahead(each, first), rows)
        store(totals, 3 * piece, compensated(loss[0], loss[1]))
        store(totals, 3 * piece + 1, compensated(weight[0], weight[1]))
        store(totals, 3 * piece + 2, float(wrong))

    name = "cross_entropy_value_and_grad" if gradient else "cross_entropy"
    return _threaded(f"{layout.__name__}.{name}", work)


@kernel("scan")
def scan(labels, w, n, flags, ignore):
    """Return the sum of the labels' weights."""
    t, v = pointer(labels), pointer(w)
    total = _losses.no_sum()
    for i in range(labels.shape[0]):
        total = _losses.with_term(total, _losses.weight_of(t[i], v, n, flags, ignore)[1])
    return compensated(total[0], total[1])


def _kernels(layout: ModuleType) -> dict[str, Any]:
    return {
        "softmax": _row_by_row(layout, "softmax", 1),
        "log_softmax": _row_by_row(layout, "log_softmax", 1),
        "logsumexp": _logsumexp(layout),
        "softmax_vjp": _row_by_row(layout, "softmax_vjp", 2),
        "log_softmax_vjp": _row_by_row(layout, "log_softmax_vjp", 2),
        "cross_entropy": _cross_entropy(layout, False),
        "cross_entropy_value_and_grad": _cross_entropy(layout, True),
    }


ROWS, BLOCKS, COLUMNS = map(_kernels, (_rows, _blocks, _columns))
