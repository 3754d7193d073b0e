"""A call on each chunk: what it is given, and the arrays cut as the logits are.

The axes of all arrays are named by their numbers among those of `x`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import Any, NamedTuple

from portable_softmax.kernels._decide import public
from portable_softmax.kernels._request import Request, active
from portable_softmax.kernels._switches import NOTHING_SET, Switches, switched, switches

Axes = tuple[int, ...]
Placed = list[tuple[str, Any, Axes]]  # a name, an array, and its axes


class Call(NamedTuple):
    """A call but for its arrays, the same for each chunk; the switches travel with it."""

    operation: str
    names: tuple[str, ...]  # of the arrays after the first one, empty if given by position
    options: tuple[tuple[str, Any], ...]
    switches: Switches
    taken: Callable[[Any], Any] | None = None  # what is kept of the answer, if not all

    def __call__(self, x: Any, *arrays: Any) -> Any:
        """Answer for the arrays of one chunk."""
        named = list(zip(self.names, map(chunk, arrays), strict=True))
        positional = [chunk(x), *[a for name, a in named if not name]]
        keyword = {name: a for name, a in named if name}
        with switched(**self.switches._asdict()):
            found = public(self.operation)(*positional, **keyword, **dict(self.options))
        return found if self.taken is None else self.taken(found)


def call_of(operation: str, names: Sequence[str], options: dict[str, Any]) -> Call:
    """Return a call with the switches of the moment."""
    return Call(operation, tuple(names), tuple(options.items()), switches() or NOTHING_SET)


def chunk(part: Any) -> Any:
    """Return the one chunk along an axis that the answer does not have, which comes in a list."""
    while isinstance(part, list):
        (part,) = part
    return part


def added(parts: list[Any]) -> Any:
    """Return the sum of what chunks gave, in their order."""
    return reduce(add, parts)


def every(request: Request) -> Axes:
    """Return all axes."""
    return tuple(range(request.x.ndim))


def positions(request: Request) -> Axes:
    """Return the axes that are not reduced."""
    return tuple(a for a in range(request.x.ndim) if a not in request.axes)


def whole_rows(request: Request) -> bool:
    """Return whether each chunk holds whole rows."""
    library: Any = request.library
    chunks: int = library.chunks_along(request.x, request.axes)
    return chunks == 1


def arrays(request: Request) -> Placed:
    """Return the arrays beside `x`, in chunks as it is; those by position have no name."""
    library: Any = request.library
    x, all_axes = request.x, every(request)
    places: Placed = []
    if request.dy is not None:
        places.append(("", request.dy, all_axes))
    if request.labels is not None:
        places.append(("", request.labels, positions(request) if request.indices else all_axes))
    for name, value in request.options._asdict().items():
        if hasattr(value, "chunks"):
            own = {"weight": request.axes, "sample_weight": positions(request)}
            places.append((name, value, own.get(name, all_axes[x.ndim - value.ndim :])))
    return [(name, library.aligned(array, x, axes), axes) for name, array, axes in places]


def numbers(request: Request) -> dict[str, Any]:
    """Return the axes, and the options that are no arrays."""
    options = request.options
    named = {name: getattr(options, name) for name in active(options, type(options)())}
    given = {name: value for name, value in named.items() if not hasattr(value, "chunks")}
    return {**given, "axis": request.axes if len(request.axes) > 1 else request.axis}


def on_each(
    request: Request,
    out: Axes,
    given: dict[str, Any],
    taken: Callable[[Any], Any] | None = None,
    **more: Any,
) -> Any:
    """Return the call on each chunk, or what is taken of it, an array with the axes `out`."""
    library: Any = request.library
    places = arrays(request)
    call = call_of(request.operation, [name for name, *_ in places], given)._replace(taken=taken)
    pairs = [place[1:] for place in places]
    more["name"] = request.operation
    return library.each_chunk(call, out, (request.x, every(request)), *pairs, **more)
