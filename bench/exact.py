"""Exact answers in extended precision, and the distance to them in units in the last place.

np.longdouble has 64 bits of significand on x86 and 113 on ARM Linux. With 64, each step adds at
most 2**-11 of a float64 unit, and a shift of 700 at most 0.35: the tests hold this file against
50-digit arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Bits of the significand and the exponent of the smallest normal number.
FORMATS = {
    "float64": (53, -1022),
    "float32": (24, -126),
    "float16": (11, -14),
    "bfloat16": (8, -126),
}


class Exact(NamedTuple):
    """The exact answers for rows of logits, as np.longdouble."""

    softmax: np.ndarray
    log_softmax: np.ndarray
    logsumexp: np.ndarray
    cross_entropy: np.ndarray
    label_gradient: np.ndarray
    """The loss's derivative with respect to the label's own logit."""


def measures(dtype: str) -> bool:
    """Whether np.longdouble is exact enough here to judge `dtype`."""
    return np.finfo(np.longdouble).nmant + 1 >= FORMATS[dtype][0] + 11


def solve(x: np.ndarray, labels: np.ndarray) -> Exact:
    """Answer for rows `x` of shape (rows, classes), with one label per row."""
    x = x.astype(np.longdouble)
    rows = np.arange(x.shape[0])
    top = x.argmax(axis=-1)
    m = x[rows, top][:, None]
    exps = np.exp(x - m)
    exps[rows, top] = 0  # the maximum's own 1 would drown a small remainder
    rest = exps.sum(axis=-1, keepdims=True)
    others = np.where(labels == top, rest[:, 0], 1 + rest[:, 0] - exps[rows, labels])
    exps[rows, top] = 1
    log_y = (x - m) - np.log1p(rest)
    return Exact(
        softmax=exps / (1 + rest),
        log_softmax=log_y,
        logsumexp=(m + np.log1p(rest))[:, 0],
        cross_entropy=-log_y[rows, labels],
        label_gradient=-others / (1 + rest[:, 0]),
    )


def unit(exact: np.ndarray, dtype: str) -> np.ndarray:
    """Return the spacing of the numbers of `dtype` around exact values."""
    bits, lowest = FORMATS[dtype]
    _, exponent = np.frexp(exact)  # exact = significand * 2**exponent, significand in [1/2, 1)
    return np.ldexp(np.longdouble(1), np.maximum(exponent - 1, lowest) - (bits - 1))


def smallest_normal(dtype: str) -> np.longdouble:
    return np.ldexp(np.longdouble(1), FORMATS[dtype][1])
