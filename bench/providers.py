"""The operations as each library offers them, all behind the same call.

A provider turns an axis and a reduction into a table: operation -> function of (x, labels). What
it does not offer is not in its table. A library is imported by its own provider only.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

import portable_softmax as ps
from portable_softmax._cli.backends import Place

Call = Callable[[Any, Any], Any]
Offer = Mapping[str, Call]

OPERATIONS = (
    "softmax",
    "log_softmax",
    "logsumexp",
    "cross_entropy",
    "cross_entropy_value_and_grad",
)
NUMPY_BY_HAND = "numpy by hand"


@dataclass(frozen=True)
class Provider:
    """Someone who computes our operations on one library's arrays."""

    name: str
    offer: Callable[[int, str], Offer]
    ours: bool = False
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def ours(axis: int, reduction: str) -> Offer:
    """Return this package's functions."""
    options = {"axis": axis, "reduction": reduction}
    return {
        "softmax": lambda x, _: ps.softmax(x, axis=axis),
        "log_softmax": lambda x, _: ps.log_softmax(x, axis=axis),
        "logsumexp": lambda x, _: ps.logsumexp(x, axis=axis),
        "cross_entropy": lambda x, t: ps.cross_entropy(x, t, **options),
        "cross_entropy_value_and_grad": lambda x, t: ps.cross_entropy_value_and_grad(
            x, t, **options
        ),
    }


def numpy_by_hand(axis: int, reduction: str) -> Offer:
    """Return what people write themselves."""

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

    return {
        "softmax": softmax,
        "log_softmax": log_softmax,
        "logsumexp": logsumexp,
        "cross_entropy": cross_entropy,
        "cross_entropy_value_and_grad": value_and_grad,
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


def torch_eager(axis: int, reduction: str) -> Offer:
    """Return torch's functions, run eagerly."""
    import torch
    from torch.nn import functional

    def cross_entropy(x, t):
        return functional.cross_entropy(x.movedim(axis, -1), t, reduction=reduction)

    def value_and_grad(x, t):
        x = x.detach().requires_grad_()
        loss = cross_entropy(x, t)
        return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]

    return {
        "softmax": lambda x, _: torch.softmax(x, axis),
        "log_softmax": lambda x, _: torch.log_softmax(x, axis),
        "logsumexp": lambda x, _: torch.logsumexp(x, axis),
        "cross_entropy": cross_entropy,
        "cross_entropy_value_and_grad": value_and_grad,
    }


def jax_nn(axis: int, reduction: str) -> Offer:
    """Return jax.nn's functions under jit, and the loss that users build from them."""
    import jax
    from jax import numpy as jnp

    def losses(x, t):
        log_p = jax.nn.log_softmax(x, axis=axis)
        return -jnp.take_along_axis(log_p, jnp.expand_dims(t, axis), axis).squeeze(axis)

    def cross_entropy(x, t):
        return losses(x, t).mean() if reduction == "mean" else losses(x, t)

    def value_and_grad(x, t):
        loss, vjp = jax.vjp(lambda x: cross_entropy(x, t), x)
        return loss, vjp(jnp.ones_like(loss))[0]

    return _jitted(
        {
            "softmax": lambda x, _: jax.nn.softmax(x, axis=axis),
            "log_softmax": lambda x, _: jax.nn.log_softmax(x, axis=axis),
            "logsumexp": lambda x, _: jax.nn.logsumexp(x, axis=axis),
            "cross_entropy": cross_entropy,
            "cross_entropy_value_and_grad": value_and_grad,
        }
    )


def cupyx_special(axis: int, reduction: str) -> Offer:
    """Return cupyx.scipy.special's functions."""
    from cupyx.scipy import special

    return {
        "softmax": lambda x, _: special.softmax(x, axis=axis),
        "log_softmax": lambda x, _: special.log_softmax(x, axis=axis),
        "logsumexp": lambda x, _: special.logsumexp(x, axis=axis),
    }


def _jitted(offer: Offer) -> Offer:
    jit = sys.modules["jax"].jit
    return {operation: jit(call) for operation, call in offer.items()}


# Name, the package it needs, and the provider, for each library.
_PEERS: dict[str, tuple[tuple[str, str, Callable[[int, str], Offer]], ...]] = {
    "numpy": (
        (NUMPY_BY_HAND, "numpy", numpy_by_hand),
        ("scipy.special", "scipy", scipy_special),
    ),
    "torch": (("torch", "torch", torch_eager),),
    "jax": (("jax.nn, jit", "jax", jax_nn),),
    "cupy": (("cupyx.scipy", "scipy", cupyx_special),),  # cupyx.scipy imports scipy
}


def our_provider(place: Place) -> Provider:
    """Return this package as its users call it on a backend: under jit in JAX."""
    if place.name == "jax":
        return Provider("ours, jit", lambda *options: _jitted(ours(*options)), ours=True)
    return Provider("ours", ours, ours=True)


def portable_provider() -> Provider:
    """Return this package with its kernels out of the way."""
    return Provider("ours, portable", ours, ours=True, context=ps.kernels.portable)


def peers(place: Place) -> tuple[list[Provider], list[str]]:
    """Return the peers on a library's arrays, and the names of those that are not installed."""
    present, missing = [], []
    for name, package, offer in _PEERS.get(place.name, ()):
        if importlib.util.find_spec(package) is None:
            missing.append(name)
        else:
            present.append(Provider(name, offer))
    return present, missing
