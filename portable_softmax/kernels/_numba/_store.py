"""Compiled kernels on disk, where Numba keeps them too, but aware of every file of this folder.

Numba looks at the file of the compiled function alone. A kernel is made of several: it is stamped
with the contents of all of them. A folder that cannot be written is passed over for the user's
own; without one either, kernels are compiled in each process. An unreadable or broken file is
as good as none.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from numba.core import caching, config

HERE = Path(__file__).resolve().parent


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


class _Place(caching._CacheLocator):  # type: ignore[misc]
    def get_cache_path(self) -> str:
        return folder() or ""

    def get_source_stamp(self) -> str:
        return stamp()

    def get_disambiguator(self) -> str:
        return "kernel"


class _Impl(caching.FunctionCache._impl_class):  # type: ignore[misc]
    def __init__(self, function: Any) -> None:
        self._locator = _Place()
        self._lineno = 0
        name = f"{Path(inspect.getfile(function)).stem}.{function.__qualname__}"
        self._filename_base = self.get_filename_base(name, "")


class _Files(caching.FunctionCache):  # type: ignore[misc]
    _impl_class = _Impl

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


def kept(function: Any) -> Any:
    """Let what is compiled for `function` be kept on disk, where that can be done."""
    # What is derived from here is not Numba's public face: without it nothing is kept.
    with suppress(Exception):
        if folder() is not None and not os.environ.get("NUMBA_DISABLE_JIT"):
            function._cache = _Files(function.py_func)
    return function
