"""What test_dtensor runs: calls on DTensors beside the same calls on whole tensors.

    python tests/dtensor_ranks.py FOLDER SIZE ...

torch is imported once; each rank is a fork.
"""

import datetime
import os
import sys
import traceback

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import portable_softmax as ps

N, C, H = 5, 9, 3  # the last of 4 ranks gets nothing
WHOLE, ROWS, CLASSES = Replicate(), Shard(0), Shard(1)
torch.manual_seed(0)
LOGITS = torch.randn(N, C, dtype=torch.float64) * 5
LOGITS[1] = 0.0
LOGITS[1, 8] = 45.0  # a confident row
LABELS = torch.tensor([0, 8, 3, 2, 5])
GIVEN = torch.randn(N, C, dtype=torch.float64).softmax(1)
MASK = torch.ones(N, C, dtype=torch.bool)
MASK[0, 1:3] = MASK[2, 6] = MASK[4, 0] = False
PADDED = torch.tensor([True] * 7 + [False] * 2)
WEIGHT = torch.linspace(0.5, 2.0, C, dtype=torch.float64)
SAMPLE = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.5], dtype=torch.float64)
HIDDEN, CLASSIFIER = torch.randn(N, H).double(), torch.randn(C, H).double()
BIAS = torch.randn(C).double()

LOSSES = [
    (LABELS, {}),
    (LABELS, {"reduction": "none", "z_loss": 0.01, "softcap": 4.0}),
    (LABELS, {"reduction": "sum", "label_smoothing": 0.1}),
    (LABELS, {"weight": WEIGHT, "ignore_index": 3, "label_smoothing": 0.2}),
    (LABELS, {"where": MASK, "sample_weight": SAMPLE, "label_smoothing": 0.1, "z_loss": 0.1}),
    (LABELS.clamp(max=4), {"where": PADDED, "weight": WEIGHT, "reduction": "sum"}),
    (torch.tensor([0, -1, 9, 2, 5]), {"check_labels": False, "reduction": "none"}),
    (GIVEN, {"weight": WEIGHT, "label_smoothing": 0.1}),
    (GIVEN, {"sample_weight": SAMPLE, "where": MASK, "reduction": "none"}),
]
SPECIAL = LOGITS.clone()
SPECIAL[[0, 2], [4, 5]], SPECIAL[[1, 2], [0, 1]] = torch.inf, torch.nan
SPECIAL[3], SPECIAL[4, 2:] = -torch.inf, -torch.inf
SPECIAL[0, 4], SPECIAL[1, 0], SPECIAL[2, 5], SPECIAL[2, 1] = (
    torch.inf,
    torch.nan,
    torch.inf,
    torch.nan,
)
SPECIAL[3], SPECIAL[4, 2:] = -torch.inf, -torch.inf
ROW_CALLS = [
    (ps.logsumexp, LOGITS, {"axis": 1}),
    (ps.logsumexp, LOGITS, {"axis": None, "where": MASK}),
    (ps.softmax, LOGITS, {"temperature": 0.5, "where": MASK}),
    (ps.softmax, LOGITS, {"axis": (0, 1), "sink": 2.0}),
    (ps.log_softmax, LOGITS, {"temperature": 3.0, "dtype": torch.float32}),
    (ps.log_softmax, LOGITS, {"axis": 0, "where": PADDED}),
    (ps.logsumexp, SPECIAL, {"axis": 1, "keepdims": True}),
    (ps.softmax, SPECIAL, {}),
    (ps.log_softmax, SPECIAL, {}),
    (ps.softmax, LOGITS.to(torch.bfloat16), {}),
    (ps.log_softmax, LOGITS.to(torch.int64), {}),
]


def sharded(a, mesh, placements, axes=(0, 1)):
    """Distribute a tensor, whose axes are those `axes` of the logits."""

    def place(p):
        cut = p.is_shard() and p.dim in axes and a.shape[axes.index(p.dim)] > 1
        return Shard(axes.index(p.dim)) if cut else WHOLE

    return distribute_tensor(a, mesh, [place(p) for p in placements])


def options_on(mesh, placements, options):
    """Distribute the options: a mask and positions' weights as the logits, others whole."""
    found = dict(options)
    for name, value in options.items():
        if name == "where":
            found[name] = sharded(value, mesh, placements, (0, 1)[-value.ndim :])
        elif name == "sample_weight":
            found[name] = sharded(value, mesh, placements, (0,))
        elif isinstance(value, torch.Tensor):
            found[name] = sharded(value, mesh, [WHOLE] * mesh.ndim)
    return found


def close(found, wanted, like=None, slack=0):
    """Compare dtype, shape, placements and values, to so many units of 1 beside their digits."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert like is None or found.placements == like.placements
    unit = torch.finfo(wanted.dtype).eps
    same = {"rtol": 500 * unit, "atol": unit * (slack or unit), "equal_nan": True}
    torch.testing.assert_close(found.detach().full_tensor(), wanted.detach(), **same)


def counted(function, *args, **kwargs):
    """Return the answer and the number of all-reduces it took; there is no other collective."""
    with CommDebugMode() as mode:
        found = function(*args, **kwargs)
    counts = {str(name): n for name, n in mode.get_comm_counts().items()}
    assert all("all_reduce" in name for name in counts), counts
    return found, sum(counts.values())


def upstream_of(whole):
    return torch.linspace(1, 2, whole.numel(), dtype=whole.dtype).reshape(whole.shape)


# What calls on whole tensors answer: made once, before the processes part.


def expected_losses():
    for labels, options in LOSSES:
        x = LOGITS.clone().requires_grad_()
        whole = ps.cross_entropy(x, labels, **options)
        whole.backward(upstream_of(whole))
        both = ps.cross_entropy_value_and_grad(LOGITS, labels, **options)
        yield labels, options, whole.detach(), x.grad, *both


def expected_rows():
    for function, given, options in ROW_CALLS:
        x = given.clone().requires_grad_(given is LOGITS)
        y = function(x, **options)
        if x.requires_grad:
            y.backward(upstream_of(y))
        yield function, given, options, y.detach(), x.grad


def expected_layers():
    for i, (labels, options) in enumerate(LOSSES):
        inputs = [a.clone().requires_grad_() for a in (HIDDEN, CLASSIFIER, BIAS)[: 2 + i % 2]]
        whole = ps.linear_cross_entropy(*inputs[:2], labels, **bias_of(inputs), **options)
        whole.backward(upstream_of(whole))
        plain = [a.detach() for a in inputs]
        both = ps.linear_cross_entropy_value_and_grad(
            *plain[:2], labels, **bias_of(plain), **options
        )
        yield labels, options, whole.detach(), [a.grad for a in inputs], both


def bias_of(inputs):
    return {"bias": inputs[2]} if inputs[2:] else {}


def losses(mesh, placements, expected):
    """Values and gradients of cross_entropy, and its collectives."""
    cuts = placements.count(ROWS), placements.count(CLASSES)
    for labels, options, whole, slope, value, grad in expected:
        t = sharded(labels, mesh, placements, (0, 1)[: labels.ndim])
        more = options_on(mesh, placements, options)
        d = sharded(LOGITS, mesh, placements).requires_grad_()
        loss, n = counted(ps.cross_entropy, d, t, **more)
        reduces = options.get("reduction") != "none"
        spread = "where" in options and options.get("label_smoothing", 0) > 0
        assert n <= reduces * cuts[0] + (2 + spread) * cuts[1], (options, n)
        close(loss, whole)
        upstream = distribute_tensor(upstream_of(whole), mesh, loss.placements)
        _, n = counted(loss.backward, upstream)
        assert n == 0, (options, n)
        close(d.grad, slope, d, slack=16 * bool(options))  # differences lose digits
        loss, found = ps.cross_entropy_value_and_grad(d.detach(), t, **more)
        close(loss, value)
        close(found, grad, d, slack=16 * bool(options))


def rows(mesh, placements, expected):
    """softmax, log_softmax and logsumexp, and their gradients."""
    for function, x, options, whole, slope in expected:
        d = sharded(x, mesh, placements).requires_grad_(slope is not None)
        y, n = counted(function, d, **options_on(mesh, placements, options))
        assert n <= 2 * len(placements), (function, options, n)
        close(y, whole, d if y.shape == d.shape else None)
        if slope is not None:
            y.backward(distribute_tensor(upstream_of(whole), mesh, y.placements))
            close(d.grad, slope, d, slack=16)
    if CLASSES not in placements:  # by torch's own operations on shards
        d = sharded(LOGITS, mesh, placements)
        for part, whole in zip(ps.online.fold(d), ps.online.fold(LOGITS), strict=True):
            close(part, whole)
    y, dy = ps.softmax(LOGITS), LOGITS.sin()
    for function, a in ((ps.softmax_vjp, y), (ps.log_softmax_vjp, y.log())):
        given = (sharded(a, mesh, placements), sharded(dy, mesh, placements))
        found, n = counted(function, *given)
        assert mesh.size() == 1 or n == placements.count(CLASSES)
        close(found, function(a, dy), given[0], slack=16)
        if function is ps.softmax_vjp:  # of the confident row the last digits
            entries = found.full_tensor()[1], function(a, dy)[1]
            torch.testing.assert_close(*entries, rtol=1e-14, atol=0.0)


def layers(mesh, placements, expected):
    """linear_cross_entropy: positions cut as hidden is, classes as the classifier is."""
    cut = [placements.count(p) for p in (ROWS, CLASSES)]
    for labels, options, whole, slopes, both in expected:
        t = sharded(labels, mesh, placements, (0, 1)[: labels.ndim])
        more = options_on(mesh, placements, options)
        given = ((HIDDEN, (0, 2)), (CLASSIFIER, (1, 2)), (BIAS, (1,)))[: len(slopes)]
        inputs = [sharded(a, mesh, placements, axes).requires_grad_() for a, axes in given]
        more_than_one = {"tile": 8 * C * 2}
        loss = ps.linear_cross_entropy(*inputs[:2], t, **bias_of(inputs), **more, **more_than_one)
        close(loss, whole)
        upstream = distribute_tensor(upstream_of(whole), mesh, loss.placements)
        _, n = counted(loss.backward, upstream)
        assert mesh.size() == 1 or n == cut[1] + cut[0] * len(slopes[1:]), (options, n)
        plain = [a.detach() for a in inputs]
        value, grads = ps.linear_cross_entropy_value_and_grad(
            *plain[:2], t, **bias_of(plain), **more
        )
        close(value, both[0])
        assert all((a is None) == (b is None) for a, b in zip(grads, both[1], strict=True))
        for a, slope, found, wanted in zip(inputs, slopes, grads, both[1], strict=False):
            close(a.grad, slope, a, slack=64)
            close(found, wanted, a, slack=64)


WIDE, SINGLE = {"dtype": torch.float64}, {"dtype": torch.float32}
SHAPES = [
    # The classes first, in the middle and last; a mask of each kind that broadcasts.
    (0, (C, N), {"label_smoothing": 0.1, "where": (C, 1), "reduction": "none"}),
    (1, (2, C, N), {"weight": WEIGHT, "ignore_index": 3, "where": (1, C, N), **WIDE}),
    (
        1,
        (2, C, N),
        {"sample_weight": (2, N), "where": (C, N), "softcap": 3.0, **SINGLE},
    ),
    (2, (2, N, C), {"z_loss": 0.1, "label_smoothing": 0.2, "where": (2, N, 1), "reduction": "sum"}),
    (2, (2, N, C), {"ignore_index": 10**6, **WIDE}),
]


def expected_shapes():
    """Calls of float32 and bfloat16 logits of more axes, beside those of whole tensors."""
    random = torch.Generator().manual_seed(1)
    for i, (axis, shape, options) in enumerate(SHAPES):
        x = torch.randn(shape, generator=random).to((torch.float32, torch.bfloat16)[i % 2])
        t = torch.randint(C, shape[:axis] + shape[axis + 1 :], generator=random)
        given = dict(options)
        if "where" in given:
            given["where"] = torch.rand(given["where"], generator=random) < 0.8
            whole = given["where"].expand(shape).movedim(axis, -1)
            if not whole.all(-1).all():  # labels of classes that take part
                t = whole.to(torch.uint8).argmax(-1)
        if "sample_weight" in given:
            given["sample_weight"] = torch.rand(given["sample_weight"], generator=random)
        if "weight" in given:
            given["weight"] = given["weight"].float()
        given |= {"axis": axis, "check_labels": False}
        yield x, t, given, ps.cross_entropy_value_and_grad(x, t, **given)


def shapes(mesh, placements, expected):
    """Logits of any axes, with the classes along any of them."""
    for x, t, options, (whole, slope) in expected:
        axis, every = options["axis"], list(range(x.ndim))
        batch = [a for a in every if a != axis]
        place = {ROWS: Shard(batch[-1]), CLASSES: Shard(axis), WHOLE: WHOLE}

        there = [place[p] for p in placements]

        def cut(a, axes, there=there, x=x):
            """Distribute an array, whose axes are those `axes` of the logits."""
            own = [
                Shard(axes.index(p.dim))
                if p.is_shard() and p.dim in axes and a.shape[axes.index(p.dim)] == x.shape[p.dim]
                else WHOLE
                for p in there
            ]
            return distribute_tensor(a, mesh, own)

        axes = {"weight": [axis], "sample_weight": batch}
        given = {
            n: cut(v, axes.get(n, every[-v.ndim :])) if isinstance(v, torch.Tensor) else v
            for n, v in options.items()
        }
        d, labels = cut(x, every), cut(t, batch)
        loss, grad = ps.cross_entropy_value_and_grad(d, labels, **given)
        close(loss, whole, slack=64)
        close(grad, slope, d, slack=64)
        d.requires_grad_()
        loss = ps.cross_entropy(d, labels, **given)
        close(loss, whole, slack=64)
        loss.sum().backward()
        close(d.grad, slope, d, slack=64)


def raises(kind, text, function, *args, **kwargs):
    with pytest.raises(kind) as found:
        function(*args, **kwargs)
    assert text in str(found.value), found.value


def refusals(mesh, placements):
    """What is not taken says so on every rank, and what to do."""
    x, t = sharded(LOGITS, mesh, placements), sharded(LABELS, mesh, placements, (0,))
    raises(TypeError, "both must come from one library", ps.cross_entropy, x, LABELS)
    raises(TypeError, "redistribute", ps.logsumexp, x, b=x) if CLASSES in placements else None
    for function in (ps.entropy, ps.sigmoid_cross_entropy, ps.kl_divergence, ps.entmax_loss):
        second = () if function is ps.entropy else (t,) if function is ps.entmax_loss else (x,)
        raises(TypeError, "full_tensor", function, x, *second)
    if CLASSES in placements:
        raises(TypeError, "redistribute", ps.entmax, x)
    else:
        close(ps.entmax(x), ps.entmax(LOGITS), x)
        close(ps.logmeanexp(x, axis=1), ps.logmeanexp(LOGITS, axis=1))
        close(ps.logcumsumexp(x), ps.logcumsumexp(LOGITS), x)
    value_and_grad = ps.cross_entropy_value_and_grad
    raises(TypeError, "no_grad", value_and_grad, x.detach().requires_grad_(), t)
    sums = DTensor.from_local(LOGITS, mesh, [Partial()] * mesh.ndim, run_check=False)
    raises(TypeError, "redistribute it first", ps.softmax, sums)
    with ps.kernels.portable():
        raises(TypeError, "full_tensor", ps.softmax, x)
    wrong = sharded(torch.tensor([0, 1, 2, 3, 9]), mesh, placements, (0,))
    raises(IndexError, "outside [0, 9)", ps.cross_entropy, x, wrong)
    weight = sharded(WEIGHT, mesh, [WHOLE] * mesh.ndim).requires_grad_()
    raises(TypeError, "require gradients", ps.cross_entropy, x, t, weight=weight)
    given = x.detach().requires_grad_()
    loss = ps.cross_entropy(given, t)
    (slope,) = torch.autograd.grad(loss, given, create_graph=True)
    if CLASSES in placements:
        raises(RuntimeError, "once_differentiable", slope.sum().backward)
    loss = ps.cross_entropy(x.detach().requires_grad_(), t)
    t.add_(0)
    raises(RuntimeError, "inplace operation", loss.backward)
    hidden = sharded(LOGITS, mesh, [CLASSES] * mesh.ndim)
    raises(TypeError, "what is multiplied", ps.linear_cross_entropy, hidden, hidden, t)
    assert ps.kernels.explain("cross_entropy", x, t).startswith("dtensor shards")
    if mesh.size() == 1:  # what is traced needs no other rank
        for function, *given in (
            (ps.softmax, x),
            (ps.cross_entropy, x, t),
            (ps.linear_cross_entropy, x, sharded(LOGITS, mesh, [WHOLE]), t % N),
        ):
            compiled = torch.compile(function, backend="eager")
            raises(TypeError, "(traced: torch.compile): pass x.to_local()", compiled, *given)


MESHES = {
    1: [((1,), (CLASSES,))],
    2: [((2,), (WHOLE,)), ((2,), (ROWS,)), ((2,), (CLASSES,))],
    4: [
        ((4,), (ROWS,)),
        ((4,), (CLASSES,)),
        ((2, 2), (ROWS, CLASSES)),
        ((2, 2), (CLASSES, WHOLE)),
        ((2, 2), (CLASSES, CLASSES)),
    ],
}


def run(rank, size, folder, expected):
    """Check everything on one rank."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{size}", rank=rank, world_size=size,
        timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip
    for shape, placements in MESHES[size]:
        mesh = init_device_mesh("cpu", shape)
        for check, cases in zip((losses, rows, layers, shapes), expected, strict=True):
            check(mesh, placements, cases)
        refusals(mesh, placements)
    dist.destroy_process_group()


def main(folder, *sizes):
    torch.set_num_threads(1)  # and no thread before the processes part
    makers = expected_losses, expected_rows, expected_layers, expected_shapes
    expected = [list(make()) for make in makers]
    failed = 0
    for size in map(int, sizes):
        children = []
        for rank in range(size):
            if child := os.fork():
                children.append(child)
                continue
            try:
                run(rank, size, folder, expected)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        failed += sum(os.waitpid(child, 0)[1] != 0 for child in children)
    sys.exit(f"{failed} ranks failed" if failed else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
