"""What is compiled: a kernel for each operation and layout, which works on groups of rows.

Arrays are C-contiguous, of shape (rows, n) or, for columns, (outer * n, inner). A piece is `step`
groups; threads take pieces by a counter, until there are none left. `workspace` has the dtype of
the computation and the size that `_driver` gives it; `numbers` depend on the operation.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

from numba.extending import overload

from portable_softmax.kernels._numba import (
    _blocks,
    _columns,
    _groups,
    _losses,
    _narrow,
    _operations,
    _rows,
)
from portable_softmax.kernels._numba import _soft as _soft_losses
from portable_softmax.kernels._numba._compensation import compensated
from portable_softmax.kernels._numba._jit import INLINED, function, kernel
from portable_softmax.kernels._numba._losses import EACH, IGNORING, OVER
from portable_softmax.kernels._numba._memory import (
    Masked,
    ahead,
    aligned,
    copy,
    fill,
    left_out,
    load,
    logits,
    pointer,
    smaller,
    store,
    take_next,
    typed,
)
from portable_softmax.kernels._numba._softcap import capped, slopes_of
from portable_softmax.kernels._numba._values import LOGSUMEXP, LOSS, MAX, REST, WEIGHT, values
from portable_softmax.kernels._request import WITH_SLOPES


def threaded(name: str, work: Any) -> Any:
    """Return the function that Python calls from each thread."""
    work = function(work)

    @kernel(name)
    def run(arrays, numbers, shape, workspace, counter, step, groups):
        """`shape` is (n, inner, rows of a group); but for columns, `inner` is all rows."""
        following, start = pointer(counter), aligned(pointer(workspace))
        piece = take_next(following)
        while piece * step < groups:
            lo, hi = piece * step, smaller((piece + 1) * step, groups)
            work(arrays, numbers, shape, start, lo, hi, piece)
            piece = take_next(following)

    return run


def leaving_out(layout: ModuleType, number: float) -> Any:
    """Return the function that writes a number to what a mask leaves out of a row.

    In a row of finite results the passes have done it. One of which nothing is left is all nan.
    """

    def leave_out(p, o, n, inner, rows, workspace):
        """Nothing is left out of logits without a mask, nor compiled for them."""

    @overload(leave_out, jit_options=INLINED)
    def _leave_out(p, o, n, inner, rows, workspace):
        if not isinstance(p, Masked):
            return lambda p, o, n, inner, rows, workspace: None

        def masked(p, o, n, inner, rows, workspace):
            for r in range(rows):
                first = load(o, layout.element(workspace, r, 0, n))
                if first - first != 0:
                    for j in range(n):
                        if left_out(p, layout.position(r, j, n, inner)):
                            store(o, layout.element(workspace, r, j, n), typed(workspace, number))

        return masked

    return leave_out


def _row_by_row(layout: ModuleType, operation: str, nothing: float) -> Any:
    """Return softmax or log_softmax; arrays = (logits, result, mask or None), numbers = (one,)."""
    body, leave_out = getattr(_operations, f"{operation}_of")(layout), leaving_out(layout, nothing)

    def work(arrays, numbers, shape, workspace, lo, hi, piece):
        p, o = pointer(arrays[0]), pointer(arrays[1])
        n, inner, T = shape[0], shape[1], layout.height(workspace, shape[2])
        for i in range(lo, hi):
            at, rows, _ = layout.place(i, T, n, inner)
            group = logits(ahead(p, at), arrays[2], at)
            x = layout.fetch(group, 0, workspace, T, n, inner, rows)
            y = layout.target(ahead(o, at), 0, workspace, T, n)
            body(x, y, n, rows, T, workspace, numbers[0])
            leave_out(group, y, n, inner, rows, workspace)
            layout.deliver(y, ahead(o, at), T, n, inner, rows)

    return threaded(f"{layout.__name__}.{operation}", work)


def _vjp(layout: ModuleType, operation: str) -> Any:
    """Return a vector-Jacobian product; arrays = (output, upstream, result), numbers = (one,)."""
    body = getattr(_operations, f"{operation}_of")(layout)

    def work(arrays, numbers, shape, workspace, lo, hi, piece):
        p, q, o = pointer(arrays[0]), pointer(arrays[1]), pointer(arrays[2])
        n, inner, T = shape[0], shape[1], layout.height(workspace, shape[2])
        for i in range(lo, hi):
            at, rows, _ = layout.place(i, T, n, inner)
            x = layout.fetch(ahead(p, at), 0, workspace, T, n, inner, rows)
            dy = layout.fetch(ahead(q, at), 1, workspace, T, n, inner, rows)
            y = layout.target(ahead(o, at), 0, workspace, T, n)
            body(x, dy, y, n, rows, T, workspace, numbers[0])
            layout.deliver(y, ahead(o, at), T, n, inner, rows)

    return threaded(f"{layout.__name__}.{operation}", work)


def _logsumexp(layout: ModuleType) -> Any:
    body = _operations.logsumexp_of(layout)

    def work(arrays, numbers, shape, workspace, lo, hi, piece):
        p, o = pointer(arrays[0]), pointer(arrays[1])
        n, inner, T = shape[0], shape[1], layout.height(workspace, shape[2])
        for i in range(lo, hi):
            at, rows, first = layout.place(i, T, n, inner)
            group = logits(ahead(p, at), arrays[2], at)
            x = layout.fetch(group, 0, workspace, T, n, inner, rows)
            body(x, n, rows, T, workspace)
            copy(values(workspace, LOGSUMEXP, T), ahead(o, first), rows)

    return threaded(f"{layout.__name__}.logsumexp", work)


def _fold(layout: ModuleType) -> Any:
    """Return the state of rows; arrays = (logits, maxima, rests, mask or None), numbers = (T,)."""
    body = _operations.fold_of(layout)

    def work(arrays, numbers, shape, workspace, lo, hi, piece):
        p, maxima, rests = pointer(arrays[0]), pointer(arrays[1]), pointer(arrays[2])
        n, inner, T = shape[0], shape[1], layout.height(workspace, shape[2])
        for i in range(lo, hi):
            at, rows, first = layout.place(i, T, n, inner)
            group = logits(ahead(p, at), arrays[3], at)
            x = layout.fetch(group, 0, workspace, T, n, inner, rows)
            body(x, n, rows, T, workspace, numbers[0])
            copy(values(workspace, MAX, T), ahead(maxima, first), rows)
            copy(values(workspace, REST, T), ahead(rests, first), rows)

    return threaded(f"{layout.__name__}.fold", work)


def _without_slopes(layout: ModuleType) -> Any:
    """Return the function that writes 0 for rows of an infinite maximum, a nan where one has it."""

    @function
    def write(x, y, n, rows, T, workspace):
        for r in range(rows):
            m = load(values(workspace, MAX, T), r)
            if m == math.inf or m == -math.inf:
                derivative = typed(workspace, 0.0)
                for j in range(n):
                    v = load(x, layout.element(workspace, r, j, n))
                    derivative = v if v != v else derivative
                for j in range(n):
                    store(y, layout.element(workspace, r, j, n), derivative)

    return write


def _slopes_of_logsumexp(layout: ModuleType, operation: str) -> Any:
    """Return softmax beside logsumexp, or times upstream gradients.

    arrays = (logits, answers or upstream, result, mask or None). A row whose maximum is infinite
    has the derivative 0, unless it has a nan.
    """
    body, leave_out = getattr(_operations, f"{operation}_of")(layout), leaving_out(layout, 0.0)
    without_slopes, given = _without_slopes(layout), operation == "logsumexp_vjp"

    def work(arrays, numbers, shape, workspace, lo, hi, piece):
        p, each, o = pointer(arrays[0]), pointer(arrays[1]), pointer(arrays[2])
        n, inner, T = shape[0], shape[1], layout.height(workspace, shape[2])
        for i in range(lo, hi):
            at, rows, first = layout.place(i, T, n, inner)
            group = logits(ahead(p, at), arrays[3], at)
            x = layout.fetch(group, 0, workspace, T, n, inner, rows)
            y = layout.target(ahead(o, at), 1, workspace, T, n)
            if given:
                copy(ahead(each, first), values(workspace, WEIGHT, T), rows)
            body(x, y, n, rows, T, workspace)
            if not given:
                copy(values(workspace, LOSS, T), ahead(each, first), rows)
            without_slopes(x, y, n, rows, T, workspace)
            leave_out(group, y, n, inner, rows, workspace)
            layout.deliver(y, ahead(o, at), T, n, inner, rows)

    return threaded(f"{layout.__name__}.{operation}", work)


def _cross_entropy(layout: ModuleType, gradient: bool) -> Any:
    """Return the loss.

    arrays = (logits, labels, losses, weights, options, sums, mask or None, weights of the positions
    or None, gradient or not)

    The sums of a piece are that of the losses, that of the labels' weights, and how many labels are
    wrong. numbers = (flags, the index that is ignored, the softcap or None).
    """
    write_losses, write_gradients = _losses.losses_of(layout), _losses.gradients_of(layout)
    slopes = slopes_of(layout)
    write_zeros, leave_out = _losses.zeros_of(layout), leaving_out(layout, 0.0)

    def work(arrays, numbers, shape, workspace, lo, hi, piece):
        p, labels, each = pointer(arrays[0]), pointer(arrays[1]), pointer(arrays[2])
        w, totals = pointer(arrays[3]), pointer(arrays[5])
        n, inner, T = shape[0], shape[1], layout.height(workspace, shape[2])
        c, (flags, ignore, cap) = _losses.constants(w, n, arrays[4]), numbers
        losses = values(workspace, LOSS, T)
        loss, weight, wrong = _losses.no_sum(), _losses.no_sum(), 0
        for i in range(lo, hi):
            at, rows, first = layout.place(i, T, n, inner)
            some, group = ahead(labels, first), logits(ahead(p, at), arrays[6], at)
            u, bad, ignored = _losses.write_weights(
                some, rows, T, workspace, w, arrays[7], first, n, flags, ignore
            )
            for r in range(rows):
                y = _losses.class_of(some[r], n)
                counts = y == some[r] and not (flags & IGNORING and y == ignore)
                if counts and left_out(group, layout.position(r, y, n, inner)):
                    store(values(workspace, WEIGHT, T), r, typed(workspace, math.nan))
                    bad += 1
            weight, wrong = _losses.with_term(weight, u), wrong + bad
            if gradient:
                o = pointer(arrays[8])
                y = layout.target(ahead(o, at), 1, workspace, T, n)
                e = layout.scratch(y, workspace, T, n, flags & OVER)
                left = layout.slopes_at(workspace, T, n)
            else:
                e = left = 0
            if ignored < rows:
                bounded = logits(capped(ahead(p, at), cap, left), arrays[6], at)
                x = layout.fetch(bounded, 0, workspace, T, n, inner, rows)
                value = write_losses(x, e, some, rows, T, workspace, w, n, c, flags, ignore)
                loss = _losses.with_term(loss, value)
                if gradient:
                    d = slopes(group, cap, left, workspace, T, n, inner, rows)
                    write_gradients(e, y, some, d, rows, T, workspace, w, n, c, flags)
            else:  # nothing of them is read
                fill(losses, rows, 0.0)
            if gradient:
                leave_out(group, y, n, inner, rows, workspace)
                write_zeros(y, some, rows, workspace, n, flags, ignore)
                layout.deliver(y, ahead(o, at), T, n, inner, rows)
            if flags & EACH:
                copy(losses, ahead(each, first), rows)
        store(totals, 3 * piece, compensated(loss[0], loss[1]))
        store(totals, 3 * piece + 1, compensated(weight[0], weight[1]))
        store(totals, 3 * piece + 2, float(wrong))

    name = "cross_entropy_value_and_grad" if gradient else "cross_entropy"
    return threaded(f"{layout.__name__}.{name}", work)


def _soft(layout: ModuleType, gradient: bool) -> Any:
    """Return the loss; arrays = (logits, distributions, losses, options, sums, gradient or not).

    The sum of a piece is that of its losses. The options are z and the factor of the gradient.
    numbers = (flags,).
    """
    write_losses, write_gradients = (
        _soft_losses.losses_of(layout),
        _soft_losses.gradients_of(layout),
    )

    def work(arrays, numbers, shape, workspace, lo, hi, piece):
        p, q, each = pointer(arrays[0]), pointer(arrays[1]), pointer(arrays[2])
        z, scale = typed(workspace, arrays[3][0]), typed(workspace, arrays[3][1])
        n, inner, T = shape[0], shape[1], layout.height(workspace, shape[2])
        loss = _losses.no_sum()
        for i in range(lo, hi):
            at, rows, first = layout.place(i, T, n, inner)
            x = layout.fetch(ahead(p, at), 0, workspace, T, n, inner, rows)
            t = layout.fetch(ahead(q, at), 1, workspace, T, n, inner, rows)
            if gradient:
                o = pointer(arrays[5])
                y = layout.target(ahead(o, at), 2, workspace, T, n)
                e = layout.scratch(y, workspace, T, n, numbers[0] & OVER)
            else:
                e = 0
            value = write_losses(x, t, e, n, rows, T, workspace, z)
            loss = _losses.with_term(loss, value)
            if gradient:
                write_gradients(e, t, y, n, rows, T, workspace, z, scale)
                layout.deliver(y, ahead(o, at), T, n, inner, rows)
            if numbers[0] & EACH:
                copy(values(workspace, LOSS, T), ahead(each, first), rows)
        store(pointer(arrays[4]), piece, compensated(loss[0], loss[1]))

    name = "soft_cross_entropy_value_and_grad" if gradient else "soft_cross_entropy"
    return threaded(f"{layout.__name__}.{name}", work)


@kernel("scan")
def scan(labels, w, samples, n, flags, ignore):
    """Return the sum of the labels' weights."""
    t, v = pointer(labels), pointer(w)
    total = _losses.no_sum()
    for i in range(labels.shape[0]):
        counted = _losses.weight_of(t[i], v, samples, i, n, flags, ignore)[1]
        total = _losses.with_term(total, counted)
    return compensated(total[0], total[1])


def _kernels(layout: ModuleType) -> dict[str, Any]:
    return {
        "softmax": _row_by_row(layout, "softmax", 0.0),
        "log_softmax": _row_by_row(layout, "log_softmax", -math.inf),
        "fold": _fold(layout),
        "logsumexp": _logsumexp(layout),
        "logsumexp_vjp": _slopes_of_logsumexp(layout, "logsumexp_vjp"),
        WITH_SLOPES: _slopes_of_logsumexp(layout, WITH_SLOPES),
        "softmax_vjp": _vjp(layout, "softmax_vjp"),
        "log_softmax_vjp": _vjp(layout, "log_softmax_vjp"),
        "cross_entropy": _cross_entropy(layout, False),
        "cross_entropy_value_and_grad": _cross_entropy(layout, True),
        "soft_cross_entropy": _soft(layout, False),
        "soft_cross_entropy_value_and_grad": _soft(layout, True),
    }


MODULES = {
    "rows": _rows,
    "groups": _groups,
    "blocks": _blocks,
    "columns": _columns,
    "narrow": _narrow,
}
LAYOUTS = {name: _kernels(layout) for name, layout in MODULES.items()}
