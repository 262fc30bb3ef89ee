"""Modules that hold norms as public models have them, and what their calls fuse."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import triton_gn
from triton_gn import convert

N, C, GROUPS = 2, 6, 3
FUSED = ("activation", "scale", "shift", "residual", "pre_add")


class Calls(TorchFunctionMode):
    """The operands and the activation of each call of triton_gn.group_norm."""

    def __init__(self) -> None:
        super().__init__()
        self.fused: list[list[str]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is triton_gn.group_norm:
            self.fused.append([name for name in FUSED if kwargs.get(name) is not None])
        return func(*args, **kwargs)


def tensor(*shape: int, **options: Any) -> Tensor:
    return torch.randn(*(shape or (N, C, 4, 5)), dtype=torch.float64, **options)


def make(kind: type[nn.Module]) -> Any:
    """Return a module in float64 with random parameters."""
    model = kind().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def step(model: nn.Module, *args: Tensor) -> list[Tensor]:
    """Return the result, then the gradients of all tensors and parameters, if there are any."""
    torch.manual_seed(1)
    y = model(*args)
    if not torch.is_grad_enabled():
        return [y]
    leaves = [*args, *model.parameters()]
    grads = torch.autograd.grad(y.square().sum() + y.sum(), leaves, allow_unused=True)
    return [y, *(grad for grad in grads if grad is not None)]


def calls_of(model: Any, *args: Any, **kwargs: Any) -> list[list[str]]:
    """Return what each call of group_norm fuses. The first call, which may trace, is not seen."""
    model(*args, **kwargs)
    calls = Calls()
    with calls:
        model(*args, **kwargs)
    return calls.fused


def check(model: nn.Module, *args: Any) -> list[list[str]]:
    """Compare a converted model with its copy from before; return what its calls fuse."""
    for value in args:
        value.requires_grad_(torch.is_grad_enabled())
    original = copy.deepcopy(model)
    convert(model)
    for received, expected in zip(step(model, *args), step(original, *args), strict=True):
        torch.testing.assert_close(received, expected, rtol=1e-10, atol=1e-10)
    return calls_of(model, *args)


class Base(nn.Module):
    """Two convolutions, two norms and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(C, C, 3, padding=1) for _ in range(2))
        self.norm1, self.norm2 = (nn.GroupNorm(GROUPS, C) for _ in range(2))
        self.act = nn.SiLU()
        self.flag = True


class Residual(Base):
    """A block of a ResNet, which adds in place, with a projection that ends in a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(C, C, 1), nn.GroupNorm(1, C))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        x = self.down(x)
        y += x
        return self.relu(y)


class Embedding(Base):
    def forward(self, x: Tensor, emb: Tensor) -> Any:
        y = self.conv1(self.act(self.norm1(x)))
        y = y + emb[:, :, None, None]
        return x + self.conv2(F.silu(self.norm2(y), inplace=True))


class ScaleShift(Base):
    def forward(self, x: Tensor, emb: Tensor) -> Any:
        scale, shift = emb[..., None, None].chunk(2, dim=1)
        y = self.norm1(self.conv1(x)) * (1 + scale) + shift
        y = self.act(y)
        return torch.addcmul(shift, self.norm2(y), scale + 1).relu_()


class Functional(Base):
    def forward(self, x: Tensor) -> Any:
        y = F.group_norm(x, GROUPS, self.norm1.weight, self.norm1.bias, 1e-3)
        y = F.dropout(F.gelu(y, approximate="tanh"), 0.5, self.training)
        n = self.norm2(y)
        return n * torch.sigmoid(n)


class Skipped(Base):
    """Everything that is None or an identity, as the blocks of timm have it."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.se = nn.Identity(), None

    def forward(self, x: Tensor) -> Any:
        y = self.norm1(self.conv1(x))
        y = self.act(self.drop(y))
        y = self.norm2(self.conv2(y))
        if self.se is not None:
            y = self.se(y)
        return self.act(self.drop(y) + x)


class NormAct(nn.GroupNorm):
    """A subclass with an activation, as timm and transformers have them."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__(GROUPS, C)
        self.drop, self.act = nn.Identity(), act or nn.Identity()

    def forward(self, x: Tensor) -> Any:
        x = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return self.act(self.drop(x))


class ConvNorm(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(C, C, 1), NormAct(act)

    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x))


class Activation(nn.Module):
    """An activation of a library's own."""

    def forward(self, input: Tensor) -> Any:
        return F.gelu(input)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = ConvNorm(nn.SiLU()), ConvNorm()
        self.act = Activation()

    def forward(self, x: Tensor) -> Any:
        return self.act(self.last(self.first(x)) + x)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.GroupNorm(GROUPS, C), nn.SiLU(), nn.GroupNorm(1, C)])

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


IMAGE, ROWS, BOTH = (N, C, 4, 5), (N, C), (N, 2 * C)
BLOCKS: dict[type[nn.Module], tuple[list[tuple[int, ...]], list[list[str]]]] = {
    Residual: ([IMAGE], [["activation"], ["activation", "residual"], []]),
    Embedding: ([IMAGE, ROWS], [["activation"], ["activation", "pre_add"]]),
    ScaleShift: ([IMAGE, BOTH], [["activation", "scale", "shift"]] * 2),
    Functional: ([IMAGE], [["activation"]] * 2),
    Skipped: ([IMAGE], [["activation"], ["activation", "residual"]]),
    Nested: ([IMAGE], [["activation"], ["activation", "residual"]]),
    Listed: ([IMAGE], [["activation"], []]),
}
each_block = pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.__name__)
