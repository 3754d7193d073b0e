"""A checked call: all that may decide which path it takes, and all that a kernel needs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from portable_softmax import _checks, portable
from portable_softmax._typing import Namespace
from portable_softmax.libraries import Library, dtype_name

ROWS = ("softmax", "log_softmax", "logsumexp")
VJPS = ("softmax_vjp", "log_softmax_vjp")
LOSSES = ("cross_entropy", "cross_entropy_value_and_grad")
OPERATIONS = (*ROWS, *VJPS, *LOSSES)
SPARSE = ("entmax", "sparsemax", "entmax_vjp")
ENTMAX_LOSSES = ("entmax_loss", "entmax_loss_value_and_grad")
RUNNING = ("logcumsumexp", "logcumsumexp_vjp")
ENTROPIES = ("entropy", "entropy_value_and_grad")
DIVERGENCES = ("kl_divergence", "kl_divergence_value_and_grad")
BY_Q = "kl_divergence_by_q"  # with the gradient by the second array alone
BINARY = ("sigmoid_cross_entropy", "sigmoid_cross_entropy_value_and_grad")  # entry by entry
FAMILY = (
    *SPARSE,
    *ENTMAX_LOSSES,
    *ENTROPIES,
    *DIVERGENCES,
    "logmeanexp",
    *RUNNING,
)
FOLD = "fold"  # whose answer is the pair (max, rest) of x / temperature, `max` not divided yet
LOGSUMEXP_VJP = "logsumexp_vjp"
WITH_SLOPES = "logsumexp_value_and_grad"
PARTS = (FOLD, LOGSUMEXP_VJP)  # what is asked of parts of rows
# With a sink: the answer and the share of the sink, and the gradient with the sum that it has.
BESIDE_SINKS = tuple(f"{name}_beside_sink" for name in (*ROWS[:2], *VJPS))
# Of a logsumexp with weights: its sums, and the gradient by exponents, or by both.
WEIGHTED = ("weighted_sums", "weighted_slopes", "weighted_slopes_by_both")
SIGNED = "signed_logsumexp"  # of weighted terms, its sign beside it
LINEAR = ("linear_cross_entropy", "linear_cross_entropy_value_and_grad")

INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))


class RowOptions(NamedTuple):
    """The options of softmax, log_softmax and logsumexp, with their neutral values."""

    where: Any = None  # bool, broadcasts to x
    temperature: float = 1.0
    b: Any = None
    return_sign: bool = False
    dtype: Any = None  # of the answer, where that is not the usual one
    sink: Any = None  # a number, or an array that broadcasts to what a reduction of x leaves


LossOptions = portable.Options
SigmoidOptions = portable.SigmoidOptions


class EntmaxOptions(NamedTuple):
    """The options of entmax and its relatives, with their neutral values; no call has the last."""

    alpha: float = 1.5
    dtype: Any = None


class EntmaxLossOptions(NamedTuple):
    """The options of entmax_loss, with their neutral values; the last two are those of no call."""

    alpha: float = 1.5
    ignore_index: int | None = None
    reduction: str = "mean"
    sample_weight: Any = None
    dtype: Any = None
    weight: Any = None
    where: Any = None


class DivergenceOptions(NamedTuple):
    """The options of kl_divergence, with their neutral values."""

    temperature: float = 1.0
    distillation: bool = False
    reduction: str = "mean"
    dtype: Any = None


class LinearOptions(NamedTuple):
    """The arrays and options of a linear layer with a loss, of which `x` is the hidden array."""

    classifier: Any
    bias: Any
    loss: LossOptions
    elements: float  # of a tile of logits

    @property
    def dtype(self) -> Any:
        """The dtype of the loss, where that is not the usual one."""
        return self.loss.dtype


PLAIN_ROWS = RowOptions()
PLAIN_LOSS = LossOptions()
PLAIN_ENTMAX = EntmaxOptions()
PLAIN_ENTMAX_LOSS = EntmaxLossOptions()
PLAIN_DIVERGENCE = DivergenceOptions()
PLAIN_SIGMOID = SigmoidOptions()
NONE_GIVEN: tuple[str, ...] = ()

# Beside the options' own names, what a kernel may not take although it takes the option.
PROBABILITIES = "probabilities"  # labels that are no indices
EXTREME = "extreme temperature"  # one that the compute dtype, or its inverse, does not hold well
COMPLEX = "complex weights"  # beside real logits
OTHER_DTYPE = "dtype other than the computation's"
OUT = "out"  # not among the active options, but of a request that has it


def active(options: Any, neutral: Any) -> tuple[str, ...]:
    """Return the names of the options whose values are not neutral."""
    return tuple(
        [
            name
            for name, value, none in zip(options._fields, options, neutral, strict=True)
            if type(value) is not type(none) or value != none
        ]
    )


def is_extreme(library: Library, temperature: float, dtype: Any) -> bool:
    """Return whether a temperature, or its inverse, is near the ends of a dtype's range."""
    most = portable.ordinary(library.xp, dtype)
    return library.is_known(temperature) and not 2.0**-most <= temperature <= 2.0**most


def _flat(xp: Namespace, where: Any, hidden: Any) -> Any:
    """Return a mask with its positions in one axis; of one row if it is the same everywhere."""
    *batch, n = where.shape
    if all(length == 1 for length in batch):
        return xp.reshape(where, (1, n))
    positions = tuple(hidden.shape[:-1])
    if any(length is None for length in positions):
        where = xp.broadcast_arrays(where, hidden[..., :1])[0]
    else:
        where = xp.broadcast_to(where, (*positions, n))
    return xp.reshape(where, (_product(positions), n))


def _product(lengths: tuple[Any, ...]) -> int:
    """Return the product of lengths, -1 where one is unknown: nan in chunks, None in a graph."""
    return -1 if any(n is None or n != n for n in lengths) else math.prod(lengths)


def answered_in(library: Library, dtype: Any, compute: Any, result: Any) -> tuple[Any, Any, Any]:
    """Return what a call with `dtype` computes in, the option, and what kernels must declare.

    It is computed in the wider of `dtype` and what would be computed in without it.
    """
    if dtype == result:
        return compute, None, NONE_GIVEN
    if dtype == compute:
        return compute, dtype, NONE_GIVEN
    xp = library.xp
    wider = library.dtype(dtype).kind == "real" and xp.finfo(dtype).bits > xp.finfo(compute).bits
    return (dtype if wider else compute), dtype, (OTHER_DTYPE,)


def loss_dtype(
    library: Library, logits: Any, dtype: Any, compute_dtype: Any, result_dtype: Any
) -> tuple[Any, Any, Any]:
    """Return what `answered_in` does for the dtype of a loss; a library may have a rule for it."""
    if dtype is not None:
        dtype = _checks.answer_dtype(dtype, library)
    elif library.dtype(result_dtype).kind == "half":
        dtype = library.loss_dtype(logits)
    if dtype is None:
        return compute_dtype, None, NONE_GIVEN
    return answered_in(library, dtype, compute_dtype, result_dtype)


class Layout(NamedTuple):
    """An array's shape with the reduced axes, which are neighbours, taken together."""

    outer: int
    n: int
    inner: int

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.outer * self.inner


class Request(NamedTuple):
    """A call of one operation, its arguments checked and its axes non-negative.

    A kernel's function takes one and returns the answer in its property `answer_dtype`. Every
    operation sets the fields up to `active`, the others where they are named.

    Parameters
    ----------
    operation
        The name of the public function.
    library
        What differs between libraries, an instance of the class of the arrays' library.
    x
        The first array: logits, the hidden array of ``linear_cross_entropy``, or the output that a
        vector-Jacobian product starts from.
    dtype
        The name of the dtype of `x`.
    axes
        The reduced axes; one for the losses, none for ``sigmoid_cross_entropy``.
    compute_dtype
        What is computed in.
    result_dtype
        The dtype of the answer where no option names another, and of gradients.
    tracing
        What follows or replaces the values of the arrays, such as ``"torch.compile"``, or empty.
    options
        The options, a named tuple of the operation's own; that of ``linear_cross_entropy`` holds
        the classifier and the bias as well.
    active
        The names of the options that are not neutral. ``"probabilities"`` is among them where the
        labels are a distribution, and a few more say what of an option a kernel may not take.
    dy
        For vector-Jacobian products the upstream gradient, for ``kl_divergence`` the second array.
    labels
        For losses: class indices, or an array of the shape of the logits.
    indices
        For losses, whether `labels` are class indices.
    check_labels
        For losses of class indices, whether to raise for one out of range.
    out
        Where the answer of softmax, log_softmax and their gradients goes, and the gradient of
        ``cross_entropy_value_and_grad``, or None. A kernel that takes it returns it, or a new
        array. `x` or `dy` may lie in it, entry by entry, and nothing else that is given.

    Examples
    --------
    The kernel of a library whose arrays NumPy can read:

    >>> import numpy as np
    >>> from portable_softmax import softmax as of_numpy
    >>> from portable_softmax.kernels import Request
    >>> def softmax(request: Request):
    ...     y = of_numpy(np.from_dlpack(request.x), axis=request.axes)
    ...     return request.xp.asarray(y)

    """

    operation: str
    library: Library
    x: Any
    dtype: str
    axes: tuple[int, ...]
    compute_dtype: Any
    result_dtype: Any
    tracing: str = ""
    options: Any = PLAIN_ROWS
    active: tuple[str, ...] = NONE_GIVEN
    dy: Any = None
    labels: Any = None
    indices: bool = True
    check_labels: bool = True
    out: Any = None

    @property
    def xp(self) -> Namespace:
        """The namespace of the arrays."""
        return self.library.xp

    @property
    def answer_dtype(self) -> Any:
        """The dtype of the answer; gradients keep `result_dtype`."""
        dtype = self.options.dtype
        return self.result_dtype if dtype is None else dtype

    @property
    def rounding(self) -> float:
        """What rounding to the dtype of `x` may have changed in it, relative to it."""
        name = dtype_name(self.x.dtype)  # in whatever byte order
        return portable.ROUNDING.get(name, 0.0)

    @property
    def off_one(self) -> float:
        """How far from 1 the sum of a softmax `x` may be."""
        return portable.off_one(float(self.xp.finfo(self.compute_dtype).eps), self.rounding)

    @property
    def axis(self) -> int:
        """The class axis of a loss."""
        return self.axes[0]

    def on(self, x: Any, dy: Any, labels: Any, options: Any, operation: str = "") -> Request:
        """Return the same on other arrays, their labels known to be good.

        `_replace` takes three times as long, which counts beside a small array.
        """
        return Request(
            operation or self.operation, self.library, x, self.dtype, self.axes,
            self.compute_dtype, self.result_dtype, self.tracing, options, self.active, dy, labels,
            self.indices, False,
        )  # fmt: skip

    def in_place(self) -> bool:
        """Return whether `out` shares memory with `x` or `dy`."""
        shares, out = self.library.may_share_memory, self.out
        return out is not None and any(a is not None and shares(out, a) for a in (self.x, self.dy))

    def overlaps(self) -> bool:
        """Return whether `out` may share memory with an array whose other entries are read."""
        library, out = self.library, self.out
        own = [a for a in (self.x, self.dy) if a is not None and not library.same_entries(out, a)]
        others = [a for a in (self.labels, *self.options) if hasattr(a, "ndim")]
        return any(library.may_share_memory(out, a) for a in (*own, *others))

    def layout(self) -> Layout | None:
        """Return how `x` is folded, None where the reduced axes are no neighbours."""
        axes, shape = self.axes, self.x.shape
        first, last = min(axes), max(axes)
        if last - first + 1 != len(axes):
            return None
        return Layout(
            math.prod(shape[:first]),
            math.prod(shape[first : last + 1]),
            math.prod(shape[last + 1 :]),
        )

    def reduced_shape(self) -> list[int]:
        """Return the shape of `x` with the reduced axes kept with length 1."""
        return [1 if a in self.axes else n for a, n in enumerate(self.x.shape)]

    def linear(self) -> portable.Linear:
        """Return a linear layer with a loss, its positions in one axis."""
        classifier, bias, options, _ = self.options
        hidden, labels, where, sample = self.x, self.labels, options.where, options.sample_weight
        if where is not None and where.ndim > 1:
            where = _flat(self.xp, where, hidden)
        if hidden.ndim != 2:
            n = _product(hidden.shape[:-1])
            hidden = self.xp.reshape(hidden, (n, hidden.shape[-1]))
            shape = (n,) if self.indices else (n, labels.shape[-1])
            labels = self.xp.reshape(labels, shape)
            sample = None if sample is None else self.xp.reshape(sample, (n,))
        options = options._replace(where=where, sample_weight=sample)
        return portable.Linear(
            hidden, classifier, bias, labels, self.indices, options, self.compute_dtype
        )

    def check_labels_of_linear(self, problem: portable.Linear) -> None:
        """Raise for a label of a linear layer that has no class, where it can be read."""
        library, labels = self.library, self.labels
        if not (self.indices and self.check_labels and library.reads_values(labels)):
            return
        target = library.compiled(portable.label_target)(self.xp, problem)
        if library.reads_values(target.valid):
            valid = self.xp.reshape(target.valid, (*labels.shape, 1))
            where, n = problem.options.where, problem.classes
            _checks.label_values(self.xp, labels, valid, labels.ndim, n, where)

    def target(self) -> portable.Target:
        """Return what the labels ask for; raise for one without a class where it can be read.

        With `check_labels` off, and where labels cannot be read, such a position is nan.
        """
        library, options = self.library, self.options
        if not self.indices:
            t = library.cast(self.labels, self.compute_dtype)
            return portable.distribution_target(t, self.axis, options)
        target: portable.Target = library.compiled(portable.index_target)(
            self.xp, self.x, self.labels, self.axis, options, self.compute_dtype
        )
        # Under tracing even a constant becomes a traced array once it is computed with.
        if self.check_labels and library.reads_values(target.valid):
            n = self.x.shape[self.axis]
            _checks.label_values(self.xp, self.labels, target.valid, self.axis, n, options.where)
            target = target._replace(valid=None)
        return target
