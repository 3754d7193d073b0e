"""Parts of rows as calls of their own: the state of a part, and what is a multiple of its exps.

Rows in a user's tiles, in chunks of Dask and on ranks of torch.distributed begin with the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from portable_softmax import portable
from portable_softmax.kernels._decide import run
from portable_softmax.kernels._request import (
    EXTREME,
    FOLD,
    LOGSUMEXP_VJP,
    PLAIN_ROWS,
    Request,
    RowOptions,
    active,
    is_extreme,
)
from portable_softmax.libraries import Library


def in_its_operations(request: Request) -> Any:
    """Return the state in the library's own operations."""
    library, options = request.library, request.options
    function = library.compiled(portable.fold_part)
    return function(
        request.xp, library.cast(request.x, request.compute_dtype), request.axes,
        where=options.where, temperature=options.temperature,
    )  # fmt: skip


def fold(
    library: Library,
    x: Any,
    where: Any,
    axes: tuple[int, ...],
    temperature: float,
    otherwise: Callable[[Request], Any] = in_its_operations,
) -> Any:
    """Return the maximum of x, and the rest of x / temperature, by a kernel or `otherwise`."""
    return run(_of_a_part(FOLD, library, x, axes, RowOptions(where, temperature)), otherwise)


def softmax_times(
    library: Library,
    x: Any,
    where: Any,
    axes: tuple[int, ...],
    factor: Any,
    otherwise: Callable[[Request], Any],
) -> Any:
    """Return the softmax of a part times a number per row, by a kernel or `otherwise`.

    It is 0 where a mask leaves an entry out, and where the maximum of a part is infinite.
    """
    return run(_of_a_part(LOGSUMEXP_VJP, library, x, axes, RowOptions(where), factor), otherwise)


def _of_a_part(
    operation: str,
    library: Library,
    x: Any,
    axes: tuple[int, ...],
    options: RowOptions,
    dy: Any = None,
) -> Request:
    compute, result = library.compute_dtype(x)
    given = active(options, PLAIN_ROWS)
    if is_extreme(library, options.temperature, compute):
        given = (*given, EXTREME)
    where = options.where
    tracing = library.tracing(x) or ("" if where is None else library.tracing(where))
    result = compute if operation == FOLD else result
    name = library.dtype(x.dtype).name
    return Request(operation, library, x, name, axes, compute, result, tracing, options, given, dy)
