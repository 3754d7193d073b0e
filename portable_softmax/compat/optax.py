"""Losses with the arguments of `optax`, one number for each position.

Arrays may be of any library, those of NumPy beside them too, and JAX is not imported. What differs
on purpose: a label out of range, -1 among them, raises IndexError where it can be read, and is nan
where it cannot or beside `where`, as is a label that `where` masks out; a label of 0 at a logit of
-inf contributes 0 in `softmax_cross_entropy` too; integers are taken as logits.
"""

from __future__ import annotations

import math
from typing import Any

from portable_softmax import _checks, _cross_entropy, libraries
from portable_softmax._typing import Array, ArrayT, Axis, Mask, Namespace
from portable_softmax.compat._arguments import joined

__all__ = [
    "safe_softmax_cross_entropy",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
]


def softmax_cross_entropy(
    logits: ArrayT, labels: Array, axis: Axis = -1, where: Mask | None = None
) -> ArrayT:
    """Return the cross-entropy of logits and distributions over `axis`.

    The arguments are those of ``optax.softmax_cross_entropy``, the answer is that of
    `portable_softmax.cross_entropy`.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax.compat import optax
    >>> optax.softmax_cross_entropy(np.asarray([[30.0, 0.0, 0.0]]), np.asarray([[1.0, 0.0, 0.0]]))
    array([1.87152459e-13])
    """
    logits, labels, where = joined(logits, labels, where)
    library, _ = _checks.array("logits", logits)
    _checks.companion("labels", labels, "logits", logits, library)
    xp = library.xp
    if labels.shape != logits.shape:
        logits, labels = xp.broadcast_arrays(logits, labels)
    where = _mask(library, logits, where, axis)
    if not isinstance(axis, int):
        logits, labels, where = (_last(xp, x, axis) for x in (logits, labels, where))
        axis = -1
    return _losses(logits, labels, axis, where)


def safe_softmax_cross_entropy(logits: ArrayT, labels: Array) -> ArrayT:
    """Return the cross-entropy of logits and distributions over the last axis.

    The arguments are those of ``optax.safe_softmax_cross_entropy``, the answer is that of
    `portable_softmax.cross_entropy`.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax.compat import optax
    >>> logits, labels = np.asarray([[0.0, -np.inf]]), np.asarray([[1.0, 0.0]])
    >>> optax.safe_softmax_cross_entropy(logits, labels)
    array([0.])
    """
    return softmax_cross_entropy(logits, labels)


def softmax_cross_entropy_with_integer_labels(
    logits: ArrayT,
    labels: Array,
    axis: int | tuple[int, ...] = -1,
    where: Mask | None = None,
) -> ArrayT:
    """Return the cross-entropy of logits and class indices over `axis`.

    The arguments are those of ``optax.softmax_cross_entropy_with_integer_labels``, the answer is
    that of `portable_softmax.cross_entropy`. Over several axes a label is a flat index.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax.compat import optax
    >>> logits, labels = np.zeros((1, 2, 2)), np.asarray([3])
    >>> optax.softmax_cross_entropy_with_integer_labels(logits, labels, axis=(1, 2))
    array([1.38629436])
    """
    logits, labels, where = joined(logits, labels, where)
    library, _ = _checks.array("logits", logits)
    where = _mask(library, logits, where, axis)
    if not isinstance(axis, int):
        logits, where = (_last(library.xp, x, axis) for x in (logits, where))
        axis = -1
    return _losses(logits, labels, axis, where)


def _losses(logits: ArrayT, labels: Array, axis: int, where: Any) -> ArrayT:
    """Return one loss per position, 0 where a position is masked as a whole."""
    options: dict[str, Any] = {}
    if where is not None:
        library = libraries.library_of(logits)
        dtype, _ = library.compute_dtype(logits)
        counts = library.cast(library.xp.any(where, axis=axis), dtype)
        options = {"where": where, "sample_weight": counts, "check_labels": False}
    return _cross_entropy.cross_entropy(logits, labels, axis=axis, reduction="none", **options)


def _mask(library: libraries.Library, logits: Any, where: Any, axis: Any) -> Any:
    """Return a mask of the shape of the logits; one of whole positions lacks their `axis`."""
    if where is None:
        return None
    _checks.companion("where", where, "logits", logits, library)
    xp, shape = library.xp, logits.shape
    if where.ndim != logits.ndim:
        axes = sorted(_checks.axes(axis, logits.ndim))
        positions = tuple(n for a, n in enumerate(shape) if a not in axes)
        of = f"logits without axis {', '.join(map(str, axes))}"
        _checks.mask_of_shape(where, of, positions, library)
        where = xp.broadcast_to(where, positions)
        for a in axes:
            where = xp.expand_dims(where, axis=a)
    _checks.mask_of_shape(where, "logits", shape, library)
    return xp.broadcast_to(where, shape)


def _last(xp: Namespace, x: Any, axis: Axis) -> Any:
    """Return `x` with several axes, all for None, laid into one at the end."""
    if x is None:
        return None
    axes = _checks.axes(axis, x.ndim)
    kept = tuple(a for a in range(x.ndim) if a not in axes)
    n = math.prod(x.shape[a] for a in axes)
    x = xp.permute_dims(x, (*kept, *axes))
    return xp.reshape(x, (*x.shape[: len(kept)], n))
