"""The benchmarks run, keep what they measured, and reject wrong answers."""

import ast
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import reference

import portable_softmax
from bench import (
    accuracy,
    accuracy_family,
    copies,
    exact,
    exact_family,
    families,
    memory,
    peers,
    providers,
    report,
    scale,
)
from bench.__main__ import COMMANDS, main
from portable_softmax import kernels

PROVENANCE = {"benchmark", "command", "date", "commit", "machine", "threads", "versions"}


def test_without_its_extra_it_says_what_to_install(tmp_path):
    (tmp_path / "mpmath.py").write_text("raise ModuleNotFoundError('none', name='mpmath')")
    path = os.pathsep.join([str(tmp_path), str(Path(portable_softmax.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--help"],
        cwd=Path(__file__).parents[1], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'bench: mpmath is not installed: pip install ".[bench]"\n'


def test_help_says_what_a_command_does_and_what_its_lists_hold(capsys):
    lists = {"--ops OPS": memory.OPERATIONS, "--dtypes DTYPES": exact.FORMATS}
    for command in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
        out = " ".join(capsys.readouterr().out.split())
        assert COMMANDS[command].__doc__ in out
        for option, choices in {**lists, "--parts PARTS": scale.PARTS}.items():
            _, shown, said = out.rpartition(option)
            assert all(choice in said for choice in choices) or not shown, command


# --------------------------------------------------------------------------- accuracy


@pytest.fixture
def accuracy_backend(backend_name, monkeypatch):
    """One of the backends whose accuracy is promised; its own library is the only peer."""
    if backend_name not in accuracy.BACKENDS:
        pytest.skip(f"accuracy is promised on {', '.join(accuracy.BACKENDS)}")
    monkeypatch.setattr(accuracy, "BACKENDS", (backend_name,))
    return backend_name


@pytest.mark.slow("exact values of many rows on each path", "torch", "jax")
@pytest.mark.slow("exact answers of many rows", "numpy")
def test_accuracy_holds_every_bound_on_short_rows(accuracy_backend, tmp_path, capsys):
    paths = {name: tmp_path / f"accuracy.{name}" for name in ("json", "markdown")}
    files = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    assert main(["accuracy", "--quick", "--dtypes", "float32", *files]) == 0
    document = json.loads(paths["json"].read_text())
    assert document.keys() == PROVENANCE | {"cells"}
    ours = [cell for cell in document["cells"] if cell["ours"]]
    found = {cell["provider"] for cell in ours}
    assert found >= {f"ours, {accuracy_backend}", f"ours, {accuracy_backend}, portable"}
    assert all(name.startswith(f"ours, {accuracy_backend}") for name in found)
    offered = {*accuracy.OPERATIONS, accuracy.LABEL_GRADIENT, *accuracy_family.OPERATIONS}
    of_halves = {"cross_entropy_in_float32"}
    assert {cell["operation"] for cell in ours} == offered - of_halves
    for cell in ours:
        assert cell["held"]
        assert cell["counted"]
        assert cell["error"] <= cell["bound"]
    assert f"| rows | dtype | ours, {accuracy_backend} |" in paths["markdown"].read_text()
    assert "every bound held" in capsys.readouterr().out


def test_accuracy_fails_where_ours_loses_digits(monkeypatch, capsys):
    def by_hand(place, **_):
        return [providers.Provider("ours", place, peers.numpy_by_hand, ours=True)]

    monkeypatch.setattr(accuracy, "our_providers", by_hand)
    monkeypatch.setattr(accuracy, "BACKENDS", ("numpy",))
    assert main(["accuracy", "--quick", "--backend", "numpy", "--dtypes", "float32"]) == 1
    out = capsys.readouterr().out
    assert "bounds broken" in out
    assert "NO" in out


@pytest.mark.parametrize(("dtype", "within"), [("float32", 0.001), ("float64", 0.3)])
def test_the_exact_answers_are_exact(dtype, within):
    """Against 50 digits: in units in the last place of the dtype that they judge."""
    if accuracy.why_not(dtype):
        pytest.skip(accuracy.why_not(dtype))
    rng = np.random.default_rng(0)
    low = np.log(float(np.finfo(dtype).smallest_normal))
    x = np.concatenate(
        [
            rng.standard_normal((5, 6)),
            families.confident(rng, np.linspace(5, 100, 20), classes=6),
            rng.uniform(low, 0, (10, 6)),
            1e4 + rng.standard_normal((5, 6)),
            np.log(rng.dirichlet(np.ones(6), 5)),
        ]
    ).astype(dtype)
    labels = families.labels(rng, x, -1)
    answers = exact.solve(x, labels)

    def close(ours, exactly, like):
        unit = exact.unit(np.asarray(like, np.longdouble), dtype)
        assert abs(_mp(ours) - exactly) <= within * _mp(unit)

    for i, (row, t) in enumerate(zip(x, labels, strict=True)):
        wide = reference.exact(row)
        p, log_p = reference.softmax(wide), reference.log_softmax(wide)
        others = reference.mp.fsum(p[j] for j in range(len(p)) if j != t)
        for ours, theirs in (
            (answers.softmax[i], p),
            (answers.log_softmax[i], log_p),
            ([answers.cross_entropy[i]], [-log_p[t]]),
            ([answers.label_gradient[i]], [-others]),
        ):
            for a, b in zip(ours, theirs, strict=True):
                close(a, b, a)
        # Near 0 logsumexp is a difference, and its bound absolute.
        close(answers.logsumexp[i], reference.logsumexp(wide), max(1, abs(float(row.max()))))


def _mp(value):
    """Convert a long double without loss: in two parts that a float holds."""
    high = float(value)
    return reference.mpf(high) + reference.mpf(float(value - np.longdouble(high)))


def test_the_exact_answers_of_the_rest_are_exact():
    """Against definitions in 250 digits, and closed forms."""
    mp, mpf = reference.mp, reference.mpf
    rng = np.random.default_rng(1)
    rows = [rng.normal(size=6) * scale for scale in (0.1, 1.0, 30.0)]
    for x, y in zip(rows, rows[1:] + rows[:1], strict=True):
        row, other = reference.exact(x), reference.exact(y)
        p, log_p = reference.softmax(row), reference.log_softmax(row)
        log_q = reference.log_softmax(other)
        k = mp.fsum(v * (a - b) for v, a, b in zip(p, log_p, log_q, strict=True))
        labels = np.asarray([1, 0, 0, 1, 1, 0])
        binary = [
            -mp.log(1 / (1 + mp.exp(-v if t else v))) for v, t in zip(row, labels, strict=True)
        ]
        expected = {
            "softmax_with_sink": (0, reference.softmax([*row, mpf(0)])[:-1]),
            "entropy": (0, [-mp.fsum(v * log for v, log in zip(p, log_p, strict=True))]),
            "kl_divergence": (y, [k]),
            "logmeanexp": (0, [reference.logsumexp(row) - mp.log(6)]),
            "logcumsumexp": (0, [reference.logsumexp(row[: i + 1]) for i in range(6)]),
            "sigmoid_cross_entropy": (labels, binary),
            "cross_entropy_in_float32": (2, [-log_p[2]]),
        }
        for name, (second, values) in expected.items():
            with mp.workdps(exact_family.DIGITS):
                found = exact_family.RULES[name].exact(exact_family.row_of(x), second)
            for a, b in zip(found.values, values, strict=True):
                assert abs(a - b) <= mpf(10) ** -50 * (1 + abs(b)), name
        for alpha in (1.5, 2.0):
            c = mpf(alpha) - 1
            with mp.workdps(exact_family.DIGITS):
                sparse = exact_family.sparse(exact_family.row_of(x), alpha)
            inside = [c * v - s**c for v, s in zip(row, sparse, strict=True) if s]
            assert abs(mp.fsum(sparse) - 1) < mpf(10) ** -50
            assert max(inside) - min(inside) < mpf(10) ** -50  # one threshold
            assert all(c * v <= max(inside) for v, s in zip(row, sparse, strict=True) if not s)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_unit_is_the_spacing_of_numbers(dtype):
    info = np.finfo(dtype)
    ends = info.smallest_normal, info.smallest_subnormal
    values = np.asarray([1.0, 1.5, 3.75, 1e-3, *ends], dtype)
    units = exact.unit(values.astype(np.longdouble), dtype)
    np.testing.assert_array_equal(units, np.spacing(values).astype(np.longdouble))


# --------------------------------------------------------------------------- other processes


def test_the_load_is_the_share_of_the_cores_that_work(monkeypatch):
    ticks = iter([(1000, 9000), (1015, 9020)])
    monkeypatch.setattr(report, "_ticks", lambda: next(ticks))
    monkeypatch.setattr(copies, "cores", lambda: 2)
    assert report.load() == 1.5


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="Linux tells it there")
def test_a_core_that_works_is_counted():
    before, until = report._ticks(), time.process_time() + 0.2
    while time.process_time() < until:
        pass
    working, ticks = (now - then for now, then in zip(report._ticks(), before, strict=True))
    assert 0.15 * os.sysconf("SC_CLK_TCK") < working <= ticks


# --------------------------------------------------------------------------- what it stands on


# `thresholds` measures both sides of constants of the Numba rows, which are private.
def test_only_public_names_of_the_package_are_used():
    """An earlier version of the package, and any other, can be measured with the same bench."""
    public = {m.__name__: m.__all__ for m in (portable_softmax, kernels)}
    for path in Path(report.__file__).parent.glob("*.py"):
        text = path.read_text() if path.stem != "thresholds" else ""
        assert not re.findall(r"portable_softmax(?:\.\w+)*\._[a-z]\w*", text), path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("portable_softmax"):
                assert {alias.name for alias in node.names} <= {*public[node.module]}, path.name


# --------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed", "--ops", "softmin"], "unknown operation 'softmin'; choose from softmax"),
        (["speed", "--shapes", "3"], "shape '3' is not of the form ROWSxCLASSES"),
        (["speed", "--shapes", "0x3"], "shape '0x3' is not of the form ROWSxCLASSES"),
        (["speed", "--dtypes", "int8"], "unknown dtype 'int8'; choose from float64"),
        (["speed", "--backend", "nympy"], "argument --backend: invalid choice: 'nympy'"),
        (["accuracy", "--backend", "nympy"], "unknown backend 'nympy'; choose from numpy"),
        (["speed", "--json", "no/such/folder.json"], "can't write no/such/folder.json"),
        (["accuracy", "--markdown", "no/such/file.md"], "can't write no/such/file.md"),
        ([], "the following arguments are required: COMMAND"),
        (["memory", "--shapes", "1000x1000"], "shape 1000x1000 of float32 has 4 MB: the memory"),
        (["memory", "--ops", "entropy+backward"], "unknown operation 'entropy+backward'; choose"),
        (["scale", "--parts", "linear,gpu"], "unknown part 'gpu'; choose from linear, chunks, wo"),
        (["scale", "--parts", "chunks"], "chunks needs no_such_module: pip install"),
        (["scale", "--parts", "linear", "--classes", "8k"], "'8k' is no number of classes"),
        (["scale", "--parts", "linear", "--classes", "0"], "'0' is no number of classes"),
        (["scale", "--parts", "linear", "--layer", "64"], "layer '64' is not of the form POSITION"),
    ],
)
def test_a_failure_is_one_line(arguments, message, capsys, monkeypatch):
    needed = dict.fromkeys(scale.PARTS, ()) | {"chunks": ("no_such_module",)}
    monkeypatch.setattr(scale, "_NEEDED", needed)
    if arguments[:1] in (["memory"], ["scale"]) and (why := memory.why_not()):
        pytest.skip(why)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith("bench: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
