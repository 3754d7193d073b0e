"""The command line: what it teaches, prints and draws, and how it fails."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from backends import BACKENDS as TEST_BACKENDS

import portable_softmax
from portable_softmax.__main__ import main
from portable_softmax._cli import comparison, demo, digits, listing
from portable_softmax._cli.backends import BACKENDS, open_place
from portable_softmax._cli.errors import CommandError
from portable_softmax._cli.gradient_check import check_gradient
from portable_softmax._cli.training import train

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None,
    reason='the demo draws with matplotlib, of the extra "demo"',
)


@pytest.fixture
def place(arrays_of):
    """The place of the command line that a backend of the tests is."""
    name, _, device = arrays_of.partition("-")
    return open_place(name, device or None)


def trains(test):
    """Run a test on each library on which the demo trains."""
    test = pytest.mark.slow("each step is compiled", "jax", "dpnp")(test)
    return pytest.mark.libraries(*{b.library for b in TEST_BACKENDS.values() if not b.lazy})(test)


@pytest.fixture
def only_numpy(monkeypatch):
    """Compare with no other library, which would take the time of importing them all."""
    monkeypatch.setattr(comparison, "is_installed", lambda name: name == "numpy")


@pytest.fixture
def no_figure(monkeypatch):
    """Draw nothing, which takes most of a short demo's time and needs matplotlib."""
    monkeypatch.setattr(demo, "_drawing", lambda: lambda trained, data, path: None)


def learn(place, *, epochs, seed=0):
    rng = np.random.default_rng(seed)
    data = digits.split(*digits.load(), rng)
    return train(place, data, epochs=epochs, rng=rng), data


# ------------------------------------------------------------------------------- the training


@trains
def test_training_is_the_same_on_every_backend(place):
    trained, _ = learn(place, epochs=2)
    reference, _ = learn(open_place("numpy"), epochs=2)
    assert trained.W.dtype == np.float32
    np.testing.assert_allclose(trained.W, reference.W, rtol=0, atol=1e-3)
    np.testing.assert_allclose(trained.b, reference.b, rtol=0, atol=1e-3)
    assert trained.epochs[-1].loss == pytest.approx(reference.epochs[-1].loss, abs=1e-3)


@trains
def test_gradient_by_hand_is_the_numerical_one(place):
    check = check_gradient(*learn(place, epochs=1))
    assert check.entries == 650
    assert check.largest > 1e-2
    assert check.difference < (1e-9 if check.dtype == "float64" else 1e-4)


def test_gradient_check_says_where_there_is_only_float32():
    pytest.importorskip("array_api_strict", reason="its device no_float64 stands for a GPU's")
    check = check_gradient(*learn(open_place("strict", "no_float64"), epochs=1))
    assert check.dtype == "float32"
    assert check.difference < 1e-4


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_accuracy_is_at_least_95_percent(seed):
    trained, _ = learn(open_place("numpy"), epochs=80, seed=seed)
    assert trained.epochs[-1].accuracy >= 0.95
    assert trained.epochs[-1].loss < trained.epochs[0].loss


# ------------------------------------------------------------------------------- demo


def run_demo(capsys, out, *options):
    assert main(["demo", "--json", "--out", str(out), *options]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return json.loads(printed.out)


def test_demo_learns_with_its_default_settings(no_figure, only_numpy, tmp_path, capsys):
    result = run_demo(capsys, tmp_path)
    assert result["accuracy"] >= 0.95
    assert result["train_size"] + result["held_out_size"] == 1797
    assert result["gradient_check"]["difference"] < 1e-9
    assert [epoch["number"] for epoch in result["epochs"]] == list(range(1, 81))
    assert result["comparison"] == []


@needs_matplotlib
def test_demo_saves_a_png(only_numpy, tmp_path, capsys):
    result = run_demo(capsys, tmp_path / "new" / "folder", "--epochs", "3")
    png = Path(result["figure"]).read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
    assert width > 1200
    assert height > 800
    assert len(png) > 50_000  # an empty canvas compresses to a tenth


@needs_matplotlib
def test_figure_of_a_training_without_mistakes(tmp_path):
    from portable_softmax._cli.figure import draw

    trained, data = learn(open_place("numpy"), epochs=1)
    draw(replace(trained, probabilities=np.eye(10)[data.held_out_t]), data, tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 50_000


def test_demo_repeats_itself_for_a_seed_and_not_for_another(
    no_figure, only_numpy, tmp_path, capsys
):
    first, same, other = (
        run_demo(capsys, tmp_path, "--epochs", "2", "--seed", seed) for seed in ("7", "7", "8")
    )
    del first["seconds"], same["seconds"]
    assert first == same
    assert first["loss"] != other["loss"]


@trains
def test_demo_compares_the_libraries_that_are_here(no_figure, place, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(comparison, "is_installed", lambda name: name in ("numpy", place.name))
    options = ("--epochs", "1", "--backend", place.name, "--device", place.device_name)
    result = run_demo(capsys, tmp_path, *options)
    assert (result["backend"], result["device"]) == (place.name, place.device_name)
    rows = {row["backend"]: row for row in result["comparison"]}
    assert {*rows} == ({"numpy", place.name} if place.name != "numpy" else set())
    for name, row in rows.items():
        assert row["weight_difference"] <= (0 if name == "numpy" else 1e-3)
        assert row["accuracy"] == pytest.approx(rows["numpy"]["accuracy"], abs=0.01)


def test_a_library_that_fails_costs_only_its_row(no_figure, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(comparison, "is_installed", lambda name: name in ("numpy", "jax"))
    for error in (CommandError("no luck"), ValueError("no luck")):
        monkeypatch.setattr(comparison, "open_place", Mock(side_effect=error))
        numpy, jax = run_demo(capsys, tmp_path, "--epochs", "1")["comparison"]
        assert numpy["weight_difference"] == 0
        assert jax["backend"] == "jax"
        assert "no luck" in jax["error"]


def test_demo_speaks_plain_ascii_lines_where_the_output_is_no_terminal(
    no_figure, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(comparison, "is_installed", lambda name: name in ("numpy", "cupy"))
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert main(["demo", "--epochs", "30", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.isascii()
    assert "\x1b" not in text
    assert text.count("  epoch ") == 11  # the first, and each tenth part
    for words in ("Held-out accuracy", "Gradient", str(tmp_path / demo.FIGURE)):
        assert words in text
    assert "cupy is not installed: pip install" in text


def test_demo_draws_bars_and_tables_on_a_terminal(no_figure, monkeypatch, tmp_path, capsys):
    pytest.importorskip("rich", reason='bars need rich, of the extra "demo"')
    monkeypatch.setattr(comparison, "is_installed", lambda name: name in ("numpy", "cupy"))
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    options = ["--epochs", "2", "--out", str(tmp_path)]
    assert main(["demo", *options]) == 0
    assert "\N{BOX DRAWINGS LIGHT VERTICAL}" in capsys.readouterr().out
    assert main(["demo", "--plain", *options]) == 0
    assert capsys.readouterr().out.isascii()


# ------------------------------------------------------------------------------- backends


def test_backends_describes_what_is_here_as_json(capsys):
    assert main(["backends", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["backends"]
    assert list(found) == list(BACKENDS)
    numpy = found["numpy"]
    assert (numpy["usable"], numpy["version"]) == (True, np.__version__)
    assert numpy["devices"] == ["cpu"]
    assert {"float16", "float32", "float64"} <= set(numpy["dtypes"])
    path = portable_softmax.kernels.explain("softmax", np.zeros((1, 1), np.float32))
    assert "softmax" in numpy["kernels"][path.partition(":")[0]]
    for row in found.values():
        assert row["usable"] or row["reason"]
    # A line names the kernels; their operations, some hundreds of characters, are in the JSON.
    assert main(["backends"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if line.startswith("numpy ")]
    assert row.endswith("  " + ", ".join(numpy["kernels"]))


def test_backends_finds_the_backend_of_the_tests(arrays_of, monkeypatch, capsys):
    name, _, device = arrays_of.partition("-")
    if name not in BACKENDS:
        pytest.skip(f"the command line has no backend {name}")
    monkeypatch.setattr(listing, "BACKENDS", {name: BACKENDS[name]})
    assert main(["backends", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["backends"][name]
    assert found["usable"]
    assert "float32" in found["dtypes"]
    assert any(each.startswith(device) for each in found["devices"])


def test_backends_reports_a_library_that_breaks_on_import_and_goes_on(
    monkeypatch, tmp_path, capsys
):
    (tmp_path / "cupy.py").write_text("raise OSError('libcuda.so.1: not found\\nand more')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(listing, "BACKENDS", {name: BACKENDS[name] for name in ("cupy", "numpy")})
    assert main(["backends"]) == 0
    text = capsys.readouterr().out
    assert "cupy can't be used here: OSError: libcuda.so.1: not found\n" in text
    assert f"numpy    {np.__version__}" in text


def test_backends_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.setattr(listing, "BACKENDS", {"jax": BACKENDS["jax"]})
    assert main(["backends", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"]["jax"] == {
        "usable": False,
        "reason": 'jax is not installed: pip install "portable_softmax[jax]"',
    }


def test_json_has_no_token_for_nan_and_infinities(monkeypatch, capsys):
    values = {"a": [float("nan"), 1.5], "b": {"c": float("inf")}}
    monkeypatch.setattr(listing, "run", lambda report: values)
    assert main(["backends", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": {"c": None}}


# ------------------------------------------------------------------------------- help


def test_without_an_argument_it_prints_the_help(capsys):
    assert main([]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith("usage: python -m portable_softmax ")
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert capsys.readouterr().out == printed.out


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"portable_softmax {portable_softmax.__version__}\n"


# ------------------------------------------------------------------------------- failures


def assert_fails(capsys, arguments, *words):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("portable_softmax: ")
    assert printed.err.count("\n") == 1
    for word in words:
        assert word in printed.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["learn"], ["learn", "demo"]),
        (["demo", "--backend", "abacus"], ["abacus", "numpy", "torch"]),
        (["demo", "--device", "cuda"], ["numpy has no device 'cuda'", "it has cpu"]),
        (["demo", "--epochs", "0"], ["--epochs", ">= 1", "'0'"]),
        (["demo", "--epochs", "many"], ["--epochs", "'many'"]),
        (["demo", "--seed", "-1"], ["--seed", ">= 0", "'-1'"]),
        (["demo", "--wings"], ["--wings"]),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(arguments, words, capsys):
    assert_fails(capsys, arguments, *words)


def test_what_is_missing_is_one_line_and_status_2(monkeypatch, tmp_path, capsys):
    demo = ["demo", "--out", str(tmp_path)]
    monkeypatch.setitem(sys.modules, "torch", None)
    assert_fails(capsys, [*demo, "--backend", "torch"], 'pip install "portable_softmax[torch]"')
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "portable_softmax._cli.figure", raising=False)
    assert_fails(capsys, demo, "matplotlib", 'pip install "portable_softmax[demo]"')
    monkeypatch.setitem(BACKENDS, "numpy", replace(BACKENDS["numpy"], devices=lambda _: {}))
    assert_fails(capsys, demo, "numpy can't be used here", "no device")


def test_an_output_folder_that_is_a_file_is_one_line_and_status_2(no_figure, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert_fails(capsys, ["demo", "--out", str(tmp_path / "file")], "can't write", "file")


@needs_matplotlib
def test_a_figure_that_cant_be_saved_is_one_line_and_status_2(only_numpy, tmp_path, capsys):
    (tmp_path / demo.FIGURE).mkdir()
    assert main(["demo", "--epochs", "1", "--out", str(tmp_path)]) == 2
    assert f"can't write {tmp_path / demo.FIGURE}" in capsys.readouterr().err


def test_ctrl_c_is_quiet_and_status_130(monkeypatch, capsys):
    monkeypatch.setattr(listing, "run", Mock(side_effect=KeyboardInterrupt))
    assert main(["backends"]) == 130
    assert capsys.readouterr() == ("", "")


# ------------------------------------------------------------------------------- as a program


def program(*arguments):
    package = Path(portable_softmax.__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, "-m", "portable_softmax", *arguments],
        env={**os.environ, "PYTHONPATH": str(package)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_program_fails_with_one_line_and_no_traceback():
    process = program("demo", "--device", "tpu")
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err == "portable_softmax: numpy has no device 'tpu' here; it has cpu\n"


@needs_matplotlib
def test_the_program_ends_quietly_when_nobody_reads_on(tmp_path):
    process = program("demo", "--epochs", "1", "--out", str(tmp_path))
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait() == 141
