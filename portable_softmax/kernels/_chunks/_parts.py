"""Rows in several chunks: each is folded, what is left merges in a tree, then each is finished."""

from __future__ import annotations

from functools import partial
from typing import Any

from portable_softmax import libraries
from portable_softmax.kernels._chunks import _calls
from portable_softmax.kernels._in_parts import VJP_SUMS, Rows, added, state_dtypes, with_axes
from portable_softmax.kernels._request import Request


def rows(request: Request) -> Any:
    """softmax, log_softmax and logsumexp."""
    library: Any = request.library
    x, axes, every = request.x, request.axes, _calls.every(request)
    compute, answer = request.compute_dtype, request.answer_dtype
    kind = Rows(request.operation, axes, request.options.temperature, compute, answer)
    places = {name: (array, own) for name, array, own in _calls.arrays(request)}
    where = [places["where"]] if "where" in places else []
    state = state_dtypes(compute)
    folded = library.each_chunk(kind.fold, every, (x, every), *where, dtype=state, ones=axes)
    if request.operation == "logsumexp":
        finish = kind.logsumexp
        return library.merge_chunks(folded, axes, kind.merge, finish=finish, dtype=answer)
    merged = library.merge_chunks(folded, axes, kind.merge, dtype=state)
    sink = request.options.sink if isinstance(request.options.sink, float) else None
    finish = partial(_finish, kind, sink, tuple(places))
    return library.each_chunk(
        finish, every, (x, every), (merged, every), *places.values(), dtype=answer
    )


def _finish(
    kind: Rows, sink: float | None, names: tuple[str, ...], x: Any, state: Any, *arrays: Any
) -> Any:
    """Return the softmax, or its logarithm, of a chunk from the state of its rows."""
    library = libraries.library_of(x)
    xp, (m, rest) = library.xp, state
    given = {n: with_axes(a, x.ndim) for n, a in zip(names, arrays, strict=True)}
    if sink is not None or "sink" in given:
        more = library.cast(given["sink"], kind.compute) if sink is None else xp.full_like(m, sink)
        more = xp.broadcast_to(more, m.shape), xp.zeros_like(rest)
        m, rest = kind.merge([(m, rest), more])
    return kind.finish(x, m, rest, given.get("where"))


def vjps(request: Request) -> Any:
    """softmax_vjp and log_softmax_vjp."""
    library: Any = request.library
    axes, every, compute = request.axes, _calls.every(request), request.compute_dtype
    kind = Rows(request.operation, axes, 1.0, compute, request.result_dtype, request.rounding)
    pair = [(request.x, every), *[place[1:] for place in _calls.arrays(request)]]
    several = (compute,) * VJP_SUMS[request.operation]
    sums = library.each_chunk(kind.vjp_sums, every, *pair, dtype=several, ones=axes)
    sums = library.merge_chunks(sums, axes, added, dtype=several)
    return library.each_chunk(kind.vjp, every, *pair, (sums, every), dtype=kind.answer)
