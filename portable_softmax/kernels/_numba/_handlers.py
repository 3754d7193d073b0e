"""The kernels as native handlers of XLA's FFI: no copy, and no Python in XLA's threads.

XLA calls a C function with the address of a call frame (xla/ffi/api/c_api.h, version `API`), which
holds the addresses of its buffers and of the attribute "plan": integers, named below, that a call
is lowered with. The handler makes a job of them, asks XLA's pool for help, and takes pieces itself
until there are none left. It waits for helpers that are at work, never for one in a queue: that
one finds no piece when it comes. Whoever leaves a job last frees it.
"""

from __future__ import annotations

import math
import mmap
import sys

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from portable_softmax import portable
from portable_softmax.kernels._numba._compensation import compensated
from portable_softmax.kernels._numba._driver import kernels_of
from portable_softmax.kernels._numba._jit import INLINED, function, named
from portable_softmax.kernels._numba._kernels import scan
from portable_softmax.kernels._numba._losses import (
    EACH,
    IGNORING,
    SAMPLED,
    WEIGHTED,
    no_sum,
    with_term,
)
from portable_softmax.kernels._numba._memory import I64, smaller
from portable_softmax.kernels._request import BY_Q, DIVERGENCES, ENTROPIES, FOLD, RUNNING

# Of the frame that is read here, and the last in which nothing that is read has moved.
API, LAST_API = (0, 3), (0, 5)
IS_LINUX = sys.platform == "linux"

# Words of the frame, of its API, of a buffer, of an attribute that is an array, of an extension.
EXTENSION, API_TABLE, CONTEXT, STAGE = 1, 2, 3, 4
ARGUMENTS, RESULTS, ATTRIBUTES = 5, 10, 15  # their number is 2 words on, the buffers are 4 on
VERSION, MAKE_ERROR, DESTROY_ERROR, SCHEDULE, COUNT_THREADS = 4, 6, 8, 17, 18
DTYPE, DATA, RANK, DIMS = 2, 3, 4, 5
ARRAY_SIZE, ARRAY_DATA = 1, 2
EXTENSION_TYPE, METADATA, METADATA_VERSION = 1, 3, 3
EXECUTE, IS_METADATA, IS_ARRAY, INT64 = 3, 1, 1, 5
INVALID_ARGUMENT, OUT_OF_MEMORY = 3, 8

# What the frame calls dtypes, and as what the kernels read them.
CODES = {"bool": 1, "int32": 4, "float16": 10, "float32": 11, "float64": 12, "bfloat16": 16}
SINGLE, DOUBLE = CODES["float32"], CODES["float64"]
STORED = {
    "float16": types.uint16,
    "bfloat16": types.int16,
    "float32": types.float32,
    "float64": types.float64,
}

# What buffers hold, arguments first. `second` is labels, a distribution, an upstream gradient or
# the logits of q; `numbers` are those of a temperature and then the factor of a divergence's
# gradients, or the smoothing, z and softcap of a loss; `other` is the gradient by q.
ROLES = ("x", "second", "mask", "weight", "samples", "numbers", "out", "grad", "other")
X, SECOND, MASK, WEIGHT, SAMPLES, NUMBERS, OUT, GRAD, OTHER = range(9)
END = len(ROLES)

# Words of a plan: `_driver.Plan`, then what a loss needs, then the code of each buffer's dtype, 0
# for one that a call does without, and its elements.
N, INNER, HEIGHT, WORKSPACE, STEP, GROUPS, PIECES = range(7)
FLAGS, IGNORE, LENGTH, MEAN = 7, 8, 9, 10  # FLAGS is the kernel's number if that is no loss
SMOOTHING, Z, CLASSES, SCALE = 11, 12, 13, 14  # float64
KINDS = 15
SIZES, WORDS = KINDS + END, KINDS + 2 * END
# Words of a job: where the pieces stand, who is at work, who holds it, how many threads there are;
# the plan; where the buffers are; a 1 of the computation's dtype; the sums of the pieces.
COUNTER, WORKING, HOLDERS, THREADS, PLAN = 0, 1, 2, 3, 4
BUFFERS = PLAN + WORDS
ONE = BUFFERS + END
SUMS = ONE + 1


# --------------------------------------------------------------------------- memory and calls


@intrinsic
def word(typing, address, i):
    """The i-th integer at an address."""

    def generate(context, builder, signature, args):
        return builder.load(_place(builder, *args))

    return types.int64(types.int64, types.int64), generate


@intrinsic
def put(typing, address, i, value):
    """Write the i-th integer at an address."""

    def generate(context, builder, signature, args):
        builder.store(args[2], _place(builder, *args[:2]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def add(typing, address, i, n):
    """Add to an integer that other threads use; return it before."""

    def generate(context, builder, signature, args):
        return builder.atomic_rmw("add", _place(builder, *args[:2]), args[2], "seq_cst")

    return types.int64(types.int64, types.int64, types.int64), generate


def _place(builder, address, i):
    return builder.gep(builder.inttoptr(address, I64.as_pointer()), [i])


@intrinsic
def at(typing, address, dtype):
    """An address as a pointer to numbers of a dtype."""

    def generate(context, builder, signature, args):
        kind = context.get_value_type(signature.return_type)
        return builder.inttoptr(args[0], kind)

    return types.CPointer(dtype.dtype)(types.int64, dtype), generate


@intrinsic
def text(typing, literal):
    """The address of a constant string."""
    if not isinstance(literal, types.StringLiteral):
        return None

    def generate(context, builder, signature, args):
        constant = context.insert_const_string(builder.module, literal.literal_value)
        return builder.ptrtoint(constant, I64)

    return types.int64(literal), generate


@intrinsic
def call(typing, called, size, a, b, c):
    """Call a function of XLA's, which takes the address of a struct: its size, null, and words."""

    def generate(context, builder, signature, args):
        struct = cgutils.alloca_once(builder, I64, size=I64(5))
        for i, value in enumerate((args[1], I64(0), *args[2:])):
            builder.store(value, builder.gep(struct, [I64(i)]))
        kind = ir.FunctionType(I64, [I64.as_pointer()])
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), [struct])

    return types.int64(*[types.int64] * 5), generate


@intrinsic
def address_of(typing, called):
    """The address of a C function in this module that calls a compiled one with a word."""

    def generate(context, builder, signature, args):
        called.dispatcher.compile((types.int64,))
        compiled = called.dispatcher.overloads[types.int64,]
        context.add_linking_libs((compiled.library,))
        inner = context.declare_function(builder.module, compiled.fndesc)
        name = builder.module.get_unique_name("portable_softmax_task")
        task = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [I64]), name)
        task.linkage = "internal"
        body = ir.IRBuilder(task.append_basic_block())
        of = compiled.signature
        context.call_conv.call_function(body, inner, of.return_type, of.args, [task.args[0]])
        body.ret_void()
        return builder.ptrtoint(task, I64)

    return types.int64(called), generate


malloc = types.ExternalFunction("malloc", types.int64(types.int64))
free = types.ExternalFunction("free", types.void(types.int64))
yield_to_others = types.ExternalFunction("sched_yield", types.int32())

# What is called and not inlined, neither: LLVM sees all of it in the handler, once.
_called = njit(**{**INLINED, "forceinline": False})


def task(name):
    """Return the decorator of what a handler calls and does not inline."""
    return lambda f: _called(named(f, f"{name}.{f.__name__}"))


VERSION_WORD, LAST_VERSION = (major | minor << 32 for major, minor in (API, LAST_API))


# --------------------------------------------------------------------------- operations
#
# Kernels look at the addresses of most arrays alone: their shapes are those of a number.


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


def _three(run, number_of, first_of, second_of, third_of):
    """Return what runs a kernel of three arrays and a number."""

    @function
    def body(job, workspace):
        arrays, numbers = (first_of(job), second_of(job), third_of(job)), (number_of(job),)
        step, groups = word(job, PLAN + STEP), word(job, PLAN + GROUPS)
        run(arrays, numbers, shape_of(job), workspace, pieces_of(job), step, groups)

    return body


def _upstream(run, stored, compute, masked):
    """Return what runs the gradient through logsumexp."""
    x_of, dy_of, out_of = _rows_of(X, stored), _flat(SECOND, compute), _rows_of(OUT, stored)
    mask_of = _flat(MASK, types.uint8) if masked else nothing

    @function
    def body(job, workspace):
        arrays = x_of(job), dy_of(job), out_of(job), mask_of(job)
        step, groups = word(job, PLAN + STEP), word(job, PLAN + GROUPS)
        run(arrays, (0,), shape_of(job), workspace, pieces_of(job), step, groups)

    return body


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
        if word(job, PLAN + MEAN) and flags & (IGNORING | WEIGHTED | SAMPLED):
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


def _soft_loss(run, stored, compute, gradient):
    x_of, t_of, losses_of = _rows_of(X, stored), _rows_of(SECOND, compute), _flat(OUT, compute)
    given = _flat(NUMBERS, compute)

    @function
    def sums_of(job):
        return carray(at(job + 8 * SUMS, types.float64), word(job, PLAN + PIECES))

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

    @function
    def finish(job):
        if integer_of(job) & EACH:
            return
        sums, loss = sums_of(job), no_sum()
        for i in range(word(job, PLAN + PIECES)):
            loss = with_term(loss, sums[i])
        result = compensated(loss[0], loss[1])
        losses_of(job)[0] = result / word(job, PLAN + LENGTH) if word(job, PLAN + MEAN) else result

    return _with_gradient(run, arrays_of, numbers_of, stored, gradient), prepare, finish


# --------------------------------------------------------------------------- the handler


@function
def failure(frame, code, message):
    """Return an error of XLA's."""
    return call(word(word(frame, API_TABLE), MAKE_ERROR), 28, message, code, 0)


@function
def low_half(value):
    return value & 0xFFFFFFFF


@function
def is_as_planned(buffer, code, size):
    elements = 1
    for i in range(word(buffer, RANK)):
        elements *= word(word(buffer, DIMS), i)
    return low_half(word(buffer, DTYPE)) == code and elements == size


@function
def number_of_buffers(plan, first, end):
    found = 0
    for role in range(first, end):
        found += word(plan, KINDS + role) != 0
    return found


@function
def find_buffers(frame, job):
    """Write where the buffers are to a job; return whether they are as planned."""
    for role in range(END):
        put(job, BUFFERS + role, 0)
    for role in range(END):
        code, size = word(job, PLAN + KINDS + role), word(job, PLAN + SIZES + role)
        if code != 0:
            those, first = (ARGUMENTS, X) if role < OUT else (RESULTS, OUT)
            i = number_of_buffers(job + 8 * PLAN, first, role)
            buffer = word(word(frame, those + 4), i)
            if not is_as_planned(buffer, code, size):
                return False
            put(job, BUFFERS + role, word(buffer, DATA))
    return True


madvise = types.ExternalFunction("madvise", types.int32(types.int64, types.int64, types.int32))
PAGE, HUGE, MADV_HUGEPAGE = mmap.PAGESIZE, 1 << 22, 14


@function
def item_size(code):
    return 8 if code == DOUBLE else 4 if code == SINGLE else 2


@function
def ask_for_large_pages(job):
    """Let Linux bring the results' memory in large pages, as NumPy does.

    XLA makes a result anew for each call: in small pages its first touch takes as long as three
    passes over it. One that is written over an array has been touched.
    """
    for role in range(OUT, END):
        start, kind = word(job, BUFFERS + role), word(job, PLAN + KINDS + role)
        size = word(job, PLAN + SIZES + role) * item_size(kind)
        over = start == word(job, BUFFERS + X) or start == word(job, BUFFERS + SECOND)
        if size >= HUGE and not over:
            skipped = -start % PAGE
            madvise(start + skipped, size - skipped, MADV_HUGEPAGE)


# What is the same for every handler is typed and lowered once in a process.
common = task("handlers")


@common
def begin(frame):
    """Return a job; 0, and an error or 0 for none, where there is nothing to do."""
    extension = word(frame, EXTENSION)
    if extension != 0:  # XLA asks which API the handler is made for
        if low_half(word(extension, EXTENSION_TYPE)) == IS_METADATA:
            put(word(extension, METADATA), METADATA_VERSION, VERSION_WORD)
        return 0, 0
    version = word(word(frame, API_TABLE), VERSION)
    if version < VERSION_WORD or version > LAST_VERSION:
        return 0, failure(frame, INVALID_ARGUMENT, text("portable_softmax: another FFI version"))
    if (
        low_half(word(frame, STAGE)) != EXECUTE
        or word(frame, ATTRIBUTES + 2) != 1
        or low_half(word(word(frame, ATTRIBUTES + 3), 0)) != IS_ARRAY
    ):
        return 0, failure(frame, INVALID_ARGUMENT, text("portable_softmax: another call frame"))
    attribute = word(word(frame, ATTRIBUTES + 5), 0)
    plan = word(attribute, ARRAY_DATA)
    if low_half(word(attribute, 0)) != INT64 or word(attribute, ARRAY_SIZE) != WORDS:
        return 0, failure(frame, INVALID_ARGUMENT, text("portable_softmax: another plan"))
    if word(frame, ARGUMENTS + 2) != number_of_buffers(plan, X, OUT) or word(
        frame, RESULTS + 2
    ) != number_of_buffers(plan, OUT, END):
        return 0, failure(frame, INVALID_ARGUMENT, text("portable_softmax: another call frame"))
    job = malloc(8 * (SUMS + 3 * word(plan, PIECES)))
    if job == 0:
        return 0, failure(frame, OUT_OF_MEMORY, text("portable_softmax: no memory for a job"))
    for i in range(WORDS):
        put(job, PLAN + i, word(plan, i))
    put(job, COUNTER, 0)
    put(job, WORKING, 0)
    put(job, HOLDERS, 1)
    if not find_buffers(frame, job):
        free(job)
        return 0, failure(frame, INVALID_ARGUMENT, text("portable_softmax: another buffer"))
    if IS_LINUX:
        ask_for_large_pages(job)
    return job, 0


@common
def ask_for_help(frame, job, help_out):
    """Put as many tasks as can be of use into the queue of XLA's pool."""
    helpers = word(job, PLAN + PIECES) - 1
    if helpers < 1:
        return
    table, context = word(frame, API_TABLE), word(frame, CONTEXT)
    error = call(word(table, COUNT_THREADS), 32, context, job + 8 * THREADS, 0)
    if error == 0:
        for _ in range(smaller(helpers, word(job, THREADS) - 1)):
            add(job, HOLDERS, 1)
            error = call(word(table, SCHEDULE), 40, context, help_out, job)
            if error != 0:
                add(job, HOLDERS, -1)
                break
    if error != 0:  # this thread does it all
        call(word(table, DESTROY_ERROR), 24, error, 0, 0)


@common
def wait(job, done):
    """Wait for those who are at work."""
    if not done:  # nor does anybody begin another piece
        add(job, COUNTER, word(job, PLAN + PIECES))
    while add(job, WORKING, 0) > 0:
        yield_to_others()


@common
def leave(job):
    if add(job, HOLDERS, -1) == 1:
        free(job)


@common
def end(frame, job, done):
    """Leave, and return an error or 0."""
    leave(job)
    if not done:
        return failure(frame, OUT_OF_MEMORY, text("portable_softmax: no memory for a row"))
    return 0


def _handler(name, body, prepare, finish, compute):
    """Return the C function."""
    item = compute.bitwidth // 8

    @task(name)
    def work(job):
        """Take pieces until there are none left; return whether there was memory for it."""
        size = word(job, PLAN + WORKSPACE)
        memory = malloc(size * item)
        if memory == 0:
            return False
        body(job, carray(at(memory, compute), size))
        free(memory)
        return True

    @task(name)
    def help_out(job):
        add(job, WORKING, 1)
        work(job)
        add(job, WORKING, -1)
        leave(job)

    def handle(frame):
        job, error = begin(frame)
        if job == 0:
            return error
        prepare(job)
        ask_for_help(frame, job, address_of(help_out))
        done = work(job)
        wait(job, done)
        finish(job)
        return end(frame, job, done)

    return named(handle, name)


def handler(name, operation, layout, dtype, *variants):
    """Return the handler of an operation, to be compiled; `name` is unique among them.

    Variants are the options that a kernel is compiled for. A kernel that arrays of NumPy or torch
    have taken is not compiled again: its code is in the cache, and is linked into the handler.
    """
    run, stored = kernels_of(operation)[layout][operation], STORED[dtype]
    compute = types.float64 if dtype == "float64" else types.float32
    tempered = "temperature" in variants
    if operation in RUNNING:
        body = _running(run, stored, operation == RUNNING[1])
        return _handler(name, body, nothing, nothing, types.float64)
    if operation == FOLD:
        body = _fold(run, stored, compute, tempered, "where" in variants)
        return _handler(name, body, nothing, nothing, compute)
    if operation in (*ENTROPIES, *DIVERGENCES, BY_Q):
        if operation in ENTROPIES:
            body = _entropy(run, stored, operation == ENTROPIES[1])
        else:
            body = _divergence(run, stored, compute, operation, tempered)
        return _handler(name, body, nothing, nothing, compute)
    if operation in ("softmax", "log_softmax", "logsumexp"):
        number_of = _temperature(compute) if tempered else integer_of
        out_of = (_flat if operation == "logsumexp" else _rows_of)(OUT, stored)
        mask_of = _flat(MASK, types.uint8) if "where" in variants else nothing
        body = _three(run, number_of, _rows_of(X, stored), out_of, mask_of)
        return _handler(name, body, nothing, nothing, compute)
    if operation == "logsumexp_vjp":
        body = _upstream(run, stored, compute, "where" in variants)
        return _handler(name, body, nothing, nothing, compute)
    if operation in ("softmax_vjp", "log_softmax_vjp"):
        number_of = left_out_of
        if operation == "softmax_vjp":
            number_of = _off_one_of(dtype, compute)
        body = _three(run, number_of, *(_rows_of(role, stored) for role in (X, SECOND, OUT)))
        return _handler(name, body, nothing, nothing, compute)
    gradient = operation.endswith("value_and_grad")
    if operation.startswith("soft_"):
        return _handler(name, *_soft_loss(run, stored, compute, gradient), compute)
    return _handler(name, *_loss(run, stored, compute, gradient, variants), compute)
