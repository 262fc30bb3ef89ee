"""exact_tiles through the kernels: against the model in one piece."""

import pytest
import torch
from torch import nn

import triton_gn
from triton_gn.ops import stats
from triton_gn.tiling import exact_tiles


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "innermost"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_decoder(
    dtype: torch.dtype, channels_last: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    decoder = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        triton_gn.GroupNorm(2, 4, activation="silu"),
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.GroupNorm(4, 4),
    ).to(device, dtype)
    x = torch.randn(1, 3, 5, 4).to(device, dtype) + 3
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
        decoder.to(memory_format=torch.channels_last)
    calls = []
    for name in ("moments", "apply"):
        original = getattr(stats, name)
        monkeypatch.setattr(
            stats,
            name,
            lambda *args, name=name, original=original: calls.append(name) or original(*args),
        )
    with triton_gn.backend("triton"):
        expected = decoder(x)
        with exact_tiles(decoder, (3, 2)):
            y = decoder(x)
    assert (y - expected).abs().max() <= 20 * torch.finfo(dtype).eps * expected.abs().max()
    tiles, norms = 4, 2
    assert calls.count("moments") == calls.count("apply") == tiles * norms
