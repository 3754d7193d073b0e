"""The tables of backends and of kernels, from what the code declares.

    python tests/capabilities.py

writes them anew, each between its two markers: the backends in README.md, the kernels on the site's
page of kernels. The site takes the table of one function from here, too.
"""

from __future__ import annotations

import ast
import math
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from backends import BACKENDS, LIBRARIES

import portable_softmax
from portable_softmax import libraries
from portable_softmax.kernels import _table
from portable_softmax.kernels._request import PARTS, ROWS, VJPS

ROOT = Path(__file__).resolve().parent.parent

# What compiles or traces a function of a library, and is tested in tests/test_LIBRARY.py.
COMPILERS = {"torch": "torch.compile", "jax": "jax.jit", "mlx": "mx.compile"}

HEADINGS = (
    "backend", "extra", "float16 tested", "bfloat16 tested", "autodiff", "compiled", "lazy",
    "fused kernels", "tested",
)  # fmt: skip


def table() -> str:
    """Return the table in Markdown."""
    rows = [HEADINGS, ("---",) * len(HEADINGS), *(row(*item) for item in sessions().items())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def sessions() -> dict[str, str | None]:
    """Return the libraries of BACKENDS in noxfile.py, which has their tests: name to extra."""
    return {name: extra for name, extra in assigned("BACKENDS").items() if name in LIBRARIES}


def assigned(name: str) -> Any:
    """Return a constant of noxfile.py, which needs nox to be imported."""
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise SystemExit(f"noxfile.py has no {name}")


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
        yes(library.lazy),
        kernels(name),
        tested(name, extra),
    )


def tested(name: str, extra: str | None) -> str:
    """Return when the tests of a backend run."""
    if extra == "cuda":  # which stands for one for each CUDA generation
        return "where there is a CUDA device"
    return f"by `tests-{name}`" if name in assigned("ALONE") else "in every run"


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
    """Return the names alone: the table of kernels says what each takes."""
    return ", ".join(dict.fromkeys(k.name for k in _table.TABLE if k.library == library)) or "none"


def operations(kernel: _table.Kernel) -> str:
    """Return what a kernel answers; a gradient goes with its function."""
    if kernel.operations == PARTS:
        return "parts of rows"
    found, together = kernel.operations, (*ROWS, *VJPS)
    if set(together) <= {*found}:
        found = ("softmax family", *(name for name in found if name not in together))
    gradients = {f"{name}_{kind}" for name in found for kind in ("vjp", "value_and_grad")}
    return ", ".join(name for name in found if name not in gradients)


BY_OPERATION = (
    "backend", "kernels", "float16 tested", "bfloat16 tested", "autodiff", "compiled", "lazy",
    "tested",
)  # fmt: skip


def operation_table(operation: str) -> str:
    """Return the table of one function: what answers it on each backend."""
    if operation not in portable_softmax.__all__:
        raise ValueError(f"operation is {operation!r}, expected a public name")
    rows = [BY_OPERATION, ("---",) * len(BY_OPERATION)]
    for name, extra in sessions().items():
        cells = dict(zip(HEADINGS, row(name, extra), strict=True))
        found = [
            k.name if k.on_by_default else f"{k.name} (off by default)"
            for k in _table.TABLE
            if k.library == name and operation in k.operations
        ]
        cells["kernels"] = ", ".join(dict.fromkeys(found)) or "portable code"
        rows.append(tuple(cells[heading] for heading in BY_OPERATION))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


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


class Table(NamedTuple):
    """A generated table, and the file that holds it."""

    make: Callable[[], str]
    path: Path


TABLES = {
    "capabilities": Table(table, ROOT / "README.md"),
    "kernels": Table(claims, ROOT / "docs" / "results" / "kernels.md"),
}


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def written(name: str) -> str:
    """Return the table of this name that its file holds."""
    begin, end = markers(name)
    text = TABLES[name].path.read_text(encoding="utf-8")
    return text.partition(begin)[2].partition(end)[0].strip()


def main() -> None:
    for name, (make, path) in TABLES.items():
        begin, end = markers(name)
        before, found, rest = path.read_text(encoding="utf-8").partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"{path.relative_to(ROOT)} lacks the markers {begin} and {end}")
        path.write_text(f"{before}{begin}\n{make()}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
