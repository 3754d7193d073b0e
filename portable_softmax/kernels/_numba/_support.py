"""Why compiled kernels cannot be used here, in words. Importing this module loads nothing else."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from portable_softmax.libraries import traced_as_constant

# The first Numba whose LLVM takes the instructions of `_vectors`.
OLDEST = (0, 62)


def missing() -> str:
    """Return what has to be installed or set before Numba can be imported; empty if nothing."""
    if find_spec("numba") is None:
        return "numba is not installed: pip install 'portable_softmax[numba]'"
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return "NUMBA_DISABLE_JIT is set, and Numba compiles nothing: unset it"
    return ""


@traced_as_constant
def refusal() -> str:
    """Return why Numba cannot compile the kernels here; empty if it can. This imports Numba."""
    return _refusal()


@cache
def _refusal() -> str:
    if why := missing():
        return why
    try:
        numba = import_module("numba")
        config = numba.config
        why = _too_old(numba.__version__) or _without_jit(config) or _without_fma(config)
        if not why:  # else it may lack names that are needed
            import_module("portable_softmax.kernels._numba._driver")
    except (ImportError, AttributeError) as error:  # such as a NumPy that Numba does not know yet
        return f"numba cannot be imported: {error}"
    return why


def _too_old(version: str) -> str:
    if tuple(map(int, version.split(".")[:2])) >= OLDEST:
        return ""
    oldest = ".".join(map(str, OLDEST))
    return f"numba {version} is too old, {oldest} is needed: pip install --upgrade numba"


def _without_jit(config: Any) -> str:
    if config.DISABLE_JIT:
        return "numba.config.DISABLE_JIT is set, and Numba compiles nothing: unset it"
    return ""


def _without_fma(config: Any) -> str:
    """Return a reason where x86 is not compiled with FMA, which came with AVX2.

    Each `fma` is then a call of the C library, and NumPy's tiles are up to 15 times faster.
    """
    llvm = import_module("llvmlite.binding")
    if not llvm.get_process_triple().startswith(("x86_64", "i386", "i686")):
        return ""  # the other architectures that Numba knows have it in every CPU
    if config.CPU_FEATURES is not None:  # NUMBA_CPU_NAME=generic empties it
        if "+fma" in config.CPU_FEATURES.split(","):
            return ""
        return "NUMBA_CPU_FEATURES or NUMBA_CPU_NAME leaves out FMA instructions: unset them"
    try:
        features = llvm.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know; Numba then assumes none
        features = {}
    if features.get("fma"):
        return ""
    name = config.CPU_NAME or llvm.get_host_cpu_name()
    return f"the CPU ({name}) has no FMA instructions, which come with AVX2"
