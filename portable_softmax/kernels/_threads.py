"""One pool of threads for large arrays: NumPy and compiled code let go of the interpreter's lock.

It takes as many threads as the machine, the control group, OMP_NUM_THREADS, threadpoolctl and torch
leave to this process, and one call at a time. A call that comes while another one has the pool,
from within it or from a thread of the user's own, runs in its caller's thread alone: whoever
already works in parallel is not multiplied.

A library that has threads of its own is asked to run the call on those (`on_team`): after each of
its operations they spin for a while, and would share their cores with any others.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar, copy_context
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

Piece = TypeVar("Piece")
Answer = TypeVar("Answer")
Team: TypeAlias = Callable[[Callable[[], None], int], None]
"""Calls a function once in each of so many threads, and waits for them."""

_TEAM: ContextVar[Team | None] = ContextVar("portable_softmax team", default=None)
_is_forked = False


class _Pool:
    """The threads, started when they are first needed."""

    def __init__(self) -> None:
        self.taken = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._size = 0

    def submit(self, function: Callable[..., Any], *args: Any, size: int) -> Future[Any]:
        if self._executor is None or self._size < size:
            if self._executor is not None:
                self._executor.shutdown(wait=False)
            self._executor = ThreadPoolExecutor(size, thread_name_prefix="portable_softmax")
            self._size = size
        return self._executor.submit(function, *args)


_pool = _Pool()


def _forget() -> None:
    """Give a forked child a pool of its own: its parent's threads do not exist there."""
    global _pool, _is_forked
    _pool, _is_forked = _Pool(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def on_team(team: Team | None, function: Callable[..., Answer], *args: Any) -> Answer:
    """Return ``function(*args)``, which runs its pieces in the threads of `team`, if there is one.

    A forked child has no threads but those that it starts, and an interpreter that shuts down lets
    no other thread in.
    """
    if team is None or _is_forked or sys.is_finalizing():
        return function(*args)
    token = _TEAM.set(team)
    try:
        return function(*args)
    finally:
        _TEAM.reset(token)


def run(
    function: Callable[[Piece], Any], pieces: Sequence[Piece], *, at_most: int = sys.maxsize
) -> None:
    """Call ``function(piece)`` for each piece, on several threads where they are free.

    The first exception is raised when all threads have stopped; what is left is not begun.
    """
    others = min(limit(), len(pieces), at_most) - 1
    pool = _pool
    if others < 1 or not pool.taken.acquire(blocking=False):
        for piece in pieces:
            function(piece)
        return
    team, work = _TEAM.get(), _work(function, pieces)
    try:
        if team is None:
            _run_on(pool, work, others)
        else:
            _run_in(team, work, others + 1)
    finally:
        pool.taken.release()


def _work(function: Callable[[Any], Any], pieces: Sequence[Any]) -> Callable[[], None]:
    """Return what each thread calls: it takes pieces until there are none left."""
    left = deque(pieces)

    def work() -> None:
        try:
            while True:
                try:
                    piece = left.popleft()
                except IndexError:
                    return
                function(piece)
        except BaseException:
            left.clear()
            raise

    return work


def _run_in(team: Team, work: Callable[[], None], threads: int) -> None:
    # NumPy's errstate is part of the context.
    contexts, errors = [copy_context() for _ in range(threads)], []

    def member() -> None:
        try:
            contexts.pop().run(work)
        except BaseException as error:
            errors.append(error)

    team(member, threads)
    for error in errors:
        raise error


def _run_on(pool: _Pool, work: Callable[[], None], others: int) -> None:
    helpers: list[Future[Any]] = []
    with suppress(RuntimeError):  # the interpreter is shutting down: this thread does it all
        for _ in range(others):
            # NumPy's errstate is part of the context.
            helpers += [pool.submit(copy_context().run, work, size=others)]
    try:
        work()
    finally:
        # One that has not begun yet would find nothing left: it is not waited for.
        helpers = [helper for helper in helpers if not helper.cancel()]
        _wait_for(helpers)
    for helper in helpers:
        helper.result()


def _wait_for(helpers: list[Future[Any]]) -> None:
    """Wait until all have stopped; what a signal raises on the way is raised then."""
    interrupt = None
    for helper in helpers:
        while not helper.done():
            try:
                helper.exception()
            except BaseException as error:
                interrupt = error
    if interrupt is not None:
        raise interrupt


# --------------------------------------------------------------------------- how many


def limit() -> int:
    """Return how many threads this process should use now, the caller's among them."""
    return max(1, min(_cores(), _openmp(), _threadpoolctl(), _torch()))


_GROUP = Path("/sys/fs/cgroup")


def _cores() -> int:
    """Return how many cores this process may use, by its affinity and its control group."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1  # not Linux
    return min(cores, _quota(_GROUP))


@cache
def _quota(group: Path) -> int:
    """Return the cores that the control group (version 2, then 1) grants, rounded up."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (group / "cpu" / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu" / "cpu.cfs_period_us").read_text()
        except OSError:
            return sys.maxsize
    if quota.strip() == "max" or int(quota) <= 0:
        return sys.maxsize
    return ceil(int(quota) / int(period))


def _openmp() -> int:
    """Return what OMP_NUM_THREADS says; a list names the outermost level first."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else sys.maxsize


def _threadpoolctl() -> int:
    """Return what threadpoolctl has set for BLAS, where the user has imported it.

    It has no setting for pools like this one: its limit for the linear algebra stands for them.
    """
    if "threadpoolctl" not in sys.modules:
        return sys.maxsize
    found = [library.num_threads for library in _linear_algebra()]
    return min((n for n in found if n), default=sys.maxsize)


def _torch() -> int:
    """Return what torch is set to, where the user has imported it: 1 in a worker of its loaders."""
    set_to = getattr(sys.modules.get("torch"), "get_num_threads", None)
    return sys.maxsize if set_to is None else int(set_to())


@cache
def _linear_algebra() -> list[Any]:
    """Return the BLAS libraries that are loaded at the first call; it takes milliseconds to look.

    One that is loaded later is never asked.
    """
    controller = sys.modules["threadpoolctl"].ThreadpoolController()
    return list(controller.select(user_api="blas").lib_controllers)
