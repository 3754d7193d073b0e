"""A library for tests: array-api-strict in an array class of its own, which knows no devices.

`library(name, wrong)` makes another one, some functions of which are wrong on purpose.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import array_api_strict as strict

OPERATORS = ("add", "sub", "mul", "truediv", "pow", "matmul", "and", "or", "xor")
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
OTHERS = ("neg", "invert", "abs", "bool", "int", "float", "index", "getitem")


class Namespace(ModuleType):
    """The functions of array-api-strict, on arrays of this library."""

    def __init__(self, name: str, wrong: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__(name)
        self._wrong = wrong
        self._array = _array_class(self)

    def __getattr__(self, name: str) -> Any:
        found = getattr(strict, name)
        if not callable(found) or isinstance(found, type):
            return found
        return self._of_ours(self._wrong[name](found) if name in self._wrong else found)

    def _of_ours(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._wrapped(
            function(*map(self._bare, args), **{k: self._bare(v) for k, v in kwargs.items()})
        )

    def _bare(self, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(map(self._bare, value))
        return value.inner if isinstance(value, self._array) else value

    def _wrapped(self, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return tuple(map(self._wrapped, value))
        return self._array(value) if isinstance(value, type(strict.empty(0))) else value


def _array_class(namespace: Namespace) -> type:
    class Array:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __array_namespace__(self, api_version: str | None = None) -> Namespace:
            return namespace

        def __repr__(self) -> str:
            return repr(self.inner)

        dtype = property(operator.attrgetter("inner.dtype"))
        shape = property(operator.attrgetter("inner.shape"))
        ndim = property(operator.attrgetter("inner.ndim"))
        size = property(operator.attrgetter("inner.size"))

        def __dlpack__(self, **options: Any) -> Any:
            return self.inner.__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return self.inner.__dlpack_device__()

    names = [*OPERATORS, *(f"r{name}" for name in OPERATORS), *COMPARISONS, *OTHERS]
    for name in (f"__{name}__" for name in names):

        def method(self: Any, *args: Any, name: str = name) -> Any:
            return namespace._of_ours(getattr(self.inner, name))(*args)

        setattr(Array, name, method)
    return Array


def library(name: str, wrong: Mapping[str, Callable[..., Any]] | None = None) -> Namespace:
    """Return a library, of which `wrong` says what becomes of some functions."""
    return Namespace(name, wrong or {})


# `import shelf` gives the library itself, as `import numpy` does.
_THIS = library("shelf")
_THIS.library = library
_THIS.__file__, _THIS.__spec__ = __file__, __spec__
sys.modules[__name__] = _THIS
