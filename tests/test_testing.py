"""`check_library` passes right libraries and finds wrong ones; adapters are found if installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import numpy as np
import pytest

import portable_softmax as ps
from portable_softmax import libraries, testing
from portable_softmax.testing import CASES, Report, check_library

pytestmark = pytest.mark.run_on("libraries")

ADAPTER = Path(__file__).parent / "adapter"
strict_only = pytest.mark.libraries("array_api_strict")


def test_the_defaults_read_and_make_arrays():
    report = check_library(np, skip={"axes and shapes, float32": "known"})
    assert report.ok, str(report)
    assert [str(one) for one in report.skipped] == ["axes and shapes, float32: known"]
    assert str(report).startswith("numpy: right. 105 cases passed, 0 failed, 1 skipped.")
    assert not Report("none", (), (), ()).ok
    with pytest.raises(ValueError, match="skip names no case: softmaxes"):
        check_library(np, skip={"softmaxes": "no such case"})


@pytest.mark.parametrize(("dtype", "most"), [("float32", 2e-6), ("float64", 1e-12)])
def test_an_answer_is_off_by_a_few_units_at_most(dtype, most):
    arrays = testing.Arrays(np, dtype, None, None)
    one = np.ones((), dtype)
    assert not arrays.differs(one * (1 + np.finfo(dtype).eps), 1.0)
    assert arrays.differs((one + most).astype(dtype), 1.0)


def test_every_public_function_is_checked(monkeypatch):
    called = set()

    def noted(name, function):
        return lambda *args, **kwargs: (called.add(name), function(*args, **kwargs))[1]

    functions = {n for n in ps.__all__ if n[0].islower() and callable(getattr(ps, n))}
    for name in functions:
        monkeypatch.setattr(testing, name, noted(name, getattr(ps, name)))
    assert check_library(np).ok
    assert called == functions


@pytest.fixture
def shelf(xp, monkeypatch):
    """A library in an array class of its own, with the adapter that it needs."""
    monkeypatch.syspath_prepend(ADAPTER)
    shelf = importlib.import_module("shelf")
    adapter = importlib.import_module("shelf_adapter")
    monkeypatch.setattr(libraries, "_registered", lambda package: adapter.Shelf)
    yield shelf
    for cls in [cls for cls in libraries.BY_TYPE if cls.__module__ == "shelf"]:
        del libraries.BY_TYPE[cls]


def too_large(real):
    return lambda *args, **kwargs: real(*args, **kwargs) * 1.001


def of_the_first(real):
    return lambda x, *args, **kwargs: real(x[:1, ...] if x.ndim else x, *args, **kwargs)


def in_float32(real):
    import array_api_strict as strict

    def function(x, *args, **kwargs):
        y = real(x, *args, **kwargs)
        return strict.astype(strict.astype(y, strict.float32), y.dtype)

    return function


@strict_only
@pytest.mark.parametrize(
    ("name", "wrong"),
    [("sum", too_large), ("exp", too_large), ("exp", in_float32), ("max", of_the_first)],
    ids=lambda one: one if isinstance(one, str) else one.__name__,
)
def test_a_wrong_library_is_found_out(shelf, name, wrong):
    library = shelf.library(f"wrong_{name}_{wrong.__name__}", {name: wrong})
    report = check_library(library)
    assert not report.ok
    found = {one.case: one for one in report.failed}
    first = found["softmax, log_softmax and logsumexp, float64"]
    assert first.expected != first.got
    assert f"WRONG. {len(report.passed)} cases passed, {len(found)} failed" in str(report)
    assert str(first) in str(report)
    # What does not compute passes nonetheless: the report says where it is wrong.
    assert "probabilities with ignore_index, float64" in report.passed


def of_dtype_float32(real):
    import array_api_strict as strict

    return lambda x, **options: strict.astype(real(x, **options), strict.float32)


def of_no_axis(real):
    return lambda x, **options: x


def of_anything(real):
    return lambda x, **options: real(x == x, **options)


def that_writes_to_its_argument(real):
    def function(x, y):
        answer = real(x, y)
        x *= 1 + 2.0**-52  # too little for another answer
        return answer

    return function


@strict_only
@pytest.mark.parametrize(
    ("name", "wrong", "case", "expected"),
    [
        ("squeeze", of_dtype_float32, "axes and shapes", "the dtype float64, not float32"),
        ("squeeze", of_no_axis, "axes and shapes", "the shape (), not (1, 1)"),
        ("all", of_anything, "label >= C or < 0 and not ignore_index", "IndexError"),
        ("matmul", that_writes_to_its_argument, "linear_cross_entropy", "inputs unchanged"),
    ],
)
def test_what_else_than_a_value_is_wrong_is_named(shelf, name, wrong, case, expected):
    library = shelf.library(f"wrong_{name}_{wrong.__name__}", {name: wrong})
    found = {one.case: one.expected for one in check_library(library).failed}
    assert found[f"{case}, float64"] == expected


@strict_only
def test_a_library_without_float64_skips_it(shelf):
    report = check_library(shelf.library("narrow", {}), asarray=None, skip=None)
    assert report.ok
    library = shelf.library("narrow_alone", {})
    library.float64 = library.float32
    report = check_library(library)
    assert report.ok
    assert {one.reason for one in report.skipped} == {"float64 became float32"}
    assert len(report.skipped) == len(CASES)


def test_what_has_no_dtypes_is_no_right_library():
    report = check_library(math)
    assert not report.ok
    assert (report.passed, report.failed) == ((), ())
    assert {one.reason.partition(":")[0] for one in report.skipped} == {"no float64", "no float32"}


# --- Adapters that an installed package registers -----------------------------------------------

REPORT = "import shelf; from portable_softmax.testing import check_library as c; print(c(shelf))"
EXPLAIN = """
import shelf
from portable_softmax import kernels
x = shelf.asarray([[0.0, 1.0]])
print(kernels.explain("softmax", x))
print(kernels.explain("softmax", x, temperature=2.0))
print(kernels.explain("log_softmax", x))
print(kernels.available()["shelf rows"])
with kernels.without("shelf rows"):
    print(kernels.explain("softmax", x))
"""


@strict_only
def test_an_installed_adapter_is_found(xp, tmp_path):
    """The files that `pip install` of such a package leaves, in a folder on the path."""
    for name in ("shelf.py", "shelf_adapter.py", "shelf_kernels.py"):
        shutil.copy(ADAPTER / name, tmp_path)
    path = os.pathsep.join([str(tmp_path), str(Path(libraries.__file__).parents[2])])

    def printed(code):
        options = {"env": {**os.environ, "PYTHONPATH": path}, "cwd": tmp_path, "text": True}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, stdout=subprocess.PIPE, check=True, **options).stdout

    assert "has no attribute 'device'" in printed(REPORT)
    info = tmp_path / "shelf_adapter-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shelf-adapter\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[portable_softmax.libraries]\nshelf = shelf_adapter:Shelf\n"
    )
    right = r"shelf: right\. \d+ cases passed, 0 failed, 0 skipped\."
    assert re.match(right, printed(REPORT))
    assert printed(EXPLAIN).splitlines() == [
        "shelf rows: NumPy's kernels on the same memory",
        "portable: not shelf rows: options: temperature",
        "portable: no kernel for log_softmax on shelf",
        "('softmax',)",
        "portable: not shelf rows: switched off by kernels.without()",
    ]


@pytest.fixture
def registered(monkeypatch):
    """Make the entry points of the group these; a namespace is looked up anew."""
    ours = libraries.CLASSES

    def these(*values: str) -> None:
        monkeypatch.setattr(libraries, "_BY_NAMESPACE", {})
        monkeypatch.setattr(libraries, "CLASSES", {**ours})
        found = EntryPoints(EntryPoint("json", v, "portable_softmax.libraries") for v in values)
        monkeypatch.setattr(
            importlib.metadata, "entry_points", lambda **wanted: found.select(**wanted)
        )

    return these


def test_entry_points_of_a_library_that_is_not_ours(registered):
    import json  # stands for a library: any module has a name

    registered()
    assert type(libraries.of(json)) is libraries.Library
    registered("portable_softmax.libraries._numpy:NumPy")
    assert type(libraries.of(json)) is libraries.CLASSES["numpy"]
    registered("builtins:dict")
    with pytest.raises(TypeError, match="expected a subclass of portable_softmax"):
        libraries.of(json)
    registered("a:A", "b:B")
    with pytest.raises(RuntimeError, match="several packages register json: a:A, b:B; uninstall"):
        libraries.of(json)


def test_entry_points_are_not_looked_at_for_a_library_of_ours(registered, monkeypatch):
    def never(**wanted):
        raise AssertionError(wanted)

    registered()
    monkeypatch.setattr(importlib.metadata, "entry_points", never)
    assert type(libraries.of(np)) is libraries.CLASSES["numpy"]
