"""What a handler reads and writes by address: XLA's call frame, its plan and its job.

The frame is that of xla/ffi/api/c_api.h in the versions from `API` to `LAST_API`; see `_handlers`.
"""

from __future__ import annotations

import mmap
import sys

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from portable_softmax.kernels._numba._jit import INLINED, function, named
from portable_softmax.kernels._numba._memory import I64

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
# gradients, or the smoothing, z and softcap of a loss; `other` is the gradient by q. Of yes-or-no
# labels `samples` are the weights of a yes, and `numbers` 1 - smoothing and smoothing / 2. Beside
# sinks, `weight` is these and `grad` their shares, or `weight` the shares and `grad` sums. Of
# weighted terms `out` is maxima, `grad` the sums of the weights at these, `other` of what is left.
ROLES = ("x", "second", "mask", "weight", "samples", "numbers", "out", "grad", "other")
X, SECOND, MASK, WEIGHT, SAMPLES, NUMBERS, OUT, GRAD, OTHER = range(9)
END = len(ROLES)

# Words of a plan: `_driver.Plan`, then what a loss needs, then the code of each buffer's dtype, 0
# for one that a call does without, and its elements.
N, INNER, HEIGHT, WORKSPACE, STEP, GROUPS, PIECES = range(7)
FLAGS, IGNORE, LENGTH, MEAN = 7, 8, 9, 10  # FLAGS is the kernel's number if that is no loss
SMOOTHING, Z, CLASSES, SCALE = 11, 12, 13, 14  # float64
HELPERS = 15  # how many at most
KINDS = 16
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
_by_call = njit(**{**INLINED, "forceinline": False})


def task(name):
    """Return the decorator of what a handler calls and does not inline."""
    return lambda f: _by_call(named(f, f"{name}.{f.__name__}"))


VERSION_WORD, LAST_VERSION = (major | minor << 32 for major, minor in (API, LAST_API))


# --------------------------------------------------------------------------- the frame


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
def tell_version(frame):
    """Answer XLA where it asks which API the handler is made for."""
    extension = word(frame, EXTENSION)
    if low_half(word(extension, EXTENSION_TYPE)) == IS_METADATA:
        put(word(extension, METADATA), METADATA_VERSION, VERSION_WORD)


@function
def plan_of(frame):
    return word(word(word(frame, ATTRIBUTES + 5), 0), ARRAY_DATA)


@function
def refusal(frame):
    """Return an error of XLA's for a frame that is not as it is read here, else 0."""
    version = word(word(frame, API_TABLE), VERSION)
    if version < VERSION_WORD or version > LAST_VERSION:
        return failure(frame, INVALID_ARGUMENT, text("portable_softmax: another FFI version"))
    if (
        low_half(word(frame, STAGE)) != EXECUTE
        or word(frame, ATTRIBUTES + 2) != 1
        or low_half(word(word(frame, ATTRIBUTES + 3), 0)) != IS_ARRAY
    ):
        return failure(frame, INVALID_ARGUMENT, text("portable_softmax: another call frame"))
    attribute = word(word(frame, ATTRIBUTES + 5), 0)
    if low_half(word(attribute, 0)) != INT64 or word(attribute, ARRAY_SIZE) != WORDS:
        return failure(frame, INVALID_ARGUMENT, text("portable_softmax: another plan"))
    plan = plan_of(frame)
    if word(frame, ARGUMENTS + 2) != number_of_buffers(plan, X, OUT) or word(
        frame, RESULTS + 2
    ) != number_of_buffers(plan, OUT, END):
        return failure(frame, INVALID_ARGUMENT, text("portable_softmax: another call frame"))
    return 0


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
