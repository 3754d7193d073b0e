"""The kernels as native handlers of XLA's FFI: no copy, and no Python in XLA's threads.

XLA calls a C function with the address of a call frame (xla/ffi/api/c_api.h, version `API`), which
holds the addresses of its buffers and of the attribute "plan": integers, named below, that a call
is lowered with. The handler makes a job of them, asks XLA's pool for help, and takes pieces itself
until there are none left. It waits for helpers that are at work, never for one in a queue: that
one finds no piece when it comes. Whoever leaves a job last frees it.
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from portable_softmax.kernels._numba._compensation import compensated
from portable_softmax.kernels._numba._jit import function, named
from portable_softmax.kernels._numba._kernels import BLOCKS, COLUMNS, NARROW, ROWS, scan
from portable_softmax.kernels._numba._losses import EACH, IGNORING, no_sum, with_term
from portable_softmax.kernels._numba._memory import I64

API = (0, 3)  # of the frame that is read here

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
CODES = {"float16": 10, "float32": 11, "float64": 12, "bfloat16": 16, "int32": 4}
STORED = {
    "float16": types.uint16,
    "bfloat16": types.int16,
    "float32": types.float32,
    "float64": types.float64,
}

# Words of a plan: `_driver.Plan`, then what a loss needs, then the elements of each buffer.
N, INNER, HEIGHT, WORKSPACE, STEP, GROUPS, PIECES = range(7)
FLAGS, IGNORE, LENGTH, MEAN = 7, 8, 9, 10  # FLAGS is the kernel's number if that is no loss
SMOOTHING, Z, CLASSES, SCALE = 11, 12, 13, 14  # float64
SIZES, WORDS = 15, 20
# Words of a job: where the pieces stand, who is at work, who holds it, how many threads there are;
# the plan; where the buffers are; a 1 of the computation's dtype; the sums of the pieces.
COUNTER, WORKING, HOLDERS, THREADS, PLAN, BUFFERS, ONE, SUMS = 0, 1, 2, 3, 4, 24, 29, 30


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

_compiled = njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


def task(name):
    """Return the decorator of what a handler calls and does not inline."""
    return lambda f: _compiled(named(f, f"{name}.{f.__name__}"))


VERSION_WORD = API[0] | API[1] << 32


# --------------------------------------------------------------------------- operations
#
# Kernels look at the addresses of most arrays alone: their shapes are those of a number.


@function
def shape_of(job):
    return word(job, PLAN + N), word(job, PLAN + INNER), word(job, PLAN + HEIGHT)


@function
def integer_of(job):
    """Return the kernel's number: a literal would be a type of its own."""
    return word(job, PLAN + FLAGS)


@function
def infinity_of(job):
    return math.inf


@function
def counter_of(job):
    return carray(at(job + 8 * COUNTER, types.int64), 1)


def _row_by_row(run, stored, shape):
    """softmax, log_softmax and logsumexp; `shape` is that of the result."""

    @function
    def body(job, workspace):
        x = carray(at(word(job, BUFFERS), stored), (1, 1))
        out = carray(at(word(job, BUFFERS + 1), stored), shape)
        step, groups = word(job, PLAN + STEP), word(job, PLAN + GROUPS)
        numbers = (integer_of(job),)
        run((x, out, None), numbers, shape_of(job), workspace, counter_of(job), step, groups)

    return body


def _vjp(run, stored, number):
    @function
    def body(job, workspace):
        y = carray(at(word(job, BUFFERS), stored), (1, 1))
        dy = carray(at(word(job, BUFFERS + 1), stored), (1, 1))
        out = carray(at(word(job, BUFFERS + 2), stored), (1, 1))
        step, groups = word(job, PLAN + STEP), word(job, PLAN + GROUPS)
        numbers = (number(job),)
        run((y, dy, out), numbers, shape_of(job), workspace, counter_of(job), step, groups)

    return body


def _loss(run, stored, compute, gradient):
    """Each loss goes to the first result, if its flag is set."""

    @function
    def arrays_of(job):
        return (
            carray(at(word(job, BUFFERS), stored), (1, 1)),
            carray(at(word(job, BUFFERS + 1), types.int32), 1),
            carray(at(word(job, BUFFERS + 2), compute), 1),
            carray(at(job + 8 * ONE, compute), 1),
            carray(at(job + 8 * (PLAN + SMOOTHING), types.float64), 4),
            carray(at(job + 8 * SUMS, types.float64), (1, 3)),
            None,
            None,
        )

    if gradient:

        @function
        def body(job, workspace):
            grad = carray(at(word(job, BUFFERS + 3), stored), (1, 1))
            arrays = arrays_of(job) + (grad,)  # noqa: RUF005 - Numba unpacks none
            numbers = word(job, PLAN + FLAGS), word(job, PLAN + IGNORE), None
            step, groups = word(job, PLAN + STEP), word(job, PLAN + GROUPS)
            run(arrays, numbers, shape_of(job), workspace, counter_of(job), step, groups)

    else:

        @function
        def body(job, workspace):
            arrays = arrays_of(job)
            numbers = word(job, PLAN + FLAGS), word(job, PLAN + IGNORE), None
            step, groups = word(job, PLAN + STEP), word(job, PLAN + GROUPS)
            run(arrays, numbers, shape_of(job), workspace, counter_of(job), step, groups)

    return body


def _nothing():
    @function
    def nothing(job):
        pass

    return nothing, nothing


def _of_a_loss(compute):
    """What is done before the pieces of a loss, and after them."""

    @function
    def prepare(job):
        carray(at(job + 8 * ONE, compute), 1)[0] = 1
        if word(job, PLAN + MEAN) and word(job, PLAN + FLAGS) & IGNORING:
            labels = carray(at(word(job, BUFFERS + 1), types.int32), word(job, PLAN + LENGTH))
            w = carray(at(job + 8 * ONE, compute), 1)
            flags, ignore = word(job, PLAN + FLAGS), word(job, PLAN + IGNORE)
            total = scan(labels, w, None, word(job, PLAN + N), flags, ignore)
            scale = 1.0 / total if total != 0 else 0.0
            carray(at(job + 8 * (PLAN + SCALE), types.float64), 1)[0] = scale

    @function
    def finish(job):
        """Write the sum or the mean, unless each loss is asked for."""
        if word(job, PLAN + FLAGS) & EACH:
            return
        sums = carray(at(job + 8 * SUMS, types.float64), (word(job, PLAN + PIECES), 3))
        loss, weight = no_sum(), no_sum()
        for i in range(word(job, PLAN + PIECES)):
            loss, weight = with_term(loss, sums[i, 0]), with_term(weight, sums[i, 1])
        result = compensated(loss[0], loss[1])
        if word(job, PLAN + MEAN):
            result = result / compensated(weight[0], weight[1])
        carray(at(word(job, BUFFERS + 2), compute), 1)[0] = result

    return prepare, finish


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


def _handler(name, body, prepare, finish, compute, arguments, results):
    """Return the C function; the last two are the codes of the buffers' dtypes."""
    item, first_result = compute.bitwidth // 8, len(arguments)
    codes, buffers = arguments + results, len(arguments) + len(results)

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
    def leave(job):
        if add(job, HOLDERS, -1) == 1:
            free(job)

    @task(name)
    def help_out(job):
        add(job, WORKING, 1)
        work(job)
        add(job, WORKING, -1)
        leave(job)

    @function
    def ask_for_help(frame, job, helpers):
        """Put up to so many tasks into the queue of XLA's pool."""
        table, context = word(frame, API_TABLE), word(frame, CONTEXT)
        error = call(word(table, COUNT_THREADS), 32, context, job + 8 * THREADS, 0)
        if error == 0:
            for _ in range(min(helpers, word(job, THREADS) - 1)):
                add(job, HOLDERS, 1)
                error = call(word(table, SCHEDULE), 40, context, address_of(help_out), job)
                if error != 0:
                    add(job, HOLDERS, -1)
                    break
        if error != 0:  # this thread does it all
            call(word(table, DESTROY_ERROR), 24, error, 0, 0)

    def handle(frame):
        extension = word(frame, EXTENSION)
        if extension != 0:  # XLA asks which API the handler is made for
            if low_half(word(extension, EXTENSION_TYPE)) == IS_METADATA:
                put(word(extension, METADATA), METADATA_VERSION, VERSION_WORD)
            return 0
        if word(word(frame, API_TABLE), VERSION) != VERSION_WORD:
            return failure(frame, INVALID_ARGUMENT, text("portable_softmax: another FFI version"))
        if (
            low_half(word(frame, STAGE)) != EXECUTE
            or word(frame, ARGUMENTS + 2) != first_result
            or word(frame, RESULTS + 2) != buffers - first_result
            or word(frame, ATTRIBUTES + 2) != 1
            or low_half(word(word(frame, ATTRIBUTES + 3), 0)) != IS_ARRAY
        ):
            return failure(frame, INVALID_ARGUMENT, text("portable_softmax: another call frame"))
        attribute = word(word(frame, ATTRIBUTES + 5), 0)
        plan = word(attribute, ARRAY_DATA)
        if low_half(word(attribute, 0)) != INT64 or word(attribute, ARRAY_SIZE) != WORDS:
            return failure(frame, INVALID_ARGUMENT, text("portable_softmax: another plan"))
        pieces = word(plan, PIECES)
        job = malloc(8 * (SUMS + 3 * pieces))
        if job == 0:
            return failure(frame, OUT_OF_MEMORY, text("portable_softmax: no memory for a job"))
        for i in range(WORDS):
            put(job, PLAN + i, word(plan, i))
        put(job, COUNTER, 0)
        put(job, WORKING, 0)
        put(job, HOLDERS, 1)
        for i in range(buffers):
            those = ARGUMENTS if i < first_result else RESULTS
            buffer = word(word(frame, those + 4), i if i < first_result else i - first_result)
            if not is_as_planned(buffer, codes[i], word(plan, SIZES + i)):
                free(job)
                return failure(frame, INVALID_ARGUMENT, text("portable_softmax: another buffer"))
            put(job, BUFFERS + i, word(buffer, DATA))
        prepare(job)
        if pieces > 1:
            ask_for_help(frame, job, pieces - 1)
        done = work(job)
        if not done:  # nor does anybody begin another piece
            add(job, COUNTER, pieces)
        while add(job, WORKING, 0) > 0:
            yield_to_others()
        finish(job)
        leave(job)
        if not done:
            return failure(frame, OUT_OF_MEMORY, text("portable_softmax: no memory for a row"))
        return 0

    return named(handle, name)


LAYOUTS = {"rows": ROWS, "blocks": BLOCKS, "columns": COLUMNS, "narrow": NARROW}


def handler(name, operation, layout, dtype):
    """Return the handler of an operation, to be compiled; `name` is unique among them."""
    run, stored = LAYOUTS[layout][operation], STORED[dtype]
    compute = types.float64 if dtype == "float64" else types.float32
    one, computed = CODES[dtype], CODES[str(compute)]
    if operation in ("softmax", "log_softmax", "logsumexp"):
        body = _row_by_row(run, stored, 1 if operation == "logsumexp" else (1, 1))
        return _handler(name, body, *_nothing(), compute, (one,), (one,))
    if operation in ("softmax_vjp", "log_softmax_vjp"):
        number = integer_of if operation == "softmax_vjp" else infinity_of
        return _handler(name, _vjp(run, stored, number), *_nothing(), compute, (one, one), (one,))
    gradient = operation == "cross_entropy_value_and_grad"
    body = _loss(run, stored, compute, gradient)
    results = (computed, one) if gradient else (computed,)
    return _handler(name, body, *_of_a_loss(compute), compute, (one, CODES["int32"]), results)
