"""One request, one decision: which kernel a call takes, and why.

Execution and `explain` consume the same `Decision`, which is a function of the request, the table
and the switches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

from portable_softmax.kernels._request import Request
from portable_softmax.kernels._switches import Switches, switched, switches
from portable_softmax.kernels._table import TABLE, Kernel
from portable_softmax.libraries import traced_as_constant

Function = TypeVar("Function", bound=Callable[..., Any])


class Candidate:
    """A kernel of the table with its module loaded: what it lacks here, and its functions."""

    __slots__ = ("answer", "declines", "kernel", "missing", "off")

    def __init__(self, kernel: Kernel, operation: str) -> None:
        module = import_module(kernel.module)
        self.kernel = kernel
        self.declines: Callable[[Request, bool], str]
        self.answer: Callable[[Request], Any]
        self.missing: str = module.missing()
        self.off = (
            "" if kernel.on_by_default else f"off by default, see kernels.use({kernel.name!r})"
        )
        if kernel.adapter:
            adapter = import_module(kernel.adapter)
            self.declines = partial(adapter.declines, module)
            self.answer = partial(adapter.answer, module)
        else:
            self.declines = module.declines
            self.answer = getattr(module, operation)

    def objection(self, request: Request, switch: Switches | None) -> str:
        """Return why the kernel does not take a call; empty if it does."""
        kernel = self.kernel
        asked = False
        if switch is not None:
            if kernel.name in switch.off:
                return "switched off by kernels.without()"
            asked = kernel.name in switch.asked
        if not asked and self.off:
            return self.off
        why = kernel.objection(request, asked) or self.missing
        if why:
            return why
        if request.tracing and kernel.adapter:
            adapter, module = self.traced()
            return str(adapter.declines(module, request, asked))
        return self.declines(request, asked)

    def traced(self) -> tuple[Any, Any]:
        """Return the adapter and the module: torch.compile traces no function of a constant."""
        return sys.modules[self.kernel.adapter], sys.modules[self.kernel.module]


class Decision(NamedTuple):
    """Which kernel, or None for the portable path; why; and why each one before was passed over."""

    taken: Candidate | None
    why: str
    passed_over: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        name = "portable" if self.taken is None else self.taken.kernel.name
        # The table may hold a kernel twice, for different sizes.
        others = [f"not {other}: {why}" for other, why in self.passed_over if other != name]
        return f"{name}: " + "; ".join([self.why, *others] if self.why else others)


_CANDIDATES: dict[tuple[str, str], tuple[Candidate, ...]] = {}


@traced_as_constant
def candidates(library: str, operation: str) -> tuple[Candidate, ...]:
    """Return the kernels that the table has for an operation of a library, in its order."""
    found = _CANDIDATES.get((library, operation))
    if found is None:
        found = tuple(
            Candidate(kernel, operation)
            for kernel in TABLE
            if kernel.library == library and operation in kernel.operations
        )
        _CANDIDATES[library, operation] = found
    return found


def decide(request: Request, switch: Switches | None) -> Decision:
    """Return the one path that a call takes."""
    found = candidates(request.library.name, request.operation)
    if not found:
        return Decision(None, f"no kernel for {request.operation} on {request.library.name}")
    if switch is not None and switch.portable:
        return Decision(None, f"forced by {switch.portable}")
    if not request.axes or 0 in request.x.shape:
        return Decision(None, "nothing to reduce")
    if switch is not None and (asked := switch.asked):
        found = tuple(sorted(found, key=lambda c: c.kernel.name not in asked))
    passed_over: tuple[tuple[str, str], ...] = ()
    for candidate in found:
        why = candidate.objection(request, switch)
        if not why:
            return Decision(candidate, candidate.kernel.why, passed_over)
        if (candidate.kernel.name, why) not in passed_over:
            passed_over = (*passed_over, (candidate.kernel.name, why))
    return Decision(None, "", passed_over)


def run(request: Request, portable: Callable[[Request], Any]) -> Any:
    """Decide, then answer by the kernel, or by `portable`."""
    switch = switches()
    decision = decide(request, switch)
    if switch is not None and switch.explaining:
        raise _Decided(decision)
    taken = decision.taken
    if taken is None:
        answer = portable
    elif request.tracing and taken.kernel.adapter:
        adapter, module = taken.traced()
        return adapter.answer(module, request)
    else:
        answer = taken.answer
    return request.library.quietly(answer, request)


# --------------------------------------------------------------------------- explain


class _Decided(BaseException):
    """Ends a call that is only explained; no handler of ordinary errors stops it."""

    def __init__(self, decision: Decision) -> None:
        super().__init__()
        self.decision = decision


_PUBLIC: dict[str, Callable[..., Any]] = {}


def operation(function: Function) -> Function:
    """Let `explain` find a public function by its name."""
    _PUBLIC[function.__name__] = function
    return function


def decision_for(operation: str, *args: Any, **kwargs: Any) -> Decision:
    """Call a public function up to the point where its path is decided."""
    if operation not in _PUBLIC:
        raise ValueError(
            f"operation is {operation!r}, expected one of {', '.join(map(repr, _PUBLIC))}"
        )
    try:
        with switched(explaining=True):
            _PUBLIC[operation](*args, **kwargs)
    except _Decided as found:
        return found.decision
    raise AssertionError(f"{operation} answered without a decision")


def explain(operation: str, /, *args: Any, **kwargs: Any) -> str:
    """Return which path a call takes, and why.

    The call is checked and decided as any other, and then ends: nothing is computed.

    Parameters
    ----------
    operation
        A public function's name, such as ``"softmax"``.
    *args, **kwargs
        What would be passed to that function.

    Raises
    ------
    ValueError
        If there is no such operation.
    Exception
        Whatever the function itself raises for these arguments.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import kernels
    >>> kernels.explain("softmax", np.ones(3), axis=0).partition(":")[0]
    'numpy tiles'
    """
    return str(decision_for(operation, *args, **kwargs))


def available() -> dict[str, tuple[str, ...]]:
    """Return the kernels that can run here: name to operations.

    Examples
    --------
    >>> from portable_softmax import kernels
    >>> kernels.available()["numpy tiles"][:3]
    ('softmax', 'log_softmax', 'logsumexp')
    """
    found: dict[str, tuple[str, ...]] = {}
    for kernel in TABLE:
        if not import_module(kernel.module).missing():
            found[kernel.name] = tuple(
                dict.fromkeys((*found.get(kernel.name, ()), *kernel.operations))
            )
    return found
