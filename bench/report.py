"""Where, when and with what something was measured, and how it is shown."""

from __future__ import annotations

import datetime
import importlib.util
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import portable_softmax
from bench import copies
from bench.errors import CommandError

ROOT = Path(__file__).resolve().parent.parent
_LIBRARIES = (
    "numpy", "scipy", "numba", "torch", "triton", "jax", "optax", "dask", "cupy", "sklearn",
    "array_api_strict", "ml_dtypes", "threadpoolctl", "entmax", "mpmath",
)  # fmt: skip


def line(text: str) -> None:
    """Print a sentence."""
    _console().print(text, markup=False, highlight=False, soft_wrap=True)


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table, as Markdown unless on a terminal."""
    from rich.box import MARKDOWN, ROUNDED
    from rich.table import Table
    from rich.text import Text

    console = _console()
    box = ROUNDED if console.is_terminal else MARKDOWN
    printed = Table(*headings, title=title, title_justify="left", box=box)
    for row in rows:
        printed.add_row(*map(Text, row))
    console.print()
    console.print(printed)


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 1000)


def load() -> float | None:
    """Return how many cores are in use just now; None where the system does not tell.

    What it tells of the last minute counts the run before this one.
    """
    try:
        before = _ticks()
        time.sleep(0.1)
        working, ticks = (now - then for now, then in zip(_ticks(), before, strict=True))
    except OSError:  # not Linux
        return None
    return copies.cores() * working / max(ticks, 1)


def _ticks() -> tuple[int, int]:
    """Return how many ticks the cores have worked since the system started, and all ticks."""
    user, nice, system, idle, waiting, *interrupts = map(
        int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    )
    working = user + nice + system + sum(interrupts)
    return working, working + idle + waiting


def provenance(argv: Sequence[str], load_before: float | None) -> dict[str, Any]:
    """Return where, when and with what something was measured."""
    modules = {name: sys.modules.get(name) for name in _LIBRARIES}
    return {
        "command": shlex.join(["python", "-m", "bench", *argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(ROOT),
        "machine": {
            "cpu": _cpu(),
            "cores": copies.cores(),
            "system": platform.system(),
            "load_before": load_before,
        },
        "threads": _threads(),
        "versions": {
            "python": platform.python_version(),
            "portable_softmax": portable_softmax.__version__,
            **{name: module.__version__ for name, module in modules.items() if module},
        },
    }


def _threads() -> dict[str, int | str]:
    """Return how many threads each library would use, and the variables that say so."""
    asked = {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ}
    known = {
        name: ask(sys.modules[name]) for name, ask in _ASK_THREADS.items() if name in sys.modules
    }
    pools: dict[str, int] = {}
    if importlib.util.find_spec("threadpoolctl"):
        import threadpoolctl

        for pool in threadpoolctl.threadpool_info():
            pools[pool["internal_api"]] = max(
                pool["num_threads"], pools.get(pool["internal_api"], 0)
            )
    return {**known, **pools, **asked}


_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "XLA_FLAGS",
)
_ASK_THREADS: dict[str, Callable[[Any], int]] = {
    "torch": lambda torch: torch.get_num_threads(),
    "numba": lambda numba: numba.get_num_threads(),
}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def commit(folder: Path) -> str | None:
    """Return a clone's commit, marked if files differ from it; None without git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def described(document: dict[str, Any]) -> str:
    """Return one line on where, when and with what a document was measured."""
    machine = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    commit = document["commit"] or "unknown"
    return (
        f"{machine['cpu']}, {machine['cores']} cores; {versions}; commit {commit}; "
        f"{document['date']}"
    )


def busy(document: dict[str, Any]) -> str:
    """Return a warning if other processes used the cores; empty if not."""
    machine = document["machine"]
    load_before, cores = machine["load_before"], machine["cores"]
    if load_before is None or cores is None or load_before < cores / 2:
        return ""
    return (
        f"the machine was busy (load {load_before:.1f} on {cores} cores): run it again when it is "
        "idle; calls that use several threads wait for whole time slices"
    )


def check_writable(path: Path | None) -> None:
    """Raise before anything is measured if a file cannot be written."""
    if path is not None:
        target = path if path.exists() else path.parent
        if path.is_dir() or not os.access(target, os.W_OK):
            raise CommandError(f"can't write {path}")


def check_folder(path: Path | None) -> None:
    """Raise before anything is measured if figures cannot be drawn there."""
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError('figures need matplotlib: pip install "portable_softmax[bench]"')
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise CommandError(f"can't write into {path}")


def write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """Replace nan and infinities, which JSON does not have, by strings."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_markdown(
    path: Path,
    document: dict[str, Any],
    legend: str,
    tables: Iterable[tuple[str, Sequence[str], Sequence[Sequence[str]]]],
) -> None:
    parts = [f"Made by `{document['command']}`: {described(document)}.", legend]
    for title, columns, rows in tables:
        lines = [columns, ["---"] * len(columns), *rows]
        parts += [f"## {title}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    path.write_text("\n\n".join(parts) + "\n")
