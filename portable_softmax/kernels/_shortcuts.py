"""Shortcuts for small arrays, filled in by a kernel that has them loaded.

(type of the array, operation) -> function of the public function's arguments. It answers None for
a call that it leaves to the usual way, with its checks and errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SHORTCUTS: dict[tuple[type, str], Callable[..., Any]] = {}
