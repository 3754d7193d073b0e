"""``backends``: what each library can do here, or why it can't."""

from __future__ import annotations

from typing import Any

import numpy as np

from portable_softmax import kernels
from portable_softmax._cli.backends import BACKENDS, Place, open_place, reach
from portable_softmax._cli.errors import CommandError
from portable_softmax._cli.report import Report


def run(*, report: Report) -> dict[str, Any]:
    """Import every backend, show what was found and return it as plain data."""
    usable: dict[str, dict[str, Any]] = {}
    unusable: dict[str, str] = {}
    for name in BACKENDS:
        try:
            usable[name] = _describe(name)
        except CommandError as error:
            unusable[name] = str(error)
    report.table(
        "Backends that work here",
        ("backend", "version", "devices", "dtypes", "fused kernels"),
        [
            (
                name,
                found["version"],
                ", ".join(found["devices"]),
                ", ".join(found["dtypes"]),
                ", ".join(found["kernels"]) or "none, the portable code runs",
            )
            for name, found in usable.items()
        ],
    )
    report.line("Which operations each kernel has: --json. Which one a call takes: kernels.explain")
    if unusable:
        report.table("Backends that don't", ("backend", "why"), list(unusable.items()))
    return {
        "backends": {
            name: {"usable": True, **usable[name]}
            if name in usable
            else {"usable": False, "reason": unusable[name]}
            for name in BACKENDS
        }
    }


def _describe(name: str) -> dict[str, Any]:
    place = open_place(name)
    return {
        "version": place.version,
        "devices": list(reach(name)),
        "dtypes": place.dtypes(),
        "kernels": _kernels(place),
    }


def _kernels(place: Place) -> dict[str, list[str]]:
    """Return the kernels that calls on this place take, each with its operations.

    Small arrays and large ones are asked about: they may take different kernels.
    """
    taken: dict[str, list[str]] = {}
    for size in (1, 300):
        x = place.put(np.zeros((size, size), np.float32))
        labels = place.put(np.zeros(size, np.int64))
        for kernel, operations in kernels.available().items():
            for operation in operations:
                explained = kernels.explain(operation, x, *_others(operation, x, labels))
                found = taken.setdefault(kernel, [])
                if explained.startswith(f"{kernel}:") and operation not in found:
                    found.append(operation)
    return {kernel: operations for kernel, operations in taken.items() if operations}


def _others(operation: str, x: Any, labels: Any) -> tuple[Any, ...]:
    """Return what an operation takes beside its first array."""
    if operation.endswith("vjp") or operation.startswith(("kl_divergence", "sigmoid")):
        return (x,)
    if operation.startswith("linear"):
        return x, labels
    return (labels,) if operation.startswith(("cross_entropy", "entmax_loss")) else ()
