"""Plant the faults and run the tests: see the package's docstring."""

from __future__ import annotations

import argparse
import ast
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOUND = HERE / "found.md"
COLUMNS = ("before", "after")
TIMEOUT = 600
# Kernels of Numba are kept under a stamp of these: a run with another one compiles its own.
COMPILED = ("portable_softmax/kernels/_numba/", "portable_softmax/portable/")


# The tests that have found a fault, and pass without one.
PASSED: set[str] = set()


class Fault(NamedTuple):
    """A row of a table; without `old`, no fault."""

    name: str
    file: str
    old: str
    new: str
    tests: list[str]
    backends: str


class TableError(Exception):
    """A fault that cannot be planted, or whose tests cannot be run."""


def read(chosen: str | None = None) -> list[Fault]:
    """Return the faults of one table, or of all."""
    paths = [HERE / chosen] if chosen else sorted(HERE.glob("*.toml"))
    return [Fault(**row) for path in paths for row in tomllib.loads(path.read_text())["fault"]]


def planted(fault: Fault, root: Path) -> str:
    """Return the source with the fault."""
    source = (root / fault.file).read_text()
    if (n := source.count(fault.old)) != 1:
        raise TableError(f"{fault.name}: the text stands {n} times in {fault.file}")
    found = source.replace(fault.old, fault.new)
    try:
        same = ast.dump(ast.parse(found)) == ast.dump(ast.parse(source))
    except SyntaxError as error:
        raise TableError(f"{fault.name}: the faulty file is no Python: {error}") from None
    if same:
        raise TableError(f"{fault.name}: it changes nothing")
    return found


def check(faults: list[Fault]) -> list[str]:
    """Return what is wrong with the tables."""
    from tests.backends import BACKENDS

    wrong = [f"{name}: {n} faults" for name, n in Counter(f.name for f in faults).items() if n > 1]
    for fault in faults:
        try:
            planted(fault, ROOT)
        except (TableError, OSError) as error:
            wrong.append(str(error))
        unknown = [n for n in fault.tests if not (ROOT / f"tests/test_{n}.py").is_file()]
        unknown += [name for name in fault.backends.split(",") if name not in BACKENDS]
        if unknown or "|" in fault.name or not fault.tests:
            wrong.append(f"{fault.name}: unknown {unknown}, or no tests, or a bar in its name")
    return wrong


# --------------------------------------------------------------------------- runs


def copy_to(folder: Path, tests: Path | None) -> None:
    """Copy the repository as it is, with the tests of another one if they are given.

    What pytest is told in pyproject.toml comes with those, so that it knows their marks.
    """
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file() and not (tests and name.startswith(("tests/", "pyproject"))):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    if tests:
        shutil.copytree(tests, folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy2(tests.resolve().parent / "pyproject.toml", folder)
    code = "import portable_softmax as ps; print(ps.__file__)"
    command, env = [sys.executable, "-P", "-c", code], {**os.environ, "PYTHONPATH": str(folder)}
    used = subprocess.run(command, cwd=folder.parent, env=env, capture_output=True, text=True)
    if not Path(used.stdout.strip()).is_relative_to(folder):
        raise TableError(f"another package is imported than the copy: {used.stdout}{used.stderr}")


def collect(folder: Path, faults: list[Fault]) -> None:
    """Check that the tests can be collected without a fault: else each would be found."""
    every = {name for fault in faults for name in fault.tests}
    whole = Fault("", "", "", "", sorted(every), "numpy")
    env = {**os.environ, "PYTHONPATH": str(folder)}
    code, output = run_tests(whole, folder, env, "--collect-only")
    if code not in (0, 5):
        raise TableError(f"without a fault pytest stops with {code}:\n{output[-2000:]}")


def write_source(path: Path, content: bytes) -> None:
    """Write a module; Python would trust what it compiled of one of the same second and length."""
    path.write_bytes(content)
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


def run(fault: Fault, folder: Path) -> str:
    """Return the part and the test that found a fault, or ``survived``."""
    path, chosen = folder / fault.file, False
    right = path.read_bytes()
    with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
        kept = fresh if fault.file.startswith(COMPILED) and fault.old else f"{folder}-kept"
        # The key of what torch.compile keeps knows nothing of code of ours.
        own = {"NUMBA_CACHE_DIR": kept, "TORCHINDUCTOR_CACHE_DIR": fresh, "PYTHONPATH": str(folder)}
        if "triton" in fault.backends.split(","):
            own["TRITON_INTERPRET"] = "1"
        try:
            if fault.old:
                write_source(path, planted(fault, folder).encode())
            for part in ("fast", "slow"):
                code, output = run_tests(fault, folder, {**os.environ, **own}, f"--part={part}")
                chosen = chosen or code != 5
                if found := judged(code, output):
                    write_source(path, right)
                    if fault.old and "::" in found and found not in PASSED:
                        env = {**os.environ, **own, "NUMBA_CACHE_DIR": f"{folder}-kept"}
                        code, _ = run_tests(fault, folder, env, f"--part={part}", found)
                        if code not in (0, 4):  # 4: what the summary shows is not its whole name
                            raise TableError(f"without a fault it fails too: {found}")
                        PASSED.add(found)
                    return f"{part}: {found}"
        finally:
            write_source(path, right)
    if not chosen:
        raise TableError("its tests are none on its backends")
    return "survived"


def run_tests(
    fault: Fault, folder: Path, env: dict[str, str], option: str, one: str = ""
) -> tuple[int | None, str]:
    """Return the exit code of the tests, None where they took too long, and their output."""
    files = [n for name in fault.tests if (folder / (n := f"tests/test_{name}.py")).is_file()]
    if not files:
        raise TableError(f"there are no tests {fault.tests}")
    files = [f"tests/{one}"] if one else files
    options = ["-x", "-q", "-p", "no:cacheprovider", option, "--backend", fault.backends]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *files], cwd=folder, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, output


def judged(code: int | None, output: str) -> str:
    """Return what found the fault; empty if nothing did."""
    if code in (0, 5):  # 5: no test was selected
        return ""
    if code is None:
        return "timeout"
    if code < 0:
        raise TableError(f"pytest was ended by signal {-code}")
    if code in (3, 4):
        if "while loading conftest" in output:  # it imports the package
            return "import"
        raise TableError(f"pytest stopped with {code}:\n{output[-2000:]}")
    first = re.search(r"^(?:FAILED|ERROR) tests/(.+?\.py(?:::.+?)?)(?: - .*)?$", output, re.M)
    return first[1] if first else f"exit {code}"


def results(faults: list[Fault], jobs: int, tests: Path | None) -> Iterator[tuple[Fault, str]]:
    """Yield each fault with what found it; an error of its row begins with ``ERROR``."""
    free: queue.SimpleQueue[Path] = queue.SimpleQueue()

    def one(fault: Fault) -> str:
        folder = free.get()
        try:
            return run(fault, folder)
        except TableError as error:
            return f"ERROR {error}"
        finally:
            free.put(folder)

    with tempfile.TemporaryDirectory(prefix="mutants-") as root, ThreadPoolExecutor(jobs) as pool:
        for i in range(jobs):
            copy_to(folder := Path(root).resolve() / f"copy{i}", tests)
            free.put(folder)
        collect(folder, faults)
        waiting = {pool.submit(one, fault): fault for fault in faults}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)


# --------------------------------------------------------------------------- what was found


def write(found: dict[str, str], column: str) -> None:
    """Merge results into the file, which keeps the other column and the order of the tables."""
    text = FOUND.read_text() if FOUND.exists() else ""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    known = {name: dict(zip(COLUMNS, cells, strict=True)) for name, _, *cells in rows[1:]}
    lines = ["| fault | file | before | after |", "|---|---|---|---|"]
    for fault in read():
        cells = known.get(fault.name, {})
        if fault.name in found:
            cells[column] = found[fault.name].replace("|", "/")
        texts = [cells.get(name, "-") for name in COLUMNS]
        file = fault.file.removeprefix("portable_softmax/")
        lines.append(f"| {' | '.join((fault.name, file, *texts))} |")
    FOUND.write_text("\n".join(lines) + "\n")


def main() -> int:
    """Return 0, 1 if a fault survived, or 2 if a table is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="in the fault's name or file")
    parser.add_argument("--list", metavar="FILE.toml", help="one of the tables")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument("--tests", type=Path, metavar="FOLDER", help="of another checkout")
    parser.add_argument("--check", action="store_true", help="look at the tables, run nothing")
    parser.add_argument("--none", action="store_true", help="run the tests without the faults")
    parser.add_argument("--column", choices=COLUMNS, default="after", help=f"of {FOUND.name}")
    args, out = parser.parse_args(), Console(markup=False, highlight=False, soft_wrap=True)
    faults = [f for f in read(args.list) if args.only in f.name or args.only in f.file]
    if wrong := check(faults):
        out.print("\n".join(wrong))
        return 2
    out.print(f"{len(faults)} faults fit their files")
    if args.check or not faults:
        return 0
    if args.none:
        sets = {(tuple(f.tests), f.backends): f for f in faults}
        faults = [f._replace(name=f"{f.tests} {f.backends}", old="") for f in sets.values()]
    found: dict[str, str] = {}
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out) as progress:
        task = progress.add_task("faults", total=len(faults))
        for fault, result in results(faults, min(args.jobs, len(faults)), args.tests):
            found[fault.name] = result
            out.print(f"{result}\n    {fault.name}")
            progress.advance(task)
            if fault.old and not result.startswith("ERROR"):
                write(found, args.column)
    survived = [name for name, result in found.items() if result == "survived"]
    errors = [name for name, result in found.items() if result.startswith("ERROR")]
    counts = Counter(result.partition(":")[0] for result in found.values())
    out.print(f"fast {counts['fast']}, slow {counts['slow']}, survived {len(survived)}")
    out.print("\n".join([*survived, *(f"ERROR {name}" for name in errors)]))
    return 2 if errors else int(bool(survived) if not args.none else len(survived) < len(found))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TableError as error:
        sys.exit(f"{error}")
