"""Triton's kernels on a CUDA device: what its interpreter cannot show.

Programs that run at the same time, arrays of more than 2^31 entries, streams, graphs and threads.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

import portable_softmax as ps
from portable_softmax import kernels


@pytest.fixture(autouse=True)
def _only_a_device(backend_name):
    if backend_name != "triton-cuda":
        pytest.skip("for a CUDA device: pytest --backend triton-cuda")


@pytest.fixture
def drawn(torch, xp):
    """Return a function that draws an array of a shape."""
    random = torch.Generator(xp.place).manual_seed(0)

    def draw(*shape, dtype="float32"):
        made = torch.empty(shape, dtype=getattr(torch, dtype), device=xp.place)
        return made.normal_(0, 3, generator=random)

    return draw


def labels_for(torch, x, axis):
    """Return labels of every class in turn."""
    shape = x.select(axis, 0).shape
    return (torch.arange(shape.numel(), device=x.device) % x.shape[axis]).reshape(shape)


def answers(torch, x, axis):
    """Return what each kernel answers; nothing waits for the device."""
    labels = labels_for(torch, x, axis)
    dy = torch.sin(torch.arange(x.numel(), device=x.device)).reshape(x.shape).to(x.dtype)
    y, log_y = ps.softmax(x, axis=axis), ps.log_softmax(x, axis=axis)
    how = {"axis": axis, "reduction": "none", "check_labels": False}
    return {
        "softmax": y,
        "log_softmax": log_y,
        "logsumexp": ps.logsumexp(x, axis=axis),
        "softmax_vjp": ps.softmax_vjp(y, dy, axis=axis),
        "log_softmax_vjp": ps.log_softmax_vjp(log_y, dy, axis=axis),
        "cross_entropy": ps.cross_entropy(x, labels, **how),
        "gradient": ps.cross_entropy_value_and_grad(x, labels, **how)[1],
    }


def check(torch, x, axis):
    """Return the answers, which are those of the portable path in float64."""
    found = answers(torch, x, axis)
    with kernels.portable():
        expected = answers(torch, x.double(), axis)
    near = 1e-5 if x.dtype == torch.float32 else 2.0**-7
    for name, answer in found.items():
        torch.testing.assert_close(
            answer.double(), expected[name], rtol=near, atol=near, msg=lambda m, n=name: f"{n}: {m}"
        )
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((1, 1_000_000), 1),
        ((8, 131_072), 1),
        ((300, 131_072), 1),
        ((1_000_000, 5), 0),
        ((3, 40_000, 33), 1),
        ((4_000, 1_000), 1),
    ],
)
def test_programs_that_run_at_the_same_time(torch, drawn, shape, axis, dtype):
    """Whichever of them folds a part, the bits are the same, again and again."""
    x = drawn(*shape, dtype=dtype)
    first = check(torch, x, axis)
    for _ in range(10):
        for name, again in answers(torch, x, axis).items():
            assert torch.equal(again, first[name]), name


@pytest.mark.parametrize(
    ("shape", "axis"), [((2_200_000, 1_000), 1), ((33_000, 66_000), 1), ((33_000, 66_000), 0)]
)
def test_more_entries_than_32_bits_count(torch, drawn, shape, axis):
    x = drawn(*shape, dtype="float16")
    last = slice(shape[1 - axis] - 3, None)
    at = (last, slice(None)) if axis else (slice(None), last)
    labels = labels_for(torch, x, axis)
    how = {"axis": axis, "reduction": "none", "check_labels": False}
    loss, grad = ps.cross_entropy_value_and_grad(x, labels, **how)
    with kernels.portable():
        expected = ps.cross_entropy_value_and_grad(x[at].double(), labels[last], **how)
        p = ps.softmax(x[at].double(), axis=axis)
    torch.testing.assert_close(loss[last].double(), expected[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(grad[at].double(), expected[1], rtol=1e-3, atol=1e-7)
    del grad
    torch.testing.assert_close(ps.softmax(x, axis=axis)[at].double(), p, rtol=1e-3, atol=1e-7)


def test_the_current_stream(torch, drawn):
    """What is launched on another stream would not wait for the input."""
    x = drawn(64, 50_000)
    expected, side = answers(torch, x * 2, 1), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        found = answers(torch, x * 2, 1)
    side.synchronize()
    for name, answer in found.items():
        assert torch.equal(answer, expected[name]), name


def test_a_graph_replays(torch, drawn):
    x = drawn(4, 50_000)
    answers(torch, x, 1)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = answers(torch, x, 1)
    for _ in range(3):
        x.copy_(drawn(4, 50_000))
        graph.replay()
        for name, answer in answers(torch, x, 1).items():
            assert torch.equal(captured[name], answer), name


def test_threads_with_a_stream_each(torch, drawn):
    given = [drawn(16, 60_000) for _ in range(4)]
    expected = [answers(torch, x, 1) for x in given]
    torch.cuda.synchronize()

    def work(x):
        # A switch is of its thread.
        with kernels.use("triton rows"), torch.cuda.stream(torch.cuda.Stream()):
            found = [answers(torch, x, 1) for _ in range(5)]
            torch.cuda.current_stream().synchronize()
        return found

    with ThreadPoolExecutor(len(given)) as pool:
        for found, wanted in zip(pool.map(work, given), expected, strict=True):
            for one in found:
                assert all(torch.equal(one[name], wanted[name]) for name in wanted)


@pytest.mark.slow("torch.compile compiles each graph")
def test_compiled_code_that_cuda_graphs_replay(torch, drawn):
    """The layer asks which positions count, which no graph can record."""
    hidden, classifier = drawn(300, 64), drawn(1_000, 64)
    labels = torch.arange(300, device=hidden.device) - 1

    def step(hidden):
        loss = ps.linear_cross_entropy(
            hidden, classifier, labels, ignore_index=-1, check_labels=False
        )
        return loss + ps.logsumexp(hidden * 2, axis=1).sum()

    torch.compiler.reset()
    compiled = torch.compile(step, mode="reduce-overhead")
    for _ in range(4):
        torch.testing.assert_close(compiled(hidden), step(hidden), rtol=1e-5, atol=1e-4)
    torch.compiler.reset()
