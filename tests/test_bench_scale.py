"""``bench scale``: layers without logits, chunks of Dask, and what ranks tell each other."""

from __future__ import annotations

import importlib.util
import json
import math

import numpy as np
import pytest

from bench import memory, places, scale, scale_chunks, scale_linear, scale_ranks, scale_worker
from bench.__main__ import main
from portable_softmax.libraries import Library

pytestmark = pytest.mark.skipif(bool(memory.why_not()), reason="memory is measured on Linux only")

SIZE = scale_linear.Size(8, 5, 6)


# --------------------------------------------------------------------------- the command


@pytest.mark.slow("a process for each provider")
def test_every_part_runs_and_is_drawn(tmp_path, capsys):
    for module in ("torch", "jax", "optax", "dask", "distributed", "scipy", "matplotlib"):
        pytest.importorskip(module)
    path, drawn = tmp_path / "scale.json", tmp_path / "drawn"
    files = ("--json", str(path), "--plot", str(drawn))
    status = main(["scale", "--quick", "--classes", "300", *files])
    out = capsys.readouterr().out
    assert status == 0, out
    document = json.loads(path.read_text())
    assert {"command", "commit", "machine", "threads", "versions"} <= document.keys()
    parts = document["parts"]
    assert parts.keys() == scale.PARTS.keys()
    assert {path.stem for path in drawn.iterdir()} == parts.keys() - {"worker"}
    for row in parts["linear"]:
        chunked_is_new = row["provider"] == "chunked, torch" and "AttributeError" in row["problem"]
        assert chunked_is_new or not row["problem"], row
        assert chunked_is_new or 0 < row["min_s"] <= row["median_s"]
    providers = {row["provider"] for row in parts["chunks"] if row["operation"] == "softmax"}
    assert providers == set(scale_chunks.PROVIDERS)
    assert max(row["ranks"] for row in parts["ranks"]) == 1024
    assert {row["operation"] for row in parts["worker"]} == scale_worker.FUNCTIONS.keys()
    assert "model: all-reduces" in out
    assert "every bound held" in out


# --------------------------------------------------------------------------- layers


def test_every_provider_makes_the_loss_and_its_gradients():
    """In several tiles, of which the last is not full."""
    problem = scale_linear.Problem(SIZE)
    for provider in scale_linear.PROVIDERS:
        needed = {"jax": ("jax", "optax")}.get(provider.library, (provider.library,))
        if not all(map(importlib.util.find_spec, needed)):
            continue
        place = places.open_backend(provider.library)
        given = problem.hidden, problem.classifier, problem.labels
        call = provider.make(place, tuple(places.put(place, a) for a in given), 3)
        try:
            result = call()
        except AttributeError:
            assert provider.name == "chunked, torch"  # from torch 2.13 on
            continue
        if provider.role != scale_linear.PRODUCTS:
            assert problem.wrong(place, result) == "", provider.name
            broken = (result[0], result[1] + 1, result[2])
            assert problem.wrong(place, broken) == "wrong d_hidden", provider.name


def test_what_is_expected_is_a_difference_quotient():
    """In float64, along one entry of the first position and of the first class."""
    problem = scale_linear.Problem(SIZE)
    loss, d_hidden, d_classifier = problem.expected

    def at(hidden, classifier):
        x = hidden @ classifier.T
        n = np.arange(len(x))
        return np.mean(np.log(np.exp(x).sum(axis=1)) - x[n, problem.labels])

    wide = [a.astype(np.float64) for a in (problem.hidden, problem.classifier)]
    assert loss == pytest.approx(at(*wide), rel=1e-12)
    for i, slope in enumerate((d_hidden, d_classifier)):
        up, down = ([a.copy() for a in wide] for _ in range(2))
        up[i][0, 2] += 1e-5
        down[i][0, 2] -= 1e-5
        assert slope[2] == pytest.approx((at(*up) - at(*down)) / 2e-5, rel=1e-7)


def test_ours_is_right_and_within_its_memory():
    for role, beyond, problem, held in (
        ("ours", 160e6, "", True),
        ("ours", 161e6, "", False),
        ("ours", math.nan, "", False),
        ("ours", 1e6, "wrong loss", False),
        ("peer", 1e9, "", True),
        ("peer", math.nan, "no such function", True),
    ):
        row = scale_linear.Row(SIZE, "name", "numpy", role, problem, beyond_bytes=beyond)
        assert row.held == held
        assert (problem or "MB") in " ".join(scale_linear.cells([row])[0])


# --------------------------------------------------------------------------- ranks


def test_the_products_are_made_in_tiles_of_our_size():
    assert Library.tile == scale_linear.TILE


def test_the_model_of_an_all_reduce():
    """One rank tells nobody; a ring wins for long messages, a tree for short ones."""
    a, b = scale_ranks.LATENCY, scale_ranks.SECONDS_PER_BYTE
    assert scale_ranks.all_reduce(1, 10**9) == 0
    assert scale_ranks.all_reduce(2, 1000) == pytest.approx(2 * a + 1000 * b)
    assert scale_ranks.all_reduce(1024, 8) == pytest.approx(20 * a + 160 * b)
    assert scale_ranks.all_reduce(1024, 10**10) == pytest.approx(2046 * a + 2046 / 1024 * 1e10 * b)


def test_a_rank_that_says_something_else_than_modelled_is_reported():
    row = scale_ranks.Row((10, 3, 7), "cross_entropy", "classes", 2, [40, 480], [], 1e-3)
    assert row.expected == [40, 480]
    assert row.held
    for change in ({"sizes": [40]}, {"other": ["all_gather_into_tensor"]}, {"problem": "no"}):
        other = scale_ranks.Row(**{**vars(row), **change})
        assert not other.held
        assert "NO" in scale_ranks.cells([other])[0]


def test_chunks_are_compared_with_the_kernel_and_bare_tasks():
    taken = {scale_chunks.OURS: 3.0, scale_chunks.KERNEL: 1.5, scale_chunks.NOTHING: 0.5}
    rows = [
        scale_chunks.Row((4, 3), 2, "softmax", name, min_s=seconds)
        for name, seconds in taken.items()
    ]
    lines = scale_chunks.cells(rows)
    assert [line[4:6] for line in lines] == [["1.00", "1.50"], ["0.50", "0.75"], ["0.17", "0.25"]]
