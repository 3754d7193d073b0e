"""Rows in several chunks: each is folded, what is left merges in a tree, then each is finished."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from portable_softmax import libraries, portable
from portable_softmax.kernels._dask import _calls
from portable_softmax.kernels._dask._calls import Axes
from portable_softmax.kernels._in_parts import tiled, with_axes
from portable_softmax.kernels._request import Request

# --------------------------------------------------------------------------- the softmax family


def rows(request: Request) -> Any:
    """softmax, log_softmax and logsumexp."""
    library: Any = request.library
    x, axes, every = request.x, request.axes, _calls.every(request)
    compute, answer = request.compute_dtype, request.answer_dtype
    temperature = request.options.temperature
    places = {name: (array, own) for name, array, own in _calls.arrays(request)}
    where = [places["where"]] if "where" in places else []
    fold = partial(_fold, axes, temperature, compute)
    folded = library.each_chunk(fold, every, (x, every), *where, dtype=compute, ones=axes)
    merge = partial(_merged, temperature)
    if request.operation == "logsumexp":
        finish = partial(_logsumexp, answer)
        return library.merge_chunks(folded, axes, merge, finish=finish, dtype=answer)
    state = library.merge_chunks(folded, axes, merge, dtype=compute)
    sink = request.options.sink if isinstance(request.options.sink, float) else None
    kind = request.operation, temperature, compute, answer, sink, tuple(places)
    return library.each_chunk(
        partial(_finish, *kind), every, (x, every), (state, every), *places.values(), dtype=answer
    )


def _fold(axes: Axes, temperature: float, compute: Any, x: Any, where: Any = None) -> Any:
    library = libraries.library_of(x)

    def fold(x: Any, where: Any) -> Any:
        return portable.fold_part(
            library.xp, library.cast(x, compute), axes, where=where, temperature=temperature,
            divide=False,
        )  # fmt: skip

    return tiled(fold, axes, x, with_axes(where, x.ndim), merge=partial(_merged, temperature))


def _merged(temperature: float, states: list[Any]) -> Any:
    library = libraries.library_of(states[0][0])
    return library.quietly(portable.merge, library.xp, states, temperature)


def _logsumexp(dtype: Any, state: Any) -> Any:
    library = libraries.library_of(state[0])
    return library.cast(library.quietly(portable.logsumexp_of, library.xp, *state), dtype)


def _finish(
    operation: str, temperature: float, compute: Any, answer: Any, sink: float | None,
    names: tuple[str, ...], x: Any, state: Any, *arrays: Any,
) -> Any:  # fmt: skip
    """Return the softmax, or its logarithm, of a chunk from the state of its rows."""
    library = libraries.library_of(x)
    xp, (m, rest) = library.xp, state
    given = {n: with_axes(a, x.ndim) for n, a in zip(names, arrays, strict=True)}
    if sink is not None or "sink" in given:
        more = xp.full_like(m, sink) if sink is not None else library.cast(given["sink"], compute)
        more = xp.broadcast_to(more, m.shape), xp.zeros_like(rest)
        m, rest = _merged(temperature, [(m, rest), more])
    function, masked = portable.softmax_of, 0.0
    if operation == "log_softmax":
        function, masked = portable.log_softmax_of, -math.inf

    def finish(x: Any, m: Any, rest: Any, where: Any) -> Any:
        y = function(xp, library.cast(x, compute), m, rest, temperature)
        y = y if where is None else xp.where(where, y, libraries.scalar(xp, masked, y))
        return library.cast(y, answer)

    return tiled(finish, (), x, m, rest, given.get("where"))


# --------------------------------------------------------------------------- their gradients


def vjps(request: Request) -> Any:
    """softmax_vjp and log_softmax_vjp."""
    library: Any = request.library
    axes, every, compute = request.axes, _calls.every(request), request.compute_dtype
    pair = [(request.x, every), *[place[1:] for place in _calls.arrays(request)]]
    fold = partial(_vjp_sums, request.operation, axes, compute)
    sums = library.each_chunk(fold, every, *pair, dtype=compute, ones=axes)
    sums = library.merge_chunks(sums, axes, _calls.added, dtype=compute)
    finish = partial(_vjp, request.operation, compute, request.result_dtype)
    return library.each_chunk(finish, every, *pair, (sums, every), dtype=request.result_dtype)


def _vjp_sums(operation: str, axes: Axes, compute: Any, y: Any, dy: Any) -> Any:
    library = libraries.library_of(y)
    function = getattr(portable, f"{operation}_sum")

    def fold(y: Any, dy: Any) -> Any:
        return function(library.xp, library.cast(y, compute), library.cast(dy, compute), axes)

    return tiled(fold, axes, y, dy, merge=partial(library.quietly, _calls.added))


def _vjp(operation: str, compute: Any, answer: Any, y: Any, dy: Any, sums: Any) -> Any:
    library = libraries.library_of(y)
    function = getattr(portable, f"{operation}_of")

    def finish(y: Any, dy: Any, sums: Any) -> Any:
        y, dy = library.cast(y, compute), library.cast(dy, compute)
        return library.cast(function(library.xp, y, dy, sums), answer)

    return tiled(finish, (), y, dy, sums)
