"""Compile the Triton kernels as a launch would, for devices that need not be here."""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from portable_softmax.kernels._triton import _general, _loss, _rows, _sizes

ARCHS = (80, 90, 100)
# Triton's name of a dtype, its dtype, that of the computation, and the elements in 16 bytes.
DTYPES = {
    "float32": ("fp32", tl.float32, 4),
    "float64": ("fp64", tl.float64, 2),
    "float16": ("fp16", tl.float32, 8),
    "bfloat16": ("bf16", tl.float32, 8),
}

# One set of options a kernel is compiled with: name -> (kernel, constants).
EVERY = {"IGNORING": True, "WEIGHTED": True, "Z": True, "CAPPED": True, "MASKED": True}
LOSS = {"GRAD": True, "DIVISOR": "count", "CHECK": True, **dict.fromkeys(EVERY, False)}
GENERAL = {**LOSS, **EVERY, "INDEX": True, "SMOOTH": True, "DIVISOR": "sum"}
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{
        f"{op}{', where, temperature' if more else ''}": (
            _rows.forward,
            {"OP": op, "MASKED": more, "TEMPERED": more and op != "logsumexp"},
        )
        for op in ("softmax", "log_softmax", "logsumexp")
        for more in (False, True)
    },
    "logsumexp, backward": (
        _rows.forward,
        {"OP": "logsumexp_vjp", "MASKED": False, "TEMPERED": False},
    ),
    **{
        op: (_rows.pull_back, {"OP": op, "TEMPERED": False, "OFF": 1e-6})
        for op in ("softmax_vjp", "log_softmax_vjp")
    },
    "cross_entropy": (_loss.loss, {**LOSS, "GRAD": False, "DIVISOR": "none"}),
    "cross_entropy, backward": (_loss.loss, {**LOSS, "DIVISOR": "given", "CHECK": False}),
    "cross_entropy_value_and_grad": (_loss.loss, LOSS),
    "cross_entropy_value_and_grad, every option": (
        _loss.loss,
        {**LOSS, **EVERY, "DIVISOR": "sum"},
    ),
    "cross_entropy_value_and_grad, smoothed": (_general.general, GENERAL),
    "cross_entropy_value_and_grad, distribution": (
        _general.general,
        {**GENERAL, "INDEX": False, "IGNORING": False, "CHECK": False, "DIVISOR": "count"},
    ),
}


@dataclass(frozen=True)
class Case:
    """A kernel with its constants, as one launch has them."""

    name: str
    kernel: Any
    dtype: str
    launch: _sizes.Launch
    along: str
    way: str
    constants: dict[str, Any]

    @property
    def tile(self) -> str:
        return f"{self.launch.rows} x {self.launch.classes}"


def launches(itemsize: int, **how: bool) -> Iterator[tuple[str, _sizes.Launch]]:
    """Yield each layout and launch that the table can answer with for a kernel."""
    seen = set()
    for along, lead in itertools.product(("classes", "lead"), (1, 8, 1_000, 1_000_000)):
        for classes in (1 << k for k in range(2, 21)):
            found = _sizes.launch(lead, 1, classes, along, itemsize, **how)
            found = found._replace(parts=1)  # no constant of a kernel
            if (along, found) not in seen:
                seen.add((along, found))
                yield along, found


def cases(names: Any = KERNELS, dtypes: Any = DTYPES) -> Iterator[Case]:
    """Yield every kernel in each dtype with each launch."""
    for name, dtype in itertools.product(names, dtypes):
        kernel, constants = KERNELS[name]
        _, compute, unit = DTYPES[dtype]
        once = constants.get("OP") == "logsumexp" or not constants.get("GRAD", True)
        plain = kernel is not _general.general
        heavy = not plain or constants.get("MASKED", False) or constants.get("CAPPED", False)
        heavy = heavy or (name in ("log_softmax", "log_softmax_vjp") and unit == 8)
        for along, launch in launches(16 // unit, once=once, relay=plain, heavy=heavy):
            more = {
                "PASS": launch.way, "MAX_PARTS": launch.max_parts, "LOOKS": _sizes.LOOKS,
                "ALONG": along,
                "UNIT": unit if launch.classes >= unit else 1, "QUICK": unit == 8,
                "DTYPE": compute, "ROWS": launch.rows, "CLASSES": launch.classes,
                "STEPS": _sizes.STEPS,
            }  # fmt: skip
            yield Case(name, kernel, dtype, launch, along, launch.way, {**constants, **more})


def jit(kernel: Any) -> JITFunction:
    """Return a kernel as it is compiled."""
    if not isinstance(kernel, JITFunction):
        raise TypeError("TRITON_INTERPRET is 1: @triton.jit has made nothing that compiles")
    return kernel


def compiled(case: Case, arch: int, *, aligned: bool = True) -> Any:
    """Compile a case to PTX and a cubin."""
    kernel = jit(case.kernel)
    short, compute, _ = DTYPES[case.dtype]
    wide = "fp64" if compute is tl.float64 else "fp32"
    pointers = {"labels_ptr": "*i64", "where_ptr": "*u1", "flags_ptr": "*i64"}
    pointers |= dict.fromkeys(("m_ptr", "rest_ptr", "total_ptr", "loss_ptr", "weight_ptr",
                               "divisor_ptr"), f"*{wide}")  # fmt: skip
    signature, attributes, constants = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", case.constants[name]
        elif name.endswith("_ptr"):
            signature[name] = pointers.get(name, f"*{short}")
            if aligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = parameter.annotation_type
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": case.launch.warps,
            "maxnreg": case.launch.registers,
            "enable_fp_fusion": False,
        },
    )


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes of a device."""

    registers: int
    spilled: int  # bytes stored and loaded
    shared: int


def resources(kernel: Any, arch: int) -> Resources:
    """Ask Triton's own assembler, with the options that Triton gives it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(kernel.asm["ptx"], encoding="utf-8")
        command = (
            *(get_ptxas(arch).path, "-v", "--fmad=false", "--regAllocOptLevel=2"),
            *(f"--gpu-name={sm_arch_from_capability(arch)}", str(source)),
            *("-o", str(Path(folder, "kernel.cubin"))),
        )
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", said)
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    return Resources(int(registers), spilled, kernel.metadata.shared)


_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\S+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")


def instructions(kernel: Any, case: Case) -> float:
    """Return how many instructions a thread executes for an entry of a long row.

    Of rows in registers these are all up to the last EXIT, after which come the slow paths of
    divisions; of a loop, those of a turn; of a relay, those of a turn of its two innermost long
    loops, which fold and which write, and all others over the length of a part.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = (triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(found)
        if one := _LINE.search(line):
            found.append((one[1], one[2]))
    last = max(i for i, (name, _) in enumerate(found) if name == "EXIT")
    each = case.launch.rows * case.launch.classes / (case.launch.warps * 32)
    if case.way == "registers":
        return (last + 1) / each
    spans = []
    for i, (name, operands) in enumerate(found[:last]):
        target = re.search(r"\.L_\w+", operands)
        if name.startswith("BRA") and target and labels.get(target[0], last) < i - 40:
            spans.append((labels[target[0]], i))
    # The loop over parts, which holds the one over a part, turns once.
    loops = [b - a + 1 for a, b in spans if not any(a <= c < d < b for c, d in spans)]
    part = _sizes.PART_CLASSES * 4 / (16 / DTYPES[case.dtype][2]) / (case.launch.warps * 32)
    more = (last - sum(loops)) / part if case.way == "relay" else 0.0
    return sum(loops) / each + more


def wide_accesses(kernel: Any) -> tuple[set[str], set[str]]:
    """Return the kinds of loads and of stores of global memory in the PTX."""
    ptx = kernel.asm["ptx"]
    return (
        set(re.findall(r"ld\.global\.([\w.]+)", ptx)),
        set(re.findall(r"st\.global\.([\w.]+)", ptx)),
    )
