"""Answers over arrays that compiled code is done with: what Inductor makes of the operators.

New memory costs as much as a softmax. The operators are functional, and Inductor writes its own
elementwise results over an input that nothing reads later. Here it learns the same of softmax,
log_softmax and the gradients. Arguments and results of the compiled function are left alone; what
its forward pass kept for the backward pass, and for nothing else, is not.

All of this is private to torch. Where a name is missing, the operators answer in new memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import reduce
from types import SimpleNamespace
from typing import Any

PRIVATE = {
    "make_fallback": "lowering.make_fallback",
    "lowerings": "lowering.lowerings",
    "to_constraint": "lowering.tag_to_layout_constraint",
    "constraint_of": "torch._library.utils.get_layout_constraint_tag",
    "V": "virtualized.V",
    "ExternKernel": "ir.ExternKernel",
    "FallbackKernel": "ir.FallbackKernel",
    "ReinterpretView": "ir.ReinterpretView",
    "DonatedBuffer": "ir.DonatedBuffer",
    "FixedLayout": "ir.FixedLayout",
    "FlexibleLayout": "ir.FlexibleLayout",
}
"""Names of torch._inductor, unless they begin with torch."""

_REGISTERED: set[Any] = set()


def register(functional: Any, into: Any, over: Callable[..., tuple[Any, ...]]) -> None:
    """Let Inductor write the answer of one operator over an argument, by another.

    `over` gives the arguments of a call that may be written to. The operator `into` is called with
    the one that was chosen behind the others. Nothing is done before Inductor has been imported.
    """
    if functional in _REGISTERED or "torch._inductor.lowering" not in sys.modules:
        return
    _REGISTERED.add(functional)
    inductor = _names()
    if inductor is None or functional in inductor.lowerings:
        return
    tag = inductor.constraint_of(functional, with_default=True)
    inductor.make_fallback(functional, layout_constraint=inductor.to_constraint(tag), warn=False)
    in_new_memory = inductor.lowerings[functional]

    def lowered(*args: Any) -> Any:
        out = next((a for a in over(*args) if _is_free(inductor, a, args)), None)
        if out is None:
            return in_new_memory(*args)
        # What has read it and is no kernel yet becomes one now: behind this one it would read the
        # answer.
        inductor.V.graph.mark_buffer_mutated(out.get_name())
        inductor.FallbackKernel.create(into, *args, out)
        several = len(functional._schema.returns) > 1
        return (out, None) if several else out

    inductor.lowerings[functional] = lowered


def _names() -> Any:
    """Return what this module needs of Inductor; None if this version lacks some of it."""
    torch: Any = sys.modules["torch"]
    try:
        found = {
            name: reduce(
                getattr,
                path.removeprefix("torch.").split("."),
                torch if path.startswith("torch.") else torch._inductor,
            )
            for name, path in PRIVATE.items()
        }
    except AttributeError:
        return None
    return SimpleNamespace(**found)


def _is_free(inductor: Any, box: Any, args: tuple[Any, ...]) -> bool:
    """Return whether nothing reads an argument of the current node after it."""
    graph, found = inductor.V.graph, inductor.ExternKernel.realize_input(box)
    name, layout = found.get_name(), found.get_layout()
    plain = inductor.FixedLayout, inductor.FlexibleLayout
    owner = found.data if isinstance(found, inductor.ReinterpretView) else found
    if type(layout) not in plain or type(owner.get_layout()) not in plain:
        return False  # a part of another buffer
    if not layout.is_contiguous() or layout.offset != 0:
        return False
    if graph.sizevars.simplify(owner.get_numel() - found.get_numel()) != 0:
        return False
    if name in graph.graph_inputs:
        given = graph.graph_inputs_original[name]
        # What is written to is an input that CUDA graphs would have to copy back.
        if not isinstance(given, inductor.DonatedBuffer) or box.get_device().type != "cpu":
            return False
    elif name in graph.constants:
        return False
    if sum(name in _buffers(a) for a in args) > 1:
        return False
    if any(name in operation.get_inputs_that_alias_output() for operation in graph.operations):
        return False
    return not any(name in _buffers(value) for value in _needed_later(graph))


def _needed_later(graph: Any) -> Iterator[Any]:
    """Yield the values, so far, that nodes behind the current one take."""
    done = set()
    for node in graph.module.graph.nodes:
        done.add(node)
        if node is graph.current_node:
            break
    for node in done:
        if not done.issuperset(node.users):
            yield graph.env.get(node)


def _buffers(value: Any) -> list[str]:
    """Return the names of the buffers that a value of Inductor's is made of."""
    if isinstance(value, list | tuple):
        return [name for some in value for name in _buffers(some)]
    try:
        return [value.get_name()]
    except (AttributeError, NotImplementedError):  # a number, or not in memory yet
        return []
