"""Where the Numba kernels can be used, and what is kept of them on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import portable_softmax as ps
from portable_softmax import kernels
from portable_softmax.kernels._numba import _support

pytestmark = pytest.mark.numba

HERE = Path(ps.__file__).parent.parent


@pytest.fixture
def undecided():
    """Nothing is known of this process yet."""
    _support._refusal.cache_clear()
    yield
    _support._refusal.cache_clear()


# --------------------------------------------------------------------------- reasons


def refused(why):
    """Whether calls go to the next kernel for a reason, and are answered there."""
    x = np.ones((300, 300))
    for _ in range(2):
        found = kernels.explain("softmax", x)
        assert found.startswith("numpy tiles: ")
        assert found.endswith(why)
    np.testing.assert_allclose(ps.softmax(x), 1 / 300)


def cannot_be_imported(name):
    raise ImportError("Numba needs NumPy 2.4 or less")


@pytest.mark.parametrize(
    ("owner", "name", "value", "why"),
    [
        ("portable_softmax.kernels._numba._support", "import_module", cannot_be_imported,
         "numba cannot be imported: Numba needs NumPy 2.4 or less"),
        ("numba", "__version__", "0.61.2",
         "numba 0.61.2 is too old, 0.62 is needed: pip install --upgrade numba"),
        ("numba.core.config", "DISABLE_JIT", 1,
         "numba.config.DISABLE_JIT is set, and Numba compiles nothing: unset it"),
    ],
)  # fmt: skip
def test_a_numba_that_is_of_no_use(monkeypatch, undecided, owner, name, value, why):
    monkeypatch.setattr(f"{owner}.{name}", value)
    refused(why)


def test_a_numba_that_is_missing(monkeypatch, undecided):
    monkeypatch.setattr(_support, "find_spec", lambda name: None)
    assert _support.missing() == _support.refusal()
    assert "pip install 'portable_softmax[numba]'" in _support.missing()


@pytest.mark.parametrize("value", ["1", "2"])
def test_no_jit_in_the_environment(value):
    code = (
        "import numpy as np; from portable_softmax import kernels, softmax; "
        "x = np.ones((300, 300)); assert np.allclose(softmax(x), 1 / 300); "
        "print(kernels.explain('softmax', x))"
    )
    found = in_a_fresh_process(code, HERE, NUMBA_DISABLE_JIT=value)
    assert found.startswith("numpy tiles: ")
    assert found.endswith("NUMBA_DISABLE_JIT is set, and Numba compiles nothing: unset it")


@pytest.fixture
def an_x86(monkeypatch):
    import llvmlite.binding as llvm

    monkeypatch.setattr(llvm, "get_process_triple", lambda: "x86_64-unknown-linux-gnu")
    return llvm


def test_a_cpu_without_fma(monkeypatch, undecided, an_x86):
    """Each fma is a call of the C library there."""
    import numba

    monkeypatch.setattr(numba.config, "CPU_FEATURES", None)
    monkeypatch.setattr(numba.config, "CPU_NAME", None)
    monkeypatch.setattr(an_x86, "get_host_cpu_name", lambda: "nehalem")
    monkeypatch.setattr(an_x86, "get_host_cpu_features", lambda: {"sse2": True, "fma": False})
    refused("the CPU (nehalem) has no FMA instructions, which come with AVX2")

    def unknown():
        raise RuntimeError("LLVM does not know this CPU")

    _support._refusal.cache_clear()
    monkeypatch.setattr(an_x86, "get_host_cpu_features", unknown)
    refused("the CPU (nehalem) has no FMA instructions, which come with AVX2")
    monkeypatch.setattr(an_x86, "get_process_triple", lambda: "aarch64-unknown-linux-gnu")
    assert _support._without_fma(numba.config) == ""


def test_features_that_are_set(monkeypatch, undecided, an_x86):
    import numba

    monkeypatch.setattr(numba.config, "CPU_FEATURES", "+sse2,-fma")
    refused("NUMBA_CPU_FEATURES or NUMBA_CPU_NAME leaves out FMA instructions: unset them")
    _support._refusal.cache_clear()
    monkeypatch.setattr(numba.config, "CPU_FEATURES", "+avx2,+fma")
    assert _support.refusal() == ""


def test_the_private_names_of_numba():
    """Without one of them nothing is kept on disk: see `_jit`."""
    from numba import njit
    from numba.core import caching, runtime

    assert isinstance(caching._CacheLocator, type)
    assert isinstance(caching.FunctionCache._impl_class, type)
    assert callable(runtime.rtsys.initialize)
    for name in ("_load_overload", "save_overload", "_index_key", "flush"):
        assert callable(getattr(caching.FunctionCache, name))
    assert callable(caching.IndexDataCacheFile._load_index)
    assert callable(njit(lambda x: x).typeof_pyval)
    assert callable(caching.FunctionCache._impl_class.get_filename_base)
    assert hasattr(njit(lambda x: x), "_cache")


def test_what_is_inlined_has_no_machine_code(monkeypatch):
    """Without a name of Numba's code libraries every function is compiled by itself."""
    from numba import njit

    from portable_softmax.kernels._numba import _inlined

    def has_code():
        inner = njit(**options, **_inlined.pipeline())(lambda x: x + 1)
        assert njit(lambda x: 2 * inner(x))(3) == 8
        (found,) = inner.overloads.values()
        return found.library._codegen._engine.is_symbol_defined(found.fndesc.mangled_name)

    options = dict.fromkeys(("forceinline", "no_cpython_wrapper", "no_cfunc_wrapper"), True)
    assert not has_code()
    for owner, names in _inlined.PRIVATE.items():
        with monkeypatch.context() as m:
            m.setitem(_inlined.PRIVATE, owner, (*names, "of_another_version"))
            assert _inlined.pipeline() == {}
            assert has_code()


def test_each_kernel_has_a_name_of_its_own():
    """The linker takes functions of one name for the same, whatever process compiled them."""
    from portable_softmax.kernels._numba import _driver, _kernels

    others = [_driver.kernels_of(operation) for operation in _driver._ELSEWHERE]
    found = {id(layouts): layouts for layouts in (_kernels.LAYOUTS, *others)}.values()
    kernels = [k for layouts in found for layout in layouts.values() for k in layout.values()]
    names = [kernel.py_func.__qualname__ for kernel in kernels]
    assert len({*names}) == len(names)


# --------------------------------------------------------------------------- on disk

LARGE = """
import numpy as np, sys
from portable_softmax import kernels, softmax
x = np.zeros((300, 300), np.float32)
assert kernels.explain("softmax", x).startswith("numba rows"), kernels.explain("softmax", x)
softmax(x)
from portable_softmax.kernels._numba import _driver
stats = _driver.LAYOUTS["groups"]["softmax"].stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def in_a_fresh_process(code, folder, **variables):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def copied(tmp_path):
    """A copy of the package that may be changed."""
    import shutil

    package = Path(ps.__file__).parent
    target = tmp_path / "copy" / package.name
    shutil.copytree(package, target, ignore=shutil.ignore_patterns("__pycache__"))
    return target.parent


@pytest.mark.slow("fresh processes compile kernels")
def test_kernels_are_kept_until_what_they_are_made_of_changes(copied, tmp_path):
    here = {"NUMBA_CACHE_DIR": str(tmp_path / "kept")}
    hit, miss = "1 0", "0 1"
    assert in_a_fresh_process(LARGE, copied, **here) == miss
    assert in_a_fresh_process(LARGE, copied, **here) == hit
    for name, old, new, found in (
        ("kernels/_numba/_rows.py", "", "# Another version.", miss),
        ("kernels/_numba/_weights.py", "", "# Another version.", hit),
        ("portable/_softmax.py", "", "# Another version.", hit),
        ("portable/_softmax.py", "LOG_CONFIDENT = -0.5", "LOG_CONFIDENT = -0.4375", miss),
    ):
        source = copied / "portable_softmax" / name
        text = source.read_text()
        assert old in text
        source.write_text(text.replace(old, new) if old else f"{text}\n{new}\n")
        assert in_a_fresh_process(LARGE, copied, **here) == found
    for path in (tmp_path / "kept").rglob("*.nb*"):
        path.write_bytes(b"half a file")
    assert in_a_fresh_process(LARGE, copied, **here) == miss


@pytest.mark.slow("fresh processes compile kernels")
def test_folders_that_cannot_be_written(copied, tmp_path):
    """Beside the source, else the user's, else none: never an error."""
    beside = copied / "portable_softmax" / "kernels" / "_numba" / "__pycache__"
    home = tmp_path / "home"
    here = {"XDG_CACHE_HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    in_a_fresh_process(LARGE, copied, **here)
    assert list(beside.glob("*.nbi"))
    for path in beside.iterdir():
        path.unlink()
    beside.rmdir()
    beside.write_text("a file where the folder should be")
    in_a_fresh_process(LARGE, copied, **here)
    assert list(home.rglob("*.nbi"))
    here["XDG_CACHE_HOME"] = str(beside)
    in_a_fresh_process(LARGE, copied, **here)


@pytest.fixture
def kept(tmp_path):
    """A folder with a file of a kernel, that this user alone can write."""
    folder = tmp_path / "kept"
    folder.mkdir(mode=0o755)
    (folder / "portable_softmax.rows.softmax.nbc").write_bytes(b"")
    (folder / "portable_softmax.rows.softmax.nbc").chmod(0o644)
    return folder


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="modes tell nothing here")
def test_folders_and_files_that_others_can_write_are_refused(kept, monkeypatch):
    from portable_softmax.kernels._numba import _folders

    (file,) = kept.iterdir()
    assert _folders.refusal(kept) == ""
    for path in (file, kept, kept.parent):
        mode = path.stat().st_mode
        path.chmod(0o777)
        assert _folders.refusal(kept) == f"{path} can be written by every user"
        path.chmod(mode)
    kept.parent.chmod(0o1777)  # as /tmp: nobody replaces what others have in it
    assert _folders.refusal(kept) == ""
    kept.chmod(0o1777)
    assert _folders.refusal(kept) == f"{kept} can be written by every user"
    kept.chmod(0o775)
    monkeypatch.setattr(_folders, "_is_private", lambda gid: False)
    assert _folders.refusal(kept) == f"{kept} can be written by a group"
    monkeypatch.setattr(_folders, "_is_private", lambda gid: True)
    assert _folders.refusal(kept) == ""
    theirs = os.geteuid() + 1
    monkeypatch.setattr(_folders, "_is_private", lambda gid: True)
    monkeypatch.setattr(os, "geteuid", lambda: theirs)
    if kept.stat().st_uid:  # root's are everybody's to read
        assert _folders.refusal(kept) == f"{kept} belongs to another user"


EXPLAINED = """
import numpy as np
from portable_softmax import kernels
print(kernels.explain("softmax", np.zeros((300, 300), np.float32)))
"""


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="modes tell nothing here")
def test_a_refused_folder_is_explained(tmp_path):
    folder = tmp_path / "kept" / "portable_softmax"
    folder.mkdir(parents=True)
    here = {"NUMBA_CACHE_DIR": str(folder.parent)}
    assert "written" not in in_a_fresh_process(EXPLAINED, HERE, **here)
    folder.chmod(0o777)
    found = in_a_fresh_process(EXPLAINED, HERE, **here)
    assert f"{folder} can be written by every user: no compiled code is loaded from there" in found
    assert "compiled in each process, for seconds, as no folder can keep it" in found


STEPS = """
import numpy as np
from portable_softmax import kernels, softmax
x, t = np.zeros((300, 300), np.float32), np.zeros(300, int)
print(kernels.explain("softmax", x))
softmax(x)
print(kernels.explain("softmax", x))
print(kernels.explain("softmax", x, where=x == 0))
print(kernels.explain("cross_entropy_value_and_grad", x, t, ignore_index=1))
"""


@pytest.mark.slow("fresh processes compile kernels")
def test_what_is_still_to_be_compiled_is_explained(tmp_path):
    """The path stays the same."""
    here = {"NUMBA_CACHE_DIR": str(tmp_path / "kept")}
    found = in_a_fresh_process(STEPS, HERE, **here).splitlines()
    assert all(line.startswith("numba rows: one pass in cache") for line in found)
    assert [compiled(line) for line in found] == [
        "groups.softmax",
        "",
        "groups.softmax",  # with a mask it is another one
        "scan, groups.cross_entropy_value_and_grad",
    ]
    found = in_a_fresh_process(STEPS, HERE, **here).splitlines()
    assert [compiled(line) for line in found[:3]] == ["", "", "groups.softmax"]


def compiled(explained):
    """Return what a call has to compile first."""
    return explained.partition("; compiles ")[2].partition(" first, a second or so each")[0]


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_an_explained_call_runs_no_kernel(library, monkeypatch):
    from portable_softmax.kernels._numba import _driver

    xp = pytest.importorskip(library)
    x, out = xp.zeros((300, 300)), xp.ones((300, 300))
    monkeypatch.setattr(_driver, "is_at_hand", lambda *_: False)
    assert compiled(kernels.explain("softmax", x, out=out)) == "groups.softmax"
    assert (out == 1).all()
    monkeypatch.setattr(_driver, "is_at_hand", lambda *_: True)
    assert compiled(kernels.explain("softmax", x)) == ""


@pytest.mark.parametrize("held", [np.nan, 1e30, 7.0])
def test_an_explained_loss_takes_nothing_from_memory_that_no_kernel_wrote(held, monkeypatch):
    real = np.empty

    def empty(*args, **kwargs):
        made = real(*args, **kwargs)
        made.fill(held if made.dtype in ("float32", "float64") else 7)
        return made

    monkeypatch.setattr(np, "empty", empty)
    x, labels = np.zeros((300, 300), np.float16), np.zeros(300, int)
    for reduction in ("mean", "none"):
        for operation in ("cross_entropy", "cross_entropy_value_and_grad"):
            found = kernels.explain(operation, x, labels, reduction=reduction)
            assert found.startswith("numba rows")


def test_a_folder_that_cannot_be_written_is_read(kept, monkeypatch):
    """Root can write everywhere: that it is forbidden is pretended."""
    from portable_softmax.kernels._numba import _folders

    def forbidden(dir):
        raise PermissionError(dir)

    monkeypatch.setattr(_folders, "BESIDE", kept)
    monkeypatch.setattr(_folders.config, "CACHE_DIR", "")
    monkeypatch.setattr(_folders.tempfile, "TemporaryFile", forbidden)
    _folders.folders.cache_clear()
    assert kept not in _folders.folders().read
    (kept / "portable_softmax.rows.softmax.nbi").write_bytes(b"")
    _folders.folders.cache_clear()
    found = _folders.folders()
    _folders.folders.cache_clear()
    assert found.written is None
    assert found.read[0] == kept


@pytest.mark.slow("fresh processes compile kernels")
@pytest.mark.parametrize(
    ("operations", "libraries", "kernels"),
    [
        # a kernel for NumPy and a handler for JAX for each of five layouts; yes-or-no labels
        # are one row whatever their layout
        ("softmax", "numpy,jax", 2 * 5),
        ("kl_divergence_value_and_grad,sigmoid_cross_entropy", "numpy,jax", 2 * (5 + 1)),
    ],
)
def test_warm_compiles_what_other_processes_load(tmp_path, operations, libraries, kernels):
    here = {"NUMBA_CACHE_DIR": str(tmp_path / "kept")}
    arguments = ["warm", "--json", "--operations", operations, "--libraries", libraries]
    warm = f"from portable_softmax.__main__ import main; main({arguments})"
    first = json.loads(in_a_fresh_process(warm, HERE, **here))
    assert (first["compiled"], first["loaded"]) == (kernels, 0)
    second = json.loads(in_a_fresh_process(warm, HERE, **here))
    assert (second["compiled"], second["loaded"]) == (0, kernels)
    if "softmax" in operations:
        assert in_a_fresh_process(LARGE, HERE, **here) == "1 0"


def test_kernels_work_without_a_cache(tmp_path):
    """As where another version of Numba lacks a class of its cache."""
    here = {"NUMBA_CACHE_DIR": str(tmp_path / "kept")}
    code = "from numba.core import caching\ndel caching._CacheLocator\n"
    found = in_a_fresh_process(code + LARGE.replace("print", "0 and print"), HERE, **here)
    assert found == ""
    assert not list((tmp_path / "kept").rglob("*.nb*"))


def test_small_arrays_load_nothing():
    code = (
        "import numpy as np, sys, portable_softmax as ps; x = np.zeros((32, 10)); "
        "ps.softmax(x), ps.logsumexp(x), ps.cross_entropy_value_and_grad(x, np.zeros(32, int)); "
        "ps.kernels.explain('softmax', x), ps.kernels.available(); "
        "print('numba' in sys.modules)"
    )
    assert in_a_fresh_process(code, HERE) == "False"
