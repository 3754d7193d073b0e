"""Calls in the form that kernels take: floats in C order, the reduced axes last where that is free.

Integers are cast to what they are computed in. The axes are taken in the order in which they lie in
memory, which costs nothing, and what is still in bits is copied: one more pass, where a path that
takes any array has a dozen. The answer has the memory order of the input, as those of NumPy's and
torch's own functions. A small array is copied with its reduced axes last, and its answer back to C
order; one of which they lie apart is copied too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

from portable_softmax.kernels._request import (
    FOLD,
    INTEGERS,
    LOGSUMEXP_VJP,
    LOSSES,
    ROWS,
    SPARSE,
    VJPS,
    LossOptions,
    Request,
)
from portable_softmax.libraries import cast

Back: TypeAlias = Callable[[Any], Any]

_ORDERED = frozenset((*ROWS, *VJPS, *LOSSES, *SPARSE, FOLD, LOGSUMEXP_VJP))
_INTEGERS = frozenset(INTEGERS)
_BROADCAST = ("where", "sink", "b")


def canonical(request: Request, is_open: Callable[[Request], bool]) -> tuple[Request, Back | None]:
    """Return the call in that form, and what makes its answer that of this one, if anything.

    Where no kernel `is_open` to it, it is left as it is: the portable path takes any array.
    """
    if request.tracing:
        return request, None
    found, order = request, _order(request)
    integers = request.dtype in _INTEGERS and request.operation in ROWS
    if integers and request.compute_dtype != request.result_dtype:
        return request, None  # the default dtype of torch is a half type
    if integers:
        found = request._replace(dtype=request.library.dtype(request.compute_dtype).name)
    if not (integers or order) or not is_open(found):
        return request, None
    if integers:
        found = found._replace(x=cast(request.xp, request.x, request.compute_dtype))
    return (found, None) if order is None else _reordered(found, order)


def _order(request: Request) -> list[int] | None:
    """Return the axes in the order in which a kernel should see them; None to leave them."""
    library, x, axes = request.library, request.x, request.axes
    if not axes or x.ndim < 2 or request.operation not in _ORDERED:
        return None
    strides = library.strides(x)
    if strides == () or (strides is None and min(axes) == x.ndim - len(axes)):
        return None
    if library.size(x) > library.small:
        order = list(range(x.ndim))
        if strides is not None:
            order.sort(key=_steps(strides).__getitem__, reverse=True)
        places = [order.index(a) for a in axes]
        if max(places) - min(places) == len(axes) - 1:
            return None if strides is None else order
    return [*(a for a in range(x.ndim) if a not in axes), *axes]


def _steps(strides: tuple[int, ...]) -> list[float]:
    """Return how far apart the entries of each axis are; a repeated one goes with that before it.

    A sort from far to near leaves it there, as NumPy and torch do in new arrays.
    """
    steps: list[float] = []
    for stride in strides:
        steps.append(abs(stride) or (steps[-1] if steps else math.inf))
    return steps


def _reordered(request: Request, order: list[int]) -> tuple[Request, Back | None]:
    library, xp, x, options = request.library, request.xp, request.x, request.options
    there = [order.index(a) for a in range(x.ndim)]
    axes = tuple(sorted(there[a] for a in request.axes))
    positions, same = _without(order, request.axes), order == sorted(order)

    def seen(a: Any, order: list[int] = order) -> Any:
        """Return an array with its axes in another order."""
        return a if same else xp.permute_dims(a, tuple(order))

    def in_c_order(a: Any, order: list[int] = order) -> Any:
        a = seen(a, order)
        return a if library.strides(a) is None else library.copy(a)

    out = None if request.out is None else seen(request.out)
    if out is not None and library.strides(out) is not None:
        out = None  # it is copied to
    changed: dict[str, Any] = {}
    for name in _BROADCAST:
        a: Any = getattr(options, name, None)
        if hasattr(a, "ndim"):
            shape = (1,) * (x.ndim - a.ndim) + tuple(a.shape)
            changed[name] = seen(xp.reshape(a, shape))
    if type(options) is LossOptions and options.sample_weight is not None:
        changed["sample_weight"] = in_c_order(options.sample_weight, positions)
    labels = request.labels
    if labels is not None:
        labels = in_c_order(labels, positions if request.indices else order)
    found = request._replace(
        x=in_c_order(x), axes=axes, out=out, labels=labels,
        dy=None if request.dy is None else in_c_order(request.dy),
        options=options._replace(**changed) if changed else options,
    )  # fmt: skip
    if same:
        return found, None
    of_positions, moved = _without(there, axes), library.size(x) <= library.small

    def back(answer: Any) -> Any:
        """Return an answer, or both, with the axes where they were."""
        if type(answer) is tuple:
            return tuple(map(back, answer))
        if answer.ndim == 0:
            return answer
        answer = seen(answer, there if answer.ndim == len(there) else of_positions)
        return library.copy(answer) if moved and library.strides(answer) is not None else answer

    return found, back


def _without(order: list[int], axes: tuple[int, ...]) -> list[int]:
    """Return the order of the axes that are left without some."""
    left = sorted(a for a in order if a not in axes)
    return [left.index(a) for a in order if a not in axes]
