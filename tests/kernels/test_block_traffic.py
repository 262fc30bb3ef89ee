"""Bytes that real blocks move around their norms, counted: with the fusion, and without it."""

import os
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import triton_gn
from tests.support.interpreter import Traffic
from triton_gn import fuse

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("counts in Triton's interpreter", allow_module_level=True)

_POINTWISE = ("add", "mul", "relu", "silu")


class Pointwise(TorchDispatchMode):
    """Count the bytes of PyTorch's pointwise operations: their tensors read and written once."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.tensors = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.__name__.partition(".")[0].rstrip("_") in _POINTWISE:
            sizes = [t.numel() for t in (*args, result) if isinstance(t, Tensor)]
            self.tensors += sum(size == self.size for size in sizes)
        return result


class ResNetBlock(nn.Module):
    """The basic block of torchvision's ResNets, with GroupNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)
        )
        self.norm1, self.norm2 = (nn.GroupNorm(4, channels) for _ in range(2))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += x
        return self.relu(out)  # type: ignore[no-any-return]


class DiffusionBlock(nn.Module):
    """The residual block of diffusion U-Nets, up to its second convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1, self.norm2 = (nn.GroupNorm(4, channels) for _ in range(2))
        self.embed, self.act = nn.Linear(6, channels), nn.SiLU()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.conv1(self.act(self.norm1(x)))
        hidden = hidden + self.embed(self.act(embedding))[:, :, None, None]
        return self.act(self.norm2(hidden))  # type: ignore[no-any-return]


# tensors of x's size that the norms and the operations around them move: fused, and not
BLOCKS = {
    # relu(n), then relu(n + x); without fusion a norm, relu, norm, sum and relu: 2 + 2 + 2 + 3 + 2
    ResNetBlock: ((), 2 + 3, 11),
    # silu(n), then silu(norm(h + e)); without fusion a norm, silu, sum, norm and silu
    DiffusionBlock: (((2, 6),), 2 + 2, 10),
}


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("way", ["compiled", "converted", "unfused"])
def test_tensors_moved_by_a_block(kind: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, fused, unfused = BLOCKS[kind]
    torch.manual_seed(0)
    model: Any = kind(16).eval()
    x = torch.randn(2, 16, 8, 8)
    args = (x, *(torch.randn(shape) for shape in shapes))
    left: list[str] = []

    def inner(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
        names = (getattr(node.target, "__name__", "").strip("_") for node in graph.graph.nodes)
        left.extend(name for name in names if name in (*_POINTWISE, "iadd"))
        return graph

    if way != "compiled":
        triton_gn.convert(model, fold_activations=way == "converted")
    with torch.no_grad(), triton_gn.backend("triton"), triton_gn.plan_override(strategy="resident"):
        if way == "compiled":
            torch._dynamo.reset()
            model = torch.compile(model, backend=fuse.backend(inner, always=True))
        model(*args)  # compiles or traces
        pointwise = Pointwise(x.numel())
        with pointwise if way != "compiled" else nullcontext(), Traffic() as kernels:
            model(*args)
    # the embedding's own activation is not of x's size
    assert left == (["silu"] if way == "compiled" and shapes else [])
    of_kernels = kernels.loaded["other"] + kernels.stored["other"]
    tensors = of_kernels / x.nbytes + pointwise.tensors
    expected = unfused if way == "unfused" else fused
    per_channel = 6 * 2 * 16 * 4  # weight, bias and embedding of two norms, for each sample
    assert expected <= tensors <= expected + 2 * per_channel / x.nbytes
