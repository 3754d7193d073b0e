"""What test_jax_sharding runs on 4 devices: sharded calls, and the collectives of compiled ones."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import re
from functools import partial

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import portable_softmax as ps
from portable_softmax import online

COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\w*\("
)
rng = np.random.default_rng(0)
logits = 4 * jnp.asarray(rng.standard_normal((8, 64)), jnp.float32)
labels = jnp.asarray(rng.integers(64, size=8))
loss, grad = ps.cross_entropy_value_and_grad(logits, labels)
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
ROWS, CLASSES = P("d", None), P(None, "d")


def collectives(function, *args):
    """Return the kinds of collectives in the compiled function."""
    found = COLLECTIVE.findall(jax.jit(function).lower(*args).compile().as_text())
    return sorted(found)


def on(mesh, spec):
    """Return the logits and the labels on a mesh."""
    own = P("d") if spec == ROWS else P()
    return jax.device_put(logits, NamedSharding(mesh, spec)), jax.device_put(
        labels, NamedSharding(mesh, own)
    )


CALLS = [
    (ps.cross_entropy, loss, {}),
    (ps.cross_entropy_value_and_grad, (loss, grad), {}),
    (
        partial(ps.cross_entropy, label_smoothing=0.1, z_loss=0.01),
        ps.cross_entropy(logits, labels, label_smoothing=0.1, z_loss=0.01),
        {},
    ),
    (jax.grad(ps.cross_entropy), grad, {}),
    (lambda x, t: ps.logsumexp(x, axis=-1), ps.logsumexp(logits, axis=-1), {"rows": 0}),
    (lambda x, t: ps.log_softmax(x), ps.log_softmax(logits), {"rows": 0}),
]
mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
for function, expected, most in CALLS:
    for spec, limit in ((ROWS, most.get("rows", 1)), (CLASSES, 2)):
        x, t = on(mesh, spec)
        found = collectives(function, x, t)
        assert set(found) <= {"all-reduce"}, (function, spec, found)
        assert len(found) <= limit, (function, spec, found)
        jax.tree.map(close, jax.jit(function)(x, t), expected)

shard_map = partial(jax.shard_map, mesh=mesh)


@partial(shard_map, in_specs=(ROWS, P("d")), out_specs=P())
def of_rows(x, t):
    return lax.pmean(ps.cross_entropy(x, t), "d")


@partial(shard_map, in_specs=(CLASSES, P()), out_specs=P(), check_vma=False)
def of_classes(x, t):
    part = online.fold(x)
    parts = lax.all_gather(jnp.stack(part), "d")
    state = online.merge(*[online.State(*each) for each in parts])
    column = t[:, None] - x.shape[1] * lax.axis_index("d")
    here = (column >= 0) & (column < x.shape[1])
    column = jnp.clip(column, 0, x.shape[1] - 1)
    at_label = jnp.where(here, jnp.take_along_axis(x, column, axis=1), 0.0)
    return jnp.mean(online.cross_entropy(state, lax.psum(at_label, "d")))


for function, spec, most in (
    (of_rows, ROWS, ["all-reduce"]),
    (of_classes, CLASSES, ["all-gather", "all-reduce"]),
):
    x, t = on(mesh, spec)
    assert collectives(function, x, t) == most, collectives(function, x, t)
    close(jax.jit(function)(x, t), loss)
x, t = on(mesh, ROWS)
close(jax.jit(jax.grad(of_rows))(x, t), grad)

# Loops and branches within it: what differs between devices, and what does not, is typed.
hidden, classifier = logits[:, :6], logits[:, 6:12]
linear = partial(ps.linear_cross_entropy, reduction="sum")
given = (hidden, labels % 8)
OWN_PART = (
    lambda x, t: ps.sparsemax(x),
    lambda x, t: ps.entmax(x, alpha=1.3),
    lambda x, t: jax.grad(lambda x: jnp.sum(ps.entmax(x) ** 2))(x),
    lambda x, t: ps.entmax_loss(x, t % 6, reduction="none"),
    lambda x, t: ps.linear_cross_entropy(x, classifier, t, reduction="none", tile=8),
    lambda x, t: jax.grad(linear)(x, classifier, t),
    lambda x, t: ps.linear_cross_entropy_value_and_grad(x, classifier, t, tile=8)[1][0],
)
for function in OWN_PART[:-1]:
    own_part = shard_map(function, in_specs=(ROWS, P("d")), out_specs=P("d"))
    close(jax.jit(own_part)(*given), function(*given))
own_part = shard_map(OWN_PART[-1], in_specs=(ROWS, P("d")), out_specs=P("d"))
close(jax.jit(own_part)(*given) / 4, OWN_PART[-1](*given))  # the mean of a quarter each
summed = shard_map(
    lambda c, x, t: jax.grad(linear, 1)(x, c, t), in_specs=(P(), ROWS, P("d")), out_specs=P()
)
close(jax.jit(summed)(classifier, *given), jax.grad(linear, 1)(hidden, classifier, given[1]))

# A mesh whose shardings are part of the types, which JAX's make_mesh makes by default.
mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
with jax.set_mesh(mesh):
    x, t = on(mesh, ROWS)
    for function, expected, _ in CALLS[:4]:
        assert len(collectives(function, x, t)) <= 1
        jax.tree.map(close, jax.jit(function)(x, t), expected)
print("done")
