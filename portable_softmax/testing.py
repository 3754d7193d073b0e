"""What the author of an array library runs, to see whether this package answers rightly on it.

`check_library` needs NumPy and the library alone. The exact answers are computed by `math`, in the
closed forms of the docstrings, and share no code with the package.

>>> import numpy as np
>>> from portable_softmax.testing import check_library
>>> print(check_library(np))
numpy: right. 46 cases passed, 0 failed, 0 skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
RTOL = {"float64": 1e-12, "float32": 8 * 2.0**-23}


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
        expected = np.asarray(expected, self.dtype)
        if libraries.library_of(got).xp is not libraries.library_of(self([0.0])).xp:
            return f"an array of {self.xp.__name__}"
        if (dtype := libraries.dtype_name(got.dtype)) != self.dtype:
            return f"the dtype {self.dtype}, not {dtype}"
        if tuple(got.shape) != expected.shape:
            return f"the shape {expected.shape}, not {tuple(got.shape)}"
        rtol, tiny = RTOL[self.dtype], float(np.finfo(self.dtype).tiny)
        if np.allclose(self.numpy(got), expected, rtol=rtol, atol=tiny, equal_nan=True):
            return ""
        return np.array2string(expected, separator=", ", precision=17)

    def changed(self) -> bool:
        """Return whether an input is not what it was."""
        return not all(
            np.array_equal(self.numpy(made), array, equal_nan=array.dtype.kind == "f")
            for made, array in self._given
        )


class Raises(NamedTuple):
    """Stands for an answer where an error is expected."""

    error: type[Exception]


def _failure(name: str, case: Callable[[Arrays], Any], arrays: Arrays) -> Failure | None:
    """Run a case."""
    expected = "an answer"
    try:
        for got, expected_value in case(arrays):
            if isinstance(expected_value, Raises):
                expected = expected_value.error.__name__
                try:
                    answer = got()
                except expected_value.error:
                    continue
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
Case = Iterator[tuple[Any, Any]]


def _three(a: Arrays) -> Case:
    yield softmax(a(ROWS)), [_softmax(row) for row in ROWS]
    yield log_softmax(a(ROWS)), [_log_softmax(row) for row in ROWS]
    yield logsumexp(a(ROWS), axis=-1), [_logsumexp(row) for row in ROWS]


def _axes(a: Arrays) -> Case:
    columns = [list(column) for column in zip(*ROWS, strict=True)]
    flat = [x for row in ROWS for x in row]
    yield softmax(a(columns), axis=0), np.asarray([_softmax(row) for row in ROWS]).T
    yield logsumexp(a(columns), axis=0, keepdims=True), [[_logsumexp(row) for row in ROWS]]
    yield logsumexp(a(ROWS)), _logsumexp(flat)
    yield softmax(a(ROWS), axis=(0, 1)), np.reshape(_softmax(flat), (3, 4))
    yield log_softmax(a(2.5), axis=None), 0.0


def _weighted_sum(a: Arrays) -> Case:
    b = [2.0, -1.0, 0.5]
    total = math.fsum(w * math.exp(x) for w, x in zip(b, (0.5, 0.0, 1.0), strict=True))
    yield logsumexp(a([0.5, 0.0, 1.0]), b=a(b)), math.log(total)


def _options_of_rows(a: Arrays) -> Case:
    yield softmax(a(ROWS), temperature=2.0), [_softmax([x / 2 for x in row]) for row in ROWS]
    mask = [[True, False, True, True]] * 3
    kept = [_log_softmax([row[0], *row[2:]]) for row in ROWS]
    expected = [[row[0], -INF, *row[1:]] for row in kept]
    yield log_softmax(a(ROWS), where=a(mask, "bool")), expected
    yield softmax(a(ROWS), sink=0.5), [_softmax([*row, 0.5])[:-1] for row in ROWS]


def _gradients(a: Arrays) -> Case:
    y, dy = [0.5, 0.25, 0.125, 0.125], [1.0, -2.0, 0.5, 4.0]
    total = math.fsum(p * d for p, d in zip(y, dy, strict=True))
    yield softmax_vjp(a(y), a(dy)), [p * (d - total) for p, d in zip(y, dy, strict=True)]
    expected = [d - p * sum(dy) for p, d in zip(y, dy, strict=True)]
    yield log_softmax_vjp(a([math.log(p) for p in y]), a(dy)), expected
    yield softmax_jacobian(a(y)), np.diag(y) - np.outer(y, y)


def _losses(a: Arrays) -> Case:
    x, t = a(ROWS), a(LABELS, "int64")
    yield cross_entropy(x, t, reduction="none"), LOSSES
    yield cross_entropy(x, t, reduction="sum"), math.fsum(LOSSES)
    yield cross_entropy(x, t), math.fsum(LOSSES) / 3
    loss, grad = cross_entropy_value_and_grad(x, t)
    yield loss, math.fsum(LOSSES) / 3
    yield grad, [[d / 3 for d in row] for row in SLOPES]


def _distributions(a: Arrays) -> Case:
    q = [[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]
    expected = [
        -math.fsum(p * v for p, v in zip(probabilities, _log_softmax(row), strict=True))
        for probabilities, row in zip(q, ROWS, strict=True)
    ]
    yield cross_entropy(a(ROWS), a(q), reduction="none"), expected


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


def _parts(a: Arrays) -> Case:
    parts = (online.fold(a([row[:2] for row in ROWS])), online.fold(a([row[2:] for row in ROWS])))
    yield online.logsumexp(online.merge(*parts)), [[_logsumexp(row)] for row in ROWS]


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


def _entropies(a: Arrays) -> Case:
    logs = [_log_softmax(row) for row in ROWS]
    expected = [-math.fsum(math.exp(v) * v for v in row) for row in logs]
    yield entropy(a(ROWS)), expected
    value, grad = entropy_value_and_grad(a(ROWS[0]))
    yield value, expected[0]
    yield grad, [math.exp(v) * (-v - expected[0]) for v in logs[0]]


def _divergences(a: Arrays) -> Case:
    x, z = [math.log(3), 0.0], [0.0, 0.0]
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    yield kl_divergence(a([x, z]), a([z, z]), reduction="none"), [expected, 0.0]
    value, (dx, dz) = kl_divergence_value_and_grad(a([x]), a([z]))
    yield value, expected
    slope = 0.75 * 0.25 * math.log(3)
    yield dx, [[slope, -slope]]
    yield dz, [[-0.25, 0.25]]


def _yes_or_no(a: Arrays) -> Case:
    x, t = a([-2.0, 0.0, 0.5, 30.0]), a([1.0, 0.0, 1.0, 1.0])
    expected = [math.log1p(math.exp(v)) for v in (2.0, 0.0, -0.5, -30.0)]
    yield sigmoid_cross_entropy(x, t, reduction="none"), expected
    loss, grad = sigmoid_cross_entropy_value_and_grad(x, t, reduction="sum")
    yield loss, math.fsum(expected)
    yield grad, [-1 / (1 + math.exp(-2)), 0.5, -1 / (1 + math.exp(0.5)), -1 / (1 + math.exp(30))]


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


def _empty(a: Arrays) -> Case:
    yield softmax(a(np.zeros((2, 0)))), np.zeros((2, 0))
    yield logsumexp(a(np.zeros((2, 0))), axis=-1), [-INF, -INF]
    x, t = a(np.zeros((0, 3))), a(np.zeros(0), "int64")
    yield cross_entropy(x, t), NAN
    yield cross_entropy(x, t, reduction="sum"), 0.0


def _infinities(a: Arrays) -> Case:
    x = [[-INF, -INF], [INF, 0.0], [NAN, 1.0], [0.0, 0.0], [-INF, 1.0]]
    expected = [[NAN, NAN], [NAN, NAN], [NAN, NAN], [0.5, 0.5], [0.0, 1.0]]
    yield softmax(a(x)), expected
    yield logsumexp(a(x), axis=-1), [-INF, INF, NAN, math.log(2), 1.0]


def _fully_masked(a: Arrays) -> Case:
    x, mask = a([[NAN, 1.0], [0.0, 0.0]]), a([[False, False], [True, True]], "bool")
    yield softmax(x, where=mask), [[0.0, 0.0], [0.5, 0.5]]
    yield log_softmax(x, where=mask), [[-INF, -INF], [-math.log(2), -math.log(2)]]
    yield logsumexp(x, axis=-1, where=mask), [-INF, math.log(2)]


def _ignored(a: Arrays) -> Case:
    x, t = a([[NAN, INF], [0.0, 0.0]]), a([-1, 0], "int64")
    loss, grad = cross_entropy_value_and_grad(x, t, ignore_index=-1)
    yield loss, math.log(2)
    yield grad, [[0.0, 0.0], [-0.5, 0.5]]
    loss, grad = cross_entropy_value_and_grad(x, a([-1, -1], "int64"), ignore_index=-1)
    yield loss, NAN
    yield grad, [[0.0, 0.0], [0.0, 0.0]]


def _minus_infinity_of_no_probability(a: Arrays) -> Case:
    loss, grad = cross_entropy_value_and_grad(a([-INF, 0.0, 0.0]), a([0.0, 1.0, 0.0]))
    yield loss, math.log(2)
    yield grad, [0.0, -0.5, 0.5]


def _integers(a: Arrays) -> Case:
    """Halves, in the library's default dtype; 127 - (-128) is -1 in int8."""
    answer = softmax(a([127, -128, 127, -128], "int8"))[::2]
    library = libraries.library_of(answer)
    yield library.cast(answer, getattr(library.xp, a.dtype)), [0.5, 0.5]


def _wrong_labels(a: Arrays) -> Case:
    x = a([[0.0, 1.0], [2.0, 3.0]])
    for label in (2, -1):
        t = a([0, label], "int64")
        if a.reads_values(t):
            yield (lambda t=t: cross_entropy(x, t)), Raises(IndexError)
        else:
            yield cross_entropy(x, t, reduction="none"), [math.log1p(math.e), NAN]


def _refused(a: Arrays) -> Case:
    x, t = a([[0.0, 1.0]]), a([0], "int64")
    yield (lambda: softmax(a([True, False], "bool"))), Raises(TypeError)
    yield (lambda: softmax(x, axis=2)), Raises(IndexError)
    yield (lambda: softmax(x, temperature=0.0)), Raises(ValueError)
    yield (lambda: cross_entropy(x, t, reduction="average")), Raises(ValueError)
    yield (lambda: cross_entropy(x, a([True], "bool"))), Raises(TypeError)


CASES: dict[str, Callable[[Arrays], Case]] = {
    "softmax, log_softmax and logsumexp": _three,
    "axes and shapes": _axes,
    "logsumexp with b": _weighted_sum,
    "temperature, where and a sink": _options_of_rows,
    "gradients as functions": _gradients,
    "cross_entropy and its gradient": _losses,
    "cross_entropy with a distribution": _distributions,
    "options of cross_entropy": _options_of_losses,
    "linear_cross_entropy": _linear,
    "online: fold and merge": _parts,
    "logmeanexp and logcumsumexp": _sums,
    "entropy and its gradient": _entropies,
    "kl_divergence and its gradients": _divergences,
    "sigmoid_cross_entropy and its gradient": _yes_or_no,
    "entmax, sparsemax and their loss": _sparse,
    "an empty axis, an empty batch": _empty,
    "infinities and nan": _infinities,
    "a row fully masked by where": _fully_masked,
    "an ignored row that holds nan and inf": _ignored,
    "probability 0 at a logit of -inf": _minus_infinity_of_no_probability,
    "integers are promoted first": _integers,
    "a label out of range": _wrong_labels,
    "arguments that are refused": _refused,
}
