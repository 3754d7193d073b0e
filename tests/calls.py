"""Every public function with each of its options, as calls that any test can make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import portable_softmax as ps
from portable_softmax.kernels._request import OPERATIONS


class Call(NamedTuple):
    """A public function and its arguments; arrays are NumPy's, for `on` to convert."""

    function: Callable[..., Any]
    positional: tuple[np.ndarray, ...]
    keyword: dict[str, Any]

    @property
    def has_paths(self) -> bool:
        """Whether a kernel of rows may take it; all else is the same code on each path."""
        return self.function.__name__ in OPERATIONS

    def on(self, asarray: Callable[[np.ndarray], Any]) -> tuple[Callable[..., Any], list[Any]]:
        """Return the call as a function of its floating arrays alone, and these arrays."""
        given = {**dict(enumerate(self.positional)), **self.keyword}
        arrays = {k: v for k, v in given.items() if isinstance(v, np.ndarray)}
        given.update({k: asarray(v) for k, v in arrays.items()})
        floating = [k for k, v in arrays.items() if v.dtype.kind in "fc"]

        def function(*values: Any) -> Any:
            now = {**given, **dict(zip(floating, values, strict=True))}
            return self.function(
                *(now[k] for k in now if isinstance(k, int)),
                **{k: v for k, v in now.items() if isinstance(k, str)},
            )

        return function, [given[k] for k in floating]

    def outputs(self, asarray: Callable[[np.ndarray], Any]) -> tuple[Any, ...]:
        """Return what the call returns, as a tuple."""
        function, arrays = self.on(asarray)
        return as_tuple(function(*arrays))


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    """Return one output, or all of several; those of a pair of gradients one by one."""
    if not isinstance(outputs, tuple):
        return (outputs,)
    return tuple(one for output in outputs for one in as_tuple(output))


def _calls() -> dict[str, Call]:
    rng = np.random.default_rng(0)
    shape = (2, 3, 4)
    x, other = rng.normal(size=(2, *shape))
    x[0, 1] = 0.0  # a row of ties
    weights = rng.uniform(0.5, 1.5, size=4)
    samples = np.asarray([[0.5, 1.0, 2.0], [1.5, 0.25, 1.0]])
    mask = rng.random(shape) < 0.7
    mask[:, :, 0], mask[0, 0] = True, False  # one row is masked as a whole
    labels = np.asarray([[0, 3, 2], [1, 0, 0]])
    inside = np.asarray([[-1, 0, 0], [0, 0, 0]])  # labels that `mask` leaves in
    t = rng.uniform(size=shape)
    one_hot = (np.arange(4) == labels[..., None]).astype(np.int64)

    found = {}

    def call(function: Callable[..., Any], *positional: np.ndarray, **keyword: Any) -> None:
        options = ", ".join(
            k if isinstance(v, np.ndarray) else f"{k}={v}" for k, v in keyword.items()
        )
        kind = {labels.shape: "index", shape: "distribution"}[positional[-1].shape]
        kind = (
            f"{kind} {positional[-1].dtype}: "
            if function.__name__.startswith("cross_entropy")
            else ""
        )
        found[f"{function.__name__}({kind}{options})"] = Call(function, positional, keyword)

    for f in (ps.softmax, ps.log_softmax):
        call(f, x)
        call(f, x, axis=(0, 2))
        call(f, x, axis=None, temperature=0.7)
        call(f, x, where=mask)
        call(f, x, axis=1, where=mask[0], temperature=2.0)
        call(f, x, sink=0.0)
        call(f, x, axis=1, where=mask, temperature=2.0, sink=other[:, :1])
    call(ps.logsumexp, x)
    call(ps.logsumexp, x, axis=(0, 2), keepdims=True)
    call(ps.logsumexp, x, axis=-1, where=mask, return_sign=True)
    call(ps.logsumexp, x, axis=-1, b=t)
    call(ps.logsumexp, x, axis=(1, 2), b=other, where=mask, return_sign=True)
    call(ps.logsumexp, x + 1j * other, axis=1)
    call(ps.logsumexp, x + 1j * other, axis=1, b=other, return_sign=True)
    call(ps.softmax_vjp, t, other, axis=(0, 2))
    call(ps.log_softmax_vjp, x, other, axis=(0, 2))
    call(ps.softmax_jacobian, t, axis=1)
    call(ps.entmax, x)
    call(ps.entmax, x, axis=(0, 2), alpha=1.25)
    call(ps.entmax, x, axis=None, alpha=1.0)
    call(ps.entmax, x, alpha=3.0)
    call(ps.sparsemax, x, axis=1)
    call(ps.entmax_vjp, t, other, axis=(0, 2))
    call(ps.entmax_vjp, t, other, alpha=1.25)
    call(ps.entmax_vjp, t, other, alpha=2.5)
    for f in (ps.entmax_loss, ps.entmax_loss_value_and_grad):
        call(f, x, labels)
        call(f, x, labels, alpha=1.25, ignore_index=0, sample_weight=samples)
        call(f, x, t / t.sum(axis=2, keepdims=True), reduction="none", alpha=1.5)
        call(f, x, t / t.sum(axis=2, keepdims=True), alpha=2.5)
    for f in (ps.entropy, ps.entropy_value_and_grad):
        call(f, x)
        call(f, x, axis=(0, 2))
    for f in (ps.kl_divergence, ps.kl_divergence_value_and_grad):
        call(f, x, other)
        call(f, x, other, axis=1, temperature=2.0, distillation=True, reduction="none")
    call(ps.logmeanexp, x)
    call(ps.logmeanexp, x, axis=(0, 2), keepdims=True, where=mask)
    call(ps.logcumsumexp, x, axis=1)
    call(ps.logcumsumexp_vjp, x, other, axis=1)
    for f in (ps.sigmoid_cross_entropy, ps.sigmoid_cross_entropy_value_and_grad):
        call(f, x, one_hot)
        call(f, x, t, reduction="none", focal_gamma=2.0)
        positive = np.asarray([[2.0], [0.5], [1.5]])
        everything = {"weight": weights, "pos_weight": positive, "label_smoothing": 0.1}
        call(f, x, t, focal_gamma=1.5, **everything)
    for f in (ps.cross_entropy, ps.cross_entropy_value_and_grad):
        for target in (labels, t):
            call(f, x, target)
            call(f, x, target, reduction="sum", weight=weights)
            call(f, x, target, reduction="none", label_smoothing=0.1)
            call(f, x, target, z_loss=0.1)
            call(f, x, target, softcap=2.0)
            call(f, x, target, sample_weight=samples)
            everything = {"weight": weights, "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 2.0}
            where = {"where": mask, "ignore_index": -1} if target is labels else {"where": mask}
            target = inside if target is labels else t
            call(f, x, target, **where)
            call(f, x, target, **where, **everything)
            call(f, x, target, **where, **everything, sample_weight=samples)
        call(f, x, labels, ignore_index=0, weight=weights)
        call(f, x, labels, ignore_index=-100, check_labels=False)
        call(f, x, one_hot)
        call(f, np.moveaxis(x, 2, 1), labels, axis=1)
    return found


CALLS = _calls()
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


# Of logits of which some are -inf, and of others that are finite; cut into chunks of two columns,
# a chunk of the third row holds nothing else.
WITH_IMPOSSIBLE = [[-np.inf, 0, 1, 2], [1, 2, 1, 1], [-np.inf, -np.inf, 0, 1], [3, -np.inf, 2, 2]]
IMPOSSIBLE = {
    "softmax": lambda x, f: ps.softmax(x, sink=0.5),
    "logsumexp": lambda x, f: ps.logsumexp(x, axis=1, b=f, return_sign=True),
    "logmeanexp": lambda x, f: ps.logmeanexp(x, axis=1),
    "logmeanexp(where)": lambda x, f: ps.logmeanexp(f, axis=1, where=x > 0.5),
    "entropy": lambda x, f: ps.entropy_value_and_grad(x),
    "kl_divergence": lambda x, f: ps.kl_divergence(x, x, reduction="none"),
    "kl_divergence_value_and_grad": lambda x, f: ps.kl_divergence_value_and_grad(x, f),
    "sparsemax": lambda x, f: ps.sparsemax(x),
    "online": lambda x, f: tuple(ps.online.merge(ps.online.fold(x), ps.online.fold(x + f))),
    "online.softmax": lambda x, f: ps.online.softmax(x, ps.online.fold(x)),
    "linear_cross_entropy": lambda x, f: ps.linear_cross_entropy(
        f, f, ps.softmax(f), bias=x[0, :], reduction="none", where=x[0, :] > -np.inf
    ),
}


def every_call_compiled(why: str) -> pytest.MarkDecorator:
    """Return `every_call`, most of it slow: not so is the call of each kind with most options."""
    kinds: dict[str, list[str]] = {}
    for name, call in CALLS.items():
        kind = name.partition(":")[0] if ":" in name else call.function.__name__
        kinds.setdefault(kind, []).append(name)
    fast = {max(names, key=len) for names in kinds.values()}
    slow = pytest.mark.slow(why)
    return pytest.mark.parametrize(
        "call",
        [pytest.param(c, id=name, marks=() if name in fast else slow) for name, c in CALLS.items()],
    )
