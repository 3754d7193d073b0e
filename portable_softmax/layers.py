"""Layers with a forward and a backward pass, as a network written by hand uses them.

Each keeps ``params`` and ``grads``, two empty lists: a softmax has nothing to learn, and a
network collects both from all of its layers alike.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any, Generic, final

from portable_softmax import _checks, libraries, portable
from portable_softmax._cross_entropy import LOSS_OPTIONS, cross_entropy_value_and_grad
from portable_softmax._softmax import log_softmax, softmax
from portable_softmax._typing import Array, ArrayT, Axis
from portable_softmax._vjps import log_softmax_vjp, softmax_vjp
from portable_softmax.libraries import Library

__all__ = ["LogSoftmax", "Softmax", "SoftmaxWithLoss"]


def _no_forward(layer: object) -> RuntimeError:
    name = type(layer).__name__
    return RuntimeError(
        f"{name}.backward was called before forward: call {name}.forward(...) first"
    )


@final
class Softmax(Generic[ArrayT]):
    """A softmax with its backward pass.

    ``forward(a)`` returns y = softmax(a), of the shape of `a`; ``backward(dout)``, for a gradient
    `dout` of the same shape, returns ``y * (dout - sum(y*dout))``.

    Parameters
    ----------
    axis
        An int, a tuple of ints, or None for all axes.

    Attributes
    ----------
    params, grads
        Empty lists.
    out
        y, or None before the first forward pass.

    Raises
    ------
    RuntimeError
        If `backward` is called before `forward`.
    TypeError, ValueError
        As `portable_softmax.softmax` and `portable_softmax.softmax_vjp`.

    See Also
    --------
    portable_softmax.softmax : the function, with all options.
    SoftmaxWithLoss : with the cross-entropy behind it, which keeps more digits than two layers.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import Softmax
    >>> layer = Softmax()
    >>> layer.forward(np.asarray([[0.0, 0.0]]))
    array([[0.5, 0.5]])
    >>> layer.backward(np.asarray([[1.0, 0.0]]))
    array([[ 0.25, -0.25]])
    """

    def __init__(self, axis: Axis = -1) -> None:
        self.axis = axis
        self.params: list[Any] = []
        self.grads: list[Any] = []
        self.out: ArrayT | None = None

    def forward(self, a: ArrayT) -> ArrayT:
        """Return softmax(a) and keep it for the backward pass."""
        self.out = softmax(a, axis=self.axis)
        return self.out

    def backward(self, dout: ArrayT) -> ArrayT:
        """Return the gradient with respect to `a`, for the gradient `dout` of the output."""
        if self.out is None:
            raise _no_forward(self)
        return softmax_vjp(self.out, dout, axis=self.axis)


@final
class LogSoftmax(Generic[ArrayT]):
    """A log_softmax with its backward pass.

    ``forward(a)`` returns log_y = log_softmax(a), of the shape of `a`; ``backward(dout)``, for a
    gradient `dout` of the same shape, returns ``dout - exp(log_y) * sum(dout)``.

    Parameters
    ----------
    axis
        An int, a tuple of ints, or None for all axes.

    Attributes
    ----------
    params, grads
        Empty lists.
    out
        log_y, or None before the first forward pass.

    Raises
    ------
    RuntimeError
        If `backward` is called before `forward`.
    TypeError, ValueError
        As `portable_softmax.log_softmax` and `portable_softmax.log_softmax_vjp`.

    See Also
    --------
    portable_softmax.log_softmax : the function, with all options.
    SoftmaxWithLoss : with the cross-entropy behind it.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import LogSoftmax
    >>> layer = LogSoftmax()
    >>> layer.forward(np.asarray([[0.0, 0.0]])).round(6)
    array([[-0.693147, -0.693147]])
    >>> layer.backward(np.asarray([[1.0, 0.0]]))
    array([[ 0.5, -0.5]])
    """

    def __init__(self, axis: Axis = -1) -> None:
        self.axis = axis
        self.params: list[Any] = []
        self.grads: list[Any] = []
        self.out: ArrayT | None = None

    def forward(self, a: ArrayT) -> ArrayT:
        """Return log_softmax(a) and keep it for the backward pass."""
        self.out = log_softmax(a, axis=self.axis)
        return self.out

    def backward(self, dout: ArrayT) -> ArrayT:
        """Return the gradient with respect to `a`, for the gradient `dout` of the output."""
        if self.out is None:
            raise _no_forward(self)
        return log_softmax_vjp(self.out, dout, axis=self.axis)


@final
class SoftmaxWithLoss(Generic[ArrayT]):
    """A softmax and its cross-entropy in one, whose gradient is (y - t) / batch.

    ``forward(x, t)`` returns `portable_softmax.cross_entropy` of the logits x and labels t, which
    are class indices or of the shape of x: 0-d, or one loss for each position with
    ``reduction="none"``. ``backward(dout)`` returns its gradient with respect to x, times `dout`,
    of the shape of x; `dout` is 1, another number, or an array of the shape of the loss.

    Parameters
    ----------
    **options
        Those of `portable_softmax.cross_entropy`: axis, weight, reduction, and so on.

    Attributes
    ----------
    params, grads
        Empty lists.
    y
        The probabilities softmax(x), or None before the first forward pass.
    t
        The labels, or None before the first forward pass.

    Raises
    ------
    RuntimeError
        If `backward` is called before `forward`.
    TypeError
        If an option is unknown, and as `portable_softmax.cross_entropy`.
    ValueError, IndexError
        As `portable_softmax.cross_entropy`.

    See Also
    --------
    portable_softmax.cross_entropy_value_and_grad : both passes as one function.

    Examples
    --------
    >>> import numpy as np
    >>> from portable_softmax import SoftmaxWithLoss
    >>> layer = SoftmaxWithLoss()
    >>> print(layer.forward(np.asarray([[0.0, 0.0], [0.0, 0.0]]), np.asarray([0, 1])).round(6))
    0.693147
    >>> layer.backward()
    array([[-0.25,  0.25],
           [ 0.25, -0.25]])
    """

    def __init__(self, **options: Any) -> None:
        if unknown := sorted(options.keys() - set(LOSS_OPTIONS)):
            raise TypeError(
                f"SoftmaxWithLoss got {unknown[0]!r}, expected options of cross_entropy: "
                f"{', '.join(LOSS_OPTIONS)}"
            )
        self.options = options
        self.params: list[Any] = []
        self.grads: list[Any] = []
        self.t: Array | None = None
        self._y: Callable[[], ArrayT] | None = None
        self._dx: ArrayT | None = None
        self._loss_shape: tuple[int, ...] = ()
        self._axis = 0
        self._masks: tuple[Any, ...] = ()

    @property
    def y(self) -> ArrayT | None:
        """The probabilities softmax(x), or None before the first forward pass.

        Neither the loss nor the gradient needs them: they are computed each time they are read,
        from x as it is then.
        """
        return None if self._y is None else self._y()

    def forward(self, x: ArrayT, t: Array) -> ArrayT:
        """Return the loss of the logits `x` for the labels `t`, keeping what backward needs."""
        loss: ArrayT
        options = self.options
        loss, self._dx = cross_entropy_value_and_grad(x, t, **options)
        self._loss_shape = loss.shape
        self._axis = axis = _checks.one_axis(options.get("axis", -1), x.ndim)
        where = options.get("where")
        self._y = partial(_probabilities, x, axis, where, options.get("softcap"))
        self.t = t
        counted = portable.counted_positions(
            libraries.library_of(x).xp, t, options.get("ignore_index"), options.get("sample_weight")
        )
        if counted is not None:
            counted = portable.with_class_axis(counted, axis)
        self._masks = tuple(mask for mask in (where, counted) if mask is not None)
        return loss

    def backward(self, dout: Any = 1) -> ArrayT:
        """Return the gradient with respect to the logits.

        Parameters
        ----------
        dout
            Gradient of whatever follows with respect to the loss: a number, or an array of the
            loss's shape.
        """
        if self._dx is None:
            raise _no_forward(self)
        dx: Any = self._dx
        library = libraries.library_of(dx)
        if isinstance(dout, Real):
            dout = _checks.real("dout", dout)
        else:
            _checks.array("dout", dout)
            _checks.companion("dout", dout, "logits", dx, library)
            _checks.upstream(dout, self._loss_shape)
            if dout.ndim:  # one for each position, with reduction="none"
                dout = portable.with_class_axis(dout, self._axis)
        answered: ArrayT = library.quietly(_times, library, dx, dout, self._masks)
        return answered


def _times(library: Library, dx: Any, dout: Any, masks: tuple[Any, ...]) -> Any:
    """Return a gradient times a number or an array, and 0 where a mask is False."""
    compute_dtype, result_dtype = library.compute_dtype(dx)
    if isinstance(dout, Real):
        dout = library.xp.asarray(dout, dtype=compute_dtype, device=library.device(dx))
    dx = library.cast(dx, compute_dtype) * library.cast(dout, compute_dtype)
    for mask in masks:  # dout may be infinite, and 0 * inf is nan
        dx = library.xp.where(mask, dx, library.scalar(0.0, dx))
    return library.cast(dx, result_dtype)


def _probabilities(x: Any, axis: int, where: Any, softcap: Any) -> Any:
    if softcap is None:
        return softmax(x, axis=axis, where=where)
    library = libraries.library_of(x)
    compute_dtype, result_dtype = library.compute_dtype(x)
    x = library.cast(x, compute_dtype)
    capped = library.quietly(portable.softcapped, library.xp, x, float(softcap))
    return softmax(capped, axis=axis, where=where, dtype=result_dtype)
