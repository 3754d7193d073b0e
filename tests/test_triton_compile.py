"""The Triton kernels, compiled for devices that are not here: wide loads, registers, how many."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from portable_softmax.kernels import _triton

if why := _triton.missing():
    pytest.skip(why, allow_module_level=True)
if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed", allow_module_level=True)

import triton_compile as tc

# A pass and a layout of each kernel, and of some two.
PASSES = (
    ("softmax", "registers", "classes"),
    ("log_softmax", "registers", "classes"),
    ("log_softmax", "relay", "classes"),
    ("logsumexp", "registers", "classes"),
    ("softmax_vjp", "registers", "classes"),
    ("log_softmax_vjp", "registers", "lead"),
    ("cross_entropy", "registers", "classes"),
    ("cross_entropy", "loop", "classes"),
    ("cross_entropy_value_and_grad", "registers", "classes"),
)


def one(name: str, way: str, along: str, dtype: str) -> tc.Case:
    """The largest tile of a kernel in a pass and a layout."""
    found = [c for c in tc.cases([name], [dtype]) if (c.way, c.along) == (way, along)]
    return max(found, key=lambda case: case.launch.classes * case.launch.rows)


# The two half types differ in how an element is converted: each pass takes one of them, in turn.
KINDS = [
    (dtype, *PASSES[i])
    for i in range(len(PASSES))
    for dtype in ("float32", "float64", ("float16", "bfloat16")[i % 2])
]


@pytest.mark.slow("Triton compiles every pass")
@pytest.mark.parametrize(("dtype", "name", "way", "along"), KINDS)
def test_sixteen_bytes_at_a_time(name, way, along, dtype):
    """Contiguous aligned rows are loaded and stored 128 bits wide, and nothing spills."""
    kernel = tc.compiled(one(name, way, along, dtype), 90)
    wide = "v2.b64" if dtype == "float64" else "v4.b32"
    loads, stores = tc.wide_accesses(kernel)
    assert wide in loads
    if name in ("softmax", "log_softmax", "softmax_vjp", "log_softmax_vjp") and way != "relay":
        assert loads == stores == {wide}
    elif way == "relay" or name == "cross_entropy_value_and_grad":  # states, or labels and losses
        assert wide in stores
    assert tc.resources(kernel, 90).spilled == 0
    # Neither contracted nor approximated, nor are subnormal numbers flushed to 0, but in the
    # exponentials of half precision, which `_math.quick_exp` keeps away from these.
    rough = set(re.findall(r"\w+\.(?:approx|ftz)[\w.]*", kernel.asm["ptx"]))
    half = dtype.endswith("16") and not name.endswith("_vjp")
    assert rough == ({"ex2.approx.ftz.f32"} if half else set())


@pytest.mark.slow("Triton compiles every kernel")
# Instructions that a thread issues for a byte of memory. An H100 SXM issues 10 in the time that
# its memory moves one: 132 multiprocessors, 4 instructions for 32 threads at 1.98 GHz, 3.35 TB/s.
@pytest.mark.parametrize(
    ("name", "dtype", "way", "most"),
    [
        ("softmax", "float32", "registers", 4.5),
        ("softmax", "bfloat16", "registers", 4.5),
        ("softmax", "float32", "relay", 7.5),
        ("softmax", "bfloat16", "relay", 5.5),
        ("cross_entropy", "float32", "registers", 9),
        ("cross_entropy", "bfloat16", "registers", 8),
        ("cross_entropy", "float32", "loop", 7.5),
        ("cross_entropy", "bfloat16", "loop", 6),
        ("cross_entropy_value_and_grad", "float32", "registers", 6),
        ("cross_entropy_value_and_grad", "bfloat16", "registers", 6.5),
        ("softmax_vjp", "bfloat16", "registers", 3),
    ],
)
def test_memory_is_busy_longer_than_arithmetic(name, dtype, way, most):
    cases = [c for c in tc.cases([name], [dtype]) if (c.way, c.along) == (way, "classes")]
    case = max(cases, key=lambda case: case.launch.classes)
    instructions = tc.instructions(tc.compiled(case, 90), case)
    moved = {"cross_entropy": 1, "softmax_vjp": 3}.get(name, 2) * (4 if dtype == "float32" else 2)
    assert 1 < instructions / moved < most


_SLOW = pytest.mark.slow("Triton compiles for each device")


@pytest.mark.parametrize(
    "arch", [pytest.param(80, marks=_SLOW), 90, pytest.param(100, marks=_SLOW)]
)
def test_every_option_compiles_for_every_device(arch):
    for name in ("softmax, where, temperature", "cross_entropy_value_and_grad, every option"):
        (case, *_) = tc.cases([name], ["float32"])
        assert tc.compiled(case, arch).asm["cubin"]


@pytest.mark.parametrize("name", ["softmax", "softmax_vjp", "cross_entropy_value_and_grad"])
def test_a_relay_publishes_what_it_has_stored(name):
    """A partial is stored, then all threads of its program meet, then one releases its bit.

    Whoever has acquired that loads partials past its own L1 cache, after all threads have met.
    """
    (case, *_) = relays([name], ["float32"])
    ptx = tc.compiled(case, 90).asm["ptx"]
    bit = r"(?:red|atom)\.global\.gpu\.release\.or\.b64"  # Triton 3.7 asks for the old word as well
    assert re.search(r"st\.global.*bar\.sync.*" + bit, ptx, re.S)
    acquired = ptx.index("ld.global.gpu.acquire.b64")
    assert re.search(r"bar\.sync.*ld\.global\.cg", ptx[acquired:], re.S)
    assert "ld.global.cg" not in ptx[:acquired]


RELAYS = (
    ("softmax", "float32"),
    ("log_softmax", "bfloat16"),
    ("logsumexp, backward", "float64"),
    ("softmax_vjp", "float32"),
    ("log_softmax_vjp", "bfloat16"),
    ("cross_entropy_value_and_grad", "bfloat16"),
    ("cross_entropy_value_and_grad, every option", "float64"),
)


@pytest.mark.slow("Triton compiles the largest kernels")
@pytest.mark.parametrize("turn", range(3))
@pytest.mark.parametrize("number", range(len(RELAYS)))
def test_a_relay_with_its_fallback_spills_nothing(number, turn):
    """Programs that wait, fold missing parts and write, in every layout of the table.

    Each kernel meets each layout and each device, and each layout each device: a Latin square. The
    session `triton-compile` compiles all of them.
    """
    name, dtype = RELAYS[number]
    found = relays([name], [dtype])
    assert len(found) == len(tc.ARCHS) == 3
    assert {case.along for case in found} == {"classes", "lead"}
    case, arch = found[turn], tc.ARCHS[(number + turn) % 3]
    assert case.constants["LOOKS"] > 0
    assert tc.resources(tc.compiled(case, arch), arch).spilled == 0


def relays(names: list[str], dtypes: list[str]) -> list[tc.Case]:
    """Every launch of kernels that is a relay."""
    return [case for case in tc.cases(names, dtypes) if case.way == "relay"]


def test_an_unaligned_pointer_is_read_narrowly():
    loads, stores = tc.wide_accesses(
        tc.compiled(one("softmax", "registers", "classes", "float32"), 90, aligned=False)
    )
    assert loads == stores == {"b32"}


def test_no_size_or_stride_makes_a_kernel_of_its_own():
    """Every argument that is no array, constant or flag is excluded from specialisation."""
    for kernel, _ in tc.KERNELS.values():
        for parameter in tc.jit(kernel).params:
            free = parameter.is_constexpr or parameter.name.endswith("_ptr")
            assert free or (parameter.do_not_specialize and parameter.annotation_type)


def test_offsets_are_64_bits_wide():
    """Row and column offsets pass 2^31 elements: each is a product of 64-bit numbers."""
    ttir = tc.compiled(one("softmax", "registers", "classes", "float32"), 90).asm["ttir"]
    columns = tc.compiled(one("log_softmax_vjp", "registers", "lead", "float32"), 90).asm["ttir"]
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
