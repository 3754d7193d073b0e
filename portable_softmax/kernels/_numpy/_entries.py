"""Cross-entropy of yes-or-no labels on small arrays, in as few calls as it takes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from portable_softmax import portable
from portable_softmax.kernels._request import Request


def losses(request: Request) -> Any:
    """Return the reduced loss; with it the gradient if that is asked for.

    With the logit z, the label t and e = exp(-|z|), softplus of -|z| is log1p(e), and that of |z|
    is |z| more: so the loss is log1p(e) + |z| times what the label gives to the other side.
    """
    z, options = request.x, request.options
    t = request.labels.astype(z.dtype, copy=False)
    with_grad = request.operation == "sigmoid_cross_entropy_value_and_grad"
    size = np.abs(z)
    e = np.exp(-size)
    no = 1.0 - t
    loss = size * np.where(z > 0.0, no, t)
    loss += np.log1p(e)
    summed = loss.sum()
    if not math.isfinite(summed):  # an infinity beside a 0
        function = getattr(portable, request.operation)
        return _cast(function(np, z, t, options), request)
    count = z.size if options.reduction == "mean" else 1
    value = loss if options.reduction == "none" else summed / count
    if not with_grad:
        return _cast(value, request)
    inverse = 1.0 / (1.0 + e)
    e *= inverse
    positive = z > 0.0
    grad = no * np.where(positive, inverse, e)
    grad -= t * np.where(positive, e, inverse)
    if count > 1:
        grad /= count
    return _cast((value, grad), request)


def _cast(answer: Any, request: Request) -> Any:
    value, *grad = answer if type(answer) is tuple else (answer,)
    value = np.asarray(value, request.answer_dtype)
    return (value, *grad) if grad else value
