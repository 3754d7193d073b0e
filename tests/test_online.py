"""States that merge: any split, order and tree of a row answers as the row in one piece."""

from __future__ import annotations

from functools import partial, reduce

import numpy as np
import pytest
import reference
from asserts import assert_close, assert_like
from backends import LIBRARIES
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp, mpf
from test_properties import arrays

import portable_softmax as ps
from portable_softmax import kernels, online

pytestmark = pytest.mark.run_on("paths")

INF, NAN = np.inf, np.nan
EPS = {"float32": 2.0**-23, "float64": 2.0**-52}


def ulps(actual, expected):
    return reference.ulps(np.asarray(actual), [expected])


# --------------------------------------------------------------------------- trees

# JAX compiles the fold of each length anew.
LENGTHS = (1, 2, 5)


@st.composite
def trees(draw):
    """A row in parts, in any order, and a tree over them: nested tuples of parts' numbers."""
    lengths = draw(st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=9))
    dtype = draw(st.sampled_from(("float32", "float64")))
    row = arrays(draw, (sum(lengths),), dtype=dtype)
    if draw(st.booleans()):  # confident in any part: the rest is all digits, and small
        row[draw(st.integers(0, row.size - 1))] += draw(st.sampled_from((20, 60)))
    if draw(st.booleans()):
        row = np.sort(row)[:: draw(st.sampled_from((1, -1)))].copy()
    forest = list(range(len(lengths)))
    while len(forest) > 1:
        n = draw(st.integers(2, min(len(forest), 4)))
        at = draw(st.integers(0, len(forest) - n))
        forest[at : at + n] = [tuple(draw(st.permutations(forest[at : at + n])))]
    return np.split(row, np.cumsum(lengths)[:-1]), forest[0], dtype


def merged(tree, states):
    if not isinstance(tree, tuple):
        return states[tree]
    return online.merge(*[merged(branch, states) for branch in tree])


@pytest.mark.slow("XLA compiles each dtype and number of states", "jax")
@pytest.mark.slow("a large graph for each example", "dask")
@given(case=trees())
def test_any_tree_has_the_accuracy_of_the_whole(xp, case):
    parts, tree, dtype = case
    arrays = [xp.asarray(part) for part in parts]
    state = merged(tree, [online.fold(x) for x in arrays])
    each = [(online.log_softmax(x, state), online.softmax(x, state)) for x in arrays]
    entries = [xp.asarray(entry) for part in parts for entry in part[:, None]]
    losses = [online.cross_entropy(state, entry) for entry in entries]
    state, value, each, losses = xp.computed((state, online.logsumexp(state), each, losses))
    row = np.concatenate(parts)
    exact = reference.exact(row)
    lse, logs = reference.logsumexp(exact), reference.log_softmax(exact)
    assert assert_like(xp, state.max, (1,), dtype) == row.max()
    value = assert_like(xp, value, (1,), dtype)[0]
    near_0 = 4 * EPS[dtype] / 2 * max(1, abs(float(row.max())))
    assert ulps(value, lse) <= 6 or abs(mpf(float(value)) - lse) <= near_0
    spread = float(row.max() - row.min())
    at = 0
    for part, answers in zip(parts, each, strict=True):
        log_y, y = (assert_like(xp, answer, part.shape, dtype) for answer in answers)
        for j in range(part.size):
            want = logs[at + j]
            loss = xp.numpy(losses[at + j])[0]
            if -want > np.finfo(dtype).tiny:  # else the rest is no normal number
                assert ulps(log_y[j], want) <= 8
                assert ulps(loss, -want) <= 8
            if mp.exp(want) > np.finfo(dtype).tiny:
                assert ulps(y[j], mp.exp(want)) <= max(6, 2 + 2 * spread)
        at += part.size


@pytest.mark.slow("a graph of a thousand merges", "dask", "strict")
@pytest.mark.slow("a hundred folds in one graph", "jax")
@pytest.mark.parametrize("kind", ["largest first", "largest last", "rising", "float64"])
def test_a_thousand_entries_one_by_one(xp, kind):
    """Each merge rounds. Equal steps: a running sum in float32 would be off by dozens of units."""
    n = 50 if xp.lazy else 1000  # each merge of a graph looks at all before it
    if kind == "float64":  # the maximum first, and what follows is added to a small rest
        n = 100 if xp.lazy or xp.library == "jax" else 1000  # one merge of n states is one graph
        row = np.append(40.0, np.random.default_rng(0).normal(size=n - 1))
    elif kind == "rising":
        row = np.linspace(0.0, 1.7, n, dtype=np.float32)
    else:
        row = np.append(np.float32(20.3), np.full(n - 1, 0.1, np.float32))
        row = row if kind == "largest first" else row[::-1].copy()
    folds = {float(v): online.fold(xp.asarray([v], row.dtype.name)) for v in np.unique(row)}
    states = [folds[float(v)] for v in row]
    lse = reference.logsumexp(reference.exact(row))
    found = [reduce(online.merge, states)]
    if kind == "float64":
        found.append(online.merge(*states))
    for state in found:
        assert ulps(xp.numpy(online.logsumexp(state))[0], lse) <= 6
        loss = xp.numpy(online.cross_entropy(state, state.max))[0]
        assert ulps(loss, lse - mpf(float(row.max()))) <= (24 if kind == "float64" else 8)


def test_a_state_of_logsumexp_alone_would_lose_the_row(xp):
    """What the documentation says of the row [30, 0, 0]."""
    exact = mp.log1p(2 * mp.exp(-30))
    for dtype, rtol in (("float64", 1e-15), ("float32", 1e-6)):
        parts = [xp.asarray([30.0], dtype), xp.asarray([0.0, 0.0], dtype)]
        state = online.merge(*map(online.fold, parts))
        loss = online.cross_entropy(state, parts[0])
        assert_close(xp, loss, [float(exact)], dtype, rtol=rtol)
    assert f"{float(exact):.12e}" == "1.871524593768e-13"
    lse = np.logaddexp(30.0, np.log(2.0))
    assert f"{lse - 30:.4e}" == "1.8829e-13"
    assert np.logaddexp(np.float32(30), np.float32(np.log(2.0))) == 30


def test_the_same_tree_gives_the_same_bits(xp):
    x = np.random.default_rng(1).normal(size=(3, 12)).astype(np.float32)
    parts = np.split(x, 4, axis=1)

    def answer():
        a, b, c, d = (online.fold(xp.asarray(part)) for part in parts)
        return [xp.numpy(part) for part in online.merge(online.merge(a, b), d, c)]

    for one, other in zip(answer(), answer(), strict=True):
        np.testing.assert_array_equal(one, other)


# --------------------------------------------------------------------------- edges

ROWS = {
    "minus infinity": [-INF, 1.0, 2.0, -INF],
    "minus infinity only": [-INF] * 4,
    "plus infinity": [0.0, INF, 1.0, -INF],
    "two plus infinities": [INF, 0.0, -INF, INF],
    "nan": [0.0, NAN, 1.0, -INF],
    "nan and infinities": [INF, NAN, -INF, -INF],
    "far apart": [1e308, -1e308, 0.0, 5.0],
}


@pytest.mark.slow("a large graph", "dask")
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_infinities_and_nan_in_any_part(xp, row):
    """As the whole row is answered, and no other row is touched."""
    x = np.asarray([row, [1.0, 2.0, 3.0, 4.0]])
    whole, entries = xp.asarray(x), [xp.asarray(x[:, i : i + 1]) for i in range(4)]
    log_y, y = xp.numpy(ps.log_softmax(whole)), xp.numpy(ps.softmax(whole))
    wanted_lse = xp.numpy(ps.logsumexp(whole, axis=1, keepdims=True))
    for cuts in ([1], [2], [3], [1, 2, 3], [0, 2, 4]):
        parts = [xp.asarray(np.ascontiguousarray(part)) for part in np.split(x, cuts, axis=1)]
        for ordered in (parts, parts[::-1]):
            state = online.merge(*[online.fold(part) for part in ordered])
            of_all = online.softmax(whole, state), online.log_softmax(whole, state)
            losses = [online.cross_entropy(state, entry) for entry in entries]
            found = xp.computed((online.logsumexp(state), *of_all, *losses))
            for one, want in zip(
                found, (wanted_lse, y, log_y, *np.split(-log_y, 4, axis=1)), strict=True
            ):
                rtol = 1e-14 if want.shape == x.shape else 1e-15
                np.testing.assert_allclose(xp.numpy(one), want, rtol=rtol)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_identity_changes_no_bit(xp, dtype):
    x = np.asarray([[0.3, -1.2, 41.0], [-INF] * 3, [0.0, INF, 1.0], [NAN, 0.0, 0.0]], dtype)
    state, nothing = online.fold(xp.asarray(x)), online.identity(xp.asarray(x[:, :0]))
    assert_close(xp, nothing.max, np.full((4, 1), -INF), dtype)
    assert (assert_like(xp, nothing.rest, (4, 1), xp.dtype_name(state.rest)) == -1).all()
    assert_close(xp, online.logsumexp(online.merge(nothing, nothing)), [[-INF]] * 4, dtype)
    for both in ((state, nothing), (nothing, state), (nothing, state, nothing)):
        for part, same in zip(online.merge(*both), state, strict=True):
            np.testing.assert_array_equal(xp.numpy(part), xp.numpy(same))
    assert online.merge(state) is state


def test_the_fold_of_no_entry_is_the_identity(xp):
    x = xp.asarray(np.zeros((2, 0)))
    masked = online.fold(
        xp.asarray(np.asarray([[NAN, INF], [1.0, 2.0]])), where=xp.asarray(np.zeros(2, bool))
    )
    for state in (online.fold(x), online.identity(x), masked):
        assert_close(xp, state.max, [[-INF]] * 2)
        assert_close(xp, state.rest, [[-1.0]] * 2)


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.parametrize("axis", [0, -1, (0, 2), None, ()])
def test_axes(xp, axis):
    """The reduced axes are kept with length 1; parts may be cut along any of them."""
    x = np.random.default_rng(2).normal(size=(4, 3, 2))
    state = online.fold(xp.asarray(x), axis=axis)
    kept = online.identity(xp.asarray(x), axis=axis)
    for part, like in zip(state, kept, strict=True):
        assert part.shape == like.shape
        assert part.dtype == like.dtype
    want = ps.logsumexp(xp.asarray(x), axis=axis, keepdims=True)
    assert_close(xp, online.logsumexp(state), xp.numpy(want), rtol=1e-14)
    probabilities = xp.numpy(ps.softmax(xp.asarray(x), axis=axis))
    assert_close(xp, online.softmax(xp.asarray(x), state), probabilities)
    if axis in (0, (0, 2), None):
        halves = online.merge(*[online.fold(xp.asarray(x[i::2]), axis=axis) for i in range(2)])
        assert_close(xp, online.logsumexp(halves), xp.numpy(want), rtol=1e-14)


def test_a_single_number(xp):
    x = xp.asarray(np.asarray(3.0))
    state = online.merge(online.fold(x, axis=None), online.fold(x, axis=None))
    assert_close(xp, online.logsumexp(state), 3 + np.log(2))
    assert_close(xp, online.softmax(x, state), 0.5)
    assert_close(xp, online.cross_entropy(state, x), np.log(2))


def test_where_and_temperature(xp):
    """A masked entry takes no part; what follows is given the logits over the temperature."""
    rng = np.random.default_rng(3)
    x, mask = rng.normal(size=(2, 6)) * 3, rng.random((2, 6)) < 0.6
    mask[:, 0] = True
    hidden = np.where(mask, x, NAN)
    for temperature in (0.7, 3, 1e300):
        parts = [
            online.fold(xp.asarray(a), where=xp.asarray(m), temperature=temperature)
            for a, m in zip(np.split(hidden, 3, 1), np.split(mask, 3, 1), strict=True)
        ]
        state = online.merge(*parts)
        options = {"where": xp.asarray(mask), "temperature": temperature}
        want = xp.numpy(ps.log_softmax(xp.asarray(x), **options))
        found = xp.numpy(online.log_softmax(xp.asarray(x / temperature), state))
        np.testing.assert_allclose(found[mask], want[mask], rtol=1e-13)


@pytest.mark.slow("XLA compiles each dtype", "jax")
def test_half_types_and_integers(xp):
    x = np.asarray([[1.0, 2.5, -3.0, 0.5], [300.0, 280.0, -2.0, 7.0]])
    for name in xp.halves:
        whole = xp.asarray(x, name)
        state = online.merge(*[online.fold(xp.asarray(part, name)) for part in np.split(x, 2, 1)])
        assert xp.dtype_name(state.max) == "float32"
        want = xp.numpy(ps.logsumexp(xp.asarray(x, "float32"), axis=1, keepdims=True))
        assert_close(xp, online.logsumexp(state), want, "float32", rtol=1e-6)
        for f, g in ((online.softmax, ps.softmax), (online.log_softmax, ps.log_softmax)):
            np.testing.assert_array_equal(
                assert_like(xp, f(whole, state), (2, 4), name), xp.numpy(g(whole))
            )
        assert xp.dtype_name(online.cross_entropy(state, xp.asarray(x[:, :1], name))) == name
    integers = xp.asarray([[127, -128]], "int8")
    dtype, state = xp.dtype_name(ps.softmax(integers)), online.fold(integers)
    assert_close(xp, online.logsumexp(state), [[127.0]], dtype)
    assert_close(xp, online.softmax(integers[:, :1], state), [[1.0]], dtype)


def test_inputs_are_never_changed(xp):
    x = np.random.default_rng(4).normal(size=(3, 4))
    array = xp.asarray(x.copy())
    state = online.fold(array)
    before = [xp.numpy(part).copy() for part in state]
    online.merge(state, state)
    online.softmax(array, state), online.log_softmax(array, state), online.logsumexp(state)
    np.testing.assert_array_equal(xp.numpy(array), x)
    for part, was in zip(state, before, strict=True):
        np.testing.assert_array_equal(xp.numpy(part), was)


# --------------------------------------------------------------------------- errors


def test_errors_name_the_argument_and_the_remedy(xp):
    def zeros(*shape, dtype="float64"):
        return xp.asarray(np.zeros(shape), dtype)

    x = zeros(2, 3)
    state, no_rest = online.fold(x), r"^state.rest "
    narrow, short = (online.fold(a) for a in (zeros(2, 3, dtype="float32"), zeros(1, 3)))
    integers = online.State(xp.asarray([1]), xp.asarray([1]))
    lists = online.State(state.max, [[0.0], [0.0]])
    bools = online.State(state.max, zeros(2, 1, dtype="bool"))
    wrong = [
        (TypeError, r"was given no state.*identity", online.merge),
        (
            *(TypeError, r"states\[1\] is a tuple, expected a State"),
            *(online.merge, state, tuple(state)),
        ),
        (TypeError, r"state is a \w+, expected a State", online.logsumexp, x),
        (
            *(ValueError, r"states\[1\].max has shape \(1, 1\), expected \(2, 1\)"),
            *(online.merge, state, short),
        ),
        (
            *(TypeError, r"states\[1\].max has dtype float32, expected float64"),
            *(online.merge, state, narrow),
        ),
        (
            *(ValueError, r"state.max has shape \(2, 1\).*broadcast"),
            *(online.softmax, zeros(3, 3), state),
        ),
        (
            *(TypeError, r"state.max has dtype float64, expected float32, as x"),
            *(online.log_softmax, zeros(2, 3, dtype="float32"), state),
        ),
        (
            *(ValueError, r"logit_at_label has shape \(2,\), expected \(2, 1\)"),
            *(online.cross_entropy, state, zeros(2)),
        ),
        (TypeError, "x has dtype bool", online.fold, zeros(2, 3, dtype="bool")),
        (ValueError, "temperature is -1", partial(online.fold, temperature=-1.0), x),
        (ValueError, "axis is 2", partial(online.identity, axis=2), x),
        (
            *(TypeError, r"state.max has dtype int64, expected float32 or float64"),
            *(online.logsumexp, integers),
        ),
        (TypeError, no_rest, online.logsumexp, lists),
        (TypeError, no_rest, online.logsumexp, bools),
    ]
    if (elsewhere := xp.other_device(state.max)) is not None:
        other = online.State(elsewhere, xp.other_device(state.rest))
        wrong.append((ValueError, "device", online.merge, state, other))
    if xp.library != "numpy":
        message = "both must come from one library"
        wrong.append((TypeError, message, online.softmax, np.zeros((2, 3)), state))
    for error, message, function, *args in wrong:
        with pytest.raises(error, match=message):
            function(*args)


# --------------------------------------------------------------------------- torch


def _through_parts(x, label):
    """The loss of two rows of four, each folded in three parts."""
    parts = [x[:, :1], x[:, 1:3], x[:, 3:]]
    a, b, c = (online.fold(part) for part in parts)
    return online.cross_entropy(online.merge(online.merge(a, b), c), x[:, label : label + 1])


POINTS = np.asarray([[0.3, -1.2, 2.0, 0.7], [1.5, 1.5, 1.5, 0.2]])


def test_torch_differentiates(torch, xp):
    x = xp.asarray(POINTS).requires_grad_()

    def answers(x):
        state = online.merge(online.fold(x[:, :2]), online.fold(x[:, 2:]))
        return (
            _through_parts(x, 2), online.logsumexp(state), online.softmax(x, state),
            online.log_softmax(x, state),
        )  # fmt: skip

    fast = {"fast_mode": xp.name not in LIBRARIES}
    modes = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(answers, x, **modes, **fast)
    assert torch.autograd.gradgradcheck(answers, x, check_fwd_over_rev=True, fast_mode=True)
    grad = torch.autograd.grad(_through_parts(x, 0).sum(), x)[0]
    _, want = ps.cross_entropy_value_and_grad(x.detach(), xp.asarray([0, 0]), reduction="sum")
    torch.testing.assert_close(grad, want, rtol=1e-13, atol=1e-15)
    each = torch.func.vmap(torch.func.grad(lambda row: _through_parts(row[None], 0).sum()))
    torch.testing.assert_close(each(x.detach()), want, rtol=1e-13, atol=1e-15)


def test_torch_differentiates_with_respect_to_a_state(torch, xp):
    """A state that somebody else folded has derivatives of its own."""

    def logsumexp(m1, r1, m2, r2):
        merged = online.merge(online.State(m1, r1), online.State(m2, r2))
        return online.logsumexp(merged), online.softmax(m1, merged)

    given = [xp.asarray([v]).requires_grad_() for v in (0.5, 1.25, 2.0, 0.75)]
    assert torch.autograd.gradcheck(logsumexp, given)


@pytest.mark.slow("torch.compile compiles C++")
def test_torch_compiles(torch, xp, arrays_of):
    compiled = torch.compile(_through_parts, fullgraph=True, dynamic=False)
    x = xp.asarray(POINTS).requires_grad_()
    loss = compiled(x, 0)
    torch.testing.assert_close(loss, _through_parts(x, 0), rtol=1e-13, atol=1e-15)
    grad = torch.autograd.grad(loss.sum(), x)[0]
    want = torch.autograd.grad(_through_parts(x, 0).sum(), x)[0]
    torch.testing.assert_close(grad, want, rtol=1e-13, atol=1e-15)


# --------------------------------------------------------------------------- kernels

HARD = np.asarray(
    [[0.5, -1.0, 2.0, 2.0], [-INF] * 4, [INF, 0.0, 1.0, -INF], [NAN, 0.0, 1.0, 2.0],
     [INF, NAN, 0.0, 1.0], [80.0, 0.0, -9.0, 1.0], [-INF, 3.0, -100.0, -INF]]
)  # fmt: skip


def with_rows(shape, axis, rng):
    """Return an array of a shape of which HARD are among the rows along an axis, or some."""
    axes = np.atleast_1d(axis)
    others = [n for a, n in enumerate(shape) if a not in axes]
    lengths = [shape[a] for a in axes]
    x = 10 * rng.normal(size=(np.prod(others), np.prod(lengths)))
    k = min(HARD.shape[1], x.shape[1])
    x[: len(HARD)] = -5.0
    x[: len(HARD), :k] = HARD[:, :k]
    return np.moveaxis(x.reshape(*others, *lengths), range(-len(axes), 0), axes).copy()


FOLDED = [((70, 1000), 1), ((70, 12), 1), ((70, 3), 1), ((35, 60, 2), 1), ((7, 5, 300), (1, 2))]
FOLDED_WITH = (None, "temperature", "where")


@pytest.mark.slow("Numba compiles each layout for each dtype", "numba", "torch-numba")
@pytest.mark.libraries("numpy", "torch")
@pytest.mark.parametrize(("shape", "axis"), FOLDED)
@pytest.mark.parametrize("option", FOLDED_WITH)
def test_a_kernel_folds_as_the_portable_path(xp, shape, axis, option):
    """Each layout of rows, some of which hold an infinity or a nan.

    Numba compiles half of the dtypes for each case, in turn, so that each two values meet.
    """
    rng = np.random.default_rng(0)
    x, mask = with_rows(shape, axis, rng), xp.asarray(rng.random(shape) > 0.3)
    options = {None: {}, "temperature": {"temperature": 3.0}, "where": {"where": mask}}[option]
    turn = FOLDED.index((shape, axis)) + FOLDED_WITH.index(option)
    dtypes = ("float32", "float64", *xp.halves)
    for dtype in dtypes[turn % 2 :: 2] if xp.path == "numba rows" else dtypes:
        given = xp.asarray(x, dtype)
        found = online.fold(given, axis=axis, **options)
        with kernels.portable():
            want = online.fold(given, axis=axis, **options)
        units = 2.0**-52 if dtype == "float64" else 2.0**-23
        for one, other, limit in zip(found, want, (0, 12), strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            np.testing.assert_allclose(xp.numpy(one), xp.numpy(other), rtol=limit * units)


def test_which_kernel_folds(xp):
    x = xp.asarray(np.zeros((300, 400)), "float32")
    taken = dict.fromkeys(("numpy", "torch"), "numpy tiles")
    taken |= dict.fromkeys(("numba", "torch-numba"), "numba rows")
    assert kernels.explain("fold", x).partition(":")[0] == taken.get(xp.name, "portable")
    if xp.library == "torch":  # its derivatives are torch's own
        explained = kernels.explain("fold", x.requires_grad_())
        assert explained.startswith("portable")


# --------------------------------------------------------------------------- JAX


def _scanned(jax, x, label):
    """The loss of rows that a scan folds column by column."""

    def step(state, column):
        return online.merge(state, online.fold(column[:, None])), None

    state, _ = jax.lax.scan(step, online.identity(x), x.T)
    return online.cross_entropy(state, x[:, label : label + 1])


def test_jax_scans_maps_and_differentiates(jax, xp):
    x, labels = xp.asarray(POINTS), xp.asarray([0, 0])

    def loss(x):
        return _scanned(jax, x, 0).sum()

    def of_the_whole(x):
        return ps.cross_entropy(x, labels, reduction="sum")

    @xp.program
    def derivatives(x):
        each = jax.vmap(jax.grad(lambda row: loss(row[None])))(x)
        hessians = jax.hessian(loss)(x), jax.hessian(of_the_whole)(x)
        return jax.value_and_grad(loss)(x), each, jax.jvp(loss, (x,), (x,))[1], hessians

    want, slope = ps.cross_entropy_value_and_grad(x, labels, reduction="sum")
    (value, grad), each, change, (hessian, expected) = derivatives(x)
    np.testing.assert_allclose(value, want, rtol=1e-14)
    np.testing.assert_allclose(grad, slope, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(each, slope, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(change, (slope * x).sum(), rtol=1e-13)
    np.testing.assert_allclose(hessian, expected, rtol=1e-12, atol=1e-14)


def test_a_state_is_a_pytree_of_jax(jax, xp):
    x = xp.asarray(POINTS)
    parts = jax.jit(lambda x: [online.fold(x[:, :2]), online.fold(x[:, 2:])])(x)
    assert all(isinstance(part, online.State) for part in parts)
    state = jax.jit(online.merge)(*parts)
    mapped = jax.vmap(online.merge)(*parts)
    for one, other in zip(state, mapped, strict=True):
        np.testing.assert_array_equal(one, other)

    def value(*states):
        return online.logsumexp(online.merge(*states)).sum()

    # With respect to both fields: the shares of the parts, and what 1 / (1 + rest) they are of.
    shares = [
        np.exp(xp.numpy(online.logsumexp(p) - online.logsumexp(state))).ravel() for p in parts
    ]
    for grad, share, part in zip(jax.grad(value, (0, 1))(*parts), shares, parts, strict=True):
        rest = xp.numpy(part.rest).ravel()
        np.testing.assert_allclose(np.ravel(grad.max), share, rtol=1e-13)
        np.testing.assert_allclose(np.ravel(grad.rest), share / (1 + rest), rtol=1e-13)


# --------------------------------------------------------------------------- Dask


def test_dask_stays_lazy(da, xp):
    import dask

    def scheduler(*_args, **_options):
        raise AssertionError("somebody computed")

    with dask.config.set(scheduler=scheduler):
        x = xp.asarray(POINTS)
        state = online.merge(online.fold(x[:, :1]), online.identity(x), online.fold(x[:, 1:]))
        found = [online.logsumexp(state), online.softmax(x, state)]
    for part in (*state, *found):
        assert isinstance(part, da.Array)
    lse = np.log(np.exp(POINTS).sum(axis=1, keepdims=True))
    assert_close(xp, found[0], lse, rtol=1e-14)
    unknown = x[x[:, 0] > 1]  # chunks whose length nobody knows yet
    state = online.merge(online.identity(unknown), online.fold(unknown))
    np.testing.assert_allclose(xp.numpy(online.logsumexp(state)), lse[1:], rtol=1e-14)
