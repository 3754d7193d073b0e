"""torch: what follows its operations, and which of its tensors are no more than their memory.

The private names of torch stand here; those of its compiler's code generator are in
`kernels/_torch/_inductor.py`. Without one of `PRIVATE` in some version nobody can tell whether an
operation is followed: kernels then leave its tensors to torch's own operations, which are always
right.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from portable_softmax._typing import Namespace
from portable_softmax.libraries._library import REPEATED, RUNNING_SUM, Library, is_one_to_one

Function = TypeVar("Function", bound=Callable[..., Any])

PRIVATE = {
    "functional transforms": "_C._functorch.peek_interpreter_stack",
    "the vmap of is_grads_batched": "_C._functorch.is_legacy_batchedtensor",
    "dispatch modes": "_C._len_torch_dispatch_stack",
    "forward-mode differentiation": "autograd.forward_ad._current_level",
    "zero tensors": "_C.TensorBase._is_zerotensor",
}
_ABSTRACT = ("FakeTensor", "FunctionalTensor")  # subclasses without values, by name


def traced_as_constant(function: Function) -> Function:
    """Let torch.compile call `function` while it traces, and take the answer for a constant.

    It can neither import a module in a trace nor read a ContextVar. (What this sets is what
    torch.compiler.assume_constant_result does, which would have to import torch.)
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@traced_as_constant
def _transform() -> str:
    """Return which functional transform torch.compile has entered: it enters them for real."""
    torch: Any = sys.modules["torch"]
    if torch._C._functorch.peek_interpreter_stack() is None:
        return ""
    return "a functional transform"


# Portable mathematics as torch.compile takes it for operations, by name. In a module, as a trace
# sees of a dict what it held when it was first looked at.
_IN_GRAPH = ModuleType("portable_softmax_in_graph")


@traced_as_constant
def _in_graph(function: Callable[..., Any]) -> str:
    """Return the name of a function in `_IN_GRAPH`."""
    name = f"{function.__module__}.{function.__qualname__}".replace(".", "_")
    if not hasattr(_IN_GRAPH, name):
        torch, xp = sys.modules["torch"], sys.modules["array_api_compat.torch"]

        def operation(*args: Any, **kwargs: Any) -> Any:
            return function(xp, *args, **kwargs)

        setattr(_IN_GRAPH, name, torch.compiler.allow_in_graph(operation))
    return name


def _team(torch: Any) -> Callable[[Callable[[], None], int], None] | None:
    """Return what calls a function in so many of torch's own threads; None where nobody knows how.

    On Linux its wheels hold GNU's OpenMP. A region of it runs in the threads that torch's own
    operations run in, if the same thread calls both.
    """
    import ctypes

    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    found = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    try:
        parallel: Any = ctypes.CDLL(str(found[0])).GOMP_parallel
    except (IndexError, OSError, AttributeError):
        return None
    parallel.argtypes = kind, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    parallel.restype = None

    def team(member: Callable[[], None], threads: int) -> None:
        def one(_: Any) -> None:
            member()

        # A signal that comes just as `one` begins is raised there, and ctypes hands it to a hook.
        lost: list[BaseException] = []
        others = sys.unraisablehook

        def hook(found: Any) -> None:
            if found.object is one or repr(one) in (found.err_msg or ""):
                lost.append(found.exc_value)
            else:
                others(found)

        sys.unraisablehook = hook
        try:
            parallel(kind(one), None, threads, 0)
        finally:
            sys.unraisablehook = others
        for error in lost:
            raise error

    return team


class Torch(Library):
    """Tensors of any device; autograd, functional transforms and compilers follow them."""

    differentiates = True
    gathers = True
    writes = True

    # What is known of a dtype does not change: compiled code need not look at it in each call.
    dtype = traced_as_constant(Library.dtype)

    def __init__(self, xp: Namespace, name: str) -> None:
        super().__init__(xp, name)
        torch: Any = sys.modules["torch"]  # somebody has imported it to make a tensor
        self._torch = torch
        self._own_types = (torch.Tensor, torch.nn.Parameter)
        self.team = _team(torch)
        private = {what: _private(torch, path) for what, path in PRIVATE.items()}
        self._interpreter = private["functional transforms"]
        self._is_batched = private["the vmap of is_grads_batched"]
        self._modes = private["dispatch modes"]
        self._forward_ad = torch.autograd.forward_ad
        self._can_tell_exports = hasattr(torch.compiler, "is_exporting")  # from 2.7 on
        self._lacks = ""
        """What this version cannot be asked; empty if it can be asked everything."""
        for what, found in private.items():
            if found is None:
                path = PRIVATE[what]
                self._lacks = f"torch {torch.__version__} has no torch.{path}: it tells of {what}"

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`; for torch.compile as one operation, of which it traces the parts.

        Each name that compiled code has looked up is looked at again in every call of it, which
        takes longer than the numbers of a small tensor. A function of its arguments needs none.
        """
        if not self._torch.compiler.is_compiling() or _transform():
            return function
        operation = getattr(_IN_GRAPH, _in_graph(function))

        def call(xp: Namespace, *args: Any, **kwargs: Any) -> Any:
            given = [(a if isinstance(a, tuple) else (a,)) for a in (*args, *kwargs.values())]
            if all(self.is_known(n) for some in given for n in some if isinstance(n, int | float)):
                return operation(*args, **kwargs)
            return function(xp, *args, **kwargs)  # a symbol must not be looked at

        return call

    def unwritable(self, out: Any, *inputs: Any) -> str:
        """Return why the answer cannot go to `out`: torch follows the call, or forbids to write."""
        torch, tensors = self._torch, (out, *inputs)
        if why := self.tracing(*tensors):
            return f"torch follows the call ({why}); call outside of that"
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return "torch records a gradient; call under torch.no_grad(), detach the arguments"
        if out.is_inference() and not torch.is_inference_mode_enabled():
            return "it was made under torch.inference_mode(); call there too, pass its clone"
        return "" if is_one_to_one(out.shape, out.stride(), 1) else REPEATED

    def write(self, out: Any, answer: Any) -> None:
        """Copy an answer to `out`."""
        out.copy_(answer)

    def may_share_memory(self, x: Any, y: Any) -> bool:
        """Return whether the bounds of their memory overlap."""
        (x0, x1), (y0, y1) = _bounds(x), _bounds(y)
        return x0 < y1 and y0 < x1

    def same_entries(self, x: Any, y: Any) -> bool:
        """Return whether address, dtype and strides are the same, of tensors of one shape."""
        same = x.data_ptr() == y.data_ptr() and x.dtype == y.dtype
        return bool(same and x.stride() == y.stride())

    def strides(self, x: Any) -> Any:
        """Return the strides, None in C order."""
        return None if x.is_contiguous() else x.stride()

    def copy(self, x: Any) -> Any:
        """Return a copy in C order."""
        return x.contiguous()

    def device(self, x: Any) -> Any:
        """Return the device."""
        return x.device

    def own_dtype(self, dtype: Any) -> Any:
        """Return one of torch's own dtypes."""
        if not isinstance(dtype, self._torch.dtype):
            raise TypeError(dtype)
        return dtype

    def loss_dtype(self, x: Any) -> Any:
        """Return float32 under torch.autocast, as torch's own losses answer in."""
        on = self._torch.is_autocast_enabled(self.device_type(x))
        return self._torch.float32 if on else None

    def same_device(self, x: Any, other: Any) -> bool:
        """Return whether both live on one device."""
        return (x.is_cpu and other.is_cpu) or bool(x.device == other.device)

    def size(self, x: Any) -> int:
        """Return the number of elements."""
        size: int = x.numel()
        return size

    def device_type(self, x: Any) -> str:
        """Return ``"cpu"``, ``"cuda"`` and so on."""
        return "cpu" if x.is_cpu else str(x.device.type)

    def has_float64(self, x: Any) -> bool:
        """Return whether `x` is on no device of Apple."""
        return bool(x.device.type != "mps")

    def constant(self, x: Any) -> Any:
        """Return `x` with its derivative cut off."""
        return x.detach()

    def scalar(self, value: float, like: Any) -> Any:
        """Return a 0-d tensor; of a symbol of torch.compile, `asarray` would make a constant."""
        return self.xp.full((), value, dtype=like.dtype, device=like.device)

    def squeeze(self, x: Any, axes: tuple[int, ...]) -> Any:
        """Return `x` without these axes, by the method, which costs half of the function."""
        return x.squeeze(axes[0] if len(axes) == 1 else axes)

    def take_along_axis(self, x: Any, index: Any, axis: int) -> Any:
        """Gather: take_along_dim broadcasts, and torch.compile compiles it for one batch size."""
        return x.gather(axis, index)

    def put_along_axis(self, x: Any, index: Any, values: Any, axis: int) -> Any:
        """Write to `x`."""
        return x.scatter_(axis, index, values)

    def product(self, a: Any, b: Any, out: Any = None) -> Any:
        """Return a @ b, in the dtype that they have whatever autocast says."""
        torch, kind = self._torch, a.device.type
        if out is not None:  # which autocast leaves as it is
            return torch.mm(a, b, out=out)
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return torch.mm(a, b)
        with torch.autocast(kind, enabled=False):
            return torch.mm(a, b)

    def add_product(self, so_far: Any, a: Any, b: Any) -> Any:
        """Add a @ b in place."""
        return so_far.addmm_(a, b)

    def longest_sum(self, x: Any, axis: int) -> float:
        """Return no bound for the last axis.

        Along another one code that is generated for CPUs adds row after row, and torch's own sum
        adds the columns of a vector in another order than those left over.
        """
        if axis == x.ndim - 1:
            return math.inf
        if self._torch.compiler.is_compiling():
            return RUNNING_SUM
        # What is_grads_batched maps over has no concatenation.
        return math.inf if self._lacks or self._is_batched(x) else 1

    def is_known(self, number: Any) -> bool:
        """Return whether a number is known; in a trace a symbol looks like its first value."""
        torch = self._torch
        if torch.compiler.is_compiling():
            shapes = torch.fx.experimental.symbolic_shapes
            return hasattr(shapes, "has_static_value") and shapes.has_static_value(number)
        return isinstance(number, int | float)

    def reads_values(self, x: Any) -> bool:
        """Return whether the values of `x` can be looked at now."""
        if self._torch.compiler.is_compiling() or x.is_meta or type(x).__name__ in _ABSTRACT:
            return False
        # Inside a functional transform a tensor may be batched by vmap and has no single value.
        return self._interpreter is not None and self._interpreter() is None

    def looks_again(self, x: Any) -> bool:
        """Return whether `x` is on the CPU, and its values can be looked at now."""
        return bool(x.is_cpu) and self.reads_values(x)

    def tracing(self, *arrays: Any) -> str:
        """Return what follows or replaces these tensors' values."""
        torch = self._torch
        if torch.compiler.is_compiling():
            # What is exported has to run where this package is not installed.
            exporting = torch.compiler.is_exporting() if self._can_tell_exports else False
            way = "torch.export" if exporting else "torch.compile"
            return self._lacks or _transform() or way
        if self._lacks:
            return self._lacks
        for x in arrays:
            if type(x) not in self._own_types:
                return f"a {type(x).__name__}"
            if x.layout is not torch.strided:
                raise TypeError(  # torch takes no maximum of a sparse tensor along an axis
                    f"got a tensor of layout {x.layout}, expected a dense one: pass its to_dense()"
                )
            if self._is_batched(x):
                return "a vmap-batched tensor"
            if x.is_neg() or x.is_conj():
                return "a lazily negated or conjugated tensor"
            if x._is_zerotensor():
                return "a zero tensor without memory"
        if self._modes():
            return "a dispatch mode"
        if torch.jit.is_tracing():
            return "torch.jit.trace"
        return self.transform()

    def follows(self, *values: Any) -> bool:
        """Return whether autograd, a transform or a compiler follows one of these values."""
        torch = self._torch
        tensors = [x for x in values if isinstance(x, torch.Tensor)]
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        return wanted or torch.compiler.is_compiling() or self.transform(*tensors) != ""

    def transform(self, *arrays: Any) -> str:
        """Return which transform of torch follows these tensors, traced or not."""
        if self._lacks:
            return self._lacks
        if self._interpreter() is not None:
            return "a functional transform"
        if self._forward_ad._current_level >= 0:
            return "forward-mode differentiation"
        for x in arrays:
            if self._is_batched(x):
                return "a vmap-batched tensor"
        return ""


def raw_stream() -> Callable[[int], int]:
    """Return what gives the handle of a device's current CUDA stream."""
    torch: Any = sys.modules["torch"]
    found: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    # The public way costs a launch several times as much.
    return found or (lambda device: int(torch.cuda.current_stream(device).cuda_stream))


def _bounds(x: Any) -> tuple[int, int]:
    """Return the addresses where a tensor begins and ends."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    start: int = x.data_ptr()
    return start, start + (last + 1) * x.element_size() * bool(x.numel())


def _private(torch: Any, path: str) -> Any:
    """Return what has a private name, None where this version of torch has none."""
    try:
        return reduce(getattr, path.split("."), torch)
    except AttributeError:
        return None
