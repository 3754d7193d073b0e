"""The array libraries that the tests run on, each behind the same few calls."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import os
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

try:
    import ml_dtypes
except ImportError:  # only bfloat16 on NumPy needs it
    ml_dtypes = None

Given = tuple[tuple[Any, ...], dict[str, Any]]
FLOATS = ("float32", "float64")
HALVES = ("float16", "bfloat16")


class Backend:
    """One library on one device: how its arrays are made, and read back as NumPy's."""

    name: str
    library: str
    halves: tuple[str, ...] = HALVES
    default_float = "float64"
    differentiates = False
    lazy = False
    device: Any = None
    path = "without numba"
    """Which kernels the tests run on: all but Numba's, which `numba` tests, or one by name."""
    is_path = False
    """Whether it is the backend that a code path of ours is tested on."""
    costly = False
    """Whether each call is compiled or scheduled: all but its own and cheap tests are slow."""

    def __repr__(self) -> str:
        return self.name

    @classmethod
    def missing(cls) -> str:
        """Why it can't be used here; empty where it can."""
        found = importlib.util.find_spec(cls.library) is not None
        return "" if found else f"{cls.library} is not installed"

    def asarray(self, values: Any, dtype: str | None = None) -> Any:
        """Return values as an array of this backend; `dtype` by name, NumPy's own if not given."""
        array = np.asarray(values) if dtype is None else np.asarray(values).astype(np_dtype(dtype))
        return self.from_numpy(array)

    # A backend says how: an array from one of NumPy, its values (bfloat16 as float32, which holds
    # them all), and whether an array is of this library and on this device.
    from_numpy: Callable[[np.ndarray], Any]
    numpy: Callable[[Any], np.ndarray]
    is_ours: Callable[[Any], bool]

    def computed(self, answers: Any) -> Any:
        """Return the answers of several calls, which a lazy library computes all at once."""
        return answers

    def program(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of arrays as one program, where a library makes one for each call.

        It shall be right, not fast: the compiler leaves most of its work. What depends on the
        code that users run, such as digits of float32 or bits, is called without it.
        """
        return lambda *positional, **keyword: self.computed(function(*positional, **keyword))

    def call(self, function: Callable[..., Any], *positional: Any, **keyword: Any) -> Any:
        """Call a function as a `program`; any of the arguments may be an array."""
        return self.calls(function, [(positional, keyword)])[0]

    def calls(self, function: Callable[..., Any], given: Sequence[Given]) -> list[Any]:
        """Call a function several times in one `program`, each time with arrays and keywords."""
        arrays = [
            (positional, {k: v for k, v in keyword.items() if self.is_ours(v)})
            for positional, keyword in given
        ]

        def every(arrays):
            return [
                function(*positional, **{**keyword, **some})
                for (_, keyword), (positional, some) in zip(given, arrays, strict=True)
            ]

        return self.program(every)(arrays)

    def dtype_name(self, array: Any) -> str:
        return str(array.dtype).rpartition(".")[2]

    def version(self) -> str:
        return str(importlib.import_module(self.library).__version__)

    def device_name(self) -> str:
        return str(self.device or "cpu")

    def other_device(self, array: Any) -> Any:
        """Return the array on another device of the library, or None where there is no other."""
        return None


def np_dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _with(package: str, version: str) -> str:
    """Return the versions of a library and of what compiles a path of it."""
    return f"{version}, {package} {importlib.metadata.version(package)}"


class NumPy(Backend):
    name = library = "numpy"
    is_path = True
    device = "cpu"
    halves = HALVES if ml_dtypes else ("float16",)

    def from_numpy(self, array):
        return array

    def numpy(self, array):
        array = np.asarray(array)
        return array.astype(np.float32) if array.dtype.name == "bfloat16" else array

    def is_ours(self, array):
        return isinstance(array, np.ndarray | np.generic)


class Numba(NumPy):
    """NumPy's arrays, of any size, through the kernels compiled by Numba."""

    name = "numba"
    costly = True
    path = "numba rows"

    @classmethod
    def missing(cls):
        return "" if importlib.util.find_spec("numba") else "numba is not installed"

    def version(self):
        return _with("numba", super().version())


class Strict(Backend):
    name = "strict"
    is_path = True
    library = "array_api_strict"
    halves = ()

    def __init__(self):
        import array_api_strict

        self.xp = array_api_strict
        self.device = self.xp.Device("CPU_DEVICE")

    def from_numpy(self, array):
        return self.xp.asarray(array, copy=True)

    def numpy(self, array):
        cpu = self.xp.Device("CPU_DEVICE")
        return np.from_dlpack(self.xp.asarray(array, device=cpu, copy=True))

    def is_ours(self, array):
        return type(array).__module__.startswith("array_api_strict") and array.device == self.device

    def device_name(self):
        return "cpu"

    def other_device(self, array):
        return self.xp.asarray(array, device=self.xp.Device("device1"))


class Torch(Backend):
    name = library = "torch"
    is_path = True
    default_float = "float32"
    differentiates = True
    place = "cpu"

    def __init__(self):
        import torch

        self.xp = torch
        self.device = torch.device(self.place)

    def from_numpy(self, array):
        if array.dtype.name == "bfloat16":
            return self.from_numpy(array.astype(np.float32)).to(self.xp.bfloat16)
        return self.xp.tensor(np.ascontiguousarray(array).reshape(array.shape), device=self.place)

    def numpy(self, array):
        array = array.detach().cpu()
        return (array.float() if array.dtype == self.xp.bfloat16 else array).numpy()

    def is_ours(self, array):
        return isinstance(array, self.xp.Tensor) and array.device.type == self.place

    def grad(self, function):
        def slope(x):
            x = x.detach().requires_grad_()
            return self.xp.autograd.grad(function(x), x)[0]

        return slope

    def other_device(self, array):
        return array.to("meta")


class TorchCuda(Torch):
    name = "torch-cuda"
    place = "cuda"

    @classmethod
    def missing(cls):
        if why := super().missing():
            return why
        import torch

        return "" if torch.cuda.is_available() else "no CUDA device here"


class TorchPortable(Torch):
    """CPU tensors of torch, by torch's own operations."""

    name = "torch-portable"
    is_path = False
    path = "portable"


class TorchNumba(Torch):
    """CPU tensors of torch, of any size, through the kernels compiled by Numba."""

    name = "torch-numba"
    costly = True
    path = "numba rows"

    @classmethod
    def missing(cls):
        return super().missing() or Numba.missing()

    def version(self):
        return _with("numba", super().version())


def _fma(builder, x, y, z):
    """x y + z for Triton's interpreter, without the rounding of the product."""
    a, b, c = x.data, y.data, z.data
    if c.dtype != np.float64:
        total = (a.astype(np.float64) * b + c).astype(c.dtype)
    else:
        product = a * b
        (high_a, low_a), (high_b, low_b) = _halves(a), _halves(b)
        lost = high_a * high_b - product + high_a * low_b + low_a * high_b + low_a * low_b
        plain = product + c
        added = plain - product
        lost = lost + ((product - (plain - added)) + (c - added))
        total = np.where(np.isfinite(lost), plain + lost, plain)
    return type(z)(total, z.dtype.scalar)


def _halves(a):
    """float64 in two parts of 26 bits, whose products are exact."""
    high = (a.view(np.int64) + 2**26 & -(2**27)).view(np.float64)
    return high, a - high


class Triton(Torch):
    """CPU tensors of torch, on which Triton's interpreter runs the kernels."""

    name = "triton"
    path = "triton rows"

    def __init__(self):
        super().__init__()
        from triton.language import standard
        from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, _patch_lang

        # A launch gives the language its interpreted functions, and so does each function that a
        # kernel calls, again, which takes more than half of the time. Once is enough, and once
        # for what Triton's own functions call by another name.
        _patch_lang(standard.max.fn)
        InterpretedFunction.__call__ = lambda self, *a, **k: self.rewrite()(*a, **k)
        if tuple(map(int, self.version().split(".")[:2])) < (3, 9):
            InterpreterBuilder.create_fma = _fma  # theirs rounds the product, as no device does

    @classmethod
    def missing(cls):
        if why := super().missing():
            return why
        return _no_triton(interpreted=True)

    def version(self):
        return importlib.metadata.version("triton")

    def device_name(self):
        return "triton's interpreter"


def _no_triton(*, interpreted: bool) -> str:
    """Why Triton's kernels cannot be interpreted here, or compiled."""
    from portable_softmax.kernels import _triton

    if why := _triton.missing():
        return why
    wanted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    return "" if wanted == interpreted else f"TRITON_INTERPRET is {'1' if wanted else 'not 1'}"


class TritonCuda(TorchCuda):
    """CUDA tensors of torch, by the kernels as Triton compiles them."""

    name = "triton-cuda"
    path = "triton rows"

    @classmethod
    def missing(cls):
        return super().missing() or _no_triton(interpreted=False)

    def version(self):
        return _with("triton", super().version())


class Jax(Backend):
    name = library = "jax"
    is_path = True
    costly = True
    differentiates = True

    def __init__(self):
        import jax

        jax.config.update("jax_enable_x64", True)
        # XLA compiles three times as fast.
        self.quickly = {"xla_backend_optimization_level": 0}
        if jax.version.__version_info__ < (0, 11):  # later ones do not have the option
            self.quickly["xla_cpu_use_fusion_emitters"] = False
        self.xp = jax.numpy
        self.device = jax.devices()[0]

    def from_numpy(self, array):
        return self.xp.asarray(array)

    def numpy(self, array):
        array = np.asarray(array)
        return array.astype(np.float32) if array.dtype.name == "bfloat16" else array

    def is_ours(self, array):
        import jax

        return isinstance(array, jax.Array)

    def program(self, function):
        import jax

        return jax.jit(function, compiler_options=self.quickly)

    def grad(self, function):
        import jax

        return jax.jit(jax.grad(function))  # op by op, each would be a program


class JaxNumba(Jax):
    """JAX's arrays on the CPU, of any size, through handlers compiled by Numba.

    Two compilers take their time for each call: it runs the tests of values.
    """

    name = "jax-numba"
    path = "numba rows"

    @classmethod
    def missing(cls):
        return super().missing() or Numba.missing()

    def version(self):
        return _with("numba", super().version())


class Lazy(Backend):
    """A library that computes when it is asked to."""

    lazy = True
    device = "cpu"
    halves = ("float16",)

    def __init__(self):
        self.known: dict[int, tuple[Any, np.ndarray]] = {}

    def compute(self, arrays: list[Any]) -> Sequence[Any]:
        """Return the values of arrays; what several of them are made of is computed once."""
        raise TypeError("a library says how")

    def numpy(self, array):
        _, values = self.known.get(id(array)) or (array, *self.compute([array]))
        return np.asarray(values)

    def computed(self, answers):
        arrays = [leaf for leaf in _leaves(answers) if self.is_ours(leaf)]
        self.known = {id(a): (a, v) for a, v in zip(arrays, self.compute(arrays), strict=True)}
        return answers

    def calls(self, function, given):
        # A graph takes time with the square of its length: each call has one of its own.
        answers, known = [], {}
        for call in given:
            answers += super().calls(function, [call])
            known |= self.known
        self.known = known
        return answers


def _leaves(tree: Any) -> Iterator[Any]:
    """Yield what is in tuples, lists and dicts, one by one."""
    if isinstance(tree, tuple | list | dict):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(branch)
    else:
        yield tree


class Dask(Lazy):
    name = library = "dask"
    is_path = True
    costly = True

    def from_numpy(self, array):
        import dask.array as da

        # Two chunks along every axis, so that each reduction has to merge.
        return da.from_array(array.copy(), chunks=tuple(max(1, -(-n // 2)) for n in array.shape))

    def compute(self, arrays):
        import dask

        with dask.config.set(scheduler="synchronous"), np.errstate(all="ignore"):
            return dask.compute(*arrays, optimize_graph=False)

    def is_ours(self, array):
        import dask.array as da

        return isinstance(array, da.Array)


class Cupy(Backend):
    name = library = "cupy"
    is_path = True
    halves = ("float16",)

    def __init__(self):
        import cupy

        self.xp = cupy
        self.device = cupy.cuda.Device(0)

    @classmethod
    def missing(cls):
        if why := super().missing():
            return why
        import cupy

        try:
            cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError:
            return "no CUDA device here"
        return ""

    def from_numpy(self, array):
        return self.xp.asarray(array)

    def numpy(self, array):
        return self.xp.asnumpy(array)

    def is_ours(self, array):
        return isinstance(array, self.xp.ndarray)


class TritonCupy(Cupy):
    """CuPy's arrays, by the kernels as Triton compiles them."""

    name = "triton-cupy"
    path = "triton rows"

    @classmethod
    def missing(cls):
        return super().missing() or _no_triton(interpreted=False)

    def version(self):
        return _with("triton", super().version())


class Ndonnx(Lazy):
    """Arguments of an ONNX graph, which ONNX Runtime computes when a value is asked for."""

    name = library = "ndonnx"
    costly = True
    # ONNX Runtime compiles a graph for each value that is read. Its own bits of a row depend on the
    # rows beside it, so that `test_same_bits` is not among these.

    def __init__(self):
        import ndonnx
        import onnxruntime
        from spox import _future as spox

        super().__init__()
        # ndonnx evaluates its constants as it goes: a session of ONNX Runtime for each, 30 ms.
        spox.set_value_prop_backend(spox.ValuePropBackend.REFERENCE)
        _quicken_spox()
        self.xp, self.runtime = ndonnx, onnxruntime
        self.given: deque[tuple[str, Any, np.ndarray]] = deque(maxlen=512)  # more than a test has
        self.names = map("input{}".format, itertools.count())

    @classmethod
    def missing(cls):
        wanted = ("ndonnx", "onnxruntime")
        absent = [name for name in wanted if importlib.util.find_spec(name) is None]
        return f"{absent[0]} is not installed" if absent else ""

    def version(self):
        return f"{self.xp.__version__}, onnxruntime {self.runtime.__version__}"

    def from_numpy(self, array):
        if array.dtype.kind == "c":
            pytest.skip("ndonnx has no complex dtype")
        dtype = self.xp.asarray(np.empty(0, array.dtype)).dtype
        made = self.xp.argument(shape=array.shape, dtype=dtype)
        self.given.append((next(self.names), made, array.copy()))
        return made

    def compute(self, arrays):
        inputs = {name: made for name, made, _ in self.given}
        values = {name: value for name, _, value in self.given}
        answers = {f"answer{i}": array for i, array in enumerate(arrays)}
        model = self.xp.build(inputs, answers, drop_unused=True)
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        # ONNX Runtime 1.32 takes a float64 constant for 1 if float32 does.
        session = self.runtime.InferenceSession(
            model.SerializeToString(), options, disabled_optimizers=["NoopElimination"]
        )
        used = {one.name: values[one.name] for one in session.get_inputs()}
        return session.run([*answers], used)

    def is_ours(self, array):
        return isinstance(array, self.xp.Array)


def _quicken_spox() -> None:
    """Infer the types of a constant and of a node once: more than half of the time of a graph."""
    from spox._node import Node
    from spox.opset.ai.onnx import v21

    constant, initialize, kept = v21.constant, Node.__init__, {}

    def constant_once(*, value=None, **others):
        if value is None:
            return constant(**others)
        value = np.asarray(value)
        key = (value.dtype, value.shape, value.tobytes())
        if key not in kept:
            kept[key] = constant(value=value)
        return kept[key]

    v21.constant = constant_once
    # `get_output_vars`, which follows, infers them again.
    Node.__init__ = lambda self, *given, **options: initialize(
        self, *given, **(options | {"infer_types": False})
    )


class Mlx(Backend):
    """Arrays of MLX on the CPU, where it has float64."""

    name = library = "mlx"
    differentiates = True
    default_float = "float32"
    device = "cpu"
    halves = HALVES

    def __init__(self):
        import mlx.core as mx

        mx.set_default_device(mx.cpu)
        self.xp = mx

    def version(self):
        return importlib.metadata.version("mlx")

    def from_numpy(self, array):
        if array.dtype.kind == "c" and array.dtype.itemsize > 8:
            pytest.skip("MLX has no complex128")
        if array.dtype.name == "bfloat16":
            return self.xp.array(array.astype(np.float32)).astype(self.xp.bfloat16)
        wide = {"dtype": self.xp.float64} if array.dtype.name == "float64" else {}
        return self.xp.array(array.copy(), **wide)  # float32 unless told otherwise

    def numpy(self, array):
        if array.dtype == self.xp.bfloat16:
            array = array.astype(self.xp.float32)
        return np.array(array)

    def is_ours(self, array):
        return isinstance(array, self.xp.array)

    def grad(self, function):
        return self.xp.grad(function)


class Cubed(Lazy):
    """Arrays of cubed in two chunks along every axis, so that each reduction has to merge."""

    name = library = "cubed"
    costly = True
    # Each value takes it hundredths of a second, most of it to plan.

    def __init__(self):
        import cubed

        super().__init__()
        self.cubed, self.xp = cubed, importlib.import_module("cubed.array_api")
        self.executor = importlib.import_module("cubed.runtime.create").create_executor(
            "single-threaded"
        )
        self.folder = tempfile.TemporaryDirectory(prefix="cubed-")
        self.spec = cubed.Spec(work_dir="memory", allowed_mem="100MB")
        _keep_in_memory("memory/")

    def from_numpy(self, array):
        # Of an empty array cubed cannot change the chunks.
        whole = 0 in array.shape
        chunks = tuple(max(1, n if whole else -(-n // 2)) for n in array.shape)
        # asarray takes one megabyte at most.
        make = self.cubed.from_array if array.nbytes > 10**6 else self.xp.asarray
        return make(array.copy(), chunks=chunks, spec=self.spec)

    def compute(self, arrays):
        with np.errstate(all="ignore"):  # of this thread
            # One answer as users have it; to fuse steps copies the whole plan for each of them.
            fused = len(arrays) == 1
            return self.cubed.compute(*arrays, executor=self.executor, optimize_graph=fused)

    def is_ours(self, array):
        return isinstance(array, self.cubed.Array)

    def other_device(self, array):
        spec = self.cubed.Spec(work_dir="memory", allowed_mem="99MB")
        return self.xp.asarray(self.numpy(array), spec=spec)


class _Kept:
    """An array that cubed stores, in memory: what it asks of one of Zarr."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, chunks: tuple[int, ...]) -> None:
        self.values = np.empty(shape, dtype)
        self.shape, self.dtype, self.chunks = shape, dtype, chunks

    def __getitem__(self, key: Any) -> np.ndarray:
        return self.values[key].copy()

    def __setitem__(self, key: Any, value: np.ndarray) -> None:
        self.values[key] = value


def _keep_in_memory(folder: str) -> None:
    """Keep what cubed would store below a folder: Zarr's files are nine tenths of its time."""
    from cubed.storage.zarr import LazyZarrArray

    create, reopen = LazyZarrArray.create, LazyZarrArray.open

    def created(self, mode="w-"):
        if not str(self.store).startswith(folder):
            return create(self, mode)
        self.kept = _Kept(self.shape, self.dtype, self.chunks)
        return self.kept

    LazyZarrArray.create = created
    LazyZarrArray.open = lambda self: self.kept if hasattr(self, "kept") else reopen(self)


class Dpnp(Backend):
    """Arrays of dpnp on the OpenCL device that the CPU is with `intel-opencl-rt`."""

    name = library = "dpnp"
    costly = True
    halves = ("float16",)

    def __init__(self):
        import dpctl
        import dpnp

        self.xp, self.queue = dpnp, dpctl.SyclQueue("cpu")
        self.device = "opencl:cpu"

    @classmethod
    def missing(cls):
        if why := super().missing():
            return why
        # What pip installs is known to no loader of OpenCL.
        driver = Path(sys.prefix, "lib", "libintelocl.so")
        if driver.exists():
            os.environ.setdefault("OCL_ICD_FILENAMES", str(driver))
        import dpctl

        return "" if dpctl.has_cpu_devices() else "no SYCL device for the CPU"

    def from_numpy(self, array):
        return self.xp.asarray(array, sycl_queue=self.queue)

    def numpy(self, array):
        return self.xp.asnumpy(array)

    def is_ours(self, array):
        return isinstance(array, self.xp.ndarray) and array.sycl_queue == self.queue

    def other_device(self, array):
        import dpctl

        return self.xp.asarray(array, sycl_queue=dpctl.SyclQueue("cpu", property="in_order"))


BACKENDS: dict[str, type[Backend]] = {
    cls.name: cls
    for cls in (
        *(NumPy, Numba, Strict, Torch, TorchPortable, TorchNumba, TorchCuda, Triton, TritonCuda),
        *(Jax, JaxNumba, Dask, Cupy, TritonCupy, Ndonnx, Mlx, Cubed, Dpnp),
    )
}

# Those that differ by library or device. The others are paths of the same arrays.
LIBRARIES = tuple(name for name, backend in BACKENDS.items() if backend.path == "without numba")
# Those that run code of ours that no other runs: Dask has chunks, strict the portable code alone.
PATHS = tuple(name for name, backend in BACKENDS.items() if backend.is_path)
