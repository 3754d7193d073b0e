"""The Triton kernels, compiled for devices that are not here: wide loads, registers, how many."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from portable_softmax.kernels import _triton

if why := _triton.missing():
    pytest.skip(why, allow_module_level=True)
if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed", allow_module_level=True)

import triton_compile as tc

from portable_softmax.kernels._triton import _layout, _sizes

SHORT = "4 x 512"  # float64: 4 x 256
QUICK = {
    "softmax": ("registers", "classes"),
    "log_softmax": ("loop", "classes"),
    "logsumexp": ("registers", "classes"),
    "softmax_vjp": ("registers", "classes"),
    "log_softmax_vjp": ("registers", "lead"),
    "cross_entropy": ("registers", "classes"),
    "cross_entropy_value_and_grad": ("registers", "classes"),
}


def one(name: str, dtype: str) -> tc.Case:
    """The largest tile of a kernel in the pass and layout above."""
    way, along = QUICK[name]
    found = [c for c in tc.cases([name], [dtype]) if (c.way, c.along) == (way, along)]
    return max(found, key=lambda case: case.launch.classes * case.launch.rows)


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("dtype", tc.DTYPES)
def test_sixteen_bytes_at_a_time(name, dtype):
    """Contiguous aligned rows are loaded and stored 128 bits wide, and nothing spills."""
    kernel = tc.compiled(one(name, dtype), 90)
    wide = "v2.b64" if dtype == "float64" else "v4.b32"
    loads, stores = tc.wide_accesses(kernel)
    assert wide in loads
    if name in ("softmax", "log_softmax", "softmax_vjp", "log_softmax_vjp"):
        assert loads == stores == {wide}
    elif name == "cross_entropy_value_and_grad":
        assert wide in stores
    assert tc.resources(kernel, 90).spilled == 0
    # Neither contracted nor approximated, nor are subnormal numbers flushed to 0.
    ptx = kernel.asm["ptx"]
    assert ".ftz" not in ptx
    assert "approx" not in ptx


@pytest.mark.parametrize("arch", tc.ARCHS)
def test_every_option_compiles_for_every_device(arch):
    for name in ("softmax, where, temperature", "cross_entropy_value_and_grad, every option"):
        (case, *_) = tc.cases([name], ["float32"])
        assert tc.compiled(case, arch).asm["cubin"]


def test_an_unaligned_pointer_is_read_narrowly():
    loads, stores = tc.wide_accesses(tc.compiled(one("softmax", "float32"), 90, aligned=False))
    assert loads == stores == {"b32"}


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_few_kernels_for_many_shapes(itemsize):
    """1,000 random shapes take at most 40 kernels of one operation and dtype.

    Sizes and strides are no part of what Triton specialises on: what tells two launches apart is
    their constants.
    """
    rng = np.random.default_rng(0)
    kernels = set()
    for _ in range(1_000):
        ndim = rng.integers(1, 5)
        shape = tuple(int(n) for n in np.exp(rng.uniform(0, [14, 9, 6, 4][ndim - 1], ndim)))
        axis = int(rng.integers(ndim))
        strides = _layout.contiguous(shape)
        found = _layout.layout(shape, (axis,), [strides, strides], 2, 16 // itemsize)
        assert found is not None
        launch = _sizes.launch(
            found.lead, found.other, found.classes, found.along, max(4, itemsize)
        )
        ways = ("fold", "finish") if launch.way == "split" else (launch.way,)
        kernels |= {(way, launch, found.along, found.unit) for way in ways}
    assert 10 < len(kernels) <= 40


def test_no_size_or_stride_makes_a_kernel_of_its_own():
    """Every argument that is no array, constant or flag is excluded from specialisation."""
    for kernel, _ in tc.KERNELS.values():
        for parameter in tc.jit(kernel).params:
            free = parameter.is_constexpr or parameter.name.endswith("_ptr")
            assert free or (parameter.do_not_specialize and parameter.annotation_type)


def test_offsets_are_64_bits_wide():
    """Row and column offsets pass 2^31 elements: each is a product of 64-bit numbers."""
    ttir = tc.compiled(one("softmax", "float32"), 90).asm["ttir"]
    columns = tc.compiled(one("log_softmax_vjp", "float32"), 90).asm["ttir"]
    for text in (ttir, columns):
        assert "arith.muli" in text
        products = [line for line in text.splitlines() if "arith.muli" in line]
        strides = [line for line in products if "_lead" in line or "_class" in line]
        assert all("i64" in line for line in strides)


def test_the_table_of_resources_is_there():
    text = (
        Path(tc.__file__).parent.parent.joinpath("docs", "triton_resources.md").read_text("utf-8")
    )
    for name in tc.KERNELS:
        assert f"| {name} | " in text
