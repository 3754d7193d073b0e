"""What is measured: this package in each of its paths, and the peers, each on its own arrays."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import portable_softmax as ps
from bench import peers, places
from bench.peers import Offer
from bench.places import LIBRARIES, Place
from portable_softmax import kernels


@dataclass(frozen=True)
class Provider:
    """An implementation of our operations at one place."""

    name: str
    place: Place
    offer: Callable[[int, str], Offer]
    ours: bool = False
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


# --------------------------------------------------------------------------- ours


def ours(axis: int, reduction: str) -> Offer:
    """Return this package's functions; gradients are those of the functions named vjp."""
    options = {"axis": axis, "reduction": reduction}

    def softmax_backward(x, dy):
        y = ps.softmax(x, axis=axis)
        return y, ps.softmax_vjp(y, dy, axis=axis)

    def log_softmax_backward(x, dy):
        log_y = ps.log_softmax(x, axis=axis)
        return log_y, ps.log_softmax_vjp(log_y, dy, axis=axis)

    return {
        "softmax": lambda x, _: ps.softmax(x, axis=axis),
        "log_softmax": lambda x, _: ps.log_softmax(x, axis=axis),
        "logsumexp": lambda x, _: ps.logsumexp(x, axis=axis),
        "cross_entropy": lambda x, t: ps.cross_entropy(x, t, **options),
        "cross_entropy_value_and_grad": lambda x, t: ps.cross_entropy_value_and_grad(
            x, t, **options
        ),
        "softmax+backward": softmax_backward,
        "log_softmax+backward": log_softmax_backward,
        **_family(axis, reduction),
    }


def _family(axis: int, reduction: str) -> Offer:
    """Return the rest of the family, as far as the package has it: it may be an earlier one."""
    places_of = {"axis": axis, "reduction": reduction}
    found: dict[str, peers.Call] = {}
    for name, (function, takes, options) in FAMILY.items():
        if not _has(function, options):
            continue
        call = partial(_called, name, {k: places_of[k] for k in takes} | options)
        found[name] = call
        if name in peers.SPARSE:
            alpha = 2.0 if name == "sparsemax" else 1.5
            found[f"{name}+backward"] = partial(_sparse_backward, call, alpha, axis)
        if name in peers.GRADIENTS and _has(f"{function}_value_and_grad", options):
            found[f"{name}+backward"] = partial(_value_and_grad, call)
    return found


def _has(function: str, options: dict[str, Any]) -> bool:
    found = getattr(ps, function, None)
    return found is not None and options.keys() <= inspect.signature(found).parameters.keys()


def _called(name: str, options: dict[str, Any], x: Any, second: Any) -> Any:
    function = getattr(ps, FAMILY[name].function)
    kind = peers.FAMILY[name]
    if kind == peers.WEIGHTED:
        labels, weights = second
        return function(x, labels, sample_weight=weights, **options)
    if name == "cross_entropy_in_float32":
        options = options | {"dtype": _dtype_of(x, "float32")}
    return function(x, second, **options) if kind else function(x, **options)


def _value_and_grad(call: Any, x: Any, second: Any) -> Any:
    """Return the value of a call and its gradients, one after the other."""
    name, options = call.args
    function = getattr(ps, f"{FAMILY[name].function}_value_and_grad")
    found = function(x, second, **options) if peers.FAMILY[name] else function(x, **options)
    value, grads = found
    return value, *(grads if isinstance(grads, tuple) else (grads,))


def _dtype_of(x: Any, name: str) -> Any:
    """Return a dtype of the library of an array, by name."""
    return getattr(sys.modules[type(x).__module__.partition(".")[0]], name, np.dtype(name))


def _sparse_backward(call: peers.Call, alpha: float, axis: int, x: Any, dy: Any) -> Any:
    y = call(x, None)
    return y, ps.entmax_vjp(y, dy, alpha=alpha, axis=axis)


class Member(NamedTuple):
    """How an operation of the rest of the family is called."""

    function: str
    takes: tuple[str, ...] = ("axis",)
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed


_BOTH = ("axis", "reduction")
FAMILY = {
    "softmax_with_sink": Member("softmax", options={"sink": 0.0}),
    "entmax": Member("entmax"),
    "sparsemax": Member("sparsemax"),
    "entmax_loss": Member("entmax_loss", _BOTH),
    "sparsemax_loss": Member("entmax_loss", _BOTH, {"alpha": 2.0}),
    "sigmoid_cross_entropy": Member("sigmoid_cross_entropy", ("reduction",)),
    "sigmoid_focal": Member(
        "sigmoid_cross_entropy", ("reduction",), {"focal_gamma": peers.FOCAL_GAMMA}
    ),
    "kl_divergence": Member("kl_divergence", _BOTH),
    "entropy": Member("entropy"),
    "logmeanexp": Member("logmeanexp"),
    "logcumsumexp": Member("logcumsumexp"),
    "cross_entropy_weighted": Member("cross_entropy", _BOTH),
    "cross_entropy_in_float32": Member("cross_entropy", _BOTH),
}


def ours_jitted(axis: int, reduction: str) -> Offer:
    """Return this package's functions under JAX's jit."""
    return peers.jitted(ours(axis, reduction))


def ours_compiled(axis: int, reduction: str) -> Offer:
    """Return this package's functions under torch.compile, and backward through autograd."""
    offer = ours(axis, reduction)
    forward = peers.compiled({name: offer[name] for name in (*peers.FORWARD, "cross_entropy")})
    return forward | peers.torch_autograd(forward)


class Path(NamedTuple):
    """A way to call this package."""

    name: str
    libraries: tuple[str, ...] = tuple(LIBRARIES)
    """The libraries that have it."""
    offer: Callable[[int, str], Offer] = ours
    switch: tuple[str, ...] = ()
    """A context manager of `portable_softmax.kernels`, and the kernel that it is given."""
    why_not: Callable[[Place], str] = lambda place: ""
    slow_start: bool = False

    def context(self) -> Callable[[], AbstractContextManager[Any]] | None:
        """Return what makes the context of a call; None where there is no such kernel or switch."""
        if not self.switch:
            return nullcontext
        name, *kernel = self.switch
        switch = getattr(kernels, name, None)  # `use` is absent from earlier versions
        there = switch and kernels.available().keys() >= {*kernel}
        return partial(switch, *kernel) if there else None


_UNCOMPILED = tuple(name for name in LIBRARIES if name != "jax")

# A path that takes the same kernel as an earlier one with the same offer is not measured twice.
PATHS = (
    Path("ours", _UNCOMPILED),
    Path("ours, Numba", ("numpy", "torch"), switch=("use", "numba rows")),
    Path("ours, no Numba", ("numpy",), switch=("without", "numba rows")),
    Path("ours, Triton", ("torch", "cupy"), switch=("use", "triton rows")),
    Path("ours, portable", _UNCOMPILED, switch=("portable",)),
    Path("ours, autograd", ("torch",), lambda *o: peers.torch_autograd(ours(*o))),
    Path(
        "ours, compiled",
        ("torch",),
        ours_compiled,
        why_not=peers.why_not_compiled,
        slow_start=True,
    ),
    Path("ours, jit", ("jax",), ours_jitted),
    Path("ours, jit, Numba", ("jax",), ours_jitted, switch=("use", "numba rows")),
    Path("ours, jit, XLA", ("jax",), ours_jitted, switch=("without", "numba rows")),
    Path("ours, jit, portable", ("jax",), ours_jitted, switch=("portable",)),
    Path("ours, jit, vjp", ("jax",), lambda *o: peers.jitted(peers.jax_autograd(ours(*o)))),
)


def our_providers(place: Place, *, slow_starts: bool = True) -> list[Provider]:
    """Return this package in each of its paths at a place."""
    return [
        Provider(path.name, place, path.offer, True, context)
        for path in PATHS
        if place.name in path.libraries
        and not path.why_not(place)
        and (slow_starts or not path.slow_start)
        and (context := path.context())
    ]


def named(place: Place, name: str) -> tuple[Callable[[int, str], Offer], Any]:
    """Return what a path of ours or a peer offers at a place, and what makes its context."""
    for path in PATHS:
        if path.name == name:
            return path.offer, path.context()
    (peer,) = [p for p in peers.PEERS if p.name == name and p.library == place.name]
    return peer.offer, nullcontext


def path_taken(provider: Any, operation: str, x: Any, second: Any, axis: int = -1) -> str:
    """Return the kernel that a call of ours takes, or "portable"."""
    forward = operation.partition("+")[0]
    takes_two = forward in peers.LOSSES or peers.FAMILY.get(forward)
    arguments = (x, second) if takes_two else (x,)
    function, takes, options = FAMILY.get(forward, Member(forward))
    if operation in peers.BACKWARD_OF_FAMILY:
        function = f"{function}_value_and_grad"
    with provider.context():
        said = kernels.explain(
            function, *arguments, **({"axis": axis} if "axis" in takes else {}), **options
        )
    return said.partition(":")[0]


# --------------------------------------------------------------------------- the peers


def peers_at(place: Place, *, slow_starts: bool = True) -> tuple[list[Provider], list[str]]:
    """Return the peers on a place's arrays, and which are missing, with the reason."""
    present, missing = [], []
    for peer in peers.PEERS:
        if peer.library != place.name:
            continue
        if importlib.util.find_spec(peer.package) is None:
            missing.append(peer.name)
        elif why := peer.why_not(place):
            missing.append(f"{peer.name} ({why})")
        elif peer.slow_start and not slow_starts:
            missing.append(f"{peer.name} (--quick)")
        else:
            present.append(Provider(peer.name, place, peer.offer))
    return present, missing


def all_providers(
    place: Place, which: str, *, slow_starts: bool = True
) -> tuple[list[Provider], list[str]]:
    """Return ours at a place, and the peers: `which` is all, or only those on its own arrays."""
    others, missing = places.others(place) if which == "all" else ([], [])
    found = our_providers(place, slow_starts=slow_starts)
    for one in [place, *others]:
        present, absent = peers_at(one, slow_starts=slow_starts)
        found += present
        missing += absent
    return found, missing
