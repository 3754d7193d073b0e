"""JAX: traced by transforms, and by XLA even where a call is eager."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from portable_softmax.libraries._library import Library, numpy_dtype


class Jax(Library):
    """XLA fuses a masked sum into the pass that runs anyway, so that it does not gather."""

    differentiates = True
    tile = 1 << 25  # XLA's products copy one
    looks_at_subnormals = False  # XLA takes them for 0

    def device(self, x: Any) -> Any:
        """Return None: what is made beside `x` goes where it is used."""
        return None

    def device_type(self, x: Any) -> str:
        """Return the platform; for a tracer, which has no device yet, that of the default one."""
        if _is_traced(x):
            return str(sys.modules["jax"].default_backend())
        return str(next(iter(x.devices())).platform)

    def same_device(self, x: Any, other: Any) -> bool:
        """Return whether both live on the same devices; JAX moves uncommitted arrays itself."""
        if not all(self.reads_values(a) and a.committed for a in (x, other)):
            return True
        return bool(x.devices() == other.devices())

    def size(self, x: Any) -> Any:
        """Return the number of elements, all that vmap maps over; nan where a shape is symbolic."""
        shape = (*x.shape, *_mapped(x))
        return math.prod(shape) if all(map(self.is_known, shape)) else math.nan

    def wider_dtype(self, x: Any) -> Any:
        """Return float64 where 64 bits are enabled."""
        return self.xp.promote_types(x.dtype, self.xp.result_type(float))

    def own_dtype(self, dtype: Any) -> Any:
        """Return a dtype of NumPy's or ml_dtypes'; TypeError for 64 bits where JAX has 32 only."""
        found = numpy_dtype(dtype)
        if found.itemsize > self.default_float(None).itemsize:
            raise TypeError(dtype)
        return found

    def default_float(self, x: Any) -> Any:
        """Return the dtype without making an array, which the transfer guard may forbid."""
        return self.xp.result_type(float)

    def default_int(self, x: Any) -> Any:
        """Return the dtype without making an array."""
        return self.xp.result_type(int)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` as one compiled call.

        Operation by operation JAX is slow, moves every constant to the device, which its transfer
        guard may forbid, and looks for nans in each intermediate result under ``jax.debug_nans``.
        """
        return partial(_call_compiled, function)

    def constant(self, x: Any) -> Any:
        """Return `x` with its derivative cut off."""
        return sys.modules["jax"].lax.stop_gradient(x)

    def barrier(self, *arrays: Any) -> tuple[Any, ...]:
        """Return these arrays; XLA fuses nothing across."""
        found: tuple[Any, ...] = sys.modules["jax"].lax.optimization_barrier(arrays)
        return found

    def iterate(self, step: Callable[[Any], tuple[Any, Any]], x: Any, most: int) -> Any:
        """Return x after steps, in a loop of XLA: written out, they would take long to compile."""
        jax = sys.modules["jax"]

        def again(state: Any) -> Any:
            taken, _, moves = state
            return moves & (taken < most)

        def once(state: Any) -> Any:
            return (state[0] + 1, *step(state[1]))

        moves = like_others(True, (), bool, x)
        return jax.lax.while_loop(again, once, (0, x, moves))[1]

    def reads_values(self, x: Any) -> bool:
        """Return whether `x` is no tracer."""
        return not _is_traced(x)

    def follows(self, *values: Any) -> bool:
        """Return whether one is a tracer, of whichever transform."""
        return any(_is_traced(x) for x in values)

    def tracing(self, *arrays: Any) -> str:
        """Return ``"traced"`` under jit, grad, vmap and so on."""
        return "traced" if any(_is_traced(x) for x in arrays) else ""


def like_others(value: float, shape: Any, dtype: Any, others: Any) -> Any:
    """Return an array of one value, as one that may differ where the other arrays may.

    Within a shard_map JAX tells an array that differs between devices from one that is the same. A
    loop, and each branch, has to return what it was given or what the other one returns.
    """
    numpy = sys.modules["jax"].numpy
    found = numpy.full(shape, value, dtype)
    for other in sys.modules["jax"].tree.leaves(others):
        found = found + numpy.zeros_like(other, dtype, shape=())
    return found


def _call_compiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function with its arrays traced and everything else compiled in."""
    jax = sys.modules["jax"]
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    others = tuple(None if isinstance(leaf, jax.Array) else (leaf,) for leaf in leaves)
    return _jitted()(arrays, function, tree, others)


@cache
def _jitted() -> Callable[..., Any]:
    def call(arrays: list[Any], function: Callable[..., Any], tree: Any, others: Any) -> Any:
        rest = iter(arrays)
        args, kwargs = tree.unflatten(next(rest) if o is None else o[0] for o in others)
        return function(*args, **kwargs)

    jit: Callable[..., Any] = sys.modules["jax"].jit(call, static_argnums=(1, 2, 3))
    return jit


def _mapped(x: Any) -> list[Any]:
    """Return the lengths of the axes that vmap has taken away, where it is at work right here.

    A function that is traced first and mapped later, as that of `jax.vmap(jax.jit(f))`, sees none.
    """
    found = []
    while _is_traced(x):
        axis = getattr(x, "batch_dim", None)  # of vmap's tracer; that of a derivative has a primal
        if isinstance(axis, int):
            found.append(x.val.shape[axis])
        x = getattr(x, "primal" if axis is None else "val", None)
    return found


def _is_traced(x: Any) -> bool:
    return isinstance(x, sys.modules["jax"].core.Tracer)
