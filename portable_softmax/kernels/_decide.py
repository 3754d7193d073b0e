"""One request, one decision: which kernel a call takes, and why.

Execution and `explain` consume the same `Decision`, which is a function of the request, the table
and the switches.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

from portable_softmax import _checks
from portable_softmax.kernels._canonical import canonical
from portable_softmax.kernels._request import BINARY, FOLD, OUT, Request
from portable_softmax.kernels._switches import Switches, switched, switches
from portable_softmax.kernels._table import Kernel, table
from portable_softmax.libraries import is_installed, traced_as_constant

Function = TypeVar("Function", bound=Callable[..., Any])


class Candidate:
    """A kernel of the table with its module loaded, which lacks nothing."""

    __slots__ = ("answer", "any_layout", "declines", "formulas", "kernel", "remark")

    def __init__(self, kernel: Kernel, operation: str) -> None:
        module = import_module(kernel.module)
        self.kernel = kernel
        self.declines: Callable[[Request, bool], str]
        self.answer: Callable[[Request], Any]
        self.remark: Callable[[Request], str]
        if kernel.adapter:
            adapter = import_module(kernel.adapter)
            self.declines = partial(adapter.declines, module)
            self.answer = partial(adapter.answer, module)
            self.remark = partial(getattr(adapter, "remark", _no_remark), module)
        else:
            self.declines = module.declines
            self.answer = getattr(module, operation)
            self.remark = getattr(module, "remark", _no_remark)
        self.formulas = getattr(module, "Formulas", None)
        self.any_layout = operation in getattr(module, "ANY_LAYOUT", ())

    def traced(self) -> tuple[Any, Any]:
        """Return the adapter and the module: torch.compile traces no function of a constant."""
        return sys.modules[self.kernel.adapter], sys.modules[self.kernel.module]


def _no_remark(*_: Any) -> str:
    return ""


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


class Open(NamedTuple):
    """A kernel that declares all that is known of a call but its arrays."""

    candidate: Candidate
    decision: Decision  # if the arrays are taken, and nothing before it was open
    devices: tuple[str, ...]
    at_least: int
    at_most: float
    asked: bool
    always: bool  # whether it takes whatever arrays are left


class Route(NamedTuple):
    """What the table says of a call but for its arrays."""

    open: tuple[Open, ...]  # in order
    otherwise: Decision  # the portable path, and why the other kernels are closed
    up_to: float = 0
    """Arrays of so many elements, on its devices, are the first kernel's whatever else they are."""


_ROUTES: dict[Any, Route] = {}


@traced_as_constant
def route(*call: Any) -> Route:
    """Return which kernels declare a call, and what is against the others.

    It depends on the table and the switches alone, so it is worked out once for each call, which is
    the arguments of `_route`.
    """
    found = _ROUTES.get(call)
    if found is None:
        found = _ROUTES[call] = _route(*call)
    return found


def _route(
    library: str,
    operation: str,
    dtype: str,
    active: tuple[str, ...],
    tracing: str,
    portable: str = "",
    asked: tuple[str, ...] = (),
    off: tuple[str, ...] = (),
) -> Route:
    kernels = [k for k in table() if k.library == library and operation in k.operations]
    if not kernels:
        return Route((), Decision(None, f"no kernel for {operation} on {library}"))
    if portable:
        return Route((), Decision(None, f"forced by {portable}"))
    found: list[Open] = []
    closed: dict[tuple[str, str], None] = {}
    for kernel in sorted(kernels, key=lambda k: k.name not in asked):
        first = kernel.name in asked
        if kernel.name in off:
            why = "switched off by kernels.without()"
        elif not (first or kernel.on_by_default):
            why = f"off by default, see kernels.use({kernel.name!r})"
        else:
            why = kernel.undeclared(dtype, active, tracing) or _missing(kernel)
        if why:
            closed[kernel.name, why] = None
            continue
        candidate = Candidate(kernel, operation)
        decision = Decision(candidate, kernel.why, tuple(closed))
        sizes = (0, math.inf) if first else (kernel.at_least, kernel.at_most)
        always = candidate.any_layout and not tracing
        if always and kernel.adapter:
            always = not import_module(kernel.adapter).looks_at(operation, dtype, active)
        found.append(Open(candidate, decision, kernel.devices, *sizes, first, always))
    up_to = 0.0
    for head in found[:1]:
        if head.always and not head.at_least:
            up_to = head.at_most
    return Route(tuple(found), Decision(None, "", tuple(closed)), up_to)


def _missing(kernel: Kernel) -> str:
    """Return what a kernel lacks, such as a name of another version of the library."""
    if why := str(import_module(kernel.module).missing()):
        return why
    try:
        if kernel.adapter:
            import_module(kernel.adapter)
    except (ImportError, AttributeError) as error:
        return f"{kernel.adapter} cannot be imported: {error}"
    return ""


def _call(request: Request) -> tuple[Any, ...]:
    """Return what `route` takes of a call, but for the switches."""
    active = request.active if request.out is None else (*request.active, OUT)
    return request.library.name, request.operation, request.dtype, active, request.tracing


def _is_open(switch: Switches | None, request: Request) -> bool:
    """Return whether a kernel is open to a call on its device, for arrays that it takes."""
    switches = () if switch is None else (switch.portable, switch.asked, switch.off)
    found = route(*_call(request), *switches).open
    device = request.library.device_type(request.x)
    return any(not one.devices or device in one.devices for one in found)


def decide(request: Request, switch: Switches | None) -> Decision:
    """Return the one path that a call takes."""
    library, x, tracing, call = request.library, request.x, request.tracing, _call(request)
    if switch is None:
        # A traced call would be guarded by the whole of `_ROUTES`.
        known = None if tracing else _ROUTES.get(call)
        found, otherwise, up_to = known or route(*call)
        if up_to and request.axes and 0 < library.size(x) <= up_to:
            devices = found[0].devices
            if not devices or library.device_type(x) in devices:
                return found[0].decision
    else:
        found, otherwise, _ = route(*call, switch.portable, switch.asked, switch.off)
    reduces = request.axes or request.operation in BINARY
    if found and (not reduces or 0 in x.shape) and not library.sharded:
        return Decision(None, "nothing to reduce")
    more: tuple[tuple[str, str], ...] = ()
    # Who asks why: `explain`, which is a switch, and the error for shards.
    told = switch is not None or library.sharded
    for candidate, decision, devices, at_least, at_most, asked, always in found:
        why = ""
        if devices and (device := library.device_type(x)) not in devices:
            why = f"device {device}"
        elif at_least and library.size(x) < at_least:
            why = "too few elements"
        elif at_most < math.inf and library.size(x) > at_most:
            why = "too many elements"
        elif always:
            pass
        elif tracing and candidate.kernel.adapter:
            adapter, module = candidate.traced()
            why = adapter.declines(module, request, asked)
        else:
            why = candidate.declines(request, asked)
        if not why:
            if more:
                return Decision(candidate, decision.why, (*more, *decision.passed_over))
            return decision
        if told and (candidate.kernel.name, why) not in more:
            more = (*more, (candidate.kernel.name, why))
    return Decision(None, otherwise.why, (*more, *otherwise.passed_over)) if more else otherwise


def run(request: Request, portable: Callable[[Request], Any]) -> Any:
    """Decide, then answer by the kernel, or by `portable`."""
    switch, out = switches(), request.out
    if out is not None and request.overlaps():
        request = request._replace(out=None)
    given = request
    request, back = canonical(request, partial(_is_open, switch))
    decision = decide(request, switch)
    if switch is not None and switch.explaining:
        raise _Decided(decision, request)
    taken = decision.taken
    if taken is None:
        if request.library.sharded and request.operation != FOLD:  # which its operations answer
            why = [decision.why, *[why for _, why in decision.passed_over]]
            raise _checks.not_of_shards(request.operation, "; ".join(filter(None, why)))
        answer, request, back = portable, given, None  # it takes any array
    elif request.tracing and taken.kernel.adapter:
        adapter, module = taken.traced()
        return adapter.answer(module, request)
    elif taken.formulas:
        adapter, _ = taken.traced()
        answer = partial(adapter.answer, taken.formulas(portable))
    else:
        answer = taken.answer
    if back is not None:
        answer = partial(_answered_back, answer, given, back)
    if out is not None:
        answer = partial(_written, answer, out)
    return request.library.quietly(answer, request)


def _answered_back(
    answer: Callable[[Request], Any], given: Request, back: Callable[[Any], Any], request: Request
) -> Any:
    """Answer a call whose arrays are in C order as the one that was given."""
    try:
        found = answer(request)
    except IndexError:
        given.target()  # names the place of a label as it was given
        raise
    in_out = (
        request.out is not None and (found[1] if type(found) is tuple else found) is request.out
    )
    found = back(found)
    if not in_out:
        return found
    return (found[0], given.out) if type(found) is tuple else given.out


def _written(answer: Callable[[Request], Any], out: Any, request: Request) -> Any:
    """Answer in `out`, where the path has not done so: memory with other entries of an input."""
    found = answer(request)
    value = found[1] if type(found) is tuple else found
    if value is not out:
        request.library.write(out, value)
    return (found[0], out) if type(found) is tuple else out


# --------------------------------------------------------------------------- explain


class _Decided(BaseException):
    """Ends a call that is only explained; no handler of ordinary errors stops it."""

    def __init__(self, decision: Decision, request: Request) -> None:
        super().__init__()
        self.decision, self.request = decision, request


_PUBLIC: dict[str, Callable[..., Any]] = {}


def operation(function: Function) -> Function:
    """Let `explain` find a public function by its name."""
    _PUBLIC[function.__name__] = function
    return function


def public(name: str) -> Callable[..., Any]:
    """Return the public function of a name, to be called from below."""
    return _PUBLIC[name]


def decision_for(operation: Any, *args: Any, **kwargs: Any) -> tuple[Decision, Request]:
    """Call a public function up to the point where its path is decided."""
    if not isinstance(operation, str) or operation not in _PUBLIC:
        name = getattr(operation, "__name__", None)
        remedy = f": pass its name, {name!r}" if name in _PUBLIC else ""
        raise ValueError(
            f"operation is {operation!r}, expected one of {', '.join(map(repr, _PUBLIC))}{remedy}"
        )
    try:
        with switched(explaining=True):
            _PUBLIC[operation](*args, **kwargs)
    except _Decided as found:
        return found.decision, found.request
    raise AssertionError(f"{operation} answered without a decision")


def explain(operation: str, /, *args: Any, **kwargs: Any) -> str:
    """Return which path a call takes, and why.

    The call is checked and decided as any other, and then ends: nothing is computed. What the call
    would wait for, such as the compilation of its kernel, is told as well.

    Parameters
    ----------
    operation
        A public function's name, such as ``"softmax"``, or ``"fold"`` for `online.fold`.
    *args, **kwargs
        What would be passed to that function.

    Returns
    -------
    str
        ``"KERNEL: what it does; not OTHER: why"``, with each kernel that was passed over before
        the one that is taken; KERNEL is ``portable`` where none is.

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
    >>> x = np.ones((2, 3))
    >>> kernels.explain("softmax", x, axis=0)
    'numpy tiles: row tiles in cache'
    >>> kernels.explain("logsumexp", x + 1j)
    'portable: not numpy tiles: dtype complex128; not numba rows: dtype complex128'
    """
    decision, request = decision_for(operation, *args, **kwargs)
    remark = "" if decision.taken is None else decision.taken.remark(request)
    return f"{decision}; {remark}" if remark else str(decision)


def available() -> dict[str, tuple[str, ...]]:
    """Return the kernels that can run here: name to those of its operations that are public.

    A kernel whose library, or what else it needs, is not installed is left out.

    Examples
    --------
    >>> from portable_softmax import kernels
    >>> kernels.available()["numpy tiles"][:3]
    ('softmax', 'log_softmax', 'logsumexp')
    """
    found: dict[str, tuple[str, ...]] = {}
    for kernel in table():
        if is_installed(kernel.library) and not import_module(kernel.module).missing():
            named = (name for name in kernel.operations if name in _PUBLIC)
            found[kernel.name] = tuple(dict.fromkeys((*found.get(kernel.name, ()), *named)))
    return found
