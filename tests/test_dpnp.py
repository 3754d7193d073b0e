"""What only dpnp has: queues. A result lies on that of its arrays, and two are never mixed."""

from __future__ import annotations

import numpy as np
import pytest

import portable_softmax as ps
from portable_softmax import libraries

pytestmark = pytest.mark.libraries("dpnp")

X = np.asarray([[2.0, 1.0, 0.0], [30.0, 0.0, 0.0]])


def test_arrays_never_leave_their_queue(xp):
    """Neither the one that the tests use nor another one; and not the default of dpnp."""
    for x in (xp.asarray(X), xp.other_device(xp.asarray(X))):
        labels = xp.xp.asarray([0, 0], sycl_queue=x.sycl_queue)
        weight = xp.xp.asarray([1.0, 2.0, 0.5], sycl_queue=x.sycl_queue)
        answers = (
            *(ps.softmax(x), ps.logsumexp(x, axis=1), ps.entmax(x), ps.entropy(x)),
            *ps.cross_entropy_value_and_grad(x, labels, weight=weight, label_smoothing=0.1),
        )
        for y in answers:
            assert y.sycl_queue == x.sycl_queue


def test_another_queue_is_another_device(xp):
    x = xp.asarray(X)
    other = xp.other_device(xp.asarray([0, 0]))
    assert other.sycl_queue != x.sycl_queue
    with pytest.raises(ValueError, match="labels"):
        ps.cross_entropy(x, other)


def test_the_kind_of_device_and_its_widest_dtype(xp):
    library = libraries.library_of(xp.asarray(X))
    x = xp.asarray(X, "float32")
    assert library.device_type(x) == "cpu"
    wide = "float64" if x.sycl_device.has_aspect_fp64 else "float32"
    assert np.dtype(library.wider_dtype(x)).name == wide


def test_masks_and_logits_that_are_reversed_alike(xp):
    """`where` of dpnp 0.20 reads other memory there."""
    mask = np.asarray([[True, True, False], [False, True, True]])
    x, where = (xp.xp.flip(xp.xp.flip(xp.asarray(a)).copy()) for a in (X, mask))
    assert x.strides[1] < 0 > where.strides[1]
    y = xp.numpy(ps.softmax(x, where=where))
    np.testing.assert_allclose(y, ps.softmax(X, where=mask), rtol=1e-14)
