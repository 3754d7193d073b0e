"""``bench speed`` excludes wrong results, takes turns, and keeps what it measured."""

import importlib.util
import itertools
import json
import sys
from contextlib import contextmanager

import numpy as np
import pytest

from bench import copies, gpu, peers, places, providers, report, speed, tables
from bench.__main__ import main
from portable_softmax import kernels

TINY = speed.Effort(seconds=0.0, rounds=2, most=2, slice_s=1e-6)

PROVENANCE = {"benchmark", "command", "date", "commit", "machine", "threads", "versions"}


def _speed(*arguments):
    return main(["speed", "--quick", "--shapes", "4x3", *arguments])


def _measured(some, *operations, effort=TINY, dtype="float32"):
    return list(speed.measure(some, list(operations), [(4, 3)], [dtype], effort))


MEASURED = pytest.mark.libraries("numpy", "array_api_strict", "torch", "jax", "dask")


def _numpy(name, **offer):
    return providers.Provider(name, places.open_backend("numpy"), lambda *options: offer)


def _by_hand():
    return _numpy("right", **peers.numpy_by_hand(-1, "mean"))


# --------------------------------------------------------------------------- the command


@pytest.mark.slow("every operation and its peers are called")
@MEASURED
def test_speed_runs_on_every_backend(arrays_of, tmp_path, capsys):
    path = tmp_path / "speed.json"
    assert _speed("--backend", arrays_of, "--peers", "own", "--json", str(path)) == 0
    document = json.loads(path.read_text())
    assert document.keys() == PROVENANCE | {"backend", "device", "peers", "gpu", "rows"}
    assert document["command"].startswith("python -m bench speed --quick --shapes 4x3 --backend")
    assert document["machine"].keys() == {"cpu", "cores", "system", "load_before"}
    assert {"python", "numpy", "portable_softmax"} <= document["versions"].keys()
    place = places.open_backend(arrays_of)
    roles = {role: [row for row in document["rows"] if row["role"] == role] for role in _ROLES}
    assert {row["operation"] for row in roles["ours"]} == set(speed.default_operations(place))
    assert all(row["path"] for row in roles["ours"])
    assert {row["provider"] for row in roles["copy"]} >= {f"copy, {place.name}"}
    names = {row["provider"] for row in roles["peer"]}
    assert names == {peer.name for peer in providers.peers_at(place, slow_starts=False)[0]}
    for row in document["rows"]:
        assert not row["problem"]
        assert 0 < row["min_s"] <= row["median_s"]
        assert row["gb_per_s"] == pytest.approx(row["bytes_moved"] / row["min_s"] / 1e9)
    out = capsys.readouterr().out
    assert "of copy" in out
    assert "ours in short" in out


_ROLES = ("ours", "peer", "copy")


def test_all_peers_are_those_of_every_library_on_arrays_of_their_own():
    place = places.open_backend("numpy")
    all_providers, missing = providers.all_providers(place, "all", slow_starts=False)
    for library, peer in {"torch": "torch", "jax": "jax.nn, jit"}.items():
        found = [one.place.name for one in all_providers if one.name == peer]
        assert found == [library] if importlib.util.find_spec(library) else library in missing
    own = providers.all_providers(place, "own", slow_starts=False)[0]
    assert {provider.place for provider in own} == {place}


def test_each_operation_moves_what_it_must():
    rows = _measured([_by_hand()], *peers.OPERATIONS)
    once = 4 * 3 * 4
    moved = {row.operation: row.bytes_moved / once for row in rows if row.role == speed.PEER}
    assert not any(row.problem for row in rows)
    plain = {"softmax": 2, "log_softmax": 2, "logsumexp": 1}
    losses = {"cross_entropy": 1, "cross_entropy_value_and_grad": 2}
    backward = {f"{name}+backward": 2 * n for name, n in plain.items()}
    assert moved == plain | losses | backward


@pytest.mark.slow("it times every peer of the family")
def test_the_rest_of_the_family_is_timed_where_it_is_right():
    rows = _measured([_numpy("ours", **providers.ours(-1, "mean"))], *peers.TIMED)
    found = {row.operation: row.problem for row in rows if row.role == speed.PEER}
    assert found == dict.fromkeys(peers.TIMED, "")
    wrong = {name: lambda x, _: x for name in peers.TIMED}
    rows = _measured([_numpy("wrong", **wrong)], *peers.TIMED)
    assert all(row.problem.startswith("wrong: ") for row in rows if row.role == speed.PEER)


def test_threads_are_those_of_the_libraries_and_of_the_variables(monkeypatch):
    library = type("Library", (), {"get_num_threads": lambda: 7})
    monkeypatch.setitem(sys.modules, "numba", library)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    threads = report._threads()
    assert threads["numba"] == 7
    assert threads["OMP_NUM_THREADS"] == "3"


# --------------------------------------------------------------------------- our paths


def test_a_path_that_takes_the_same_kernel_is_timed_once(monkeypatch):
    def path_taken(provider, operation, *arrays):
        return "portable" if "portable" in provider.name or operation != "softmax" else "a kernel"

    monkeypatch.setattr(providers, "path_taken", path_taken)
    ours = providers.our_providers(places.open_backend("numpy"))
    rows = _measured(ours, "softmax", "cross_entropy_value_and_grad")
    assert [(row.operation, row.provider, row.path) for row in rows if row.role == speed.OURS] == [
        ("softmax", "ours", "a kernel"),
        ("softmax", "ours, portable", "portable"),
        ("cross_entropy_value_and_grad", "ours", "portable"),
    ]


def test_a_kernel_is_switched_by_its_name(monkeypatch):
    asked = []
    monkeypatch.setattr(providers.kernels, "without", asked.append)
    providers.Path("ours", switch=("without", "numpy tiles")).context()()
    assert asked == ["numpy tiles"]
    assert providers.Path("ours", switch=("without", "no such kernel")).context() is None
    assert providers.Path("ours", switch=("no such switch", "numpy tiles")).context() is None


def test_a_path_says_which_kernel_runs():
    x, labels = np.zeros((4, 3)), np.zeros(4, int)
    operations = ("softmax", "cross_entropy", "softmax+backward")
    taken = {
        path.name: {providers.path_taken(path, operation, x, labels) for operation in operations}
        for path in providers.our_providers(places.open_backend("numpy"))
    }
    assert taken["ours, portable"] == {"portable"}
    assert taken["ours"] <= set(kernels.available())


def test_a_line_in_the_table_adds_a_path(monkeypatch):
    entered = []

    @contextmanager
    def without(name):
        entered.append(name)
        with providers.kernels.portable():
            yield

    monkeypatch.setattr(providers.kernels, "without", without)
    line = providers.Path("ours, without", ("numpy",), switch=("without", "numpy tiles"))
    monkeypatch.setattr(providers, "PATHS", (*providers.PATHS[:1], line))
    rows = _measured(providers.our_providers(places.open_backend("numpy")), "softmax")
    ours = [row.provider for row in rows if row.role == speed.OURS]
    assert ours == ["ours", "ours, without"]
    assert {*entered} == {"numpy tiles"}


@pytest.mark.slow("it times every peer")
@pytest.mark.libraries("torch", "jax")
def test_backward_is_timed_where_there_is_autograd(arrays_of):
    place = places.open_backend(arrays_of)
    all_providers, _ = providers.all_providers(place, "own", slow_starts=False)
    operations = ("logsumexp+backward", "cross_entropy_value_and_grad")
    rows = _measured(all_providers, *operations)
    found = {(row.operation, row.provider): row.problem for row in rows if row.role != speed.COPY}
    with_autograd = {"torch": ("ours, autograd", "torch"), "jax": ("ours, jit, vjp", "jax.nn, jit")}
    for both in itertools.product(operations, with_autograd[place.name]):
        assert found[both] == ""


@pytest.mark.slow("torch.compile calls a C++ compiler")
@pytest.mark.libraries("torch")
def test_torch_compiles_before_it_is_timed(arrays_of):
    place = places.open_backend(arrays_of)
    if why := peers.why_not_compiled(place):
        pytest.skip(why)
    all_providers, _ = providers.all_providers(place, "own")
    rows = _measured([one for one in all_providers if "compiled" in one.name], "logsumexp")
    timed = {row.provider: row for row in rows if row.role != speed.COPY}
    assert timed.keys() == {"ours, compiled", "torch, compiled"}
    for row in timed.values():
        assert not row.problem
        assert row.median_s < 0.1  # compiling takes longer


# --------------------------------------------------------------------------- taking turns


def test_a_wrong_provider_is_not_timed():
    for operation, answer, problem in (
        ("softmax", lambda x, _: x, "wrong: relative error"),
        ("softmax", lambda x, _: np.full_like(x, np.nan), "wrong: relative error nan"),
        ("softmax", lambda x, _: x[:1], "wrong: shape (1, 3) instead of (4, 3)"),
        ("softmax", lambda x, _: x.no_such_method(), "AttributeError"),
        ("cross_entropy", lambda x, _: np.float32(1), "wrong: relative error"),
        ("softmax+backward", lambda x, dy: _right(x, dy, dx=dy), "wrong: relative error"),
        ("softmax+backward", lambda x, dy: _right(x, dy, y=x), "wrong: relative error"),
        ("softmax", lambda x, _: (), "wrong: 0 results instead of 1"),
    ):
        some = [_numpy("wrong", **{operation: answer}), _by_hand()]
        rows = {row.provider: row for row in _measured(some, operation)}
        wrong = rows["wrong"]
        assert wrong.problem.startswith(problem)
        assert np.isnan(wrong.min_s)
        assert wrong.rounds == 0
        assert rows["right"].rounds >= 2
        (line,) = [line for line in tables.cells(list(rows.values())) if "wrong" in line]
        assert wrong.problem in line


def test_a_gradient_may_cancel_somewhere():
    problem = speed.Problem((300, 200), "float32")
    x, dy = (problem.arrays[name] for name in ("x", problem.second("softmax+backward")))
    results = peers.numpy_by_hand(-1, "mean")["softmax+backward"](x, dy)
    assert problem.answers.problem("softmax+backward", dy, results) == ""


def _right(x, dy, **instead):
    y, dx = peers.numpy_by_hand(-1, "mean")["softmax+backward"](x, dy)
    return instead.get("y", y), instead.get("dx", dx)


class _Clock:
    """A clock by which each call takes as long as it says."""

    name = "fake"

    def __init__(self):
        self.order = []

    def seconds(self, call, repeats):
        name, seconds = call()
        self.order.append(name)
        return seconds


def test_providers_take_turns_and_slow_ones_have_fewer_rounds():
    clock = _Clock()
    turns = {
        name: speed.Timed(lambda name=name, s=s: (name, s), clock, providers.nullcontext)
        for name, s in {"slow": 1.0, "middle": 0.3, "fast": 0.01}.items()
    }
    effort = speed.Effort(seconds=1.5, rounds=3, most=10, slice_s=0.001, warm=0)
    times = speed.interleaved(turns, effort)
    assert [len(times[name]) for name in ("slow", "middle", "fast")] == [3, 5, 10]
    first_rounds = clock.order[3:12]  # after one call each to count repeats
    assert [set(first_rounds[i : i + 3]) for i in (0, 3, 6)] == [set(turns)] * 3
    assert len({tuple(first_rounds[i : i + 3]) for i in (0, 3, 6)}) == 3


def test_two_rounds_of_a_call_that_takes_seconds_are_enough():
    turns = {"slow": speed.Timed(lambda: ("slow", 0.6), _Clock(), providers.nullcontext)}
    effort = speed.Effort(seconds=0.3, rounds=5, most=10, enough_s=1.0)
    assert len(speed.interleaved(turns, effort)["slow"]) == 2


def test_the_clock_starts_when_the_warm_calls_are_done():
    """JAX returns before the work is done."""
    running, found = [], []

    def call():
        found.append(len(running))
        running.append(None)

    clock = gpu.HostClock(lambda _: running.clear())
    speed.turn(speed.Timed(call, clock, providers.nullcontext), calls=3, warm=2)
    assert found == [0] * 5


def test_cpu_time_is_that_of_the_process(monkeypatch):
    """Which does not count what a call waits."""
    monkeypatch.setattr(gpu, "process_time", iter([1.0, 3.0]).__next__)
    clock = gpu.clock(places.open_backend("numpy"), cpu_time=True)
    assert clock.name == "process_time"
    assert clock.seconds(lambda: None, 4) == 0.5


def test_a_short_call_is_repeated():
    clock = _Clock()
    timed = speed.Timed(lambda: ("short", 1e-5), clock, providers.nullcontext)
    assert speed.repeats(timed, slice_s=1e-3) == 100


def test_numpy_copies_wherever_the_host_works():
    place = places.open_backend("numpy")
    for device, numpy_too in (("cpu", True), ("cuda:0", False)):
        other = places.Place("other", "1", device, place.xp, None)
        names = {copy.name for copy in copies.of([other])}
        assert "copy, other" in names
        assert ("copy, numpy" in names) == numpy_too


def test_the_best_copy_is_100_percent():
    shares = [row.share_of_copy for row in _measured([_by_hand()], "softmax") if row.role == "copy"]
    assert max(shares) == 1
    assert len(shares) == (2 if copies.cores() > 1 else 1)


def test_threads_copy_every_row():
    for rows in (1, 5, 1000):
        x = np.random.default_rng(0).standard_normal((rows, 7))
        y = copies.by_threads(x)
        assert not np.shares_memory(x, y)
        np.testing.assert_array_equal(x, y)


def test_a_dtype_that_ours_does_not_have_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(places.Place, "dtypes", lambda self: ["float64"])
    assert _speed("--backend", "numpy", "--dtypes", "float32") == 2
    assert "numpy has no float32 here: float64" in capsys.readouterr().err
