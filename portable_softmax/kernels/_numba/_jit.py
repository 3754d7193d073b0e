"""How the functions here are compiled, and cached on disk.

`function` is for what is inlined into a kernel, `kernel` for what Python calls. Numba's own cache
looks at the file of the compiled function alone. A kernel is made of all files of this folder, and
is cached with a digest of them all. A folder that cannot be written is passed over for the user's
own; without one either, kernels are compiled in each process. An unreadable or broken file counts
as missing.

Numba's cache classes are not public: their names stand in `_cache_class` and nowhere else. Where
one is missing, kernels are not cached.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import caching, config

from portable_softmax.kernels._numba import _inlined

HERE = Path(__file__).resolve().parent

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
        with suppress(AttributeError, TypeError, NotImplementedError):
            if folder() is not None:
                dispatcher._cache = _cache_class()(python_function, name)
        return dispatcher

    return compiled


def named(python_function: Any, name: str) -> Any:
    """Let the machine code of a function bear a name of its own.

    Numba names it by the function's qualified name and a number that begins anew in each process.
    So kernels of one factory that two processes have left in the cache may bear the same name, and
    the linker takes one for the other.
    """
    python_function.__qualname__ = name
    return python_function


@cache
def stamp() -> str:
    """Return a digest of every source file here; Numba adds its own version and the CPU."""
    digest = hashlib.sha256()
    for path in sorted(HERE.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@cache
def folder() -> str | None:
    """Return the first folder that can be written."""
    candidates = [HERE / "__pycache__"]
    if config.CACHE_DIR:
        candidates = [Path(config.CACHE_DIR) / "portable_softmax"]
    elif hasattr(caching, "AppDirs"):
        candidates += [
            Path(caching.AppDirs("numba", appauthor=False).user_cache_dir, "portable_softmax")
        ]
    else:
        candidates += [Path.home() / ".cache" / "portable_softmax"]
    for path in candidates:
        with suppress(OSError):
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
            return str(path)
    return None


@cache
def _cache_class() -> Any:
    """Return Numba's cache of one function, stamped as above."""

    class Locator(caching._CacheLocator):  # type: ignore[misc]
        def get_cache_path(self) -> str:
            return folder() or ""

        def get_source_stamp(self) -> str:
            return stamp()

        def get_disambiguator(self) -> str:
            return "kernel"

    class Files(caching.FunctionCache):  # type: ignore[misc]
        def __init__(self, python_function: Any, name: str) -> None:
            class Implementation(caching.FunctionCache._impl_class):  # type: ignore[misc]
                def __init__(self, _: Any) -> None:
                    self._locator = Locator()
                    self._lineno = 0
                    self._filename_base = self.get_filename_base(name, "")

            self._impl_class = Implementation
            super().__init__(python_function)

        def _index_key(self, sig: Any, codegen: Any) -> Any:
            # Numba hashes the code and what its closure holds: the stamp covers both.
            return sig, codegen.magic_tuple()

        def load_overload(self, sig: Any, target_context: Any) -> Any:
            try:
                return super().load_overload(sig, target_context)
            except Exception:  # whatever a file of another version or half a file may raise
                return None

        def save_overload(self, sig: Any, data: Any) -> None:
            try:
                super().save_overload(sig, data)
            except Exception:  # such as a full disk, or a file that is broken: begin it anew
                with suppress(Exception):
                    self.flush()
                    super().save_overload(sig, data)

    return Files
