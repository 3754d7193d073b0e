"""How the command line speaks: rich on a terminal, plain lines elsewhere, nothing under --json."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from typing import Protocol

from portable_softmax._cli.training import Epoch


class Report(Protocol):
    """What the commands need to say."""

    def line(self, text: str) -> None:
        """Say one sentence."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show rows of text under their columns."""

    def progress(
        self, where: str, epochs: int, *, brief: bool = False
    ) -> AbstractContextManager[Callable[[Epoch], None]]:
        """Follow one training: call what the context gives after each epoch.

        `brief` is for a training that only repeats another: a log needs no lines of it.
        """

    def steps(self, what: str, number: int) -> AbstractContextManager[Callable[[str], None]]:
        """Follow some steps: call what the context gives with the name of each that begins."""


def choose(*, plain: bool, json: bool) -> Report:
    """Return the report that suits the options and the place where stdout goes."""
    if json:
        return Silent()
    if plain or not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        return Plain()
    return Rich()


class Silent:
    """Say nothing: the caller prints JSON."""

    def line(self, text: str) -> None:
        pass

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        pass

    @contextmanager
    def progress(
        self, where: str, epochs: int, *, brief: bool = False
    ) -> Iterator[Callable[[Epoch], None]]:
        yield lambda epoch: None

    @contextmanager
    def steps(self, what: str, number: int) -> Iterator[Callable[[str], None]]:
        yield lambda name: None


class Plain:
    """ASCII lines that a log file keeps well."""

    def line(self, text: str) -> None:
        print(text, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        print(f"\n{title}")
        for row in (columns, ["-" * width for width in widths], *rows):
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print("  ".join(cells).rstrip(), flush=True)

    @contextmanager
    def progress(
        self, where: str, epochs: int, *, brief: bool = False
    ) -> Iterator[Callable[[Epoch], None]]:
        every = max(1, epochs // 10)

        def show(epoch: Epoch) -> None:
            if not brief and (epoch.number % every == 0 or epoch.number in (1, epochs)):
                print(
                    f"  epoch {epoch.number:>{len(str(epochs))}}/{epochs}"
                    f"  train loss {epoch.train_loss:.4f}, accuracy {epoch.train_accuracy:.2%}"
                    f"  held-out loss {epoch.loss:.4f}, accuracy {epoch.accuracy:.2%}",
                    flush=True,
                )

        print(f"Training on {where}", flush=True)
        yield show

    @contextmanager
    def steps(self, what: str, number: int) -> Iterator[Callable[[str], None]]:
        numbers = count(1)
        yield lambda name: print(f"{what} {next(numbers)}/{number}: {name}", flush=True)


class Rich:
    """Progress bars and tables for a terminal; rich is imported only here."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console()

    def line(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        from rich.box import ROUNDED
        from rich.table import Table
        from rich.text import Text

        table = Table(*columns, title=title, title_justify="left", box=ROUNDED)
        for first, *rest in rows:
            table.add_row(Text(first, style="bold cyan"), *map(Text, rest))
        self.console.print()
        self.console.print(table)

    @contextmanager
    def progress(
        self, where: str, epochs: int, *, brief: bool = False
    ) -> Iterator[Callable[[Epoch], None]]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description:<24}", markup=False),
            BarColumn(bar_width=18),  # with the rest it just fits into 80 columns
            MofNCompleteColumn(),
            TextColumn("held-out accuracy [bold green]{task.fields[accuracy]:.2%}[/]"),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(where, total=epochs, accuracy=0.0)
            yield lambda epoch: progress.update(
                task, completed=epoch.number, accuracy=epoch.accuracy
            )

    @contextmanager
    def steps(self, what: str, number: int) -> Iterator[Callable[[str], None]]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (BarColumn(bar_width=18), MofNCompleteColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(what, total=number)
            begun = count()
            yield lambda name: progress.update(
                task, completed=next(begun), description=f"{what} {name}"
            )
            progress.update(task, completed=number, description=what)
