"""Who owns the gradients of linear_cross_entropy in torch: a graph gives them away once.

The expected ones are torch's own, through stored logits.
"""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

import portable_softmax as ps

pytestmark = pytest.mark.run_on("paths")
# The portable path saves what torch's own operations save.
own_operations = pytest.mark.run_on("torch", "torch-numba", "triton")

RNG = np.random.default_rng(20261130)
N, C, H = 7, 5, 3
ARRAYS = RNG.normal(size=(N, H)), RNG.normal(size=(C, H)), RNG.normal(size=C)
LABELS = np.asarray([0, 3, 4, 1, 2, 3, 0])


@pytest.fixture
def layer(xp):
    """Hidden vectors, a classifier and a bias, which require gradients."""
    return [xp.asarray(a.copy()).requires_grad_() for a in ARRAYS]


def loss_of(xp, layer, **options):
    hidden, classifier, bias = layer
    return ps.linear_cross_entropy(hidden, classifier, xp.asarray(LABELS), bias=bias, **options)


def expected(torch, xp, factor=1.0):
    hidden, classifier, bias = arrays = [xp.asarray(a).requires_grad_() for a in ARRAYS]
    logits = hidden @ classifier.T + bias
    loss = torch.nn.functional.cross_entropy(logits, xp.asarray(LABELS))
    return torch.autograd.grad(factor * loss, arrays)


def check(torch, found, want):
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@contextmanager
def saving(torch, seen):
    """Add what autograd saves in a block to a list."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        yield seen


def passes(torch, loss, layer, factors):
    """Return the gradients of several passes through one graph."""
    return [
        torch.autograd.grad(loss, layer, torch.full_like(loss, factor), retain_graph=True)
        for factor in factors
    ]


@own_operations
@pytest.mark.parametrize("factor", [1.0, -3.0])
def test_a_backward_pass_takes_no_memory_for_gradients(torch, xp, layer, factor):
    """`.grad` is what was saved: a classifier's gradient does not exist twice.

    Hooks see it, so that it may be put elsewhere, as may the layer.
    """
    with saving(torch, []) as saved:
        loss = loss_of(xp, layer)
    for t in (*layer, *expected(torch, xp)):
        assert any(s.shape == t.shape and torch.allclose(s, t) for s in saved)
    (factor * loss).backward()
    places = {t.data_ptr() for t in saved}
    for t in layer:
        assert t.grad.data_ptr() in places
        assert t.grad.data_ptr() != t.data_ptr()
    check(torch, [t.grad for t in layer], expected(torch, xp, factor))


@pytest.mark.parametrize("factors", [(1.0, 1.0, 1.0), (3.0, 1.0, -0.5)], ids=str)
def test_each_pass_has_gradients_of_its_own(torch, xp, layer, factors):
    """Whoever changes those of one pass changes no others, of an earlier or a later one."""
    loss = loss_of(xp, layer)
    for _ in range(2):
        found = passes(torch, loss, layer, factors)
        assert len({g.data_ptr() for grads in found for g in grads}) == 3 * len(factors)
        for grads, factor in zip(found, factors, strict=True):
            check(torch, grads, expected(torch, xp, factor))
            for g in grads:
                g.fill_(7)


def test_gradients_accumulate(torch, xp, layer):
    loss = loss_of(xp, layer)
    loss.backward(retain_graph=True)
    (2 * loss).backward(retain_graph=True)
    for t in layer:
        t.grad.neg_()
    loss.backward()
    check(torch, [t.grad for t in layer], expected(torch, xp, -2.0))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_gradient_is_asked_for_after_another(torch, xp, layer):
    loss, want = loss_of(xp, layer), expected(torch, xp, 2.0)
    for i in (1, 0, 2, 1):
        (grad,) = torch.autograd.grad(2 * loss, layer[i], retain_graph=True)
        check(torch, [grad], [want[i]])


def test_further_derivatives_after_a_pass(torch, xp, layer):
    """Mapped over and differentiated again, before and after the gradients are given away."""
    loss, want = loss_of(xp, layer), expected(torch, xp)
    factors = xp.asarray([1.0, -2.0])
    for _ in range(2):
        mapped = torch.autograd.grad(loss, layer, factors, retain_graph=True, is_grads_batched=True)
        for i, factor in enumerate(factors):
            check(torch, [g[i] for g in mapped], [factor * g for g in want])
        again = torch.autograd.grad(loss, layer, create_graph=True)
        check(torch, again, want)
        assert all(g.requires_grad for g in again)
        (plain,) = passes(torch, loss, layer, [3.0])
        check(torch, plain, expected(torch, xp, 3.0))


def test_a_pass_that_failed_is_made_again(torch, xp, layer):
    """What it left half done is not used."""
    loss = loss_of(xp, layer)

    def fail(*_):
        raise MemoryError

    hook = loss.grad_fn.register_hook(fail)
    with pytest.raises(MemoryError):
        torch.autograd.grad(3 * loss, layer)
    hook.remove()
    check(torch, torch.autograd.grad(3 * loss, layer), expected(torch, xp, 3.0))


def test_threads_share_a_graph(torch, xp, layer):
    loss, want, threads = loss_of(xp, layer), expected(torch, xp, 3.0), 4
    together = threading.Barrier(threads)

    def some(_):
        together.wait()
        return passes(torch, loss, layer, [3.0] * 5)

    with ThreadPoolExecutor(threads) as pool:
        found = [grads for each in pool.map(some, range(threads)) for grads in each]
    assert len({g.data_ptr() for grads in found for g in grads}) == 3 * len(found)
    for grads in found:
        check(torch, grads, want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_change_of_the_layer_is_noticed(torch, xp, layer, reduction):
    """Before the first pass, and before a further one, as of what torch's own functions save."""
    of_all = range(2 if xp.path == "portable" else 3)  # torch's own sum does not need the bias
    for changed, passed in itertools.product(of_all, (False, True)):
        copies = [t * 1 for t in layer]
        loss = loss_of(xp, copies, reduction=reduction).sum()
        if passed:
            loss.backward(retain_graph=True)
        copies[changed].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# --------------------------------------------------------------------------- what is saved


def packed_as_copies(torch):
    return torch.autograd.graph.saved_tensors_hooks(
        lambda t: (t.detach().cpu().numpy().copy(), t.device),
        lambda kept: torch.from_numpy(kept[0].copy()).to(kept[1]),
    )


HOOKS = {
    "on the CPU": lambda torch: torch.autograd.graph.save_on_cpu(),
    "as copies": packed_as_copies,
    "mutable": lambda torch: torch.autograd.graph.allow_mutation_on_saved_tensors(),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_saved_tensors(torch, xp, layer, name):
    with HOOKS[name](torch):
        loss = loss_of(xp, [t * 1 for t in layer])
        for grads, factor in zip(passes(torch, loss, layer, (2.0, 1.0)), (2.0, 1.0), strict=True):
            check(torch, grads, expected(torch, xp, factor))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(torch, xp, layer, reentrant):
    from torch.utils.checkpoint import checkpoint

    def function(*arrays):
        return loss_of(xp, [t * 1 for t in arrays])

    with saving(torch, []) as saved:
        loss = checkpoint(function, *layer, use_reentrant=reentrant)
    assert not any(t.shape == (C, H) and not t.is_leaf for t in saved)
    for factor in (3.0, 1.0):
        for t in layer:
            t.grad = None
        (factor * loss).backward(retain_graph=True)
        check(torch, [t.grad for t in layer], expected(torch, xp, factor))


@own_operations
def test_what_is_given_away_is_not_kept(torch, xp, layer):
    """Not by a graph whose pass is over, and by none that is dropped."""
    seen = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: seen.append(weakref.ref(t)) or t, lambda t: t
    )
    inputs = {id(t) for t in layer}
    loss_of(xp, layer).backward()  # what the first call loads has cycles of its own
    gc.disable()
    try:
        for backward in (True, False):
            del seen[:]
            with hooks:
                loss = loss_of(xp, layer)
            assert any(t() is not None for t in seen)
            if backward:
                loss.backward()
                for t in layer:
                    t.grad = None
            else:
                del loss
            left = [t() for t in seen if t() is not None]
            assert {id(t) for t in left} <= inputs
    finally:
        gc.enable()


def test_half_types_are_rounded_once(torch, xp, layer):
    narrow = [t.detach().to(torch.bfloat16).requires_grad_() for t in layer]
    wide = [t.detach().float().requires_grad_() for t in narrow]
    factor = 1 / 3
    loss = loss_of(xp, narrow, dtype=torch.float32)
    for _ in range(2):
        found = torch.autograd.grad(factor * loss, narrow, retain_graph=True)
        want = torch.autograd.grad(factor * loss_of(xp, wide), wide)
        for one, other in zip(found, want, strict=True):
            torch.testing.assert_close(one, other.to(one.dtype), rtol=2**-8, atol=1e-9)
