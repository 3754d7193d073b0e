"""The primitive `rows`: what a call of it is compiled for, and its answer by XLA alone."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from portable_softmax.kernels import _jax
from portable_softmax.kernels._jax import _family, _rules
from portable_softmax.kernels._request import (
    BESIDE_SINKS,
    BINARY,
    BY_Q,
    DIVERGENCES,
    ENTROPIES,
    FOLD,
    RUNNING,
    SIGNED,
    VJPS,
    WITH_SLOPES,
)

Arrays = tuple[Any, ...]

OF_AN_OUTPUT = (*VJPS, "log_softmax_jvp", "log_softmax_pullback")
RUNNING_SUMS = (*RUNNING, "logcumsumexp_jvp", "logcumsumexp_pullback")
DIVERGENCES_OF_ROWS = (*DIVERGENCES, BY_Q)
# What changes of logits and sinks change, and the transpose of it.
CHANGES_BESIDE_SINKS = ("softmax_jvp_beside_sink", "log_softmax_jvp_beside_sink")
THROUGH_SINKS = (*CHANGES_BESIDE_SINKS, *BESIDE_SINKS[2:])
# Those of which every array belongs to the rows.
PLAIN = (*OF_AN_OUTPUT, *RUNNING_SUMS, *ENTROPIES, *THROUGH_SINKS)


class Call(NamedTuple):
    """What a call is compiled for."""

    engine: str  # the module that has the handlers
    operation: str
    tree: Any  # of the arrays of a `_jax.Program`, and of what handlers alone take
    static: tuple[Any, ...]  # of a `_jax.Program`
    batch: int = 0  # axes that vmap has put before those of the logits, labels and gradients
    kept: bool = False  # whether a derivative needs the answer again
    over: int | None = None  # the array that the answer is written over

    @property
    def form(self) -> Any:
        """What a loss is compiled for."""
        return self.static[0]

    @property
    def of_loss(self) -> bool:
        """Whether it is a loss or its derivative."""
        return self.operation.startswith("cross_entropy")

    @property
    def of_entries(self) -> bool:
        """Whether it is a loss of each entry, with nothing to fold."""
        return self.operation in BINARY

    @property
    def derivative(self) -> str:
        """The kind of a derivative that starts from the logits; empty for other operations."""
        kind = self.operation.rpartition("_")[2]
        is_one = kind in ("jvp", "pullback") and self.operation not in OF_AN_OUTPUT
        return kind if is_one else ""

    @property
    def axes(self) -> tuple[int, ...]:
        """The reduced axes."""
        if self.of_entries:
            return ()
        axes = (self.form.axis,) if self.of_loss else self.static[0]
        return tuple(a + self.batch for a in axes)

    @property
    def compute(self) -> Any:
        """What it is computed in."""
        has_form = self.of_loss or self.of_entries
        return jnp.dtype(self.form.compute if has_form else self.static[1])

    def arrays(self, leaves: Arrays) -> Any:
        """Return the arrays as the function takes them."""
        return jax.tree.unflatten(self.tree, leaves)[0]

    def numbers(self, leaves: Arrays) -> Any:
        """Return a temperature as the kernels take it; None for none."""
        return jax.tree.unflatten(self.tree, leaves)[1]

    def where(self, leaves: Arrays) -> Any:
        """Return the mask with as many axes as the logits, or None."""
        arrays = self.arrays(leaves)
        if self.operation in (*PLAIN, *DIVERGENCES_OF_ROWS, *BINARY, SIGNED):
            return None
        where = arrays[3 if self.of_loss else 1]
        return None if where is None else _rules.mask_like(where, arrays[0].ndim)


def handlers_of(engine: str) -> Any:
    return import_module(f"{engine}._ffi")


def are_soft(indices: bool, smoothing: Any) -> bool:
    """Return whether labels are soft: no kernel takes weights of positions beside these."""
    return not indices or smoothing is not None


rows = import_module("jax.extend.core").Primitive("portable_softmax_rows")
rows.multiple_results = True


def by_xla(*leaves: Any, call: Call) -> list[Any]:
    """Answer by the function of `_rules` or `_losses`, or by JAX's derivative of it."""
    kind = call.derivative
    if call.operation in _BY_RULE:
        kind = ""
    function = _function(call.operation.removesuffix(f"_{kind}"))

    def one(*leaves: Any) -> list[Any]:
        arrays = call.arrays(leaves)
        if not kind:
            found = function(*arrays, *call.static)
            return list(found) if isinstance(found, tuple) else [found]
        x, *others, last = arrays

        def of_logits(x: Any) -> Any:
            return function(x, *others, *call.static)

        if kind == "jvp":
            return [jax.jvp(of_logits, (x,), (last,))[1]]
        return list(jax.vjp(of_logits, x)[1](last))

    own, mask = of_rows(call)
    batch = leaves[0].shape[: call.batch]
    leaves = tuple(
        jnp.broadcast_to(a, batch + a.shape[call.batch :]) if i == mask else a
        for i, a in enumerate(leaves)
    )
    for _ in range(call.batch):
        one = jax.vmap(one, in_axes=tuple(0 if i in own else None for i in range(len(leaves))))
    return one(*leaves)


# A derivative that has a function of its own.
_BY_RULE = ("logcumsumexp_pullback",)


def _function(operation: str) -> Any:
    """Return the function of XLA's operations."""
    if operation in DIVERGENCES_OF_ROWS:  # not reduced yet
        return getattr(_family, operation.removeprefix("kl_"))
    return _jax.function(operation)


def of_rows(call: Call) -> tuple[tuple[int, ...], int | None]:
    """Return which leaves belong to the rows, and which of them is a mask or has weights.

    What belongs to the rows has an axis for each batch. That of a mask may be of length 1.
    """
    arrays, _ = call.tree.unflatten(range(call.tree.num_leaves))
    if call.operation in PLAIN:
        return arrays, None
    if call.operation in (*DIVERGENCES_OF_ROWS, *BINARY):
        return arrays[:2], None
    if call.operation == SIGNED:
        return arrays, arrays[1]
    own, mask = arrays[:1], arrays[3 if call.of_loss else 1]
    if call.of_loss:
        own += arrays[1], arrays[2].samples
    elif call.operation in BESIDE_SINKS:
        own += arrays[3:]
    if call.derivative:
        own += arrays[-1:]
    return tuple(i for i in (*own, mask) if i is not None), mask


def shapes(x: Any, *others: Any, call: Call) -> list[Any]:
    aval = jax.core.ShapedArray
    if call.derivative == "pullback":
        return [aval(x.shape, x.dtype)]
    if call.of_entries:
        form = call.form
        loss = x.shape if form.reduction == "none" else x.shape[: call.batch]
        found = [aval(loss, jnp.dtype(form.answer)), aval(x.shape, jnp.dtype(form.gradient))]
        return found if call.operation == BINARY[1] else found[:1]
    if call.operation in (*ENTROPIES, *DIVERGENCES_OF_ROWS, FOLD):
        shape = [n for a, n in enumerate(x.shape) if a not in call.axes]
        dtypes = (call.static[2],) * 2 if call.operation in ENTROPIES else call.static[1:]
        every = tuple(shape), *(x.shape,) * (len(dtypes) - 1)
        if call.operation == FOLD:
            return [aval(tuple(shape), jnp.dtype(call.compute))] * 2
        found = list(map(aval, every, map(jnp.dtype, dtypes)))
        return found[:1] if call.operation in (ENTROPIES[0], DIVERGENCES[0]) else found
    if call.operation == SIGNED:
        shape = [n for a, n in enumerate(x.shape) if a not in call.axes]
        return [aval(tuple(shape), jnp.dtype(call.compute))] * 2
    if call.operation in (*BESIDE_SINKS, *THROUGH_SINKS):
        shape = [n for a, n in enumerate(x.shape) if a not in call.axes]
        _, compute, answer = call.static
        return [aval(x.shape, jnp.dtype(answer)), aval(tuple(shape), jnp.dtype(compute))]
    if not call.of_loss:
        reduced = call.operation in ("logsumexp", "logsumexp_jvp", WITH_SLOPES)
        shape = [1 if reduced and a in call.axes else n for a, n in enumerate(x.shape)]
        dtype = jnp.dtype(call.static[-1])
        slopes = [aval(x.shape, dtype)] if call.operation == WITH_SLOPES else []
        return [aval(tuple(shape), dtype), *slopes]
    (axis,), form = call.axes, call.form
    shape = x.shape[:axis] + x.shape[axis + 1 :]
    loss = shape if form.reduction == "none" else shape[: call.batch]
    found = [aval(loss, jnp.dtype(form.answer)), aval(x.shape, jnp.dtype(form.gradient))]
    return found if call.operation == "cross_entropy_value_and_grad" else found[:1]


rows.def_abstract_eval(shapes)
