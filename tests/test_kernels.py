"""The table of kernels: what is there, which path a call takes, and that both answer alike."""

from __future__ import annotations

import contextvars
import importlib
import inspect
import itertools
import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
from backends import LIBRARIES
from calls import CALLS

import portable_softmax as ps
from portable_softmax import kernels, libraries
from portable_softmax.kernels import _decide, _request, _table
from portable_softmax.kernels._request import (
    OPERATIONS,
    PLAIN_LOSS,
    PLAIN_ROWS,
    LossOptions,
    Request,
    RowOptions,
    active,
)
from portable_softmax.kernels._switches import Switches

FAMILY = ("softmax", "log_softmax", "logsumexp")
LOSSES = ("cross_entropy", "cross_entropy_value_and_grad")


def test_every_kernel_of_the_table_exists():
    for kernel in _table.TABLE:
        module = importlib.import_module(kernel.module)
        for operation in kernel.operations:
            assert operation in (*ps.__all__, *_request.PARTS)
            # One function for all operations is an adapter of the kernel's own.
            own = kernel.adapter.startswith(f"{kernel.module}.")
            # Formulas are those of the call, whatever it is.
            formulas = hasattr(module, "Formulas")
            assert own or formulas or callable(getattr(module, operation))
        if libraries.is_installed(kernel.library) and not module.missing():
            public = {*kernel.operations} & {*ps.__all__, *ps.online.__all__}
            assert public <= {*kernels.available()[kernel.name]}


def test_a_kernel_without_its_library_is_not_available(monkeypatch):
    for kernel in _table.TABLE:
        if kernel.library not in ("numpy", "dtensor"):
            monkeypatch.setitem(sys.modules, kernel.library, None)
    of_numpy = {kernel.name for kernel in _table.TABLE if kernel.library == "numpy"}
    assert {"numpy tiles", "packed rows"} <= kernels.available().keys() <= of_numpy


def test_a_kernel_that_a_class_registers_is_of_its_library(monkeypatch):
    for row in ("rows", _table.TABLE[0]):
        of_others = type("OfOthers", (libraries.Library,), {"kernels": (row,)})
        monkeypatch.setitem(libraries.CLASSES, "others", of_others)
        with pytest.raises(TypeError, match="whose library is 'others'"):
            kernels.available()


# --------------------------------------------------------------------------- fail closed


class StandIn(libraries.Library):
    """A library by its name, with an array on each device that a kernel declares."""

    def __init__(self, name, device):
        super().__init__(np, name)
        self.device_type = lambda x: device


def request(library, device="cpu", **changes):
    x = np.ones((300, 300))
    found = Request("softmax", StandIn(library, device), x, "float64", (1,), x.dtype, x.dtype)
    return found._replace(**changes)


def test_what_no_kernel_declares_takes_the_portable_path():
    """A made-up option, dtype or tracer: each kernel's declaration alone refuses it."""
    for (changes, why), kernel, operation in itertools.product(
        (
            ({"active": ("margin",)}, "options: margin"),
            ({"dtype": "float8_e4m3"}, "dtype float8_e4m3"),
            ({"tracing": "a recorder"}, "traced: a recorder"),
        ),
        _table.TABLE,
        OPERATIONS,
    ):
        if operation in kernel.operations:
            device = next(iter(kernel.devices), "cpu")
            made_up = request(kernel.library, device, operation=operation, **changes)
            assert kernel.undeclared(made_up.dtype, made_up.active, made_up.tracing) == why
            # A kernel's module may import its library.
            if find_spec("torch" if kernel.library == "dtensor" else kernel.library):
                for asked in ((), _table.names()):
                    assert _decide.decide(made_up, Switches(asked=asked)).taken is None


def test_a_library_that_no_kernel_declares_takes_the_portable_path():
    decision = _decide.decide(request("nobody"), Switches(asked=_table.names()))
    assert str(decision) == "portable: no kernel for softmax on nobody"


def test_options_of_the_public_functions_are_all_known_to_requests():
    """Each option is a field of the request's options, and so active and refused when it is new.

    `out` is the request's own, and declared as an option: see test_out.py.
    """
    shared = {"axis", "keepdims", "check_labels", "out", "grad_out"}
    for name, options in (
        *((name, RowOptions) for name in FAMILY),
        *((name, LossOptions) for name in LOSSES),
    ):
        public = set(inspect.signature(getattr(ps, name)).parameters) - shared
        assert public - {"x", "logits", "labels"} <= {*options._fields}, name


def test_each_option_is_active_when_it_is_not_neutral():
    for options in (PLAIN_ROWS, PLAIN_LOSS):
        assert active(options, options) == ()
        for name, value in itertools.product(options._fields, (np.ones(3), 0.25)):
            assert active(options._replace(**{name: value}), options) == (name,)


# --------------------------------------------------------------------------- explain


def test_explain_takes_what_the_function_takes():
    x, t = np.ones((2, 3)), np.asarray([0, 1])
    for error, match, arguments, options in (
        (ValueError, r"operation is 'relu', expected one of .*'cross_entropy'", ("relu", x), {}),
        (ValueError, r"expected one of .*: pass its name, 'softmax'$", (ps.softmax, x), {}),
        (ValueError, r"^operation is array.*expected one of ", (x[0],), {}),
        (TypeError, "unexpected keyword argument 'axes'", ("softmax", x), {"axes": 1}),
        (TypeError, "labels", ("cross_entropy", x), {}),
        (ValueError, "axis is 5", ("cross_entropy", x, t), {"axis": 5}),
    ):
        with pytest.raises(error, match=match):
            kernels.explain(*arguments, **options)
    for name in FAMILY:
        assert kernels.explain(name, x[:0]) == "portable: nothing to reduce"
        assert kernels.explain(name, np.asarray(1.0), axis=()) == "portable: nothing to reduce"
    for given, options, expected in (
        (x, {"b": x * 1j}, "portable: not numpy tiles: options: complex weights"),
        (x, {"b": x}, "numpy tiles: "),
        (x, {"return_sign": True}, "numpy tiles: "),
        (x + 1j, {}, "portable: not numpy tiles: dtype complex128"),
    ):
        assert kernels.explain("logsumexp", given, **options).startswith(expected)


@pytest.fixture
def taken(monkeypatch):
    """Which path ran: the name of each kernel, and `portable`."""
    seen = []

    def noted(name, real, given):
        seen.append(name)
        return real(given)

    class Spied(_decide.Candidate):
        def __init__(self, kernel, operation):
            super().__init__(kernel, operation)
            for name in ("answer", "formulas"):  # one of which is called
                if real := getattr(self, name):
                    setattr(self, name, partial(noted, kernel.name, real))

    monkeypatch.setattr(_decide, "Candidate", Spied)
    monkeypatch.setattr(_decide, "_ROUTES", {})
    return seen


@pytest.mark.run_on("paths")
def test_explain_names_what_ran(xp, taken):
    """For every option of every function: the same decision is explained and carried out."""
    for name, call in CALLS.items():
        if xp.name in LIBRARIES or call.has_paths:
            function, arrays = call.on(xp.from_numpy)
            explain = partial(kernels.explain, call.function.__name__)
            explaining, _ = call._replace(function=explain).on(xp.from_numpy)
            path = explaining(*arrays).partition(":")[0]
            assert taken == [], name
            function(*arrays)
            assert taken == ([] if path == "portable" else [path]), name
            taken.clear()


@pytest.mark.libraries("numpy", "torch", "array_api_strict", "jax", "dask", "mlx")
@pytest.mark.cheap
def test_one_entry_of_each_row_is_replaced(xp):
    x = xp.asarray(np.arange(6.0).reshape(2, 3))
    index, values = xp.asarray(np.asarray([[2], [0]])), xp.asarray(np.asarray([[7.0], [8.0]]))
    found = libraries.library_of(x).put_along_axis(x, index, values, 1)
    np.testing.assert_array_equal(xp.numpy(found), [[0.0, 1.0, 7.0], [8.0, 4.0, 5.0]])


@pytest.mark.cheap
@pytest.mark.run_on("paths", "torch-portable")
def test_what_each_library_has(xp):
    explained = kernels.explain("softmax", xp.asarray(np.ones((2, 3))))
    by_path = {"numba rows": "numba rows: one pass in cache"}  # which may be to be compiled
    by_path |= {"portable": "portable: forced by kernels.portable()"}
    by_name = dict.fromkeys(("numpy", "torch"), "numpy tiles: row tiles in cache")
    by_name |= {"dask": "dask chunks: each chunk by the kernel of its own library"}
    by_name |= {"strict": "portable: no kernel for softmax on array_api_strict"}
    assert explained.startswith(by_path.get(xp.path) or by_name.get(xp.name, ""))
    if xp.name in ("numpy", "torch"):
        explained = kernels.explain("softmax", xp.asarray(np.ones((300, 300))))
        assert explained.startswith("numpy tiles: row tiles in cache; not numba rows: switched off")


# --------------------------------------------------------------------------- answers


def run(value):
    code = (
        "import numpy as np; from portable_softmax import kernels; "
        "print(kernels.explain('softmax', np.ones((2, 3))))"
    )
    environment = {**os.environ, "PORTABLE_SOFTMAX_KERNELS": value}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_environment_variable():
    forced = "portable: forced by PORTABLE_SOFTMAX_KERNELS=portable"
    assert run("portable").stdout.strip() == forced
    assert run("numpy,triton rows").stdout.strip() == "numpy tiles: row tiles in cache"
    assert "PORTABLE_SOFTMAX_KERNELS is 'fused', expected 'portable'" in run("fused").stderr


def test_use_takes_a_kernel_first_and_whatever_the_size(taken):
    x, tiles = np.ones((2, 3)), "numpy tiles: row tiles in cache"
    with kernels.use("numpy tiles"):
        assert kernels.explain("softmax", x) == tiles
        with kernels.without("numpy tiles"):
            assert kernels.explain("softmax", x).startswith("portable: ")
            with kernels.use("numpy tiles"):
                assert kernels.explain("softmax", x) == tiles
        with kernels.portable():
            assert kernels.explain("softmax", x) == "portable: forced by kernels.portable()"
            ps.softmax(x)
            assert taken == []
        ps.softmax(x)
        assert taken == ["numpy tiles"]
    for switch in (kernels.use, kernels.without):
        with pytest.raises(ValueError, match="name is 'tiles', expected one of 'numpy tiles' or "):
            switch("tiles").__enter__()


def test_the_first_word_of_a_kernels_name_is_enough():
    x = np.ones((2, 3))
    first = [name.partition(" ")[0] for name in _table.names()]
    assert len(set(first)) == len(first)
    for name in first:
        with kernels.use(name):
            explained = kernels.explain("softmax", x)
        with kernels.use(next(full for full in _table.names() if full.startswith(f"{name} "))):
            assert kernels.explain("softmax", x) == explained
    with kernels.without("numpy"):
        assert "not numpy tiles: switched off" in kernels.explain("softmax", x)


def test_a_switch_belongs_to_its_thread_and_task():
    with kernels.portable():
        inside = contextvars.copy_context()
    x = np.ones((2, 3))
    assert kernels.explain("softmax", x).startswith("numpy tiles")
    assert inside.run(kernels.explain, "softmax", x).startswith("portable: forced")
