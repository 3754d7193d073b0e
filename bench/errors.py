"""What the command line reports in one line instead of a traceback."""

from __future__ import annotations

from collections.abc import Collection


class CommandError(Exception):
    """A failure that the user can put right: one line on stderr and exit status 2."""


def one_line(error: BaseException) -> str:
    """Return an error as `Type: first line`, short enough for a cell of a table."""
    text = f"{type(error).__name__}: {error}".partition("\n")[0].removesuffix(": ")
    return text if len(text) <= 120 else f"{text[:117]}..."


def chosen(what: str, text: str, known: Collection[str]) -> list[str]:
    """Return the names of a comma list; an error names what one may be."""
    names = text.split(",")
    for name in names:
        if name not in known:
            raise CommandError(f"unknown {what} {name!r}; choose from {', '.join(known)}")
    return names
