"""JAX: which of the three forms a row takes, that each is exact there, and that rows stay apart."""

from __future__ import annotations

import numpy as np
import pytest
import reference

import portable_softmax as ps
from portable_softmax import kernels


@pytest.fixture(autouse=True)
def _only_jax(jax):
    """Skip this module for the other libraries."""


# Rows of 8 classes, for which t = 8 exp(-7) = 0.0073: rest is 3.0, 0.81, 0.0074, 0.0072 and 6e-9.
ROWS = {
    "plain": [0.0, -0.5, -0.5, -1.0, -1.0, -2.0, -1.0, -0.5],
    "maximum left out": [0.0, -2.0, -2.0, -2.5, -2.5, -3.0, -2.0, -2.0],
    "barely": [0.0] + [float(np.log(0.0074 / 7))] * 7,
    "barely not": [0.0] + [float(np.log(0.0072 / 7))] * 7,
    "confident": [0.0] + [-20.9] * 7,
}


@pytest.fixture
def forms(monkeypatch):
    """Which forms of an operation were computed."""
    from portable_softmax.kernels._jax import _rules

    jax = _rules.jax
    seen = []

    def switch(case, branches, *operands):
        seen.append(int(case))
        return branches[int(case)](*operands)

    monkeypatch.setattr(jax.lax, "switch", switch)
    for name in ("log_softmax", "logsumexp", "cross_entropy", "cross_entropy_value_and_grad"):
        inner = "_value_and_grad" if name.endswith("grad") else f"_{name}"
        monkeypatch.setattr(_rules, name, getattr(_rules, inner))
    return seen


@pytest.mark.parametrize(
    ("names", "form"),
    [
        (["plain"], 0),
        (["plain", "maximum left out"], 1),
        (["barely"], 1),
        (["barely not"], 2),
        (["plain", "confident"], 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_values_choose_the_form_and_each_is_exact(xp, forms, names, form, dtype):
    rows = np.asarray([ROWS[name] for name in names]).astype(dtype)
    x = xp.asarray(rows, dtype)
    labels = [i % 8 for i in range(len(rows))]
    y = ps.log_softmax(x)
    lse = ps.logsumexp(x, axis=1)
    loss, grad = ps.cross_entropy_value_and_grad(x, xp.asarray(labels), reduction="none")
    alone = ps.cross_entropy(x, xp.asarray(labels), reduction="none")
    assert forms == [form] * 4
    unit = np.finfo(dtype).eps
    for i, row in enumerate(rows):
        exact = reference.log_softmax(row)
        np.testing.assert_allclose(xp.numpy(y)[i], np.asarray(exact, float), rtol=4 * unit)
        want = reference.logsumexp(row)
        np.testing.assert_allclose(float(lse[i]), float(want), rtol=4 * unit, atol=4 * unit)
        for found in (loss, alone):
            np.testing.assert_allclose(float(found[i]), -float(exact[labels[i]]), rtol=4 * unit)
        p = reference.softmax(row)
        p[labels[i]] = -sum(other for j, other in enumerate(p) if j != labels[i])
        np.testing.assert_allclose(xp.numpy(grad)[i], np.asarray(p, float), rtol=16 * unit)


@pytest.mark.parametrize("other", ["plain", "maximum left out", "confident", "nan", "inf"])
def test_a_row_has_the_same_bits_beside_any_other(xp, other):
    """A form that another row needs is computed, and leaves this one alone."""
    beside = {"nan": [np.nan] * 8, "inf": [np.inf] + [0.0] * 7, **ROWS}[other]
    for row in ROWS.values():
        alone = xp.asarray([row, row], "float32")
        together = xp.asarray([row, beside], "float32")
        labels = xp.asarray([3, 3])
        for f in (
            ps.log_softmax,
            lambda x: ps.logsumexp(x, axis=1),
            lambda x: ps.cross_entropy(x, labels, reduction="none"),  # noqa: B023 - called here
            lambda x: ps.cross_entropy_value_and_grad(x, labels, reduction="sum")[1],  # noqa: B023
        ):
            np.testing.assert_array_equal(xp.numpy(f(alone))[0], xp.numpy(f(together))[0])


def test_explain_names_the_options_that_it_leaves_to_the_portable_form(jax, xp):
    x = xp.asarray(np.zeros((2, 3)))
    assert kernels.explain("logsumexp", x) == "jax rules: one pass where the values allow it"
    assert kernels.explain("softmax", x) == "portable: no kernel for softmax on jax"
    assert (
        kernels.explain("cross_entropy", x, z_loss=0.1, softcap=2.0)
        == "portable: not jax rules: z_loss, softcap"
    )
    assert "a distribution as labels" in kernels.explain("cross_entropy", x, labels=x)
    assert "temperature" in kernels.explain("log_softmax", x, temperature=2.0)
    assert "an empty array" in kernels.explain("log_softmax", x[:0])
    seen = []
    jax.jit(lambda x: seen.append(kernels.explain("logsumexp", x)))(x)
    assert seen == ["jax rules: one pass where the values allow it"]
