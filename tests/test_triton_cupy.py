"""How the Triton kernels are launched for CuPy, followed with stand-ins for what needs a device."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from portable_softmax.kernels import _triton
from portable_softmax.kernels._request import (
    PLAIN_LOSS,
    PLAIN_ROWS,
    LossOptions,
    Request,
    RowOptions,
    active,
)
from portable_softmax.kernels._triton import _cupy
from portable_softmax.libraries import CLASSES


class Device:
    """A device that can be entered, as CuPy's."""

    current = 0

    def __init__(self, number: int):
        self.id = number

    def __enter__(self):
        self.before, Device.current = Device.current, self.id

    def __exit__(self, *_):
        Device.current = self.before


class Array(np.ndarray):
    """NumPy's memory with the attributes of CuPy's array that a launch looks at."""

    device = Device(1)

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)


@pytest.fixture
def cupy(monkeypatch):
    """As much of CuPy as the host's side of a launch uses."""

    def array(function):
        def made(*args, **options):
            assert Device.current == 1  # CuPy makes arrays on the current device
            return function(*args, **options).view(Array)

        return made

    module = SimpleNamespace(
        __name__="array_api_compat.cupy", float32=np.float32, int32=np.int32, int64=np.int64,
        iinfo=np.iinfo,
        cuda=SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=0xABC)),
        expand_dims=np.expand_dims, squeeze=np.squeeze, sum=np.sum, mean=np.mean,
        where=np.where,
        broadcast_to=np.broadcast_to,
        **{name: array(getattr(np, name)) for name in (
            "ascontiguousarray", "empty_like", "empty", "zeros")},
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def request(cupy, operation, x, axis, options=None, labels=None, dtypes=("float32", "float32")):
    """Return what a public function would make of a call."""
    neutral = PLAIN_ROWS if labels is None else PLAIN_LOSS
    options = options or neutral
    compute_dtype, result_dtype = map(np.dtype, dtypes)
    return Request(
        operation, CLASSES["cupy"](cupy, "cupy"), x, result_dtype.name, (axis,), compute_dtype,
        result_dtype, "", options, active(options, neutral), None, labels,
    )  # fmt: skip


class Kernel:
    """What Triton's @jit gives, as far as it is used: it compiles, and can then be launched."""

    def __init__(self, *names: str):
        self.arg_names, self.launched = names, []

    def run(self, *arrays, grid, warmup, **numbers):
        assert warmup  # compiled only: a launch by Triton would take torch's stream
        assert Device.current == 1
        options = {"num_warps", "maxnreg", "enable_fp_fusion"}
        assert set(numbers) - options <= set(self.arg_names)

        def launch(*arguments, stream):
            self.launched.append((dict(zip(self.arg_names, arguments, strict=True)), stream, grid))

        return {grid: launch}


def test_a_launch_on_the_arrays_device_and_cupys_stream(cupy):
    x = np.ones((2, 3), np.float32).view(Array)
    kernel = Kernel("x_ptr", "y_ptr", "n", "ROWS")
    options = {"num_warps": 4, "enable_fp_fusion": False}
    launch = _cupy.launcher(kernel, (7, 1, 1), (x, x), {"n": 3, "ROWS": 4}, options)
    assert not kernel.launched
    launch((x, x), {"n": 5})
    ((arguments, stream, grid),) = kernel.launched
    assert (stream, grid, Device.current) == (0xABC, (7, 1, 1), 0)
    assert arguments["x_ptr"].data_ptr() == x.ctypes.data
    assert (arguments["n"], arguments["ROWS"]) == (5, 4)


def test_strides_are_in_elements(cupy):
    x = np.zeros((4, 6), np.float16).view(Array)
    assert _cupy.strides(x.T[::2]) == (2, 6)
    assert _cupy.strides(_cupy.broadcast(x[:1], (5, 6))) == (0, 1)


def test_torch_without_cuda_in_the_process_is_a_reason(cupy, monkeypatch):
    call = request(cupy, "softmax", np.ones((2, 3), np.float32).view(Array), 1)
    for available, why in ((True, ""), (False, "the torch in this process has none")):
        torch = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda answer=available: answer))
        monkeypatch.setitem(sys.modules, "torch", torch)
        assert _triton.declines(call, False).endswith(why)
        assert bool(_triton.declines(call, False)) == bool(why)
    monkeypatch.delitem(sys.modules, "torch")
    assert _triton.declines(call, False) == ""


# --------------------------------------------------------------------------- with Triton


@pytest.fixture
def launches(cupy, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from portable_softmax.kernels._triton import _launch, _loss, _rows

    monkeypatch.setattr(_launch, "_FRAMES", {})
    seen = []
    for module, name in ((_rows, "forward"), (_loss, "loss"), (_loss, "label_weights")):
        kernel = Kernel(*getattr(module, name).arg_names)
        monkeypatch.setattr(module, name, kernel)
        seen.append(kernel)
    return seen


def test_every_argument_of_a_kernel_is_given(launches, cupy):
    """Each launch names all arguments, in the kernel's order: what is compiled takes them so."""
    x = np.ones((2, 3), np.float32).view(Array)
    labels = np.zeros(2, np.int64).view(Array)
    _triton.softmax(request(cupy, "softmax", x, 1))
    mask = np.ones((1, 3), bool).view(Array)
    _triton.softmax(request(cupy, "softmax", x.T, 0, RowOptions(where=mask.T, temperature=2.0)))
    options = LossOptions(weight=np.ones(3, np.float32).view(Array), ignore_index=-1, where=mask)
    call = request(cupy, "cross_entropy_value_and_grad", x, 1, options, labels)
    loss, grad = _triton.cross_entropy(call)
    assert np.shape(loss) == ()
    assert grad.shape == (2, 3)
    forward, loss, weights = launches
    assert [len(k.launched) for k in launches] == [2, 1, 1]
    for arguments, stream, _ in (*forward.launched, *loss.launched, *weights.launched):
        assert stream == 0xABC
        assert arguments["UNIT"] == 1


@pytest.mark.parametrize("ignore", [-1, 3, 2**63 - 1, 2**63, 2**64 - 1])
def test_an_ignored_index_fits_into_64_bits(launches, cupy, ignore):
    """A kernel compares it with labels as int64, and a launch takes no number beyond that."""
    dtype = np.int64 if ignore < 2**63 else np.uint64
    options, labels = LossOptions(ignore_index=ignore), np.zeros(2, dtype).view(Array)
    x = np.ones((2, 3), np.float32).view(Array)
    _triton.cross_entropy(request(cupy, "cross_entropy", x, 1, options, labels))
    _, loss, weights = launches
    for arguments, *_ in (*loss.launched, *weights.launched):
        assert arguments["ignore"] == np.array(ignore, dtype).view(np.int64)
        assert -(2**63) <= arguments["ignore"] < 2**63


def test_triton_sees_a_pointer_and_its_dtype(cupy):
    """What Triton makes a kernel for: the type, and whether the address is a multiple of 16."""
    pytest.importorskip("triton", reason="triton is not installed")
    from triton.backends.compiler import BaseBackend
    from triton.runtime.jit import native_specialize_impl

    for dtype, name in (("float32", "fp32"), ("float16", "fp16"), ("float64", "fp64"),
                        ("int64", "i64"), ("bool", "u1")):  # fmt: skip
        memory = np.zeros(64, dtype).view(Array)
        start = -memory.ctypes.data % 16 // memory.itemsize
        for offset in (0, 1):
            pointer = _cupy.Pointer(memory[start + offset :])
            kind, _ = native_specialize_impl(BaseBackend, pointer, False, True, True)
            assert kind == f"*{name}"


def test_a_number_that_changes_needs_no_launch_of_its_own(launches, cupy):
    """Whoever lowers a temperature from step to step pays once for finding the kernel."""
    from portable_softmax.kernels._triton import _launch

    x = np.ones((2, 3), np.float32).view(Array)
    for temperature in (2.0, 3.0, 4.0):
        _triton.softmax(request(cupy, "softmax", x, 1, RowOptions(temperature=temperature)))
    (frame,) = _launch._FRAMES.values()
    assert len(frame.launchers) == 1
    forward, *_ = launches
    assert [a["temperature"] for a, _, _ in forward.launched] == [2.0, 3.0, 4.0]


class Driver:
    """A driver of Triton for a device that is not there: what a launch asks of it."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(cupy, monkeypatch):
    """The kernels that Triton would compile for the launches of a test: key -> signature."""
    pytest.importorskip("triton", reason="triton is not installed")
    import triton
    from triton.runtime.jit import JITFunction

    from portable_softmax.kernels._triton import _launch, _rows

    if not isinstance(_rows.forward, JITFunction):
        pytest.skip("TRITON_INTERPRET is 1: nothing is compiled")
    found = {}

    class Compiled:
        def __init__(self, kernel, signature):
            self.arguments = list(signature.values())

        def __getitem__(self, grid):
            def run(*arguments, stream):
                assert len(arguments) == len(self.arguments)

            return run

    def compile_(self, key, signature, *rest):
        cache = self.device_caches[0][0]
        found[self.__name__, key] = cache[key] = Compiled(self, signature)
        return cache[key]

    before = triton.runtime.driver._active
    monkeypatch.setattr(JITFunction, "_do_compile", compile_)
    monkeypatch.setattr(_launch, "_FRAMES", {})
    triton.runtime.driver.set_active(Driver())
    caches = [(k, k.device_caches) for k in (_rows.forward, _rows.pull_back)]
    for kernel, _ in caches:
        kernel.device_caches = type(kernel.device_caches)(kernel.create_binder)
    yield found
    for kernel, cache in caches:
        kernel.device_caches = cache
    triton.runtime.driver._active = before


@pytest.mark.parametrize("operation", ["softmax", "logsumexp"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_few_kernels_for_many_shapes(compiled, cupy, operation, dtype):
    """1,000 random shapes compile at most 40 kernels of one operation and dtype.

    They go through Triton as a user's calls do, but for the compiling: sizes and strides are no
    part of what Triton tells kernels apart by, and an address only is one if it is odd.
    """
    rng = np.random.default_rng(0)
    memory = np.zeros(4 << 20, dtype)
    start = -memory.ctypes.data % 16 // memory.itemsize
    memory = memory[start:].view(Array)
    kind = np.dtype(dtype)
    compute = np.promote_types(kind, np.float32)
    for _ in range(1_000):
        ndim = rng.integers(1, 5)
        shape = tuple(int(n) for n in np.exp(rng.uniform(0, [14, 8, 5, 3.5][ndim - 1], ndim)))
        shape = shape if np.prod(shape) <= memory.size else (shape[0],)
        x = memory[: int(np.prod(shape))].reshape(shape)
        axis = int(rng.integers(len(shape)))
        call = request(cupy, operation, x, axis, dtypes=(compute, kind))
        getattr(_triton, operation)(call)
    assert 10 < len(compiled) <= 40
