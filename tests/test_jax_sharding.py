"""JAX arrays split over four devices, in a process that pretends to have them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("jax_sharded.py")

SETUP = """
import re
import jax, numpy as np
import portable_softmax as ps
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

jax.config.update("jax_enable_x64", True)
assert len(jax.devices()) == 4
mesh = Mesh(np.asarray(jax.devices()), ("devices",))

def put(array, *spec):
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))

def moves(compiled):
    # Whole logits on one device would need one of these; a sum or maximum a row is an all-reduce.
    text = compiled.as_text()
    assert not re.search("callback|infeed|outfeed", text)
    return re.findall(r" (all-gather|all-to-all|collective-permute)(?:-start)?\\(", text)

rng = np.random.default_rng(0)
x, labels = rng.normal(size=(8, 12)), rng.integers(12, size=8)
options = {"label_smoothing": 0.1, "z_loss": 0.01, "reduction": "none"}
"""

VALUES = """
for spec in (("devices", None), (None, "devices")):
    split = put(x, *spec)
    split_labels = put(labels, spec[0])
    for f in (ps.softmax, ps.log_softmax, lambda x: ps.logsumexp(x, axis=1)):
        np.testing.assert_allclose(f(split), f(x), rtol=1e-14, atol=1e-15)
        np.testing.assert_allclose(jax.jit(f)(split), f(x), rtol=1e-14, atol=1e-15)
        assert f(split).sharding.device_set == split.sharding.device_set
    for more in ({}, options):
        expected = ps.cross_entropy_value_and_grad(x, labels, **more)
        f = lambda x, t: ps.cross_entropy_value_and_grad(x, t, **more)
        for actual in (f(split, split_labels), jax.jit(f)(split, split_labels)):
            for a, e in zip(actual, expected):
                np.testing.assert_allclose(a, e, rtol=1e-13, atol=1e-15)
"""

STAYS_SPLIT = """
# A program that must bring a row together is seen to do so.
sort = jax.jit(lambda x: jax.numpy.sort(x, axis=1)).lower(put(x, None, "devices")).compile()
assert moves(sort)

for spec in (("devices", None), (None, "devices")):
    split, split_labels = put(x, *spec), put(labels, spec[0])
    for f in (
        jax.jit(lambda x, t: ps.cross_entropy(x, t)),
        jax.jit(lambda x, t: ps.cross_entropy_value_and_grad(x, t, **options)),
        jax.jit(jax.grad(lambda x, t: ps.cross_entropy(x, t))),
        jax.jit(lambda x, t: ps.log_softmax(x)),
    ):
        assert moves(f.lower(split, split_labels).compile()) == [], spec
    grad = jax.jit(jax.grad(lambda x: ps.cross_entropy(x, split_labels)))(split)
    assert grad.sharding.is_equivalent_to(split.sharding, 2), (spec, grad.sharding)
"""

LABELS = """
split, bad = put(x, "devices", None), put(np.where(np.arange(8) == 5, 12, labels), "devices")
try:
    ps.cross_entropy(split, bad)
except IndexError as error:
    assert "labels[5] is 12" in str(error), error
else:
    raise AssertionError("a label out of range went unnoticed")
loss = jax.jit(lambda x, t: ps.cross_entropy(x, t, reduction="none"))(split, bad)
np.testing.assert_array_equal(np.isnan(loss), np.arange(8) == 5)
"""


@pytest.mark.slow("a process of its own compiles for four devices")
@pytest.mark.parametrize(
    "script", [VALUES, STAYS_SPLIT, LABELS], ids=["values", "stays split", "labels"]
)
def test_on_four_devices(jax, script):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    environment["JAX_PLATFORMS"] = "cpu"
    ran = subprocess.run(
        [sys.executable, "-c", SETUP + script], env=environment, text=True, capture_output=True
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow("another process compiles each call for four devices")
def test_collectives_of_compiled_calls(jax):
    """One all-reduce where the batch is cut and two where the classes are, and the same values."""
    if not (hasattr(jax, "shard_map") and hasattr(jax, "set_mesh")):
        pytest.skip("this version of JAX has no jax.shard_map or jax.set_mesh")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(
        [sys.executable, str(PROGRAM)], env=environment, text=True, capture_output=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "done\n"
