"""A namespace whose functions that make arrays know no devices."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from portable_softmax._typing import Namespace

CREATION = (
    *("arange", "asarray", "empty", "eye", "full", "full_like", "ones", "ones_like", "zeros"),
    "zeros_like",
)


class Adapted:
    """A namespace with `device` of its creation functions under another name, or under none."""

    def __init__(self, xp: Namespace, device: str | None = None) -> None:
        self.__name__ = xp.__name__
        self._xp = xp
        self._device = device

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._xp, name)
        if name in CREATION:
            found = _renamed(found, self._device)
        setattr(self, name, found)
        return found


def _renamed(function: Callable[..., Any], to: str | None) -> Callable[..., Any]:
    @wraps(function)
    def made(*args: Any, device: Any = None, **kwargs: Any) -> Any:
        if to is not None and device is not None:
            kwargs[to] = device
        return function(*args, **kwargs)

    return made
