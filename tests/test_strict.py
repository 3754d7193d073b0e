"""The standard's reference library: every released version of the standard, and its devices."""

from __future__ import annotations

import numpy as np
import pytest
from calls import CALLS, Call, as_tuple

import portable_softmax as ps

pytestmark = pytest.mark.libraries("array_api_strict")


@pytest.fixture
def strict(xp):
    """The module array_api_strict."""
    return xp.xp


TABLE, HIDDEN, CLASSES = (np.random.default_rng(0).normal(size=(3, n, 4)) for n in (4, 5, 6))
LABELS = np.asarray([0, 5, 2, 3, 0])


def merged(a, b, c, labels):
    """Return every answer of a state that comes in three parts."""
    online = ps.online
    parts = [online.fold(a), online.fold(b, where=b < 1.0), online.identity(a), online.fold(c)]
    state = online.merge(*parts)
    at_label = a[..., :1]
    finished = (online.softmax(a, state), online.log_softmax(b, state), online.logsumexp(state))
    return (*state, *finished, online.cross_entropy(state, at_label))


# What no table of kernels' operations has.
MORE = {
    "online": Call(merged, (*TABLE, LABELS), {}),
    "linear_cross_entropy": Call(
        ps.linear_cross_entropy, (HIDDEN[0], CLASSES[0], LABELS), {"ignore_index": 0}
    ),
    "linear_cross_entropy_value_and_grad(tile)": Call(
        lambda *given, **options: as_tuple(
            ps.linear_cross_entropy_value_and_grad(*given, tile=16, **options)
        )[:3],
        (HIDDEN[1], CLASSES[1], LABELS),
        {"label_smoothing": 0.1, "z_loss": 0.1, "sample_weight": np.arange(5.0)},
    ),
}
every_call = pytest.mark.parametrize("call", [*CALLS.values(), *MORE.values()], ids=[*CALLS, *MORE])

# Asked for 2021.12, array_api_strict itself answers with 2022.12 and a warning.
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


@every_call
@pytest.mark.parametrize("version", VERSIONS[1:])  # before, sums are float64, on any device
@pytest.mark.parametrize("name", ["no_float64", "no_x64"])
def test_a_device_without_64_bits(strict, xp, call, name, version):
    """What is computed in a wider dtype elsewhere is computed in float32 there."""
    narrow = {"float64": np.float32, "int64": np.int32, "complex128": np.complex64}

    def small(a):
        return np.asarray(a).astype(narrow.get(a.dtype.name, a.dtype))

    try:
        device = strict.Device(name)
        context = strict.ArrayAPIStrictFlags(api_version=version)
    except ValueError:
        pytest.skip(f"array_api_strict {strict.__version__} does not know {name} or {version}")
    with context:
        actual = call.outputs(lambda a: strict.asarray(small(a), device=device))
    for a, e in zip(actual, call.outputs(small), strict=True):
        assert a.device == device
        np.testing.assert_allclose(xp.numpy(a), e, rtol=2e-5, atol=2e-6)


def assert_same(xp, actual, expected):
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(xp.numpy(a), e, rtol=1e-13, atol=1e-15)
