"""torch: what follows its operations, and the memory of its CPU tensors.

The names of torch that are private stand here, and nowhere else. Without one of them in some
version nobody can tell whether an operation is followed: kernels then leave its tensors to torch's
own operations, which are always right.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import reduce
from typing import Any, TypeVar

from portable_softmax.libraries._library import Library

Function = TypeVar("Function", bound=Callable[..., Any])

PRIVATE = {
    "functional transforms": "torch._C._functorch.peek_interpreter_stack",
    "the vmap of is_grads_batched": "torch._C._functorch.is_legacy_batchedtensor",
    "dispatch modes": "torch._C._len_torch_dispatch_stack",
    "forward-mode differentiation": "torch.autograd.forward_ad._current_level",
}


def _torch() -> Any:
    """Return the module, which somebody has imported to make the tensor."""
    return sys.modules["torch"]


def missing_private_name() -> str:
    """Return the first private name that this version of torch lacks; empty if it has all."""
    if not _checked:
        for path in PRIVATE.values():
            try:
                reduce(getattr, path.split(".")[1:], _torch())
            except AttributeError:
                _checked.append(path)
                break
        else:
            _checked.append("")
    return _checked[0]


_checked: list[str] = []


def traced_as_constant(function: Function) -> Function:
    """Let torch.compile call `function` while it traces, and take the answer for a constant.

    It can neither import a module in a trace nor read a ContextVar. (What this sets is what
    torch.compiler.assume_constant_result does, which would have to import torch.)
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Torch(Library):
    """Tensors of any device; autograd, functional transforms and compilers follow them."""

    differentiates = True
    gathers = True

    def device_type(self, x: Any) -> str:
        """Return ``"cpu"``, ``"cuda"`` and so on."""
        return str(x.device.type)

    def constant(self, x: Any) -> Any:
        """Return `x` with its derivative cut off."""
        return x.detach()

    def scalar(self, value: float, like: Any) -> Any:
        """Return a 0-d tensor; of a symbol of torch.compile, `asarray` would make a constant."""
        return self.xp.full((), value, dtype=like.dtype, device=like.device)

    def take_along_axis(self, x: Any, index: Any, axis: int) -> Any:
        """Gather: take_along_dim broadcasts, and torch.compile compiles it for one batch size."""
        return x.gather(axis, index)

    def sums_in_blocks(self, x: Any, axis: int) -> bool:
        """Return True, except where code that is generated for CPUs adds row after row."""
        return bool(axis == x.ndim - 1) or not _torch().compiler.is_compiling()

    def is_known(self, number: Any) -> bool:
        """Return whether a number is known; in a trace a symbol looks like its first value."""
        torch = _torch()
        if torch.compiler.is_compiling():
            shapes = torch.fx.experimental.symbolic_shapes
            return hasattr(shapes, "has_static_value") and shapes.has_static_value(number)
        return isinstance(number, int | float)

    def reads_values(self, x: Any) -> bool:
        """Return whether the values of `x` can be looked at now."""
        return not self._abstract(x)

    def tracing(self, *arrays: Any) -> str:
        """Return what follows or replaces these tensors' values."""
        torch = _torch()
        if torch.compiler.is_compiling():
            return "torch.compile"
        if name := missing_private_name():
            return f"torch {torch.__version__} has no {name}"
        for x in arrays:
            if why := self._abstract(x) or _unusual(x):
                return why
        if torch.jit.is_tracing():
            return "torch.jit.trace"
        if torch._C._len_torch_dispatch_stack():
            return "a dispatch mode"
        if torch.autograd.forward_ad._current_level >= 0:
            return "forward-mode differentiation"
        return ""

    def _abstract(self, x: Any) -> str:
        torch = _torch()
        if torch.compiler.is_compiling():
            return "torch.compile"
        # Inside a functional transform a tensor may be batched by vmap and has no single value.
        if not missing_private_name() and torch._C._functorch.peek_interpreter_stack() is not None:
            return "a functional transform"
        if x.device.type == "meta":
            return "a meta tensor"
        name = type(x).__name__
        return f"a {name}" if name in ("FakeTensor", "FunctionalTensor") else ""


def _unusual(x: Any) -> str:
    """Return why a tensor is more, or other, than its memory; empty for an ordinary one."""
    torch = _torch()
    if type(x) is not torch.Tensor and type(x) is not torch.nn.Parameter:
        return f"a {type(x).__name__}"
    if x.layout is not torch.strided:
        return f"layout {x.layout}"
    if torch._C._functorch.is_legacy_batchedtensor(x):
        return "a vmap-batched tensor"
    if x.is_neg() or x.is_conj():
        return "a lazily negated or conjugated tensor"
    return "a zero tensor without memory" if x._is_zerotensor() else ""
