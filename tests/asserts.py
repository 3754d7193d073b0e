"""Comparisons that look at type, dtype, shape and device before values."""

from __future__ import annotations

from typing import Any

import numpy as np
from backends import Backend


def assert_like(xp: Backend, actual: Any, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Check library, device, dtype and shape; return the values."""
    assert xp.is_ours(actual), f"{type(actual)} is no array of {xp}"
    assert xp.dtype_name(actual) == dtype
    assert tuple(actual.shape) == shape
    if xp.library == "numpy" and shape == ():  # as NumPy's own reductions answer
        assert isinstance(actual, np.generic)
    return xp.numpy(actual)


def assert_close(
    xp: Backend,
    actual: Any,
    expected: Any,
    dtype: str = "float64",
    *,
    rtol: float | None = None,
    atol: float = 0.0,
) -> None:
    """Check everything that `assert_like` does, then the values; nan equals nan."""
    expected = np.asarray(expected, dtype=np.float64)
    values = assert_like(xp, actual, expected.shape, dtype)
    if rtol is None:
        rtol = {"float64": 1e-13, "float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
    np.testing.assert_allclose(values.astype(np.float64), expected, rtol=rtol, atol=atol)


def assert_same(xp: Backend, actual: Any, expected: Any) -> None:
    """Check that two functions answer the same bits for the same quantity.

    JAX: nearly the same. Each function is a program of its own, and XLA contracts a product and a
    sum to a fused multiply-add in one and not in another.
    """
    values, wanted = xp.numpy(actual), xp.numpy(expected)
    assert values.dtype == wanted.dtype
    if xp.library == "jax":
        np.testing.assert_array_max_ulp(values, wanted, maxulp=4)
    else:
        np.testing.assert_array_equal(values, wanted)
