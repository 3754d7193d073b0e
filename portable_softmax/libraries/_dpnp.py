"""dpnp: arrays in the memory of a SYCL queue, which they never leave."""

from __future__ import annotations

from typing import Any

from portable_softmax._typing import Namespace
from portable_softmax.libraries._library import Library
from portable_softmax.libraries._namespace import Adapted


class Dpnp(Library):
    """On any device of SYCL; reading a value waits for the device."""

    gathers = True
    looks_at_subnormals = False  # that waits for the device
    numpy_dtypes = True

    def __init__(self, xp: Namespace, name: str) -> None:
        super().__init__(_Namespace(xp, "device"), name)

    def device_type(self, x: Any) -> str:
        """Return ``"cpu"``, ``"gpu"`` or another kind of SYCL's devices."""
        return str(x.sycl_device.device_type.name)

    def has_float64(self, x: Any) -> bool:
        """Return whether the device of `x` has it."""
        return bool(x.sycl_device.has_aspect_fp64)

    def reads_values(self, x: Any) -> bool:
        """Return True."""
        return True


class _Namespace(Adapted):
    """dpnp, with a `where` for reversed arrays: of two, that of 0.20 reads other memory."""

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        """Choose from `x` where the condition holds, from `y` elsewhere."""
        return self._xp.where(*map(_forwards, (condition, x, y)))


def _forwards(x: Any) -> Any:
    return x.copy() if any(stride < 0 for stride in x.strides) else x
