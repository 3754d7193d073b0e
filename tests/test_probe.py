"""A library that nobody has tested: right answers, or a refusal with a remedy; once per process."""

from __future__ import annotations

import importlib
import math
import types

import numpy as np
import pytest
from numpy.testing import assert_allclose

import portable_softmax as ps
from portable_softmax import libraries
from portable_softmax.libraries import _probe

X = np.asarray([[2.0, 1.0, 0.0], [30.0, 0.0, 0.0]])


class Made:
    """An array of a made-up library, over one of NumPy."""

    xp: types.ModuleType

    def __init__(self, values):
        self.values = np.asarray(values)

    shape = property(lambda self: self.values.shape)
    ndim = property(lambda self: self.values.ndim)
    dtype = property(lambda self: self.values.dtype)
    device = "here"

    def __array_namespace__(self, api_version=None):
        return self.xp

    def __bool__(self):
        return bool(self.values)

    def __getitem__(self, key):
        return type(self)(self.values[key])


def _binary(name):
    def operate(self, other):
        other = other.values if isinstance(other, Made) else other
        return type(self)(getattr(self.values, name)(other))

    return operate


for _name in ("add", "sub", "mul", "truediv", "le", "lt", "ge", "gt", "eq", "and", "or"):
    setattr(Made, f"__{_name}__", _binary(f"__{_name}__"))
for _name in ("add", "sub", "mul", "truediv"):
    setattr(Made, f"__r{_name}__", _binary(f"__r{_name}__"))
Made.__invert__ = lambda self: type(self)(~self.values)


def made_up(name, **others):
    """Return a library of that name: functions of NumPy, but for the others."""
    xp = types.ModuleType(name)
    xp.calls = 0
    xp.Array = type("Array", (Made,), {"xp": xp, "__module__": name})

    def own(function):
        def call(*args, device=None, **kwargs):
            xp.calls += 1
            plain = (a.values if isinstance(a, Made) else a for a in args)
            found = function(*plain, **kwargs)
            return xp.Array(found) if isinstance(found, np.ndarray | np.generic) else found

        return call

    for function in (
        *("abs", "all", "any", "arange", "asarray", "astype", "broadcast_to", "empty", "exp"),
        *("expm1", "floor", "full", "isinf", "isnan", "log", "log1p", "max", "ones_like"),
        *("reshape", "sum", "squeeze", "where", "zeros_like", "result_type"),
    ):
        setattr(xp, function, own(getattr(np, function)))
    for function, other in others.items():
        setattr(xp, function, own(other))
    xp.finfo, xp.iinfo, xp.isdtype = np.finfo, np.iinfo, np.isdtype
    xp.float32, xp.float64, xp.int8 = np.float32, np.float64, np.int8
    return xp


def test_a_library_that_follows_the_standard_is_taken_and_tried_once():
    xp = made_up("made_up_right")
    x = xp.Array(X)
    y = ps.softmax(x)
    assert_allclose(y.values, ps.softmax(X), rtol=1e-14)
    assert libraries.of(xp).probed
    first = xp.calls
    again = made_up("made_up_right_again")
    libraries.of(again).probed = True
    ps.softmax(again.Array(X))
    tried = first - again.calls
    assert tried > 0
    ps.softmax(x)
    assert xp.calls == first + again.calls  # the second call is not tried again


WRONG = {
    "exp": ({"exp": np.exp2}, "softmax by its operations is wrong"),
    "max": ({"max": np.min}, "the maximum by its operations is wrong"),
    "sum": ({"sum": lambda x, axis, keepdims: np.sum(x, axis=axis)}, r"sum gives the shape \(2,\)"),
    "log1p": ({"log1p": np.log}, "wrong"),
    "nan": ({"exp": lambda x: x * math.nan}, "wrong"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_library_is_refused_with_a_remedy(name):
    others, why = WRONG[name]
    x = made_up(f"made_up_{name}", **others).Array(X)
    for function in (ps.softmax, ps.logsumexp, ps.entmax, ps.entropy, ps.online.fold):
        with pytest.raises(TypeError, match=f"array of made_up_{name}.*{why}.*convert (x|logits)"):
            function(x)
    with pytest.raises(TypeError, match=rf"{why}.*numpy\.asarray\(logits\)"):
        ps.cross_entropy(x, x)


def test_reductions_that_answer_in_another_library_are_refused():
    """As those that give arrays of NumPy."""
    xp = made_up("made_up_mixed")
    xp.sum = lambda x, **options: np.sum(x.values, **options)
    with pytest.raises(TypeError, match=r"its sum gives a numpy\.ndarray"):
        ps.logsumexp(xp.Array(X))


def test_what_losses_need_is_asked_of_losses():
    xp = made_up("made_up_without_arange")
    del xp.arange
    x = xp.Array(X)
    assert_allclose(ps.softmax(x).values, ps.softmax(X), rtol=1e-14)
    with pytest.raises(TypeError, match=r"raises AttributeError.*arange.*convert logits"):
        ps.cross_entropy(x, xp.Array([0, 0]))


# In an environment that has these libraries: Numba, which one needs, would be a kernel of NumPy's.
@pytest.mark.libraries("array_api_strict")
def test_blosc2_is_refused(arrays_of):
    """Its reductions give arrays of NumPy."""
    x = pytest.importorskip("blosc2").asarray(X)
    for function in (ps.softmax, ps.logsumexp, ps.log_softmax):
        with pytest.raises(TypeError, match=r"array of blosc2, which cannot give.*numpy\.asarray"):
            function(x)


@pytest.mark.slow("it compiles its functions by Numba")
@pytest.mark.libraries("array_api_strict")
def test_sparse_answers_rows_sparsely_and_refuses_losses(arrays_of):
    """It has no arange: with the remedy, nothing is made dense by itself."""
    sparse = pytest.importorskip("sparse")
    x = sparse.COO.from_numpy(X)
    y = ps.softmax(x)
    assert isinstance(y, sparse.COO)
    assert_allclose(y.todense(), ps.softmax(X), rtol=1e-14)
    with pytest.raises(TypeError, match=r"array of sparse.*arange.*logits\.todense\(\)"):
        ps.cross_entropy(x, sparse.COO.from_numpy(np.asarray([0, 0])))


@pytest.mark.libraries("array_api_strict")
def test_the_probe_passes_on_the_standard_itself(arrays_of):
    strict = importlib.import_module("array_api_strict")
    assert _probe.of_rows(strict) == ""
    assert _probe.of_labels(strict) == ""


def test_the_known_answers_are_those_of_the_formulas():
    y = np.exp(X - X.max(axis=1, keepdims=True))
    total = y.sum(axis=1, keepdims=True)
    lse = X.max(axis=1, keepdims=True) + np.log(total)
    assert_allclose(_probe._SOFTMAX, y / total, rtol=1e-13)
    assert_allclose(_probe._LOGSUMEXP, lse, rtol=1e-15)
    assert_allclose(_probe._LOSS, lse - X[:, 1:2], rtol=1e-15)
