"""How the functions here are compiled, and cached on disk.

`function` is for what is inlined into a kernel, `kernel` for what Python calls. Numba's own cache
looks at the file of the compiled function alone. A kernel is made of the files of this folder that
its own imports, and of constants from beyond it, and is cached with a digest of these, in the
folders that `_folders` names; without one kernels are compiled in each process. An unreadable or
broken file counts as missing.

Numba's cache classes are not public: their names stand in `_cache_class` and nowhere else. Where
one is missing, kernels are not cached.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from numba import njit
from numba.core import caching, runtime

from portable_softmax.kernels._numba import _inlined
from portable_softmax.kernels._numba._folders import folders

INLINED = {
    "nogil": True,
    "error_model": "numpy",
    "forceinline": True,
    # Python calls none of these itself: they need no wrappers for it, and no machine code.
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    **_inlined.pipeline(),
}
function = njit(**INLINED)


def kernel(name: str) -> Callable[[Any], Any]:
    """Return the decorator of a function that Python calls; `name` is unique among them."""

    def compiled(python_function: Any) -> Any:
        dispatcher = njit(nogil=True, error_model="numpy")(named(python_function, name))
        if (files := kept(python_function, name)) is not None:
            dispatcher._cache = files
        return dispatcher

    return compiled


def is_at_hand(dispatcher: Any, arguments: tuple[Any, ...]) -> bool:
    """Return whether a kernel is compiled for such arguments, in this process or on disk."""
    sig = tuple(map(dispatcher.typeof_pyval, arguments))
    if sig in dispatcher.overloads:
        return True
    with suppress(AttributeError):  # a kernel that is not kept
        return bool(dispatcher._cache.holds(sig, dispatcher.targetctx))
    return False


def named(python_function: Any, name: str) -> Any:
    """Let the machine code of a function bear a name of its own.

    Numba names it by the function's qualified name and a number that begins anew in each process.
    So kernels of one factory that two processes have left in the cache may bear the same name, and
    the linker takes one for the other.
    """
    python_function.__qualname__ = name
    return python_function


def kept(python_function: Any, name: str) -> Any:
    """Return Numba's cache of one function in the folders in use.

    It is None without a folder, and where Numba's cache classes differ from those known here.
    """
    found = folders()
    places = [*found.read] if found.written is None else [found.written, *found.read]
    files = None
    with suppress(AttributeError, TypeError, NotImplementedError):
        for folder in reversed(places):
            others = () if files is None else (files, *files.others)
            files = _cache_class()(python_function, name, str(folder), others)
    return files


def stamp(python_function: Any) -> str:
    """Return a digest of what a kernel is made of; Numba adds its own version and the CPU."""
    digest = hashlib.sha256()
    for name in sorted(_closed(frozenset(_modules_of(python_function)))):
        source, _, outside = _source(name)
        digest.update(f"{name} {outside}\0".encode() + source + b"\0")
    return digest.hexdigest()


def _modules_of(function: Any) -> set[str]:
    """Return the modules of this folder that hold a function and what its closure holds."""
    found, seen, waiting = set(), set(), [function]
    while waiting:
        one = waiting.pop()
        one = getattr(one, "py_func", one)
        if id(one) not in seen:
            seen.add(id(one))
            found.add(one.__name__ if isinstance(one, ModuleType) else _module(one))
            waiting += one if isinstance(one, tuple | list) else ()
            waiting += one.values() if isinstance(one, dict) else ()
            waiting += [cell.cell_contents for cell in getattr(one, "__closure__", None) or ()]
    return {name for name in found if name.startswith(f"{_FOLDER}.")}


def _module(one: Any) -> str:
    return str(getattr(one, "__module__", None))


_FOLDER = __name__.rpartition(".")[0]
_IMPORT = re.compile(r"^from (portable_softmax[\w.]*) import (\([^)]*\)|.*)$", re.MULTILINE)


@cache
def _closed(modules: frozenset[str]) -> frozenset[str]:
    """Return modules of this folder with all that they import of it."""
    found, waiting = set(), [*modules]
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += _source(name)[1]
    return frozenset(found)


@cache
def _source(name: str) -> tuple[bytes, tuple[str, ...], str]:
    """Return a module's source, what it imports of this folder, and the constants of others."""
    module, inside = sys.modules[name], list[str]()
    outside: dict[str, Any] = {}
    source = Path(str(module.__file__)).read_bytes()
    for package, names in _IMPORT.findall(source.decode()):
        words = re.findall(r"(\w+)(?: as \w+)?", names)
        if package == _FOLDER:
            inside += [f"{_FOLDER}.{word}" for word in words]
        elif package.startswith(_FOLDER):
            inside.append(package)
        else:
            held = {word: getattr(sys.modules[package], word, None) for word in words}
            outside |= {k: v for k, v in held.items() if isinstance(v, int | float | str | tuple)}
            # Whatever of a package is read is in one of its files.
            for whole in (v for v in held.values() if isinstance(v, ModuleType)):
                files = sorted(Path(str(whole.__file__)).parent.glob("*.py"))
                source += b"".join(path.read_bytes() for path in files)
    return source, tuple(inside), repr(sorted(outside.items()))


@cache
def _cache_class() -> Any:
    """Return Numba's cache of one function, stamped as above."""

    class Locator(caching._CacheLocator):  # type: ignore[misc]
        def __init__(self, folder: str, python_function: Any) -> None:
            self._folder, self._made_of = folder, python_function

        def get_cache_path(self) -> str:
            return self._folder

        def get_source_stamp(self) -> str:
            return stamp(self._made_of)

        def get_disambiguator(self) -> str:
            return "kernel"

    class Files(caching.FunctionCache):  # type: ignore[misc]
        def __init__(
            self, python_function: Any, name: str, folder: str, others: Sequence[Any] = ()
        ) -> None:
            class Implementation(caching.FunctionCache._impl_class):  # type: ignore[misc]
                def __init__(self, _: Any) -> None:
                    self._locator = Locator(folder, python_function)
                    self._lineno = 0
                    self._filename_base = self.get_filename_base(name, "")

            self._impl_class, self.others = Implementation, tuple(others)
            super().__init__(python_function)

        def _index_key(self, sig: Any, codegen: Any) -> Any:
            # Numba hashes the code and what its closure holds: the stamp covers both.
            return sig, codegen.magic_tuple()

        def holds(self, sig: Any, target_context: Any) -> bool:
            key = self._index_key(sig, target_context.codegen())
            for files in (self, *self.others):
                with suppress(Exception):
                    if key in files._cache_file._load_index():
                        return True
            return False

        def load_overload(self, sig: Any, target_context: Any) -> Any:
            # Numba's own way imports all that it needs to compile, which takes longer than to load.
            runtime.rtsys.initialize(target_context)
            for files in (self, *self.others):
                # Whatever a file of another version or half a file may raise.
                with suppress(Exception):
                    if (found := files._load_overload(sig, target_context)) is not None:
                        return found
            return None

        def save_overload(self, sig: Any, data: Any) -> None:
            try:
                super().save_overload(sig, data)
            except Exception:  # such as a full disk, or a file that is broken: begin it anew
                with suppress(Exception):
                    self.flush()
                    super().save_overload(sig, data)

    return Files
