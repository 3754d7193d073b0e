"""Entropies, divergences, means and running sums of small arrays, in as few calls as it takes.

Half types and float32 are computed in float64, where the difference of two logits is exact and
none of their exponentials is lost that counts. In float64 the rounding of the difference is put
back, as elsewhere. What neither is good for, a row that holds an infinity or a nan, is left to the
portable formula, alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from portable_softmax import portable
from portable_softmax.kernels._numpy._small import folded, least, maxima, most, sums
from portable_softmax.kernels._request import Request

# Below this the exp of a difference of float64 is 0. A logit of -inf has the product 0 with it.
_LOWEST = -800.0
# exp(u) - 1 - u loses half of the digits of float64 here, and none of float32.
_TINY = 2.0**-20
# From this mean on, its logarithm cancels.
_NEAR_ONE = 0.75
# Sums are added one after the other: of so many terms, in float64, without losing digits.
_FEW = 64
# The first of running sums is at least that beside the last, so that it has its digits.
_FIRST = 1e-290


class Rows(NamedTuple):
    """Rows in float64, with what they are made of."""

    x: Any
    exact: bool  # whether differences are: all of them come from a narrower dtype

    def state(self, temperature: float = 1.0) -> State:
        """Fold the rows over a temperature, which is 1 unless they are exact."""
        at, m = maxima(self.x)
        d = self.x - m[:, None]
        if not self.exact:
            p, _, rest, total = folded(self.x, at, m)
        else:
            if temperature != 1.0:
                d /= temperature
            p = np.exp(d)
            flat = p.ravel()
            flat[at] = 0.0
            rest = sums(p)
            flat[at] = 1.0
            total = rest + 1.0
        p /= total[:, None]
        return State(m, d, p, rest)


class State(NamedTuple):
    """What rows are folded into, and the terms."""

    max: Any
    d: Any  # (x - max) / temperature
    p: Any
    rest: Any


def rows_of(request: Request, *arrays: Any) -> list[Rows]:
    """Return arrays of the shape of `x` as rows, in float64."""
    x, axes = request.x, request.axes
    n = math.prod([x.shape[a] for a in axes])
    exact = all(a.dtype.itemsize < 8 for a in arrays)
    found = []
    for array in arrays:
        if axes != (x.ndim - 1,):
            array = np.moveaxis(array, axes, range(-len(axes), 0))
        found.append(Rows(np.ascontiguousarray(array, np.float64).reshape(-1, n), exact))
    return found


def _like(request: Request, rows: Any, dtype: Any) -> Any:
    """Return rows as an array of the shape of `x`."""
    x, axes = request.x, request.axes
    if axes == (x.ndim - 1,):
        return rows.astype(dtype, copy=False).reshape(x.shape)
    ends = range(-len(axes), 0)
    moved = np.moveaxis(x, axes, ends).shape
    return np.ascontiguousarray(np.moveaxis(rows.reshape(moved), ends, axes), dtype)


def _mend(found: tuple[Any, ...], function: Callable[..., Any], *rows: Rows) -> None:
    """Write the answers of rows that are no numbers anew, by a portable formula."""
    if not math.isfinite(found[0].sum()):
        at = np.flatnonzero(~np.isfinite(found[0].reshape(len(found[0]), -1)).all(1))
        if at.size:
            again = function(*(r.x[at] for r in rows))
            again = again if type(again) is tuple else (again,)
            for one, other in zip(found, again, strict=True):
                one[at] = other.reshape(one[at].shape)


def entropy(request: Request) -> Any:
    """log1p(rest) + sum(p * (max - x)), and with it p * ((max - x) - sum(p * (max - x)))."""
    (rows,) = rows_of(request, request.x)
    _, d, p, rest = rows.state()
    np.maximum(d, _LOWEST, out=d)
    mean = sums(p * d)
    found = [np.log1p(rest, rest)]
    found[0] -= mean
    if request.operation == "entropy_value_and_grad":
        np.subtract(mean[:, None], d, d)
        found.append(np.multiply(d, p, d))
    function = getattr(portable, request.operation)
    _mend(tuple(found), lambda x: function(np, x, (1,)), rows)
    h = found[0].astype(request.result_dtype, copy=False).reshape(_positions(request))
    return h if len(found) == 1 else (h, _like(request, found[1], request.result_dtype))


def _positions(request: Request) -> list[int]:
    """Return the shape of `x` without the reduced axes."""
    return [n for a, n in enumerate(request.x.shape) if a not in request.axes]


def divergence(request: Request) -> Any:
    """sum(p * (exp(u) - 1 - u)) of u = log q - log p, reduced; with it the gradients.

    Beyond u = 1 it is the sum of q - p * (1 + u), as q has its digits where p is next to 0.
    """
    options, with_grads = request.options, request.operation != "kl_divergence"
    rows = rows_of(request, request.x, request.dy)
    t = options.temperature
    each = options._replace(reduction="none", distillation=False, dtype=None)
    function = getattr(portable, request.operation)

    def by_formula(p: Any, q: Any) -> Any:
        return function(np, p, q, 1, each)

    if rows[0].exact or t == 1.0:
        found = _divergence(rows, t, with_grads)
        _mend(found, by_formula, *rows)
    else:
        answer = by_formula(rows[0].x, rows[1].x)
        found = answer if with_grads else (answer,)
    value, *grads = found
    count = value.size if options.reduction == "mean" else 1
    factor = t * t if options.distillation else 1.0
    if factor != 1.0:
        value *= factor
    if options.reduction == "none":
        value = value.reshape(_positions(request))
    else:
        value = value.sum() / count
    value = np.asarray(value, request.answer_dtype)
    if factor != count:
        for grad in grads:
            grad *= factor / count
    made = [_like(request, grad, request.result_dtype) for grad in grads]
    return (value, *made) if with_grads else value


def _divergence(rows: list[Rows], t: float, with_grads: bool) -> tuple[Any, ...]:
    of_p, of_q = (one.state(t) for one in rows)
    u = of_q.d - of_p.d
    u -= (np.log1p(of_q.rest) - np.log1p(of_p.rest))[:, None]
    p, q = of_p.p, of_q.p
    low = np.minimum(u, 1.0)
    if rows[0].exact:
        change = np.expm1(low)
        terms = change - low
        tiny = np.abs(low) < _TINY
        if tiny.any():
            terms = np.where(tiny, low * low * (0.5 + low / 6.0), terms)
    else:
        change = np.expm1(low) if with_grads else None
        terms = portable.exp_minus_its_tangent(np, low)
    terms *= p
    far, gone = u > 1.0, None
    if far.any():
        terms = np.where(far, q - p * (1.0 + u), terms)
    if not least(p) > 0.0:
        gone = p == 0.0
        terms = np.where(gone, q, terms)
    value = sums(terms)
    if not with_grads:
        return (value,)
    by_p = -p * (u + value[:, None])
    by_q = np.where(far, q - p, p * change)
    if gone is not None:
        by_p = np.where(gone, 0.0, by_p)
        by_q = np.where(gone, q, by_q)
    return value, np.divide(by_p, t, by_p), np.divide(by_q, t, by_q)


def logmeanexp(request: Request) -> Any:
    """Max + log((1 + rest) / n), or the log1p of the mean of expm1(x - max)."""
    (rows,) = rows_of(request, request.x)
    m, d, _, rest = rows.state()
    n = d.shape[1]
    rest += 1.0
    rest /= n
    value = np.log(rest)
    if most(rest) >= _NEAR_ONE:
        near = np.flatnonzero(rest >= _NEAR_ONE)
        value[near] = np.log1p(sums(np.expm1(d[near])) / n)
    value += m
    _mend((value,), lambda x: portable.logmeanexp(np, x, (1,)), rows)
    return value.astype(request.result_dtype, copy=False).reshape(request.reduced_shape())


def running(request: Request) -> Any:
    """Return the largest so far + log1p(rest).

    To the rest each entry adds the smaller one of itself and of the largest before it. If there is
    a `dy`, the gradient is p_j * sum_{i >= j} dy_i / (p_1 + ... + p_i).
    """
    given = [request.x] if request.dy is None else [request.x, request.dy]
    rows, *upstream = rows_of(request, *given)
    function = getattr(portable, request.operation)

    def by_formula(*arrays: Any) -> Any:
        return function(np, *arrays, 1)

    if rows.exact or rows.x.shape[1] <= _FEW:
        found = _running(rows, *(one.x for one in upstream))
        _mend((found,), by_formula, rows, *upstream)
    else:
        found = by_formula(rows.x, *(one.x for one in upstream))
    return _like(request, found, request.result_dtype)


def _running(rows: Rows, *upstream: Any) -> Any:
    p = rows.state().p
    if not least(p[:, 0]) >= _FIRST:
        p[~(p[:, 0] >= _FIRST)] = np.nan
    largest = np.maximum.accumulate(p, 1)
    rest = np.zeros_like(p)
    np.minimum(p[:, 1:], largest[:, :-1], out=rest[:, 1:])
    np.add.accumulate(rest, 1, out=rest)
    if upstream:
        rest += largest
        terms = np.divide(upstream[0], rest, rest)
        p *= np.add.accumulate(terms[:, ::-1], 1)[:, ::-1]
        return p
    rest /= largest
    np.log1p(rest, rest)
    rest += np.maximum.accumulate(rows.x, 1)
    return rest
