"""Compile every Triton kernel for every launch and write down what it takes of a device.

    python tests/triton_resources.py docs/triton_resources.md

No device is needed: Triton brings its own assembler. It takes about half an hour on two cores, and
ends with status 1 if a kernel spills registers.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton_compile import ARCHS, KERNELS, Case, cases, compiled, instructions, resources

HEADINGS = ("kernel", "dtype", "layout", "pass", "tiles", *(f"sm_{arch}" for arch in ARCHS))

INTRODUCTION = f"""\
# Triton kernels: what they ask of a device

## Registers, spills and shared memory

Every kernel, compiled for three generations of devices with each launch that the launch table
([_sizes.py](../portable_softmax/kernels/_triton/_sizes.py)) can choose. A cell holds the most
registers a thread, the most bytes spilled, and the most bytes of shared memory, over the tiles of
its row; a layout is what lies side by side in memory. Compiling says nothing about speed: no
device has run these kernels.

Written with Triton {triton.__version__} by

    python tests/triton_resources.py docs/triton_resources.md
"""


ARITHMETIC = """\
## Instructions for each byte

What a thread issues for each byte that is moved between it and memory, in the plain kernels along
the classes, compiled for sm_90: for an entry of the longest rows that stay in registers, of a loop,
and of a relay, in whose parts the rest of the program is counted. An H100 SXM issues 10 in the time
that its memory moves a byte (132 multiprocessors, 4 instructions for 32 threads, 1.98 GHz;
3.35 TB/s, by its data sheet). More than that, and arithmetic takes longer than memory.
"""
SPECIAL = ("where, temperature", "every option", "smoothed", "distribution")
PLAIN = [name for name in KERNELS if not name.endswith(SPECIAL)]
# Arrays of the length of a row that are read and written.
ARRAYS = {"logsumexp": 1, "cross_entropy": 1, "softmax_vjp": 3, "log_softmax_vjp": 3}


# A process is told a case by its number: what is compiled cannot be sent.
CASES = tuple(cases())


def measured(job: tuple[int, int]) -> tuple[int, int, int]:
    number, arch = job
    found = resources(compiled(CASES[number], arch), arch)
    return found.registers, found.spilled, found.shared


def longest(name: str, dtype: str, way: str) -> Case | None:
    found = [c for c in cases([name], [dtype]) if (c.way, c.along) == (way, "classes")]
    return max(found, key=lambda case: case.launch.classes, default=None)


def arithmetic() -> str:
    """Return the table of instructions for each byte."""
    lines = ["| kernel | dtype | registers | loop | relay |", "| --- | --- | --- | --- | --- |"]
    for name in PLAIN:
        for dtype, size in (("float32", 4), ("bfloat16", 2)):
            cells = []
            for way in ("registers", "loop", "relay"):
                case = longest(name, dtype, way)
                if case is None:
                    cells.append("")
                    continue
                count = instructions(compiled(case, 90), case)
                cells.append(f"{count / size / ARRAYS.get(name, 2):.1f}")
            lines.append(f"| {name} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    jobs = [(number, arch) for number in range(len(CASES)) for arch in ARCHS]
    with ProcessPoolExecutor(2) as pool:
        taken = list(pool.map(measured, jobs, chunksize=8))
    rows = defaultdict(lambda: defaultdict(list))
    spilled = []
    for (number, arch), numbers in zip(jobs, taken, strict=True):
        case = CASES[number]
        rows[case.name, case.dtype, case.along, case.way][arch].append(numbers)
        if numbers[1]:
            spilled.append(f"{case.name}, {case.dtype}, {case.along}, {case.way}, {case.tile}, "
                           f"{case.launch.warps} warps, sm_{arch}: {numbers[1]} bytes")  # fmt: skip
    lines = [HEADINGS, ("---",) * len(HEADINGS)]
    for key, found in rows.items():
        most = [tuple(map(max, zip(*found[arch], strict=True))) for arch in ARCHS]
        cells = [" / ".join(map(str, numbers)) for numbers in most]
        lines.append((*key, str(len(found[ARCHS[0]])), *cells))
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    text = f"{INTRODUCTION}\n{table}\n\n{ARITHMETIC}\n{arithmetic()}\n"
    Path(sys.argv[1]).write_text(text, encoding="utf-8")
    print(f"{len(jobs)} kernels compiled, {len(spilled)} spill", *spilled, sep="\n")
    sys.exit(bool(spilled))


if __name__ == "__main__":
    main()
