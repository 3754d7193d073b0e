"""ndonnx: operations are written to an ONNX graph, which something else runs."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from portable_softmax._typing import Namespace
from portable_softmax.libraries._library import RUNNING_SUM, Library
from portable_softmax.libraries._namespace import Adapted


class Ndonnx(Library):
    """An array has a dtype and a shape, of which lengths may be open, and no values."""

    lazy = True  # of constants too: what an argument may hold decides
    only_device = "onnx"  # what runs the graph decides where

    def __init__(self, xp: Namespace, name: str) -> None:
        super().__init__(_Namespace(xp), name)

    def shape(self, x: Any) -> Any:
        """Return the shape that the graph finds."""
        return x.dynamic_shape

    def alike(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return both: arrays of a graph lie nowhere."""
        return x, y

    def has_float64(self, x: Any) -> bool:
        """Return True."""
        return True

    def longest_sum(self, x: Any, axis: int) -> float:
        """Return that of a running sum: ONNX Runtime's is one, in a few lanes, along any axis."""
        return RUNNING_SUM

    def iterate(self, step: Callable[[Any], tuple[Any, Any]], x: Any, most: int) -> Any:
        """Return x after steps, in a loop of ONNX: written out, they are thousands of nodes."""
        after, moves = step(x)
        if _has_a_value(moves):  # spox computes constants as it goes, but no loop
            for _ in range(1, most):
                if not moves.unwrap_numpy():
                    break
                after, moves = step(after)
            return after
        several = isinstance(x, tuple)

        def body(_taken: Any, _goes_on: Any, *given: Any) -> list[Any]:
            arrays = tuple(map(self.xp.asarray, given))
            found, moves = step(arrays if several else arrays[0])
            # spox declares the condition with a shape of (1,).
            new = self.xp.reshape(moves, (1,)), *(found if several else (found,))
            return [array.unwrap_spox() for array in new]

        onnx = import_module("spox.opset.ai.onnx.v21")
        limit, go = onnx.const(np.asarray([most])), onnx.const(np.asarray([True]))
        start = [array.unwrap_spox() for array in (x if several else (x,))]
        arrays = tuple(map(self.xp.asarray, onnx.loop(limit, go, start, body=body)))
        return arrays if several else arrays[0]


class _Namespace(Adapted):
    """ndonnx, with a `matmul` that forgets no length because another one is open."""

    def matmul(self, x: Any, y: Any) -> Any:
        """Return x @ y of two matrices."""
        found = self._xp.matmul(x, y)
        lengths = x.shape[0], y.shape[1]
        if found.shape == lengths or lengths == (None, None) or 0 in lengths:
            return found
        return self._xp.reshape(found, tuple(-1 if n is None else n for n in lengths))


def _has_a_value(array: Any) -> bool:
    try:
        array.unwrap_numpy()
    except ValueError:
        return False
    return True
