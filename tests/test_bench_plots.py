"""The figures of ``bench speed`` show every provider, in the same colour everywhere."""

import importlib.util
import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from bench import peers, plots, providers, speed, summary
from bench.__main__ import main

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="figures need matplotlib"
)

ARGUMENTS = ("speed", "--quick", "--shapes", "4x3", "--ops", "softmax,logsumexp", "--peers", "own")


def _row(provider, seconds, *, role=speed.PEER, operation="softmax", shape=(10**3, 10**3), **more):
    row = speed.Row(operation, shape, "float32", provider, role, 8 * 10**6, min_s=seconds, **more)
    row.gb_per_s = row.bytes_moved / seconds / 1e9
    return row


def _rows(shapes=((10**3, 10**3), (4, 3))):
    rows = []
    for shape in shapes:
        for provider, seconds, role in (
            ("ours", 2.0, speed.OURS),
            ("ours, portable", 6.0, speed.OURS),
            ("scipy.special", 4.0, speed.PEER),
            ("torch", 1.0, speed.PEER),
            ("copy, numpy", 0.5, speed.COPY),
        ):
            rows.append(_row(provider, seconds, role=role, shape=shape))
            rows[-1].share_of_copy = 0.5 / seconds
    return rows


# --------------------------------------------------------------------------- the figures


@needs_matplotlib
def test_a_run_is_drawn_and_can_be_drawn_again(tmp_path, capsys):
    path, drawn, again = (tmp_path / name for name in ("run.json", "drawn", "again"))
    assert main([*ARGUMENTS, "--json", str(path), "--plot", str(drawn)]) == 0
    assert main(["plot", str(path), str(again)]) == 0
    for folder in (drawn, again):
        figures = {figure.name: figure.read_bytes()[:4] for figure in folder.iterdir()}
        assert figures == dict.fromkeys(("bandwidth-float32.png", "ratios-float32.png"), b"\x89PNG")
    assert f"drew {drawn / 'bandwidth-float32.png'}" in capsys.readouterr().out


def test_each_provider_has_one_colour():
    names = {path.name for path in providers.PATHS} | {peer.name for peer in peers.PEERS}
    assert names <= plots._COLOURS.keys()
    # These are elsewhere than those whose colours they share.
    elsewhere = {name for name in names if name.startswith("ours, jit")}
    together = names - elsewhere - {"cupyx.scipy"}
    assert len({plots._COLOURS[name] for name in together}) == len(together)
    colours = plots._colours([_row("someone new", 1.0), _row("and another", 1.0)])
    assert colours["someone new"] != colours["and another"]


@needs_matplotlib
def test_bandwidth_has_a_line_for_each_provider_of_large_arrays():
    figure = plots._bandwidth(_rows(), "title", plots._colours(_rows()))
    panel = figure.axes[0]
    lines = {line.get_label(): line for line in panel.get_lines()}
    assert lines.keys() == {"best copy", "ours", "ours, portable", "scipy.special", "torch"}
    assert list(lines["ours"].get_xdata()) == [1000]
    assert lines["ours"].get_ydata()[0] == pytest.approx(8e6 / 2.0 / 1e9)
    assert panel.get_xscale() == "log"
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == lines.keys()


@needs_matplotlib
def test_bars_show_times_in_units_of_ours():
    figure = plots._ratios(_rows(), "title", plots._colours(_rows()))
    bars = {bar.get_label(): bar for bar in figure.axes[0].containers}
    tops = {name: [patch.get_height() + 1 for patch in bar] for name, bar in bars.items()}
    expected = {"ours, portable": 3.0, "scipy.special": 2.0, "torch": 0.5}
    assert tops == {name: [height] * 2 for name, height in expected.items()}
    assert {text.get_text() for text in figure.axes[0].texts} == {"3.0", "2.0", ".50"}


@needs_matplotlib
def test_a_wrong_provider_is_not_drawn(tmp_path, monkeypatch):
    drawn = []
    figure = SimpleNamespace(savefig=lambda path, dpi: None)
    for name in ("_bandwidth", "_ratios"):
        monkeypatch.setattr(plots, name, lambda some, *_: drawn.extend(some) or figure)
    document = {"machine": {}, "backend": "numpy", "device": "cpu", "versions": {}}
    plots.save([*_rows(), _row("wrong", 1.0, problem="wrong")], document, tmp_path)
    assert {row.provider for row in drawn} == {row.provider for row in _rows()}


@needs_matplotlib
def test_where_figures_cannot_be_is_said_first(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert main([*ARGUMENTS, "--plot", str(file)]) == 2
    captured = capsys.readouterr()
    assert "can't write into" in captured.err
    assert not captured.out


# --------------------------------------------------------------------------- the summary


def test_the_summary_is_a_geometric_mean_and_the_worst_cell():
    rows = [*_rows(), _row("ours", 4.0, role=speed.OURS, operation="logsumexp", shape=(999, 999))]
    rows[-1].share_of_copy = 0.5
    rows += [
        _row("scipy.special", 1.0, operation="logsumexp", shape=(999, 999)),
        _row("wrong", 0.001, operation="logsumexp", shape=(999, 999), problem="wrong"),
    ]
    lines = {line[:3]: line for line in summary.lines(rows)}
    large = lines["large", "float32", "ours"]
    assert [ratio.value for ratio in large.best] == [2.0, 4.0]  # of torch, of scipy
    assert [ratio.value for ratio in large.named["scipy.special"]] == [0.5, 4.0]
    assert [ratio.value for ratio in large.named["torch"]] == [2.0]
    assert summary.geometric_mean(large.copy) == pytest.approx((4.0 * 2.0) ** 0.5)
    assert lines.keys() == {
        (size, "float32", path)
        for size in ("large", "small")
        for path in ("ours", "ours, portable")
    }
    headings, texts = summary.table(rows)
    (text,) = [text for text in texts if text[0] == "large" and text[2] == "ours"]
    cells = dict(zip(headings[:6], text, strict=False))
    assert cells["/ best peer"] == "2.83"
    assert cells["worst"] == "4.00 logsumexp 999x999"
    assert "/ torch" in headings
    assert all(len(text) == len(headings) for text in texts)


def test_the_summary_leaves_out_a_peer_that_is_not_there():
    rows = [row for row in _rows() if row.provider != "torch"]
    assert "/ torch" not in summary.table(rows)[0]
    assert json.dumps([asdict(row) for row in rows])
