"""JAX on a CPU through the handlers that Numba compiles: which calls, transforms, threads, ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import portable_softmax as ps
from portable_softmax import kernels

pytestmark = [pytest.mark.run_on("jax-numba"), pytest.mark.cheap]

NAME = "numba rows: one pass in cache"


def draw(xp, *shape, dtype="float64", seed=0):
    """Return logits and labels for the last axis."""
    rng = np.random.default_rng(seed)
    x, labels = 3 * rng.standard_normal(shape), rng.integers(shape[-1], size=shape[:-1])
    return xp.asarray(x, dtype), xp.asarray(labels)


# What is not slow here needs one handler: softmax of long rows of float32. Each takes a compiler
# some seconds, once.
ROWS = (7, 300)


def close(found, want):
    import jax

    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        tolerance = {"rtol": 1e-12, "atol": 1e-13}
        if a.dtype == np.float32:
            tolerance = {"rtol": 1e-5, "atol": 1e-6}
        np.testing.assert_allclose(a, b, **tolerance)


def same_bits(found, want):
    import jax

    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# --------------------------------------------------------------------------- which calls


def test_explain_names_the_path_or_why_not(jax, xp):
    (x, t), three = draw(xp, 4, 3), xp.asarray(np.zeros((2, 3, 4)))
    mask, q = x > 0, (x > 0) / 1.0
    everything = {"weight": x[0], "label_smoothing": 0.1, "z_loss": 0.1, "ignore_index": 1}
    for operation, arrays, options in (
        *((name, (x,), {"axis": 1}) for name in ("softmax", "log_softmax", "logsumexp")),
        ("softmax_vjp", (x, x), {}),
        ("cross_entropy", (x, t), {"ignore_index": -1, "reduction": "sum"}),
        ("softmax", (x,), {"temperature": 2.0, "where": mask}),
        ("cross_entropy", (x, t), everything),
        ("cross_entropy", (x, t), {"where": mask, "softcap": 3.0, "sample_weight": x[:, 0] ** 2}),
        ("cross_entropy", (x, q), {"z_loss": 0.1}),
        ("logsumexp", (x,), {"return_sign": True}),
        ("softmax", (xp.asarray(np.arange(3)),), {}),
    ):
        assert kernels.explain(operation, *arrays, **options) == NAME
    for why, operation, arrays, options in (
        ("options: extreme temperature", "softmax", (x,), {"temperature": 1e-300}),
        ("probabilities with weight", "cross_entropy", (x, q), {"weight": x[0]}),
        ("axes apart from each other", "softmax", (three,), {"axis": (0, 2)}),
        ("dtypes: float64 and float32", "softmax_vjp", (x, x.astype("float32")), {}),
    ):
        explained = kernels.explain(operation, *arrays, **options)
        assert not explained.startswith("numba rows")
        assert explained.partition("not numba rows: ")[2].partition("; not ")[0] == why
    seen = []
    jax.vmap(jax.jit(lambda x: seen.append(kernels.explain("logsumexp", x))))(x)
    assert seen == [NAME]


def test_a_small_array_is_left_to_xla_unless_they_are_asked_for(jax, xp):
    large, small = (jax.ShapeDtypeStruct(shape, np.float32) for shape in ((256, 256), (255, 256)))
    symbolic = jax.ShapeDtypeStruct(jax.export.symbolic_shape("a, 256"), np.float32)
    said = []

    def f(x):
        said.append(kernels.explain("softmax", x))
        return x

    with kernels._switches.switched(asked=(), off=()):
        for x in (large, small, symbolic):
            jax.eval_shape(f, x)
    assert said[0] == NAME
    for why, explained in zip(("too few elements", "symbolic shapes"), said[1:], strict=True):
        assert explained.startswith("jax rules: ")
        assert explained.endswith(f"not numba rows: {why}")


def test_the_whole_batch_of_vmap_counts(jax, xp):
    x, said = xp.asarray(np.ones((64, 8, 128), np.float32)), []

    def f(x):
        said.append(kernels.explain("softmax", x))
        return jax.numpy.sum(x)

    for mapped in (
        jax.vmap(f),
        jax.jit(jax.vmap(f)),
        jax.vmap(jax.grad(f)),
        jax.grad(lambda x: jax.vmap(f)(x).sum()),
        jax.vmap(jax.vmap(f, in_axes=1), in_axes=2),
    ):
        del said[:]
        with kernels._switches.switched(asked=(), off=()):
            mapped(x)
            mapped(x[:63])
        assert said[0] == NAME
        assert said[-1].endswith("not numba rows: too few elements")


@pytest.mark.parametrize(
    ("where", "name", "value", "reason"),
    [
        ("_numba._ffi", "API", (0, 99), "handlers those from (0, 99)"),
        ("_numba._ffi", "LAST_API", (0, 2), "handlers those from (0, 3) to (0, 2)"),
        ("_jax._rows", "sys", SimpleNamespace(platform="win32"), "POSIX"),
        ("_jax._rows", "jax", SimpleNamespace(__version__="0.4"), "jax 0.4 has no jax.ffi"),
    ],
)
def test_another_jax_is_left_to_xla(jax, xp, monkeypatch, where, name, value, reason):
    """With another frame, without `jax.ffi`, on Windows: each says so before a handler is made."""
    from portable_softmax.kernels._jax import _rows

    engine, why = "portable_softmax.kernels._numba", _rows._no_handlers.__wrapped__
    assert why(engine) == ""
    monkeypatch.setattr(f"portable_softmax.kernels.{where}.{name}", value)
    assert reason in why(engine)


@pytest.mark.slow("XLA compiles each program in two ways")
def test_only_programs_for_one_cpu_call_a_handler(jax, xp):
    x, _ = draw(xp, *ROWS, dtype="float32")
    f = jax.jit(lambda x: ps.softmax(x))
    assert called(f, x) == ["softmax"]
    for platform in ("cuda", "tpu"):
        assert "custom_call" not in f.trace(x).lower(lowering_platforms=(platform,)).as_text()
    exported = jax.export.export(f)(x)
    assert "custom_call" not in exported.mlir_module()
    close(exported.call(x), f(x))


def called(f, *arrays):
    """Return the handlers of a program."""
    import jax

    text = jax.jit(f).lower(*arrays).as_text()
    return sorted(re.findall(r"portable_softmax\.ffi\.(\w+)", text))


@pytest.mark.slow("two compilers work on each of its handlers")
def test_each_relative_is_a_handler_on_one_cpu_alone(jax, xp):
    x, y = (draw(xp, 40, 300, dtype="float32", seed=seed)[0] for seed in (0, 1))
    mean = partial(ps.logmeanexp, axis=1)
    for f, handler in (
        (lambda x, y: ps.kl_divergence(x, y), "kl_divergence"),
        (lambda x, y: ps.kl_divergence_value_and_grad(x, y), "kl_divergence_value_and_grad"),
        (jax.grad(ps.kl_divergence), "kl_divergence_value_and_grad"),
        (jax.grad(ps.kl_divergence, 1), "kl_divergence_by_q"),
        (lambda x, _: ps.entropy(x), "entropy"),
        (lambda x, _: jax.vjp(ps.entropy, x)[1](x[:, 0]), "entropy_value_and_grad"),
        (lambda x, _: mean(x), "fold"),
        (jax.grad(lambda x, _: mean(x).sum()), "logsumexp_vjp"),
        (lambda x, _: jax.vjp(ps.logcumsumexp, x)[1](x), "logcumsumexp_vjp"),
    ):
        assert called(f, x, y) == [handler]
    f = jax.jit(lambda x, y: (ps.kl_divergence(x, y), ps.entropy(x), ps.logcumsumexp(x)))
    assert "custom_call" not in jax.export.export(f)(x, y).mlir_module()


def test_logsumexp_and_its_gradient_are_one_handler(jax, xp):
    """XLA multiplies the slopes, in forward mode too, but for those of a small array."""
    x, _ = draw(xp, 700, 200, dtype="float32")
    f, dy = partial(ps.logsumexp, axis=1), jax.numpy.arange(x.shape[0], dtype=x.dtype)
    for derivative in (
        lambda x: jax.vjp(f, x)[1](dy),
        jax.grad(lambda x: jax.numpy.sum(f(x) ** 2)),
        lambda x: jax.jvp(f, (x,), (x,)),
    ):
        assert called(derivative, x) == ["logsumexp_value_and_grad"]
    assert called(lambda x: jax.vjp(f, x)[1](dy[:70]), x[:70]) == ["logsumexp_vjp"]


def over(f, *arrays):
    """Return which handlers of a compiled program write over the array that they are given."""
    import jax

    lines = jax.jit(f).lower(*arrays).compile().as_text().splitlines()
    found = [re.search(r"portable_softmax\.ffi\.(\w+)", line) for line in lines]
    return {m[1]: "output_to_operand" in line for m, line in zip(found, lines, strict=True) if m}


@pytest.mark.slow("several programs")
def test_an_answer_is_written_over_what_the_program_has_made(jax, xp):
    """XLA would copy an array that it is given, or a view of one."""
    x, _ = draw(xp, *ROWS, dtype="float32")
    v = jax.numpy.asarray(draw(xp, 300, 300, dtype="float32")[0])
    for softmax in (ps.softmax, ps.log_softmax):
        name = softmax.__name__
        for made in (lambda x: x * 2 + 1, lambda x: x @ v):
            assert over(lambda x, softmax=softmax, made=made: softmax(made(x)), x) == {name: True}
            close(jax.jit(lambda x: softmax(made(x)))(x), softmax(made(x)))  # noqa: B023
        for given in (lambda x: x, lambda x: x.reshape(1, 7, 300)):
            found = over(lambda x, softmax=softmax, given=given: softmax(given(x)), x)
            assert found == {name: False}


@pytest.mark.slow("several programs, and handlers of their own")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "axis"), [((70, 10), 1), ((70, 3), 1), ((7, 300), 0)])
def test_what_is_written_over_is_right_in_every_layout(jax, xp, shape, axis, dtype):
    """Of each layout and dtype two operations, so that each operation meets each of both."""
    x = draw(xp, *shape)[0].astype(dtype)
    dy = draw(xp, *shape, seed=1)[0].astype(dtype)
    first = (dtype == "bfloat16") == (shape == (70, 3))
    softmax = ps.softmax if first else ps.log_softmax
    f = partial(softmax, axis=axis)
    assert over(lambda x: f(x * 2), x) == {softmax.__name__: True}
    same_bits(jax.jit(lambda x: f(x * 2))(x), f(x * 2))
    vjp = ps.log_softmax_vjp if first else ps.softmax_vjp
    g = partial(vjp, axis=axis)
    assert over(lambda y, dy: g(y, dy * 2), x, dy) == {vjp.__name__: True}
    same_bits(jax.jit(lambda y, dy: g(y, dy * 2))(x, dy), g(x, dy * 2))


@pytest.mark.slow("several programs")
def test_what_is_kept_is_not_written_over(jax, xp):
    """A gradient is written over its upstream alone.

    The memory of logits whose softmax is kept is better given to what comes next.
    """
    x, _ = draw(xp, *ROWS, dtype="float32")

    def f(x):
        return jax.numpy.sum(ps.softmax(x * 2) ** 2)

    assert over(jax.grad(f), x) == {"softmax": False, "softmax_vjp": True}
    close(jax.jit(jax.grad(f))(x), jax.grad(f)(x))

    def read_again(x):
        made = x * 2 + 1
        return ps.softmax(made), made, ps.log_softmax(made)

    made = x * 2 + 1
    same_bits(jax.jit(read_again)(x), (ps.softmax(made), made, ps.log_softmax(made)))


# --------------------------------------------------------------------------- transforms


def every_operation(x, t):
    """Return the answers of all operations, so that one program has them all."""
    found = {
        "softmax": ps.softmax(x),
        "log_softmax": ps.log_softmax(x),
        "across": ps.softmax(x, axis=0),
        "logsumexp": ps.logsumexp(x, axis=1),
        "softmax_vjp": ps.softmax_vjp(x, x + 1),
        "log_softmax_vjp": ps.log_softmax_vjp(x, x + 1),
    }
    for reduction in ("none", "sum", "mean"):
        for ignore in (None, 3):
            options = {"reduction": reduction, "ignore_index": ignore}
            found[f"loss, {options}"] = ps.cross_entropy(x, t, **options)
            found[f"gradient, {options}"] = ps.cross_entropy_value_and_grad(x, t, **options)
    return found


def options(x, t):
    """Return losses and gradients with everything that multiplies, masks or caps their terms."""
    import jax

    n, jnp = x.shape[-1], jax.numpy
    weight, samples = jnp.linspace(0.0, 2.0, n), jnp.linspace(0.0, 2.0, x.shape[0])
    one_hot = jax.nn.one_hot(t, n, dtype=x.dtype)
    few, q = jnp.arange(n) % 3 != 1, 0.9 * one_hot + 0.02
    mask = few | (one_hot > 0)
    found = {
        "softmax": ps.softmax(x, temperature=0.7, where=mask),
        "across": ps.log_softmax(x, axis=0, temperature=3.0),
        "log_softmax": jnp.where(few, ps.log_softmax(x, where=few), 0.0),  # few for each row
        "logsumexp": ps.logsumexp(x, axis=-1, where=few),
    }
    for labels, given in (
        (t, {"weight": weight, "reduction": "none"}),
        (t, {"label_smoothing": 0.1, "weight": weight, "z_loss": 0.01, "ignore_index": 3}),
        (t, {"where": mask, "softcap": 3.0, "sample_weight": samples, "ignore_index": 3}),
        (t, {"sample_weight": samples, "reduction": "sum"}),
        (t, {"softcap": 3.0, "reduction": "none"}),
        (q, {"reduction": "none"}),
        (q, {"reduction": "sum", "z_loss": 0.01}),
    ):
        kind = f"{labels.ndim}, {[*given]}"
        found[f"loss, {kind}"] = ps.cross_entropy(x, labels, **given)
        found[f"gradient, {kind}"] = ps.cross_entropy_value_and_grad(x, labels, **given)
    return found


def family(x, _):
    """Return the answers of all operations, so that one program has them all."""
    y = x[::-1] / 2
    found = {
        "entropy": ps.entropy(x),
        "entropy and gradient": ps.entropy_value_and_grad(x, axis=0),
        "each divergence": ps.kl_divergence(x, y, axis=0, reduction="none"),
        "logcumsumexp": ps.logcumsumexp(x, axis=0),
        "logmeanexp": ps.logmeanexp(x, axis=1),
        "weighted logsumexp": ps.logsumexp(x, axis=1, b=y + 4, return_sign=True),
        "masked logmeanexp": ps.logmeanexp(x, axis=0, where=y < 1),
        "logcumsumexp_vjp": ps.logcumsumexp_vjp(x, y),
    }
    for options in ({}, {"temperature": 2.0, "distillation": True, "reduction": "sum"}):
        found[f"divergence, {[*options]}"] = ps.kl_divergence(x, y, **options)
        found[f"gradients, {[*options]}"] = ps.kl_divergence_value_and_grad(y, x, **options)
    found["binary loss"] = ps.sigmoid_cross_entropy(x, y > 0)
    found["binary gradient"] = ps.sigmoid_cross_entropy_value_and_grad(x, y > 0, reduction="sum")
    found["beside a sink"] = ps.softmax(x, sink=y[:, :1])
    found["logarithms beside a sink"] = ps.log_softmax(x, axis=0, sink=0.5)
    return found


def summed(jax, tree):
    return sum(jax.numpy.sum(jax.numpy.sin(leaf)) for leaf in jax.tree.leaves(tree))


def transforms(jax):
    """Functions of an operation on logits and labels, and of both."""

    def of(f):
        return lambda x, t: summed(jax, f(x, t))

    def batched(f, axis):
        return lambda x, t: jax.vmap(f, in_axes=(axis, None))(
            jax.numpy.stack([x, 2 * x, x - 1], axis=axis), t
        )

    return {
        "jit": lambda f: f,
        "grad": lambda f: jax.grad(of(f)),
        "jvp": lambda f: lambda x, t: jax.jvp(lambda x: f(x, t), (x,), (jax.numpy.cos(x),)),
        "vmap": lambda f: batched(f, 0),
        "vmap of grad": lambda f: batched(jax.grad(of(f)), 2),
        "grad of vmap": lambda f: jax.grad(of(batched(f, 1))),
        "hessian": lambda f: (
            lambda x, t: jax.jvp(jax.grad(lambda x: of(f)(x, t)), (x,), (jax.numpy.cos(x),))[1]
        ),
        "checkpoint": lambda f: jax.grad(of(jax.checkpoint(f))),
        "scan": lambda f: jax.grad(
            lambda x, t: jax.lax.scan(
                lambda c, _: (c + 0.01 * jax.numpy.sin(summed(jax, f(c, t))), None), x, None, 3
            )[0].sum()
        ),
    }


@pytest.mark.parametrize("name", ["jit", "grad"])
def test_transforms_of_softmax(jax, xp, name):
    check(jax, xp, name, lambda x, _: ps.softmax(x), *draw(xp, *ROWS, dtype="float32"))


TRANSFORMS = ("jit", "grad", "jvp", "vmap", "vmap of grad", "grad of vmap", "hessian")


@pytest.mark.slow("two compilers work on all operations")
@pytest.mark.parametrize("name", [*TRANSFORMS, "checkpoint", "scan"])
def test_transforms_of_every_operation(jax, xp, name):
    check(jax, xp, name, every_operation, *draw(xp, 6, 5))


@pytest.mark.slow("two compilers work on all options")
@pytest.mark.parametrize("f", [options, family])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_with_options(jax, xp, name, f):
    check(jax, xp, name, f, *draw(xp, 6, 5))


def check(jax, xp, name, f, x, t):
    """Compare with what XLA answers alone."""
    transform = transforms(jax)[name]
    found = xp.program(transform(lambda x, t: f(x, t)))(x, t)
    with kernels.without("numba rows"):
        want = xp.program(transform(lambda x, t: f(x, t)))(x, t)
    close(found, want)


@pytest.mark.slow("two compilers work on several handlers")
def test_a_batch_of_what_belongs_to_rows(jax, xp):
    """Logits, labels, masks and weights: each batched, or the same for the whole batch."""
    x, t = draw(xp, 3, 6, 5)
    mask = jax.numpy.abs(x) < 3
    samples = jax.numpy.abs(x[..., 0])
    grad = ps.cross_entropy_value_and_grad
    for f, arrays in (
        (lambda x, t: grad(x, t, ignore_index=0), (x, t)),
        (lambda x, mask: ps.softmax(x, where=mask), (x, mask)),
        (lambda x, mask: ps.logsumexp(x, axis=-1, where=mask), (x, mask)),
        (lambda x, b: ps.logsumexp(x, axis=-1, b=b, return_sign=True), (x, x[:, 1])),
        (lambda x, w: grad(x, t[0], sample_weight=w), (x, samples)),
        (lambda x, w: grad(x, t[0], sample_weight=w, reduction="sum", softcap=2.0), (x, samples)),
    ):
        for some in ((0, 0), (0, None), (None, 0)):
            given = [a if i == 0 else a[0] for a, i in zip(arrays, some, strict=True)]
            found = jax.vmap(f, in_axes=some)(*given)
            each = [
                f(*[a if i == 0 else b[0] for a, b, i in zip(part, arrays, some, strict=True)])
                for part in zip(*arrays, strict=True)
            ]
            close(found, jax.tree.map(lambda *parts: np.stack(parts), *each))
    # A batch of batches, of which the mask has the outer one only.
    many = jax.numpy.stack([x, x + 1])
    found = jax.vmap(lambda x, m: jax.vmap(lambda x: ps.softmax(x, where=m))(x))(many, mask[:2])
    close(found, jax.nn.softmax(many, where=mask[:2, None]))


@pytest.mark.slow("two compilers work on a handler")
def test_a_batch_of_weights_is_left_to_xla(jax, xp):
    x, t = draw(xp, 6, 5)
    weights = jax.numpy.asarray(np.random.default_rng(1).random((2, 5)))
    f = jax.jit(jax.vmap(lambda w: ps.cross_entropy(x, t, weight=w)))
    assert "custom_call" not in f.lower(weights).as_text()
    close(f(weights), np.stack([ps.cross_entropy(x, t, weight=w) for w in weights]))


@pytest.mark.slow("two compilers work on two handlers")
def test_derivatives_of_weights_and_distributions(jax, xp):
    x, t = draw(xp, 6, 5)
    q = jax.nn.softmax(x[::-1])
    for f, at in (
        (lambda q: ps.cross_entropy(x, q, z_loss=0.1), q),
        (lambda w: ps.cross_entropy(x, t, weight=w, label_smoothing=0.1), q[0]),
        (lambda w: ps.cross_entropy(x, t, sample_weight=w, reduction="sum"), q[:, 0]),
    ):
        found = xp.grad(f)(at)
        with kernels.without("numba rows"):
            close(found, xp.grad(f)(at))


@pytest.mark.slow("two compilers work on a handler")
def test_no_temperature_is_compiled_in(jax, xp):
    from portable_softmax.kernels._jax import _rows

    x, _ = draw(xp, 6, 5)
    ps.softmax(x, temperature=2.0)
    before = _rows._compiled._cache_size()
    for temperature in (0.5, 3.0, 1e9):
        y = ps.softmax(x, temperature=temperature)
        close(y, jax.nn.softmax(x / temperature))
    assert _rows._compiled._cache_size() == before


def test_an_empty_batch_has_no_rows(jax, xp):
    found = jax.vmap(ps.softmax)(xp.asarray(np.zeros((0, *ROWS)), "float32"))
    assert found.shape == (0, *ROWS)


@pytest.mark.slow("two compilers work on two handlers, for each dtype of labels")
def test_a_label_without_a_class_is_nan_where_nobody_can_look(jax, xp):
    x, _ = draw(xp, 4, 3)
    f = jax.jit(lambda x, t: ps.cross_entropy_value_and_grad(x, t, reduction="none"))
    for dtype, wrong in (("int32", -1), ("int64", 2**32), ("uint8", 255), ("uint32", 2**32 - 1)):
        loss, grad = f(x, xp.asarray(np.asarray([0, 1, wrong, 2]), dtype))
        for found in (np.asarray(loss)[:, None], np.asarray(grad)):
            assert np.isnan(found).any(axis=1).tolist() == [False, False, True, False], dtype


# --------------------------------------------------------------------------- bits and threads

LARGE = (5000, 300)  # more than one piece


def softmax(x, t):
    return ps.softmax(x)


def two_operations(x, t):
    return ps.log_softmax(x), ps.cross_entropy_value_and_grad(x, t)


@pytest.mark.parametrize(
    "f",
    [softmax, pytest.param(two_operations, marks=pytest.mark.slow("two compilers, two handlers"))],
)
def test_the_same_call_gives_the_same_bits(jax, xp, f):
    x, t = draw(xp, *LARGE, dtype="float32")
    compiled = jax.jit(f)
    want = compiled(x, t)
    same_bits(f(x, t), want)
    for _ in range(20):
        same_bits(compiled(x, t), want)
    if f is softmax:  # nor do the rows beside a row count
        same_bits(f(x[:7], t), want[:7])


def soak(jax, xp, f, shapes, calls, threads=8):
    """Call from several threads, several shapes in turn; return what was wrong."""
    given = [draw(xp, *shape, dtype="float32", seed=i) for i, shape in enumerate(shapes)]
    f = jax.jit(f)
    assert "portable_softmax.ffi" in f.lower(*given[0]).as_text()
    want = [[np.asarray(a) for a in jax.tree.leaves(f(*arrays))] for arrays in given]
    wrong: list[object] = []

    def work(first):
        try:
            with kernels.use("numba rows"):
                for i in range(calls // threads):
                    at = (i + first) % len(given)
                    found = jax.tree.leaves(f(*given[at]))
                    if not all(map(np.array_equal, found, want[at])):
                        wrong.append((first, i))
        except BaseException as error:
            wrong.append(error)

    every = [threading.Thread(target=work, args=(k,)) for k in range(threads)]
    for thread in every:
        thread.start()
    for thread in every:
        thread.join()
    return wrong


def test_calls_from_several_threads(jax, xp):
    assert soak(jax, xp, softmax, (ROWS, LARGE), 80) == []


@pytest.mark.slow("20,000 calls from 8 threads")
def test_soak(jax, xp):
    shapes = ((3, 5), (512, 64), (9000, 16), (7, 60000), LARGE)
    assert soak(jax, xp, two_operations, shapes, 20_000) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": lambda plan: plan[:3]}, "another plan"),
        ({"plan": lambda plan: plan.astype(np.int32)}, "another plan"),
        ({"plan": np.zeros_like}, "another call frame"),
        ({"other": np.zeros_like}, "another call frame"),
        ({"shape": (3, 3)}, "another buffer"),
        ({"dtype": "int64"}, "another buffer"),
    ],
)
def test_what_was_not_planned_is_an_error(jax, xp, change, message):
    """The handler looks at all it is given before it works; the process goes on."""
    from portable_softmax.kernels._jax import _lowering
    from portable_softmax.kernels._numba import _driver, _ffi

    x, _ = draw(xp, *ROWS, dtype="float32")
    ps.softmax(x)  # registers the handler
    buffers = {"x": x, "out": x}
    target = _ffi.target(_lowering.register, "softmax", _driver.Layout(*ROWS, 1), buffers, None)
    changed = {k: f(target.plan) if callable(f) else f for k, f in change.items()}
    attributes = {"plan": target.plan, **changed}
    like = jax.ShapeDtypeStruct(attributes.pop("shape", x.shape), attributes.pop("dtype", x.dtype))
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"portable_softmax: {message}"):
        jax.block_until_ready(jax.ffi.ffi_call(target.name, like)(x, **attributes))
    close(ps.softmax(x), jax.nn.softmax(x))


@pytest.mark.slow("Numba compiles three handlers")
def test_xlas_threads_help_with_less_than_numpys(jax, xp):
    """They look for work before they sleep."""
    from portable_softmax.kernels._jax import _lowering
    from portable_softmax.kernels._numba import _driver, _frame
    from portable_softmax.kernels._numba._ffi import Loss, target

    def handled(operation, rows, n=64):
        like = jax.ShapeDtypeStruct((rows, n), np.float32)
        layout, buffers = _driver.Layout(rows, n, 1), {"x": like, "out": like}
        plan = target(_lowering.register, operation, layout, buffers, None).plan
        return plan[_frame.PIECES], plan[_frame.HELPERS]

    def of_numpy(operation, rows, n=64):
        given = np.dtype(np.float32), np.dtype(np.float32)
        return _driver.plan(operation, _driver.Layout(rows, n, 1), *given).pieces

    for operation in ("softmax", "log_softmax"):
        pieces, helpers = zip(*(handled(operation, 1 << k) for k in range(8, 19)), strict=True)
        assert pieces[0] == of_numpy(operation, 1 << 12) == 1
        assert pieces[4] > helpers[4] > 1
        assert sorted(pieces) == list(pieces)
        assert sorted(helpers) == list(helpers)
        assert of_numpy(operation, 1 << 18) == pieces[-1] > 15
        # There is more to do for each entry.
        assert of_numpy(operation, 1 << 16, n=2) > 1
        assert handled(operation, 1 << 13, n=2)[0] > 1
    assert of_numpy("entropy", 1 << 12) > 1
    layout, like = _driver.Layout(1 << 16, 1, 1), jax.ShapeDtypeStruct((1 << 16,), np.float32)
    buffers, loss = (
        {"x": like, "second": like, "out": like},
        Loss(True, True, False, None, 1.0, False, False),
    )
    plan = target(_lowering.register, "sigmoid_cross_entropy", layout, buffers, loss).plan
    worth = _driver.worth("sigmoid_cross_entropy", 1 << 16, True)  # its logits are no few classes
    assert plan[_frame.HELPERS] == 2 * (1 << 18) // worth


def test_a_large_result_comes_in_large_pages(jax, xp):
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not pages.exists() or "[never]" in pages.read_text():
        pytest.skip("no large pages here")
    import resource

    x, _ = draw(xp, 5000, 3000, dtype="float32")  # which malloc gives back to the system
    f = jax.jit(ps.softmax)

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        jax.block_until_ready(f(x))
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert min(faults() for _ in range(10)) < x.nbytes / resource.getpagesize() / 4


# --------------------------------------------------------------------------- processes

BEGIN = """
import os, sys, numpy as np, jax
import portable_softmax as ps
x = jax.numpy.asarray(np.random.default_rng(0).standard_normal((5000, 300), np.float32))
t = jax.numpy.zeros(5000, "int32")
step = jax.jit(lambda x: ps.cross_entropy_value_and_grad(x, t))
assert "portable_softmax.ffi" in step.lower(x).as_text()

def check():
    loss, grad = step(x)
    want = jax.value_and_grad(lambda x: -jax.nn.log_softmax(x)[:, 0].mean())(x)
    np.testing.assert_allclose(loss, want[0], rtol=1e-5)
    np.testing.assert_allclose(grad, want[1], rtol=1e-4, atol=1e-9)
"""

ENDS = {
    # Two calls at once in a pool of one thread: neither waits for a task in the queue.
    "one core": """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    for done in [pool.submit(check) for _ in range(40)]:
        done.result()
""",
    "leaving with calls in flight": """
check()
for _ in range(40):
    step(x)
""",
    "spawned": """
import multiprocessing
if __name__ == "__main__":
    check()
    context = multiprocessing.get_context("spawn")
    every = [context.Process(target=check) for _ in range(2)]
    for process in every: process.start()
    for process in every: process.join()
    assert [process.exitcode for process in every] == [0, 0]
""",
    "forked before the first call": """
pid = os.fork()
check()
if pid:
    assert os.waitpid(pid, 0)[1] == 0
""",
    "memory stays": """
def peak():  # in KiB; ru_maxrss would begin with the memory of the process that started this one
    status = open("/proc/self/status").read().split("VmHWM:")[1]
    return int(status.split()[0])
for _ in range(200): jax.block_until_ready(step(x))
before = peak()
for _ in range(2000): jax.block_until_ready(step(x))
assert peak() - before < 20_000, (before, peak())
""",
}


def run(program, *, cache=None, **more):
    """Run a program that takes the handlers, and return what it prints, line by line."""
    environment = {**os.environ, "PORTABLE_SOFTMAX_KERNELS": "numba rows", "JAX_PLATFORMS": "cpu"}
    if cache is not None:
        environment["NUMBA_CACHE_DIR"] = str(cache)
    environment = {k: v for k, v in {**environment, **more}.items() if v is not None}
    program = ["-c", program] if isinstance(program, str) else [program]
    ran = subprocess.run(
        [sys.executable, *program], env=environment, text=True, capture_output=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


@pytest.mark.slow("each is a process, or more, of its own")
@pytest.mark.parametrize("name", ENDS)
def test_processes(jax, tmp_path, name):
    begin = BEGIN
    if name == "one core":  # before XLA counts them
        begin = "import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" + BEGIN
    if name == "forked before the first call":  # XLA's threads do not live on in a child
        begin = BEGIN.replace("x = jax", "pid = os.fork()\nx = jax")
    script = tmp_path / "script.py"
    script.write_text(begin + ENDS[name].replace("pid = os.fork()\n", "") + "\nprint('end')\n")
    assert "end" in run(script)


HALF_TYPE_LOSSES = {
    "mean": {},
    "none": {"reduction": "none"},
    "ignored": {"reduction": "sum", "ignore_index": 2},
    "mean of weights": {"weight": [0.5, 2.0, 0.0, 1.0, 3.0], "ignore_index": 1},
    "positions": {"sample_weight": [0.0, 1.0, 0.3, 2.0, 0.0, 1.5], "z_loss": 0.1, "softcap": 5.0},
    "smoothed": {"label_smoothing": 0.1},
    "first axis": {"axis": 0},
}


@pytest.mark.slow("two compilers work on several handlers")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, "bfloat16" if n == "first axis" else "float16") for n in HALF_TYPE_LOSSES],
)
def test_the_gradient_through_a_half_types_loss_is_rounded_once(jax, xp, name, dtype):
    """It is multiplied by what comes from upstream before."""
    options = {
        k: jax.numpy.asarray(v, "float32") if k.endswith("weight") else v
        for k, v in HALF_TYPE_LOSSES[name].items()
    }
    x, t = draw(xp, 6, 5, dtype="float32")
    x, t = (3 * x).astype(dtype), t[:5] if name == "first axis" else t

    def pulled_back(x, dy):
        y, pull = jax.vjp(lambda x: ps.cross_entropy(x, t, **options), x)
        return pull(dy.astype(y.dtype))[0]

    dy = jax.numpy.asarray([0.7, -1.3, 2.1, 0.1, 0.9, -0.4])
    dy = (dy if name == "none" else dy[0]).astype(dtype)
    program = jax.jit(pulled_back).lower(x, dy)
    assert ("ffi.cross_entropy" in program.as_text()) == (name != "smoothed")
    found = program.compile()(x, dy)
    with kernels.portable():
        exact = np.asarray(xp.program(pulled_back)(x.astype("float64"), dy.astype("float64")))
    assert found.dtype == x.dtype
    info = jax.numpy.finfo(dtype)
    unit = np.maximum(np.abs(exact) * float(info.eps), float(info.smallest_subnormal))
    assert np.all(np.abs(np.asarray(found, np.float64) - exact) <= 0.51 * unit)
    many = jax.vmap(pulled_back, in_axes=(0, None))(jax.numpy.stack([x, x / 2]), dy)
    np.testing.assert_array_equal(many[0], found)


@pytest.mark.slow("two compilers work on several handlers")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_upstream_gradient_of_0_ignores_no_row(jax, xp, dtype):
    x, t = draw(xp, 4, 5, dtype=dtype)
    x, t = x.at[1, 2].set(jax.numpy.nan).at[2, 0].set(jax.numpy.nan), t.at[2].set(-1)

    def pulled_back(x):
        loss = lambda x: ps.cross_entropy(x, t, ignore_index=-1, reduction="none")  # noqa: E731
        return jax.vjp(loss, x)[1](jax.numpy.zeros(4, dtype))[0]

    want = np.zeros((4, 5))
    want[1] = np.nan
    np.testing.assert_array_equal(jax.jit(pulled_back)(x), want)
    with kernels.without("numba rows"):
        np.testing.assert_array_equal(pulled_back(x), want)


def test_explain_says_whose_gradient_is_xlas(jax, xp):
    x, t = draw(xp, 7, 300, dtype="float16")
    said = f"{NAME}; its gradient is left to XLA: weights"
    assert kernels.explain("logsumexp", x, b=x, return_sign=True) == said
    said = f"{NAME}; its gradient is left to XLA: float16 and soft labels"
    for labels, options in ((x, {}), (t, {"label_smoothing": 0.1})):
        assert kernels.explain("cross_entropy", x, labels, **options) == said
        single = x.astype("float32")
        labels = labels.astype("float32") if labels is x else labels
        assert kernels.explain("cross_entropy", single, labels, **options) == NAME
    assert kernels.explain("cross_entropy", x, t) == NAME
    assert kernels.explain("cross_entropy_value_and_grad", x, x) == NAME


@pytest.mark.slow("two compilers work on a handler")
def test_a_half_types_gradient_is_rounded_once_under_vmap(jax, xp):
    """Each batch has a divisor of its own: its gradient is divided before it is rounded."""
    x, _ = draw(xp, 5, 30, dtype="float16")
    labels = np.random.default_rng(1).integers(3, size=(4, 5))
    f = jax.vmap(lambda t: ps.cross_entropy_value_and_grad(x, t, ignore_index=0)[1])
    for grad, t in zip(np.asarray(f(xp.asarray(labels))), labels, strict=True):
        _, exact = ps.cross_entropy_value_and_grad(np.asarray(x, np.float64), t, ignore_index=0)
        unit = np.spacing(np.abs(exact).astype(np.float16)).astype(np.float64)
        assert np.all(np.abs(grad - exact) <= 0.51 * unit)


COUNTED_ANEW = """
import itertools
import jax, numpy as np
from numba.core.bytecode import FunctionIdentity
import portable_softmax as ps
x = np.random.default_rng(0).standard_normal((7, 300)).astype(np.float32)
ps.kernels.explain("softmax", x)
for function in (ps.softmax, ps.log_softmax):
    FunctionIdentity._unique_ids = itertools.count(10_000)
    function(x)
np.testing.assert_array_equal(ps.softmax(jax.numpy.asarray(x)), ps.softmax(x))
"""


@pytest.mark.slow("a fresh process compiles two kernels and a handler")
def test_kernels_that_two_processes_have_compiled_are_told_apart(jax, tmp_path):
    """Numba counts functions anew in each process, and names their machine code by the count."""
    run(COUNTED_ANEW, cache=tmp_path)


ANOTHER_VERSION = """
import importlib
import jax
module = importlib.import_module({module!r})
delattr(module, {name!r})
from portable_softmax import kernels, softmax
x = jax.numpy.ones((300, 300))
print(kernels.explain("softmax", x))
print(round(float(softmax(x).sum())))
"""


@pytest.mark.slow("a fresh process for each of them")
@pytest.mark.parametrize(
    ("module", "name", "reason"),
    [
        ("jax.interpreters.batching", "primitive_batchers", "_jax._rows cannot be imported"),
        ("jax.interpreters.mlir", "register_lowering", "_jax._rows cannot be imported"),
        ("numba.core.ccallback", "CFunc", "_numba._ffi cannot be imported"),
    ],
)
def test_without_a_private_name_the_rules_answer(jax, module, name, reason):
    program = ANOTHER_VERSION.format(module=module, name=name)
    explained, total = run(program, PORTABLE_SOFTMAX_KERNELS=None)
    assert explained.startswith("jax rules: ")
    assert f"not numba rows: portable_softmax.kernels.{reason}: " in explained
    assert name in explained
    assert total == "300"


@pytest.mark.slow("a fresh process compiles a handler")
def test_handlers_work_without_a_cache(jax, tmp_path):
    """As where another version of Numba lacks a class of its cache."""
    program = ANOTHER_VERSION.format(module="numba.core.caching", name="_CacheLocator")
    explained, total = run(program, cache=tmp_path)
    assert explained.startswith(NAME)
    assert total == "300"
    assert not list(tmp_path.rglob("*.nb*"))
