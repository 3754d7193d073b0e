"""The drop-in modules: their peers' arguments and conventions, on every backend.

Answers are checked against the formula in NumPy; the peers' own tests run in tests/conformance.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from asserts import assert_close

import portable_softmax as ps
from portable_softmax.compat import optax, scipy_special, torch_functional

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 3))
B = RNG.normal(size=(2, 4, 3))
T = np.asarray([2, 0, -100, 1])
WEIGHT = np.asarray([0.5, 2.0, 1.5])
LOG_P = X - np.log(np.exp(X).sum(axis=1, keepdims=True))


@pytest.fixture
def xp(xp, arrays_of):
    """Each library once: the modules choose no kernel."""
    return xp


# --------------------------------------------------------------------------- the arguments


def arguments(function):
    return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("theirs", ["scipy.special", "torch.nn.functional", "torch.nn", "optax"])
def test_each_function_has_the_arguments_of_its_peer(theirs):
    peer = pytest.importorskip(theirs)
    name = theirs.replace(".functional", "_functional").replace(".", "_")
    module = importlib.import_module(f"portable_softmax.compat.{name.replace('_nn_', '_')}")
    # torch.logsumexp is compiled, and names no arguments.
    alone = [name for name in module.__all__ if not hasattr(peer, name)]
    assert len(alone) == (theirs == "torch.nn.functional")
    for name in {*module.__all__} - {*alone}:
        assert arguments(getattr(module, name)) == arguments(getattr(peer, name)), name


MIGRATING = Path(__file__).parents[1] / "docs" / "migrating.md"


def test_the_imports_of_the_page_that_migrates_bring_the_same_names():
    rows = re.findall(r"^\| `(from .+)` \| `(from .+)` \|$", MIGRATING.read_text(), re.M)
    assert len(rows) == 4
    for before, after in rows:
        for peer in ("torch", "scipy", "optax"):
            if peer in before:
                pytest.importorskip(peer)
        theirs, ours = {}, {}
        exec(before, theirs)
        exec(after, ours)
        assert ours.keys() == theirs.keys()


@pytest.mark.parametrize(
    ("heading", "modules", "from_numpy"),
    [
        ("SciPy", {"special": "scipy.special", "stats": "scipy.stats"}, "numpy.asarray"),
        ("torch", {"F": "torch.nn.functional", "nn": "torch.nn"}, "torch.as_tensor"),
        ("JAX and optax", {"optax": "optax"}, "jax.numpy.asarray"),
        ("entmax", {"entmax": "entmax"}, "torch.as_tensor"),
    ],
)
def test_both_columns_of_the_page_that_migrates_agree(heading, modules, from_numpy):
    library = from_numpy.partition(".")[0]
    peers = {name: pytest.importorskip(path) for name, path in modules.items()}
    names = {"np": np, library: importlib.import_module(library)}
    make = eval(from_numpy, {library: importlib.import_module(library)})
    t, p = np.asarray([2, 0, 1, 1]), np.exp(LOG_P)
    arrays = {"x": X, "s": B, "t": t, "u": t.reshape(2, 2)[:, [0, 1, 0]], "p": p, "w": WEIGHT}
    arrays |= {"z": X[::-1].copy(), "b": np.where(p > 0.3, 1.0, 0.0)}
    names |= {name: make(array) for name, array in arrays.items()} | {"m": make(p > 0.2)}
    section = MIGRATING.read_text(encoding="utf-8").partition(f"\n### {heading}\n")[2]
    rows = re.findall(r"^\| `(.+)` \| `(.+)` \|$", section.partition("\n### ")[0], re.M)
    assert len(rows) >= (2 if heading == "entmax" else 7)
    for before, after in rows:
        expected = np.asarray(eval(before, names | peers))
        answer = np.asarray(eval(after, vars(ps) | names))
        np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-6, err_msg=after)
        assert answer.dtype == expected.dtype, after


def test_the_module_that_needs_torch_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "portable_softmax.compat.torch_nn", raising=False)
    with pytest.raises(ImportError, match=r'pip install "portable_softmax\[torch\]"'):
        importlib.import_module("portable_softmax.compat.torch_nn")


# --------------------------------------------------------------------------- scipy.special


def test_scipy_takes_lists_and_numbers():
    for x in ([[1, 2], [3, 5]], (0.5, 1.5), 2.0, np.float32(1.0)):
        e = np.exp(np.asarray(x, np.float64))
        np.testing.assert_allclose(scipy_special.softmax(x), e / e.sum(), rtol=1e-6)
        np.testing.assert_allclose(scipy_special.log_softmax(x), np.log(e / e.sum()), atol=1e-6)
        np.testing.assert_allclose(scipy_special.logsumexp(x), np.log(e.sum()), rtol=1e-6)


def test_scipy_reduces_all_axes(xp):
    e = np.exp(X)
    assert_close(xp, scipy_special.softmax(xp.asarray(X)), e / e.sum(), rtol=1e-13)
    assert_close(xp, scipy_special.log_softmax(xp.asarray(X)), X - np.log(e.sum()), rtol=1e-13)
    assert_close(xp, scipy_special.logsumexp(xp.asarray(X), axis=0), np.log(e.sum(0)), rtol=1e-13)


def test_scipy_weights_enlarge_the_exponents(xp):
    value, sign = scipy_special.logsumexp(
        xp.asarray(X), b=xp.asarray(B), axis=(0, 2), return_sign=True
    )
    total = (B * np.exp(X)).sum(axis=(0, 2))
    assert_close(xp, value, np.log(np.abs(total)), rtol=1e-12)
    assert_close(xp, sign, np.sign(total))


def test_scipy_takes_integers_beside_floats(xp):
    """Of exponents or weights; the standard leaves open what both together are."""
    n, v = np.asarray([0, 1, 3]), np.asarray([0.5, 2.0, 1.25])
    for x, b in ((n, v), (v, n), (n, 2.5), (2.5, n), (v, 2), (n, 2)):
        given = [xp.asarray(a) if isinstance(a, np.ndarray) else a for a in (x, b)]
        answer = scipy_special.logsumexp(given[0], b=given[1])
        expected = np.log(np.sum(b * np.exp(x)))
        assert_close(xp, answer, expected, xp.dtype_name(answer), rtol=1e-6)


def test_scipy_promotes_both_to_one_dtype():
    x, b = np.zeros(2, np.float32), np.ones(2)
    assert scipy_special.logsumexp(x, b=b).dtype == np.float64
    assert scipy_special.logsumexp(x, b=2.0).dtype == np.float32
    assert scipy_special.logsumexp(x, b=[True, False]) == 0.0
    assert scipy_special.logsumexp([0.0, 0.0], b=1j) == np.log(2j)


# --------------------------------------------------------------------------- torch


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "softmin"])
def test_torch_chooses_an_axis_and_warns(name):
    function = ps.log_softmax if name == "log_softmax" else ps.softmax
    for ndim, axis in ((0, None), (1, 0), (2, 1), (3, 0), (4, 1)):
        x = np.asarray(RNG.normal(size=(2, 3, 4, 5)[:ndim]))
        with pytest.warns(UserWarning, match=f"dimension choice for {name}") as caught:
            answer = getattr(torch_functional, name)(x)
        assert caught[0].filename == __file__
        expected = function(-x if name == "softmin" else x, axis=axis)
        np.testing.assert_allclose(answer, expected, rtol=1e-12, atol=1e-15)


def test_torch_softmin_of_the_smallest_integer(xp):
    answer = torch_functional.softmin(xp.asarray([-128, 0, 127], "int8"), dim=-1)
    assert_close(xp, answer, [1, 0, 0], xp.dtype_name(answer), atol=1e-30)


def test_torch_dtype_is_that_of_the_answer(xp):
    dtype = xp.asarray([0.0]).dtype
    x = xp.asarray(X, "float32")
    e = np.exp(X.astype(np.float32).astype(np.float64))
    assert_close(xp, torch_functional.softmax(x, 0, dtype=dtype), e / e.sum(0), rtol=1e-14)


def test_torch_logsumexp_over_a_list_of_axes(xp):
    answer = torch_functional.logsumexp(xp.asarray(B), [0, -1], keepdim=True)
    assert_close(xp, answer, np.log(np.exp(B).sum((0, 2), keepdims=True)), rtol=1e-13)


def losses():
    """Loss and weight of each row of X; the third is ignored."""
    weight = np.where(T < 0, 0.0, WEIGHT[T % 3])
    return -LOG_P[np.arange(4), T % 3] * weight, weight


@pytest.mark.parametrize(("name", "x"), [("cross_entropy", X), ("nll_loss", LOG_P)])
def test_torch_losses_with_weights_and_an_ignored_label(xp, name, x):
    each, w = losses()
    function, given = getattr(torch_functional, name), map(xp.asarray, (x, T, WEIGHT))
    x, t, weight = given
    assert_close(xp, function(x, t, weight), each.sum() / w.sum(), rtol=1e-13)
    assert_close(xp, function(x, t, weight, reduction="none"), each, rtol=1e-12)


@pytest.mark.slow("XLA compiles each call", "jax")
def test_torch_classes_are_in_axis_1_or_there_is_no_batch(xp):
    x, t = np.moveaxis(B, 2, 1), np.asarray([[0, 1, 2, 0], [2, 1, 0, 1]])
    log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    each = -np.take_along_axis(log_p, t[:, None], axis=1)[:, 0]
    p, last = np.asarray([0.5, 0.25, 0.25]), np.asarray(2)
    for function, given, labels, expected in (
        (torch_functional.cross_entropy, x, t, each),
        (torch_functional.nll_loss, log_p, t, each),
        (torch_functional.cross_entropy, X[0], p, -(p * LOG_P[0]).sum()),
        (torch_functional.nll_loss, LOG_P[0], last, -LOG_P[0, 2]),
    ):
        answer = function(xp.asarray(given), xp.asarray(labels), reduction="none")
        assert_close(xp, answer, expected, rtol=1e-12)


def test_torch_deprecated_reductions():
    for reduction, given in (
        ("mean", ((None, True), (True, None))),
        ("sum", ((False, None), (False, True))),
        ("none", ((True, False), (None, False))),
    ):
        for function, x in (
            (torch_functional.cross_entropy, X),
            (torch_functional.nll_loss, LOG_P),
        ):
            expected = function(x, T, reduction=reduction)
            for size_average, reduce in given:
                with pytest.warns(UserWarning, match=f"reduction='{reduction}'") as caught:
                    answer = function(x, T, size_average=size_average, reduce=reduce)
                assert caught[0].filename == __file__
                np.testing.assert_array_equal(answer, expected)


def test_torch_nll_loss_refuses_wrong_labels(xp):
    log_p = xp.asarray(LOG_P)
    with pytest.raises(ValueError, match="expected class indices"):
        torch_functional.nll_loss(log_p, log_p)
    if xp.lazy:
        return
    with pytest.raises(IndexError, match=r"labels\[1\] is 3, outside \[0, 3\)"):
        torch_functional.nll_loss(log_p, xp.asarray(np.asarray([0, 3, 1, 1])))
    with pytest.raises(ValueError, match="weight has shape"):
        torch_functional.nll_loss(log_p, xp.asarray(T), weight=xp.asarray(WEIGHT[:2]))


def test_torch_nll_loss_of_an_ignored_row_and_of_a_class_of_weight_0():
    log_p = np.asarray([[0.0, -np.inf], [np.nan, 0.0]])
    labels, weight = np.asarray([1, -100]), np.asarray([1.0, 0.0])
    answer = torch_functional.nll_loss(log_p, labels, weight, reduction="sum")
    assert answer == 0.0
    assert torch_functional.nll_loss(log_p, labels) == np.inf


def test_torch_refuses_what_is_no_array():
    rows, label, p = X.tolist(), T % 3, np.exp(LOG_P)
    f, none = torch_functional, "is a list, which is no array: pass an array"
    for match, function, *given in (
        (f"input {none}", f.softmax, rows, 0),
        (f"input {none}", f.log_softmax, rows),
        (f"input {none}", f.logsumexp, rows, 0),
        (f"input {none}", f.cross_entropy, rows, label),
        (f"input {none}", f.nll_loss, rows, label),
        (f"labels {none}", f.cross_entropy, X, label.tolist()),
        ("ignore_index is '1', expected an int or None", f.cross_entropy, X, p, None, None, "1"),
    ):
        with pytest.raises(TypeError, match=match):
            function(*given)


def test_torch_no_index_is_ignored_for_none():
    t, p = T % 3, np.exp(LOG_P)
    for target, expected in ((t, -LOG_P[np.arange(4), t].mean()), (p, -(p * LOG_P).sum(1).mean())):
        answer = torch_functional.cross_entropy(X, target, ignore_index=None)
        np.testing.assert_allclose(answer, expected, rtol=1e-13)


@pytest.mark.libraries("torch")
@pytest.mark.usefixtures("arrays_of")
def test_torch_nll_loss_is_differentiated(torch):
    x = torch.tensor(LOG_P, requires_grad=True)
    torch_functional.nll_loss(x, torch.tensor(T), torch.tensor(WEIGHT)).backward()
    _, w = losses()
    expected = np.zeros((4, 3))
    expected[np.arange(4), T % 3] = -w / w.sum()
    np.testing.assert_allclose(x.grad, expected, rtol=1e-14)


@pytest.mark.libraries("torch")
@pytest.mark.usefixtures("arrays_of")
def test_torch_modules_are_torchs_but_for_the_answer(torch):
    from portable_softmax.compat import torch_nn

    weight = torch.tensor(WEIGHT, dtype=torch.float32)
    for name, options in (
        ("CrossEntropyLoss", {"weight": weight, "label_smoothing": 0.1}),
        ("Softmax", {"dim": 1}),
        ("LogSoftmax", {"dim": 1}),
    ):
        ours, theirs = (getattr(module, name)(**options) for module in (torch_nn, torch.nn))
        assert isinstance(ours, type(theirs))
        assert repr(ours) == repr(theirs)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        x = torch.tensor(X, dtype=torch.float32)
        given = (x, torch.tensor(T)) if name == "CrossEntropyLoss" else (x,)
        torch.testing.assert_close(ours(*given), theirs(*given))
    confident = torch.tensor([[30.0, 0.0, 0.0]])
    loss = torch_nn.CrossEntropyLoss()(confident, torch.tensor([0]))
    np.testing.assert_allclose(loss, np.log1p(2 * np.exp(-30.0)), rtol=1e-6)
    torch.testing.assert_close(torch_nn.LogSoftmax(1)(confident)[0, 0], -loss)
    with pytest.warns(UserWarning, match="dimension choice for softmax"):
        torch_nn.Softmax()(confident)


# --------------------------------------------------------------------------- optax


def test_optax_gives_one_loss_a_position(xp):
    t = np.asarray([2, 0, 1, 1])
    expected = -LOG_P[np.arange(4), t]
    x, one_hot = xp.asarray(X), xp.asarray(np.eye(3)[t])
    for answer in (
        optax.softmax_cross_entropy(x, one_hot),
        optax.safe_softmax_cross_entropy(x, one_hot),
        optax.softmax_cross_entropy_with_integer_labels(x, xp.asarray(t)),
    ):
        assert_close(xp, answer, expected, rtol=1e-12)


@pytest.mark.slow("XLA compiles each call", "jax")
def test_optax_over_several_axes(xp):
    x = xp.asarray(B)
    flat = B.transpose(1, 2, 0).reshape(4, 6)
    log_p = flat - np.log(np.exp(flat).sum(axis=1, keepdims=True))
    t = np.asarray([5, 0, 3, 2])
    answer = optax.softmax_cross_entropy_with_integer_labels(x, xp.asarray(t), axis=(2, 0))
    assert_close(xp, answer, -log_p[np.arange(4), t], rtol=1e-12)
    p = np.exp(RNG.normal(size=(3,)))
    answer = optax.softmax_cross_entropy(x, xp.asarray(p), axis=None)
    whole = B - np.log(np.exp(B).sum())
    assert_close(xp, answer, -(p * whole).sum(), rtol=1e-12)


@pytest.mark.slow("XLA compiles each call", "jax")
def test_optax_masks_classes_and_positions(xp):
    where = np.asarray([[True, True, False], [True] * 3, [False] * 3, [True, False, True]])
    e = np.where(where, np.exp(X), 0.0)
    with np.errstate(divide="ignore"):
        log_sum = np.log(e.sum(axis=1))
    t = np.asarray([0, 2, 1, 2])
    expected = np.where(where.any(axis=1), log_sum - X[np.arange(4), t], 0.0)
    integer, whole = optax.softmax_cross_entropy_with_integer_labels, optax.softmax_cross_entropy
    x, labels, one_hot = xp.asarray(X), xp.asarray(t), xp.asarray(np.eye(3)[t])
    assert_close(xp, integer(x, labels, where=xp.asarray(where)), expected, rtol=1e-12)
    assert_close(xp, whole(x, one_hot, where=xp.asarray(where)), expected, rtol=1e-12)
    positions = np.asarray([True, False, True, False])
    expected = np.where(positions, -LOG_P[np.arange(4), t], 0.0)
    assert_close(xp, integer(x, labels, where=xp.asarray(positions)), expected, rtol=1e-12)


@pytest.mark.libraries("jax")
@pytest.mark.usefixtures("arrays_of")
def test_optax_takes_labels_of_numpy_beside_logits_of_jax(jax):
    logits, label = jax.numpy.asarray(X[0]), np.asarray(1)
    answer = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    assert isinstance(answer, jax.Array)
    np.testing.assert_allclose(answer, -LOG_P[0, 1], rtol=1e-6)


def test_optax_refuses_what_is_no_array_or_does_not_fit():
    integer, t = optax.softmax_cross_entropy_with_integer_labels, np.asarray([2, 0, 1, 1])
    with pytest.raises(TypeError, match="logits is a list"):
        optax.softmax_cross_entropy([1.0], np.ones(1))
    with pytest.raises(IndexError, match="is -1, outside"):
        integer(X, np.asarray([0, -1, 1, 1]))
    for where, error, match in (
        ([True, False, True, True], TypeError, "where is a list, which is no array"),
        (np.asarray([1, 0, 1, 1]), TypeError, "where has dtype int64, expected bool"),
        (np.ones((4, 2), bool), ValueError, r"where has shape \(4, 2\), which does not broadcast"),
        (np.ones(3, bool), ValueError, r"the shape \(4,\) of logits without axis 1: give it"),
    ):
        with pytest.raises(error, match=match):
            integer(X, t, where=where)
    # A label that is masked out is nan.
    assert np.isnan(integer(X[:1], t[1:2], where=np.asarray([[False, True, True]]))).all()


def test_nothing_warns_where_nothing_is_deprecated():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = torch_functional.softmax(X, 1)
    np.testing.assert_array_equal(answer, ps.softmax(X, axis=1))
