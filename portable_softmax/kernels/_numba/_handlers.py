"""The kernels as native handlers of XLA's FFI: no copy, and no Python in XLA's threads.

XLA calls a C function with the address of a call frame (xla/ffi/api/c_api.h, version `API`), which
holds the addresses of its buffers and of the attribute "plan": integers that a call is lowered
with. Both are read in `_frame`. The handler makes a job of them, asks XLA's pool for help, and
takes pieces itself until there are none left. It waits for helpers that are at work, never for one
in a queue: that one finds no piece when it comes. Whoever leaves a job last frees it.
"""

from __future__ import annotations

from numba import carray

from portable_softmax.kernels._numba._bodies import work_of
from portable_softmax.kernels._numba._frame import (
    API_TABLE,
    CONTEXT,
    COUNT_THREADS,
    COUNTER,
    DESTROY_ERROR,
    EXTENSION,
    HELPERS,
    HOLDERS,
    INVALID_ARGUMENT,
    IS_LINUX,
    OUT_OF_MEMORY,
    PIECES,
    PLAN,
    SCHEDULE,
    SUMS,
    THREADS,
    WORDS,
    WORKING,
    WORKSPACE,
    add,
    address_of,
    ask_for_large_pages,
    at,
    call,
    failure,
    find_buffers,
    free,
    malloc,
    plan_of,
    put,
    refusal,
    task,
    tell_version,
    text,
    word,
    yield_to_others,
)
from portable_softmax.kernels._numba._jit import named
from portable_softmax.kernels._numba._memory import smaller

# What is the same for every handler is typed and lowered once in a process.
common = task("handlers")


@common
def begin(frame):
    """Return a job; 0, and an error or 0 for none, where there is nothing to do."""
    if word(frame, EXTENSION) != 0:
        tell_version(frame)
        return 0, 0
    error = refusal(frame)
    if error != 0:
        return 0, error
    plan = plan_of(frame)
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
    helpers = smaller(word(job, PLAN + PIECES) - 1, word(job, PLAN + HELPERS))
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
    """Free the job if nobody else holds it."""
    if add(job, HOLDERS, -1) == 1:
        free(job)


@common
def end(frame, job, done):
    """Leave, and return an error or 0."""
    leave(job)
    if not done:
        return failure(frame, OUT_OF_MEMORY, text("portable_softmax: no memory for a row"))
    return 0


def handler(name, *parts):
    """Return the handler of a call, to be compiled; `name` is unique among them."""
    body, prepare, finish, compute = work_of(*parts)
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
