"""Calls with one argument that has to be refused, before anything is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.fuzz.draw import Draw

if TYPE_CHECKING:
    from tests.fuzz.cases import Case

_NUMBERS = {
    "temperature": (0, 0.0, -1.0, np.nan, np.inf, -np.inf, 10**400),
    "label_smoothing": (-0.1, 1.5, np.nan, np.inf, -(10**400)),
    "z_loss": (-1.0, np.inf, np.nan, 10**400),
    "softcap": (0.0, -3, np.inf, np.nan, 10**400),
    "focal_gamma": (-0.5, np.inf, np.nan, 10**400),
    "sink": (np.inf, np.nan, 10**400),
    "reduction": ("avg", None, "MEAN"),
}
_NO_NUMBERS = (True, "1", 1j, (1.0,))


def spoil(draw: Draw, case: Case) -> Case:
    """Replace one argument of a case by one that has to be refused."""
    from tests.fuzz.cases import BINARY, FAMILY, LOSSES, VJPS, Refused

    is_loss, is_binary = case.function in LOSSES, case.function in BINARY
    names = ["dtype"] if is_binary else ["axis", "dtype"]
    if is_loss:
        names += ["label_smoothing", "z_loss", "softcap", "reduction", "labels", "weight"]
        names += ["sample_weight"]
        if case.arrays["labels"].values.shape == case.first.shape:
            names.append("ignore_index")
    elif is_binary:
        names += ["label_smoothing", "focal_gamma", "reduction", "labels"]
    elif case.function in ("softmax", "log_softmax"):
        names += ["temperature"] * 2 + ["sink"]
        case.arrays.pop("sink", None)
    if case.function in VJPS:
        names += ["dy"] * 2
    if not (case.function in (*VJPS, *FAMILY, *BINARY) or case.function == "softmax_jacobian"):
        names.append("where")
    name = draw.one_of(names)
    shape, first = case.first.shape, next(iter(case.arrays))
    case.options.pop("check_labels", None)
    if name in _NUMBERS:
        bad, error = draw.one_of(_NUMBERS[name]), ValueError
        if name != "reduction" and draw.chance() < 0.3:
            bad, error = draw.one_of(_NO_NUMBERS), TypeError
        case.options[name] = bad
    elif name == "axis":
        ndim = len(shape)
        bad, error = draw.one_of((
            (ndim, ValueError), (-ndim - 1, IndexError), (1.0, TypeError), (True, TypeError),
            ("0", TypeError),
        ))  # fmt: skip
        case.options["axis"] = bad
    elif name == "ignore_index":
        case.options[name], error = 0, ValueError
    elif name == "dtype":
        bad = draw.one_of((np.zeros(shape, bool), np.zeros(shape, "complex64")))
        if case.function == "logsumexp":
            bad = np.zeros(shape, bool)
        case.arrays[first] = case.arrays[first]._replace(values=bad)
        name, error = first, TypeError
    elif name == "labels":
        old = case.arrays["labels"].values
        if is_loss and old.shape != shape and draw.chance() < 0.5:
            bad, error = old.astype("float32"), TypeError
        else:
            bad, error = np.zeros((*shape, 2), "int64"), ValueError
        case.arrays["labels"] = case.arrays["labels"]._replace(values=bad, layout="C order")
    else:
        bad, error = {
            "where": (np.ones(shape, "int64"), TypeError),
            "sample_weight": (np.ones((*shape, 2)), ValueError),
            "weight": (np.ones((shape[case.axes[0]] if case.axes else 0) + 1), ValueError),
            "dy": draw.one_of((
                (np.ones((*shape, 2), case.first.dtype), ValueError),
                (np.ones(shape, "int64"), TypeError),
            )),
        }[name]  # fmt: skip
        case.arrays[name] = draw.argument(bad, plain=1.0)
    case.refused = Refused(error, name)
    return case
