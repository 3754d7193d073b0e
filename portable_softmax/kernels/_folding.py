"""The state of rows, or of parts of them, as a call of its own: the fold that parts have in common.

Rows in a user's tiles, in chunks of Dask and on ranks of torch.distributed begin with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from portable_softmax import portable
from portable_softmax.kernels._decide import run
from portable_softmax.kernels._request import (
    EXTREME,
    FOLD,
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
    compute, _ = library.compute_dtype(x)
    options = RowOptions(where, temperature)
    given = active(options, PLAIN_ROWS)
    if is_extreme(library, temperature, compute):
        given = (*given, EXTREME)
    tracing = library.tracing(x) or ("" if where is None else library.tracing(where))
    name = library.dtype(x.dtype).name
    return run(
        Request(FOLD, library, x, name, axes, compute, compute, tracing, options, given), otherwise
    )
