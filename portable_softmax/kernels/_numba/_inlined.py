"""How functions are compiled that nothing but kernels calls, and that are inlined there.

Numba optimises each function by itself and makes machine code of it, which takes a third of the
time that a kernel of a hundred functions needs. Here they are typed and lowered, and LLVM works on
the kernel alone. Numba's code libraries are not public: their names stand here and nowhere else.
Where one is missing, the functions are compiled as Numba does it.
"""

from __future__ import annotations

from typing import Any

from numba.core import codegen, compiler

PRIVATE = {
    "JITCPUCodegen": ("_library_class", "set_env"),
    "JITCodeLibrary": (
        *("add_llvm_module", "enable_object_caching", "get_pointer_to_function", "codegen"),
        *("_ensure_finalized", "_finalize_dynamic_globals", "_finalize_final_module"),
        "_optimize_final_module",
    ),
}


def pipeline() -> dict[str, Any]:
    """Return the argument of `njit` that compiles a function for inlining, if there is one."""
    known = all(
        hasattr(getattr(codegen, owner, None), name)
        for owner, names in PRIVATE.items()
        for name in names
    )
    return {"pipeline_class": _compiler()} if known else {}


def _compiler() -> Any:
    class Nowhere:
        """What has no machine code has no environment there."""

        @staticmethod
        def set_env(name: str, environment: Any) -> None:
            pass

    class Library(codegen.JITCodeLibrary):  # type: ignore[misc]
        codegen = Nowhere

        def add_llvm_module(self, module: Any) -> None:
            module.data_layout = self._codegen._data_layout
            self._final_module.link_in(module)

        def _optimize_final_module(self) -> None:
            pass

        def _finalize_final_module(self) -> None:
            self._finalize_dynamic_globals()
            self._finalized = True

        def get_pointer_to_function(self, name: str) -> int:
            self._ensure_finalized()
            return 0

    class Compiler(compiler.Compiler):  # type: ignore[misc]
        def __init__(self, typing: Any, target: Any, library: Any, *others: Any) -> None:
            library = Library(target.codegen(), "portable_softmax")
            library.enable_object_caching()
            super().__init__(typing, target, library, *others)

    return Compiler
