"""The same operations in other libraries, behind the same call.

A function below turns an axis and a reduction into a table: operation -> function of (x, second),
where the second is the labels, or the upstream gradient. What a library does not offer is not in
its table. A library is imported by its own functions only.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from bench.places import Place

Call = Callable[[Any, Any], Any]
Offer = Mapping[str, Call]

FORWARD = ("softmax", "log_softmax", "logsumexp")
SPARSE = ("entmax", "sparsemax")
LOSSES = ("cross_entropy", "cross_entropy_value_and_grad")
# The result, and the gradient of its product with an upstream gradient.
BACKWARD = tuple(f"{operation}+backward" for operation in FORWARD)
BACKWARD_OF_SPARSE = tuple(f"{operation}+backward" for operation in SPARSE)
OPERATIONS = (*FORWARD, *LOSSES, *BACKWARD)
# The rest of the family, and what an operation takes beside x.
LABELS, WEIGHTED, YES_OR_NO, LOGITS = "labels", "labels and weights", "yes or no", "logits"
FAMILY = {
    "softmax_with_sink": "",
    "entmax": "",
    "sparsemax": "",
    "entmax_loss": LABELS,
    "sparsemax_loss": LABELS,
    "sigmoid_cross_entropy": YES_OR_NO,
    "sigmoid_focal": YES_OR_NO,
    "kl_divergence": LOGITS,
    "entropy": "",
    "logmeanexp": "",
    "logcumsumexp": "",
    "cross_entropy_weighted": WEIGHTED,
    "cross_entropy_in_float32": LABELS,
}
# Those whose value and gradients are measured, too.
GRADIENTS = ("entropy", "kl_divergence", "sigmoid_cross_entropy")
BACKWARD_OF_FAMILY = tuple(f"{operation}+backward" for operation in GRADIENTS)
FOCAL_GAMMA = 2.0
# What `speed` times beside OPERATIONS, where it is asked to.
TIMED = (
    *(name for name, second in FAMILY.items() if second != WEIGHTED and "float32" not in name),
    *(*BACKWARD_OF_SPARSE, *BACKWARD_OF_FAMILY),
)

NUMPY_BY_HAND = "numpy by hand"
SCIPY = "scipy.special"
TORCH = "torch"
TORCH_COMPILED = "torch, compiled"
ENTMAX = "entmax"
OPTAX = "optax, jit"


def numpy_by_hand(axis: int, reduction: str) -> Offer:
    """Return the usual NumPy code."""

    def softmax(x, _):
        e = np.exp(x - x.max(axis, keepdims=True))
        return e / e.sum(axis, keepdims=True)

    def logsumexp(x, _):
        m = x.max(axis, keepdims=True)
        return np.log(np.exp(x - m).sum(axis)) + m.squeeze(axis)

    def log_softmax(x, _):
        shifted = x - x.max(axis, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis, keepdims=True))

    def reduced(loss):
        return loss.mean() if reduction == "mean" else loss

    def at(t):
        return np.expand_dims(t, axis)

    def cross_entropy(x, t):
        return reduced(-np.take_along_axis(log_softmax(x, t), at(t), axis).squeeze(axis))

    def value_and_grad(x, t):
        grad = softmax(x, t)
        label = np.take_along_axis(grad, at(t), axis)
        np.put_along_axis(grad, at(t), label - 1, axis)
        if reduction == "mean":
            grad /= t.size
        return reduced(-np.log(label).squeeze(axis)), grad

    def softmax_backward(x, dy):
        y = softmax(x, None)
        return y, y * (dy - (y * dy).sum(axis, keepdims=True))

    def log_softmax_backward(x, dy):
        log_y = log_softmax(x, None)
        return log_y, dy - np.exp(log_y) * dy.sum(axis, keepdims=True)

    def logsumexp_backward(x, dy):
        return logsumexp(x, None), np.expand_dims(dy, axis) * softmax(x, None)

    return {
        "softmax": softmax,
        "log_softmax": log_softmax,
        "logsumexp": logsumexp,
        "cross_entropy": cross_entropy,
        "cross_entropy_value_and_grad": value_and_grad,
        "softmax+backward": softmax_backward,
        "log_softmax+backward": log_softmax_backward,
        "logsumexp+backward": logsumexp_backward,
    }


def scipy_special(axis: int, reduction: str) -> Offer:
    """Return scipy.special's functions, and the loss that users build from them."""
    from scipy import special

    def cross_entropy(x, t):
        log_p = special.log_softmax(x, axis=axis)
        loss = -np.take_along_axis(log_p, np.expand_dims(t, axis), axis).squeeze(axis)
        return loss.mean() if reduction == "mean" else loss

    def kl_divergence(x, y):
        p, q = special.softmax(x, axis=axis), special.softmax(y, axis=axis)
        each = special.rel_entr(p, q).sum(axis)
        return each.mean() if reduction == "mean" else each

    return {
        "softmax": lambda x, _: special.softmax(x, axis=axis),
        "log_softmax": lambda x, _: special.log_softmax(x, axis=axis),
        "logsumexp": lambda x, _: special.logsumexp(x, axis=axis),
        "cross_entropy": cross_entropy,
        "cross_entropy_in_float32": lambda x, t: cross_entropy(x.astype(np.float32), t),
        "kl_divergence": kl_divergence,
        "entropy": lambda x, _: special.entr(special.softmax(x, axis=axis)).sum(axis),
        "logmeanexp": lambda x, _: special.logsumexp(x, axis=axis) - np.log(x.shape[axis]),
    }


def sklearn_extmath(axis: int, reduction: str) -> Offer:
    """Return scikit-learn's softmax, which takes rows only."""
    from sklearn.utils.extmath import softmax

    return {"softmax": lambda x, _: softmax(x)} if axis in (-1, 1) else {}


def torch_autograd(offer: Offer) -> Offer:
    """Return forward and backward through torch's autograd, of functions of torch's tensors."""
    import torch

    def through(call, x, second, upstream):
        x = x.detach().requires_grad_()
        y = call(x, second)
        (grad,) = torch.autograd.grad(y, x, upstream(y))
        return y.detach(), grad

    def of_both(call, x, second):
        given = [a.detach().requires_grad_() for a in (x, second)]
        y = call(*given)
        return y.detach(), *torch.autograd.grad(y, given)

    return _both_ways(offer, through, torch.ones_like, of_both)


def _both_ways(
    offer: Offer,
    through: Callable[..., Any],
    ones: Callable[[Any], Any],
    of_both: Callable[..., Any],
) -> Offer:
    """Return forward and backward of what an offer has, by `through`.

    That of a divergence has the gradients by both of its arrays, by `of_both`.
    """
    found: dict[str, Call] = {
        f"{name}+backward": lambda x, dy, name=name: through(offer[name], x, None, lambda _: dy)
        for name in (*FORWARD, *SPARSE)
        if name in offer
    }
    for name in GRADIENTS:
        if name in offer and name == "kl_divergence":
            found[f"{name}+backward"] = partial(of_both, offer[name])
        elif name in offer:
            found[f"{name}+backward"] = lambda x, second, name=name: through(
                offer[name], x, second, ones
            )
    if "cross_entropy" in offer:
        found["cross_entropy_value_and_grad"] = lambda x, t: through(
            offer["cross_entropy"], x, t, ones
        )
    return found


def torch_eager(axis: int, reduction: str) -> Offer:
    """Return torch's functions, run eagerly."""
    offer = _torch(axis, reduction)
    return offer | torch_autograd(offer)


def torch_compiled(axis: int, reduction: str) -> Offer:
    """Return torch's functions, compiled for the shapes that they meet."""
    offer = compiled(_torch(axis, reduction))
    return offer | torch_autograd(offer)


def _torch(axis: int, reduction: str) -> dict[str, Call]:
    import torch
    from torch.nn import functional

    def cross_entropy(x, t):
        return functional.cross_entropy(x.movedim(axis, -1), t, reduction=reduction)

    def reduced(each):
        return each.mean() if reduction == "mean" else each

    def with_sink(x, _):
        sink = torch.zeros_like(x.narrow(axis, 0, 1))
        return torch.softmax(torch.cat([x, sink], axis), axis).narrow(axis, 0, x.shape[axis])

    def binary(x, t):
        return functional.binary_cross_entropy_with_logits(x, t, reduction=reduction)

    def focal(x, t):  # as torchvision's
        p, each = torch.sigmoid(x), functional.binary_cross_entropy_with_logits
        missed = 1 - (p * t + (1 - p) * (1 - t))
        return reduced(each(x, t, reduction="none") * missed**FOCAL_GAMMA)

    def kl_divergence(x, y):
        logs = torch.log_softmax(y, axis), torch.log_softmax(x, axis)
        return reduced(functional.kl_div(*logs, reduction="none", log_target=True).sum(axis))

    def weighted(x, both):
        t, w = both
        return functional.cross_entropy(x.movedim(axis, -1), t, reduction="none") * w

    return {
        "softmax": lambda x, _: torch.softmax(x, axis),
        "log_softmax": lambda x, _: torch.log_softmax(x, axis),
        "logsumexp": lambda x, _: torch.logsumexp(x, axis),
        "cross_entropy": cross_entropy,
        "softmax_with_sink": with_sink,
        "sigmoid_cross_entropy": binary,
        "sigmoid_focal": focal,
        "kl_divergence": kl_divergence,
        "entropy": lambda x, _: torch.special.entr(torch.softmax(x, axis)).sum(axis),
        "logmeanexp": lambda x, _: torch.logsumexp(x, axis) - math.log(x.shape[axis]),
        "logcumsumexp": lambda x, _: torch.logcumsumexp(x, axis),
        "cross_entropy_weighted": weighted,
        "cross_entropy_in_float32": lambda x, t: cross_entropy(x.float(), t),
    }


def entmax_package(axis: int, reduction: str) -> Offer:
    """Return what the package entmax computes by sorting."""
    import entmax

    def loss(each):
        return lambda x, t: each(x, t).mean() if reduction == "mean" else each(x, t)

    losses = {
        "entmax_loss": loss(entmax.entmax15_loss),
        "sparsemax_loss": loss(entmax.sparsemax_loss),
    }
    return _sparse(entmax.entmax15, entmax.sparsemax, axis) | losses


def entmax_of_top_classes(axis: int, reduction: str) -> Offer:
    """Return the same with the first guess that its documentation offers for many classes."""
    import entmax

    return _sparse(entmax.entmax15, entmax.sparsemax, axis, k=100)


def entmax_by_bisection(axis: int, reduction: str) -> Offer:
    """Return what the package entmax computes by bisection, of any alpha."""
    import entmax

    return _sparse(partial(entmax.entmax_bisect, alpha=1.5), entmax.sparsemax_bisect, axis)


def _sparse(entmax: Call, sparsemax: Call, axis: int, **options: Any) -> dict[str, Call]:
    """Return two functions of the package, forward and backward, that say what they are."""
    offer: dict[str, Call] = {
        name: lambda x, _, function=function: function(x, dim=axis, **options)
        for name, function in (("entmax", entmax), ("sparsemax", sparsemax))
    }
    both = {**offer, **torch_autograd(offer)}
    for name, call in both.items():
        function = entmax if name.startswith("entmax") else sparsemax
        call.of = getattr(function, "func", function).__name__  # type: ignore[attr-defined]
    return both


def compiled(offer: Offer) -> dict[str, Call]:
    """Wrap torch.compile around each call; static shapes give the fastest code."""
    import torch

    return {name: torch.compile(call, dynamic=False) for name, call in offer.items()}


def why_not_compiled(place: Place) -> str:
    """Why torch.compile can't work on a place; empty where it can."""
    if place.device_name.startswith("cuda"):
        return "" if importlib.util.find_spec("triton") else "triton is not installed"
    names = (os.environ.get("CXX", ""), "g++", "c++", "clang++")
    return "" if any(shutil.which(name) for name in names if name) else "no C++ compiler"


def jax_autograd(offer: Offer) -> Offer:
    """Return forward and backward through JAX's vjp, of functions of JAX's arrays."""
    import jax
    from jax import numpy as jnp

    def through(call, x, second, upstream):
        y, vjp = jax.vjp(lambda x: call(x, second), x)
        return y, vjp(upstream(y))[0]

    def of_both(call, x, second):
        y, grads = jax.value_and_grad(call, (0, 1))(x, second)
        return y, *grads

    return _both_ways(offer, through, jnp.ones_like, of_both)


def jax_nn(axis: int, reduction: str) -> Offer:
    """Return jax.nn's functions under jit, and the loss that users build from them."""
    import jax
    from jax import numpy as jnp

    def cross_entropy(x, t):
        log_p = jax.nn.log_softmax(x, axis=axis)
        loss = -jnp.take_along_axis(log_p, jnp.expand_dims(t, axis), axis).squeeze(axis)
        return loss.mean() if reduction == "mean" else loss

    offer = {
        "softmax": lambda x, _: jax.nn.softmax(x, axis=axis),
        "log_softmax": lambda x, _: jax.nn.log_softmax(x, axis=axis),
        "logsumexp": lambda x, _: jax.nn.logsumexp(x, axis=axis),
        "cross_entropy": cross_entropy,
        "entropy": lambda x, _: jax.scipy.special.entr(jax.nn.softmax(x, axis=axis)).sum(axis),
        "logmeanexp": lambda x, _: jax.nn.logmeanexp(x, axis=axis),
        "logcumsumexp": lambda x, _: jax.lax.cumlogsumexp(x, axis % x.ndim),
        "cross_entropy_in_float32": lambda x, t: cross_entropy(x.astype(jnp.float32), t),
    }
    return jitted(offer | jax_autograd(offer))


def optax_losses(axis: int, reduction: str) -> Offer:
    """Return optax's loss under jit."""
    import jax
    import optax

    def reduced(each):
        return each.mean() if reduction == "mean" else each

    def kl_divergence(x, y):
        log_q = jax.nn.log_softmax(y, axis=axis)
        return reduced(optax.losses.kl_divergence(log_q, jax.nn.softmax(x, axis=axis), axis=axis))

    offer = {
        "cross_entropy": lambda x, t: reduced(
            optax.softmax_cross_entropy_with_integer_labels(x, t, axis=axis)
        ),
        "sigmoid_cross_entropy": lambda x, t: reduced(optax.sigmoid_binary_cross_entropy(x, t)),
        "sigmoid_focal": lambda x, t: reduced(optax.sigmoid_focal_loss(x, t, gamma=FOCAL_GAMMA)),
        "kl_divergence": kl_divergence,
    }
    if axis == -1:
        project = jax.vmap(optax.projections.projection_simplex)
        offer["sparsemax"] = lambda x, _: project(x)
        offer["sparsemax_loss"] = lambda x, t: reduced(optax.losses.multiclass_sparsemax_loss(x, t))
    return jitted(offer | jax_autograd(offer))


def jitted(offer: Offer) -> Offer:
    jit = sys.modules["jax"].jit
    return {operation: jit(call) for operation, call in offer.items()}


def cupyx_special(axis: int, reduction: str) -> Offer:
    """Return cupyx.scipy.special's functions."""
    from cupyx.scipy import special

    return {
        "softmax": lambda x, _: special.softmax(x, axis=axis),
        "log_softmax": lambda x, _: special.log_softmax(x, axis=axis),
        "logsumexp": lambda x, _: special.logsumexp(x, axis=axis),
    }


class Peer(NamedTuple):
    """Another implementation of our operations."""

    name: str
    library: str
    """Whose arrays it takes."""
    package: str
    """What it needs."""
    offer: Callable[[int, str], Offer]
    why_not: Callable[[Place], str] = lambda place: ""
    slow_start: bool = False
    """Whether it compiles for seconds; then it is left out of a short run."""


PEERS = (
    Peer(NUMPY_BY_HAND, "numpy", "numpy", numpy_by_hand),
    Peer(SCIPY, "numpy", "scipy", scipy_special),
    Peer("sklearn", "numpy", "sklearn", sklearn_extmath),
    Peer(TORCH, "torch", "torch", torch_eager),
    Peer(TORCH_COMPILED, "torch", "torch", torch_compiled, why_not_compiled, slow_start=True),
    Peer("jax.nn, jit", "jax", "jax", jax_nn),
    Peer(ENTMAX, "torch", "entmax", entmax_package),
    Peer("entmax, k=100", "torch", "entmax", entmax_of_top_classes),
    Peer("entmax, bisection", "torch", "entmax", entmax_by_bisection),
    Peer(OPTAX, "jax", "optax", optax_losses),
    Peer("cupyx.scipy", "cupy", "scipy", cupyx_special),  # cupyx.scipy imports scipy
)
