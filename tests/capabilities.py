"""The tables of backends and of kernels in README.md, from what the code declares.

    python tests/capabilities.py

writes them anew, each between its two markers in README.md.
"""

from __future__ import annotations

import ast
import math
import re
import tomllib
from pathlib import Path

from backends import BACKENDS, LIBRARIES

from portable_softmax import libraries
from portable_softmax.kernels import _table
from portable_softmax.kernels._request import LINEAR, OPERATIONS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"

# What compiles or traces a function of a library, and is tested in tests/test_LIBRARY.py.
COMPILERS = {"torch": "torch.compile", "jax": "jax.jit"}

HEADINGS = (
    "backend", "extra", "float16", "bfloat16", "autodiff", "compiled", "lazy", "fused kernels",
    "tested",
)  # fmt: skip


def table() -> str:
    """Return the table in Markdown."""
    rows = [HEADINGS, ("---",) * len(HEADINGS), *(row(*item) for item in sessions().items())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def sessions() -> dict[str, str | None]:
    """Return the libraries of BACKENDS in noxfile.py, which has their tests: name to extra."""
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "BACKENDS":
            found = ast.literal_eval(node.value)
            return {name: extra for name, extra in found.items() if name in LIBRARIES}
    raise SystemExit("noxfile.py has no BACKENDS")


def row(name: str, extra: str | None) -> tuple[str, ...]:
    """Return the cells of one backend, without importing its library."""
    backend = BACKENDS[name]
    library = libraries.CLASSES[backend.library]
    return (
        backend.library.replace("_", "-"),
        ", ".join(f"`{found}`" for found in extras(extra)) or "none",
        yes("float16" in backend.halves),
        yes("bfloat16" in backend.halves),
        yes(library.differentiates),
        compiler(name),
        yes(library.chunked),
        kernels(name),
        # CuPy's extra stands for one for each CUDA generation.
        "where there is a CUDA device" if extra == "cuda" else "in every run",
    )


def yes(is_true: bool) -> str:
    return "yes" if is_true else "no"


def extras(extra: str | None) -> list[str]:
    """Return the extras of pyproject.toml that bring a backend's library."""
    if extra is None:
        return []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [e for e in project["optional-dependencies"] if re.fullmatch(rf"{extra}\d*", e)]


def compiler(name: str) -> str:
    """Return what compiles a library's functions, if the tests of that library use it."""
    found = COMPILERS.get(name)
    if found is None:
        return "no"
    tests = (ROOT / "tests" / f"test_{name}.py").read_text(encoding="utf-8")
    return f"`{found}`" if f"{found}(" in tests else "untested"


def kernels(library: str) -> str:
    found = [f"{k.name} ({operations(k)})" for k in _table.TABLE if k.library == library]
    return "; ".join(dict.fromkeys(found)) or "none"


def operations(kernel: _table.Kernel) -> str:
    named = {
        (*OPERATIONS, *LINEAR): "all",
        OPERATIONS: "all but linear_cross_entropy",
        LINEAR: "linear_cross_entropy",
    }
    return named.get(kernel.operations) or ", ".join(kernel.operations)


CLAIMS = (
    "kernel", "arrays", "operations", "dtypes", "options", "devices", "traced", "elements",
    "default",
)  # fmt: skip


def claims() -> str:
    """Return the table of what each kernel takes."""
    rows = [CLAIMS, ("---",) * len(CLAIMS), *map(claim, _table.TABLE)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def claim(kernel: _table.Kernel) -> tuple[str, ...]:
    """Return the cells of one kernel."""
    dtypes = [name for name in kernel.dtypes if name not in _table.INTEGERS]
    return (
        kernel.name,
        kernel.library,
        operations(kernel),
        ", ".join([*dtypes, *(["integers"] if len(dtypes) < len(kernel.dtypes) else [])]),
        ", ".join(kernel.options) or "none",
        ", ".join(kernel.devices) or "any",
        ", ".join(kernel.tracing) or "no",
        elements(kernel),
        "on" if kernel.on_by_default else "off",
    )


def elements(kernel: _table.Kernel) -> str:
    """Return the sizes that a kernel takes."""
    if kernel.at_most < math.inf:
        return f"to {kernel.at_most:,}"
    return f"from {kernel.at_least:,}" if kernel.at_least else "any"


TABLES = {"capabilities": table, "kernels": claims}


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def in_readme(name: str) -> str:
    """Return the table of this name that README.md holds."""
    begin, end = markers(name)
    return README.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0].strip()


def main() -> None:
    text = README.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        begin, end = markers(name)
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"README.md lacks the markers {begin} and {end}")
        text = f"{before}{begin}\n{make()}\n{end}{after}"
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
