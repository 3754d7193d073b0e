"""One fixture, `xp`, runs a test on every backend."""

from __future__ import annotations

import gc
import importlib
import sys
from collections import Counter
from pathlib import Path

import pytest
from backends import BACKENDS, LIBRARIES, PATHS, Backend
from calls import Call
from hypothesis import is_hypothesis_test, settings
from shard import Shard

from portable_softmax import kernels
from portable_softmax.testing import CASES

# Compilers make millions of objects that live on: to look for garbage among them as often as Python
# does takes a tenth of the time of the tests that compile.
gc.set_threshold(50_000, 20, 20)

# The time of one example depends on the machine and on whatever compiles first.
settings.register_profile(
    "portable", deadline=None, derandomize=True, print_blob=True, max_examples=30
)
# What `--part fast` leaves out of this, `--part slow` makes up for: it runs them all again.
settings.register_profile("fast", settings.get_profile("portable"), max_examples=5)
settings.register_profile("thorough", deadline=None, print_blob=True, max_examples=1_000)
settings.load_profile("portable")

_MADE: dict[str, Backend] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        default="",
        help=f"comma list of {', '.join(BACKENDS)}; a named one that is missing fails. "
        "Without it: every one that is there",
    )
    parser.addoption(
        "--part",
        choices=("fast", "slow"),
        help="`fast` leaves out the tests marked slow and tries fewer examples of the properties; "
        "`slow` runs those tests, and all examples. Without it: everything",
    )
    parser.addoption(
        "--shard",
        default="",
        metavar="COMMIT",
        help="of the slow tests, those that fall to this commit, one in eight, and those of the "
        "rooms that changed in the day before it",
    )


def _chosen(config: pytest.Config) -> tuple[str, ...]:
    named = [name.strip() for name in config.getoption("--backend").split(",") if name.strip()]
    if not named:
        return tuple(name for name, cls in BACKENDS.items() if not cls.missing())
    for name in named:
        if name not in BACKENDS:
            raise pytest.UsageError(f"--backend {name}: expected one of {', '.join(BACKENDS)}")
        # What would run can be listed anywhere.
        if (why := BACKENDS[name].missing()) and not config.option.collectonly:
            raise pytest.UsageError(f"--backend {name}: {why}")
    return tuple(named)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_KEY] = _chosen(config)
    if config.getoption("--part") == "fast" and not config.getoption("--hypothesis-profile"):
        settings.load_profile("fast")


_LEFT = pytest.StashKey[Counter]()
_KEY = pytest.StashKey[tuple[str, ...]]()
_REPORTED = pytest.StashKey[set]()


def _backend(name: str) -> Backend:
    if name not in _MADE:
        _MADE[name] = BACKENDS[name]()
    return _MADE[name]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    given = {name for m in metafunc.definition.iter_markers("parametrize") for name in m.args[0]}
    if "backend_name" in metafunc.fixturenames and "backend_name" not in given:
        names = _backends_of(metafunc.definition, metafunc.config.stash[_KEY])
        metafunc.parametrize("backend_name", names or [NOWHERE], scope="session")


# The parameter of a test that none of the chosen backends runs.
NOWHERE = "nowhere"
# A test that asks for a library's module is a test of that library, as one that is marked so.
_LIBRARY_FIXTURES = {"torch": "torch", "jax": "jax", "da": "dask"}


def _backends_of(test: pytest.Item, chosen: tuple[str, ...]) -> list[str]:
    """Return which of the chosen backends run a test that takes one.

    They are those that its closest mark `run_on` names. Without such a mark it is the first that
    can, or the first of each library that the test is about.
    """
    about = _libraries_of(test)
    able = [name for name in chosen if not about or BACKENDS[name].library in about]
    mark = test.get_closest_marker("run_on")
    groups = {*mark.args} if mark else set()
    if unknown := groups - {"libraries", "paths", *BACKENDS}:
        raise pytest.UsageError(f"{test.nodeid}: run_on names no backend or group: {unknown}")
    if "arrays_of" in test.fixturenames:
        groups.add("libraries")
    if groups:
        members = {
            *(LIBRARIES if "libraries" in groups else ()),
            *(PATHS if "paths" in groups else ()),
        }
        return [name for name in able if name in groups | members]
    return list({BACKENDS[name].library if about else "": name for name in reversed(able)}.values())


def _libraries_of(test: pytest.Item) -> set[str]:
    """Return the libraries that a test is about; none if it takes any."""
    asked = {v for k, v in _LIBRARY_FIXTURES.items() if k in getattr(test, "fixturenames", ())}
    named = {name for mark in test.iter_markers("libraries") for name in mark.args}
    if unknown := named - {backend.library for backend in BACKENDS.values()}:
        raise pytest.UsageError(f"{test.nodeid}: no backend is of {unknown}")
    return asked | named


@pytest.fixture(scope="session")
def xp(backend_name: str) -> Backend:
    """A backend: the same test for every array library."""
    return _backend(backend_name)


@pytest.fixture
def arrays_of(backend_name: str) -> str:
    """The backend's name, in tests of what knows libraries and devices only, not paths."""
    return backend_name


@pytest.fixture(autouse=True)
def _path(request: pytest.FixtureRequest):
    """Switch to the path of the backend; a test marked `numba` sets its own."""
    name = _backend_name(request.node)
    path = BACKENDS[name].path if name else "without numba"
    if request.node.get_closest_marker("numba"):
        yield
        return
    if path == "portable":
        switch = kernels.portable()
    elif path == "without numba":
        switch = kernels.without("numba rows")
    else:
        switch = kernels.use(path)
    with switch:
        yield


@pytest.fixture(autouse=True)
def _room_for_programs(request: pytest.FixtureRequest):
    """Forget what XLA has compiled before it takes all the pieces of memory of a process.

    Linux maps 65,530 of them at most, and each program needs a few.
    """
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        sys.modules["jax"].clear_caches()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what no chosen backend runs, and the tests of the other part."""
    part, chosen = config.getoption("--part"), config.stash[_KEY]
    shard = Shard(config.rootpath, config.getoption("--shard"))
    kept, foreign, left = [], [], []
    counts: Counter[str] = Counter()
    for item in items:
        name = _backend_name(item)
        if name:
            call = item.callspec.params.get("call")
            no_path = isinstance(call, Call) and name not in LIBRARIES and not call.has_paths
            elsewhere = name not in chosen or no_path
        else:  # what takes no backend runs once
            elsewhere = ("numba" if item.get_closest_marker("numba") else "numpy") not in chosen
        slow = not elsewhere and _is_slow(item, name)
        if elsewhere:
            foreign.append(item)
        elif slow if part == "fast" else part == "slow" and not (slow or _has_examples(item)):
            left.append(item)
            counts[name] += 1
        elif slow and not shard.holds(item.nodeid):
            left.append(item)
        else:
            kept.append(item)
    config.stash[_LEFT] = counts
    config.hook.pytest_deselected(items=foreign + left)
    items[:] = kept


def _backend_name(item: pytest.Item) -> str:
    """Return the name of the backend that a test runs on; empty if it takes none."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return params.get("backend_name", "")


def _is_slow(item: pytest.Item, backend: str) -> bool:
    if backend and BACKENDS[backend].costly and not item.get_closest_marker("cheap"):
        own = backend in LIBRARIES and BACKENDS[backend].library in _libraries_of(item)
        # A test that draws for a backend says itself what is slow there.
        if not (own or "drawn" in item.fixturenames):
            return True
    for mark in item.iter_markers("slow"):
        why, *only_on = mark.args
        assert " " in why, f"{item.nodeid}: a slow test says why first, then the backends if any"
        assert BACKENDS.keys() >= {*only_on}, f"{item.nodeid} is slow on no backend of ours"
        if not only_on or backend in only_on:
            return True
    return False


def _has_examples(item: pytest.Item) -> bool:
    return is_hypothesis_test(getattr(item, "obj", None))


@pytest.fixture
def torch(xp: Backend):
    """The module torch, in tests of what only torch has."""
    return importlib.import_module("torch")


@pytest.fixture
def jax(xp: Backend):
    """The module jax, in tests of what only JAX has."""
    return importlib.import_module("jax")


@pytest.fixture
def da(xp: Backend):
    """The module dask.array, in tests of what only Dask has."""
    return importlib.import_module("dask.array")


@pytest.fixture(autouse=True)
def _own_draws(request: pytest.FixtureRequest) -> None:
    """Let a test that draws from its module's `RNG` draw the same, whatever ran before it."""
    rng = getattr(request.module, "RNG", None)
    if rng is not None:
        rng.bit_generator.state = _DRAWN.setdefault(request.module, rng.bit_generator.state)


_DRAWN: dict[object, object] = {}


@pytest.fixture(autouse=True, scope="module")
def _old_objects(request: pytest.FixtureRequest):
    """Leave what is there out of the searches for garbage of `bench`, one before each timing."""
    if request.module.__name__.startswith("test_bench"):
        gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _report(request: pytest.FixtureRequest, record_property) -> None:
    """Leave what the table of results wants to know: once for each backend in a process."""
    stash, name = request.config.stash, _backend_name(request.node)
    record_property("backend", name or "none")
    if name not in stash.setdefault(_REPORTED, set()):
        stash[_REPORTED].add(name)
        record_property("left", stash[_LEFT][name])
        if name:
            record_property("version", _backend(name).version())
            record_property("device", _backend(name).device_name())


# Tests that compare values with exact ones: on the backends of Triton they must be its kernels'.
_ON_KERNELS = {
    *("test_the_gradient_through_a_confident_softmax", "test_a_maximum_of_any_size"),
    *("test_the_gradient_through_a_confident_log_softmax", "test_long_columns_keep_their_digits"),
    *("test_golden", "test_options_alone_and_together"),
    *("test_half_types", "test_the_label_entry_of_a_confident_gradient"),
}
# And the documented cases that are so.
_CASES_ON_KERNELS = {
    *("label_out_of_range", "ignore_index", "nan_in_a_row", "a_row_fully_masked_by_where"),
    *("plus_inf_in_a_row", "an_ignored_row_holding_nan_or_inf"),
    "probability_0_at_a_logit_of_minus_inf",
}


@pytest.fixture(autouse=True)
def _kernels_run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Count the launches of a test of Triton's kernels: the portable path would pass too."""
    backend = BACKENDS.get(_backend_name(request.node))
    if backend is None or backend.path != "triton rows":
        yield
        return
    from portable_softmax.kernels._triton._launch import Plan

    seen, real = [], Plan.run
    monkeypatch.setattr(Plan, "run", lambda *given: seen.append(given[1]) or real(*given))
    yield
    case = CASES.get(request.node.callspec.params.get("case"))
    must = request.node.originalname in _ON_KERNELS
    must = must or (case is not None and case.__name__[1:] in _CASES_ON_KERNELS)
    assert seen or not must, "no kernel ran"
