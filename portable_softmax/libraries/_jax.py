"""JAX: traced by transforms, and by XLA even where a call is eager."""

from __future__ import annotations

import sys
from typing import Any

from portable_softmax.libraries._library import Library


class Jax(Library):
    """XLA fuses a masked sum into the pass that runs anyway, so that it does not gather."""

    differentiates = True

    def device(self, x: Any) -> Any:
        """Return None: what is made beside `x` goes where it is used."""
        return None

    def device_type(self, x: Any) -> str:
        """Return the platform; empty for a tracer, which has no device yet."""
        return "" if _is_traced(x) else str(next(iter(x.devices())).platform)

    def same_device(self, x: Any, other: Any) -> bool:
        """Return whether both live on the same devices; JAX moves uncommitted arrays itself."""
        if not all(self.reads_values(a) and a.committed for a in (x, other)):
            return True
        return bool(x.devices() == other.devices())

    def constant(self, x: Any) -> Any:
        """Return `x` with its derivative cut off."""
        return sys.modules["jax"].lax.stop_gradient(x)

    def reads_values(self, x: Any) -> bool:
        """Return whether `x` is no tracer."""
        return not _is_traced(x)

    def tracing(self, *arrays: Any) -> str:
        """Return ``"traced"`` under jit, grad, vmap and so on."""
        return "traced" if any(_is_traced(x) for x in arrays) else ""


def _is_traced(x: Any) -> bool:
    return isinstance(x, sys.modules["jax"].core.Tracer)
