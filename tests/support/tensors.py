"""Random tensors and memory formats."""

import torch
from torch import Tensor


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw from the normal distribution: the same float64 numbers for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def channels_innermost(x: Tensor) -> Tensor:
    """Copy x so that its channels are adjacent in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)
