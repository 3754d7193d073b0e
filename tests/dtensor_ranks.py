"""One rank of test_dtensor: calls on DTensors beside the same calls on whole tensors.

python tests/dtensor_ranks.py RANK SIZE FILE
"""

import datetime
import itertools
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import portable_softmax as ps

N, C, H = 5, 7, 3  # not to be divided by 2 or 4
WHOLE, ROWS, CLASSES = Replicate(), Shard(0), Shard(1)
torch.manual_seed(0)
LOGITS = torch.randn(N, C, dtype=torch.float64) * 5
LOGITS[1] = 0.0
LOGITS[1, 6] = 45.0  # a confident row
LABELS = torch.tensor([0, 6, 3, 2, 5])
GIVEN = torch.randn(N, C, dtype=torch.float64).softmax(1)
MASK = torch.ones(N, C, dtype=torch.bool)
MASK[0, 1:3] = MASK[2, 6] = MASK[4, 0] = False
PADDED = torch.tensor([True] * 6 + [False])
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
    (torch.tensor([0, -1, 7, 2, 5]), {"check_labels": False, "reduction": "none"}),
    (GIVEN, {"weight": WEIGHT, "label_smoothing": 0.1}),
    (GIVEN, {"sample_weight": SAMPLE, "where": MASK, "reduction": "none"}),
]


def sharded(a, mesh, placements, axes=(0, 1)):
    """Distribute a tensor, whose axes are those `axes` of the logits."""
    there = [
        Shard(axes.index(p.dim)) if p.is_shard() and p.dim in axes and a.shape[axes.index(p.dim)] > 1
        else WHOLE
        for p in placements
    ]  # fmt: skip
    return distribute_tensor(a, mesh, there)


def options_on(mesh, placements, options):
    axes = {"weight": (1,), "sample_weight": (0,)}
    found = {}
    for name, value in options.items():
        if isinstance(value, torch.Tensor):
            # Half of them lie as the logits do, and half are whole on each rank.
            place = placements if name in ("where", "sample_weight") else [WHOLE] * mesh.ndim
            own = axes.get(name, (0, 1)[2 - value.ndim :])
            value = sharded(value, mesh, place, own)
        found[name] = value
    return found


def close(found, wanted, like=None):
    """Compare type, dtype, shape, placements and values."""
    assert found.dtype == wanted.dtype, (found.dtype, wanted.dtype)
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    if like is not None:
        assert found.placements == like.placements, (found.placements, like.placements)
    found = found.full_tensor().detach()
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-13, atol=1e-15, equal_nan=True)


def counted(function, *args, **kwargs):
    """Return the answer, and how many all-reduces it took; there is no other collective."""
    with CommDebugMode() as mode:
        found = function(*args, **kwargs)
    counts = {
        str(name).split(".")[-1].strip("'>)"): n for name, n in mode.get_comm_counts().items()
    }
    assert not set(counts) - {"all_reduce"}, counts
    return found, counts.get("all_reduce", 0)


def losses(mesh, placements):
    for labels, options in LOSSES:
        axes = (0, 1)[: labels.ndim]
        t = sharded(labels, mesh, placements, axes)
        more = options_on(mesh, placements, options)
        x = LOGITS.clone().requires_grad_()
        whole = ps.cross_entropy(x, labels, **options)
        upstream = torch.linspace(1, 2, whole.numel()).double().reshape(whole.shape)
        whole.backward(upstream)
        d = sharded(LOGITS, mesh, placements).requires_grad_()
        loss = ps.cross_entropy(d, t, **more)
        close(loss, whole)
        place = loss.placements
        loss.backward(distribute_tensor(upstream, mesh, place))
        close(d.grad, x.grad, d)
        loss, grad = ps.cross_entropy_value_and_grad(d.detach(), t, **more)
        value, slopes = ps.cross_entropy_value_and_grad(LOGITS, labels, **options)
        close(loss, value)
        close(grad, slopes, d)
