"""Properties that hold for every input, searched by hypothesis on every backend.

``--hypothesis-profile thorough`` searches 10,000 examples of the loss, which has the most options,
and 1,000 of each other property, instead of 300 and 30.
"""

from __future__ import annotations

import model
import numpy as np
import pytest
from asserts import assert_like
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import portable_softmax as ps

pytestmark = pytest.mark.run_on("paths")

# A fixed list: JAX compiles each operation anew for each shape.
SHAPES = ((1,), (4,), (2, 3), (3, 1), (1, 5), (2, 3, 2), (0, 3))


def arrays(draw, shape, low=-30.0, high=30.0, dtype=np.float64):
    """Draw an array whose numbers come from a few magnitudes, with ties."""
    seed = draw(st.integers(0, 2**32 - 1))
    kind = draw(st.sampled_from(("plain", "spread", "ties", "confident", "offset")))
    rng = np.random.default_rng(seed)
    x = rng.uniform(low, high, size=shape)
    if kind == "plain":
        x = x / high
    elif kind == "ties":
        x = np.round(x / high * 2)
    elif kind == "confident" and x.size:
        x = x / high
        x.flat[rng.integers(x.size)] += high * 2
    elif kind == "offset":
        x = x / high + 1000
    return x.astype(dtype)


@st.composite
def logits(draw):
    """Logits, an axis (one or several), and the dtype's name."""
    shape = draw(st.sampled_from(SHAPES))
    dtype = draw(st.sampled_from(("float32", "float64")))
    axis = draw(
        st.one_of(
            st.integers(-len(shape), len(shape) - 1),
            st.none(),
            st.lists(st.sampled_from(range(len(shape))), unique=True, min_size=1).map(tuple),
        )
    )
    x = arrays(draw, shape, dtype=dtype)
    picked = range(len(shape)) if axis is None else np.atleast_1d(axis) % len(shape)
    assume(all(shape[a] for a in picked))
    return x, axis, dtype


def eps(dtype):
    return float(np.finfo(dtype).eps)


@given(case=logits())
def test_softmax_sums_to_one_and_is_the_exponential_of_log_softmax(xp, case):
    x, axis, dtype = case
    y = assert_like(xp, ps.softmax(xp.asarray(x), axis=axis), x.shape, dtype)
    assert (y >= 0).all()
    np.testing.assert_allclose(y.sum(axis=axis), 1.0, atol=8 * eps(dtype))
    log_y = assert_like(xp, ps.log_softmax(xp.asarray(x), axis=axis), x.shape, dtype)
    assert (log_y <= 0).all()
    spread = 1 + np.abs(log_y)  # one unit of the logarithm is that many of its exponential
    assert (np.abs(y - np.exp(log_y)) <= 8 * eps(dtype) * spread * y + 1e-37).all()


@given(case=logits(), shift=st.sampled_from((-512.0, -1.0, 0.5, 64.0)))
def test_shift_invariance(xp, case, shift):
    x, axis, _ = case
    x = np.round(x * 16) / 16  # so that adding the shift is exact
    dtype = str(x.dtype)
    moved = xp.asarray(x + x.dtype.type(shift))
    for f in (ps.softmax, ps.log_softmax):
        one, other = xp.numpy(f(xp.asarray(x), axis=axis)), xp.numpy(f(moved, axis=axis))
        np.testing.assert_allclose(one, other, rtol=4 * eps(dtype), atol=1e-37)
    one = xp.numpy(ps.logsumexp(xp.asarray(x), axis=axis))
    other = xp.numpy(ps.logsumexp(moved, axis=axis))
    np.testing.assert_allclose(one + shift, other, atol=eps(dtype) * 4096)


@given(case=logits(), seed=st.integers(0, 99))
def test_permutation_equivariance(xp, case, seed):
    x, _, dtype = case
    order = np.random.default_rng(seed).permutation(x.shape[-1])
    for f in (ps.softmax, ps.log_softmax):
        one = xp.numpy(f(xp.asarray(x)))[..., order]
        other = xp.numpy(f(xp.asarray(np.ascontiguousarray(x[..., order]))))
        np.testing.assert_allclose(one, other, rtol=8 * eps(dtype), atol=1e-37)


@given(case=logits())
def test_logsumexp_bounds(xp, case):
    """max <= logsumexp <= max + log(n)."""
    x, axis, dtype = case
    value = xp.numpy(ps.logsumexp(xp.asarray(x), axis=axis)).astype(np.float64)
    top = x.max(axis=axis).astype(np.float64)
    n = x.size // max(top.size, 1)
    slack = 4 * eps(dtype) * np.maximum(1, np.abs(top))
    assert (value >= top - slack).all()
    assert (value <= top + np.log(max(n, 1)) + slack).all()


@given(case=logits(), seed=st.integers(0, 99))
def test_vjps_against_the_jacobian(xp, case, seed):
    x, _, dtype = case
    assume(x.size)
    dy = np.random.default_rng(seed).normal(size=x.shape).astype(dtype)
    y, log_y = ps.softmax(xp.asarray(x)), ps.log_softmax(xp.asarray(x))
    jacobian = xp.numpy(ps.softmax_jacobian(y)).astype(np.float64)
    expected = np.einsum("...i,...ij->...j", dy, jacobian)
    actual = xp.numpy(ps.softmax_vjp(y, xp.asarray(dy)))
    np.testing.assert_allclose(actual, expected, atol=32 * eps(dtype))
    p = np.exp(xp.numpy(log_y).astype(np.float64))
    expected = dy - p * dy.sum(axis=-1, keepdims=True, dtype=np.float64)
    actual = xp.numpy(ps.log_softmax_vjp(log_y, xp.asarray(dy)))
    np.testing.assert_allclose(actual, expected, atol=64 * eps(dtype))


@given(case=logits(), seed=st.integers(0, 99))
def test_vjps_against_finite_differences(xp, case, seed):
    x, axis, _ = case
    assume(x.size)
    x = x.astype(np.float64)
    rng = np.random.default_rng(seed)
    dy, direction = rng.normal(size=x.shape), rng.normal(size=x.shape)
    for f, vjp in ((ps.softmax, ps.softmax_vjp), (ps.log_softmax, ps.log_softmax_vjp)):
        above = xp.numpy(f(xp.asarray(x + 1e-5 * direction), axis=axis))
        below = xp.numpy(f(xp.asarray(x - 1e-5 * direction), axis=axis))
        slope = ((above - below) / 2e-5 * dy).sum()
        grad = xp.numpy(vjp(f(xp.asarray(x), axis=axis), xp.asarray(dy), axis=axis))
        np.testing.assert_allclose((grad * direction).sum(), slope, rtol=1e-5, atol=1e-6)


@given(case=logits(), seed=st.integers(0, 99))
def test_cross_entropy_is_minus_log_softmax_at_the_label(xp, case, seed):
    x, _, dtype = case
    labels = np.random.default_rng(seed).integers(x.shape[-1], size=x.shape[:-1])
    arguments = (xp.asarray(x), xp.asarray(labels))
    loss, grad = ps.cross_entropy_value_and_grad(*arguments, reduction="none")
    log_y = xp.numpy(ps.log_softmax(xp.asarray(x)))
    expected = -np.take_along_axis(log_y, labels[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(xp.numpy(loss), expected, rtol=8 * eps(dtype), atol=1e-37)
    np.testing.assert_allclose(xp.numpy(grad).sum(axis=-1), 0.0, atol=8 * eps(dtype))


# --------------------------------------------------------------------------- the loss, in full


@st.composite
def losses(draw):
    """Everything that cross_entropy takes, with rows that hold infinities, nans and ties."""
    n = draw(st.sampled_from((1, 3, 4)))
    batch = draw(st.sampled_from(((), (1,), (3,), (2, 2))))
    axis = draw(st.integers(0, len(batch)))
    x = arrays(draw, (*batch, n), dtype=draw(st.sampled_from(("float32", "float64", "float64"))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()) and x.size:
        bad = rng.choice([np.nan, -np.inf, np.inf, -np.inf], size=x.shape)
        x = np.where(rng.random(x.shape) < 0.15, bad.astype(x.dtype), x)
    kind = draw(st.sampled_from(("index", "index", "one-hot", "probabilities")))
    ignore = draw(st.sampled_from((None, -100, 0, n))) if kind == "index" else None
    labels = rng.integers(n, size=batch)
    mask = np.ones((*batch, n), bool)
    if draw(st.booleans()):
        mask = rng.random(mask.shape) < 0.7
        np.put_along_axis(mask, labels[..., None], True, axis=-1)
    if kind == "index":
        t = np.eye(n)[labels]
        if ignore is not None:
            labels = np.where(rng.random(batch) < 0.4, ignore, labels)
        given_labels = labels.astype(draw(st.sampled_from(("int16", "int32", "int64"))))
    elif kind == "one-hot":
        t = given_labels = np.eye(n)[labels]
    else:
        t = given_labels = rng.random((*batch, n)) * (rng.random((*batch, n)) < 0.7)
    weight = rng.choice([0.0, 0.5, 1.0, 2.0], size=n) if draw(st.booleans()) else None
    return {
        "x": x,
        "labels": given_labels,
        "t": t,
        "counted": labels != ignore if kind == "index" and ignore is not None else None,
        "index": labels if kind == "index" else None,
        "mask": mask,
        "axis": axis,
        "weight": weight,
        "ignore_index": ignore,
        "label_smoothing": draw(st.sampled_from((0.0, 0.1, 1.0))),
        "z_loss": draw(st.sampled_from((0.0, 0.25))),
        "softcap": draw(st.sampled_from((None, 5.0))),
        "reduction": draw(st.sampled_from(("mean", "sum", "none"))),
    }


def expected_loss(case):
    """Apply the model to each position, then reduce."""
    batch, n = case["x"].shape[:-1], case["x"].shape[-1]
    weight = np.ones(n) if case["weight"] is None else case["weight"]
    loss, grad = np.zeros(batch, model.WIDE), np.zeros((*batch, n), model.WIDE)
    divisor = model.WIDE(0)
    for at in np.ndindex(batch):
        if case["counted"] is not None and not case["counted"][at]:
            continue
        loss[at], grad[at] = model.cross_entropy_row(
            case["x"][at],
            case["t"][at],
            weight=weight,
            smoothing=case["label_smoothing"],
            z_loss=case["z_loss"],
            softcap=case["softcap"],
            mask=case["mask"][at],
        )
        divisor += 1 if case["index"] is None else weight[case["index"][at]]
    if case["reduction"] == "none":
        return loss, grad
    with np.errstate(all="ignore"):
        total = loss.sum()
        if case["reduction"] == "sum":
            return total, grad
        return (total / divisor, grad / divisor) if divisor else (model.WIDE(np.nan), grad * 0)


@pytest.mark.slow("XLA compiles each example", "jax")
@settings(max_examples=10 * settings.default.max_examples)
@given(case=losses())
def test_cross_entropy_with_any_options(xp, case):
    """Loss and gradient agree with the model, infinities and nans included."""
    axis = case["axis"]

    def along(a):
        return np.ascontiguousarray(np.moveaxis(a, -1, axis)) if a.ndim == case["x"].ndim else a

    options = {
        name: case[name]
        for name in ("axis", "ignore_index", "label_smoothing", "z_loss", "softcap", "reduction")
    }
    labels = case["labels"] if case["index"] is not None else along(case["labels"])
    arguments = {"logits": xp.asarray(along(case["x"])), "labels": xp.asarray(labels)}
    if case["weight"] is not None:
        arguments["weight"] = xp.asarray(case["weight"])
    if not case["mask"].all():
        arguments["where"] = xp.asarray(along(case["mask"]))

    @xp.program
    def answer(logits, labels, **more):
        return ps.cross_entropy_value_and_grad(logits, labels, **options, **more)

    loss, grad = answer(**arguments)
    want, slope = expected_loss(case)
    loss, grad = xp.numpy(loss), np.moveaxis(xp.numpy(grad), axis, -1)
    finite = bool(np.isfinite(case["x"][case["mask"]]).all())
    scale = eps(case["x"].dtype)
    np.testing.assert_allclose(loss, want.astype(float), rtol=64 * scale, atol=64 * scale)
    if finite:
        np.testing.assert_allclose(grad, slope.astype(float), rtol=4096 * scale, atol=64 * scale)
    if case["counted"] is not None:
        assert (grad[~np.broadcast_to(case["counted"], grad.shape[:-1])] == 0).all()
    assert (grad[~case["mask"]] == 0).all()


@pytest.mark.parametrize("function", [ps.softmax, ps.log_softmax, ps.logsumexp])
@given(case=logits(), seed=st.integers(0, 99))
def test_rows_do_not_touch_each_other(xp, function, case, seed):
    """Infinities and nans in one row leave every other row as it was, bit for bit."""
    x, _, _ = case
    assume(x.ndim > 1 and x.shape[0] > 1)
    dirty = x.copy()
    dirty[0] = np.random.default_rng(seed).choice([np.nan, np.inf, -np.inf], size=x[0].shape)
    clean = xp.numpy(function(xp.asarray(x), axis=-1))
    np.testing.assert_array_equal(xp.numpy(function(xp.asarray(dirty), axis=-1))[1:], clean[1:])
