"""The loss of a linear layer without its logits: as of stored ones, in memory for two tiles."""

from __future__ import annotations

import importlib
import itertools
import tracemalloc

import numpy as np
import pytest
from asserts import assert_close, assert_like
from covering import combined

import portable_softmax as ps
from portable_softmax import kernels

pytestmark = pytest.mark.run_on("paths")

INF, NAN = np.inf, np.nan

RNG = np.random.default_rng(20261126)
N, C, H = 7, 5, 3
HIDDEN, CLASSIFIER, BIAS = RNG.normal(size=(N, H)), RNG.normal(size=(C, H)) * 2, RNG.normal(size=C)
HIDDEN[2] *= 20  # a confident position
LABELS = np.asarray([0, 3, 4, 1, 2, 3, 0])
IGNORED = 3
PROBABILITIES = RNG.random((N, C)) * (RNG.random((N, C)) < 0.7)
WEIGHT = np.asarray([0.5, 1.0, 2.0, 1.25, 0.75])
SAMPLES = np.asarray([0.5, 2.0, 1.25, 0.0, 3.0, 0.75, 1.0])
MASK = RNG.random((N, C)) < 0.7
MASK[np.arange(N), LABELS] = True
CLASS_MASK = np.asarray([True, True, False, True, True])
ROW = 8 * C  # bytes of one row of logits
# The backends whose tiles are a kernel's.
KERNELS = ("numpy", "numba", "torch", "torch-numba")
TILES = {"one tile": None, "three rows": 3 * ROW, "a row": ROW, "two classes": 16}


def stored(hidden, classifier, labels, bias=None, **options):
    """The loss and the gradients by way of the logits, in NumPy."""
    logits = hidden @ classifier.T
    logits = logits if bias is None else logits + bias
    loss, g = ps.cross_entropy_value_and_grad(logits, labels, **options)
    positions = int(np.prod(hidden.shape[:-1]))
    g, h = g.reshape(positions, len(classifier)), hidden.reshape(positions, hidden.shape[-1])
    d_hidden = (g @ classifier).reshape(hidden.shape)
    return loss, (d_hidden, g.T @ h, None if bias is None else g.sum(axis=0))


def check(xp, found, expected, rtol=1e-10, atol=1e-10, dtype="float64"):
    loss, grads = found
    want, slopes = expected
    assert_close(xp, loss, want, dtype, rtol=rtol, atol=atol)
    for grad, slope in zip(grads, slopes, strict=True):
        if slope is None:
            assert grad is None
        else:
            assert_close(xp, grad, slope, dtype, rtol=rtol, atol=atol)


def on(xp, options):
    return {k: xp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}


# --------------------------------------------------------------------------- all options


@pytest.mark.slow("Triton interprets element by element", "triton")
@pytest.mark.slow("a large graph for each option", "dask")
@pytest.mark.slow("XLA compiles each option", "jax")
@pytest.mark.slow("Numba compiles each option", "numba", "torch-numba")
@pytest.mark.slow("every option", "numpy")
@pytest.mark.parametrize("kind", ["index", "one-hot", "probabilities"])
def test_option_product(xp, kind):
    """Every option with every other: as stored logits, whatever the tiles.

    Positions that do not count and classes that are masked out may hold anything: neither the sum
    nor the gradients see it.
    """
    both, reductions, masks = (False, True), ("mean", "sum", "none"), (None, "each", "classes")
    ignorable = both if kind == "index" else (False,)
    tiles = (None,) if xp.lazy else (*TILES.values(),)  # a lazy library has chunks of its own
    numbers = (0.0, 0.1), (0.0, 0.3), (None, 2.5)
    calls, wanted = [], []
    for i, chosen in enumerate(
        combined(xp, tiles, reductions, both, both, ignorable, *numbers, masks, both, strength=2)
    ):
        tile, reduction, weighted, sampled, ignoring, smoothing, z, cap, masked, biased = chosen
        garbage, hidden, classifier = (NAN, INF, 1e300)[i % 3], HIDDEN.copy(), CLASSIFIER.copy()
        labels = np.where(LABELS == 2, 1, LABELS) if masked == "classes" else LABELS
        options = {
            "bias": BIAS if biased else None,
            "weight": WEIGHT if weighted else None,
            "sample_weight": SAMPLES if sampled else None,
            "ignore_index": IGNORED if ignoring else None,
            "label_smoothing": smoothing,
            "z_loss": z,
            "softcap": cap,
            "where": {None: None, "each": MASK, "classes": CLASS_MASK}[masked],
            "reduction": reduction,
        }
        if kind != "index":
            labels = np.eye(C)[LABELS] if kind == "one-hot" else PROBABILITIES
        wanted.append(stored(hidden, classifier, labels, **options))
        if sampled:
            hidden[SAMPLES == 0] = garbage
            labels = np.where(SAMPLES == 0, C + 3, labels) if kind == "index" else labels
        if ignoring:
            hidden[LABELS == IGNORED] = garbage
        if masked == "classes":
            classifier[~CLASS_MASK] = garbage
            options["where"] = CLASS_MASK[None] if i % 2 else CLASS_MASK
            if biased:
                options["bias"] = np.where(CLASS_MASK, BIAS, garbage)
        arrays = [xp.asarray(a) for a in (hidden, classifier, labels)]
        calls.append((arrays, {"tile": tile, **on(xp, options)}))
    for (alone, *found), want in zip(xp.calls(three_outputs, calls), wanted, strict=True):
        check(xp, found, want)
        assert_close(xp, alone, xp.numpy(found[0]), rtol=1e-13, atol=1e-13)


def three_outputs(*arrays, **options):
    """Return what both functions answer: the loss alone, then the loss and its gradients."""
    loss, grads = ps.linear_cross_entropy_value_and_grad(*arrays, **options)
    return ps.linear_cross_entropy(*arrays, **options), loss, grads


@pytest.mark.slow("XLA compiles many programs", "jax")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_number_of_axes(xp, reduction):
    rng = np.random.default_rng(1)
    mask = np.ones((2, 1, C), bool)
    mask[0, 0, 4] = False
    # cubed cannot join axes that are cut into chunks of two lengths.
    for batch, where in (((), CLASS_MASK), ((2, 3), mask))[: 1 if xp.library == "cubed" else 2]:
        hidden, samples = rng.normal(size=(*batch, H)), np.asarray(rng.random(batch))
        labels, t = rng.integers(2, size=batch), rng.random((*batch, C)) * where
        for tile in (None,) if xp.lazy else TILES.values():  # a lazy library has chunks of its own
            for given, more in ((labels, {}), (t, {"sample_weight": samples})):
                options = {"reduction": reduction, "where": where, **more}
                arrays = map(xp.asarray, (hidden, CLASSIFIER, given))
                found = xp.call(
                    ps.linear_cross_entropy_value_and_grad, *arrays, tile=tile, **on(xp, options)
                )
                check(xp, found, stored(hidden, CLASSIFIER, given, **options))


@pytest.mark.slow("XLA compiles each scan", "jax")
def test_half_types_are_summed_in_float32(xp):
    """Rounded once: 300 positions would add to 256 in bfloat16, were they added in it."""
    rng, n = np.random.default_rng(2), 300
    labels, rounding = np.zeros(n, int), {"float32": 1e-5, "float16": 2**-11, "bfloat16": 2**-8}
    layer = rng.normal(size=(n, H)), rng.normal(size=(2, H)), np.asarray([0.0, 6.0])
    for dtype in ("float32", *xp.halves):
        h, w, bias = (xp.asarray(a, dtype) for a in layer)
        exact = [xp.numpy(a).astype(np.float64) for a in (h, w, bias)]
        want, slopes = stored(exact[0], exact[1], labels, exact[2], reduction="sum")
        for tile in (None,) if xp.lazy else (None, 64):
            loss, grads = ps.linear_cross_entropy_value_and_grad(
                h, w, xp.asarray(labels), bias=bias, reduction="sum", tile=tile
            )
            for found, expected in zip((loss, *grads), (want, *slopes), strict=True):
                values = assert_like(xp, found, np.shape(expected), dtype).astype(np.float64)
                atol = np.abs(expected).max() * 1e-8 * 300
                np.testing.assert_allclose(values, expected, rtol=1.1 * rounding[dtype], atol=atol)


@pytest.mark.slow("XLA compiles many programs", "jax")
def test_a_classifier_that_is_cast_in_blocks(xp):
    """More classes than one block holds, in a half type; a lazy library has chunks of its own."""
    rng, n = np.random.default_rng(3), 9001
    h, w = (rng.normal(size=shape).astype(np.float16) for shape in ((4, H), (n, H)))
    labels = np.asarray([0, 4095, 4096, 9000])
    want = stored(h.astype(np.float64), w.astype(np.float64), labels)
    for tile in (None, 4 * 5000) if "float16" in xp.halves and not xp.lazy else ():
        found = ps.linear_cross_entropy_value_and_grad(*map(xp.asarray, (h, w, labels)), tile=tile)
        check(xp, found, want, rtol=1e-3, atol=1e-6, dtype="float16")


@pytest.mark.libraries("torch", "jax")
def test_the_loss_of_a_position_is_the_derivative_of_its_weight(xp):
    """Of the sum; a position of weight 0 is ignored."""
    arrays = [xp.asarray(a) for a in (HIDDEN, CLASSIFIER, LABELS)]

    def total(s):
        return ps.linear_cross_entropy(*arrays, sample_weight=s, reduction="sum", tile=3 * ROW)

    slope = xp.grad(total)(xp.asarray(SAMPLES))
    losses = stored(HIDDEN, CLASSIFIER, LABELS, reduction="none")[0]
    np.testing.assert_allclose(xp.numpy(slope), np.where(SAMPLES == 0, 0, losses), rtol=1e-12)


# --------------------------------------------------------------------------- faults of others


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_a_loss_for_each_position_has_a_gradient_for_each(torch, xp, tile):
    """Not one number for all of them, and the same in a second backward pass."""
    given, upstream = of_torch(xp), xp.asarray(np.linspace(-1.0, 2.0, N))
    loss = ps.linear_cross_entropy(
        *given[:2], xp.asarray(LABELS), bias=given[2], reduction="none", tile=tile
    )
    logits = given[0] @ given[1].T + given[2]
    want = torch.nn.functional.cross_entropy(logits, xp.asarray(LABELS), reduction="none")
    close(torch, [loss], [want])
    expected = torch.autograd.grad(want, given, upstream)
    for _ in range(2):
        found = torch.autograd.grad(loss, given, upstream, retain_graph=True)
        close(torch, found, expected)
        for g in found:
            g.mul_(0)  # it is the caller's own


def of_torch(xp, dtype="float64"):
    return [xp.asarray(a, dtype).requires_grad_() for a in (HIDDEN, CLASSIFIER, BIAS)]


def close(torch, found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.slow("XLA compiles many programs", "jax")
def test_the_answer_does_not_depend_on_the_tiles(xp):
    """Neither do the scales: a mean divides by all that counts, in whichever tile it is."""
    labels = np.asarray([IGNORED, IGNORED, IGNORED, 0, 1, 2, 4])  # a tile may be ignored as a whole
    options = {"ignore_index": IGNORED, "weight": WEIGHT}
    want = stored(HIDDEN, CLASSIFIER, labels, **options)
    arrays, given = [xp.asarray(a) for a in (HIDDEN, CLASSIFIER, labels)], on(xp, options)
    for tile in (*range(8, 80, 8), 3 * ROW, 7 * ROW, 10**9):
        found = ps.linear_cross_entropy_value_and_grad(*arrays, tile=tile, **given)
        check(xp, found, want, rtol=1e-12, atol=1e-13)


# --------------------------------------------------------------------------- edges


@pytest.mark.slow("XLA compiles each scan", "jax")
@pytest.mark.parametrize("tile", [None, 16], ids=["one tile", "two classes"])
def test_nothing_that_counts(xp, tile):
    """As cross_entropy: the mean is nan, the sum 0, and the gradients are 0."""
    for n in (N, 0):
        arrays = [xp.asarray(a) for a in (HIDDEN[:n], CLASSIFIER, np.full(n, -1))]
        options = {"bias": xp.asarray(BIAS), "ignore_index": -1, "tile": tile}
        for reduction, want in (("mean", NAN), ("sum", 0.0), ("none", np.zeros(n))):
            found = ps.linear_cross_entropy_value_and_grad(*arrays, reduction=reduction, **options)
            check(xp, found, (want, (np.zeros((n, H)), np.zeros((C, H)), np.zeros(C))), 0, 0)


@pytest.mark.parametrize("tile", [None, 16], ids=["one tile", "two classes"])
@pytest.mark.parametrize(("n", "classes", "h"), [(3, 4, 0), (0, 4, 2), (3, 0, 2)])
def test_axes_of_length_0(xp, n, classes, h, tile):
    """As the logits of such arrays, which are zeros or none at all."""
    t = np.full((n, classes), 0.25)
    hidden, classifier, bias = np.ones((n, h)), np.ones((classes, h)), np.zeros(classes)
    found = ps.linear_cross_entropy_value_and_grad(
        *map(xp.asarray, (hidden, classifier, t)), bias=xp.asarray(bias), tile=tile
    )
    check(xp, found, stored(hidden, classifier, t, bias))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_weights_of_no_classes(xp, reduction):
    """A label has none of them then, unless it is ignored; then there is nothing to weigh."""
    arrays = xp.asarray(np.ones((3, 2))), xp.asarray(np.ones((0, 2)))
    options = {"weight": xp.asarray(np.ones(0)), "reduction": reduction}
    if not xp.lazy:
        with pytest.raises(IndexError, match=r"labels.*outside \[0, 0\)"):
            ps.linear_cross_entropy(*arrays, xp.asarray(np.asarray([-1, 0, -1])), **options)
    labels = xp.asarray(np.full(3, -1))
    loss = ps.linear_cross_entropy(*arrays, labels, ignore_index=-1, **options)
    assert_close(xp, loss, NAN if reduction == "mean" else np.zeros(3))


@pytest.mark.parametrize(
    "mask", [SAMPLES[:, None] > 0.5, np.ones((1, 1)) > 0, np.ones(1) > 0, np.True_, np.False_]
)
def test_a_mask_without_classes(xp, mask):
    """It leaves out positions; a row in tiles looks there for the class of a label too."""
    labels = np.where(np.broadcast_to(mask, (N, 1))[:, 0], LABELS, -1)
    options = {"where": np.asarray(mask), "ignore_index": -1, "reduction": "sum"}
    options["label_smoothing"] = 0.1
    arrays = [xp.asarray(a) for a in (HIDDEN, CLASSIFIER, labels)]
    given = {**on(xp, options), "tile": None if xp.lazy else 16}
    found = xp.call(ps.linear_cross_entropy_value_and_grad, *arrays, **given)
    check(xp, found, stored(HIDDEN, CLASSIFIER, labels, **options))


@pytest.mark.libraries("numpy")
def test_an_answer_beyond_a_half_type_warns_of_nothing(xp):
    hidden = np.asarray([[6e4, -6e4], [6e4, -6e4]], np.float16)
    labels = np.asarray([1, 1])
    loss, (_, grad, _) = ps.linear_cross_entropy_value_and_grad(
        hidden, np.eye(2, dtype=np.float16), labels, reduction="sum"
    )
    assert loss == np.inf
    assert_close(xp, grad, [[np.inf, -np.inf], [-np.inf, np.inf]], "float16")


@pytest.mark.parametrize("tile", [None, 16], ids=["one tile", "two classes"])
def test_infinite_logits(xp, tile):
    """A bias of -inf is a class that is never taken; +inf and nan make their positions nan."""
    hidden = np.where(np.arange(N)[:, None] == 1, NAN, HIDDEN)
    options = {"bias": np.asarray([0.0, -INF, 0.5, 1.0, -INF]), "reduction": "none"}
    for labels in (np.where(LABELS == 4, 1, LABELS), PROBABILITIES * (options["bias"] > -INF)):
        arrays = map(xp.asarray, (hidden, CLASSIFIER, labels))
        loss = ps.linear_cross_entropy(*arrays, tile=tile, **on(xp, options))
        want, _ = stored(hidden, CLASSIFIER, labels, **options)
        assert_close(xp, loss, want, rtol=1e-12)


def test_labels_without_a_class(xp):
    h, w, t = (xp.asarray(a) for a in (HIDDEN, CLASSIFIER, LABELS))
    wrong, bad = xp.asarray(np.where(np.arange(N) == 2, C, LABELS)), np.arange(N) == 2
    below = xp.asarray(np.where(bad, -1, LABELS))
    outside = np.ones((N, C), bool)
    outside[1, 3] = False
    masked, where = r"labels\[1\] is 3, a class that where masks out", "where"
    for labels, options, message in (
        (wrong, {}, r"labels\[2\] is 5, outside \[0, 5\) for the 5 classe"),
        (below, {}, r"labels\[2\] is -1, outside \[0, 5\) for the 5 classe"),
        (t, {where: xp.asarray(outside)}, masked),
        (t, {where: xp.asarray(np.arange(C) != 3)}, masked),
    )[: 0 if xp.lazy else 4]:
        with pytest.raises(IndexError, match=message):
            ps.linear_cross_entropy(h, w, labels, **options)
    for tile, without in itertools.product((None, ROW, 16), (wrong, below)):
        loss, (d_hidden, _, _) = ps.linear_cross_entropy_value_and_grad(
            h, w, without, reduction="none", check_labels=False, tile=tile
        )
        np.testing.assert_array_equal(np.isnan(xp.numpy(loss)), bad)
        np.testing.assert_array_equal(np.isnan(xp.numpy(d_hidden)).all(axis=1), bad)


WRONG = [
    ({"hidden": np.asarray([[1]])}, TypeError, "hidden has dtype int64, expected a floating dtype"),
    (
        {"classifier": CLASSIFIER.astype("float32")},
        *(TypeError, "classifier has dtype float32, expected float64"),
    ),
    (
        {"classifier": CLASSIFIER.T.copy()},
        *(ValueError, r"classifier has shape \(3, 5\), expected \(C, 3\).*trans"),
    ),
    ({"bias": np.zeros(3)}, ValueError, r"bias has shape \(3,\), expected \(5,\)"),
    ({"weight": np.zeros(3)}, ValueError, r"weight has shape \(3,\), expected \(5,\)"),
    ({"sample_weight": WEIGHT}, ValueError, r"sample_weight has shape \(5,\), expected \(7,\)"),
    ({"sample_weight": np.ones(N, bool)}, TypeError, "sample_weight has dtype bool"),
    ({"where": np.ones(3, bool)}, ValueError, r"where has shape \(3,\).*broadcast"),
    ({"where": np.ones(C)}, TypeError, "where has dtype float64, expected bool"),
    ({"labels": np.arange(4)}, ValueError, r"labels have shape \(4,\), expected \(7,\)"),
    ({"labels": np.zeros(N)}, TypeError, r"labels have dtype float64 and the shape \(7,\)"),
    ({"tile": 0}, ValueError, "tile is 0, expected a positive number of bytes"),
    ({"tile": 1.5}, TypeError, "tile is 1.5, expected a number of bytes"),
    ({"reduction": "all"}, ValueError, "reduction is 'all'"),
    ({"label_smoothing": 2.0}, ValueError, "label_smoothing is 2"),
    (
        {"labels": PROBABILITIES, "ignore_index": 1},
        *(ValueError, "ignore_index is 1, but labels are a distribution"),
    ),
    ({"hidden": np.asarray(1.0)}, ValueError, r"hidden has shape \(\)"),
]


def test_errors_name_the_argument_and_the_remedy(xp):
    layer = {"hidden": HIDDEN, "classifier": CLASSIFIER, "labels": LABELS}
    for changed, error, message in WRONG:
        given = on(xp, {**layer, **changed})
        arrays = [given.pop(name) for name in layer]
        with pytest.raises(error, match=message):
            ps.linear_cross_entropy(*arrays, **given)
    h, w, t = on(xp, layer).values()
    for name in ("int64", "bool"):
        dtype = xp.asarray(np.zeros(()), name).dtype
        with pytest.raises(TypeError, match=r"dtype is .*expected a real floating dtype of "):
            ps.linear_cross_entropy(h, w, t, dtype=dtype)
    if (elsewhere := xp.other_device(w)) is not None:
        with pytest.raises(ValueError, match="classifier is on device"):
            ps.linear_cross_entropy(h, elsewhere, t)
    if xp.library != "numpy":
        with pytest.raises(TypeError, match="classifier is an array of numpy"):
            ps.linear_cross_entropy(h, CLASSIFIER, t)


# --------------------------------------------------------------------------- paths and memory


def test_explain(xp):
    arrays = xp.asarray(HIDDEN), xp.asarray(CLASSIFIER), xp.asarray(LABELS)
    options = {"label_smoothing": 0.1, "sample_weight": xp.asarray(SAMPLES)}
    why = kernels.explain("linear_cross_entropy", *arrays, dtype=arrays[0].dtype, **options)
    expected = {"numpy": "linear tiles", "torch": "linear tiles"}
    expected |= {"jax": "jax rules", "dask": "dask chunks"}
    path = "portable" if xp.path == "portable" else expected.get(xp.library, "portable")
    assert why.partition(":")[0] == path


@pytest.mark.libraries("numpy", "torch")
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_tiles_whose_rows_no_kernel_takes(xp, tile):
    """As CuPy's are unless Triton is asked for."""
    with kernels.without("numpy tiles"), kernels.without("numba rows"), kernels.use("linear tiles"):
        for labels in (LABELS, PROBABILITIES):
            arrays = [xp.asarray(a) for a in (HIDDEN, CLASSIFIER, labels)]
            explained = kernels.explain("linear_cross_entropy", *arrays)
            assert explained.startswith("linear tiles")
            options = {"bias": BIAS, "weight": WEIGHT, "z_loss": 0.1}
            given = {**on(xp, options), "tile": tile}
            found = ps.linear_cross_entropy_value_and_grad(*arrays, **given)
            check(xp, found, stored(HIDDEN, CLASSIFIER, labels, **options))
            assert_close(xp, ps.linear_cross_entropy(*arrays, **given), xp.numpy(found[0]))


@pytest.mark.run_on(*KERNELS)
def test_what_is_ignored_costs_no_product(xp, monkeypatch):
    from portable_softmax import libraries

    seen = []
    library = libraries.library_of(xp.asarray(HIDDEN))
    real = type(library).product

    def product(self, a, b, out=None):
        seen.append(a.shape[0])
        return real(self, a, b, out)

    monkeypatch.setattr(type(library), "product", product)
    for labels in (LABELS, PROBABILITIES):
        arrays = [xp.asarray(a) for a in (HIDDEN, CLASSIFIER, labels)]
        if labels is LABELS:
            ps.linear_cross_entropy(*arrays, ignore_index=IGNORED)
            assert sum(seen) == (LABELS != IGNORED).sum()
        del seen[:]
        ps.linear_cross_entropy(*arrays, sample_weight=xp.asarray(SAMPLES))
        assert sum(seen) == (SAMPLES != 0).sum()


@pytest.mark.run_on(*KERNELS)
@pytest.mark.parametrize(("tile", "added"), [(None, 0), (3 * ROW, 2), (16, 6 * 3)])
def test_the_first_tile_adds_to_no_gradient_of_the_classifier(xp, monkeypatch, tile, added):
    """It is written, and was never cleared: of seven positions, in parts of the five classes."""
    from portable_softmax import libraries

    arrays = [xp.asarray(a) for a in (HIDDEN, CLASSIFIER, LABELS)]
    want = stored(HIDDEN, CLASSIFIER, LABELS)
    seen, library = [], libraries.library_of(arrays[0])
    add_product, empty = type(library).add_product, library.xp.empty

    def counted(*args):
        seen.append(args)
        return add_product(*args)

    def full_of_nans(*args, **options):
        found = empty(*args, **options)
        if "float" in str(found.dtype):
            found[...] = NAN
        return found

    monkeypatch.setattr(type(library), "add_product", counted)
    monkeypatch.setattr(library.xp, "empty", full_of_nans)
    found = ps.linear_cross_entropy_value_and_grad(*arrays, tile=tile)
    assert len(seen) == added
    check(xp, found, want)


@pytest.mark.run_on("jax")
@pytest.mark.slow("XLA compiles a loop")
def test_jax_skips_tiles_of_positions_that_do_not_count(jax, xp, monkeypatch):
    """Compiled as well, where shapes are fixed: 23 positions are in 6 tiles, and 10 fill 3."""
    _linear = importlib.import_module("portable_softmax.kernels._jax._linear")
    seen, real = [], _linear._logits

    def logits(hidden, layer, dtype):
        jax.debug.callback(lambda: seen.append(hidden.shape))
        return real(hidden, layer, dtype)

    monkeypatch.setattr(_linear, "_logits", logits)
    monkeypatch.setattr(_linear, "_BLOCK", 2 * H)  # adds to two classes at a time
    rng, n = np.random.default_rng(3), 23
    hidden, labels = rng.normal(size=(n, H)), rng.integers(C, size=n)
    labels[::2], samples = -1, np.ones(n)
    samples[1] = 0.0
    options = {"ignore_index": -1, "reduction": "mean"}
    want = stored(hidden, CLASSIFIER, labels, sample_weight=samples, **options)
    hidden[::2] = NAN
    arrays = [xp.asarray(a) for a in (hidden, CLASSIFIER)]
    given = {"sample_weight": xp.asarray(samples), "tile": 4 * ROW, **options}

    def function(hidden, classifier):
        return ps.linear_cross_entropy(hidden, classifier, xp.asarray(labels), **given)

    for transform in (lambda f: f, jax.jit):
        found = transform(jax.value_and_grad(function, (0, 1)))(*arrays)
        jax.effects_barrier()
        assert seen == [(4, H)] * 3
        del seen[:]
        check(xp, (found[0], (*found[1], None)), want)


@pytest.mark.parametrize("path", ["kernel", "portable"])
@pytest.mark.parametrize("classes", [1000, 40_000])
def test_at_most_two_tiles_of_logits(classes, path):
    """Beyond the inputs and the gradients, whatever the number of classes."""
    n, h, tile = 256, 8, 1 << 20
    rng = np.random.default_rng(5)
    hidden, classifier = (rng.normal(size=s).astype(np.float32) for s in ((n, h), (classes, h)))
    labels = rng.integers(classes, size=n)
    answers = hidden.nbytes + classifier.nbytes
    with kernels.without("numba rows"):  # its code would be counted
        ps.linear_cross_entropy_value_and_grad(hidden[:2], classifier, labels[:2], tile=tile)
        switch = kernels.portable() if path == "portable" else kernels.without("numba rows")
        tracemalloc.start()
        try:
            with switch:
                ps.linear_cross_entropy_value_and_grad(hidden, classifier, labels, tile=tile)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    stored_logits = n * classes * 4
    # The scratch of the row kernels is a few tiles of theirs; the portable path has one array for
    # each operation on a tile.
    most = 2 * tile + 5 * (1 << 19) if path == "kernel" else 16 * tile
    assert peak <= 3 * answers + most
    if classes > 1000:
        assert peak < stored_logits / 4


# --------------------------------------------------------------------------- torch


def torch_function(xp, labels, tile=None, **options):
    options = on(xp, options)
    labels = xp.asarray(labels)

    def function(hidden, classifier, bias):
        return ps.linear_cross_entropy(
            hidden, classifier, labels, bias=bias, tile=tile, check_labels=False, **options
        )

    return function


TORCH_CASES = {
    "mean": {},
    "none": {"reduction": "none", "z_loss": 0.1},
    "options": {"ignore_index": IGNORED, "weight": WEIGHT, "label_smoothing": 0.1, "softcap": 3.0},
    "weights": {"sample_weight": SAMPLES, "z_loss": 0.1},
    "where": {"where": MASK, "reduction": "sum"},
}


ORDERS = [
    (("torch", "torch-portable", "torch-numba")[(i + j) % 3], name, tile)
    for i, name in enumerate(TORCH_CASES)
    for j, tile in enumerate((None, 2 * ROW, 16))
]


@pytest.mark.parametrize(("backend_name", "name", "tile"), ORDERS, scope="session")
@pytest.mark.slow("difference quotients to the second order")
def test_torch_differentiates_to_every_order(torch, xp, backend_name, name, tile):
    """On one path for each pair of options and tiles, and on another for the next.

    Of three positions one is ignored, or has the weight 0. Reverse mode is compared entry by entry,
    forward mode and what is batched along a random direction.
    """
    some = slice(1, 4)
    options = {k: v[some] if np.shape(v)[:1] == (N,) else v for k, v in TORCH_CASES[name].items()}
    function = torch_function(xp, LABELS[some], tile, **options)
    hidden = HIDDEN[some] / np.asarray([1, 20, 1])[:, None]
    arrays = [xp.asarray(a).requires_grad_() for a in (hidden, CLASSIFIER, BIAS)]
    assert torch.autograd.gradcheck(function, arrays, atol=1e-6)
    modes = {"check_forward_ad": True, "check_batched_grad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(function, arrays, atol=1e-6, **modes)
    assert torch.autograd.gradgradcheck(function, arrays, check_fwd_over_rev=True, fast_mode=True)


def test_torch_func(torch, xp):
    function = torch_function(xp, LABELS)
    arrays = [xp.asarray(a) for a in (HIDDEN, CLASSIFIER, BIAS)]
    want = [xp.asarray(g) for g in stored(HIDDEN, CLASSIFIER, LABELS, BIAS)[1]]
    for found in (torch.func.grad, torch.func.jacfwd):
        close(torch, found(function, argnums=(0, 1, 2))(*arrays), want)
    _, change = torch.func.jvp(function, tuple(arrays), tuple(arrays))
    close(torch, [change], [sum((a * s).sum() for a, s in zip(arrays, want, strict=True))])
    # One gradient an example, with labels that are mapped over as well.
    each = torch.func.vmap(
        torch.func.grad(lambda h, t: ps.linear_cross_entropy(h, arrays[1], t, bias=arrays[2]))
    )(arrays[0], xp.asarray(LABELS))
    close(torch, [each], [want[0] * N])


def test_torch_makes_only_the_gradients_that_are_asked_for(torch, xp):
    """A frozen classifier has none; a gradient of the weights of the classes is torch's own."""
    hidden, classifier, t = of_torch(xp)[0], xp.asarray(CLASSIFIER), xp.asarray(LABELS)
    ps.linear_cross_entropy(hidden, classifier, t).backward()
    close(torch, [hidden.grad], [xp.asarray(stored(HIDDEN, CLASSIFIER, LABELS)[1][0])])
    weight = xp.asarray(WEIGHT).requires_grad_()
    loss = ps.linear_cross_entropy(hidden, classifier, t, weight=weight)
    want = ps.cross_entropy(hidden @ classifier.T, t, weight=weight)
    close(torch, *(torch.autograd.grad(value, weight) for value in (loss, want)))


def test_autocast_changes_nothing(torch, xp):
    """Sums are in float32 at least: autocast would make the products in bfloat16.

    Of the portable path's the derivative is torch's, which is under autocast where it is called.
    """
    given = of_torch(xp, "float32")[:2]
    loss = ps.linear_cross_entropy(*given, xp.asarray(LABELS), tile=3 * ROW)
    want = torch.autograd.grad(loss, given)
    with torch.autocast("cpu", torch.bfloat16):
        same = ps.linear_cross_entropy(*given, xp.asarray(LABELS), tile=3 * ROW)
    with torch.autocast("cpu", torch.bfloat16, enabled=xp.path != "portable"):
        found = torch.autograd.grad(same, given)
    for one, other in zip((same, *found), (loss, *want), strict=True):
        assert torch.equal(one, other)


def test_losses_answer_in_float32_under_autocast(torch, xp):
    """As torch's own do; the gradients keep the dtype of the layer."""
    given = [xp.asarray(a, "bfloat16").requires_grad_() for a in (HIDDEN, CLASSIFIER)]
    want = ps.linear_cross_entropy(*given, xp.asarray(LABELS), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ps.linear_cross_entropy(*given, xp.asarray(LABELS))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, want)
    for grad in torch.autograd.grad(loss, given):
        assert grad.dtype == torch.bfloat16


@pytest.mark.run_on("torch", "torch-numba", "triton")  # torch's own keep what they need of it
def test_torch_notices_what_was_changed_in_place(torch, xp):
    given, weight = of_torch(xp)[:2], xp.asarray(WEIGHT)
    loss = ps.linear_cross_entropy(*given, xp.asarray(LABELS), weight=weight)
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.slow("torch.compile compiles C++", "torch", "torch-portable", "torch-numba", "triton")
def test_torch_compiles(torch, xp):
    function = torch_function(xp, LABELS, **TORCH_CASES["options"])
    arrays = of_torch(xp)
    loss, want = torch.compile(function, fullgraph=True)(*arrays), function(*arrays)
    close(torch, [loss], [want])
    close(torch, torch.autograd.grad(loss, arrays), torch.autograd.grad(want, arrays))


def test_cuda_graphs_record_no_operator_that_waits_for_the_device(torch, xp):
    """It reads which positions count: Inductor has to leave it out of what a graph replays."""
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip("this torch cannot be told")
    from portable_softmax.kernels._torch import _linear_operator  # noqa: F401 - defines it

    assert torch.Tag.cudagraph_unsafe in torch.ops.portable_softmax.linear.default.tags
    assert torch.Tag.cudagraph_unsafe not in torch.ops.portable_softmax.value.default.tags


COMPILED = {
    "mean": {},
    "none": {"reduction": "none", "z_loss": 0.1, "ignore_index": 3},
    "weights": {"sample_weight": np.linspace(0, 2, 300), "label_smoothing": 0.1, "softcap": 3.0},
    "dtype": {"dtype": "float64", "where": np.arange(400) < 390, "reduction": "sum"},
}


@pytest.mark.run_on("torch", "torch-numba", "triton")  # torch's own operations keep the logits
@pytest.mark.slow("torch.compile traces", "torch", "torch-numba", "triton")
@pytest.mark.parametrize("name", COMPILED)
def test_torch_compiles_one_operator_that_keeps_no_logits(torch, xp, name):
    """Nothing that waits for the backward pass is larger than a gradient."""
    n, classes, h = 300, 400, 8
    options, rng = dict(COMPILED[name]), np.random.default_rng(0)
    dtype = "float32" if options.get("dtype") else "float64"
    options = {**on(xp, options), "dtype": getattr(torch, options.get("dtype", dtype))}
    labels = xp.asarray(rng.integers(390, size=n))
    shapes, called, kept = ((n, h), (classes, h), classes), [], []
    arrays = [xp.asarray(rng.normal(size=size), dtype).requires_grad_() for size in shapes]

    def function(hidden, classifier, bias):
        return ps.linear_cross_entropy(
            hidden, classifier, labels, bias=bias, tile=1 << 16, check_labels=False, **options
        )

    def backend(module, _):
        called.extend(node.target for node in module.graph.nodes)
        return module

    torch.compiler.reset()  # each case is a new function of the same code
    torch.compile(function, fullgraph=True, backend=backend)(*arrays)
    assert torch.ops.portable_softmax.linear.default in called
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    pack = torch.autograd.graph.saved_tensors_hooks
    with pack(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = compiled(*arrays)
    assert 0 < max(kept) <= classes * h
    want = function(*arrays)
    torch.testing.assert_close(loss, want)
    upstream = xp.asarray(np.linspace(-1, 2, want.numel()).reshape(want.shape)).to(want.dtype)
    found, slopes = (torch.autograd.grad(value, arrays, upstream) for value in (loss, want))
    torch.testing.assert_close(found, slopes)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arrays), want.detach())


# --------------------------------------------------------------------------- JAX


@pytest.mark.parametrize("tile", [None, 3 * ROW], ids=["one tile", "three rows"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.slow("XLA compiles every derivative to the second order")
def test_jax_differentiates_in_every_mode(jax, xp, reduction, tile):
    """As stored logits: to the second order, forward and in reverse; weights of classes too."""
    labels, upstream = xp.asarray(LABELS), np.linspace(-1.0, 2.0, N) if reduction == "none" else 2.0
    options = {"ignore_index": IGNORED, "z_loss": 0.1, "reduction": reduction}
    options["sample_weight"] = xp.asarray(SAMPLES)

    def found(hidden, classifier, bias, weight):
        loss = ps.linear_cross_entropy(
            hidden, classifier, labels, bias=bias, weight=weight, tile=tile, **options
        )
        return (loss * upstream).sum()

    def expected(hidden, classifier, bias, weight):
        logits = hidden @ classifier.T + bias
        return (ps.cross_entropy(logits, labels, weight=weight, **options) * upstream).sum()

    hidden = HIDDEN / np.where(np.arange(N) == 2, 20, 1)[:, None]
    arrays = [xp.asarray(a) for a in (hidden, CLASSIFIER, BIAS, WEIGHT)]
    layer = (0, 1, 2)

    def derivatives(f):
        def every(*arrays):
            return (
                jax.grad(f, layer)(*arrays),
                jax.grad(f, (0, 1, 2, 3))(*arrays),
                jax.jacfwd(f, layer)(*arrays),
                jax.hessian(f, layer)(*arrays),
                jax.jacrev(jax.grad(f, layer), layer)(*arrays),
            )

        return jax.tree.leaves(xp.program(every)(*arrays))

    for one, other in zip(derivatives(found), derivatives(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


def test_jax_maps_over_a_stack(jax, xp):
    hidden, classifier = np.stack([HIDDEN, HIDDEN / 2]), xp.asarray(CLASSIFIER)
    labels = np.stack([LABELS, LABELS[::-1]])

    def loss(hidden, labels):
        return ps.linear_cross_entropy(hidden, classifier, labels, tile=3 * ROW)

    grads = jax.vmap(jax.grad(loss))(xp.asarray(hidden), xp.asarray(labels))
    for grad, h, t in zip(grads, hidden, labels, strict=True):
        _, want = stored(h, CLASSIFIER, t)
        np.testing.assert_allclose(grad, want[0], rtol=1e-10, atol=1e-12)


def _products(jaxpr):
    """Return how many products a program has, those of its inner programs included."""
    from jax.extend.core import ClosedJaxpr, Jaxpr

    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name == "dot_general"
        for value in equation.params.values():
            for one in value if isinstance(value, tuple) else (value,):  # of branches
                inner = one.jaxpr if isinstance(one, ClosedJaxpr) else one
                found += _products(inner) if isinstance(inner, Jaxpr) else 0
    return found


def test_jax_keeps_two_tiles_beside_the_gradients(jax, xp, monkeypatch):
    """No transposed classifier, no product of its size, and no mask as large as a tile."""
    _linear = importlib.import_module("portable_softmax.kernels._jax._linear")
    monkeypatch.setattr(_linear, "_BLOCK", 1 << 16)
    n, h, classes, tile = 256, 128, 16_000, 1 << 20
    shapes = [(n, h), (classes, h), (n,)]
    given = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in zip(shapes, ("float32", "float32", "int32"), strict=True)
    ]

    def loss(hidden, classifier, labels):
        return ps.linear_cross_entropy(hidden, classifier, labels, tile=tile)

    for function in (
        jax.value_and_grad(loss, (0, 1)),
        lambda *a: ps.linear_cross_entropy_value_and_grad(*a, tile=tile),
    ):
        needs = jax.jit(function).lower(*given).compile().memory_analysis()
        assert needs.temp_size_in_bytes < 2 * tile + 2 * 4 * _linear._BLOCK + 8 * n * h


def test_jax_makes_the_logits_once(jax, xp):
    """Three products for a loss and its gradients, and one for the loss alone."""
    arrays = [xp.asarray(a) for a in (HIDDEN, CLASSIFIER)]

    def loss(hidden, classifier):
        return ps.linear_cross_entropy(hidden, classifier, xp.asarray(LABELS), tile=ROW)

    assert _products(jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(*arrays).jaxpr) == 3
    assert _products(jax.make_jaxpr(loss)(*arrays).jaxpr) == 1


# --------------------------------------------------------------------------- Dask


ODD = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0}


@pytest.mark.parametrize(
    ("chunks", "tile"), [((3, C, H), None), ((3, 2, 2), 16), ((N, 1, H), None)]
)
def test_dask_chunks(da, chunks, tile):
    """Positions, classes and what is multiplied may all be cut; the logits of none are stored."""
    import dask

    n, c, h = chunks
    for labels, bias, options in (
        (LABELS, None, {"reduction": "sum", "weight": WEIGHT, "ignore_index": IGNORED}),
        (LABELS, BIAS, {"reduction": "none", "where": MASK, **ODD}),
        (LABELS, BIAS, {"where": CLASS_MASK[None], "ignore_index": 2, "z_loss": 0.1}),
        (LABELS, BIAS, {"weight": WEIGHT, "sample_weight": SAMPLES, "ignore_index": 2}),
        (PROBABILITIES, BIAS, {"sample_weight": SAMPLES, **ODD}),
    ):
        want, slopes = stored(HIDDEN, CLASSIFIER, labels, bias, **options)
        gone = (SAMPLES == 0)[:, None] & ("sample_weight" in options)
        given = {
            name: da.from_array(value, 2) if isinstance(value, np.ndarray) else value
            for name, value in {**options, "bias": bias, "tile": tile}.items()
        }
        cuts = (np.where(gone, NAN, HIDDEN), (n, h)), (CLASSIFIER, (c, h)), (labels, 4)
        lazy = three_outputs(*(da.from_array(array, cut) for array, cut in cuts), **given)
        alone, loss, grads = dask.compute(lazy, scheduler="synchronous")[0]
        for y, e in zip((loss, alone, *grads), (want, want, *slopes), strict=True):
            if e is not None:
                np.testing.assert_allclose(y, e, rtol=1e-10, atol=1e-12)
            assert (y is None) == (e is None)


def test_dask_stays_lazy(da, xp):
    import dask

    def scheduler(*_args, **_options):
        raise AssertionError("somebody computed")

    arrays = map(xp.asarray, (HIDDEN, CLASSIFIER, LABELS))
    with dask.config.set(scheduler=scheduler):
        loss, grads = ps.linear_cross_entropy_value_and_grad(*arrays, bias=xp.asarray(BIAS))
    assert all(isinstance(found, da.Array) for found in (loss, *grads))
