"""Models of random parameters, run tile by tile and in one piece."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import triton_gn
from tests.support.tensors import random
from triton_gn.tiling import exact_tiles


def fill(model: nn.Module, mean: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Draw random parameters around ``mean``, of a size that keeps activations near 1."""
    for seed, parameter in enumerate(model.parameters()):
        fan_in = max(1, parameter[0].numel())
        values = random(*parameter.shape, seed=seed) / fan_in**0.5 + mean
        parameter.data = values
    return model.to(dtype).eval()


class Run(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(parts)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def difference(y: Tensor, expected: Tensor) -> float:
    assert y.shape == expected.shape
    assert y.dtype is expected.dtype
    return float(((y - expected).abs().max() / expected.abs().max()).detach())


def check(
    model: nn.Module | Callable[..., Any],
    *args: Any,
    tile_size: int | tuple[int, ...] = 3,
    bound: float = 1e-12,
) -> None:
    """Compare a model that runs tile by tile with one piece.

    If an argument requires a gradient, compare those of the arguments and parameters too.
    """
    model = model if isinstance(model, nn.Module) else Run(model)
    expected = model(*args)
    with exact_tiles(model, tile_size):
        y = model(*args)
    assert difference(y, expected) <= bound
    leaves = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    if leaves:
        leaves += model.parameters()
        dy = random(*y.shape, seed=9)
        grads, expected_grads = (torch.autograd.grad(out, leaves, dy) for out in (y, expected))
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert difference(grad, expected_grad) <= 10 * bound


def make_decoder(norm: type[nn.Module] = nn.GroupNorm) -> nn.Module:
    return fill(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            triton_gn.GroupNorm(2, 8, activation="silu"),
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(8, 8, 5, padding=4, dilation=2, groups=2),
            norm(4, 8),
            nn.SiLU(),
            nn.Conv2d(8, 12, 1),
            nn.PixelShuffle(2),
        ),
        mean=0.3,
    )


def make_autoencoder(dtype: torch.dtype) -> Any:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    return fill(model.requires_grad_(False), 0.05).to(dtype)
