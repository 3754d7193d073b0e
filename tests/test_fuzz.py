"""The differential fuzzing: some of its cases, and that it finds faults that are planted."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from portable_softmax import portable
from portable_softmax.portable import _cross_entropy, _softmax, _state
from tests.backends import BACKENDS
from tests.fuzz import cases
from tests.fuzz.__main__ import Tally, check, run
from tests.fuzz.draw import TRAITS
from tests.fuzz.paths import paths


@pytest.fixture
def some(arrays_of):
    if arrays_of not in TRAITS:
        pytest.skip("nothing is drawn for this library")
    return BACKENDS[arrays_of](), {"numpy": 400, "torch": 300, "strict": 300}.get(arrays_of, 40)


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.slow("Numba compiles a kernel for each layout, dtype and option", "torch")
@pytest.mark.slow("Numba compiles a kernel for each layout, dtype and option", "numpy")
def test_no_difference(some):
    backend, count = some
    tallies, failures = run(backend, 1, range(count))
    assert not failures, f"{len(failures)} differences, the first: {failures[0]}"
    assert sum(tally.cases for tally in tallies.values()) >= count
    for (_, path), tally in tallies.items():
        if path == "portable":
            assert tally.by_kernel >= tally.cases - tally.refused


def test_a_case_is_drawn_from_its_seed_and_number_alone():
    traits = TRAITS["numpy"]
    for number in (3, 17, 200):
        one, other = (cases.make(traits, 5, number) for _ in range(2))
        assert str(one) == str(other)
        for name, argument in one.arrays.items():
            # Not their bytes: those between two longdoubles hold anything.
            np.testing.assert_array_equal(argument.values, other.arrays[name].values, strict=True)


def finds(*functions, most=600):
    """Whether a case of these functions differs on the portable path."""
    backend, tallies = BACKENDS["numpy"](), defaultdict(Tally)
    ways = [way for way in paths("numpy") if way.name == "portable"]
    for number in range(most):
        with np.errstate(all="ignore"):
            case = cases.make(TRAITS["numpy"], 2, number, functions)
        if any(check(case, backend, ways, tallies)):
            return True
    return False


def test_without_a_fault_nothing_is_found(arrays_of):
    assert not finds(*LOGARITHMS, most=40)


def planted(monkeypatch, module, name, fault):
    monkeypatch.setattr(module, name, fault)
    for place in (portable, _softmax, _cross_entropy):
        if getattr(place, name, None) is not None:
            monkeypatch.setattr(place, name, fault)


LOGARITHMS = ("log_softmax", "logsumexp", "cross_entropy", "cross_entropy_value_and_grad")


@pytest.mark.libraries("numpy")
def test_a_lost_rounding_error_is_found(monkeypatch, arrays_of):
    """Without the two-sum error of x - max, confident rows lose digits."""
    monkeypatch.setattr(
        _state, "difference_error", lambda xp, x, m, difference: xp.zeros_like(difference)
    )
    assert finds(*LOGARITHMS)


@pytest.mark.libraries("numpy")
def test_a_mask_that_is_ignored_is_found(monkeypatch, arrays_of):
    real = _softmax.masked
    fault = lambda xp, x, where, axes: real(xp, x, where | True, axes)  # noqa: E731
    planted(monkeypatch, _softmax, "masked", fault)
    assert finds("logsumexp")


@pytest.mark.libraries("numpy")
def test_a_label_that_wraps_around_is_found(monkeypatch, arrays_of):
    real = portable.index_target

    def fault(xp, x, labels, *rest):
        return real(xp, x, labels.astype(np.int8), *rest)

    monkeypatch.setattr(portable, "index_target", fault)
    assert finds("cross_entropy", "cross_entropy_value_and_grad")


@pytest.mark.libraries("numpy")
def test_a_gradient_that_cancels_is_found(monkeypatch, arrays_of):
    """p - t as it is written loses the label's digits in a confident row."""
    real = _cross_entropy._gradient

    def fault(xp, state, rows, target, axis, options):
        if rows.q is not None or options.z_loss:
            return real(xp, state, rows, target, axis, options)
        label = _cross_entropy.classes(xp, state.exps, axis) == target.index
        u = 1.0 if rows.u is None else rows.u
        return (state.exps / (1.0 + state.rest) - label) * u

    monkeypatch.setattr(_cross_entropy, "_gradient", fault)
    assert finds("cross_entropy_value_and_grad")
