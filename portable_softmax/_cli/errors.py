"""The one kind of failure that the command line reports instead of raising."""

from __future__ import annotations


class CommandError(Exception):
    """A failure that the user can put right: one line on stderr and exit status 2."""


def one_line(error: BaseException) -> str:
    """Return ``error`` as ``Type: first line``, short enough for a cell of a table."""
    first, *_ = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {first}".removesuffix(": ")
    return text if len(text) <= 120 else text[:117] + "..."
