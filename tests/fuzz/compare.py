"""Judges what a path answered: type, dtype, shape, then each entry."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.backends import Backend
from tests.fuzz.answers import Expected
from tests.fuzz.reference import Answer, L
from tests.fuzz.values import FORMATS


class Verdict:
    """What is wrong, in words, and the worst error in units of the result's last place."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.worst = 0.0
        self.judged = 0
        self.passed_over = 0


def judge(found: Any, expected: Expected, backend: Backend) -> Verdict:
    """Compare the outputs of a call with what they should be."""
    verdict = Verdict()
    outputs = found if isinstance(found, tuple) else (found,)
    if len(outputs) != len(expected.answers):
        verdict.wrong.append(f"{len(outputs)} outputs, expected {len(expected.answers)}")
        return verdict
    for i, (y, answer, dtype) in enumerate(
        zip(outputs, expected.answers, expected.dtypes, strict=True)
    ):
        _one(f"output {i}", y, answer, dtype, backend, verdict)
    return verdict


def _one(name: str, y: Any, answer: Answer, dtype: str, backend: Backend, verdict: Verdict) -> None:
    if not backend.is_ours(y):
        verdict.wrong.append(f"{name} is a {type(y).__name__}")
        return
    native = np.dtype(np.longdouble).name if dtype == "longdouble" else dtype
    if backend.dtype_name(y) != native:
        verdict.wrong.append(f"{name} has dtype {backend.dtype_name(y)}, expected {native}")
        return
    if isinstance(y, np.ndarray) and not y.dtype.isnative:
        verdict.wrong.append(f"{name} is not in native byte order")
    values = backend.numpy(y)
    if values.shape != answer.values.shape:
        verdict.wrong.append(f"{name} has shape {values.shape}, expected {answer.values.shape}")
        return
    if values.dtype.kind == "c":
        _complex(name, values, answer, verdict)
    else:
        _real(name, values, answer, dtype, verdict)


def _complex(name: str, values: np.ndarray, answer: Answer, verdict: Verdict) -> None:
    """Compare complex logarithms, whose imaginary parts may differ by a turn."""
    judged = ~np.isnan(answer.tolerance)
    with np.errstate(all="ignore"):
        difference = values.astype(np.clongdouble) - answer.values
        turns = np.round(difference.imag / (2 * np.pi))
        difference = np.abs(difference - 2j * np.pi * turns)
        wrong = judged & ~(difference <= answer.tolerance + 1e-6 * (turns != 0))
    _report(name, wrong, values, answer, verdict)
    verdict.judged += int(judged.sum())
    verdict.passed_over += int((~judged).sum())


def _real(name: str, values: np.ndarray, answer: Answer, dtype: str, verdict: Verdict) -> None:
    format = FORMATS[dtype]
    with np.errstate(all="ignore"):
        y, e, tolerance = values.astype(L), answer.values.astype(L), answer.tolerance.astype(L)
        judged = ~np.isnan(tolerance)
        size = np.abs(e) + tolerance
        may_overflow = size > format.max * (1 - np.ldexp(L(1), -format.bits - 1))
        right = np.where(
            np.isnan(e),
            np.isnan(y),
            (y == e)
            | (np.abs(y - e) <= tolerance)
            | (may_overflow & np.isinf(y) & (np.sign(y) == np.sign(e)))
            | (may_overflow & (np.abs(y) >= format.max * (1 - np.ldexp(L(8), -format.bits)))
               & (np.sign(y) == np.sign(e))),
        )  # fmt: skip
        finite = judged & np.isfinite(e) & np.isfinite(y) & (np.abs(e) >= format.smallest_normal)
        exponent = np.frexp(np.where(finite, np.abs(e), 1))[1]
        units = np.where(finite, np.abs(y - e) / np.ldexp(L(1), exponent - format.bits), 0)
    _report(name, judged & ~right, values, answer, verdict)
    verdict.worst = max(verdict.worst, float(np.max(units, initial=0)))
    verdict.judged += int(judged.sum())
    verdict.passed_over += int((~judged).sum())


def _report(
    name: str, wrong: np.ndarray, values: np.ndarray, answer: Answer, verdict: Verdict
) -> None:
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        verdict.wrong.append(
            f"{name}{list(at)} is {values[at]!r}, expected {answer.values[at]!r} "
            f"within {float(answer.tolerance[at]):.2g} ({int(wrong.sum())} of {wrong.size} wrong)"
        )
