"""The standard's reference library: every released version of the standard, and its devices."""

from __future__ import annotations

import numpy as np
import pytest
from calls import every_call

import portable_softmax as ps

pytestmark = pytest.mark.libraries("array_api_strict")


@pytest.fixture
def strict(xp):
    """The module array_api_strict."""
    return xp.xp


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


def assert_same(xp, actual, expected):
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(xp.numpy(a), e, rtol=1e-13, atol=1e-15)
