"""What holds the package together: the direction of imports, and what using it loads."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import portable_softmax as ps
from portable_softmax import compat
from portable_softmax.compat import optax, scipy_special, torch_functional  # noqa: F401
from portable_softmax.kernels import _table

PACKAGE = Path(ps.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the face down to the ground: a room may import from the rooms below it only.
ROOMS = (
    "__main__",
    "_cli",
    "__init__",
    "compat",
    "testing",
    "layers",
    "online",
    "_linear_cross_entropy",
    "_cross_entropy",
    "_entmax_loss",
    "_entmax",
    "_entropy",
    "_logsums",
    "_sigmoid_cross_entropy",
    "_vjps",
    "_softmax",
    "kernels",
    "portable",
    "textbook",
    "_checks",
    "libraries",
    "_typing",
)
LIBRARIES = (
    *("numpy", "torch", "jax", "dask", "cupy", "array_api_strict", "ndonnx", "mlx", "cubed"),
    *("dpnp", "numba", "triton", "scipy"),
)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """Return the modules that a file imports, and whether it does so when it is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(n) for statement in tree.body for n in _outside_functions(statement)}
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [(name, id(node) in top) for name in names]
    return found


def _outside_functions(node):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _outside_functions(child)


def test_every_room_is_in_the_plan():
    assert {room(path) for path in MODULES} == set(ROOMS)


def test_direction_of_imports():
    for path in MODULES:
        here = room(path)
        for name, _ in imports(path):
            parts = name.split(".")
            if parts[0] == "portable_softmax" and len(parts) > 1:
                # `from portable_softmax import kernels` names a room; `... import softmax` the face
                there = parts[1] if parts[1] in ROOMS else "__init__"
                below = ROOMS.index(there) > ROOMS.index(here)
                assert below or there == here, f"{path} imports {name}"


def test_textbook_stands_on_the_namespace_lookup_alone():
    ours = {n for n, _ in imports(PACKAGE / "textbook.py") if n.startswith("portable_softmax")}
    assert {name.split(".")[1] for name in ours} <= {"libraries", "_typing"}
    assert "portable_softmax.libraries.namespace" in ours


SHARED_BY_KERNELS = (
    *("_cuts", "_folding", "_in_parts", "_means", "_request", "_threads", "_weighted"),
)


def test_kernels_do_not_import_each_other():
    """Each technology, a file or a folder, stands on what they share alone."""
    for path in (PACKAGE / "kernels").rglob("*.py"):
        own = path.relative_to(PACKAGE / "kernels").parts[0].removesuffix(".py")
        if own in ("__init__", "_decide", "_switches", "_table"):
            continue
        # Tiles of a linear layer, chunks, shards and parts of rows are calls of their own, for the
        # table.
        if own in ("_chunks", "_dtensor", "_folding", "_linear"):
            continue
        for name, _ in imports(path):
            if name.startswith("portable_softmax.kernels"):
                there = name.split(".")[2]
                assert there in (own, *SHARED_BY_KERNELS), f"{path.name} imports {name}"


def test_only_libraries_imports_array_api_compat():
    importers = {room(path) for path in MODULES for name, _ in imports(path) if "array_api" in name}
    assert importers == {"libraries"}


def test_portable_names_no_library():
    """Neither in its imports nor anywhere else in its code; comments may say why."""
    for path in (PACKAGE / "portable").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        names |= {part for name, _ in imports(path) for part in name.split(".")}
        assert not names.intersection({*LIBRARIES, "np", "library"}), path.name


# What the files of a folder of kernels may import. Modules that the table names load it when used;
# an adapter is imported for an array of its library.
TECHNOLOGIES = {
    "_numba": ("numba",),
    "_dtensor": ("torch",),
    "_torch": ("torch",),
    "_jax": ("jax",),
    "_triton": ("triton", "torch", "cupy"),
}
ASKED = {k.module for k in _table.TABLE}


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


def test_array_libraries_are_imported_when_used_only():
    torch_nn = PACKAGE / "compat" / "torch_nn.py"  # whose classes are torch's
    core = [p for p in MODULES if room(p) not in ("_cli", "__main__") and p != torch_nn]
    for path in core:
        own = () if module(path) in ASKED else TECHNOLOGIES.get(path.parent.name, ())
        for name, at_import in imports(path):
            library = name.split(".")[0]
            allowed = library not in LIBRARIES or library in ("numpy", *own)
            assert allowed or not at_import, path.name


def test_a_technology_is_imported_by_its_own_folder_and_that_lazily():
    """Neither what the table names nor any other room loads it by being imported."""
    loads = {p: {name for name, at_import in imports(p) if at_import} for p in MODULES}
    for folder, technologies in TECHNOLOGIES.items():
        inside = {module(p): p for p in MODULES if p.parent == PACKAGE / "kernels" / folder}
        heavy = {
            name
            for name, path in inside.items()
            if {n.split(".")[0] for n in loads[path]} & {*technologies}
        }
        while more := {m for m, p in inside.items() if m not in heavy and loads[p] & heavy}:
            heavy |= more
        assert heavy
        assert not heavy & ASKED
        for path in {*MODULES} - {*inside.values()}:
            assert not heavy & loads[path], path.name


def in_a_fresh_process(code: str) -> list:
    code += "\nimport json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


USE = """
import numpy as np, portable_softmax as ps
x, t = np.zeros((3, 4)), np.asarray([0, 1, 2])
ps.softmax(x), ps.log_softmax(x, where=x == 0), ps.logsumexp(x, b=x), ps.softmax_vjp(x, x)
ps.log_softmax_vjp(x, x), ps.softmax_jacobian(x), ps.cross_entropy_value_and_grad(x, t)
ps.cross_entropy(x, x, label_smoothing=0.1), ps.SoftmaxWithLoss().forward(x, t)
ps.textbook.SoftmaxWithLoss().forward(x, t)
ps.linear_cross_entropy_value_and_grad(x, x, t[:3] * 0)
ps.online.softmax(x, ps.online.merge(ps.online.fold(x), ps.online.identity(x)))
from portable_softmax.compat import optax, scipy_special, torch_functional
scipy_special.logsumexp([1.0], b=2), torch_functional.nll_loss(x, t)
optax.softmax_cross_entropy(x, x, where=x == 0)
"""


def test_numpy_alone_is_loaded():
    """Nothing third-party but numpy and array_api_compat, to import it and to use it."""
    baseline = in_a_fresh_process("import numpy")
    third_party = {*in_a_fresh_process(USE)} - {*baseline} - {*sys.stdlib_module_names}
    assert third_party == {"portable_softmax", "array_api_compat"}


# --------------------------------------------------------------------------- the public face


PUBLIC = [
    getattr(module, name)
    for module in (
        *(ps, ps.online, ps.textbook, ps.kernels),
        *(compat.optax, compat.scipy_special, compat.torch_functional),
    )
    for name in module.__all__
]


def test_each_public_name_has_an_example():
    assert [thing for thing in PUBLIC if ">>> " not in (thing.__doc__ or "")] == []


@pytest.mark.parametrize(
    "module", [ps, ps.online, ps.textbook, ps.kernels], ids=lambda m: m.__name__
)
def test_all_is_what_is_exported(module):
    modules = {"layers", "portable"} if module is ps else set()
    visible = {name for name in vars(module) if not name.startswith("_")} - modules
    imported = {n.rpartition(".")[2] for n, _ in imports(Path(module.__file__))}
    own = {
        name
        for name in visible
        if getattr(getattr(module, name), "__module__", "").startswith("portable_softmax")
        or name in ("kernels", "online", "textbook")
    }
    if module in (ps.online, ps.textbook):
        own -= imported
    assert sorted(module.__all__) == module.__all__ or module is ps.textbook
    assert set(module.__all__) == own


def test_the_wheel_is_typed_and_versioned():
    assert (PACKAGE / "py.typed").exists()
    assert re.fullmatch(r"\d+\.\d+\.\d+", ps.__version__)


WORKED_ON = (
    *("x", "y", "log_y", "dy", "logits", "logits_p", "logits_q", "labels"),
    *("hidden", "classifier"),
)


def test_arrays_are_positional_and_options_are_not():
    """Of every function: what it works on is positional only, and all else by keyword only."""
    for function in filter(inspect.isfunction, (getattr(ps, name) for name in ps.__all__)):
        for parameter in inspect.signature(function).parameters.values():
            positional = parameter.name in WORKED_ON
            expected = parameter.POSITIONAL_ONLY if positional else parameter.KEYWORD_ONLY
            assert parameter.kind is expected, (function, parameter.name)
