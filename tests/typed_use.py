"""What a type checker sees: each function returns the type of the array that it is given.

mypy reads this file in the session `lint`, mypy and pyright in `downstream`; nothing runs it.
"""

from __future__ import annotations

from typing import assert_type

import numpy as np
from numpy.typing import NDArray

import portable_softmax as ps

Real = NDArray[np.float64]
x: Real = np.zeros((2, 3))
labels: NDArray[np.int64] = np.zeros(2, np.int64)
mask: NDArray[np.bool_] = x > 0

assert_type(ps.softmax(x, axis=(0, 1)), Real)
assert_type(ps.log_softmax(x, where=x > 0), Real)
assert_type(ps.logsumexp(x, axis=-1, keepdims=True, where=mask), Real)
log_of_size, sign = ps.logsumexp(x, b=x, return_sign=True)  # complex ones differ in dtype
assert_type(ps.softmax_vjp(x, x), Real)
assert_type(ps.softmax_jacobian(x), Real)
assert_type(ps.cross_entropy(x, labels, reduction="none"), Real)
assert_type(ps.cross_entropy_value_and_grad(x, labels), tuple[Real, Real])
assert_type(ps.sigmoid_cross_entropy(x, mask), Real)
assert_type(ps.linear_cross_entropy(x, x, labels, tile=1 << 20, where=mask), Real)
assert_type(
    ps.linear_cross_entropy_value_and_grad(x, x, labels),
    tuple[Real, tuple[Real, Real, Real | None]],
)
assert_type(ps.online.softmax(x, ps.online.merge(ps.online.fold(x), ps.online.identity(x))), Real)

state = ps.online.fold(x, where=mask)
layer: ps.SoftmaxWithLoss[Real] = ps.SoftmaxWithLoss(label_smoothing=0.1)
assert_type(layer.forward(x, labels), Real)
assert_type(layer.backward(), Real)
