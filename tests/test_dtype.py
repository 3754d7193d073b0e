"""The option dtype: the answer's dtype, out of the precision that is computed in."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from backends import HALVES

import portable_softmax as ps
from portable_softmax import kernels

pytestmark = pytest.mark.run_on("paths")

RNG = np.random.default_rng(8)
LOGITS = RNG.normal(size=(4, 6)) * 3 + 5  # no logsumexp is near 0
LABELS = np.asarray([0, 5, 2, 2])


def dtype_of(xp, name):
    """Return a dtype by its name, as arrays of the backend have it."""
    return xp.asarray(np.zeros(()), name).dtype


@pytest.mark.slow("Numba compiles each call", "numba", "torch-numba")
def test_the_usual_dtype_changes_nothing(xp):
    """Not even the path."""
    for name in ("float32", *xp.halves):
        x, dtype = xp.asarray(LOGITS, name), dtype_of(xp, name)
        for f in (ps.softmax, ps.log_softmax, ps.logsumexp):
            np.testing.assert_array_equal(xp.numpy(f(x, dtype=dtype)), xp.numpy(f(x)))
            one, other = (kernels.explain(f.__name__, x, **o) for o in ({"dtype": dtype}, {}))
            assert one == other
        calls = [(x, xp.asarray(LABELS), o) for o in ({"dtype": dtype}, {})]
        one, other = (kernels.explain("cross_entropy", *a, **o) for *a, o in calls)
        assert one == other


def test_which_kernels_take_it(xp):
    float32, float64 = dtype_of(xp, "float32"), dtype_of(xp, "float64")
    taken = {"numpy": "numpy tiles", "torch": "numpy tiles", "jax": "jax rules"}
    taken |= dict.fromkeys(("numba", "torch-numba", "jax-numba"), "numba rows")
    taken["dask"] = "dask chunks"
    for dtype in xp.halves:
        x, labels = xp.asarray(LOGITS, dtype), xp.asarray(LABELS)
        explained = kernels.explain("cross_entropy", x, labels, dtype=float32)
        assert explained.partition(":")[0] == taken.get(xp.name, "portable")
        # No array of the logits' size in another dtype but by those that compile it away.
        explained = kernels.explain("cross_entropy", x, labels, dtype=float64)
        # A chunk is an array of its own, whatever becomes of it.
        others = {"jax": "jax rules", "jax-numba": "jax rules", "dask": "dask chunks"}
        assert explained.partition(":")[0] == others.get(xp.name, "portable")


def test_what_is_no_dtype(xp):
    x = xp.asarray(LOGITS)
    for wrong in (32, object(), [1]):
        with pytest.raises(TypeError, match=r"dtype is .*expected a real floating dtype"):
            ps.softmax(x, dtype=wrong)
    says = r"dtype is float64, but x or b is complex.*cast the result"
    with pytest.raises(TypeError, match=says):
        ps.logsumexp(xp.asarray(LOGITS, "complex128"), dtype=dtype_of(xp, "float64"))


# --------------------------------------------------------------------------- derivatives


FUNCTIONS = {
    "softmax": lambda x, labels, **o: ps.softmax(x, **o),
    "log_softmax": lambda x, labels, **o: ps.log_softmax(x, temperature=2.0, **o),
    "logsumexp": lambda x, labels, **o: ps.logsumexp(x, axis=1, **o),
    "cross_entropy": lambda x, labels, **o: ps.cross_entropy(x, labels, **o),
    "sum": lambda x, labels, **o: ps.cross_entropy(x, labels, reduction="sum", z_loss=0.1, **o),
}


def exact_gradient(xp, f, x):
    """Return the gradient of sum(cos(y) * y) by autograd in float64."""
    wide = xp.asarray(xp.numpy(x).astype(np.float64)).requires_grad_()
    y = f(wide, xp.asarray(LABELS))
    (y * y.cos()).sum().backward()
    return xp.numpy(wide.grad)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
def test_torch_differentiates_through_it(xp, torch, name, dtype):
    f = FUNCTIONS[name]
    unit = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}[dtype]
    for answer in (torch.float32, torch.float64):
        x = xp.asarray(LOGITS, dtype).requires_grad_()
        y = f(x, xp.asarray(LABELS), dtype=answer)
        assert y.dtype == answer
        (grad,) = torch.autograd.grad((y * y.cos()).sum(), x, create_graph=True)
        assert grad.dtype == x.dtype
        expected = exact_gradient(xp, f, x)
        size = np.abs(expected).max()
        np.testing.assert_allclose(
            xp.numpy(grad.float()), expected, rtol=unit, atol=max(unit / 16, 2.0**-21) * size
        )
        (again,) = torch.autograd.grad(grad.float().square().sum(), x)
        assert again.dtype == x.dtype
        assert torch.isfinite(again).all()


def test_losses_answer_in_float32_under_autocast(xp, torch):
    """As torch's own do, and the gradient keeps the dtype of the logits."""
    labels = xp.asarray(LABELS)
    for dtype in HALVES:
        x = xp.asarray(LOGITS, dtype).requires_grad_()
        expected = ps.cross_entropy(x, labels, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = ps.cross_entropy(x, labels)
            value, grad = ps.cross_entropy_value_and_grad(x, labels)
            half = ps.cross_entropy(x, labels, dtype=x.dtype)
            y = ps.softmax(x)
        assert torch.equal(loss, expected)
        assert torch.equal(value, expected)
        assert loss.dtype == torch.float32
        assert y.dtype == half.dtype == grad.dtype == x.dtype
        (through,) = torch.autograd.grad(loss, x)
        assert through.dtype == x.dtype
        torch.testing.assert_close(through, grad, rtol=0.01, atol=0.0)


@pytest.mark.slow("torch compiles each function")
def test_torch_compiles_it(xp, torch):
    x, labels = xp.asarray(LOGITS, "bfloat16"), xp.asarray(LABELS)
    large = xp.asarray(np.tile(LOGITS, (6, 3000)), "bfloat16")  # kernels are operators there

    def loss(x):
        return ps.cross_entropy(x, labels, dtype=torch.float32)

    def under_autocast(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ps.cross_entropy(x, labels)

    samples = xp.asarray(np.linspace(0, 2, 24), "float32")

    def loss_of_many(x):
        return ps.cross_entropy(
            x, labels.tile(6), sample_weight=samples, dtype=torch.float32, check_labels=False
        )

    torch.compiler.reset()
    for f in (loss, under_autocast):
        y = torch.compile(f, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(y, loss(x), rtol=1e-6, atol=0.0)
    torch.compiler.reset()
    for f in (loss_of_many, ps.softmax, ps.log_softmax, ps.logsumexp):
        given = {} if f is loss_of_many else {"axis": 1, "dtype": torch.float32}

        def gradient(f, given=given):
            z = large.clone().requires_grad_()
            y = f(z, **given)
            assert y.dtype == torch.float32
            (grad,) = torch.autograd.grad((y * y).sum(), z)
            assert grad.dtype == z.dtype
            return y, grad

        compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
        for a, e in zip(gradient(compiled), gradient(f), strict=True):
            torch.testing.assert_close(a, e, rtol=2.0**-7, atol=1e-6)
        torch.compiler.reset()


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_jax_differentiates_through_it(xp, jax, name):
    f, jnp = FUNCTIONS[name], jax.numpy
    for dtype, answer in (("bfloat16", jnp.float32), ("float16", "float32"), ("float32", float)):
        x, labels = xp.asarray(LOGITS, dtype), xp.asarray(LABELS)

        def total(x, answer=answer, labels=labels):
            y = f(x, labels, dtype=answer)
            assert y.dtype == answer
            return (y * jnp.cos(y)).sum()

        grad = jax.jit(jax.grad(total))(x)
        assert grad.dtype == x.dtype
        expected = jax.jit(jax.grad(lambda x: total(x, float)))(x.astype(float))
        unit = float(jnp.finfo(x.dtype).eps)
        size = float(jnp.abs(expected).max())
        np.testing.assert_allclose(
            grad.astype(float), expected, rtol=unit, atol=max(unit / 16, 2.0**-21) * size
        )


def test_jax_without_its_64_bits(xp, jax):
    code = (
        "import jax.numpy as jnp, portable_softmax as ps\n"
        "try: ps.softmax(jnp.ones(3), dtype='float64')\n"
        "except TypeError as e: print(e)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "expected a real floating dtype of jax" in done.stdout


def test_dask_says_the_dtype_before_it_computes(xp, da):
    x = da.ones((4, 4), chunks=2, dtype="float16")
    assert ps.softmax(x, dtype=np.float32).dtype == np.float32
    assert ps.cross_entropy(x, da.zeros(4, dtype=int), dtype=np.float32).dtype == np.float32
