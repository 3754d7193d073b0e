"""The derivatives that a library finds, against exact ones, beside logits at any distance.

What cancels in a formula or is rounded before an exponential shows here: an error of one unit
of a large term is many units of what is left.
"""

from __future__ import annotations

import numpy as np
import pytest
from test_family import gradient

import portable_softmax as ps

pytestmark = pytest.mark.run_on("libraries", "paths", "torch-portable")

N, LABEL = 6, 2
WIDEST = {"float32": 60.0, "float64": 300.0}
# Units for each of the span of a row: where the library differentiates the formulas itself; where
# an exponential is taken of a logarithm or a difference that was rounded; else.
BY_FORMULAS, ROUNDED, EXACT = 2.0, 0.5, 0.0
FORMULAS = ("torch-portable", "mlx")


@pytest.fixture(autouse=True)
def _only_libraries_that_differentiate(xp):
    if not xp.differentiates:
        pytest.skip(f"{xp.name} does not differentiate")


def rows(dtype):
    """Return rows near each other and far apart, near 0 and far from it, equal and confident."""
    rng, far = np.random.default_rng(45), WIDEST[dtype]
    plain = rng.normal(size=(8, N))
    above, below = plain.copy(), plain.copy()
    above[:, 3] += np.linspace(far / 10, far, 8)
    below[:, 4] -= np.linspace(far / 10, far, 8)
    over_equal = np.full((8, N), -0.3)
    over_equal[:, 1] = np.linspace(2, far, 8)
    spread = rng.uniform(-far, 0, (8, N))
    parts = [plain, 10 * plain, above, below, over_equal, spread, np.round(3 * plain) + 1000]
    parts += [plain + far**2, plain - far**2, rng.integers(-1, 2, (8, N)), np.ones((1, N))]
    return np.concatenate(parts).astype(dtype)


def upstream(shape):
    """Numbers that are not close to each other."""
    rng = np.random.default_rng(46)
    return rng.permuted(np.broadcast_to(np.arange(-2.0, N - 2), shape), axis=1)


def probabilities(x):
    p = np.exp(x - x.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def logs(x):
    """Return the logarithms of probabilities, of the greatest from what the others sum to."""
    d = x - x.max(axis=1, keepdims=True)
    others = np.exp(d)
    others[np.arange(len(x)), x.argmax(axis=1)] = 0
    return d - np.log1p(others.sum(axis=1, keepdims=True))


def through_softmax(p, dy):
    """Return y_j y_k (dy_j - dy_k)."""
    return p[:, :, None] * p[:, None] * (dy[:, :, None] - dy[:, None])


# Each function takes logits, and more of them; beside it is what to sum, over the last axis, for
# the gradient of its sum with the upstream gradients `dy`, or of its sum without.
CASES = {}


def case(function, units=EXACT):
    def add(terms):
        CASES[terms.__name__] = function, terms, units
        return terms

    return add


@case(lambda x, _, dy: ps.softmax(x) * dy)
def softmax(x, _, dy):
    return through_softmax(probabilities(x), dy)


@case(lambda x, sink, dy: ps.softmax(x, sink=sink[:, :1]) * dy)
def softmax_beside_a_sink(x, sink, dy):
    p = probabilities(np.concatenate([x, sink[:, :1]], axis=1))
    dy = np.concatenate([dy, np.zeros_like(dy[:, :1])], axis=1)
    return through_softmax(p, dy)[:, :N]


@case(lambda x, _, dy: ps.log_softmax(x) * dy, ROUNDED)
def log_softmax(x, _, dy):
    return _less_probabilities(dy, probabilities(x), dy)


@case(lambda x, sink, dy: ps.log_softmax(x, sink=sink[:, :1]) * dy, ROUNDED)
def log_softmax_beside_a_sink(x, sink, dy):
    p = probabilities(np.concatenate([x, sink[:, :1]], axis=1))[:, :N]
    return _less_probabilities(dy, p, dy)


def _less_probabilities(q, p, of):
    """Return q_j - p_j of_k."""
    return np.concatenate([q[..., None], -p[..., None] * of[:, None]], axis=2)


@case(lambda x, _, dy: ps.logsumexp(x, axis=1))
def logsumexp(x, _, dy):
    return probabilities(x)[..., None]


@case(lambda x, _, dy: ps.logsumexp(x, axis=1, where=dy > -2))
def logsumexp_where(x, _, dy):
    return probabilities(np.where(dy > -2, x, -np.inf))[..., None]


@case(lambda x, _, dy: ps.logmeanexp(x, axis=1))
def logmeanexp(x, _, dy):
    return probabilities(x)[..., None]


@case(lambda x, _, dy: ps.logcumsumexp(x) * dy, ROUNDED)
def logcumsumexp(x, _, dy):
    terms = np.zeros((len(x), N, N), np.longdouble)
    for i in range(N):
        terms[:, : i + 1, i] = probabilities(x[:, : i + 1]) * dy[:, i : i + 1]
    return terms


@case(lambda x, _, dy: ps.cross_entropy(x, _labels(dy), reduction="sum"))
def cross_entropy(x, _, dy):
    p = probabilities(x)
    others = p[:, None] * np.where(np.arange(N) == LABEL, 0, 1)
    label = (np.arange(N) == LABEL)[None, :, None]
    return np.where(label, -others, p[..., None] * np.eye(N)[:, :1].T)


@case(lambda x, _, dy: ps.cross_entropy(x, _labels(dy), reduction="sum", label_smoothing=0.125))
def cross_entropy_with_smoothing(x, _, dy):
    q = np.where(np.arange(N) == LABEL, 0.875, 0.0) + np.longdouble(0.125) / N
    return np.stack([probabilities(x), np.broadcast_to(-q, x.shape)], axis=2)


@case(lambda x, _, dy: ps.cross_entropy(x, abs(dy) / 8, reduction="sum"))
def cross_entropy_of_a_distribution(x, _, dy):
    q = abs(dy) / 8
    return np.stack([probabilities(x) * q.sum(axis=1, keepdims=True), -q], axis=2)


@case(lambda x, _, dy: ps.entropy(x), ROUNDED)
def entropy(x, _, dy):
    p, log_p = probabilities(x), logs(x)
    h = -(p * log_p).sum(axis=1, keepdims=True)
    # One unit of the whole is what a library's own derivative of the formula is off by.
    return np.stack([-p * log_p, -p * h, p, -p], axis=2)


@case(lambda x, y, dy: ps.kl_divergence(x, y, reduction="sum"), ROUNDED)
def divergence_by_p(x, y, dy):
    p, log_p, log_q = probabilities(x), logs(x), logs(y)
    k = (p * (log_p - log_q)).sum(axis=1, keepdims=True)
    scale = (p * (abs(log_p) + abs(log_q))).sum(axis=1, keepdims=True)
    terms = p * log_p, -p * log_q, -p * k, p * scale, -p * scale
    return np.stack(terms, axis=2)


@case(lambda x, y, dy: ps.kl_divergence(y, x, reduction="sum"), ROUNDED)
def divergence_by_q(x, y, dy):
    return np.stack([probabilities(x), -probabilities(y)], axis=2)


@case(lambda x, y, dy: ps.sigmoid_cross_entropy(x, abs(dy) / 4, reduction="sum"))
def sigmoid_cross_entropy(x, y, dy):
    e = np.exp(-abs(x))
    return np.stack([np.where(x > 0, 1, e) / (1 + e), -abs(dy) / 4], axis=2)


def _labels(dy):
    """Return the label of each row, as integers of the library of an array."""
    import array_api_compat

    xp = array_api_compat.array_namespace(dy)
    return xp.full(dy.shape[:1], LABEL, dtype=xp.int32)


@pytest.mark.slow("XLA compiles each derivative", "jax", "jax-numba")
@pytest.mark.parametrize("dtype", WIDEST)
@pytest.mark.parametrize("name", CASES)
def test_a_derivative_keeps_its_digits_at_any_distance(xp, name, dtype):
    function, terms, units = CASES[name]
    x = rows(dtype)
    more, dy = np.random.default_rng(47).normal(size=x.shape).astype(dtype), upstream(x.shape)
    wanted = terms(x.astype(np.longdouble), more.astype(np.longdouble), dy)
    given = xp.asarray(more, dtype), xp.asarray(dy, dtype)
    (found,) = gradient(xp, lambda x: function(x, *given).sum(), x)
    units = BY_FORMULAS if xp.name in FORMULAS else units
    bound = (16 + units * np.ptp(x, axis=1)[:, None]) * np.finfo(dtype).eps
    bound = bound * np.abs(wanted).sum(axis=2) + 8 * np.finfo(dtype).tiny
    assert found.dtype == dtype
    off = np.abs(found - wanted.sum(axis=2)) > bound
    assert not off.any(), (x[off.any(axis=1)], found[off], wanted.sum(axis=2)[off])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_the_derivative_of_a_focal_loss_beside_infinities(xp, gamma):
    """The weight of an entry that is infinitely wrong is 1, whatever the loss is."""
    z = np.asarray([np.inf, -np.inf, np.inf, -np.inf, 3e38, -3e38], "float32")
    labels = xp.asarray([1, 0, 0, 1, 0, 1], "float32")
    options = {"focal_gamma": gamma, "reduction": "sum"}
    (found,) = gradient(xp, lambda z: ps.sigmoid_cross_entropy(z, labels, **options), z)
    np.testing.assert_array_equal(found, [0, 0, 1, -1, 1, -1])
