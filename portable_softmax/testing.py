"""What the author of an array library runs, to see whether this package answers rightly on it.

`check_library` needs NumPy and the library alone. The exact answers are computed by `math`, in the
closed forms of the docstrings, and share no code with the package.

>>> import numpy as np
>>> from portable_softmax.testing import check_library
>>> print(check_library(np))
numpy: right. 106 cases passed, 0 failed, 0 skipped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from portable_softmax import libraries, online
from portable_softmax._cross_entropy import cross_entropy, cross_entropy_value_and_grad
from portable_softmax._entmax import entmax, entmax_vjp, sparsemax
from portable_softmax._entmax_loss import entmax_loss, entmax_loss_value_and_grad
from portable_softmax._entropy import (
    entropy,
    entropy_value_and_grad,
    kl_divergence,
    kl_divergence_value_and_grad,
)
from portable_softmax._linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_value_and_grad,
)
from portable_softmax._logsums import logcumsumexp, logcumsumexp_vjp, logmeanexp
from portable_softmax._sigmoid_cross_entropy import (
    sigmoid_cross_entropy,
    sigmoid_cross_entropy_value_and_grad,
)
from portable_softmax._softmax import log_softmax, logsumexp, softmax
from portable_softmax._typing import Namespace
from portable_softmax._vjps import log_softmax_vjp, softmax_jacobian, softmax_vjp

__all__ = ["Failure", "Report", "Skip", "check_library"]

INF, NAN = math.inf, math.nan

# --- The report ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """A case that went wrong."""

    case: str
    expected: str
    got: str

    def __str__(self) -> str:
        """Return what a report prints."""
        return f"{self.case}\n    expected {self.expected}\n    got      {self.got}"


@dataclass(frozen=True)
class Skip:
    """A case that was left out."""

    case: str
    reason: str

    def __str__(self) -> str:
        """Return what a report prints."""
        return f"{self.case}: {self.reason}"


@dataclass(frozen=True)
class Report:
    """What `check_library` found. Printed, it lists what failed and what was skipped."""

    library: str
    passed: tuple[str, ...]
    failed: tuple[Failure, ...]
    skipped: tuple[Skip, ...]

    @property
    def ok(self) -> bool:
        """Whether something passed and nothing failed."""
        return bool(self.passed) and not self.failed

    def __str__(self) -> str:
        """Return one line, and one each for what failed or was skipped."""
        counts = ", ".join(
            f"{len(found)} {name}"
            for name, found in (
                ("cases passed", self.passed),
                ("failed", self.failed),
                ("skipped", self.skipped),
            )
        )
        lines = [f"{self.library}: {'right' if self.ok else 'WRONG'}. {counts}."]
        lines += [f"failed: {one}" for one in self.failed]
        lines += [f"skipped: {one}" for one in self.skipped]
        return "\n".join(lines)


def check_library(
    xp: Namespace,
    /,
    *,
    asarray: Callable[[np.ndarray], Any] | None = None,
    to_numpy: Callable[[Any], np.ndarray] | None = None,
    skip: Mapping[str, str] | None = None,
) -> Report:
    """Return a report on whether this package answers rightly on a library.

    Exact values of every public function and of most options, in float32 and float64, and what
    empty arrays, infinities, nan, masks and wrong arguments give. Beside the values, the type,
    dtype and shape of each answer are compared, and the inputs must be unchanged.

    Parameters
    ----------
    xp : namespace
        The library, such as ``array_api_strict`` or ``jax.numpy``.
    asarray : callable, optional
        Makes an array of the library from one of NumPy, of the same dtype. By default
        ``xp.asarray`` of nested lists.
    to_numpy : callable, optional
        Makes an array of NumPy from one of the library. By default by DLPack, or ``numpy.asarray``.
    skip : dict of str to str, optional
        Cases that are left out, by their names in the report, and why.

    Returns
    -------
    Report
        Its ``ok`` says whether all is right; ``passed``, ``failed`` and ``skipped`` hold the cases.

    Raises
    ------
    ValueError
        If `skip` names no case.

    Examples
    --------
    >>> import array_api_strict
    >>> from portable_softmax.testing import check_library
    >>> report = check_library(array_api_strict)
    >>> report.ok
    True
    """
    skip = dict(skip or {})
    every = [(f"{name}, {dtype}", case, dtype) for dtype in RTOL for name, case in CASES.items()]
    if unknown := skip.keys() - {name for name, *_ in every}:
        raise ValueError(f"skip names no case: {', '.join(sorted(unknown))}; names are as reported")
    passed, failed, skipped = [], [], []
    for name, case, dtype in every:
        arrays = Arrays(xp, dtype, asarray, to_numpy)
        if reason := skip.get(name) or arrays.missing():
            skipped.append(Skip(name, reason))
        elif failure := _failure(name, case, arrays):
            failed.append(failure)
        else:
            passed.append(name)
    return Report(getattr(xp, "__name__", repr(xp)), tuple(passed), tuple(failed), tuple(skipped))


# --- Arrays of the library ----------------------------------------------------------------------

# What an answer may be off by, relatively: 8 units in the last place of float32.
RTOL = {"float64": 1e-14, "float32": 8 * 2.0**-23}


class Arrays:
    """Makes arrays of the library in one dtype, and compares answers with what is expected."""

    def __init__(self, xp: Namespace, dtype: str, asarray: Any, to_numpy: Any) -> None:
        self.xp, self.dtype = xp, dtype
        self._asarray, self._to_numpy = asarray, to_numpy
        self._given: list[tuple[Any, np.ndarray]] = []

    def __call__(self, values: Any, dtype: str | None = None) -> Any:
        """Return an array of the library; it must be the same when the case is over."""
        array = np.asarray(values, dtype or self.dtype)
        made = self._make(array)
        self._given.append((made, array))
        return made

    def _make(self, array: np.ndarray) -> Any:
        if self._asarray is not None:
            return self._asarray(array)
        dtype = getattr(self.xp, array.dtype.name)
        if not array.size:
            return self.xp.zeros(array.shape, dtype=dtype)
        return self.xp.asarray(array.tolist(), dtype=dtype)

    def missing(self) -> str:
        """Return why there are no arrays of this dtype; empty where there are."""
        try:
            found = libraries.dtype_name(self._make(np.ones(1, self.dtype)).dtype)
        except AttributeError as error:
            return f"no {self.dtype}: {error}"
        return "" if found == self.dtype else f"{self.dtype} became {found}"

    def has(self, dtype: str) -> bool:
        """Return whether the library has a dtype, by its name."""
        return hasattr(self.xp, dtype)

    @property
    def default(self) -> str:
        """The dtype in which integers are answered."""
        some = self([0.0])
        return libraries.dtype_name(libraries.library_of(some).default_float(some))

    @property
    def tiny(self) -> float:
        """What terms below 1 that cancel may leave: less than a unit of theirs."""
        return 0.45 * float(np.finfo(self.dtype).eps)

    def numpy(self, array: Any) -> np.ndarray:
        """Return an array of the library as one of NumPy."""
        if self._to_numpy is not None:
            return np.asarray(self._to_numpy(array))
        try:
            return np.from_dlpack(array)
        except (AttributeError, TypeError, ValueError, RuntimeError, BufferError):
            return np.asarray(array)

    def reads_values(self, array: Any) -> bool:
        """Return whether labels can be looked at, and a wrong one raises."""
        return libraries.library_of(array).reads_values(array)

    def differs(self, got: Any, expected: Any) -> str:
        """Return what is expected of an answer, and "" where it is so."""
        values, named, atol = expected if isinstance(expected, Of) else Of(expected)
        wanted = named or self.dtype
        expected = np.asarray(values, wanted)
        if libraries.library_of(got).xp is not libraries.library_of(self([0.0])).xp:
            return f"an array of {self.xp.__name__}"
        if (dtype := libraries.dtype_name(got.dtype)) != wanted:
            return f"the dtype {wanted}, not {dtype}"
        if tuple(got.shape) != expected.shape:
            return f"the shape {expected.shape}, not {tuple(got.shape)}"
        rtol, atol = RTOL.get(wanted, 1e-13), max(atol, float(np.finfo(wanted).tiny))
        if np.allclose(self.numpy(got), expected, rtol=rtol, atol=atol, equal_nan=True):
            return ""
        return np.array2string(expected, separator=", ", precision=17)

    def changed(self) -> bool:
        """Return whether an input is not what it was."""
        return not all(
            np.array_equal(self.numpy(made), array, equal_nan=array.dtype.kind == "f")
            for made, array in self._given
        )


class Raises(NamedTuple):
    """Stands for an answer where an error is expected, and what its message has."""

    error: type[Exception]
    says: str = ""


class Of(NamedTuple):
    """An answer of another dtype than the case's, or one that cancels and may be off by `atol`."""

    values: Any
    dtype: str = ""
    atol: float = 0.0


Pair = tuple[Any, Any]
Case = Iterator[Pair]
CASES: dict[str, Callable[[Arrays], Case]] = {}
ANSWERS: dict[str, str] = {}
"""What is documented of a case, for the rows of docs/semantics.md."""


def _case(name: str, answer: str = "") -> Callable[[Callable[[Arrays], Case]], Any]:
    def registered(case: Callable[[Arrays], Case]) -> Callable[[Arrays], Case]:
        CASES[name] = case
        if answer:
            ANSWERS[name] = answer
        return case

    return registered


def _failure(name: str, case: Callable[[Arrays], Any], arrays: Arrays) -> Failure | None:
    """Run a case."""
    expected = "an answer"
    try:
        for got, expected_value in case(arrays):
            if isinstance(expected_value, Raises):
                expected = expected_value.error.__name__
                try:
                    answer = got()
                except expected_value.error as error:
                    if re.search(expected_value.says, str(error)):
                        continue
                    return Failure(name, f"{expected}: {expected_value.says}", str(error))
                return Failure(name, expected, str(answer))
            if difference := arrays.differs(got, expected_value):
                return Failure(name, difference, str(arrays.numpy(got)))
        if arrays.changed():
            return Failure(name, "inputs unchanged", "an input was changed")
    except Exception as error:  # whatever a library raises is what is reported
        return Failure(name, expected, f"{type(error).__name__}: {error}")
    return None


# --- Exact answers ------------------------------------------------------------------------------


def _rest(row: list[float]) -> tuple[float, float]:
    """Return the maximum, and the sum of the others' exponentials beside it."""
    top = max(row)
    others = list(row)
    others.remove(top)
    return top, math.fsum(math.exp(x - top) for x in others)


def _logsumexp(row: list[float]) -> float:
    top, rest = _rest(row)
    return top + math.log1p(rest)


def _log_softmax(row: list[float]) -> list[float]:
    top, rest = _rest(row)
    return [x - top - math.log1p(rest) for x in row]


def _softmax(row: list[float]) -> list[float]:
    top, rest = _rest(row)
    return [math.exp(x - top) / (1 + rest) for x in row]


def _slope(row: list[float], label: int) -> list[float]:
    """Return softmax - one_hot, the label's entry as minus the sum of the others."""
    y = _softmax(row)
    y[label] = -math.fsum(p for j, p in enumerate(y) if j != label)
    return y


# --- The cases ----------------------------------------------------------------------------------

# Numbers that float32 holds exactly, a confident row among them.
ROWS = [[0.5, -1.25, 2.0, 0.0], [30.0, 0.0, 0.0, -3.5], [-1024.0, -1025.5, -1024.25, -1030.0]]
LABELS = [2, 0, 1]
WEIGHT = [0.5, 2.0, 1.0, 0.25]
LOSSES = [-_log_softmax(row)[t] for row, t in zip(ROWS, LABELS, strict=True)]
SLOPES = [_slope(row, t) for row, t in zip(ROWS, LABELS, strict=True)]


@_case("softmax, log_softmax and logsumexp")
def _three(a: Arrays) -> Case:
    yield softmax(a(ROWS)), [_softmax(row) for row in ROWS]
    yield log_softmax(a(ROWS)), [_log_softmax(row) for row in ROWS]
    yield logsumexp(a(ROWS), axis=-1), [_logsumexp(row) for row in ROWS]


@_case("axes and shapes")
def _axes(a: Arrays) -> Case:
    columns = [list(column) for column in zip(*ROWS, strict=True)]
    flat = [x for row in ROWS for x in row]
    yield softmax(a(columns), axis=0), np.asarray([_softmax(row) for row in ROWS]).T
    yield logsumexp(a(columns), axis=0, keepdims=True), [[_logsumexp(row) for row in ROWS]]
    yield logsumexp(a(ROWS)), _logsumexp(flat)
    yield softmax(a(ROWS), axis=(0, 1)), np.reshape(_softmax(flat), (3, 4))
    yield log_softmax(a(2.5), axis=None), 0.0


@_case("logsumexp with b")
def _weighted_sum(a: Arrays) -> Case:
    b = [2.0, -1.0, 0.5]
    total = math.fsum(w * math.exp(x) for w, x in zip(b, (0.5, 0.0, 1.0), strict=True))
    yield logsumexp(a([0.5, 0.0, 1.0]), b=a(b)), math.log(total)


@_case("temperature, where and a sink")
def _options_of_rows(a: Arrays) -> Case:
    yield softmax(a(ROWS), temperature=2.0), [_softmax([x / 2 for x in row]) for row in ROWS]
    mask = [[True, False, True, True]] * 3
    kept = [_log_softmax([row[0], *row[2:]]) for row in ROWS]
    expected = [[row[0], -INF, *row[1:]] for row in kept]
    yield log_softmax(a(ROWS), where=a(mask, "bool")), expected
    yield softmax(a(ROWS), sink=0.5), [_softmax([*row, 0.5])[:-1] for row in ROWS]


@_case("gradients as functions")
def _gradients(a: Arrays) -> Case:
    y, dy = [0.5, 0.25, 0.125, 0.125], [1.0, -2.0, 0.5, 4.0]
    total = math.fsum(p * d for p, d in zip(y, dy, strict=True))
    yield softmax_vjp(a(y), a(dy)), [p * (d - total) for p, d in zip(y, dy, strict=True)]
    expected = [d - p * sum(dy) for p, d in zip(y, dy, strict=True)]
    yield log_softmax_vjp(a([math.log(p) for p in y]), a(dy)), expected
    yield softmax_jacobian(a(y)), np.diag(y) - np.outer(y, y)


@_case("cross_entropy and its gradient")
def _losses(a: Arrays) -> Case:
    x, t = a(ROWS), a(LABELS, "int64")
    yield cross_entropy(x, t, reduction="none"), LOSSES
    yield cross_entropy(x, t, reduction="sum"), math.fsum(LOSSES)
    yield cross_entropy(x, t), math.fsum(LOSSES) / 3
    loss, grad = cross_entropy_value_and_grad(x, t)
    yield loss, math.fsum(LOSSES) / 3
    yield grad, [[d / 3 for d in row] for row in SLOPES]


@_case("cross_entropy with a distribution")
def _distributions(a: Arrays) -> Case:
    q = [[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]
    expected = [
        -math.fsum(p * v for p, v in zip(probabilities, _log_softmax(row), strict=True))
        for probabilities, row in zip(q, ROWS, strict=True)
    ]
    yield cross_entropy(a(ROWS), a(q), reduction="none"), expected


@_case("options of cross_entropy")
def _options_of_losses(a: Arrays) -> Case:
    x, t = a(ROWS), a(LABELS, "int64")
    weights = [WEIGHT[label] for label in LABELS]
    weighted = [w * loss for w, loss in zip(weights, LOSSES, strict=True)]
    yield cross_entropy(x, t, weight=a(WEIGHT)), math.fsum(weighted) / math.fsum(weights)
    yield cross_entropy(x, t, ignore_index=0), (LOSSES[0] + LOSSES[2]) / 2
    smooth = [
        0.75 * loss - 0.0625 * math.fsum(_log_softmax(row))
        for loss, row in zip(LOSSES, ROWS, strict=True)
    ]
    yield cross_entropy(x, t, label_smoothing=0.25, reduction="none"), smooth
    squares = [loss + 0.5 * _logsumexp(row) ** 2 for loss, row in zip(LOSSES, ROWS, strict=True)]
    yield cross_entropy(x, t, z_loss=0.5, reduction="none"), squares
    capped = [[4 * math.tanh(v / 4) for v in row] for row in ROWS]
    expected = [-_log_softmax(row)[label] for row, label in zip(capped, LABELS, strict=True)]
    yield cross_entropy(x, t, softcap=4.0, reduction="none"), expected
    expected = [LOSSES[0], 0.0, 3 * LOSSES[2]]
    yield cross_entropy(x, t, sample_weight=a([1.0, 0.0, 3.0]), reduction="none"), expected


@_case("linear_cross_entropy")
def _linear(a: Arrays) -> Case:
    h, w = [[1.0, 0.5], [-2.0, 1.0]], [[0.5, 2.0], [1.0, 0.25], [-1.0, 0.0]]
    logits = (np.asarray(h) @ np.asarray(w).T).tolist()
    expected = -(_log_softmax(logits[0])[1] + _log_softmax(logits[1])[2]) / 2
    yield linear_cross_entropy(a(h), a(w), a([1, 2], "int64")), expected
    slopes = np.asarray([_slope(logits[0], 1), _slope(logits[1], 2)]) / 2
    loss, (dh, dw, _) = linear_cross_entropy_value_and_grad(a(h), a(w), a([1, 2], "int64"))
    yield loss, expected
    yield dh, slopes @ np.asarray(w)
    yield dw, slopes.T @ np.asarray(h)


@_case("online: fold and merge")
def _parts(a: Arrays) -> Case:
    parts = (online.fold(a([row[:2] for row in ROWS])), online.fold(a([row[2:] for row in ROWS])))
    yield online.logsumexp(online.merge(*parts)), [[_logsumexp(row)] for row in ROWS]


@_case("logmeanexp and logcumsumexp")
def _sums(a: Arrays) -> Case:
    yield logmeanexp(a(ROWS), axis=-1), [_logsumexp(row) - math.log(4) for row in ROWS]
    sums = [[_logsumexp(row[: i + 1]) for i in range(4)] for row in ROWS]
    yield logcumsumexp(a(ROWS)), sums
    dy = [1.0, 0.5, 2.0, 0.25]
    expected = [
        [math.fsum(dy[i] * math.exp(row[j] - sums_[i]) for i in range(j, 4)) for j in range(4)]
        for row, sums_ in zip(ROWS[:2], sums, strict=False)
    ]
    yield logcumsumexp_vjp(a(ROWS[:2]), a([dy, dy])), expected


@_case("entropy and its gradient")
def _entropies(a: Arrays) -> Case:
    logs = [_log_softmax(row) for row in ROWS]
    expected = [-math.fsum(math.exp(v) * v for v in row) for row in logs]
    yield entropy(a(ROWS)), expected
    value, grad = entropy_value_and_grad(a(ROWS[0]))
    yield value, expected[0]
    yield grad, [math.exp(v) * (-v - expected[0]) for v in logs[0]]


@_case("kl_divergence and its gradients")
def _divergences(a: Arrays) -> Case:
    x, z = [math.log(3), 0.0], [0.0, 0.0]
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    yield kl_divergence(a([x, z]), a([z, z]), reduction="none"), [expected, 0.0]
    value, (dx, dz) = kl_divergence_value_and_grad(a([x]), a([z]))
    yield value, expected
    slope = 0.75 * 0.25 * math.log(3)
    yield dx, [[slope, -slope]]
    yield dz, [[-0.25, 0.25]]


@_case("sigmoid_cross_entropy and its gradient")
def _yes_or_no(a: Arrays) -> Case:
    x, t = a([-2.0, 0.0, 0.5, 30.0]), a([1.0, 0.0, 1.0, 1.0])
    expected = [math.log1p(math.exp(v)) for v in (2.0, 0.0, -0.5, -30.0)]
    yield sigmoid_cross_entropy(x, t, reduction="none"), expected
    loss, grad = sigmoid_cross_entropy_value_and_grad(x, t, reduction="sum")
    yield loss, math.fsum(expected)
    yield grad, [-1 / (1 + math.exp(-2)), 0.5, -1 / (1 + math.exp(0.5)), -1 / (1 + math.exp(30))]


@_case("entmax, sparsemax and their loss")
def _sparse(a: Arrays) -> Case:
    yield sparsemax(a([0.5, 0.25, -1.0, 0.0])), [7 / 12, 1 / 3, 0.0, 1 / 12]
    y = [0.64, 0.36, 0.0]  # whose roots, 0.8 and 0.6, differ by half as much as the logits
    yield entmax(a([0.4, 0.0, -3.0])), y
    yield entmax_vjp(a(y), a([1.0, -2.0, 5.0])), [0.8 * 9 / 7, -0.6 * 12 / 7, 0.0]
    x, t = a([[1.0, 0.5, -1.0], [3.0, 0.0, 0.0]]), a([0, 0], "int64")
    yield entmax_loss(x, t, alpha=2.0, reduction="none"), [0.0625, 0.0]
    loss, grad = entmax_loss_value_and_grad(x, t, alpha=2.0)
    yield loss, 0.03125
    yield grad, [[-0.125, 0.125, 0.0], [0.0, 0.0, 0.0]]


# --- The cases of docs/semantics.md -------------------------------------------------------------

THIRD, TWO = 1 / 3, math.log(2)
NORMALIZED = (softmax, log_softmax)


def _no(error: type[Exception], says: str, function: Any, *given: Any, **options: Any) -> Pair:
    """Return a call that must raise."""
    return partial(function, *given, **options), Raises(error, says)


def _loss(x: Any, t: Any, loss: Any, grad: Any, **options: Any) -> Case:
    """Yield what both functions answer."""
    yield cross_entropy(x, t, **options), loss
    yield from zip(cross_entropy_value_and_grad(x, t, **options), (loss, grad), strict=True)


def _bad_label(a: Arrays, says: str, x: Any, t: Any, loss: Any, grad: Any, **options: Any) -> Case:
    """Yield the error of a label that can be looked at, and what is answered unchecked."""
    if a.reads_values(t):
        yield _no(IndexError, says, cross_entropy, x, t, **options)
        options["check_labels"] = False
    yield from _loss(x, t, loss, grad, reduction="none", **options)


@_case("reduced axis of length 0", "softmax, log_softmax: empty; logsumexp: -inf")
def _reduced_axis_of_length_0(a: Arrays) -> Case:
    x = a(np.zeros((2, 0, 3)))
    for f in NORMALIZED:
        yield f(x, axis=1), np.zeros((2, 0, 3))
    yield logsumexp(x, axis=1), np.full((2, 3), -INF)
    both = logsumexp(x, axis=1, keepdims=True, return_sign=True)
    yield from zip(both, (np.full((2, 1, 3), -INF), np.zeros((2, 1, 3))), strict=True)
    yield logsumexp(a([])), -INF


@_case("empty batch", "empty result; mean loss nan, sum 0; gradient empty")
def _empty_batch(a: Arrays) -> Case:
    nothing = np.zeros((0, 3))
    x, t = a(nothing), a([], "int64")
    for f in NORMALIZED:
        yield f(x, axis=1), nothing
    yield logsumexp(x, axis=1), []
    for reduction, expected in (("mean", NAN), ("sum", 0.0), ("none", [])):
        yield from _loss(x, t, expected, nothing, reduction=reduction)


@_case("0-d input", "axis=None works; an axis raises, as an out-of-range axis does")
def _0_d_input(a: Arrays) -> Case:
    x = a(3.0)
    yield softmax(x, axis=None), 1.0
    yield log_softmax(x, axis=None), 0.0
    yield logsumexp(x), 3.0
    yield softmax_vjp(a(1.0), a(5.0), axis=None), 0.0
    for f in (*NORMALIZED, logsumexp):
        yield _no(ValueError, "axis is 0, but the array has 0 dimensions", f, x, axis=0)
        two = a(np.zeros((2, 2)))
        yield _no(IndexError, "axis is 2, but the array has 2 dimensions", f, two, axis=2)
        yield _no(TypeError, "axis is '0', expected an int", f, x, axis="0")


@_case("axis=()", "nothing is reduced: softmax 1, log_softmax 0, logsumexp the input")
def _no_axis_at_all(a: Arrays) -> Case:
    x = [[1.0, -2.0], [3.0, 0.5]]
    yield softmax(a(x), axis=()), np.ones((2, 2))
    yield log_softmax(a(x), axis=()), np.zeros((2, 2))
    yield logsumexp(a(x), axis=()), x


@_case("class axis of length 0", "every label but ignore_index is out of range")
def _no_class_at_all(a: Arrays) -> Case:
    empty = np.zeros((2, 0))
    x, t = a(empty), a([-1, -1], "int64")
    for reduction, expected in (("mean", NAN), ("sum", 0.0), ("none", [0.0, 0.0])):
        for more in ({}, {"label_smoothing": 0.1}, {"z_loss": 0.1, "softcap": 2.0}):
            options = {"ignore_index": -1, "reduction": reduction, **more}
            yield from _loss(x, t, expected, empty, **options)
    yield from _bad_label(a, r"labels\[0\] is -1, outside \[0, 0\)", x, t, [NAN, NAN], empty)


@_case("a row of -inf only", "softmax nan, logsumexp -inf, as every peer")
def _a_row_of_minus_inf_only(a: Arrays) -> Case:
    x = a([[-INF, -INF], [0.0, 0.0], [-INF, 1.0]])
    for t in (1.0, 2.0):
        yield softmax(x, temperature=t), [[NAN, NAN], [0.5, 0.5], [0.0, 1.0]]
        yield log_softmax(x, temperature=t), [[NAN, NAN], [-TWO, -TWO], [-INF, 0.0]]
    yield logsumexp(x, axis=1), [-INF, TWO, 1.0]


@_case("a row fully masked by `where`", "softmax 0, log_softmax -inf, logsumexp -inf, gradient 0")
def _a_row_fully_masked_by_where(a: Arrays) -> Case:
    x, dy = a([[1.0, NAN], [0.0, 0.0]]), a([[3.0, 4.0], [5.0, 6.0]])
    where = a([[False, False], [True, False]], "bool")
    y, log_y = softmax(x, where=where), log_softmax(x, where=where)
    yield y, [[0.0, 0.0], [1.0, 0.0]]
    yield log_y, [[-INF, -INF], [0.0, -INF]]
    yield logsumexp(x, axis=1, where=where), [-INF, 0.0]
    both = logsumexp(x, axis=1, where=where, return_sign=True)
    yield from zip(both, ([-INF, 0.0], [0.0, 1.0]), strict=True)
    yield softmax_vjp(y, dy), np.zeros((2, 2))
    yield log_softmax_vjp(log_y, dy), np.zeros((2, 2))


@_case("+inf in a row", "softmax nan; logsumexp +inf")
def _plus_inf_in_a_row(a: Arrays) -> Case:
    x = a([[INF, 0.0], [INF, INF], [INF, -INF], [0.0, 0.0]])
    for t in (1.0, 2.0):
        yield softmax(x, temperature=t), [[NAN, NAN]] * 3 + [[0.5, 0.5]]
        yield log_softmax(x, temperature=t), [[NAN, NAN]] * 3 + [[-TWO, -TWO]]
    yield logsumexp(x, axis=1), [INF, INF, INF, TWO]


@_case("nan in a row", "that row nan, no other row touched")
def _nan_in_a_row(a: Arrays) -> Case:
    x, three = a([[NAN, 0.0, INF], [0.0, 0.0, 0.0], [1.0, NAN, -INF]]), math.log(3)
    for t in (1.0, 2.0):
        yield softmax(x, temperature=t), [[NAN] * 3, [THIRD] * 3, [NAN] * 3]
        yield log_softmax(x, temperature=t), [[NAN] * 3, [-three] * 3, [NAN] * 3]
    yield logsumexp(x, axis=1), [NAN, three, NAN]
    grad = [[NAN] * 3, [-2 / 3, THIRD, THIRD], [NAN] * 3]
    yield from _loss(x, a([0, 0, 0], "int64"), [NAN, three, NAN], grad, reduction="none")


@_case("integers", "promoted to the library's default floating dtype before anything is subtracted")
def _integers(a: Arrays) -> Case:
    ends = {"int8": (127, -128), "uint8": (255, 0)}
    for dtype in ("int8", "int16", "int32", "int64", "uint8"):
        high, low = ends.get(dtype, (100, 30))
        x, tiny = a([[high, low]], dtype), math.exp(low - high)
        yield softmax(x), Of([[1.0, tiny]], a.default)
        yield log_softmax(x), Of([[-tiny, low - high]], a.default)
        yield logsumexp(x, axis=1), Of([high], a.default)
        yield cross_entropy(x, a([1], "int64")), Of(high - low, a.default)


@_case(
    "dtype",
    "the result's, out of the precision that is computed in or, if it is wider, in dtype; the "
    "gradient keeps the logits' dtype",
)
def _dtype(a: Arrays) -> Case:
    x, t = a(ROWS), a(LABELS, "int64")
    dtype, losses = a([0.0], "float32").dtype, Of(LOSSES, "float32")
    yield softmax(x, dtype=dtype), Of([_softmax(row) for row in ROWS], "float32")
    yield log_softmax(x, dtype=dtype), Of([_log_softmax(row) for row in ROWS], "float32")
    yield logsumexp(x, axis=1, dtype=dtype), Of([_logsumexp(row) for row in ROWS], "float32")
    yield from _loss(x, t, losses, SLOPES, reduction="none", dtype=dtype)


@_case("dtype that is no real floating one of the library", "TypeError")
def _dtype_that_is_not_floating(a: Arrays) -> Case:
    x, says = a(np.zeros((2, 2))), r"dtype is .*expected a real floating dtype"
    for name in filter(a.has, ("int64", "bool", "complex128")):
        wrong = a([0], name).dtype
        for of_rows in (*NORMALIZED, logsumexp):
            yield _no(TypeError, says, of_rows, x, dtype=wrong)
            yield _no(TypeError, says, of_rows, x, dtype="float33")
        for f in (cross_entropy, cross_entropy_value_and_grad):
            says_which = f"(?i)dtype is .*{name}.*leave it out"
            yield _no(TypeError, says_which, f, x, a([0, 1], "int64"), dtype=wrong)


@_case(
    "bool, complex (logsumexp takes complex, as SciPy)",
    "TypeError that names the dtype and what to do",
)
def _bool_complex(a: Arrays) -> Case:
    for dtype in filter(a.has, ("bool", "complex128")):
        x = a(np.ones((2, 2)), dtype)
        for f in (*NORMALIZED, softmax_jacobian):
            yield _no(TypeError, f"has dtype {dtype}, expected .*: ", f, x)
        t = a([0, 1], "int64")
        yield _no(TypeError, f"logits has dtype {dtype}", cross_entropy, x, t)
        if dtype == "bool":
            yield _no(TypeError, "x has dtype bool", logsumexp, x)
        else:
            yield logsumexp(x), Of(1 + math.log(4), dtype)


@_case(
    "a temperature, label_smoothing, reduction, z_loss or softcap out of its range",
    "ValueError naming value and range, also of a number too large for a float",
)
def _options_out_of_range(a: Arrays) -> Case:
    x, t = a(np.zeros((2, 3))), a([0, 1], "int64")
    for value in (0, 0.0, -1.0, NAN, INF, -INF):
        for f in NORMALIZED:
            says = rf"temperature is {value}.*\(0, inf\)"
            yield _no(ValueError, says, f, x, temperature=value)
    for option, wrong, says in (
        ("label_smoothing", 1.5, r"1\.5.*\[0, 1\]"),
        ("label_smoothing", -0.1, r"-0\.1"),
        ("label_smoothing", NAN, "nan"),
        ("reduction", "avg", "'avg'.*'mean', 'sum', 'none'"),
        ("reduction", None, "None"),
        ("z_loss", -1.0, r"-1\.0.*\[0, inf\)"),
        ("softcap", 0.0, r"0\.0.*\(0, inf\)"),
        ("softcap", -3, "-3"),
    ):
        yield _no(ValueError, f"{option} is {says}", cross_entropy, x, t, **{option: wrong})
    for number in (10**400, -(10**400), 10**5000, Fraction(10**400, 3)):
        for f in NORMALIZED:
            says = r"temperature is beyond .* float, .*\(0, inf\)"
            yield _no(ValueError, says, f, x, temperature=number)
        for option in ("softcap", "label_smoothing", "z_loss"):
            says = f"{option} is beyond the range of a float"
            yield _no(ValueError, says, cross_entropy, x, t, **{option: number})


@_case(
    "label >= C or < 0 and not ignore_index",
    "IndexError naming the label, its position and C; under tracing and lazily, nan there",
)
def _label_out_of_range(a: Arrays) -> Case:
    x, three = a(np.zeros((2, 2, 3))), math.log(3)
    grad = np.full((2, 2, 3), THIRD)
    grad[0, 0, 0] = grad[0, 1, 1] = grad[1, 0, 2] = -2 / 3
    grad[1, 1] = NAN
    for bad in (3, -1, 127):
        for dtype in ("int8", "int64"):
            t, says = a([[0, 1], [2, bad]], dtype), rf"labels\[1, 1\] is {bad}, outside \[0, 3\)"
            yield from _bad_label(a, says, x, t, [[three, three], [three, NAN]], grad)
            row, one, says = a(np.zeros(3)), a(bad, dtype), f"the label is {bad}"
            yield from _bad_label(a, says, row, one, NAN, [NAN] * 3)
    x, t = a(np.zeros((2, 300))), a([5, -1], "int8")  # -1 is 255 in eight unsigned bits
    grad = np.full((2, 300), 1 / 300)
    grad[0, 5], grad[1] = -299 / 300, NAN
    says = r"labels\[1\] is -1, outside \[0, 300\)"
    yield from _bad_label(a, says, x, t, [math.log(300), NAN], grad)


@_case("label of a class that `where` masks out", "an error like a label out of range")
def _label_of_a_masked_class(a: Arrays) -> Case:
    x, t = a(np.zeros((2, 3))), a([2, 2], "int64")
    where = a([[True, True, False], [True, True, True]], "bool")
    says, grad = r"labels\[0\] is 2, a class that where masks out", [THIRD, THIRD, -2 / 3]
    masked = [NAN, NAN, 0.0]
    yield from _bad_label(a, says, x, t, [NAN, math.log(3)], [masked, grad], where=where)


@_case("label dtype bool or floating of index shape", "TypeError")
def _label_dtype_bool_or_floating(a: Arrays) -> Case:
    for dtype in ("bool", a.dtype):
        says = f"labels have dtype {dtype}.*cast them"
        yield _no(TypeError, says, cross_entropy, a(np.zeros((2, 3))), a([0, 1], dtype))


@_case("ignore_index", "may lie outside [0, C); compared without wrap-around for unsigned labels")
def _ignore_index(a: Arrays) -> Case:
    x = a(ROWS[:1] * 3)
    first, third, slope = LOSSES[0], -_log_softmax(ROWS[0])[0], _slope(ROWS[0], 0)
    grad = [SLOPES[0], [0.0] * 4, slope]
    half = [[d / 2 for d in row] for row in grad]
    for ignored in (-100, 1, 4, 255):
        t = a([2, ignored, 0], "int64")
        yield from _loss(x, t, (first + third) / 2, half, ignore_index=ignored)
    unsigned = a([2, 255, 0], "uint8")  # 255 is what -1 would become
    says, wrong = r"labels\[1\] is 255", [grad[0], [NAN] * 4, slope]
    yield from _bad_label(a, says, x, unsigned, [first, NAN, third], wrong, ignore_index=-1)
    kept = {"ignore_index": 255, "reduction": "none"}
    yield from _loss(x, unsigned, [first, 0.0, third], grad, **kept)
    # As int64 it would be another number, as which labels are compared only by mistake.
    for ignored in (2**63, 2**63 + 5, 2**64 - 1) if a.has("uint64") else ():
        t = a(np.asarray([2, ignored, 0], np.uint64), "uint64")
        for weight in (None, a(np.ones(4))):
            options = {"weight": weight, "ignore_index": ignored, "reduction": "none"}
            yield from _loss(x, t, [first, 0.0, third], grad, **options)


@_case("sample_weight of another shape, or of dtype bool or complex", "ValueError; TypeError")
def _sample_weight_of_another_kind(a: Arrays) -> Case:
    x, t = a(np.zeros((2, 3))), a([0, 1], "int64")
    for shape in ((3,), (2, 1), (), (2, 3)):
        says, wrong = r"sample_weight has shape .*, expected \(2,\): one", a(np.ones(shape))
        yield _no(ValueError, says, cross_entropy, x, t, sample_weight=wrong)
    for dtype in filter(a.has, ("bool", "complex128")):
        says, wrong = f"sample_weight has dtype {dtype}, expected", a([1, 1], dtype)
        yield _no(TypeError, says, cross_entropy, x, t, sample_weight=wrong)


@_case(
    "an ignored row, or one of sample_weight 0, holding nan or inf",
    "no effect on loss and mean, gradient exactly 0, whatever its logits and label",
)
def _an_ignored_row_holding_nan_or_inf(a: Arrays) -> Case:
    more: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 4.0}
    for hidden in (NAN, INF, -INF):
        x = np.asarray([[0.0, 1.0, 2.0], [hidden, hidden, 0.0], [1.0, 0.5, -2.0]])
        few = x[[0, 2]]
        t, spread = [0, 7, 2], np.eye(3)
        spread[1] = hidden
        for terms in ({}, more, {"weight": a([1.0, 3.0, 0.5])}):
            for labels, others, left_out in (
                (a(t, "int64"), a([0, 2], "int64"), (None, [2.0, 0.0, 0.5])),
                (a(spread), a(np.eye(3)[[0, 2]]), (None, [2.0, 0.0, 0.5])),
                (a(t, "int64"), a([0, 2], "int64"), (7, None)),
            ):
                options = {"reduction": "none", **terms, "ignore_index": left_out[0]}
                kept = {**options, "ignore_index": None}
                if left_out[1]:
                    options["sample_weight"] = a(left_out[1])
                    kept["sample_weight"] = a(left_out[1][::2])
                pair = cross_entropy_value_and_grad(a(few), others, **kept)
                loss, grad = (np.insert(a.numpy(part), 1, 0.0, axis=0) for part in pair)
                yield from _loss(a(x), labels, loss, grad, **options)
                options["reduction"] = kept["reduction"] = "mean"
                pair = cross_entropy_value_and_grad(a(few), others, **kept)
                grad = np.insert(a.numpy(pair[1]), 1, 0.0, axis=0)
                yield from _loss(a(x), labels, a.numpy(pair[0]), grad, **options)


@_case(
    "an infinite or nan weight of a class that no label names, without smoothing",
    "no effect, loss and gradient finite",
)
def _odd_weight_of_a_class_that_no_label_names(a: Arrays) -> Case:
    rows, eye = [ROWS[0], ROWS[2], ROWS[0]], np.eye(4)[[0, 2, 0]]
    x, index, ignored = a(rows), a([0, 2, 0], "int64"), a([0, 2, 1], "int64")
    more: dict[str, Any]
    ignoring = {"ignore_index": 1}
    for t, more in (index, {}), (a(eye), {}), (a(eye, "int64"), {}), (ignored, ignoring):
        for reduction, z_loss in (("mean", 0.0), ("sum", 0.1), ("none", 0.0), ("none", 0.1)):
            options = {"reduction": reduction, "z_loss": z_loss, **more}
            plain = {"weight": a([0.5, 1.0, 2.0, 1.0]), **options}
            expected = [a.numpy(part) for part in cross_entropy_value_and_grad(x, t, **plain)]
            for odd in (INF, -INF, NAN):
                yield from _loss(x, t, *expected, weight=a([0.5, odd, 2.0, 1.0]), **options)


@_case("all ignored, or weights summing to 0", "mean nan, sum 0, gradient 0")
def _all_ignored_or_weights_summing_to_0(a: Arrays) -> Case:
    x, t, nothing = a([[0.0, 1.0], [2.0, 3.0]]), a([1, 1], "int64"), a([0.0, 0.0])
    weightless = {"weight": a([1.0, 0.0])}
    for labels, options in (
        (a([-1, -1], "int64"), {"ignore_index": -1}),
        (t, weightless),
        (a([1, 0], "int64"), {"sample_weight": nothing}),
        (a([[0.5, 0.5], [0.0, 1.0]]), {"sample_weight": nothing}),
    ):
        for reduction, expected in (("mean", NAN), ("sum", 0.0), ("none", [0.0, 0.0])):
            grad = np.zeros((2, 2))
            yield from _loss(x, labels, expected, grad, reduction=reduction, **options)
    # Smoothing spreads a loss over classes that have a weight; its mean is over nothing still.
    yield from _loss(x, t, NAN, np.zeros((2, 2)), label_smoothing=0.1, **weightless)


@_case("probability 0 at a logit of -inf", "contributes 0")
def _probability_0_at_a_logit_of_minus_inf(a: Arrays) -> Case:
    x = a([[0.0, -INF, 0.0]])
    yield from _loss(x, a([[0.5, 0.0, 0.5]]), TWO, Of([[0.0] * 3], atol=a.tiny))
    yield from _loss(x, a([0], "int64"), TWO, [[-0.5, 0.0, 0.5]])
    for impossible in (a([[0.0, 1.0, 0.0]]), a([1], "int64")):
        yield from _loss(x, impossible, INF, [[0.5, -1.0, 0.5]])


@_case("probabilities with ignore_index", "ValueError")
def _probabilities_with_ignore_index(a: Arrays) -> Case:
    says = "ignore_index is -100, but labels are a distribution"
    x, t = a([[0.0, 1.0]]), a([[0.5, 0.5]])
    yield _no(ValueError, says, cross_entropy, x, t, ignore_index=-100)


@_case(
    "entropy: probability 0, a row of -inf only, +inf or nan, an empty row",
    "contributes 0; nan; nan; 0; the gradient 0, nan or empty",
)
def _entropy_of_infinities(a: Arrays) -> Case:
    rows = [[0.0, -INF, 0.0], [-INF] * 3, [INF, 0.0, 0.0], [NAN, 0.0, 0.0], [5.0, -INF, -INF]]
    yield entropy(a(rows)), [TWO, NAN, NAN, NAN, 0.0]
    both = entropy_value_and_grad(a(rows[:2]))
    grad = Of([[0.0] * 3, [NAN] * 3], atol=a.tiny)
    yield from zip(both, ([TWO, NAN], grad), strict=True)
    for shape in ((2, 0), (0, 3)):
        both = entropy_value_and_grad(a(np.zeros(shape)))
        yield entropy(a(np.zeros(shape))), np.zeros(shape[0])
        yield from zip(both, (np.zeros(shape[0]), np.zeros(shape)), strict=True)
    yield from zip(entropy_value_and_grad(a(3.0), axis=None), (0.0, 0.0), strict=True)


@_case(
    "kl_divergence: p 0; q 0 where p is not; both 0; +inf or nan in a row; no class; no position",
    "contributes 0; inf; contributes 0; nan; 0; mean nan, gradients empty",
)
def _divergence_of_infinities(a: Arrays) -> Case:
    p = a([[0.0, -INF], [0.0, 0.0], [0.0, -INF], [INF, 0.0], [0.0, 0.0]])
    q = a([[0.0, 0.0], [0.0, -INF], [3.0, -INF], [0.0, 0.0], [NAN, 0.0]])
    yield kl_divergence(p, q, reduction="none"), [TWO, INF, 0.0, NAN, NAN]
    x, z = a([[0.0, -INF, 0.0], [-INF] * 3]), a(np.zeros((2, 3)))
    value, (dx, dz) = kl_divergence_value_and_grad(x, z, reduction="sum")
    yield value, NAN
    yield dx, Of([[0.0] * 3, [NAN] * 3], atol=a.tiny)
    yield dz, [[-1 / 6, THIRD, -1 / 6], [NAN] * 3]
    for shape, mean in (((0, 3), NAN), ((2, 0), 0.0)):
        empty = a(np.zeros(shape))
        yield kl_divergence(empty, empty, reduction="none"), np.zeros(shape[0])
        yield kl_divergence(empty, empty, reduction="sum"), 0.0
        value, slopes = kl_divergence_value_and_grad(empty, empty)
        yield value, mean
        yield from zip(slopes, (np.zeros(shape),) * 2, strict=True)
    narrow = a([0.0, 1.0], "float32")
    _, (dx, dz) = kl_divergence_value_and_grad(narrow, a([0.0, 1.0]))
    yield dx, Of([0.0, 0.0], "float32", 1e-7)
    yield dz, Of([0.0, 0.0], atol=1e-7)


@_case("kl_divergence of shapes that differ, or a wrong option", "ValueError, TypeError naming it")
def _divergence_of_others(a: Arrays) -> Case:
    f, x = kl_divergence, a(np.zeros((2, 3)))
    yield _no(ValueError, r"logits_q has shape \(3,\), expected \(2, 3\)", f, x, a(np.zeros(3)))
    yield _no(TypeError, "logits_q has dtype bool", f, x, a(np.ones((2, 3)), "bool"))
    yield _no(ValueError, "reduction is 'batchmean'", f, x, x, reduction="batchmean")
    yield _no(ValueError, r"temperature is 0\.0", f, x, x, temperature=0.0)


@_case("logmeanexp: an empty or fully masked row; -inf only; +inf; nan", "nan; -inf; +inf; nan")
def _log_of_a_mean(a: Arrays) -> Case:
    x = a([[-INF, -INF], [INF, 0.0], [NAN, INF], [-INF, 0.0], [7.0, 7.0]])
    yield logmeanexp(x, axis=1), [-INF, INF, NAN, -TWO, 7.0]
    where = a([[False, False], [False, True], [False, True], [False, True], [True, True]], "bool")
    yield logmeanexp(x, axis=1, where=where), [NAN, 0.0, INF, 0.0, 7.0]
    yield logmeanexp(a(np.zeros((2, 0))), axis=1), [NAN, NAN]
    yield logmeanexp(a(3.0)), 3.0


@_case(
    "logcumsumexp: -inf at first; after +inf; after nan; an empty axis",
    "-inf, its gradient 0; +inf; nan; empty",
)
def _running_sums_of_infinities(a: Arrays) -> Case:
    x = [[-INF, -INF, 0, 0], [0, INF, INF, -INF], [0, NAN, INF, 0], [0, -INF, 0, NAN]]
    sums = [
        [-INF, -INF, 0.0, TWO],
        [0.0, INF, INF, INF],
        [0.0, NAN, NAN, NAN],
        [0.0, 0.0, TWO, NAN],
    ]
    yield logcumsumexp(a(x)), sums
    dy = a([7.0, 1.0, 1.0, 1.0])
    yield logcumsumexp_vjp(a([-INF, 0.0, 0.0, -INF]), dy), [0.0, 2.0, 1.0, 0.0]
    for shape in ((2, 0), (0, 3)):
        empty = a(np.zeros(shape))
        yield logcumsumexp(empty), np.zeros(shape)
        yield logcumsumexp_vjp(empty, empty), np.zeros(shape)
    yield _no(TypeError, "axis is None, expected an int", logcumsumexp, a(x), axis=None)


@_case(
    "sink, entmax, sparsemax, entmax_loss, sigmoid_cross_entropy, kl_divergence, entropy, "
    "logmeanexp, logcumsumexp of integers; a vjp of integers",
    "promoted to the default floating dtype before anything is subtracted; TypeError",
)
def _integers_of_the_family(a: Arrays) -> Case:
    x, t, other = a([[127, -128]], "int8"), a([1], "int64"), a([[-128, 127]], "int8")
    yes = a([[0, 1]], "int64")
    for answer, expected in (
        (log_softmax(x, sink=127.0), [[-TWO, -255 - TWO]]),
        (entmax(x), [[1.0, 0.0]]),
        (sparsemax(x), [[1.0, 0.0]]),
        (entmax_loss(x, t, alpha=2), 255.0),
        (entmax_loss_value_and_grad(x, t)[1], [[1.0, -1.0]]),
        (sigmoid_cross_entropy(x, yes, reduction="none"), [[127.0, 128.0]]),
        (kl_divergence(x, other), 255.0),
        (entropy(a([[-128] * 4], "int8")), [math.log(4)]),
        (logmeanexp(x, axis=1), [127 - TWO]),
        (logcumsumexp(other), [[-128.0, 127.0]]),
    ):
        yield answer, Of(expected, a.default)
    for f in (entmax_vjp, logcumsumexp_vjp):
        yield _no(TypeError, "has dtype int8, expected", f, x, x)


@_case(
    "entmax, entmax_vjp, entropy, kl_divergence, logcumsumexp: ties",
    "share alike; gradients alike; log n; 0; log i",
)
def _ties_of_the_family(a: Arrays) -> Case:
    x, shared = a([[2.0, -200.0, 2.0], [5.0, 5.0, 5.0]]), [[0.5, 0.0, 0.5], [THIRD] * 3]
    for alpha in (1.5, 2.0, INF):
        yield entmax(x, alpha=alpha), shared
    dy, slope = a([[1.0, 9.0, 0.0], [4.0, 4.0, 4.0]]), [[0.5, 0.0, -0.5], [0.0] * 3]
    yield entmax_vjp(a(shared), dy, alpha=2.0), Of(slope, atol=8 * a.tiny)
    both, zero = entropy_value_and_grad(x), Of(np.zeros((2, 3)), atol=a.tiny)
    yield from zip(both, ([TWO, math.log(3)], zero), strict=True)
    yield kl_divergence(x, x, reduction="none"), [0.0, 0.0]
    yield logcumsumexp(a(np.zeros(5))), np.log(np.arange(1.0, 6.0))


@_case(
    "entmax_loss: no class, every position ignored; sample_weight 0 beside nan; weights summing "
    "to 0; an ignored row holding nan; a label out of range; a label at -inf; no position",
    "mean nan, gradient empty; no effect, gradient 0; mean nan, sum 0; no effect, gradient 0; as "
    "cross_entropy; inf; mean nan",
)
def _entmax_loss_at_the_edges(a: Arrays) -> Case:
    f, empty = entmax_loss_value_and_grad, np.zeros((2, 0))
    yield from zip(f(a(empty), a([-1, -1], "int64"), ignore_index=-1), (NAN, empty), strict=True)
    x, t = a([[0.0, 0.25], [NAN, INF]]), a([0, 7], "int64")
    # p = (3/8, 5/8): the loss of label 0 is (1 + 1/4)^2 / 4.
    expected = 25 / 64, [[-5 / 8, 5 / 8], [0.0, 0.0]]
    for left_out in ({"sample_weight": a([3.0, 0.0])}, {"ignore_index": 7}):
        yield from zip(f(x, t, alpha=2, **left_out), expected, strict=True)
    for reduction, loss in (("mean", NAN), ("sum", 0.0)):
        weightless = {"sample_weight": a([0.0, 0.0]), "reduction": reduction}
        yield from zip(f(x, t, **weightless), (loss, np.zeros((2, 2))), strict=True)
    for alpha in (1.0, 1.5, 2.0, 3.0, INF):
        pair = f(a([[0.0, 1.0, 2.0]]), a([1], "int64"), alpha=alpha)
        wide, labels = a([[0.0, 1.0, 2.0], [NAN, INF, 0.0]]), a([1, -1], "int64")
        value, grad = (a.numpy(part) for part in pair)
        both = f(wide, labels, alpha=alpha, ignore_index=-1)
        yield from zip(both, (value, [*grad, [0.0] * 3]), strict=True)
        yield entmax_loss(a([[1.0, 0.5, -INF]]), a([2], "int64"), alpha=alpha), INF
        bad = a([[0.0, 1.0, 2.0]]), a([3], "int64")
        if a.reads_values(bad[1]):
            yield _no(IndexError, r"labels\[0\] is 3, outside \[0, 3\)", f, *bad, alpha=alpha)
        both = f(*bad, alpha=alpha, check_labels=False)
        yield from zip(both, (NAN, [[NAN] * 3]), strict=True)
        nothing = a(np.zeros((0, 3))), a([], "int64")
        for reduction, loss in (("mean", NAN), ("sum", 0.0)):
            yield entmax_loss(*nothing, alpha=alpha, reduction=reduction), loss


@_case(
    "sigmoid_cross_entropy: an infinite logit that is right; one that is wrong; nan; weight 0; no "
    "entry",
    "0; inf; nan; no effect; mean nan, sum 0",
)
def _sigmoid_cross_entropy_of_infinities(a: Arrays) -> Case:
    f, z, t = sigmoid_cross_entropy_value_and_grad, a([INF, -INF, INF, -INF, NAN]), [1, 0, 0, 1, 1]
    expected = [0.0, 0.0, INF, INF, NAN], [0.0, 0.0, 1.0, -1.0, NAN]
    for gamma in (0.0, 0.5, 2.0):
        options: dict[str, Any] = {"reduction": "none", "focal_gamma": gamma}
        yield from zip(f(z, a(t, "int64"), **options), expected, strict=True)
        weight = a([1.0, 1.0, 0.0, 0.0, 0.0])
        both = f(z, a(t, "int64"), weight=weight, **options)
        yield from zip(both, (np.zeros(5),) * 2, strict=True)
    empty = a(np.zeros((0, 3)))
    for reduction, loss in (("mean", NAN), ("sum", 0.0)):
        both = f(empty, empty, reduction=reduction)
        yield from zip(both, (loss, np.zeros((0, 3))), strict=True)


@_case(
    "sigmoid_cross_entropy: labels of another shape, or complex; numbers out of range",
    "ValueError; TypeError; ValueError",
)
def _sigmoid_cross_entropy_of_others(a: Arrays) -> Case:
    f, z = sigmoid_cross_entropy, a(np.zeros((2, 3)))
    says = r"labels have shape \(2,\), expected \(2, 3\)"
    yield _no(ValueError, says, f, z, a([0, 1], "int64"))
    if a.has("complex128"):
        says = "labels have dtype complex128, expected booleans"
        yield _no(TypeError, says, f, z, a(np.zeros((2, 3)), "complex128"))
    for name in ("weight", "pos_weight"):
        says = rf"{name} has shape \(2,\), which does not broadcast"
        yield _no(ValueError, says, f, z, z, **{name: a([1.0, 1.0])})
        yield _no(TypeError, f"{name} has dtype bool", f, z, z, **{name: a(np.ones(3), "bool")})
    yield _no(ValueError, r"focal_gamma is -1\.0.*\[0, inf\)", f, z, z, focal_gamma=-1.0)
    yield _no(ValueError, r"label_smoothing is 1\.5.*\[0, 1\]", f, z, z, label_smoothing=1.5)
    yield _no(ValueError, "reduction is 'avg'", f, z, z, reduction="avg")


@_case(
    "sink: a row of -inf only, or masked as a whole; +inf or nan in a row; sink -inf",
    "softmax 0, log_softmax -inf; nan; as without a sink",
)
def _a_sink(a: Arrays) -> Case:
    x = a([[-INF, -INF], [INF, 0.0], [NAN, 0.0], [0.0, 0.0]])
    where = a([[False, False], [False, True], [False, True], [True, True]], "bool")
    logs, third = math.log(0.5), [-math.log(3)] * 2
    for sink in (0.0, a(np.zeros((4, 1)))):
        yield softmax(x, sink=sink), [[0.0, 0.0], [NAN, NAN], [NAN, NAN], [THIRD, THIRD]]
        yield log_softmax(x, sink=sink), [[-INF, -INF], [NAN, NAN], [NAN, NAN], third]
        masked = softmax(x, where=where, sink=sink), log_softmax(x, where=where, sink=sink)
        yield masked[0], [[0.0, 0.0], [0.0, 0.5], [0.0, 0.5], [THIRD, THIRD]]
        yield masked[1], [[-INF, -INF], [-INF, logs], [-INF, logs], third]
    for f, half in ((softmax, 0.5), (log_softmax, logs)):
        yield f(a(ROWS), sink=-INF), a.numpy(f(a(ROWS)))
        yield f(a(np.zeros((2, 0))), sink=1.0), np.zeros((2, 0))
        yield f(a(0.0), axis=None, sink=0.0), half


@_case("sink that is nan or inf, or does not broadcast; or is no array", "ValueError; TypeError")
def _a_sink_of_another_kind(a: Arrays) -> Case:
    x = a(np.zeros((2, 3)))
    for f in NORMALIZED:
        for wrong in (NAN, INF):
            yield _no(
                ValueError, rf"sink is {wrong}, expected a number in \[-inf", f, x, sink=wrong
            )
        for shape in ((3,), (2, 3), (2,), (1, 2, 1)):
            says = r"sink has shape .*does not broadcast"
            yield _no(ValueError, says, f, x, sink=a(np.zeros(shape)))
        yield _no(TypeError, "sink has dtype bool", f, x, sink=a([True], "bool"))
        yield _no(TypeError, "sink is a list", f, x, sink=[0.0])


@_case(
    "entmax: -inf in a row; a row of -inf only, +inf or nan in a row; an empty axis",
    "0; nan; empty",
)
def _entmax_of_infinities(a: Arrays) -> Case:
    x = a([[0.0, -INF, 0.0], [-INF] * 3, [INF, 0.0, 1.0], [NAN, 0.0, 0.0], [3.0] * 3])
    expected = [[0.5, 0.0, 0.5], [NAN] * 3, [NAN] * 3, [NAN] * 3, [THIRD] * 3]
    for alpha in (1.0, 1.25, 1.5, 2.0, 3.0, INF):
        for f in (partial(entmax, alpha=alpha), *((sparsemax,) if alpha == 2 else ())):
            yield f(x), expected
            yield f(a(np.zeros((2, 0, 3))), axis=1), np.zeros((2, 0, 3))
            yield f(a(np.zeros((0, 3)))), np.zeros((0, 3))
            yield f(a(2.0), axis=None), 1.0
        dy = a([2.0, 2.0, INF if alpha > 1 else 3.0])
        yield entmax_vjp(a([0.25, 0.75, 0.0]), dy, alpha=alpha), Of([0.0] * 3, atol=a.tiny)


@_case(
    "alpha below 1 or nan, or an array above 2 or of several; that is no number",
    "ValueError; TypeError",
)
def _alpha_out_of_range(a: Arrays) -> Case:
    x = a([0.0, 1.0])
    for f in (entmax, partial(entmax_vjp, x)):
        for wrong in (0.5, -1, NAN, -INF):
            says = r"alpha is .*expected a number in \[1, inf\]"
            yield _no(ValueError, says, f, x, alpha=wrong)
        yield _no(TypeError, r"alpha is '2'.*expected a Python number", f, x, alpha="2")
    if a.reads_values(x):
        yield _no(
            ValueError, r"an array that holds 2.5, expected \[1, 2\]", entmax, x, alpha=a(2.5)
        )
    yield _no(ValueError, r"alpha has shape \(2,\), expected \(\)", entmax, x, alpha=x)
    yield _no(TypeError, "alpha has dtype int64", entmax, x, alpha=a(2, "int64"))
