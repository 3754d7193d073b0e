"""What a handler runs for each operation: a kernel on the buffers and numbers of a job.

Kernels look at the addresses of most arrays alone: their shapes are those of a number.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, types

from portable_softmax import portable
from portable_softmax.kernels._numba._compensation import compensated
from portable_softmax.kernels._numba._driver import kernels_of
from portable_softmax.kernels._numba._frame import (
    BUFFERS,
    COUNTER,
    FLAGS,
    GRAD,
    GROUPS,
    HEIGHT,
    IGNORE,
    INNER,
    LENGTH,
    MASK,
    MEAN,
    NUMBERS,
    ONE,
    OTHER,
    OUT,
    PIECES,
    PLAN,
    SAMPLES,
    SECOND,
    SIZES,
    SMOOTHING,
    STEP,
    STORED,
    SUMS,
    WEIGHT,
    N,
    X,
    at,
    put,
    word,
)
from portable_softmax.kernels._numba._jit import function
from portable_softmax.kernels._numba._kernels import scan
from portable_softmax.kernels._numba._losses import (
    EACH,
    IGNORING,
    SAMPLED,
    no_sum,
    with_term,
)
from portable_softmax.kernels._numba._losses import WEIGHTED as HAS_WEIGHTS
from portable_softmax.kernels._request import (
    BESIDE_SINKS,
    BINARY,
    BY_Q,
    DIVERGENCES,
    ENTROPIES,
    FOLD,
    RUNNING,
    WEIGHTED,
    WITH_SLOPES,
)


@function
def shape_of(job):
    return word(job, PLAN + N), word(job, PLAN + INNER), word(job, PLAN + HEIGHT)


@function
def pieces_of(job):
    return carray(at(job + 8 * COUNTER, types.int64), 1)


@function
def integer_of(job):
    """Return the kernel's number: a literal would be a type of its own."""
    return word(job, PLAN + FLAGS)


@function
def left_out_of(job):
    """Return what a mask leaves out of the answer of log_softmax; a nan is equal to nothing."""
    return math.nan if integer_of(job) else math.inf


def _off_one_of(dtype, compute):
    """Return the function that returns how far from 1 the sum of a softmax may be."""
    off = portable.off_one(float(np.finfo(compute.name).eps), portable.ROUNDING.get(dtype, 0.0))

    @function
    def off_one_of(job):
        return off

    return off_one_of


@function
def nothing(job):
    return None


def _rows_of(role, dtype):
    """Return the function that returns a buffer of rows."""

    @function
    def rows_of(job):
        return carray(at(word(job, BUFFERS + role), dtype), (1, 1))

    return rows_of


def _flat(role, dtype):
    """Return the function that returns a buffer with its elements in one axis."""

    @function
    def array_of(job):
        return carray(at(word(job, BUFFERS + role), dtype), word(job, PLAN + SIZES + role))

    return array_of


def _temperature(compute):
    numbers_of = _flat(NUMBERS, compute)

    @function
    def temperature_of(job):
        t = numbers_of(job)
        return (
            np.float64(t[0]),
            np.float64(t[1]),
            np.float64(t[2]),
            np.float64(t[3]),
            np.float64(t[4]),
        )

    return temperature_of


def _arrays(first, *others):
    """Return the function that returns what each of some returns: Numba unpacks no tuple."""
    if not others:

        @function
        def one(job):
            return (first(job),)

        return one
    rest = _arrays(*others)

    @function
    def every(job):
        return (first(job),) + rest(job)  # noqa: RUF005 - Numba unpacks none

    return every


def _on(run, arrays_of, number_of):
    """Return what runs a kernel of some arrays and a number."""

    @function
    def body(job, workspace):
        step, groups = word(job, PLAN + STEP), word(job, PLAN + GROUPS)
        arrays, numbers = arrays_of(job), (number_of(job),)
        run(arrays, numbers, shape_of(job), workspace, pieces_of(job), step, groups)

    return body


def _fold(run, stored, compute, tempered, masked):
    """Return what runs the fold, whose results are the maxima and the rests."""
    mask_of = _flat(MASK, types.uint8) if masked else nothing
    results = _flat(OUT, compute), _flat(GRAD, compute)
    arrays_of = _arrays(_rows_of(X, stored), *results, mask_of)
    return _on(run, arrays_of, _temperature(compute) if tempered else integer_of)


def _slopes_of_logsumexp(run, stored, compute, operation, masked):
    """Return what runs softmax beside logsumexp, or times upstream gradients."""
    mask_of = _flat(MASK, types.uint8) if masked else nothing
    roles = (_flat(OUT, stored), _rows_of(GRAD, stored))
    if operation == "logsumexp_vjp":
        roles = (_flat(SECOND, compute), _rows_of(OUT, stored))
    return _on(run, _arrays(_rows_of(X, stored), *roles, mask_of), integer_of)


def _weighted_sums(run, stored, compute):
    """Return what runs the sums of weighted terms."""
    results = _flat(OUT, compute), _flat(GRAD, compute), _flat(OTHER, compute)
    arrays_of = _arrays(_rows_of(X, stored), _flat(WEIGHT, compute), *results)
    return _on(run, arrays_of, integer_of)


def _beside_sink(run, stored, compute, operation, tempered, masked):
    """Return what runs rows with their sinks, or the gradient through them."""
    if operation in BESIDE_SINKS[:2]:
        mask_of = _flat(MASK, types.uint8) if masked else nothing
        given = _rows_of(X, stored), _rows_of(OUT, stored), mask_of
        number_of = _temperature(compute) if tempered else integer_of
    else:
        given = tuple(_rows_of(role, stored) for role in (X, SECOND, OUT))
        number_of = left_out_of
    # The sinks and what is written of them; or the shares that are read, and sums.
    return _on(run, _arrays(*given, _flat(WEIGHT, compute), _flat(GRAD, compute)), number_of)


def _entropy(run, stored, gradient):
    """Return what runs the entropy."""
    results = [_flat(OUT, stored), *([_rows_of(GRAD, stored)] if gradient else [])]
    return _on(run, _arrays(_rows_of(X, stored), *results), integer_of)


def _divergence(run, stored, compute, operation, tempered):
    """Return what runs the divergence, the factor of its gradients the last of the numbers."""
    roles = {DIVERGENCES[0]: (), BY_Q: (GRAD,)}.get(operation, (GRAD, OTHER))
    given = _rows_of(X, stored), _rows_of(SECOND, stored), _flat(OUT, compute)
    arrays_of = _arrays(*given, *(_rows_of(role, stored) for role in roles))
    t_of, last = (_temperature(compute), 5) if tempered else (integer_of, 0)
    numbers = _flat(NUMBERS, compute)

    if roles:

        @function
        def number_of(job):
            return t_of(job), np.float64(numbers(job)[last])

    else:

        @function
        def number_of(job):
            return t_of(job), 1.0

    return _on(run, arrays_of, number_of)


def _running(run, stored, upstream):
    """Return what runs the logarithms of running sums, or the gradient through them."""
    roles = (X, SECOND, OUT) if upstream else (X, OUT)
    arrays_of = _arrays(*(_rows_of(role, stored) for role in roles))

    @function
    def body(job, workspace):
        n, inner, outer = shape_of(job)
        shape = n, inner, outer, word(job, PLAN + LENGTH)
        step, groups = word(job, PLAN + STEP), word(job, PLAN + GROUPS)
        run(arrays_of(job), (), shape, workspace, pieces_of(job), step, groups)

    return body


def _with_gradient(run, arrays_of, numbers_of, stored, gradient):
    """Return what runs a kernel of a loss, its gradient the last of the arrays."""
    grad_of = _rows_of(GRAD, stored)

    if gradient:

        @function
        def every(job):
            return arrays_of(job) + (grad_of(job),)  # noqa: RUF005 - Numba unpacks none

    else:
        every = arrays_of

    @function
    def body(job, workspace):
        step, groups = word(job, PLAN + STEP), word(job, PLAN + GROUPS)
        numbers = numbers_of(job)
        run(every(job), numbers, shape_of(job), workspace, pieces_of(job), step, groups)

    return body


@function
def options_of(job):
    return carray(at(job + 8 * (PLAN + SMOOTHING), types.float64), 4)


def _loss(run, stored, compute, gradient, variants):
    """Each loss goes to the first result, if its flag is set."""
    x_of, labels_of = _rows_of(X, stored), _flat(SECOND, types.int32)
    losses_of, weight_of = _flat(OUT, compute), _flat(WEIGHT, compute)
    mask_of = _flat(MASK, types.uint8) if "where" in variants else nothing
    samples_of = _flat(SAMPLES, compute) if "sample_weight" in variants else nothing
    cap_of, given = nothing, _flat(NUMBERS, compute)
    if "softcap" in variants:

        @function
        def cap_of(job):
            return np.float64(given(job)[2])

    @function
    def arrays_of(job):
        sums = carray(at(job + 8 * SUMS, types.float64), (1, 3))
        return (
            x_of(job), labels_of(job), losses_of(job), weight_of(job), options_of(job), sums,
            mask_of(job), samples_of(job),
        )  # fmt: skip

    @function
    def numbers_of(job):
        return word(job, PLAN + FLAGS), word(job, PLAN + IGNORE), cap_of(job)

    @function
    def prepare(job):
        carray(at(job + 8 * ONE, compute), 1)[0] = 1
        if word(job, BUFFERS + WEIGHT) == 0:
            put(job, BUFFERS + WEIGHT, job + 8 * ONE)
        n, flags, w, options = word(job, PLAN + N), integer_of(job), weight_of(job), options_of(job)
        if word(job, BUFFERS + NUMBERS) != 0:
            options[0], options[1] = given(job)[0], given(job)[1]
        if options[0] != 0:
            total = no_sum()
            for i in range(n):
                total = with_term(total, np.float64(w[i]))
            options[2] = compensated(total[0], total[1])
        if word(job, PLAN + MEAN) and flags & (IGNORING | HAS_WEIGHTS | SAMPLED):
            ignore = word(job, PLAN + IGNORE)
            divisor = scan(labels_of(job), w, samples_of(job), n, flags, ignore)
            options[3] = 1.0 / divisor if divisor != 0 else 0.0

    @function
    def finish(job):
        """Write the sum or the mean, unless each loss is asked for."""
        if integer_of(job) & EACH:
            return
        sums = carray(at(job + 8 * SUMS, types.float64), (word(job, PLAN + PIECES), 3))
        loss, weight = no_sum(), no_sum()
        for i in range(word(job, PLAN + PIECES)):
            loss, weight = with_term(loss, sums[i, 0]), with_term(weight, sums[i, 1])
        result = compensated(loss[0], loss[1])
        if word(job, PLAN + MEAN):
            divisor = compensated(weight[0], weight[1])
            result = result / divisor if divisor != 0 else math.nan
        losses_of(job)[0] = result

    return _with_gradient(run, arrays_of, numbers_of, stored, gradient), prepare, finish


@function
def sums_of(job):
    """The sum of each piece, where it has but one."""
    return carray(at(job + 8 * SUMS, types.float64), word(job, PLAN + PIECES))


def _adding_up(losses_of):
    """Return what writes the sum or the mean of such pieces, unless each loss is asked for."""

    @function
    def finish(job):
        if integer_of(job) & EACH:
            return
        sums, loss = sums_of(job), no_sum()
        for i in range(word(job, PLAN + PIECES)):
            loss = with_term(loss, sums[i])
        result = compensated(loss[0], loss[1])
        losses_of(job)[0] = result / word(job, PLAN + LENGTH) if word(job, PLAN + MEAN) else result

    return finish


def _soft_loss(run, stored, compute, gradient):
    x_of, t_of, losses_of = _rows_of(X, stored), _rows_of(SECOND, compute), _flat(OUT, compute)
    given = _flat(NUMBERS, compute)

    @function
    def arrays_of(job):
        return x_of(job), t_of(job), losses_of(job), options_of(job), sums_of(job)

    @function
    def numbers_of(job):
        return (integer_of(job),)

    @function
    def prepare(job):
        """The options are z and the factor of the gradient."""
        options = options_of(job)
        options[0], options[1] = 0.0, options[3]
        if word(job, BUFFERS + NUMBERS) != 0:
            options[0] = given(job)[1]

    body = _with_gradient(run, arrays_of, numbers_of, stored, gradient)
    return body, prepare, _adding_up(losses_of)


def _of_entries(run, stored, compute, gradient, variants):
    """Return what runs the loss of yes-or-no labels, their weights in the place of positions'."""
    every = "each" in variants
    losses_of = _flat(OUT, compute)
    weights_of = _flat(WEIGHT, compute) if "weight" in variants else nothing
    yeses_of = _flat(SAMPLES, compute) if "pos_weight" in variants else nothing
    given = _flat(NUMBERS, compute)

    @function
    def number_of(job):
        scale, kept, half = options_of(job)[3], 1.0, 0.0
        if word(job, BUFFERS + NUMBERS) != 0:
            kept, half = np.float64(given(job)[0]), np.float64(given(job)[1])
        return kept, half, scale

    arrays_of = _arrays(
        *(_flat(X, stored), _flat(SECOND, compute), weights_of, yeses_of),
        *(losses_of if every else nothing, _flat(GRAD, stored) if gradient else nothing),
        sums_of,
    )

    return _on(run, arrays_of, number_of), nothing, _adding_up(losses_of)


def work_of(operation, layout, dtype, *variants):
    """Return what runs a call, what prepares and what finishes it, and its compute dtype.

    Variants are the options that a kernel is compiled for. A kernel that arrays of NumPy or torch
    have taken is not compiled again: its code is in the cache, and is linked into the handler.
    """
    kernel = BINARY[0] if operation in BINARY else operation
    run, stored = kernels_of(kernel)[layout][kernel], STORED[dtype]
    compute = types.float64 if dtype == "float64" else types.float32
    tempered = "temperature" in variants
    if operation in RUNNING:
        body = _running(run, stored, operation == RUNNING[1])
        return body, nothing, nothing, types.float64
    if operation == FOLD:
        body = _fold(run, stored, compute, tempered, "where" in variants)
        return body, nothing, nothing, compute
    if operation == WEIGHTED[0]:
        return _weighted_sums(run, stored, compute), nothing, nothing, compute
    if operation in (*ENTROPIES, *DIVERGENCES, BY_Q):
        if operation in ENTROPIES:
            body = _entropy(run, stored, operation == ENTROPIES[1])
        else:
            body = _divergence(run, stored, compute, operation, tempered)
        return body, nothing, nothing, compute
    if operation in ("softmax", "log_softmax", "logsumexp"):
        number_of = _temperature(compute) if tempered else integer_of
        out_of = (_flat if operation == "logsumexp" else _rows_of)(OUT, stored)
        mask_of = _flat(MASK, types.uint8) if "where" in variants else nothing
        body = _on(run, _arrays(_rows_of(X, stored), out_of, mask_of), number_of)
        return body, nothing, nothing, compute
    if operation in BESIDE_SINKS:
        body = _beside_sink(run, stored, compute, operation, tempered, "where" in variants)
        return body, nothing, nothing, compute
    if operation in (WITH_SLOPES, "logsumexp_vjp"):
        body = _slopes_of_logsumexp(run, stored, compute, operation, "where" in variants)
        return body, nothing, nothing, compute
    if operation in ("softmax_vjp", "log_softmax_vjp"):
        number_of = left_out_of
        if operation == "softmax_vjp":
            number_of = _off_one_of(dtype, compute)
        arrays_of = _arrays(*(_rows_of(role, stored) for role in (X, SECOND, OUT)))
        body = _on(run, arrays_of, number_of)
        return body, nothing, nothing, compute
    gradient = operation.endswith("value_and_grad")
    if operation in BINARY:
        return *_of_entries(run, stored, compute, gradient, variants), compute
    if operation.startswith("soft_"):
        return *_soft_loss(run, stored, compute, gradient), compute
    return *_loss(run, stored, compute, gradient, variants), compute
