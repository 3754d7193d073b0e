"""How an array is cut into tiles that stay in cache, and what they are worked on in.

An array whose reduced axes lie side by side is seen as (before, C, after). Its tiles have one axis
of classes and one of positions:

    rows      nothing after: n rows of C, as they lie in memory
    short     the same with a small C: n rows, transposed into a copy, since loops over a few
              numbers cost more than the numbers
    columns   C rows of some of what is after, as they lie in memory
    stacked   the same where all that is after makes no tile: several blocks, copied side by side
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from portable_softmax import portable
from portable_softmax.kernels._cuts import TILE_BYTES, on_threads
from portable_softmax.kernels._request import Request

# Rows shorter than this are transposed.
SHORT = 128

# Scratch is at most five tiles a thread, and at most 15 % of an array that is not small.
_BYTES_A_THREAD = 5 * TILE_BYTES * 100 // 15

# The shortest run of columns: what lies far apart in memory is not worth reading in bits.
_RUN = 1 << 14


class Buffers:
    """The scratch of one thread: arrays by name, made once and used for all of its tiles."""

    def __init__(self, dtype: Any) -> None:
        self._dtype = dtype
        self._flat: dict[str, Any] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> Any:
        """Return the array of this name, of undefined content."""
        n = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.size < n:
            flat = self._flat[name] = np.empty(n, self._dtype)
        return flat[:n].reshape(shape)


def chunks(tile: Any, axis: int) -> list[tuple[slice, ...]]:
    """Return the cuts along its classes of a tile that is larger than a tile should be."""
    n = tile.shape[axis]
    step = max(TILE_BYTES * n // (tile.size * tile.itemsize), 1)
    if n <= step:
        return [(slice(None),)]
    before = (slice(None),) * axis
    return [(*before, cut) for cut in portable.cuts(n, step)]


class Layout:
    """An array, seen as (before, C, after), and the tiles that it is cut into."""

    def __init__(self, x: Any, shape: tuple[int, int, int], compute: Any) -> None:
        before, n, after = shape
        self.x = x.reshape(shape)
        self.compute = compute
        self.shape = before, after
        """The shape of what there is one of per position."""
        self.axis = 1 if after == 1 and n >= SHORT else 0
        self.rows = after == 1
        """Whether nothing comes after, so that a position's classes lie side by side."""
        self.copies = (self.rows and self.axis == 0) or x.dtype != compute
        """Whether a tile is a copy in scratch, that may be worked on in place."""
        self.stacked = False
        elements = TILE_BYTES // compute.itemsize
        if self.rows:
            step = max(1, elements // n)
            if self.axis == 0 and step > 16:
                # Classes a power of two apart would share one place in the cache.
                step |= 16
            self.pieces: list[Any] = portable.cuts(before, step)
        elif elements // (n * after) > 1:
            self.stacked = self.copies = True
            step = elements // (n * after)
            self.pieces = portable.cuts(before, step)
        else:
            step = min(after, max(_RUN, elements // n))
            cuts = portable.cuts(after, step)
            self.pieces = [(a, cut) for a in range(before) for cut in cuts]

    def answers(self, request: Request, dtype: Any) -> tuple[Any, Any]:
        """Return an array for the answer, and the same as it is cut.

        Tiles are copies where it is also what is read, or lies as no new array does: the sums of
        what was written to it would have other bits.
        """
        out = request.out
        if out is None:
            out = np.empty(request.x.shape, dtype)
            return out, out.reshape(self.x.shape)
        if not out.flags.carray or request.in_place():
            self.copies = True
        cut = out.reshape(self.x.shape)
        return (out if np.may_share_memory(cut, out) else cut.reshape(out.shape)), cut

    def fill(
        self, request: Request, dtype: Any, work: Callable[[Any, Any, Any, Buffers], None]
    ) -> Any:
        """Return what ``work(x, y, piece, buffers)`` writes: y for a tile x, which may be y."""
        out, answers = self.answers(request, dtype)

        def one(_: int, piece: Any, buffers: Buffers) -> None:
            x, target = self.read(piece, buffers), self.view(answers, piece)
            y = x if self.copies else target
            work(x, y, piece, buffers)
            self.write(y, target)

        self.run(one)
        return out

    def view(self, array: Any, piece: Any) -> Any:
        """Return a piece of an array of this shape, with the classes along `axis`."""
        if self.stacked:
            return array[piece].transpose(1, 0, 2)
        if not self.rows:
            return array[piece[0], :, piece[1]]
        rows = array[piece, :, 0]
        return rows if self.axis == 1 else rows.T

    def positions(self, array: Any, piece: Any) -> Any:
        """Return a piece of an array of the shape (before, after)."""
        if self.stacked:
            return array[piece].reshape(-1)
        return array[piece, 0] if self.rows else array[piece]

    def read(self, piece: Any, buffers: Buffers, name: str = "tile") -> Any:
        """Return a tile: a copy in scratch if `copies`, else the array itself, not to be written.

        A copy even of a single row, whose transpose NumPy would call contiguous as it is.
        """
        tile = self.view(self.x, piece)
        if not self.copies:
            return tile
        copy = buffers.take(name, tile.shape)
        np.copyto(copy, tile, casting="unsafe")
        return copy.reshape(copy.shape[0], -1)

    def write(self, tile: Any, view: Any) -> None:
        """Copy a tile that was worked on in scratch to where it belongs."""
        if self.copies:
            np.copyto(view, tile.reshape(view.shape), casting="unsafe")

    def again(self, piece: Any, which: Any, buffers: Buffers, x: Any = None) -> Any:
        """Return some positions of a tile: of `x`, or if that was written to, of a new copy."""
        if x is None:
            x = self.read(piece, buffers, "again")
        if which.size == x.shape[1 - self.axis]:
            return x
        shape = (x.shape[0], which.size) if self.axis == 0 else (which.size, x.shape[1])
        return np.take(x, which, axis=1 - self.axis, out=buffers.take("some", shape), mode="clip")

    def redo(
        self, piece: Any, which: Any, y: Any, buffers: Buffers, work: Callable[[Any, Any], None]
    ) -> None:
        """Call ``work(x, y)`` for some positions of a tile: it reads `x` and writes `y`."""
        x = self.again(piece, which, buffers)
        if x.shape == y.shape:
            work(x, y)
            return
        answer = buffers.take("answer", x.shape)
        work(x, answer)
        y[(slice(None), which) if self.axis == 0 else which] = answer

    def run(self, work: Callable[[int, Any, Buffers], None]) -> None:
        """Call ``work(i, piece, buffers)`` for each piece, on threads if the array is large."""
        free: list[Buffers] = []

        def one(numbered: tuple[int, Any]) -> None:
            buffers = free.pop() if free else Buffers(self.compute)
            try:
                work(*numbered, buffers)
            finally:
                free.append(buffers)

        numbered = list(enumerate(self.pieces))
        # Broadcasting a number per row copies it out to the size of the buffer, unless rows are
        # longer than that. The user's size is back when the caller's errstate ends.
        if self.axis == 1 and self.x.shape[1] >= 256 and _sums_are_whole():
            np.setbufsize(256)
        on_threads(one, numbered, self.x.nbytes, at_most=max(2, self.x.nbytes // _BYTES_A_THREAD))


@cache
def _sums_are_whole() -> bool:
    """Return whether a sum along rows is pairwise whatever the size of the buffer.

    NumPy 2.0 adds one buffer after another, which in short ones loses the digits of long rows.
    """
    terms = np.full(1 << 12, 0.1, np.float32)
    whole = np.add.reduce(terms)
    with np.errstate():
        np.setbufsize(16)
        return bool(np.add.reduce(terms) == whole)


def layout(x: Any, axes: tuple[int, ...], compute: Any) -> Layout | None:
    """Return how `x` is cut, or None if it is not one block in memory with its axes together.

    Nor are there tiles in longdouble: what is good in them is known for float32 and float64.
    """
    first, last = min(axes), max(axes)
    if (
        compute.type not in (np.float32, np.float64)
        or not x.flags.c_contiguous
        or last - first + 1 != len(axes)
        or x.size == 0
    ):
        return None
    shape = x.shape
    before, n = math.prod(shape[:first]), math.prod(shape[first : last + 1])
    return Layout(x, (before, n, math.prod(shape[last + 1 :])), compute)
