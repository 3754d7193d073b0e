"""Parts of rows, in tiles that fit in cache: what a lazy chunk and a shard of a rank share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import numpy as np

from portable_softmax import libraries, portable
from portable_softmax.kernels import _folding, _threads
from portable_softmax.kernels._request import LossOptions, Request
from portable_softmax.libraries import Library

_TILE = 1 << 18  # elements


def tiled(
    function: Callable[..., Any],
    axes: tuple[int, ...],
    x: Any,
    *others: Any,
    merge: Callable[[list[Any]], Any] | None = None,
    step: int = 0,
) -> Any:
    """Return ``function(x, *others)`` of a part, made in tiles along its longest axis.

    The others have as many axes as `x` has, some of length 1, or are None. Answers are joined along
    that axis, or merged where it is one of `axes`; without `merge` it is none of them. `step` is
    the length of a tile, if that is not to fit in cache.
    """
    library = libraries.library_of(x)
    candidates = [a for a in range(x.ndim) if merge is not None or a not in axes]
    axis = max(candidates, key=lambda a: x.shape[a], default=0)
    n = x.shape[axis]
    step = step or max(1, _TILE * n // max(math.prod(x.shape), 1))
    if step >= n or not candidates:
        return library.quietly(function, x, *others)
    cuts = portable.cuts(n, step)
    found: list[Any] = [None] * len(cuts)

    def work(i: int) -> None:
        at = (*(slice(None),) * axis, cuts[i])
        parts = [a if a is None or a.shape[axis] == 1 else a[at] for a in (x, *others)]
        found[i] = library.quietly(function, *parts)

    _threads.run(work, range(len(cuts)))
    if axis in axes:
        assert merge is not None
        return merge(found)
    if not isinstance(found[0], tuple):
        return library.xp.concat(found, axis=axis)
    return tuple(library.xp.concat(parts, axis=axis) for parts in zip(*found, strict=True))


def with_axes(a: Any, ndim: int) -> Any:
    """Return an array with axes of length 1 in front, as many as are missing; None as it is."""
    return None if a is None else portable.with_axes(a, ndim)


# --------------------------------------------------------------------------- the softmax family


def state_dtypes(compute: Any) -> tuple[Any, Any]:
    """Return the dtypes of a state, max and rest, of logits that are computed in that of NumPy."""
    return compute, np.result_type(compute, np.float64)


def folded(
    library: Library, x: Any, where: Any, axes: tuple[int, ...], temperature: float = 1.0
) -> Any:
    """Return the state of a part, by a kernel or in tiles."""

    def in_tiles(request: Request) -> Any:
        def fold(x: Any, where: Any) -> Any:
            options = request.options._replace(where=where)
            return _folding.in_its_operations(request._replace(x=x, options=options))

        def merge(states: list[Any]) -> Any:
            return library.quietly(portable.merge, library.xp, states, temperature)

        return tiled(fold, axes, x, where, merge=merge)

    return _folding.fold(library, x, where, axes, temperature, in_tiles)


def softmax_times(
    library: Library, x: Any, where: Any, axes: tuple[int, ...], state: Any, factor: Any = None
) -> Any:
    """Return the softmax of rows, times a number per row, in a part of them.

    `state` is that of the rows. The softmax of the part alone is times the share of it.
    """
    xp, own = library.xp, folded(library, x, where, axes)
    share = library.quietly(portable.share_of, xp, own, *state)

    def in_tiles(request: Request) -> Any:
        def times(x: Any, where: Any, m: Any, rest: Any, amount: Any) -> Any:
            y = portable.softmax_of(xp, library.cast(x, request.compute_dtype), m, rest) * amount
            y = xp.where(xp.isinf(m), library.scalar(0.0, y), y)
            y = y if where is None else xp.where(where, y, library.scalar(0.0, y))
            return library.cast(y, request.result_dtype)

        return tiled(times, (), x, where, *own, amount)

    ignored = xp.zeros_like(own[0], dtype=xp.bool) if factor is None else factor == 0
    amount = share if factor is None else share * factor
    amount = library.cast(xp.where(ignored, library.scalar(0.0, amount), amount), own[0].dtype)
    y = _folding.softmax_times(library, x, where, axes, amount, in_tiles)
    # Rows without a softmax are nan, of which a kernel has written 0 where all are infinite; what
    # is ignored is 0, of which it has written nan where one is.
    nan = xp.isnan(share) & xp.isinf(own[0]) & ~ignored
    zero = ignored & xp.isnan(own[1])
    if bool(xp.any(nan | zero)):
        nan = nan if where is None else nan & where
        y = xp.where(nan, library.scalar(math.nan, y), xp.where(zero, library.scalar(0.0, y), y))
    return y


class Rows(NamedTuple):
    """A call of the softmax family but for its arrays, the same for each part."""

    operation: str
    axes: tuple[int, ...]
    temperature: float
    compute: Any
    answer: Any
    rounding: float = 0.0  # of an output, if it is that of a narrower dtype

    def fold(self, x: Any, where: Any = None) -> Any:
        """Return the state of a part."""
        library = libraries.library_of(x)
        if library.compute_dtype(x)[0] != self.compute:
            x = library.cast(x, self.compute)
        return folded(library, x, with_axes(where, x.ndim), self.axes, self.temperature)

    def merge(self, states: list[Any]) -> Any:
        """Return the state of all parts."""
        library = libraries.library_of(states[0][0])
        return library.quietly(portable.merge, library.xp, states, self.temperature)

    def logsumexp(self, state: Any) -> Any:
        """Return the logsumexp of whole rows."""
        library = libraries.library_of(state[0])
        return library.cast(library.quietly(portable.logsumexp_of, library.xp, *state), self.answer)

    def finish(self, x: Any, m: Any, rest: Any, where: Any) -> Any:
        """Return the softmax, or its logarithm, of a part from the state of its rows."""
        library = libraries.library_of(x)
        if self.operation == "softmax" and self.temperature == 1.0:
            if library.compute_dtype(x)[1] != self.answer:
                x = library.cast(x, self.compute)
            y = softmax_times(library, x, where, self.axes, (m, rest))
            return library.cast(y, self.answer)
        xp, function, masked = library.xp, portable.softmax_of, 0.0
        if self.operation == "log_softmax":
            function, masked = portable.log_softmax_of, -math.inf

        def finish(x: Any, m: Any, rest: Any, where: Any) -> Any:
            y = function(xp, library.cast(x, self.compute), m, rest, self.temperature)
            y = y if where is None else xp.where(where, y, library.scalar(masked, y))
            return library.cast(y, self.answer)

        return tiled(finish, (), x, m, rest, where)

    def vjp_sums(self, y: Any, dy: Any) -> Any:
        """Return what a part adds to the sums of softmax_vjp or log_softmax_vjp."""
        library = libraries.library_of(y)
        function = getattr(portable, f"{self.operation}_sums")

        def fold(y: Any, dy: Any) -> Any:
            y, dy = library.cast(y, self.compute), library.cast(dy, self.compute)
            return function(library.xp, y, dy, self.axes)

        return tiled(fold, self.axes, y, dy, merge=added)

    def vjp(self, y: Any, dy: Any, sums: Any) -> Any:
        """Return softmax_vjp or log_softmax_vjp of a part, from the sums of its rows."""
        library = libraries.library_of(y)
        function = getattr(portable, f"{self.operation}_of")
        given = {"rounding": self.rounding} if self.operation == "softmax_vjp" else {}

        def finish(y: Any, dy: Any, *sums: Any) -> Any:
            y, dy = library.cast(y, self.compute), library.cast(dy, self.compute)
            return library.cast(function(library.xp, y, dy, sums, **given), self.answer)

        return tiled(finish, (), y, dy, *sums)


VJP_SUMS = {"softmax_vjp": 5, "log_softmax_vjp": 1}


def added(parts: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Return the sums of all parts, added in their order."""
    return tuple(reduce(add, each) for each in zip(*parts, strict=True))


# --------------------------------------------------------------------------- losses


class Loss(NamedTuple):
    """A loss but for its arrays, the same for each part."""

    names: tuple[str, ...]  # of the arrays after the logits
    axis: int
    indices: bool
    options: LossOptions  # without arrays
    classes: int  # of a whole row
    compute: Any

    def target(self, xp: Any, given: dict[str, Any]) -> portable.Target:
        """Return what the labels ask for, as far as it is the same for each part of a row."""
        labels, sample = given.get("labels"), given.get("sample_weight")
        counted = portable.counted_positions(xp, labels, self.options.ignore_index, sample)
        index = None
        if self.indices:
            index = libraries.cast(xp, labels, libraries.of(xp).default_int(labels))
        return portable.Target(index, None, counted, None, None, sample)

    def arrays(self, x: Any, *arrays: Any) -> list[Any]:
        """Return the named arrays with as many axes as `x` has."""
        found = []
        for name, a in zip(self.names, arrays, strict=True):
            if name == "sample_weight" or (name == "labels" and self.indices):
                a = portable.with_class_axis(a, self.axis)
            elif name in ("weight", "numbers"):
                a = a[(..., *(None,) * (x.ndim - 1 - self.axis))]
            found.append(with_axes(a, x.ndim))
        return found

    def part(self, library: Library, x: Any, *arrays: Any) -> tuple[Any, Any, Any]:
        """Return a tile's part of the loss, its target, and which labels are among its classes."""
        xp, given = library.xp, dict(zip(self.names, arrays, strict=True))
        flat = {}
        for name, a in given.items():
            shape = (*x.shape[: self.axis], a.shape[self.axis], *x.shape[self.axis + 1 :])
            alone = name in ("weight", "numbers")
            flat[name] = self.flat(xp, a if alone else xp.broadcast_to(a, shape))
        target, mask, hit = self.target(xp, flat), flat.get("where"), None
        there = library.cast(flat["labels"], self.compute)
        if self.indices:
            there = flat["numbers"]
            hit = there == target.index
            hit = xp.any(hit if mask is None else hit & mask, axis=1, keepdims=True)
        part = portable.part_of_loss(
            xp, library.cast(self.flat(xp, x), self.compute), there, target, mask,
            flat.get("weight"), flat.get("count", self.classes), self.options,
        )  # fmt: skip
        return part, target, hit

    def flat(self, xp: Any, a: Any) -> Any:
        """Return an array with its classes last and its positions in one axis."""
        a = xp.moveaxis(a, self.axis, -1)
        return xp.reshape(a, (math.prod(a.shape[:-1]), a.shape[-1]))

    def back(self, xp: Any, a: Any, shape: tuple[int, ...]) -> Any:
        """Undo `flat`, for a `shape` of which the class axis does not count."""
        positions = shape[: self.axis] + shape[self.axis + 1 :]
        return xp.moveaxis(xp.reshape(a, (*positions, a.shape[-1])), -1, self.axis)

    def at_labels(self, x: Any) -> bool:
        """Return whether a part is its rows' exps and the entries at the labels, and no more."""
        plain = self.options.label_smoothing == 0.0 and self.options.softcap is None
        library = libraries.library_of(x)
        return self.indices and plain and library.gathers and x.shape[self.axis] > 0

    def rows(self, library: Library, x: Any, arrays: Sequence[Any]) -> tuple[Any, Any]:
        """Return the logits as kernels take them, and the mask or None."""
        x = x if library.compute_dtype(x)[0] == self.compute else library.cast(x, self.compute)
        return x, dict(zip(self.names, arrays, strict=True)).get("where")

    def of_labels(self, library: Library, x: Any, arrays: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Return the entries at the labels, as a part of one class, and where that class is."""
        xp, given, shape = library.xp, dict(zip(self.names, arrays, strict=True)), [*x.shape]
        shape[self.axis] = 1
        labels, numbers = given["labels"], xp.reshape(given["numbers"], (-1,))
        label = xp.broadcast_to(library.cast(labels, library.default_int(labels)), tuple(shape))
        at = label - numbers[0]
        here = (at >= 0) & (at < x.shape[self.axis])
        at = xp.where(here, at, xp.zeros_like(at))
        given["numbers"] = xp.where(here, label, ~label)  # the number of no label
        if "weight" in given:
            weight = xp.take(xp.reshape(given["weight"], (-1,)), xp.reshape(at, (-1,)))
            given["weight"] = xp.reshape(weight, at.shape)
        if "where" in given:
            where = xp.broadcast_to(given["where"], x.shape)
            given["where"] = library.take_along_axis(where, at, self.axis)
        return at, [library.take_along_axis(x, at, self.axis), *given.values()]

    def fold_tile(self, x: Any, *arrays: Any) -> tuple[Any, ...]:
        """Return the sums of a tile, and which labels are among its classes."""
        library = libraries.library_of(x)
        xp = library.xp
        if self.at_labels(x):
            _, entries = self.of_labels(library, x, arrays)
            part, target, hit = self.part(library, *entries)
            rows = folded(library, *self.rows(library, x, arrays), (self.axis,))
            m, rest = (self.flat(xp, a) for a in rows)
            if target.counted is not None:  # what is ignored may hold anything
                m, rest = (xp.where(target.counted, a, library.scalar(0.0, a)) for a in (m, rest))
        else:
            part, _, hit = self.part(library, x, *arrays)
            m, rest = _folding.fold(library, part.x, None, (1,), 1.0)
        sums = portable.fold_part_of_loss(xp, part, (m, rest))
        found = sums if hit is None else (*sums, hit)
        return tuple(self.back(xp, a, x.shape) for a in found)

    def fold(self, x: Any, *arrays: Any) -> Any:
        """Return the same of a part."""
        given = self.arrays(x, *arrays)
        if self.at_labels(x):
            return libraries.library_of(x).quietly(self.fold_tile, x, *given)
        return tiled(self.fold_tile, (self.axis,), x, *given)

    def finish(self, sums: Any, *arrays: Any) -> Any:
        """Return the losses of positions, and what their gradients need."""
        library = libraries.library_of(sums[0])
        given = dict(zip(self.names, self.arrays(sums[0], *arrays), strict=True))
        target = self.target(library.xp, given)
        if self.indices:
            *sums, hit = sums
            valid = hit if target.counted is None else hit | ~target.counted
            target = target._replace(valid=valid)
        sums = portable.Sums(*sums)
        finished = portable.finished_loss
        return *library.quietly(finished, library.xp, sums, target, self.options), *sums

    def gradient_tile(self, finished: Any, factor: Any, x: Any, *arrays: Any) -> Any:
        """Return the gradient of a tile of logits times a number per position, or None for 1."""
        library = libraries.library_of(x)
        xp = library.xp
        a, *more = (self.flat(xp, s) for s in finished)
        sums = portable.Sums(*more)

        def of(part: portable.Part, target: portable.Target) -> Any:
            counted = target.counted
            g = portable.gradient_of_part(xp, part, sums, a, self.options, counted)
            g = self.back(xp, g, x.shape)
            return g if factor is None else scaled(xp, g, factor)

        if self.at_labels(x):
            at, entries = self.of_labels(library, x, arrays)
            part, target, _ = self.part(library, *entries)
            amount = self.back(xp, sums.q + a, x.shape)
            amount = amount if factor is None else scaled(xp, amount, factor)
            if bool(xp.all(xp.isfinite(amount))):  # times a probability of 0 it is 0
                rows, state = self.rows(library, x, arrays), finished[1:3]
                g = softmax_times(library, *rows, (self.axis,), state, amount)
                entry = library.cast(of(part, target), g.dtype)
                return library.put_along_axis(g, at, entry, self.axis)
        part, target, _ = self.part(library, x, *arrays)
        return of(part, target)

    def gradient(self, dtype: Any, divisor: Any, x: Any, finished: Any, *arrays: Any) -> Any:
        """Return the gradient of a part."""
        library = libraries.library_of(x)
        factor, more = None, self.arrays(x, *arrays)
        if self.options.reduction == "mean":
            divisor = portable.nothing_to_inf(library.xp, library.cast(divisor, self.compute))
            factor = with_axes(1.0 / divisor, x.ndim)
        return self.scaled_gradient(dtype, factor, x, more, finished[1:])

    def scaled_gradient(
        self, dtype: Any, factor: Any, x: Any, given: list[Any], finished: Any
    ) -> Any:
        """Return the gradient of a part times a number per position, or None for 1."""
        library, n = libraries.library_of(x), len(given)

        def gradient(x: Any, factor: Any, *more: Any) -> Any:
            return library.cast(self.gradient_tile(more[n:], factor, x, *more[:n]), dtype)

        if self.at_labels(x):
            return library.quietly(gradient, x, factor, *given, *finished)
        return tiled(gradient, (self.axis,), x, factor, *given, *finished)


def scaled(xp: Any, g: Any, upstream: Any) -> Any:
    """Return g * upstream, 0 where g is, whatever comes from upstream."""
    return xp.where(g == 0, g, g * upstream)


def merged(parts: list[Any]) -> Any:
    """Return the sums of all parts, and which labels are in one of them."""
    library, n = libraries.library_of(parts[0][0]), len(portable.Sums._fields)
    sums = [portable.Sums(*part[:n]) for part in parts]
    hits = [reduce(library.xp.logical_or, hit) for hit in zip(*[p[n:] for p in parts], strict=True)]
    return *library.quietly(portable.merge_losses, library.xp, sums), *hits


# --------------------------------------------------------------------------- linear layers


class Layer(NamedTuple):
    """A linear layer with a loss, the same for each part of its logits."""

    loss: Loss
    bias: bool
    elements: int  # of a tile of logits

    def _problems(self, *arrays: Any) -> tuple[Any, int, Any, list[Any]]:
        """Return what makes the problem of a tile, its length, and the arrays that are cut."""
        hidden, classifier, *given = arrays
        bias = given.pop(0) if self.bias else None
        loss, xp = self.loss, libraries.namespace(hidden)
        step = max(1, self.elements // max(classifier.shape[0], 1))

        def problem(hidden: Any, *given: Any) -> portable.Linear:
            named = dict(zip(loss.names, given, strict=True))
            labels = named["labels"][:, 0] if loss.indices else named["labels"]
            sample = named.get("sample_weight")
            sample = None if sample is None else sample[:, 0]
            options = loss.options._replace(where=named.get("where"), sample_weight=sample)
            found = portable.Linear(
                hidden, classifier, bias, labels, loss.indices, options, loss.compute
            )
            return portable.sound(xp, found)

        return problem, step, hidden, loss.arrays(hidden, *given)

    def fold(self, *arrays: Any) -> Any:
        """Return the sums of a part."""
        problem, step, hidden, given = self._problems(*arrays)
        xp = libraries.namespace(hidden)

        def fold(hidden: Any, *given: Any) -> Any:
            return self.loss.fold_tile(portable.logits_of(xp, problem(hidden, *given)), *given)

        return tiled(fold, (1,), hidden, *given, step=step)

    def gradients(self, finished: Any, *arrays: Any, upstream: Any = None) -> Any:
        """Return None and what a part adds to the gradients.

        `upstream` multiplies the gradient of each position, of which there is then one.
        """
        problem, step, hidden, given = self._problems(*arrays)
        library = libraries.library_of(hidden)

        def gradients(hidden: Any, *given: Any) -> portable.Gradients:
            n = len(self.loss.names)
            here = problem(hidden, *given[:n])
            logits = portable.logits_of(library.xp, here)
            end = n + len(finished) - 1
            factor = None if upstream is None else given[end]
            g = self.loss.gradient_tile(given[n:end], factor, logits, *given[:n])
            return portable.gradients_of(library.xp, here, g)

        more = finished[1:] if upstream is None else (*finished[1:], upstream)
        hiddens: list[Any] = []
        others: list[Any] = []
        for rows in portable.cuts(hidden.shape[0], step):
            parts = [a if a.shape[0] == 1 else a[rows] for a in (hidden, *given, *more)]
            d_hidden, *new = library.quietly(gradients, *parts)
            hiddens.append(d_hidden)
            for so_far, part in zip(others, new, strict=False):
                if so_far is not None:
                    so_far += part
            others = others or new
        return None, library.xp.concat(hiddens, axis=0), *others
