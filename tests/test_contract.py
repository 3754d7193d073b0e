"""The contract of every path: what its table declares is answered within the documented bounds.

The cases are a cover by pairs of dtypes, layouts, axes, lengths of rows and options, drawn from a
fixed seed. The fuzz judges each entry of each answer; the path is that of the `Decision`.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import replace
from functools import partial

import pytest

from portable_softmax.kernels._request import SPARSE
from portable_softmax.kernels._table import TABLE
from tests.backends import BACKENDS
from tests.fuzz import cases, paths
from tests.fuzz.__main__ import Tally, check
from tests.fuzz.cover import cover
from tests.fuzz.draw import traits_of

# The paths on each backend: every kernel by its name, the portable formulas, whatever is taken by
# default, and what the library derives from the value.
PATHS = {
    "numpy": ("default", "portable", "numpy tiles", "packed rows"),
    "numba": ("numba rows",),
    "strict": ("default",),
    "torch": ("default", "autodiff", "numpy tiles", "packed rows"),
    "torch-portable": ("portable",),
    "torch-numba": ("numba rows", "autodiff"),
    "jax": ("default", "autodiff"),
    "jax-numba": ("numba rows", "autodiff"),
    "triton": ("triton rows",),
    "dask": ("default",),
    "mlx": ("default",),
}
# What a kernel leaves to others, by the reasons that a `Decision` gives.
LEFT = (
    *("dtype ", "dtypes: ", "options together: ", "probabilities with ", "a softcap of "),
    *("not in C order", "not one block in memory", "not two blocks in memory"),
    *("neither small nor large", "too many elements", "too few elements", "nothing to reduce"),
)
EVERY_LEFT = ("dtype other than the computation's", "extreme temperature", "complex weights")
# The options among them, by the first words of the kernel and the function.
OPTIONS_LEFT = {
    "numpy logmeanexp": "where",
    "numpy sigmoid_cross_entropy": "weight, pos_weight, label_smoothing, focal_gamma",
    "numba sigmoid_cross_entropy": "focal_gamma",
    "triton softmax": "sink, dtype",
    "triton log_softmax": "sink, dtype",
    "triton logsumexp": "b, return_sign, dtype",
    "triton cross_entropy": "sample_weight, dtype",
}
# How many cases are drawn in the fast part and in the slow one. What a compiler or a scheduler
# works on are few; the fast part has one dtype of them.
DRAWN = {
    **dict.fromkeys(("numpy", "strict", "torch"), (200, 1000)),
    **dict.fromkeys(("torch-portable", "mlx"), (60, 1000)),
    "numba": (25, 400),
    "torch-numba": (10, 200),
    "triton": (60, 300),
    "dask": (10, 150),
    "jax": (5, 60),
    "jax-numba": (0, 60),
}


# Where rows are cut, and pieces are shared by threads.
LARGE = ("numpy", "numba")


def has(name, way, function):
    """Whether a path of a backend may take some call of a function."""
    if way == "autodiff":
        return function.endswith("_value_and_grad")
    of_kernels = {kernel.name for kernel in TABLE}
    own = (way, BACKENDS[name].library)
    rows = [kernel for kernel in TABLE if (kernel.name, kernel.library) == own]
    return way not in of_kernels or any(function in kernel.operations for kernel in rows)


def contracts():
    """Return the backend and function of each contract, and how many cases are drawn."""
    slow = pytest.mark.slow("more cases, and every dtype for compilers")
    for name, function in itertools.product(PATHS, cases.FUNCTIONS):
        if any(has(name, way, function) for way in PATHS[name]):
            few, many = DRAWN[name]
            # What Numba compiles for a linear layer is what it compiles for the loss.
            if few and not (name == "torch-numba" and function in cases.LINEAR):
                yield pytest.param(name, function, few)
            yield pytest.param(name, function, many, marks=slow)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # Triton's interpreter
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # Dask's, of no values
@pytest.mark.parametrize(("backend_name", "function", "drawn"), list(contracts()), scope="session")
def test_every_pair_that_a_path_takes(xp, backend_name, function, drawn):
    traits = traits_of(xp.library)
    if backend_name in LARGE and function not in SPARSE:
        traits = replace(traits, large=0.03)
    if drawn < min(60, DRAWN[backend_name][1]):
        traits = replace(traits, floats=("float32",), integers=("int32",))
    chosen, tallies = defaultdict(list), defaultdict(Tally)
    for path in paths.paths(xp.library):
        if path.name in PATHS[backend_name] and has(backend_name, path.name, function):
            for case in cover(traits, function, drawn=drawn, takes=partial(is_taken, path, xp)):
                chosen[case.number].append((case, path))
    for number in sorted(chosen):
        (case, *_), ways = zip(*chosen[number], strict=True)
        for found in check(case, xp, list(ways), tallies):
            pytest.fail(str(found))
    assert tallies.keys()
    for (_, name), tally in tallies.items():
        assert tally.judged > 0, name


def is_taken(path, xp, case):
    """Whether a path takes a case; if not, it is for a reason that is known."""
    if case.refused is not None or not path.kernel:
        return path.takes(case)
    decision = paths.decided(path, case, paths.prepared(case, xp))
    if decision is None:
        return True  # a label without a class is to be refused
    if decision.taken is not None and decision.taken.kernel.name == path.kernel:
        return True
    if path.kernel == "portable":
        return decision.taken is None
    why = dict(decision.passed_over).get(path.kernel, decision.why)
    function = case.function.removesuffix("_value_and_grad")
    left = {*OPTIONS_LEFT.get(f"{path.kernel.split()[0]} {function}", "").split(", "), *EVERY_LEFT}
    options = {*why.removeprefix("options: ").split(", ")}
    known = why.startswith(LEFT) or why.endswith("classes along an axis that is not the last")
    assert known or options <= left, f"{case} is left to others: {why}"
    return False
