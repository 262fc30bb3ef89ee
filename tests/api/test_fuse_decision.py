"""Where the graph pass takes the kernels: not where they are missing or predicted slower."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import triton_gn
from triton_gn import Report, fuse
from triton_gn.fuse import decision
from triton_gn.ops import dispatch
from triton_gn.plan import TARGETS

LARGE = (8, 320, 128, 128)  # beyond L2
SMALL = (2, 320, 16, 16)
Block = Callable[[Tensor], Tensor]


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fake tensors be on an H100 that has kernels."""
    monkeypatch.setattr(dispatch, "why_not_kernels", lambda x: None)
    monkeypatch.setattr(decision, "gpu_of", lambda device: TARGETS["sm_90"])


def fused_in(block: Block, shape: tuple[int, ...], **options: Any) -> Report:
    traced = fx.symbolic_trace(block)
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(shape, device="cuda", dtype=torch.float16)
        return fuse.graph(traced, [x], **options)


def norm(x: Tensor) -> Tensor:
    return F.group_norm(x, 32)


def conv_after(x: Tensor) -> Tensor:
    return F.conv2d(norm(x), x.new_empty(8, 320, 1, 1))


def unknown_after(x: Tensor) -> Tensor:
    return F.softplus(norm(x))


@pytest.mark.usefixtures("_gpu")
def test_norm_without_neighbours_takes_kernels_that_read_once() -> None:
    ((_, reason),) = fused_in(conv_after, LARGE).replaced
    assert "is not an operation that can be fused" in reason


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("shape", [LARGE, SMALL])
def test_pointwise_neighbour_that_cannot_be_fused_leaves_the_norm_to_inductor(
    shape: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "triton_gn.fuse"):
        ((_, reason),) = fused_in(unknown_after, shape).left
    assert "softplus after it, Inductor's own" in reason
    assert reason in caplog.text


@pytest.mark.usefixtures("_gpu")
def test_always_overrides_the_prediction() -> None:
    assert len(fused_in(unknown_after, LARGE, always=True).replaced) == 1


@pytest.mark.usefixtures("_gpu")
def test_what_can_be_fused_is_not_asked() -> None:
    assert len(fused_in(lambda x: F.silu(norm(x)), SMALL).folded) == 1


@pytest.mark.usefixtures("_gpu")
def test_a_call_of_this_package_stays_one() -> None:
    ((_, reason),) = fused_in(lambda x: triton_gn.group_norm(x, 32).exp(), LARGE).left
    assert reason.endswith("it is a call of triton_gn already")


@pytest.mark.usefixtures("_gpu")
def test_unpredictable_norms_are_left() -> None:
    def block(x: Tensor) -> Tensor:
        return norm(x.narrow(3, 0, 64))

    ((_, reason),) = fused_in(block, LARGE).left
    assert reason.endswith("its input is empty or would be copied")


@pytest.mark.usefixtures("_gpu")
def test_dynamic_sizes_are_left_unless_something_is_fused() -> None:
    reports: list[Report] = []

    def compiler(graph_module: fx.GraphModule, inputs: list[Any]) -> Any:
        unfused = copy.deepcopy(graph_module)  # what can run here
        reports.append(fuse.graph(graph_module))
        return unfused

    def block(x: Tensor) -> Tensor:
        return F.softplus(norm(x)) + F.silu(norm(x))

    torch._dynamo.reset()
    compiled = torch.compile(block, backend=compiler, dynamic=True)
    compiled(torch.randn(2, 64, 8, 8))
    (report,) = reports
    ((_, reason),) = report.left
    assert reason.endswith("its sizes are not known, so that its time cannot be predicted")
    assert len(report.folded) == 1


def test_device_without_kernels_is_left() -> None:
    traced = fx.symbolic_trace(lambda x: F.silu(norm(x)))
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 32, 8, device="xpu")
        ((_, reason),) = fuse.graph(traced, [x]).left
    assert reason == "the input is on xpu:0, for which there are no kernels"


def test_unknown_device_is_left() -> None:
    ((_, reason),) = fuse.graph(fx.symbolic_trace(lambda x: F.silu(norm(x)))).left
    assert reason.startswith("its device is not known")
