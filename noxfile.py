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

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import zipfile
from collections import Counter
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
# Those that `tests` and `tests-slow` leave out: their libraries take long to install.
BY_NAME = ("dpnp",)
# The backends whose tests together must cover the package, line and branch.
COVERED = ("numpy", "numba", "torch", "jax")
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


def for_each_backend(name: str, without: tuple[str, ...] = ()):
    """Make a session NAME-BACKEND for each backend of a function of a session and a backend."""

    def decorate(function):
        for backend in BACKENDS:
            if backend not in without:
                one = functools.partial(function, backend=backend)
                one.__doc__ = function.__doc__.replace("BACKEND", backend)
                nox.session(one, name=f"{name}-{backend}")
        return function

    return decorate


# --- The main job, the benchmarks ---------------------------------------------------------------


# A lazy library has nothing to gain from small steps, nor have kernels for large arrays.
@for_each_backend("demo", without=("numba", *LAZY, *BY_NAME))
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


@dataclass
class Run:
    """What this process knows of a run beside its report."""

    finished: bool = False
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What a JUnit report says."""

    version: str
    device: str
    passed: int
    failed: int
    skipped: int
    reasons: Counter
    left: str
    """How many tests belong to the other part; "-" where none ran."""


# Only what ran in this process is shown: never the report of an earlier run.
runs: dict[str, Run] = {}


@dataclass
class Asked:
    """What the sessions that start others have asked of them."""

    parts: set[str] = field(default_factory=set)
    names: dict[str, None] = field(default_factory=dict)
    """The rows of the table, in order."""
    traced: bool = False


asked = Asked()


def part() -> str:
    """Return the one part of the tests that was asked for; empty for all of them."""
    return next(iter(asked.parts)) if len(asked.parts) == 1 else ""


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run the tests on every backend but the slow ones; arguments go on to pytest."""
    start(session, "fast")


@nox.session(name="tests-slow", venv_backend="none")
def tests_slow(session: nox.Session) -> None:
    """Run what `tests` leaves out: what compilers need long for, and more examples."""
    start(session, "slow")


@nox.session(venv_backend="none")
def coverage(session: nox.Session) -> None:
    """Run the tests but the slow ones under coverage; the package must be covered to 95%."""
    asked.traced = True
    start(session, "fast", COVERED)


EVERYTHING = (*(b for b in BACKENDS if b not in BY_NAME), "triton", "triton-compiled")
# What XLA compiles is kept for the other processes and for the next run.
COMPILED_ONCE = {
    "JAX_COMPILATION_CACHE_DIR": str(HOME / "jax-cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def start(session: nox.Session, which: str, names: tuple[str, ...] = EVERYTHING) -> None:
    """Queue a part of the tests and the table."""
    required(session)
    asked.parts.add(which)
    asked.names |= dict.fromkeys(names)
    for name in (*names, "table"):
        if not name.endswith("-compiled"):  # which is run by the session of what is interpreted
            session.notify(f"tests-{name}")


def run_pytest(session: nox.Session, name: str, *arguments: str, **options: str) -> None:
    """Run pytest and keep its report for the table."""
    for stale in (REPORTS / f"{name}.xml", *REPORTS.glob(f"{name}.coverage*")):
        stale.unlink(missing_ok=True)
    run = runs.setdefault(name, Run())
    some = part() == "slow" or (part() and session.posargs)
    traced = asked.traced and name in COVERED
    session.run(
        *("python", *(("-m", "coverage", "run") if traced else ()), "-m", "pytest"),
        *(f"--junitxml={REPORTS / name}.xml", *arguments),
        *(("--part", part()) if part() else ()),
        *session.posargs,
        success_codes=[0, NO_TESTS] if some else [0],
        env={"COVERAGE_FILE": str(REPORTS / f"{name}.coverage"), **PATIENT, **options},
    )
    run.finished = True


# pytest's status if it selects no test: a backend may have none that are slow, or of a name.
NO_TESTS = 5


@for_each_backend("tests")
def test(session: nox.Session, backend: str) -> None:
    """Run the tests on BACKEND, all of them if asked for by name; arguments go on to pytest."""
    run = runs[backend] = Run()
    must_run = required(session)
    more = f"test-{backend}" if f"test-{backend}" in PYPROJECT["dependency-groups"] else "test"
    extras = ("demo", "numba") if backend in ("torch", "jax") else ("demo",)
    with_triton = backend == "cupy" and sys.platform == "linux"  # which it has wheels for
    extras += ("triton",) if with_triton else ()
    install_backend(session, backend, *extras, also=group(more))
    names = [backend, "jax-numba"] if backend == "jax" else [backend]
    if with_triton:
        names.append("triton-cupy")
    if backend == "torch":
        names += ["torch-portable", "torch-numba"]
        if "torch-cuda" in must_run or reaches_a_gpu(session):
            names.append("torch-cuda")
        else:
            run.note = f"torch-cuda: {cuda().missing or 'this build of torch reaches no GPU'}"
    parallel = () if {"cupy", "torch-cuda"} & {*names} else PARALLEL  # one process to a GPU
    options = COMPILED_ONCE if backend == "jax" else {}
    run_pytest(session, backend, "--backend", ",".join(names), *parallel, **options)


def reaches_a_gpu(session: nox.Session) -> bool:
    """Whether the session's build of torch does."""
    ask = "import torch; print(torch.cuda.is_available())"
    answer = session.run("python", "-c", ask, silent=True) or ""  # none with --install-only
    return "True" in answer


@nox.session(name="tests-triton")
def tests_triton(session: nox.Session) -> None:
    """Run the Triton kernels with Triton's interpreter, and compile a part of them.

    Neither needs a GPU. Where torch reaches one, they run there as well.

    The table of semantics and the exact values go through the kernels; the path is asserted.
    """
    install(session, *package("torch", "triton"), *group("test"))
    names = ("triton", "semantics", "values", "cross_entropy", "properties")
    files = [f"tests/test_{name}.py" for name in names]
    run_pytest(session, "triton", "--backend", "triton", *files, *PARALLEL, TRITON_INTERPRET="1")
    # Triton either interprets or compiles in a process.
    files = [f"tests/test_triton_{name}.py" for name in ("compile", "cupy")]
    run_pytest(session, "triton-compiled", "--backend", "torch", *files, *PARALLEL)
    if reaches_a_gpu(session):
        files = [f"tests/test_{name}.py" for name in (*names, "triton_device")]
        run_pytest(session, "triton-cuda", "--backend", "triton-cuda", *files)


@nox.session(name="tests-triton-oldest")
def tests_triton_oldest(session: nox.Session) -> None:
    """Run a part of `tests-triton` on the oldest Triton allowed; its slow tests are for the newest.

    torch's builds for CUDA pin a Triton that is older than the newest. The build for the CPU, which
    may be installed here, pins none, and so shows nothing of it.
    """
    (newest,) = PYPROJECT["project"]["optional-dependencies"]["triton"]
    oldest = newest.replace(">=", "==") + ".*"
    install(session, *package("torch"), oldest, *group("test"))
    fast = (*PARALLEL, "--part", "fast")
    arguments = ("--backend", "triton", "tests/test_triton.py", *fast)
    run_pytest(session, "triton-oldest", *arguments, TRITON_INTERPRET="1")
    files = [f"tests/test_triton_{name}.py" for name in ("compile", "cupy")]
    run_pytest(session, "triton-oldest-compiled", "--backend", "torch", *files, *fast)


@nox.session(name="triton-compile")
def triton_compile(session: nox.Session) -> None:
    """Compile every Triton kernel for every device and launch; write docs/triton_resources.md."""
    install(session, *package("torch", "triton"), *group("test"))
    table = str(ROOT / "docs" / "triton_resources.md")
    session.run("python", str(ROOT / "tests" / "triton_resources.py"), table)


@nox.session(name="tests-table")
def tests_table(session: nox.Session) -> None:
    """End a run of the tests: one table, then the coverage if it was measured."""
    rows = {name: row(name, required(session)) for name in asked.names or EVERYTHING}
    print(table(rows.values()), flush=True)
    failed = [backend for backend, cells in rows.items() if cells[FAILED] not in ("0", "-")]
    if failed:
        session.error(f"failed: {', '.join(failed)}")
    if session.posargs or not asked.traced:  # some of the tests cover some of the code
        return
    install(session, *group("coverage"))
    parts = [str(p) for b in COVERED for p in REPORTS.glob(f"{b}.coverage*")]
    session.env["COVERAGE_FILE"] = str(REPORTS / "coverage")
    session.run("python", "-m", "coverage", "combine", "--quiet", "--keep", *parts)
    session.run("python", "-m", "coverage", "report", "--fail-under=95")


COUNTS = ("passed", "failed", "skipped")
HEADINGS = ("backend", "version", "device", *COUNTS, "why")
FAILED = HEADINGS.index("failed")


def row(backend: str, must_run: set[str]) -> tuple[str, ...]:
    """One line of the table, from this run's report or from why there is none."""
    if backend == "cupy" and cuda().missing:
        outcome = ("failed", "-") if backend in must_run else ("-", "skipped")
        return (backend, "-", "-", "-", *outcome, cuda().missing)
    run = runs.get(backend)
    report = read_report(REPORTS / f"{backend}.xml") if run else None
    if report is None:
        why = "it ended without a report, see above" if run else "it did not start"
        return (backend, "-", "-", "-", "failed", "-", why)
    why = [f"{count} x {reason}" for reason, count in report.reasons.most_common()]
    failed = str(report.failed)
    if not (run.finished or report.failed):
        failed, why = "failed", ["its runner ended with an error, see above", *why]
    if run.note:
        why.append(run.note)
    if part() and report.left != "-":
        other = {"fast": "tests-slow", "slow": "tests"}[part()]
        why.append(f"{report.left} more are run by {other}")
    counts = (str(report.passed), failed, str(report.skipped))
    return (backend, report.version, report.device, *counts, "\n".join(why))


def read_report(path: Path) -> Report | None:
    """Read a JUnit report of pytest; None where it is missing or broken off."""
    try:
        suite = ElementTree.parse(path).find("testsuite")
    except (OSError, ElementTree.ParseError):
        return None
    count = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]

    def values(name: str) -> str:
        found = suite.iterfind(f".//property[@name='{name}']")
        return ", ".join(dict.fromkeys(p.get("value") for p in found)) or "-"

    return Report(
        version=values("version"),
        device=values("device"),
        passed=count["tests"] - failed - count["skipped"],
        failed=failed,
        skipped=count["skipped"],
        reasons=Counter(skip.get("message") for skip in suite.iter("skipped")),
        left=values("left"),
    )


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
            cell.rjust(width) if heading in COUNTS else cell.ljust(width)
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


@nox.session(python=PYPROJECT["project"]["requires-python"].removeprefix(">="))
def lowest(session: nox.Session) -> None:
    """Run the tests on the oldest Python, NumPy and array-api-compat that pyproject.toml allows."""
    pins = (d.replace(">=", "==") for d in PYPROJECT["project"]["dependencies"])
    install(session, *package("demo"), *pins, *group("test"))
    session.run("python", "-m", "pytest", "--backend", "numpy", *PARALLEL, *session.posargs)


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


@nox.session
def docs(session: nox.Session) -> None:
    """Run every example in docstrings, README.md and the site; build the site in .nox/site.

    Warnings are errors, each code cell of a page runs, and nothing is read from a network.
    """
    extras = ("strict", "torch", "jax", "dask", "numba", "demo", "bench")
    install(session, *package(*extras), *group("docs"))
    pages = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))]
    examples = ("--doctest-modules", "portable_softmax", "--doctest-glob=*.md", "README.md")
    needs_triton = "--ignore-glob=*/kernels/_triton/_[!_]*.py"  # which is not installed here
    session.run("python", "-m", "pytest", *examples, *pages, needs_triton, *session.posargs)
    programs = "tests/test_example_scikit_learn.py"
    session.run("python", "-m", "pytest", programs, "--backend", "numpy", *session.posargs)
    shutil.rmtree(SITE, ignore_errors=True)
    session.run(
        *("python", "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"),
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
