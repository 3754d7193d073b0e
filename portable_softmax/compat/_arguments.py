"""What peers take and the public functions refuse, turned into what they take."""

from __future__ import annotations

from typing import Any

import numpy as np

from portable_softmax import libraries

_HOST = (np.ndarray, np.generic)


def is_array(x: Any) -> bool:
    """Return whether `x` is an array of some library, and no list, number or table."""
    try:
        libraries.library_of(x)
    except TypeError:
        return False
    return True


def as_array(x: Any) -> Any:
    """Return an array as it is, and a list, a number or a table as an array of NumPy."""
    return x if is_array(x) else np.asarray(x)


def joined(*values: Any) -> tuple[Any, ...]:
    """Return arrays of NumPy as arrays of the other library among them, as JAX takes them."""
    other = next((x for x in values if is_array(x) and not isinstance(x, _HOST)), None)
    if other is None:
        return values
    xp = libraries.library_of(other).xp
    return tuple(xp.asarray(x) if isinstance(x, _HOST) else x for x in values)
