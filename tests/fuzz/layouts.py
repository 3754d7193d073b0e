"""Ways for an array to lie in memory, as expressions that a reproducer can print.

`a` stands for the values in C order. The expressions hold for arrays of one axis or more.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# A broadcast array repeats its first entry along an axis: the values have to be made so first.
BROADCAST = {"broadcast, first axis": 0, "broadcast, last axis": -1}

NUMPY = {
    "C order": "a",
    "Fortran order": "np.asfortranarray(a)",
    "first axis innermost": "np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 0, -1)), -1, 0)",
    "last axis outermost": "np.moveaxis(np.ascontiguousarray(np.moveaxis(a, -1, 0)), 0, -1)",
    "every other column": "np.repeat(a, 2, axis=-1)[..., ::2]",
    "every other row": "np.repeat(a, 2, axis=0)[::2]",
    "columns of a wider array": "np.concatenate([a, a], axis=-1)[..., : a.shape[-1]]",
    "reversed": "np.flip(np.flip(a).copy())",
    "reversed columns": "a[..., ::-1].copy()[..., ::-1]",
    "broadcast, first axis": "np.broadcast_to(a[:1], a.shape)",
    "broadcast, last axis": "np.broadcast_to(a[..., :1], a.shape)",
    "read-only": "np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape)",
    "misaligned": "np.frombuffer(b'.' + a.tobytes(), a.dtype, offset=1).reshape(a.shape)",
}

TORCH = {
    "C order": "a",
    "Fortran order": "a.permute(*range(a.ndim)[::-1]).contiguous().permute(*range(a.ndim)[::-1])",
    "first axis innermost": "a.movedim(0, -1).contiguous().movedim(-1, 0)",
    "last axis outermost": "a.movedim(-1, 0).contiguous().movedim(0, -1)",
    "every other column": "a.repeat_interleave(2, -1)[..., ::2]",
    "every other row": "a.repeat_interleave(2, 0)[::2]",
    "columns of a wider tensor": "torch.cat([a, a], -1)[..., : a.shape[-1]]",
    "at an offset": "torch.cat([a.flatten(), a.flatten()])[a.numel() :].reshape(a.shape)",
    "broadcast, first axis": "a[:1].expand(a.shape)",
    "broadcast, last axis": "a[..., :1].expand(a.shape)",
}

STRICT = {
    "C order": "a",
    "every other column": "xp.concat([a, a], axis=-1)[..., : a.shape[-1]]",
    "reversed": "xp.flip(xp.flip(a))",
    "last axis outermost": "xp.moveaxis(xp.moveaxis(a, -1, 0), 0, -1)",
    "broadcast, first axis": "xp.broadcast_to(a[:1, ...], a.shape)",
}

# A Dask array has chunks instead; JAX lets nobody see how an array lies.
DASK = {
    "two chunks along each axis": "a",
    "one chunk": "a.rechunk(-1)",
    "uneven chunks": "a.rechunk(tuple((1, n - 1) if n > 1 else (n,) for n in a.shape))",
}

BY_LIBRARY = {
    "numpy": NUMPY,
    "torch": TORCH,
    "array_api_strict": STRICT,
    "dask": DASK,
    "jax": {"C order": "a"},
    "mlx": {
        "C order": "a",
        "every other column": "xp.repeat(a, 2, axis=-1)[..., ::2]",
        "last axis outermost": "xp.contiguous(xp.moveaxis(a, -1, 0)).moveaxis(0, -1)",
    },
    "dpnp": {
        name: code.replace("np.", "xp.") for name, code in NUMPY.items() if "frombuffer" not in code
    },
}


def conditioned(values: np.ndarray, layout: str) -> np.ndarray:
    """Return the values that an array of this layout holds."""
    if layout in BROADCAST and values.size:
        first = np.take(values, [0], axis=BROADCAST[layout])
        return np.ascontiguousarray(np.broadcast_to(first, values.shape))
    return values


def laid_out(array: Any, layout: str, library: str, namespace: Any) -> Any:
    """Return an array as the layout says."""
    code = BY_LIBRARY[library].get(layout, "a")  # "C order" is as the library makes an array
    if code == "a":
        return array
    return eval(code, {"np": np, "torch": namespace, "xp": namespace, "a": array})
