#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["nox>=2025.10.14"]
# [tool.nox]
# script-venv-backend = "virtualenv"
# ///
"""Everything that is run on this repository; the file starts itself.

    python3 noxfile.py                    the demo on NumPy
    python3 noxfile.py -s tests           the tests on every backend, and one table
    python3 noxfile.py -s tests-slow      the tests that `tests` leaves out
    python3 noxfile.py -s tests-torch -- -k softmax -x    all tests on torch; pytest's arguments
    python3 noxfile.py --list             the other sessions

It needs Python 3.11 or newer with venv, and nothing else.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - an older Python gets this message
    sys.exit(f"noxfile.py: needs Python 3.11 or newer, this is {sys.version.split()[0]}")

import contextlib
import ctypes
import functools
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent
HOME = ROOT / ".nox"
REPORTS = HOME / "reports"
SITE = HOME / "site"


# --- Starting nox -------------------------------------------------------------------------------


def start_nox() -> NoReturn:
    """Run this file again in a private environment that holds nox, made on the first call."""
    folder = HOME / f"nox-py{sys.version_info.major}.{sys.version_info.minor}"
    python = Path(sysconfig.get_path("scripts", "venv", {"base": str(folder)}), "python")
    if not has_nox(python):  # never made, half made, or made by a Python that is gone
        if not (find_spec("venv") and find_spec("ensurepip")):
            sys.exit(
                "noxfile.py: this Python has no venv; install it "
                f"(Debian, Ubuntu: python3-venv, or python3.{sys.version_info.minor}-venv)"
            )
        print(f"noxfile.py: making an environment for nox in {folder}", file=sys.stderr)
        requirement = re.search(r'^# dependencies = \["(.+)"\]$', Path(__file__).read_text(), re.M)
        for command in (
            [sys.executable, "-m", "venv", "--clear", folder],
            [python, "-m", "pip", "install", "--quiet", requirement[1]],
        ):
            if subprocess.call(command):
                sys.exit("noxfile.py: could not make the environment for nox, see above")
    os.execv(python, [str(python), __file__, *sys.argv[1:]])


def has_nox(python: Path) -> bool:
    """Whether `python` runs and imports what this file imports."""
    try:
        return not subprocess.call([python, "-c", IMPORT_NOX], stderr=subprocess.DEVNULL)
    except OSError:
        return False


IMPORT_NOX = "import nox; from nox.project import dependency_groups, load_toml"
try:
    import nox
    from nox.project import dependency_groups, load_toml
except ImportError:
    if __name__ != "__main__":
        sys.exit("noxfile.py: this nox is too old for it; run `python3 noxfile.py` instead")
    start_nox()

if __name__ == "__main__":  # from here on, nox reads this file as its module
    # Images of containers set it, and then each of hundreds of processes compiles all it imports.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.argv[1:1] = ["--noxfile", __file__]  # wherever it was called from
    sys.exit(nox.main())

nox.needs_version = ">=2025.10.14"
nox.options.sessions = ["demo-numpy"]
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
# The session `lowest` skips where the oldest Python is not at hand, in CI too.
nox.options.error_on_missing_interpreters = False


# --- The backends and what they need ------------------------------------------------------------

# Each backend and the extra of pyproject.toml that brings its library.
# CuPy's is completed by the driver's generation: cuda12 or cuda13.
BACKENDS = {
    "numpy": None,
    "numba": "numba",
    "strict": "strict",
    "torch": "torch",
    "jax": "jax",
    "dask": "dask",
    "cupy": "cuda",
    "ndonnx": "ndonnx",
    "mlx": "mlx",
    "cubed": "cubed",
    "dpnp": "dpnp",
}
# Those that compute when they are told to.
LAZY = ("dask", "ndonnx", "cubed")
# Those that `bench` has no providers for.
NOT_MEASURED = ("ndonnx", "mlx", "cubed", "dpnp")
# Those that `tests` leaves out but where there is a GPU: an environment each.
ALONE = ("cupy", "dpnp")
PYPROJECT = load_toml(ROOT / "pyproject.toml")
# A process a core, since compilers use one each. Their tests differ in length: an idle process
# takes what another has not begun.
PARALLEL = ("--numprocesses=auto", "--maxprocesses=4", "--dist=worksteal")
# torch's threads sleep while they wait; else those of one process spin on the cores of another.
PATIENT = {"OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class Cuda:
    """The CUDA generation that the driver speaks, or why there is none to use."""

    generation: int | None
    missing: str = ""


@functools.cache
def cuda() -> Cuda:
    """Ask the driver itself: no array library has to be installed to learn that there is no GPU."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return Cuda(None, "no CUDA driver on this machine")
    devices, version = ctypes.c_int(), ctypes.c_int()
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(devices))
    if status or not devices.value:
        return Cuda(None, f"the CUDA driver finds no device (cuInit: {status})")
    driver.cuDriverGetVersion(ctypes.byref(version))
    generation = version.value // 1000
    if generation < 12:
        return Cuda(None, f"the driver speaks CUDA {generation}, CuPy needs 12 or newer")
    return Cuda(min(generation, 13))  # a newer driver runs what was built for an older one


def required(session: nox.Session) -> set[str]:
    """Backends that fail where they are missing, instead of being skipped."""
    listed = os.environ.get("PORTABLE_SOFTMAX_REQUIRE", "").split(",")
    names = {name.strip() for name in listed} - {""}
    known = [*BACKENDS, "torch-cuda"]
    unknown = names.difference(known)
    if unknown:
        session.error(
            f"PORTABLE_SOFTMAX_REQUIRE names no backend of ours: {', '.join(sorted(unknown))} "
            f"(there are {', '.join(known)})"
        )
    return names


def group(*names: str) -> tuple[str, ...]:
    """The requirements of dependency groups of pyproject.toml."""
    return dependency_groups(PYPROJECT, *names)


def package(*extras: str | None) -> tuple[str, str]:
    """This package, editable, with extras."""
    names = ",".join(filter(None, extras))
    return "--editable", f"{ROOT}[{names}]" if names else str(ROOT)


def install(session: nox.Session, *requirements: str) -> None:
    """Install into the session's environment, unless the same was installed before."""
    wanted = "\n".join([*requirements, (ROOT / "pyproject.toml").read_text()])
    stamp = Path(session.virtualenv.location, "installed.txt")
    if not (stamp.exists() and stamp.read_text() == wanted):
        stamp.unlink(missing_ok=True)
        # Python compiles what is imported; to compile all of torch takes longer than to unpack it.
        session.install("--no-compile", *requirements)
        stamp.write_text(wanted)


def install_backend(session: nox.Session, backend: str, *extras: str, also=()) -> None:
    """Install this package with one backend's library; skip if that needs a GPU that is missing."""
    extra = BACKENDS[backend]
    if backend == "cupy":
        if cuda().missing:
            stop = session.error if backend in required(session) else session.skip
            stop(cuda().missing)
        extra = f"cuda{cuda().generation}"
    install(session, *package(extra, *extras), *also)


def for_each_backend(name: str, without: tuple[str, ...] = (), shared: bool = False):
    """Make a session NAME-BACKEND for each backend of a function of a session and a backend.

    It has an environment of its own, unless it is `shared` and its library is among the others'.
    """

    def decorate(function):
        for backend in BACKENDS:
            if backend not in without:
                one = functools.partial(function, backend=backend)
                one.__doc__ = function.__doc__.replace("BACKEND", backend)
                own = {} if not shared or backend in ALONE else {"venv_backend": "none"}
                nox.session(one, name=f"{name}-{backend}", **own)
        return function

    return decorate


# --- The main job, the benchmarks ---------------------------------------------------------------


# A lazy library has nothing to gain from small steps, nor have kernels for large arrays.
@for_each_backend("demo", without=("numba", *LAZY, "dpnp"))
def demo(session: nox.Session, backend: str) -> None:
    """Train a softmax classifier on handwritten digits with BACKEND."""
    install_backend(session, backend, "demo")
    command = ("python", "-m", "portable_softmax", "demo", "--backend", backend)
    session.run(*command, *session.posargs)


@for_each_backend("bench", without=("numba", *NOT_MEASURED))  # numpy brings Numba
def bench(session: nox.Session, backend: str) -> None:
    """Measure speed on BACKEND beside the peers of every library and a copy."""
    install_backend(session, backend, "bench", None if backend == "cupy" else "peers")
    session.run("python", "-m", "bench", "speed", "--backend", backend, *session.posargs)


@nox.session(name="bench-scale")
def bench_scale(session: nox.Session) -> None:
    """Measure layers without logits and chunks of Dask, and model what ranks tell each other."""
    install(session, *package("bench", "peers", "dask"), "distributed")
    session.run("python", "-m", "bench", "scale", *session.posargs)


# --- The tests ----------------------------------------------------------------------------------

# All that resolves together is one environment, from which every session of tests runs.
TOGETHER = ("strict", "torch", "jax", "dask", "numba", "ndonnx", "mlx", "cubed", "triton", "bench")
# What one process runs: each backend of a library, and each code path.
ON_CPU = (
    *("numpy", "numba", "strict", "torch", "torch-portable", "torch-numba", "jax", "jax-numba"),
    *("dask", "ndonnx", "mlx", "cubed"),
)
# The backends that the tests of one library are.
OF_LIBRARY = {"torch": ("torch", "torch-portable", "torch-numba"), "jax": ("jax", "jax-numba")}


@dataclass
class Row:
    """What the reports of this run say of one backend."""

    version: str = "-"
    device: str = "-"
    counts: Counter = field(default_factory=Counter)
    seconds: float = 0.0
    reasons: Counter = field(default_factory=Counter)
    left: Counter = field(default_factory=Counter)
    """How many tests belong to the other part or to another shard, by report."""


@dataclass
class Results:
    """The reports that this process has made, and how long it took."""

    reports: list[Path] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    installing: float = 0.0
    testing: float = 0.0


results = Results()


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Add the seconds that something takes to the results."""
    start = time.monotonic()
    yield
    setattr(results, what, getattr(results, what) + time.monotonic() - start)


def together(session: nox.Session, *groups: str) -> str:
    """Install what the sessions of tests share, and more groups; return the Python that has it."""
    folder = HOME / "together"
    python = sysconfig.get_path("scripts", "venv", {"base": str(folder)}) + "/python"
    shared = [*package("demo", *TOGETHER), *group("test", "test-dask", "test-strict")]
    wanted = "\n".join([*shared, sys.version, (ROOT / "pyproject.toml").read_text()])
    stamp = folder / "installed.txt"
    installed = stamp.read_text() if stamp.exists() else ""
    pip = (python, "-m", "pip", "install", "--quiet", "--no-compile")
    with timed("installing"):
        if not installed.startswith(wanted):
            session.run(sys.executable, "-m", "venv", "--clear", str(folder), external=True)
            session.run(*pip, *shared, external=True)
            installed = wanted
        for name in groups:
            if f"\nand {name}" not in installed:
                session.run(*pip, *group(name), external=True)
                installed += f"\nand {name}"
    stamp.write_text(installed)
    return python


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run the tests on every backend but the slow ones; arguments go on to pytest."""
    everything(session, "fast")


@nox.session(name="tests-slow", venv_backend="none")
def tests_slow(session: nox.Session) -> None:
    """Run what `tests` leaves out: what compilers need long for, and more examples."""
    everything(session, "slow")


@nox.session(name="tests-shard", venv_backend="none")
def tests_shard(session: nox.Session) -> None:
    """Run one in eight of the slow tests, by the commit, and all of what changed the day before."""
    everything(session, "slow", "--shard", "HEAD")


@nox.session(venv_backend="none")
def coverage(session: nox.Session) -> None:
    """Run the tests but the slow ones under coverage; the package must be covered to 95%."""
    everything(session, "fast", traced=True)
    if not session.posargs:  # some of the tests cover some of the code
        python = together(session)
        session.env["COVERAGE_FILE"] = str(REPORTS / "coverage")
        combine = ("-m", "coverage", "combine", "--quiet", "--keep", str(REPORTS))
        session.run(python, *combine, external=True)
        session.run(python, "-m", "coverage", "report", "--fail-under=95", external=True)


def everything(session: nox.Session, part: str, *arguments: str, traced: bool = False) -> None:
    """Run a part of the tests on every backend and path, then Triton's; end with a table."""
    python = together(session)
    run = functools.partial(run_pytest, session, python, part, traced=traced)
    run("cpu", "--backend", ",".join(ON_CPU), *PARALLEL, *arguments)
    if reaches_a_gpu(session, python):
        run("cuda", "--backend", "torch-cuda", *arguments)
    if not cuda().missing:
        session.notify("tests-cupy")
    files = [f"tests/test_{name}.py" for name in BY_TRITON]
    interpreted = {"TRITON_INTERPRET": "1"}
    if sys.platform == "linux":
        run("triton", "--backend", "triton", *files, *PARALLEL, *arguments, **interpreted)
    end(session, part)


def run_pytest(
    session: nox.Session,
    python: str,
    part: str,
    name: str,
    *arguments: str,
    traced: bool = False,
    **options: str,
) -> None:
    """Run pytest, and keep its report for the table."""
    report = REPORTS / f"{name}-{part or 'all'}.xml"
    report.unlink(missing_ok=True)
    results.reports.append(report)
    cache = {"JAX_COMPILATION_CACHE_DIR": str(user_cache() / "xla"), **COMPILED_ONCE}
    trace = {"COVERAGE_FILE": str(REPORTS / f"{name}.coverage")} if traced else {}
    command = [python, *(("-m", "coverage", "run") if traced else ()), "-m", "pytest"]
    with timed("testing"):
        try:
            session.run(
                *(*command, f"--junitxml={report}", *arguments),
                *(("--part", part) if part else ()),
                *session.posargs,
                external=True,
                # A backend may have no test that is slow, or of a name.
                success_codes=[0, NO_TESTS] if part == "slow" or session.posargs else [0],
                env={**PATIENT, **cache, **trace, **options},
            )
        except nox.command.CommandFailed:  # the others run all the same
            results.failed.append(name)


# pytest's status if it selects no test.
NO_TESTS = 5
# What XLA compiles is kept for the other processes and for the next run.
COMPILED_ONCE = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
# What shows that the answers of a kernel are right, where an interpreter takes its time for each.
BY_TRITON = ("triton", "contract", "semantics", "values", "cross_entropy", "properties")


def user_cache() -> Path:
    """Where compiled programs are kept between runs, if it can be written; else here."""
    kept = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "portable_softmax")
    try:
        kept.mkdir(parents=True, exist_ok=True)
    except OSError:
        return HOME
    return kept


@for_each_backend("tests", shared=True)
def test(session: nox.Session, backend: str) -> None:
    """Run the tests on BACKEND, all of them; arguments go on to pytest."""
    names = list(OF_LIBRARY.get(backend, (backend,)))
    if backend in ALONE:
        triton = backend == "cupy" and sys.platform == "linux"  # which it has wheels for
        install_backend(session, backend, "demo", "triton" if triton else None, also=group("test"))
        names += ["triton-cupy"] if triton else []
        python = str(Path(session.bin, "python"))
    else:
        python = together(session)
        if backend == "torch" and reaches_a_gpu(session, python):
            names.append("torch-cuda")
    parallel = () if {"cupy", "torch-cuda"} & {*names} else PARALLEL  # one process to a GPU
    run_pytest(session, python, "", backend, "--backend", ",".join(names), *parallel)
    end(session, "")


def reaches_a_gpu(session: nox.Session, python: str) -> bool:
    """Whether the build of torch does."""
    if cuda().missing:
        return False
    ask = "import torch; print(torch.cuda.is_available())"
    return "True" in (session.run(python, "-c", ask, silent=True, external=True) or "")


@nox.session(name="tests-triton", venv_backend="none")
def tests_triton(session: nox.Session) -> None:
    """Run the Triton kernels with Triton's interpreter, and compile a part of them.

    Neither needs a GPU. Where torch reaches one, they run there as well.

    The table of semantics and the exact values go through the kernels; the path is asserted.
    """
    python = together(session)
    files = [f"tests/test_{name}.py" for name in BY_TRITON]
    run = functools.partial(run_pytest, session, python, "")
    run("triton", "--backend", "triton", *files, *PARALLEL, TRITON_INTERPRET="1")
    # Triton either interprets or compiles in a process.
    compiled = [f"tests/test_triton_{name}.py" for name in ("compile", "cupy")]
    run("triton-compiled", "--backend", "numpy,torch", *compiled, *PARALLEL)
    if reaches_a_gpu(session, python):
        files += ["tests/test_triton_device.py"]
        run("triton-cuda", "--backend", "numpy,triton-cuda", *files)
    end(session, "")


@nox.session(name="tests-triton-oldest")
def tests_triton_oldest(session: nox.Session) -> None:
    """Run a part of `tests-triton` on the oldest Triton allowed; its slow tests are for the newest.

    torch's builds for CUDA pin a Triton that is older than the newest. The build for the CPU, which
    may be installed here, pins none, and so shows nothing of it.
    """
    (newest,) = PYPROJECT["project"]["optional-dependencies"]["triton"]
    oldest = newest.replace(">=", "==") + ".*"
    install(session, *package("torch"), oldest, *group("test"))
    run = functools.partial(run_pytest, session, str(Path(session.bin, "python")), "fast")
    arguments = ("--backend", "triton", "tests/test_triton.py", *PARALLEL)
    run("triton-oldest", *arguments, TRITON_INTERPRET="1")
    files = [f"tests/test_triton_{name}.py" for name in ("compile", "cupy")]
    run("triton-oldest-compiled", "--backend", "numpy,torch", *files, *PARALLEL)
    end(session, "fast")


@nox.session(name="triton-compile")
def triton_compile(session: nox.Session) -> None:
    """Compile every Triton kernel for every device and launch; write docs/triton_resources.md."""
    install(session, *package("torch", "triton"), *group("test"))
    table = str(ROOT / "docs" / "triton_resources.md")
    session.run("python", str(ROOT / "tests" / "triton_resources.py"), table)


@nox.session(venv_backend="none")
def mutants(session: nox.Session) -> None:
    """Plant each fault of tests/mutants and run the tests that should find it; takes hours."""
    python = together(session)
    session.run(python, "-m", "tests.mutants", *session.posargs, external=True)


# --- The table at the end -----------------------------------------------------------------------

COUNTS = ("passed", "failed", "skipped")
HEADINGS = ("backend", "version", "device", *COUNTS, "seconds", "why")
SLOWEST = 30


def end(session: nox.Session, part: str) -> None:
    """Print one table of what ran, the slowest tests, and how long it took; fail if a test did."""
    rows, slowest = read_reports(results.reports)
    print(table([*cells_of(rows, part), *without_a_device(required(session))]), flush=True)
    print(f"\nThe slowest {SLOWEST} tests, in seconds:")
    for seconds, name in slowest[:SLOWEST]:
        print(f"{seconds:8.1f}  {name}")
    print(f"\n{results.installing:.0f} s of installing, {results.testing:.0f} s of testing")
    if results.failed:
        session.error(f"failed: {', '.join(results.failed)}")
    if missing := required(session) - rows.keys():
        session.error(f"required, and not run: {', '.join(sorted(missing))}")


def read_reports(paths: list[Path]) -> tuple[dict[str, Row], list[tuple[float, str]]]:
    """Read JUnit reports of pytest: a row for each backend, and the tests with their seconds."""
    rows: dict[str, Row] = {}
    tests: list[tuple[float, str]] = []
    for path in paths:
        try:
            suite = ElementTree.parse(path).find("testsuite")
        except (OSError, ElementTree.ParseError):
            rows[path.stem] = Row(counts=Counter(failed=1), reasons=Counter({BROKEN: 1}))
            continue
        for case in suite.iter("testcase"):
            said = {p.get("name"): p.get("value") for p in case.iter("property")}
            row = rows.setdefault(said.get("backend", "none"), Row())
            row.version, row.device = (
                said.get(name, getattr(row, name)) for name in ("version", "device")
            )
            row.left[path.stem] = int(said.get("left", row.left[path.stem]))
            seconds = float(case.get("time"))
            row.seconds += seconds
            tests.append((seconds, f"{case.get('classname')}::{case.get('name')}"))
            skipped = case.find("skipped")
            if case.find("failure") is not None or case.find("error") is not None:
                row.counts["failed"] += 1
            elif skipped is not None:
                row.counts["skipped"] += 1
                row.reasons[skipped.get("message")] += 1
            else:
                row.counts["passed"] += 1
    return rows, sorted(tests, reverse=True)


BROKEN = "it ended without a report, see above"


def cells_of(rows: dict[str, Row], part: str) -> Iterator[tuple[str, ...]]:
    """Yield the cells of each row, that of tests without a backend last."""
    for name, row in sorted(rows.items(), key=lambda item: item[0] == "none"):
        why = [f"{count} x {reason}" for reason, count in row.reasons.most_common()]
        if left := row.left.total():
            other = {"fast": "tests-slow", "slow": "tests or another shard"}.get(part, "others")
            why.append(f"{left} more are run by {other}")
        counts = (str(row.counts[count]) for count in COUNTS)
        yield (name, row.version, row.device, *counts, f"{row.seconds:.0f}", "\n".join(why))


def without_a_device(must_run: set[str]) -> Iterator[tuple[str, ...]]:
    """Yield the row of what needs a GPU, where there is none."""
    if cuda().missing:
        outcome = ("failed", "-") if "cupy" in must_run else ("-", "skipped")
        yield ("cupy, cuda", "-", "-", "-", *outcome, "-", cuda().missing)


def table(rows) -> str:
    """Lay rows out in columns; a cell of several lines goes on below."""
    lines = [HEADINGS]
    for *cells, why in rows:
        first, *more = why.splitlines() or [""]
        lines.append((*cells, first))
        lines.extend(("",) * len(cells) + (line,) for line in more)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if heading in (*COUNTS, "seconds") else cell.ljust(width)
            for heading, cell, width in zip(HEADINGS, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


# numpy and torch bring Numba's kernels.
@for_each_backend("fuzz", without=("numba", "cupy", "ndonnx", "cubed"))
def fuzz(session: nox.Session, backend: str) -> None:
    """Search for differences on BACKEND: random calls against exact answers; no part of CI.

    100,000 calls on numpy and torch, fewer on the others; every path. What follows `--` goes on to
    `python -m tests.fuzz`, and then the properties of hypothesis are left out.
    """
    extras = ("numba",) if backend in ("numpy", "torch") else ()
    install_backend(session, backend, "demo", *extras, also=group("test"))
    session.run("python", "-m", "tests.fuzz", "--backend", backend, *session.posargs)
    if not session.posargs:
        options = ("--backend", backend, "--hypothesis-profile", "thorough")
        session.run("python", "-m", "pytest", "tests/test_properties.py", *options)


@nox.session(name="export-onnx")
def export_onnx(session: nox.Session) -> None:
    """Write a trained classifier, its loss and gradient to digits.onnx, and run it there."""
    install(session, *package(BACKENDS["ndonnx"]))
    session.run("python", str(ROOT / "examples" / "export_onnx.py"), *session.posargs)


@nox.session
def conformance(session: nox.Session) -> None:
    """Run the tests of SciPy, torch and optax on `compat`, and compare arguments with theirs.

    Then faults that were reported upstream, on ours and on the peers: docs/reported.md.
    """
    libraries = ("strict", "torch", "jax", "dask", "ndonnx", "mlx", "cubed")
    install(session, *package(*libraries), *group("conformance"))
    folder = ROOT / "tests" / "conformance"
    for script in ("scipy_special.py", "optax_losses.py"):
        session.run("python", str(folder / script), *session.posargs)
    pytest = ("python", "-m", "pytest", *session.posargs)
    session.run(*pytest, "tests/test_compat.py", "--backend", "numpy")
    backends = ",".join(["numpy", *libraries])
    session.run(*pytest, str(folder / "torch_modules.py"), "--backend", backends)
    found = str(HOME / "reported.xml")
    report = (str(folder / "reported.py"), "--backend", backends, f"--junitxml={found}")
    session.run(*pytest, *report)
    table = str(ROOT / "docs" / "reported.md")
    session.run("python", str(ROOT / "tests" / "reported_table.py"), found, table)


# What the oldest dependencies could break: what the package asks of them.
CORE = ("semantics", "values", "cross_entropy", "family", "errors", "dtype", "out", "layers")


@nox.session(python=PYPROJECT["project"]["requires-python"].removeprefix(">="))
def lowest(session: nox.Session) -> None:
    """Run the core tests on the oldest Python, NumPy and array-api-compat allowed."""
    pins = (d.replace(">=", "==") for d in PYPROJECT["project"]["dependencies"])
    install(session, *package(), *pins, *group("test"))
    files = [f"tests/test_{name}.py" for name in CORE]
    command = ("python", "-m", "pytest", "--backend", "numpy", *PARALLEL)
    session.run(*command, *(session.posargs or files))


# --- The other checks ---------------------------------------------------------------------------


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format, types, the project's metadata and the hosted workflows."""
    install(session, *package("demo"), *group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")
    session.run("repo-review", str(ROOT), "--show", "err", silent=True)
    workflows = str(ROOT / ".github")
    session.run("zizmor", "--offline", "--quiet", "--no-progress", workflows)
    session.run("actionlint")
    with tempfile.TemporaryDirectory() as folder:
        wrong = Path(folder, "wrong.yml")
        wrong.write_text(WRONG_WORKFLOW)
        session.run("actionlint", str(wrong), success_codes=[1], silent=True)


# There is no matrix: actionlint must report it, or it checks nothing.
WRONG_WORKFLOW = """\
on: push
jobs:
  wrong:
    runs-on: ubuntu-latest
    steps:
      - run: echo "${{ matrix.part }}"
"""


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Run every example in docstrings, README.md and the site; build the site in .nox/site.

    Warnings are errors, each code cell of a page runs, and nothing is read from a network.
    """
    python = together(session, "docs")
    run = functools.partial(session.run, python, "-m", external=True)
    pages = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))]
    examples = ("--doctest-modules", "portable_softmax", "--doctest-glob=*.md", "README.md")
    compiled = "--ignore-glob=*/kernels/_triton/_[!_]*.py"  # which has no examples
    run("pytest", *examples, *pages, compiled, *session.posargs)
    shutil.rmtree(SITE, ignore_errors=True)
    run(
        *("sphinx", "--fail-on-warning", "--keep-going", "--quiet"),
        *("--builder", "html", "--doctree-dir", str(HOME / "doctrees"), "docs", str(SITE)),
    )
    session.log(f"open {SITE / 'index.html'}")


@nox.session(name="docs-browser")
def docs_browser(session: nox.Session) -> None:
    """Look at each page that `docs` built in Chromium: wide and narrow, light and dark."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not (browser and shutil.which("chromedriver")):
        session.skip("no chromium with chromedriver here (Debian: chromium, chromium-driver)")
    if not (SITE / "index.html").exists():
        session.error("there is no site yet: python3 noxfile.py -s docs docs-browser")
    install(session, *group("browser"))
    session.run("python", "docs/look.py", str(SITE), str(HOME / "screenshots"))


@nox.session
def downstream(session: nox.Session) -> None:
    """Check the types as another project sees them: mypy and pyright, on the installed package."""
    install(session, *PYPROJECT["project"]["dependencies"], *group("downstream"))
    session.install("--no-deps", "--force-reinstall", str(ROOT))  # as it is now, not editable
    with tempfile.TemporaryDirectory() as folder, session.chdir(folder):
        shutil.copy(ROOT / "tests" / "typed_use.py", folder)
        session.run("mypy", "--strict", "typed_use.py")
        session.run("pyright", "typed_use.py")


@nox.session(name="downstream-sklearn")
def downstream_sklearn(session: nox.Session) -> None:
    """Run scikit-learn's own tests with its softmax, logsumexp and loss replaced by ours."""
    install(session, *package("strict", "torch", "demo"), *group("downstream-sklearn"))
    script = str(ROOT / "tests" / "conformance" / "scikit_learn.py")
    session.run("python", script, *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Build sdist and wheel, the same bytes twice; run README.md's first example on the wheel.

    The recipe of the conda package is rendered, which finds what does not fit its schema.
    """
    install(session, *group("build"))
    session.run("python", "-c", RENDER, str(ROOT / "conda" / "recipe.yaml"))
    dist, again = HOME / "dist", HOME / "dist-again"
    for folder in (dist, again):
        shutil.rmtree(folder, ignore_errors=True)
        session.run("python", "-m", "build", "--outdir", str(folder), str(ROOT))
    for one in sorted(dist.iterdir()):
        if one.read_bytes() != (again / one.name).read_bytes():
            session.error(f"two builds of {one.name} differ")
    (wheel,) = dist.glob("*.whl")

    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = (ROOT / "portable_softmax").rglob("*")
    ours = {p.relative_to(ROOT).as_posix() for p in sources if p.is_file()}
    different = {name for name in inside ^ ours if "__pycache__" not in name}
    if different:
        session.error(f"the wheel is not the package: {', '.join(sorted(different))}")

    example = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    if not (example and ">>> " in example[1]):
        session.error("README.md's first python block holds no example to run")
    with tempfile.TemporaryDirectory() as folder, session.chdir(folder):
        session.run("python", "-m", "venv", "clean")
        python = sysconfig.get_path("scripts", "venv", {"base": "clean"}) + "/python"
        session.run(python, "-m", "pip", "install", "--quiet", str(wheel), external=True)
        where = "import portable_softmax; print(portable_softmax.__file__)"
        origin = session.run(python, "-I", "-c", where, external=True, silent=True)
        if "site-packages" not in origin:
            session.error(f"the example would not run on the wheel but on {origin}")
        Path("example.txt").write_text(example[1])
        options = ("-o", "ELLIPSIS", "-o", "NORMALIZE_WHITESPACE")
        session.run(python, "-I", "-m", "doctest", *options, "example.txt", external=True)


RENDER = """\
import sys
from rattler_build import Stage0Recipe, VariantConfig
(package,) = Stage0Recipe.from_file(sys.argv[1]).render(VariantConfig())
print(package)
"""
