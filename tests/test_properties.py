"""Properties that hold for every input, searched by hypothesis on every backend.

``--hypothesis-profile thorough`` searches 1,000 examples of each property instead of 30.
"""

from __future__ import annotations

import numpy as np
import pytest
from asserts import assert_like
from hypothesis import assume, given
from hypothesis import strategies as st

import portable_softmax as ps

pytestmark = [
    pytest.mark.run_on("paths"),
    pytest.mark.slow("Triton interprets element by element", "triton"),
]

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
