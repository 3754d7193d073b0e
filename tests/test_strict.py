"""The standard's reference library: every released version of the standard, and a second device.

The table of calls is here because this is what every library must be able to run; the tests of
torch, JAX, Dask and threads run the same calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import portable_softmax as ps

# --------------------------------------------------------------------------- the calls


class Call(NamedTuple):
    """A public function and its arguments; arrays are NumPy's, for `on` to convert."""

    function: Callable[..., Any]
    positional: tuple[np.ndarray, ...]
    keyword: dict[str, Any]

    def on(self, asarray: Callable[[np.ndarray], Any]) -> tuple[Callable[..., Any], list[Any]]:
        """Return the call as a function of its floating arrays alone, and these arrays."""
        given = {**dict(enumerate(self.positional)), **self.keyword}
        arrays = {k: v for k, v in given.items() if isinstance(v, np.ndarray)}
        given.update({k: asarray(v) for k, v in arrays.items()})
        floating = [k for k, v in arrays.items() if v.dtype.kind in "fc"]

        def function(*values: Any) -> Any:
            now = {**given, **dict(zip(floating, values, strict=True))}
            return self.function(
                *(now[k] for k in now if isinstance(k, int)),
                **{k: v for k, v in now.items() if isinstance(k, str)},
            )

        return function, [given[k] for k in floating]

    def outputs(self, asarray: Callable[[np.ndarray], Any]) -> tuple[Any, ...]:
        """Return what the call returns, as a tuple."""
        function, arrays = self.on(asarray)
        return as_tuple(function(*arrays))


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _calls() -> dict[str, Call]:
    rng = np.random.default_rng(0)
    shape = (2, 3, 4)
    x, other = rng.normal(size=(2, *shape))
    x[0, 1] = 0.0  # a row of ties
    weights = rng.uniform(0.5, 1.5, size=4)
    mask = rng.random(shape) < 0.7
    mask[:, :, 0], mask[0, 0] = True, False  # one row is masked as a whole
    labels = np.asarray([[0, 3, 2], [1, 0, 0]])
    inside = np.asarray([[-1, 0, 0], [0, 0, 0]])  # labels that `mask` leaves in
    t = rng.uniform(size=shape)
    one_hot = (np.arange(4) == labels[..., None]).astype(np.int64)

    found = {}

    def call(function: Callable[..., Any], *positional: np.ndarray, **keyword: Any) -> None:
        options = ", ".join(
            k if isinstance(v, np.ndarray) else f"{k}={v}" for k, v in keyword.items()
        )
        kind = {labels.shape: "index", shape: "distribution"}[positional[-1].shape]
        kind = f"{kind} {positional[-1].dtype}: " if "entropy" in function.__name__ else ""
        found[f"{function.__name__}({kind}{options})"] = Call(function, positional, keyword)

    for f in (ps.softmax, ps.log_softmax):
        call(f, x)
        call(f, x, axis=(0, 2))
        call(f, x, axis=None, temperature=0.7)
        call(f, x, where=mask)
        call(f, x, axis=1, where=mask[0], temperature=2.0)
    call(ps.logsumexp, x)
    call(ps.logsumexp, x, axis=(0, 2), keepdims=True)
    call(ps.logsumexp, x, axis=-1, where=mask, return_sign=True)
    call(ps.logsumexp, x, axis=-1, b=t)
    call(ps.logsumexp, x, axis=(1, 2), b=other, where=mask, return_sign=True)
    call(ps.logsumexp, x + 1j * other, axis=1)
    call(ps.logsumexp, x + 1j * other, axis=1, b=other, return_sign=True)
    call(ps.softmax_vjp, t, other, axis=(0, 2))
    call(ps.log_softmax_vjp, x, other, axis=(0, 2))
    call(ps.softmax_jacobian, t, axis=1)
    for f in (ps.cross_entropy, ps.cross_entropy_value_and_grad):
        for target in (labels, t):
            call(f, x, target)
            call(f, x, target, reduction="sum", weight=weights)
            call(f, x, target, reduction="none", label_smoothing=0.1)
            call(f, x, target, z_loss=0.1)
            call(f, x, target, softcap=2.0)
            everything = {"weight": weights, "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 2.0}
            where = {"where": mask, "ignore_index": -1} if target is labels else {"where": mask}
            target = inside if target is labels else t
            call(f, x, target, **where)
            call(f, x, target, **where, **everything)
        call(f, x, labels, ignore_index=0, weight=weights)
        call(f, x, labels, ignore_index=-100, check_labels=False)
        call(f, x, one_hot)
        call(f, np.moveaxis(x, 2, 1), labels, axis=1)
    return found


CALLS = _calls()
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


# --------------------------------------------------------------------------- array-api-strict


@pytest.fixture
def strict(xp):
    """The module array_api_strict, in tests of what only it has."""
    if xp.library != "array_api_strict":
        pytest.skip(f"a test of array_api_strict, this is {xp.name}")
    return xp.xp


VERSIONS = ("2022.12", "2023.12", "2024.12", "2025.12")


@every_call
@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_of_the_standard(strict, xp, version, call):
    # Neither an extension nor a shape that depends on values is asked for.
    flags = {"data_dependent_shapes": False, "enabled_extensions": ()}
    try:
        context = strict.ArrayAPIStrictFlags(api_version=version, **flags)
    except ValueError:
        pytest.skip(f"array_api_strict {strict.__version__} does not know {version}")
    with context:
        actual = call.outputs(xp.from_numpy)
    assert_same(xp, actual, call.outputs(np.asarray))


@every_call
def test_the_second_device_is_never_left(strict, xp, call):
    device = strict.Device("device1")
    actual = call.outputs(lambda a: strict.asarray(a, device=device))
    assert [a.device for a in actual] == [device] * len(actual)
    assert_same(xp, actual, call.outputs(np.asarray))


def test_the_default_dtype_is_that_of_the_device(strict):
    devices = [str(d) for d in strict.__array_namespace_info__().devices()]
    if not any("no_float64" in name for name in devices):
        pytest.skip(f"array_api_strict {strict.__version__} has no device without float64")
    x = strict.asarray([1, 2, 3], dtype=strict.int32, device=strict.Device("no_float64"))
    label = strict.asarray(1, dtype=strict.int32, device=x.device)
    for y in (ps.softmax(x), ps.log_softmax(x), ps.logsumexp(x), ps.cross_entropy(x, label)):
        assert y.dtype == strict.float32
        assert y.device == x.device


def assert_same(xp, actual, expected):
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(xp.numpy(a), e, rtol=1e-13, atol=1e-15)
