"""What the package asks of an array: a shape, a dtype, and arithmetic."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, TypeVar


class Array(Protocol):
    """An array of any library that follows the array API standard.

    Only what every supported library's type already declares is listed, so that
    ``numpy.ndarray``, ``torch.Tensor`` and ``jax.Array`` all satisfy it as they are.
    """

    @property
    def shape(self) -> Any: ...

    @property
    def ndim(self) -> int: ...

    @property
    def dtype(self) -> Any: ...

    def __getitem__(self, key: Any, /) -> Any: ...
    def __add__(self, other: Any, /) -> Any: ...
    def __sub__(self, other: Any, /) -> Any: ...
    def __mul__(self, other: Any, /) -> Any: ...
    def __truediv__(self, other: Any, /) -> Any: ...
    def __neg__(self) -> Any: ...


class Mask(Protocol):
    """A boolean array, for which libraries declare no arithmetic."""

    @property
    def shape(self) -> Any: ...

    @property
    def ndim(self) -> int: ...

    @property
    def dtype(self) -> Any: ...


ArrayT = TypeVar("ArrayT", bound=Array)

# An array API namespace is a module, whose attributes no type checker can follow.
Namespace: TypeAlias = Any
# torch.Tensor, which mypy knows where torch is installed only.
Tensor: TypeAlias = Any
Axis: TypeAlias = int | tuple[int, ...] | None
