"""The ways to compute a case on a backend, and what a case looks like to someone who repeats it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import portable_softmax as ps
from portable_softmax import kernels
from portable_softmax.kernels._decide import Decision, decision_for
from portable_softmax.kernels._table import INTERPRETED
from tests.backends import Backend, np_dtype
from tests.fuzz import derivatives, layouts
from tests.fuzz.cases import POSITIONAL, Case


class Path(NamedTuple):
    """A switch around a call; `kernel` is the one that it asks for.

    Its gradients are our own, or `derived` by the library from the value.
    """

    name: str
    switch: Callable[[], Any]
    kernel: str = ""
    derived: bool = False

    def takes(self, case: Case) -> bool:
        """Whether it has a way to compute a case."""
        return not self.derived or derivatives.has_one(case)


def paths(library: str) -> list[Path]:
    """Return the default path, the portable one, and each kernel that can run here."""
    found = [Path("default", nullcontext)]
    if library in derivatives.LIBRARIES:
        found.append(Path("autodiff", nullcontext, derived=True))
    if library in ("numpy", "torch", "jax"):
        found.append(Path("portable", kernels.portable, "portable"))
    rows = ("numpy tiles", "packed rows", "numba rows")
    names = {"numpy": rows, "torch": rows, "jax": rows[-1:]}
    here = [name for name in names.get(library, ()) if name in kernels.available()]
    if library == "torch" and INTERPRETED:  # else Triton's kernels want a GPU
        here.append("triton rows")
    return found + [Path(name, partial(kernels.use, name), name) for name in here]


class Prepared(NamedTuple):
    """A case in arrays of a backend."""

    positional: tuple[Any, ...]
    keyword: dict[str, Any]
    bytes_before: dict[str, bytes]


def prepared(case: Case, backend: Backend) -> Prepared:
    """Return the arguments of a case."""
    arrays = {
        name: layouts.laid_out(
            backend.from_numpy(argument.values), argument.layout, backend.library,
            getattr(backend, "xp", np),
        )
        for name, argument in case.arrays.items()
    }  # fmt: skip
    before = (
        {n: backend.numpy(a).tobytes() for n, a in arrays.items()} if case.refused is None else {}
    )
    keyword = {**case.options, **{n: a for n, a in arrays.items() if n not in POSITIONAL}}
    if "dtype" in keyword:
        keyword["dtype"] = backend.from_numpy(np.zeros(1, np_dtype(keyword["dtype"]))).dtype
    return Prepared(tuple(a for n, a in arrays.items() if n in POSITIONAL), keyword, before)


def decided(path: Path, case: Case, given: Prepared) -> Decision | None:
    """Return the decision for a case on a path; None if the call is refused before it."""
    with path.switch():
        try:
            decision, _ = decision_for(case.function, *given.positional, **given.keyword)
        except Exception:  # the call itself raises it again
            return None
    return decision


def run(path: Path, case: Case, given: Prepared) -> tuple[Any, str]:
    """Return what a path answers, an exception included, and which kernel ran."""
    decision, kernel = decided(path, case, given), ""
    if decision is not None:
        kernel = "portable" if decision.taken is None else decision.taken.kernel.name
    function = partial(derivatives.found, case) if path.derived else getattr(ps, case.function)
    with path.switch():
        try:
            found = function(*given.positional, **given.keyword)
        except Exception as error:
            found = error
    if isinstance(found, tuple) and isinstance(found[1], tuple):  # a gradient by each argument
        found = (found[0], *[grad for grad in found[1] if grad is not None])
    return found, kernel


def unchanged(case: Case, given: Prepared, backend: Backend) -> bool:
    """Return whether the inputs hold the bytes that they held before."""
    keyword = given.keyword
    arrays = dict(zip((n for n in case.arrays if n in POSITIONAL), given.positional, strict=True))
    arrays |= {n: keyword[n] for n in case.arrays if n in keyword}
    return all(backend.numpy(arrays[n]).tobytes() == b for n, b in given.bytes_before.items())


def reproducer(case: Case, path: Path, backend: Backend) -> str:
    """Return a few lines that repeat a case."""
    lines = [
        "import numpy as np",
        "from numpy import array, inf, nan",
        "import portable_softmax as ps",
    ]
    names = []
    with np.printoptions(threshold=400, floatmode="unique"):
        for name, argument in case.arrays.items():
            values = argument.values
            if values.size > 300:
                lines.append(f"{name} = ...  # {values.dtype}{list(values.shape)}")
            elif values.dtype.name in ("bfloat16", "longdouble"):
                lines.append(
                    f"{name} = np.asarray({values.astype(float).tolist()})  # {values.dtype}"
                )
            else:
                lines.append(f"{name} = np.asarray({values.tolist()!r}, {values.dtype.str!r})")
            code = layouts.BY_LIBRARY[backend.library][argument.layout]
            if code != "a":
                lines.append(f"{name} = {code.replace('a.', f'{name}.')}  # with a = {name}")
            names.append(name if name in POSITIONAL else f"{name}={name}")
    options = [f"{k}={v!r}" for k, v in case.options.items()]
    switch = {"default": "", "portable": "with ps.kernels.portable(): "}.get(
        path.name, f"with ps.kernels.use({path.name!r}): "
    )
    switch = "# Beside what the library derives:\n" if path.derived else switch
    lines.append(f"{switch}print(ps.{case.function}({', '.join([*names, *options])}))")
    return "\n".join(lines)
