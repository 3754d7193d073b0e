"""A checked call, as a kernel gets it: what to compute, on which arrays, in which dtype."""

from __future__ import annotations

from typing import Any, NamedTuple

from portable_softmax import _arrays, _checks, portable
from portable_softmax._typing import Namespace


class RowsCall(NamedTuple):
    """A call of softmax, log_softmax or logsumexp; the last answers with its axes kept."""

    operation: str
    xp: Namespace
    x: Any
    axes: tuple[int, ...]  # non-negative, none of length 0
    where: Any  # bool, broadcasts to x; None for all
    temperature: float
    compute: Any  # dtype
    answer: Any  # dtype


class VjpCall(NamedTuple):
    """A call of softmax_vjp or log_softmax_vjp; `x` is the output that they start from."""

    operation: str
    xp: Namespace
    x: Any
    dy: Any
    axes: tuple[int, ...]
    compute: Any
    answer: Any


class LossCall(NamedTuple):
    """A call of cross_entropy or cross_entropy_value_and_grad.

    A kernel that reads class indices itself calls `target` where it finds one without a class,
    to raise the error, unless `check_labels` is off: then the position is nan.
    """

    operation: str
    xp: Namespace
    x: Any  # the logits
    labels: Any
    indices: bool  # class indices, or a distribution
    axis: int
    options: portable.Options
    check_labels: bool
    compute: Any
    answer: Any

    def target(self) -> portable.Target:
        """Return what the labels ask for; raise for one without a class where it can be read."""
        xp, options = self.xp, self.options
        if not self.indices:
            t = _arrays.cast(xp, self.labels, self.compute)
            return portable.Target(index=None, distribution=t, counted=None, valid=None)
        target = portable.index_target(xp, self.x, self.labels, self.axis, options, self.compute)
        # Under tracing even a constant becomes a traced array once it is computed with.
        if self.check_labels and _arrays.reads_values(xp, target.valid):
            n = self.x.shape[self.axis]
            _checks.label_values(xp, self.labels, target.valid, self.axis, n, options.where)
            target = target._replace(valid=None)
        return target


Call = RowsCall | VjpCall | LossCall
