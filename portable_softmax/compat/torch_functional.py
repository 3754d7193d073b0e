"""Functions with the arguments of `torch.nn.functional`, and `logsumexp` of torch.

The classes are in axis 1, labels of -100 are ignored, and a `dim` that is left out is chosen as
torch does, with its warning. torch is not imported: arrays may be of any library, and `dtype` is
then one of theirs. What differs on purpose: a label out of range raises IndexError where it can be
read; integers are taken as logits, and in the shape of the logits as a distribution; an ignored
row has the gradient 0, whatever it holds; nothing is rounded to `dtype` before it is computed.
Messages call `input` logits and `target` labels.
"""

from __future__ import annotations

import warnings
from typing import Any

from portable_softmax import _checks, _cross_entropy, _softmax, portable
from portable_softmax._typing import Array, ArrayT
from portable_softmax.kernels._request import LossOptions, Request

__all__ = ["cross_entropy", "log_softmax", "logsumexp", "nll_loss", "softmax", "softmin"]


def softmax(
    input: ArrayT, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> ArrayT:
    """Return the softmax along `dim`.

    The arguments are those of ``torch.nn.functional.softmax``, the answer is that of
    `portable_softmax.softmax`.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax.compat import torch_functional as F
    >>> F.softmax(np.zeros((2, 2)), dim=0)
    array([[0.5, 0.5],
           [0.5, 0.5]])
    """
    return _softmax.softmax(input, axis=_axis("softmax", input, dim, _stacklevel), dtype=dtype)


def log_softmax(
    input: ArrayT, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> ArrayT:
    """Return the logarithm of the softmax along `dim`.

    The arguments are those of ``torch.nn.functional.log_softmax``, the answer is that of
    `portable_softmax.log_softmax`.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax.compat import torch_functional as F
    >>> print(F.log_softmax(np.asarray([30.0, 0.0, 0.0]), dim=0)[0])
    -1.8715245937...e-13
    """
    return _softmax.log_softmax(
        input, axis=_axis("log_softmax", input, dim, _stacklevel), dtype=dtype
    )


def softmin(
    input: ArrayT, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> ArrayT:
    """Return the softmax of ``-input`` along `dim`.

    The arguments are those of ``torch.nn.functional.softmin``, the answer is that of
    `portable_softmax.softmax`.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax.compat import torch_functional as F
    >>> F.softmin(np.asarray([0.0, 1000.0]), dim=0)
    array([1., 0.])
    """
    library, found = _checks.array("input", input)
    if found.kind == "integer":  # whose smallest number has no negative
        input = library.cast(input, library.default_float(input))
    x: ArrayT = -input
    return _softmax.softmax(x, axis=_axis("softmin", input, dim, _stacklevel), dtype=dtype)


def logsumexp(input: Any, dim: Any, keepdim: bool = False) -> Any:
    """Return the logarithm of a sum of exponentials along `dim`.

    The arguments are those of ``torch.logsumexp`` without `out`, the answer is that of
    `portable_softmax.logsumexp`.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax.compat import torch_functional as F
    >>> F.logsumexp(np.asarray([[1000.0, 1000.0]]), 1, keepdim=True)
    array([[1000.69314718]])
    """
    _checks.array("input", input, complex_too=True)
    axis = tuple(dim) if isinstance(dim, list) else dim
    return _softmax.logsumexp(input, axis=_of_scalar(input, axis), keepdims=keepdim)


def cross_entropy(
    input: ArrayT,
    target: Array,
    weight: Array | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> ArrayT:
    """Return the cross-entropy of logits whose classes are in axis 1.

    The arguments are those of ``torch.nn.functional.cross_entropy``, the answer is that of
    `portable_softmax.cross_entropy`.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax.compat import torch_functional as F
    >>> print(F.cross_entropy(np.asarray([[30.0, 0.0, 0.0]] * 2), np.asarray([0, -100])))
    1.8715245937...e-13
    """
    _checks.array("input", input)
    ignored = _checks.ignore_index(ignore_index, True)
    if ignored is not None and ignored < 0 and getattr(target, "ndim", None) == input.ndim:
        ignored = None  # the default says nothing of a distribution
    return _cross_entropy.cross_entropy(
        input,
        target,
        axis=_class_axis(input),
        weight=weight,
        ignore_index=ignored,
        label_smoothing=label_smoothing,
        reduction=_reduction(size_average, reduce, reduction),
    )


def nll_loss(
    input: ArrayT,
    target: Array,
    weight: Array | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> ArrayT:
    """Return minus the log-probabilities of the labels; the classes are in axis 1.

    The arguments are those of ``torch.nn.functional.nll_loss``. Labels, weights and the mean are
    those of `portable_softmax.cross_entropy`, which takes the logits instead and keeps more digits.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax.compat import torch_functional as F
    >>> print(F.nll_loss(np.log([[0.25, 0.75], [0.5, 0.5]]), np.asarray([0, 1]), reduction="sum"))
    2.0794415416798357
    """
    library, found = _checks.array("input", input)
    _checks.companion("target", target, "input", input, library)
    axis = _checks.one_axis(_class_axis(input), input.ndim)
    if not _checks.labels_are_indices(input, target, axis, library):
        raise ValueError(
            f"target has the shape {tuple(target.shape)} of input, expected class indices, one "
            f"for each position: leave axis {axis} out, or call cross_entropy with logits"
        )
    compute_dtype, result_dtype = library.compute_dtype(input)
    if weight is not None:
        _checks.companion("weight", weight, "input", input, library)
        _checks.class_weight(weight, input, axis, library)
        weight = library.quietly(library.cast, weight, compute_dtype)
    options = LossOptions(
        weight=weight,
        ignore_index=_checks.ignore_index(ignore_index, True),
        reduction=_checks.reduction(_reduction(size_average, reduce, reduction)),
    )
    request = Request(
        "nll_loss", library, input, found.name, (axis,), compute_dtype, result_dtype,
        options=options, labels=target,
    )  # fmt: skip
    answer: ArrayT = library.scalar_if_0d(library.quietly(_nll_loss, request))
    return answer


def _nll_loss(request: Request) -> Any:
    library = request.library
    log_y = library.cast(request.x, request.compute_dtype)
    loss = library.compiled(portable.nll_loss)(
        library.xp, log_y, request.target(), request.axis, request.options
    )
    return library.cast(loss, request.result_dtype)


def _axis(name: str, input: Any, dim: int | None, stacklevel: int) -> int | None:
    """Return `dim`, or the one that torch chooses where none is named."""
    _checks.array("input", input)
    if dim is None:
        warnings.warn(
            f"Implicit dimension choice for {name} has been deprecated. "
            "Change the call to include dim=X as an argument.",
            stacklevel=stacklevel,
        )
        dim = 0 if input.ndim in (0, 1, 3) else 1
    axis: int | None = _of_scalar(input, dim)
    return axis


def _of_scalar(input: Any, dim: Any) -> Any:
    """Return `dim`, or None for the one axis that torch lets an array of no axis have."""
    return None if input.ndim == 0 and dim in (0, -1) else dim


def _class_axis(input: Any) -> int:
    return 1 if input.ndim > 1 else 0


def _reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """Return the reduction, out of the two arguments that came before it as well."""
    if size_average is None and reduce is None:
        return reduction
    reduction = "sum" if size_average is False else "mean"
    if reduce is False:
        reduction = "none"
    warnings.warn(
        "size_average and reduce args will be deprecated, please use "
        f"reduction='{reduction}' instead.",
        stacklevel=3,
    )
    return reduction
