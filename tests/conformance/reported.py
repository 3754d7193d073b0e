"""Faults reported upstream: what ours answers on every backend, and what the installed peer does.

    python -m pytest tests/conformance/reported.py [--backend numpy,torch]

Each report is a line of `REPORTS`, in our own words, with the exact answer. A test of a peer is
expected to fail, strictly, where the peer of today answers as reported: a peer that is mended fails
the test, and its mark goes. `tests/reported_table.py` writes docs/reported.md from a run.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
from backends import Backend
from mpmath import mp, mpf

import portable_softmax as ps

# The logit of the reports of September 2026: 1 - exp(-Z) rounds to 1 in float64.
Z = 37.42994775023705
# The derivative of the sigmoid there, which is a normal number.
TAIL = float(1 / (1 + mp.exp(mpf(Z))))
SLOPE = float(1 / (1 + mp.exp(mpf(Z))) / (1 + mp.exp(-mpf(Z))))
INF = np.inf


class Report(NamedTuple):
    """One fault."""

    name: str
    link: str
    what: str
    expected: Any
    ours: Callable[[Backend], Any]
    peer: Callable[[], Any] | None
    library: str
    """The distribution that the peer is part of."""
    rtol: float = 1e-15


# --- What is asked of ours ----------------------------------------------------------------------


def gradient(function: Callable[..., Any], logits: Any, labels: Any, **options: Any) -> Any:
    return lambda xp: function(xp.asarray(logits), xp.asarray(np.asarray(labels)), **options)[1]


def pulled(vjp: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda xp: vjp(function(xp.asarray([Z, 0.0])), xp.asarray([1.0, 0.0]))


def jacobian(xp: Backend) -> Any:
    return ps.softmax_jacobian(ps.softmax(xp.asarray([Z, 0.0])))


def sigmoid_cross_entropy(xp: Backend) -> Any:
    logits, labels = xp.asarray([40.0, -40.0]), xp.asarray([1.0, 0.0])
    return ps.sigmoid_cross_entropy(logits, labels, reduction="none")


def masked_cross_entropy_gradient(xp: Backend) -> Any:
    logits, labels = xp.asarray([-INF, 0.0, 0.0]), xp.asarray([0.0, 1.0, 0.0])
    if xp.library == "jax":  # in forward mode, as reported
        return importlib.import_module("jax").jacfwd(ps.cross_entropy)(logits, labels)
    return ps.cross_entropy_value_and_grad(logits, labels)[1]


def masked_divergence(xp: Backend) -> Any:
    return ps.kl_divergence(xp.asarray([[-INF, 0.0, 1.0]]), xp.asarray([[-INF, 1.0, 0.0]]))


def shifted_cross_entropy(xp: Backend) -> Any:
    logits = xp.asarray(np.full((1, 3), 1e8, np.float32))
    return ps.cross_entropy(logits, xp.asarray(np.asarray([0])))


# --- What is asked of the peers -----------------------------------------------------------------


def of_torch(function: Callable[..., Any], logits: Any, upstream: Any = 1.0) -> Callable[[], Any]:
    """Return the gradient of a function of torch's at float64 logits."""

    def gradient() -> Any:
        torch = importlib.import_module("torch")
        x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
        y = function(torch, x) * torch.tensor(upstream, dtype=torch.float64)
        return torch.autograd.grad(y.sum(), x)[0].numpy()

    return gradient


def _sigmoid_loss(torch: Any, x: Any, reduction: str = "sum") -> Any:
    labels = torch.tensor([1.0, 0.0], dtype=torch.float64)
    function = torch.nn.functional.binary_cross_entropy_with_logits
    return function(x, labels, reduction=reduction)


def _slope_of_logsigmoid(torch: Any, x: Any) -> Any:
    return torch.autograd.grad(torch.nn.functional.logsigmoid(x), x, create_graph=True)[0]


def torch_sigmoid_losses() -> Any:
    torch = importlib.import_module("torch")
    return _sigmoid_loss(torch, torch.tensor([40.0, -40.0]).double(), "none").numpy()


torch_softmax = of_torch(lambda torch, x: torch.softmax(x, -1), [Z, 0.0], [1.0, 0.0])
torch_log_softmax = of_torch(lambda torch, x: torch.log_softmax(x, -1), [Z, 0.0], [1.0, 0.0])
torch_cross_entropy = of_torch(
    lambda torch, x: torch.nn.functional.cross_entropy(x, torch.tensor([0])), [[Z, 0.0]]
)


def tensorflow_cross_entropy() -> Any:
    tf = importlib.import_module("tensorflow")
    x = tf.Variable([[Z, 0.0]], dtype=tf.float64)
    labels = tf.constant([[1.0, 0.0]], dtype=tf.float64)
    with tf.GradientTape() as tape:
        loss = tf.nn.softmax_cross_entropy_with_logits(labels=labels, logits=x)
    return tape.gradient(loss, x).numpy()


def optax_masked() -> Any:
    jax, optax = importlib.import_module("jax"), importlib.import_module("optax")
    logits, labels = jax.numpy.asarray([-INF, 0.0, 0.0]), jax.numpy.asarray([0.0, 1.0, 0.0])
    return jax.jacfwd(optax.safe_softmax_cross_entropy)(logits, labels)


def optax_divergence() -> Any:
    jax, optax = importlib.import_module("jax"), importlib.import_module("optax")
    log_q = jax.nn.log_softmax(jax.numpy.asarray([-INF, 1.0, 0.0]))
    return optax.losses.kl_divergence(log_q, jax.nn.softmax(jax.numpy.asarray([-INF, 0.0, 1.0])))


def optax_shifted() -> Any:
    jnp, optax = importlib.import_module("jax.numpy"), importlib.import_module("optax")
    logits = jnp.full((1, 3), 1e8, jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray([0])).mean()


# --- The reports --------------------------------------------------------------------------------


def of(repository: str, page: str, number: str, *others: Any, **more: Any) -> Report:
    library = repository.partition("/")[2]
    link = f"https://github.com/{repository}/{page}/{number.partition(',')[0]}"
    more = {"library": {"pytorch": "torch"}.get(library, library)} | more
    return Report(f"{library} {number}", link, *others, **more)


torch_report = partial(of, "pytorch/pytorch", "issues")
optax_report = partial(of, "google-deepmind/optax", "pull")
cross_entropy_gradient = partial(gradient, ps.cross_entropy_value_and_grad, [[Z, 0.0]])
REPORTS = (
    torch_report(
        "195529",
        "the binary cross-entropy of a confident logit is 0 for -40 and the label 0",
        [float(mp.log1p(mp.exp(-40)))] * 2,
        sigmoid_cross_entropy,
        torch_sigmoid_losses,
    ),
    torch_report(
        "195677",
        "the gradient of a confident binary cross-entropy is 0 at the label 1",
        [-TAIL, TAIL],
        gradient(ps.sigmoid_cross_entropy_value_and_grad, [Z, -Z], [1.0, 0.0], reduction="sum"),
        of_torch(_sigmoid_loss, [Z, -Z]),
    ),
    torch_report(
        "195678",
        "the gradient of a confident cross-entropy is 0 at its label",
        [[-TAIL, TAIL]],
        cross_entropy_gradient([0]),
        torch_cross_entropy,
    ),
    torch_report(
        "195679",
        "the second derivative of logsigmoid is 0 for a large logit; with the sign changed, it is "
        "an entry of the Jacobian of the softmax of [x, 0]",
        -SLOPE,
        lambda xp: -jacobian(xp)[0, 0],
        of_torch(_slope_of_logsigmoid, Z),
    ),
    torch_report(
        "195680",
        "the gradient through a confident log_softmax is 0 at the maximum",
        [TAIL, -TAIL],
        pulled(ps.log_softmax_vjp, ps.log_softmax),
        torch_log_softmax,
    ),
    torch_report(
        "195681",
        "the derivative of the sigmoid is 0 for a large logit; it is an entry of the Jacobian of "
        "the softmax of [x, 0]",
        SLOPE,
        lambda xp: jacobian(xp)[0, 0],
        of_torch(lambda torch, x: torch.sigmoid(x), Z),
    ),
    torch_report(
        "195684",
        "the gradient through a confident softmax is 0 at the maximum: by softmax_vjp",
        [SLOPE, -SLOPE],
        pulled(ps.softmax_vjp, ps.softmax),
        torch_softmax,
    ),
    torch_report(
        "195684, Jacobian",
        "the same gradient, a row of softmax_jacobian",
        [SLOPE, -SLOPE],
        lambda xp: jacobian(xp)[0, :],
        torch_softmax,
    ),
    of(
        "tensorflow/tensorflow",
        "issues",
        "126634",
        "the gradient of a confident cross-entropy with a distribution is 0 at its class",
        [[-TAIL, TAIL]],
        cross_entropy_gradient([[1.0, 0.0]]),
        tensorflow_cross_entropy,
    ),
    optax_report(
        "1762",
        "the derivative in forward mode is nan where a logit of -inf has the probability 0",
        [0.0, -0.5, 0.5],
        masked_cross_entropy_gradient,
        optax_masked,
    ),
    optax_report(
        "1786",
        "the divergence of two distributions is nan where both give a class the probability 0",
        float(mp.tanh(mpf(1) / 2)),
        masked_divergence,
        optax_divergence,
    ),
    optax_report(
        "1792",
        "the loss of three equal logits of 1e8 in float32 is 0",
        float(mp.log(3)),
        shifted_cross_entropy,
        optax_shifted,
        rtol=1e-6,
    ),
)

# Named beside these, and no test here: why.
UNTESTED = {
    "scipy 23670": "logsumexp of SciPy 1.16 takes longer than before; `python -m bench` times both",
    "pytorch 195682": "the second derivative of SiLU, which is no function of this family",
    "pytorch 195683": "its text was not found",
    "Liger-Kernel 1329": "its text was not found",
}


every_report = pytest.mark.parametrize("report", [pytest.param(r, id=r.name) for r in REPORTS])


def check(answer: Any, report: Report) -> None:
    answer = np.asarray(answer)
    expected = np.asarray(report.expected, answer.dtype)
    np.testing.assert_allclose(answer, expected, rtol=report.rtol, atol=0, strict=True)


@every_report
def test_ours(xp, report):
    check(xp.numpy(report.ours(xp)), report)


@every_report
def test_peer(report, request, record_property):
    if importlib.util.find_spec(report.library) is None:
        pytest.skip(f"{report.library} is not installed")
    answer = np.asarray(report.peer())
    version = importlib.metadata.version(report.library)
    record_property("peer", f"{report.library} {version}")
    record_property("answer", np.array2string(answer, precision=4, separator=", "))
    reason = f"{report.library} answers as reported"
    request.applymarker(pytest.mark.xfail(reason=reason, strict=True, raises=AssertionError))
    check(answer, report)
