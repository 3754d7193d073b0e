"""Labels and the weights beside them, by shape, dtype and value."""

from __future__ import annotations

from typing import Any

import numpy as np

from portable_softmax import libraries
from portable_softmax._checks._arrays import (
    REAL,
    chunks_correspond,
    companion,
    real_weights,
    refusal,
    same_shape,
)
from portable_softmax._typing import Namespace
from portable_softmax.libraries import Library, dtype_name


def labels_are_indices(logits: Any, labels: Any, axis: int, library: Library) -> bool:
    """Return whether `labels` are class indices, or else a distribution over the classes."""
    if library.refused_labels:
        raise TypeError(refusal("logits", library, library.refused_labels))
    kind = library.dtype(labels.dtype).kind
    shape = logits.shape
    positions = shape[:axis] + shape[axis + 1 :]
    if kind == "integer" and labels.shape == positions:
        return True
    if kind in ("bool", "complex", "other"):
        raise TypeError(
            f"labels have dtype {dtype_name(labels.dtype)}, expected integers for class indices, "
            "or integers or floats for a distribution: cast them first"
        )
    if same_shape(labels.shape, shape):
        return False
    if same_shape(labels.shape, positions):
        if kind != "integer":
            raise TypeError(
                f"labels have dtype {dtype_name(labels.dtype)} and the shape "
                f"{tuple(labels.shape)} of class indices, which must be integers: cast them to an "
                f"integer dtype, or pass a distribution of shape {tuple(shape)}"
            )
        return True
    swapped = kind != "integer" and library.dtype(logits.dtype).kind == "integer"
    raise ValueError(_label_shape_message(logits, labels, axis, tuple(positions), swapped))


def chunks_of_labels(labels: Any, logits: Any, axis: int, indices: bool) -> None:
    """Check that chunks of labels and of logits are both of known lengths, or both not."""
    axes = [a for a in range(logits.ndim) if not (indices and a == axis)]
    chunks_correspond("labels", labels, "logits", logits, axes)


def _label_shape_message(
    logits: Any, labels: Any, axis: int, positions: tuple[int, ...], swapped: bool
) -> str:
    have, shape = tuple(labels.shape), tuple(logits.shape)
    message = (
        f"labels have shape {have}, expected {positions} for class indices or {shape} for a "
        f"distribution, since logits have shape {shape} and axis is {axis}"
    )
    if swapped and len(have) > len(shape):
        return f"{message}: pass the logits first, then the labels"
    for other in range(len(shape)):
        if other != axis and same_shape(have, (*shape[:other], *shape[other + 1 :])):
            return f"{message}: pass axis={other} if that is the class axis"
    kept = (*shape[:axis], 1, *shape[axis + 1 :])
    if same_shape(have, kept):
        return f"{message}: squeeze axis {axis} of labels"
    return f"{message}: reshape labels"


def label_values(
    xp: Namespace,
    labels: Any,
    valid: Any,
    axis: int,
    n: int,
    where: Any,
    start: tuple[int, ...] = (),
) -> None:
    """Raise for the first label without a class; `valid` says which have one.

    `start` is where a shard of the labels begins.
    """
    if bool(xp.all(valid)):
        return
    valid = xp.squeeze(valid, axis=axis)
    flat = xp.reshape(libraries.cast(xp, ~valid, xp.int8), (-1,))
    position = np.unravel_index(int(xp.argmax(flat)), tuple(valid.shape))
    starts = start or (0,) * len(position)
    at = ", ".join(str(int(i) + first) for i, first in zip(position, starts, strict=True))
    value = labels[tuple(int(i) for i in position)]
    # The integer of a torch tensor goes through 64 bits with a sign; not every library has `item`.
    value = int(value.item() if hasattr(value, "item") else value)
    label = f"labels[{at}] is {value}" if at else f"the label is {value}"
    if 0 <= value < n and where is not None:
        raise IndexError(
            f"{label}, a class that where masks out there: unmask it, or name it as ignore_index"
        )
    raise IndexError(
        f"{label}, outside [0, {n}) for the {n} classes of axis {axis} of logits: correct it, "
        "name it as ignore_index to leave such positions out, or pass check_labels=False to get "
        "nan there"
    )


def binary_labels(labels: Any, logits: Any, library: Library) -> None:
    """Check labels that are yes or no, or between them, one for each logit."""
    companion("labels", labels, "logits", logits, library)
    kind = library.dtype(labels.dtype).kind
    if kind not in REAL | {"bool"}:
        raise TypeError(
            f"labels have dtype {dtype_name(labels.dtype)}, expected booleans, integers or floats "
            "from 0 to 1: cast them first"
        )
    if labels.shape == logits.shape:
        return
    if not same_shape(labels.shape, logits.shape):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, expected {tuple(logits.shape)}, one label "
            "for each logit: reshape labels, or make them one-hot"
        )
    chunks_correspond("labels", labels, "logits", logits, range(logits.ndim))


def sample_weight(weight: Any, logits: Any, axis: int, library: Library) -> None:
    """Check the array of one weight per position, of the library and device of the logits."""
    real_weights("sample_weight", weight, library)
    positions = (*logits.shape[:axis], *logits.shape[axis + 1 :])
    if not same_shape(weight.shape, positions):
        raise ValueError(
            f"sample_weight has shape {tuple(weight.shape)}, expected {positions}: one weight for "
            f"each position, in the shape of logits without axis {axis}"
        )


def class_weight(weight: Any, logits: Any, axis: int, library: Library) -> None:
    """Check the array of one weight per class, of the library and device of the logits."""
    real_weights("weight", weight, library)
    n = logits.shape[axis]
    if tuple(weight.shape) != (n,):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected ({n},): one weight for each class "
            f"of axis {axis} of logits"
        )
