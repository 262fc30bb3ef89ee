"""What only a GPU can show. The kernels' results there: tests/kernels without TRITON_INTERPRET."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch

import triton_gn
from triton_gn.ops.device import gpu_of
from triton_gn.plan import Device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
STRATEGIES = pytest.mark.parametrize("strategy", ["resident", "pipelined", "split"])
Results = tuple[torch.Tensor, ...]
FORMATS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=str
)


def gpu() -> Device:
    return gpu_of(torch.device("cuda", torch.cuda.current_device()))


@FORMATS
def test_beyond_2_to_the_31_elements(memory_format: torch.memory_format) -> None:
    """The last sample of 2.3e9 elements has the bits that it has alone."""
    x = torch.empty(34, 64, 1024, 1024, dtype=torch.float16, device="cuda")
    x = x.to(memory_format=memory_format).normal_()
    last = x[-1:].clone(memory_format=torch.preserve_format)
    with triton_gn.backend("triton"), triton_gn.batch_invariant():
        y = triton_gn.group_norm(x, 32)[-1:]
        assert torch.equal(y, triton_gn.group_norm(last, 32))


def test_one_group_of_2_to_the_31_elements() -> None:
    x = torch.empty(1, 2, 2**30 + 64, dtype=torch.float16, device="cuda").normal_(30.0, 2.0)
    with triton_gn.backend("triton"):
        y = triton_gn.group_norm(x, 1)
    tail = x[..., -4096:].double()
    # the sample's own mean and standard deviation are 30 and 2 to 1e-4, a tenth of an ulp of y
    assert torch.allclose(y[..., -4096:].double(), (tail - 30) / 2, rtol=2e-3, atol=2e-3)


@FORMATS
@pytest.mark.parametrize("strategy", ["rule", "pipelined", "split"])
@pytest.mark.parametrize("shape", [(2, 320, 16, 16), (1, 64, 256, 256)])
def test_cuda_graph(
    shape: tuple[int, ...], strategy: str, memory_format: torch.memory_format
) -> None:
    with triton_gn.plan_override(**({} if strategy == "rule" else {"strategy": strategy})):
        replay_with_other_values(shape, memory_format)


def replay_with_other_values(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    x = torch.randn(shape, device="cuda").to(memory_format=memory_format).requires_grad_()
    layer = triton_gn.GroupNorm(32, shape[1], device="cuda")
    dy = torch.randn_like(x)

    def step() -> Results:
        y = layer(x)
        return (y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), dy))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.normal_()
        dy.normal_()
    graph.replay()
    for replayed, expected in zip(captured, step(), strict=True):
        assert torch.equal(replayed, expected)


@STRATEGIES
def test_two_streams_at_once(strategy: str) -> None:
    inputs = [torch.randn(2, 128, 64, 128, device="cuda") for _ in range(2)]
    with triton_gn.plan_override(strategy=strategy):
        of_two_streams(inputs)


def of_two_streams(inputs: list[torch.Tensor]) -> None:
    expected = [triton_gn.group_norm(x, 32) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(50):
        results = []
        for x, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(triton_gn.group_norm(x, 32))
        torch.cuda.synchronize()
        assert all(map(torch.equal, results, expected))


def repeat_among_others(
    steps: Sequence[Callable[[], Results]], expected: Sequence[Results], times: int
) -> None:
    """Each step on a stream of its own, all at once, beside a matrix product: always its bits."""
    streams = [torch.cuda.Stream() for _ in steps]
    other, matrix = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda").half()
    torch.cuda.synchronize()
    for _ in range(times):
        with torch.cuda.stream(other):
            matrix @ matrix
        results = []
        for step, stream in zip(steps, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(step())
        torch.cuda.synchronize()
        for result, answer in zip(results, expected, strict=True):
            assert all(map(torch.equal, result, answer))


@FORMATS
@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [
        ((1, 128, 512, 512), 32),
        ((4, 96, 56, 56), 96),
        ((2, 64, 40, 40), 4),
        ((1, 16, 1024, 999), 1),
    ],
    ids=str,
)
def test_pipelined_among_others_thousands_of_times(
    shape: tuple[int, ...], num_groups: int, memory_format: torch.memory_format
) -> None:
    """It ends, and with the same bits, whatever else runs: on four streams at once, beside a matrix
    product, with few programs and with more than the GPU holds."""
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(memory_format=memory_format)
    x.requires_grad_()
    dy = torch.randn_like(x)

    def step(**fields: int | str) -> Results:
        with triton_gn.backend("triton"), triton_gn.plan_override(**fields):
            y = triton_gn.group_norm(x, num_groups, activation="silu")
            return (y.detach(), *torch.autograd.grad(y, x, dy))

    expected = step(strategy="pipelined", persistent_programs=7)
    for pipelined, split in zip(expected, step(strategy="split"), strict=True):
        torch.testing.assert_close(pipelined, split)
    grids: tuple[dict[str, int], ...] = (
        {},
        {"persistent_programs": 1},
        {"persistent_programs": 200},
        {"persistent_programs": 20_000},
    )
    steps = [partial(step, strategy="pipelined", **grid) for grid in grids]
    repeat_among_others(steps, [expected] * len(steps), times=500)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_input_on_another_than_the_current_device() -> None:
    x = torch.randn(2, 64, 32, 32, device="cuda:1")
    with triton_gn.backend("triton"):
        y = triton_gn.group_norm(x, 8)
    assert torch.equal(y.cpu(), triton_gn.group_norm(x.to("cuda:0"), 8).cpu())


@FORMATS
@STRATEGIES
def test_fused_step_under_torch_compile(strategy: str, memory_format: torch.memory_format) -> None:
    """Inductor's graph runs the same kernels, so it gives the same bits."""
    layer = triton_gn.GroupNorm(32, 320, activation="silu", device="cuda")
    x = torch.randn(2, 320, 32, 32, device="cuda").to(memory_format=memory_format)
    scale, shift, pre_add = torch.randn(3, 2, 320, device="cuda")

    def step(forward: Callable[..., torch.Tensor]) -> Results:
        leaf = x.detach().requires_grad_()
        y = forward(leaf, scale=scale, shift=shift, pre_add=pre_add, residual=x)
        return (y.detach(), *torch.autograd.grad(y.square().sum(), (leaf, layer.weight)))

    with triton_gn.plan_override(strategy=strategy):
        compiled = step(torch.compile(layer, fullgraph=True))
        assert all(map(torch.equal, compiled, step(layer)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_autocast(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 32, 8, 8, device="cuda", dtype=dtype), torch.ones(32, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        theirs = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 4, weight))
        ours = triton_gn.group_norm(x, 4, weight, activation="silu")
        with triton_gn.autocast_policy("keep"):
            kept = triton_gn.group_norm(x, 4, weight, activation="silu")
    assert ours.dtype is theirs.dtype is torch.float32
    assert kept.dtype is dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_first_call_under_capture_works_or_raises() -> None:
    """A shape, dtype and activation that no other test uses: its kernels are compiled here."""
    x = torch.randn(3, 88, 11, 13, device="cuda", dtype=torch.float16)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            y = triton_gn.group_norm(x, 8, activation="mish")
    except RuntimeError:
        torch.cuda.set_stream(stream)  # torch.cuda.graph stays on its own when a capture fails
        return
    graph.replay()
    torch.testing.assert_close(y, triton_gn.group_norm(x, 8, activation="mish"), rtol=0, atol=0)
