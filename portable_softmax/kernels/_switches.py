"""The switches: what the user, a block of code or the environment asks of the table."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from portable_softmax.kernels._table import names
from portable_softmax.libraries import traced_as_constant

VARIABLE = "PORTABLE_SOFTMAX_KERNELS"


class Switches(NamedTuple):
    """What is set now, in this thread or task."""

    portable: str = ""  # what forces the portable path; empty if nothing does
    asked: tuple[str, ...] = ()  # kernels to take wherever they can be taken
    off: tuple[str, ...] = ()  # kernels not to take
    explaining: bool = False  # whether a call ends once it is decided


NOTHING_SET = Switches()


def _from_environment() -> Switches:
    """Read the variable, once, on import: ``portable``, or names of kernels with commas."""
    value = os.environ.get(VARIABLE, "").strip()
    if not value:
        return NOTHING_SET
    if value == "portable":
        return Switches(portable=f"{VARIABLE}=portable")
    given = [part.strip() for part in value.split(",") if part.strip()]
    said = f"{VARIABLE} is {value!r}, expected 'portable', nothing, or one or more of"
    return Switches(asked=tuple([_known(name, said, "correct or unset it") for name in given]))


def _known(name: str, said: str = "", remedy: str = "correct it") -> str:
    """Return the kernel of a name, which may be its first word alone."""
    known = {full: full.partition(" ")[0] for full in names()}
    for full, short in known.items():
        if name in (full, short):
            return full
    expected = ", ".join(f"{full!r} or {short!r}" for full, short in known.items())
    said = said or f"name is {name!r}, expected one of"
    raise ValueError(f"{said} {expected}: {remedy}")


_ENVIRONMENT = _from_environment()
_SWITCHES: ContextVar[Switches] = ContextVar("portable_softmax", default=_ENVIRONMENT)


@traced_as_constant
def switches() -> Switches | None:
    """Return what is set now, None where nothing is.

    While torch.compile traces a call, the switches of that moment count for the compiled code.
    """
    found = _SWITCHES.get()
    return None if found is NOTHING_SET else found


@contextmanager
def switched(**changes: Any) -> Iterator[None]:
    """Change some of it in a block."""
    token = _SWITCHES.set(_SWITCHES.get()._replace(**changes))
    try:
        yield
    finally:
        _SWITCHES.reset(token)


@contextmanager
def portable() -> Iterator[None]:
    """Take the portable path in this block, whatever kernels there are.

    It counts for the current thread or task only. Code of torch.compile keeps what was set while
    it was traced.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import kernels, softmax
    >>> x = np.asarray([1.0, 2.0, 3.0])
    >>> with kernels.portable():
    ...     y = softmax(x)
    >>> bool(np.allclose(y, softmax(x)))
    True
    """
    with switched(portable="kernels.portable()"):
        yield


@contextmanager
def use(name: str) -> Iterator[None]:
    """Take one kernel in this block wherever it can be taken, before all others.

    Its size limits are ignored then, and it need not be on by default. Calls that it does not take
    go on to the other kernels. A kernel that cannot run here is passed over without an error;
    `explain` gives the reason. It counts for the current thread or task only; the variable
    PORTABLE_SOFTMAX_KERNELS does the same for a whole process. Code of torch.compile keeps what was
    set while it was traced.

    Parameters
    ----------
    name
        A kernel's name, as `available` lists it, or the first word of it: ``"numba"`` for
        ``"numba rows"``.

    Raises
    ------
    ValueError
        If there is no kernel of this name.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import kernels, softmax
    >>> with kernels.use("numpy"):
    ...     print(kernels.explain("softmax", np.ones((1000, 1000))).partition(":")[0])
    numpy tiles
    """
    now, name = _SWITCHES.get(), _known(name)
    asked = (name, *(other for other in now.asked if other != name))
    off = tuple(other for other in now.off if other != name)
    with switched(portable="", asked=asked, off=off):
        yield


@contextmanager
def without(name: str) -> Iterator[None]:
    """Leave one kernel's calls to the next in this block, to compare the two.

    It counts for the current thread or task only. Code of torch.compile keeps what was set while
    it was traced.

    Parameters
    ----------
    name
        As in `use`.

    Raises
    ------
    ValueError
        If there is no kernel of this name.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import kernels
    >>> with kernels.without("numpy tiles"):
    ...     print(kernels.explain("softmax", np.ones(3)).partition(":")[0])
    portable
    """
    now, name = _SWITCHES.get(), _known(name)
    off = (*now.off, name)
    with switched(asked=tuple(other for other in now.asked if other != name), off=off):
        yield
