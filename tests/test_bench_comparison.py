"""``bench speed --compare`` tells a slower package from a slower machine."""

import json
from dataclasses import asdict

import pytest

from bench import comparison, places, speed
from bench.__main__ import main


def _row(provider, seconds, operation="softmax", role=speed.OURS, shape=(4, 3), **more):
    return speed.Row(operation, shape, "float32", provider, role, 96, min_s=seconds, **more)


def _run(*, ours, copy, **more):
    return [_row("ours", ours, **more), _row("copy, numpy", copy, role=speed.COPY, **more)]


def test_a_change_counts_in_units_of_the_copy():
    for old, new, ratio, mark in (
        ((1.0, 1.0), (1.05, 1.0), 1.05, ""),
        ((1.0, 1.0), (1.2, 1.0), 1.2, "slower"),
        ((1.0, 1.0), (1.3, 1.0), 1.3, "SLOWER"),
        ((1.0, 1.0), (2.0, 2.0), 1.0, ""),  # the machine got slower
        ((1.0, 1.0), (1.0, 0.5), 2.0, "SLOWER"),  # it got faster, and ours did not
        ((2.0, 1.0), (1.0, 1.0), 0.5, ""),
    ):
        runs = (_run(ours=ours, copy=copy) for ours, copy in (old, new))
        (change,) = comparison.changes(*runs)
        assert change.normalised == pytest.approx(ratio)
        assert comparison.mark(change) == mark
        (cells,) = comparison.cells([change])
        assert len(cells) == len(comparison.HEADINGS)


def test_the_copy_of_an_array_is_the_fastest_beside_any_operation():
    old = _run(ours=1.0, copy=1.0) + _run(ours=1.0, copy=9.0, operation="logsumexp")
    changes = comparison.changes(old, [*old[:2], old[2]])
    assert [change.normalised for change in changes] == [1.0, 1.0]


def test_only_cells_of_both_runs_are_compared():
    old = _run(ours=1.0, copy=1.0)
    old += [_row("ours, portable", 1.0), _row("scipy", 1.0, role="peer")]
    new = _run(ours=1.0, copy=1.0) + _run(ours=1.0, copy=1.0, shape=(9, 9))
    new.append(_row("ours, portable", float("nan"), problem="wrong"))
    new.append(_row("scipy", 9.0, role="peer"))
    (change,) = comparison.changes(old, new)
    assert change.key == ("softmax", (4, 3), "float32", "ours")


ARGUMENTS = ("speed", "--quick", "--shapes", "4x3", "--ops", "softmax", "--peers", "own")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    path = tmp_path_factory.mktemp("earlier") / "old.json"
    assert main([*ARGUMENTS, "--json", str(path)]) == 0
    return path


def test_the_command_fails_where_ours_got_slower(earlier, tmp_path, capsys):
    for factor, status in ((1e-3, 1), (1e3, 0)):
        document = json.loads(earlier.read_text())
        document["versions"]["numpy"] = "1.0"
        for row in document["rows"]:
            if row["role"] == "ours":
                row["min_s"] *= factor
        changed = tmp_path / "changed.json"
        changed.write_text(json.dumps(document))
        assert main([*ARGUMENTS, "--compare", str(changed)]) == status
        out = capsys.readouterr().out
        assert "differs: numpy: 1.0 before" in out
        assert ("SLOWER" in out) == bool(status)


def test_what_differs_is_told():
    machine = {"cpu": "A", "cores": 2, "load_before": 0.1}
    old = {"machine": machine, "threads": {"numba": 2}, "versions": {"numpy": "2.0"}}
    new = old | {"machine": {**machine, "cpu": "B", "load_before": 2.0}, "threads": {}}
    told = ["cpu: A before, B now", "numba: 2 before, absent now"]
    assert comparison.differences(old, new) == told
    assert comparison.differences(old, old) == []


# --------------------------------------------------------------------------- files of others


def _document(**changed):
    place = places.open_backend("numpy")
    document = {"benchmark": "speed", "backend": place.name, "device": place.device_name}
    document |= {"machine": {}, "threads": {}, "versions": {}}
    document["rows"] = [asdict(row) for row in _run(ours=1.0, copy=1.0)]
    return json.dumps({**document, **changed})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "can't read"),
        ("", "is no JSON"),
        ("\x00\x01", "is no JSON"),
        ("[]", "is not what `python -m bench speed --json` writes"),
        ('{"benchmark": "accuracy"}', "is not what `python -m bench speed --json` writes"),
        ('{"benchmark": "speed"}', "is of another version of the benchmark, or broken"),
        (_document(rows=3), "is of another version"),
        (_document(rows=[3]), "is of another version"),
        (_document(rows=[{"shape": [4, 3]}]), "is of another version"),
        (_document(versions="2"), "is of another version"),
        (_document(rows=[]), "holds none of these operations, shapes and dtypes"),
        (_document(backend="torch"), "was measured on torch, cpu, not on numpy, cpu"),
    ],
)
def test_a_foreign_file_is_one_line(text, message, tmp_path, capsys):
    path = tmp_path / "old.json"
    if text is not None:
        path.write_text(text)
    assert main([*ARGUMENTS, "--compare", str(path)]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith("bench: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_what_was_written_is_read_as_it_was(earlier):
    rows = comparison.read(earlier)["rows"]
    assert all(isinstance(row, speed.Row) for row in rows)
    assert {row.shape for row in rows} == {(4, 3)}
    broken = _row("ours", float("nan"), problem="wrong")
    again = comparison._row(json.loads(json.dumps({**asdict(broken), "min_s": "nan"})))
    assert again.min_s != again.min_s
