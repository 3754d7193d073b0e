"""How the functions here are compiled, and cached on disk.

`function` is for what is inlined into a kernel, `kernel` for what Python calls. Numba's own cache
looks at the file of the compiled function alone. A kernel is made of all files of this folder and
of constants of the portable mathematics, and is cached with a digest of both folders, in those that
`_folders` names; without one kernels are compiled in each process. An unreadable or broken file
counts as missing.

Numba's cache classes are not public: their names stand in `_cache_class` and nowhere else. Where
one is missing, kernels are not cached.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from numba import njit
from numba.core import caching, runtime

from portable_softmax.kernels._numba import _inlined
from portable_softmax.kernels._numba._folders import HERE, PORTABLE, folders

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


@cache
def stamp() -> str:
    """Return a digest of the source files; Numba adds its own version and the CPU."""
    digest = hashlib.sha256()
    for path in (*sorted(HERE.glob("*.py")), *sorted(PORTABLE.glob("*.py"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@cache
def _cache_class() -> Any:
    """Return Numba's cache of one function, stamped as above."""

    class Locator(caching._CacheLocator):  # type: ignore[misc]
        def __init__(self, folder: str) -> None:
            self._folder = folder

        def get_cache_path(self) -> str:
            return self._folder

        def get_source_stamp(self) -> str:
            return stamp()

        def get_disambiguator(self) -> str:
            return "kernel"

    class Files(caching.FunctionCache):  # type: ignore[misc]
        def __init__(
            self, python_function: Any, name: str, folder: str, others: Sequence[Any] = ()
        ) -> None:
            class Implementation(caching.FunctionCache._impl_class):  # type: ignore[misc]
                def __init__(self, _: Any) -> None:
                    self._locator = Locator(folder)
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
