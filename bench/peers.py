"""The same operations in other libraries, behind the same call.

A function below turns an axis and a reduction into a table: operation -> function of (x, second),
where the second is the labels, or the upstream gradient. What a library does not offer is not in
its table. A library is imported by its own functions only.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from bench.places import Place

Call = Callable[[Any, Any], Any]
Offer = Mapping[str, Call]

FORWARD = ("softmax", "log_softmax", "logsumexp")
LOSSES = ("cross_entropy", "cross_entropy_value_and_grad")
# The result, and the gradient of its product with an upstream gradient.
BACKWARD = tuple(f"{operation}+backward" for operation in FORWARD)
OPERATIONS = (*FORWARD, *LOSSES, *BACKWARD)

NUMPY_BY_HAND = "numpy by hand"
SCIPY = "scipy.special"
TORCH = "torch"


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

    return {
        "softmax": lambda x, _: special.softmax(x, axis=axis),
        "log_softmax": lambda x, _: special.log_softmax(x, axis=axis),
        "logsumexp": lambda x, _: special.logsumexp(x, axis=axis),
        "cross_entropy": cross_entropy,
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

    return {
        "cross_entropy_value_and_grad": lambda x, t: through(
            offer["cross_entropy"], x, t, torch.ones_like
        ),
        **{
            f"{name}+backward": lambda x, dy, name=name: through(offer[name], x, None, lambda _: dy)
            for name in FORWARD
        },
    }


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

    return {
        "softmax": lambda x, _: torch.softmax(x, axis),
        "log_softmax": lambda x, _: torch.log_softmax(x, axis),
        "logsumexp": lambda x, _: torch.logsumexp(x, axis),
        "cross_entropy": lambda x, t: functional.cross_entropy(
            x.movedim(axis, -1), t, reduction=reduction
        ),
    }


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

    return {
        "cross_entropy_value_and_grad": lambda x, t: through(
            offer["cross_entropy"], x, t, jnp.ones_like
        ),
        **{
            f"{name}+backward": lambda x, dy, name=name: through(offer[name], x, None, lambda _: dy)
            for name in FORWARD
            if name in offer
        },
    }


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
    }
    return jitted(offer | jax_autograd(offer))


def optax_losses(axis: int, reduction: str) -> Offer:
    """Return optax's loss under jit."""
    import optax

    def cross_entropy(x, t):
        loss = optax.softmax_cross_entropy_with_integer_labels(x, t, axis=axis)
        return loss.mean() if reduction == "mean" else loss

    offer = {"cross_entropy": cross_entropy}
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
    Peer("torch, compiled", "torch", "torch", torch_compiled, why_not_compiled, slow_start=True),
    Peer("jax.nn, jit", "jax", "jax", jax_nn),
    Peer("optax, jit", "jax", "optax", optax_losses),
    Peer("cupyx.scipy", "cupy", "scipy", cupyx_special),  # cupyx.scipy imports scipy
)
