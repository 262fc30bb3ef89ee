"""exact_tiles on the CPU: equal to the whole, or refused."""

import contextvars
import math
import operator
import os
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import triton_gn
from tests.support.pairs import each_pair
from tests.support.tensors import random
from triton_gn.ops import settings
from triton_gn.tiling import NotExactError, exact_tiles, spatial


def fill(model: nn.Module, mean: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Random parameters around ``mean``, of a size that keeps activations near 1."""
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
) -> Tensor:
    """Run the model tile by tile and compare with one piece; return the output."""
    model = model if isinstance(model, nn.Module) else Run(model)
    expected = model(*args)
    with exact_tiles(model, tile_size):
        y: Tensor = model(*args)
    assert difference(y, expected) <= bound
    return y


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


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


# Equal to the whole


@pytest.mark.parametrize("tile_size", [2, 5, (3, 4), (9, 2), (2, 9), 64], ids=str)
def test_sequential_decoder(tile_size: int | tuple[int, ...]) -> None:
    check(make_decoder(), random(2, 3, 9, 7), tile_size=tile_size)


def test_naive_tiles_differ() -> None:
    """The tests above can fail: naive tiles have other statistics and other borders."""
    decoder, x = make_decoder(), random(2, 3, 8, 6)
    naive = torch.cat([decoder(part) for part in x.split(4, 2)], 2)
    assert difference(naive, decoder(x)) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_dtypes_round_only(dtype: torch.dtype) -> None:
    decoder, x = make_decoder().to(dtype), random(2, 3, 9, 7, dtype=dtype)
    bound = 4e-6 if dtype is torch.float32 else 4e-2
    check(decoder, x, bound=bound)


def test_channels_last_is_kept() -> None:
    x = random(2, 3, 9, 7).to(memory_format=torch.channels_last)
    decoder: Any = make_decoder()
    decoder.to(memory_format=torch.channels_last)
    formats = []
    decoder[3].register_forward_hook(
        lambda _, args, y: formats.append(
            y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
        )
    )
    check(decoder, x)
    assert all(formats)


@pytest.mark.parametrize(
    "norm",
    [
        lambda x, w: F.group_norm(x, 2, w, w),
        lambda x, w: torch.group_norm(x, 2, w, w),
        lambda x, w: triton_gn.group_norm(x, 2, w, activation="gelu"),
        lambda x, w: triton_gn.group_norm(
            x, 2, scale=w, shift=w, residual=x * 2, pre_add=torch.stack([w, -w])
        ),
        lambda x, w: F.group_norm(x.flatten(2), 2, w, w).unflatten(2, x.shape[2:]),
    ],
)
def test_norms(norm: Callable[..., Tensor]) -> None:
    check(norm, random(2, 4, 7, 5) + 50, random(4))


# in one dimension test_windows_and_tiles_of_any_size takes all combinations
@each_pair("size stride dilation padding", [1, 2, 3, 5], [1, 2], [1, 2], [0, 1, 2, 3])
def test_convolutions(size: int, stride: int, dilation: int, padding: int) -> None:
    layer = fill(nn.Conv2d(4, 4, size, stride, padding, dilation, groups=2))
    check(layer, random(2, 4, 32, 30), tile_size=11)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("size", [3, 4])
def test_padding_by_name(padding: str, size: int) -> None:
    check(fill(nn.Conv2d(3, 4, size, padding=padding)), random(2, 3, 9, 8), tile_size=4)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate"])
def test_padding_modes_in_a_residual_block(mode: Any) -> None:
    conv = fill(nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode))
    check(Run(lambda x: x + conv(x), conv), random(2, 4, 9, 7))


def test_windows_may_lie_in_the_padding_only() -> None:
    layer = fill(nn.Conv2d(1, 1, 1, stride=2, padding=1))
    check(layer, random(1, 1, 1, 2), tile_size=(1, 1))
    check(fill(nn.Conv1d(2, 3, 1, padding=5)), random(1, 2, 7))
    check(fill(nn.Conv2d(2, 3, (1, 3), (2, 1), (1, 2))), random(1, 2, 2, 7), tile_size=(1, 2))
    check(fill(nn.Conv1d(2, 3, 1, 4, padding=5)), random(1, 2, 7))


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, 4, 7])
@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_windows_and_tiles_of_any_size(size: int, stride: int, padding: int, dilation: int) -> None:
    """The values, a refusal, or the error of the whole."""
    layer = fill(nn.Conv1d(2, 3, size, stride, padding, dilation))
    for pixels in (2, 3, 7, 10):
        x = random(1, 2, pixels)
        expected = None if pixels + 2 * padding <= dilation * (size - 1) else layer(x)
        for tile_size in (1, 2, 5):
            with exact_tiles(layer, tile_size):
                if expected is None:
                    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
                        layer(x)
                    continue
                try:
                    assert difference(layer(x), expected) <= 1e-12
                except NotExactError as error:
                    assert "Use larger tiles" in str(error)  # noqa: PT017


def test_reflection_of_more_than_a_tile_is_refused() -> None:
    model = Run(lambda x: F.pad(x, (2, 2, 0, 0), mode="reflect"))
    check(model, random(2, 3, 6, 7), tile_size=(2, 4))
    with exact_tiles(model, 2), pytest.raises(NotExactError, match="Use larger tiles"):
        model(random(2, 3, 6, 7))


def test_padding_before_a_strided_convolution() -> None:
    conv = fill(nn.Conv2d(4, 6, 3, stride=2))
    check(Run(lambda x: conv(F.pad(x, (0, 1, 0, 1))), conv), random(2, 4, 10, 7))


def test_halo_beyond_the_neighbour() -> None:
    check(fill(nn.Conv2d(3, 4, 7, padding=3)), random(2, 3, 7, 9), tile_size=1)


def test_one_spatial_dimension() -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
    check(fill(model), random(2, 3, 10))


@pytest.mark.parametrize("tile_size", [3, (2, 3, 4)], ids=["frames whole", "frames cut"])
def test_video(tile_size: int | tuple[int, ...]) -> None:
    causal, same = nn.Conv3d(3, 8, 3, padding=(0, 1, 1)), nn.Conv3d(8, 8, 3, padding=1)
    norm = triton_gn.GroupNorm(4, 8, activation="silu")

    def decode(x: Tensor) -> Tensor:
        x = causal(F.pad(x, (0, 0, 0, 0, 2, 0)))
        x = x + same(norm(x))
        return F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest")

    model = fill(Run(decode, causal, same, norm), 0.2)
    check(model, random(2, 3, 5, 7, 6), tile_size=tile_size)
    channels_last = random(2, 3, 5, 7, 6).to(memory_format=torch.channels_last_3d)
    check(model, channels_last, tile_size=tile_size)


def test_attention_over_all_pixels() -> None:
    """Self attention, cross attention, and attention over time at each pixel."""
    to_qkv = nn.Linear(8, 24)

    def attend(x: Any, text: Any) -> Any:
        n, c, t, h, w = x.shape
        frames = x.transpose(1, 2).reshape(n * t, c, h * w).transpose(1, 2)
        q, k, v = (
            part.view(n * t, -1, 2, c // 2).transpose(1, 2) for part in to_qkv(frames).chunk(3, -1)
        )
        frames = F.scaled_dot_product_attention(q, k, v)
        text = text.view(1, 2, -1, c // 2)
        frames = frames + F.scaled_dot_product_attention(frames, text, text)
        x = frames.transpose(1, 2).reshape(n, t, h, w, c)
        pixels = x.permute(0, 2, 3, 1, 4).reshape(n * h * w, t, c)
        pixels = F.scaled_dot_product_attention(pixels, pixels, pixels, is_causal=True)
        return pixels.reshape(n, h, w, t, c).permute(0, 4, 3, 1, 2)

    model = fill(Run(attend, to_qkv), 0.1)
    check(model, random(2, 8, 3, 5, 4), random(1, 7, 8, seed=1))


MASKS: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "rows": {"attn_mask": random(105, 105)},
    "heads": {"attn_mask": random(2, 1, 105, 105, seed=1) > -1},
    "keys": {"attn_mask": random(1, 105)},
    "frames": {
        "attn_mask": (torch.arange(3)[:, None] >= torch.arange(3))
        .repeat_interleave(35, 0)
        .repeat_interleave(35, 1)
    },
}


@pytest.mark.parametrize("tile_size", [3, (2, 3, 4)], ids=["frames whole", "frames cut"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_of_attention(name: str, tile_size: int | tuple[int, ...]) -> None:
    """The mask is of the whole: each tile takes the rows of its pixels."""

    def attend(x: Any, options: dict[str, Any]) -> Any:
        tokens = x.flatten(2).transpose(1, 2).unflatten(2, (2, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(tokens, tokens * 2, tokens - 1, **options)
        return y.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])

    x = random(2, 8, 3, 5, 7)
    check(attend, x, MASKS[name], tile_size=tile_size)
    expected = torch.autograd.grad(attend(v := x.clone().requires_grad_(), MASKS[name]).sum(), v)
    with exact_tiles(model := Run(attend), tile_size):
        found = torch.autograd.grad(model(v, MASKS[name]).sum(), v)
    assert difference(found[0], expected[0]) < 1e-11


def test_masks_beside_cut_batches_and_uncut_tokens() -> None:
    def over_channels(x: Any, mask: Tensor) -> Any:
        pixels = x.permute(2, 3, 0, 1)
        return F.scaled_dot_product_attention(pixels, pixels, pixels, mask).permute(2, 3, 0, 1)

    def over_text(x: Any, text: Tensor, mask: Tensor) -> Any:
        tokens = x.flatten(2).transpose(1, 2)
        y = F.scaled_dot_product_attention(tokens, text, text, mask)
        z = F.scaled_dot_product_attention(tokens, text, text, is_causal=True)
        pooled = F.scaled_dot_product_attention(text, tokens, tokens, mask.mT)
        return (y + z).transpose(1, 2).unflatten(2, x.shape[2:]) + pooled.sum()

    check(over_channels, random(2, 4, 5, 7), random(5, 7, 2, 2))
    check(over_text, random(2, 4, 5, 7), random(2, 9, 4), random(35, 9))


def test_sums_over_all_pixels() -> None:
    """Linear attention sums a product over all pixels; each tile may change its own copy."""

    def attend(x: Tensor) -> Tensor:
        tokens = x.flatten(2).relu()
        weights = tokens @ tokens.transpose(-1, -2)
        weights += 1
        return (weights.softmax(-1) @ tokens).view(x.shape)

    model, x = Run(attend), random(2, 4, 5, 7).requires_grad_()
    check(model, x)
    (expected,) = torch.autograd.grad(attend(x).square().sum(), x)
    with exact_tiles(model, 3):
        (found,) = torch.autograd.grad(model(x).square().sum(), x)
    assert difference(found, expected) < 1e-11
    for rows in (lambda x: x @ x.mT, lambda x: x.permute(0, 2, 1, 3) @ x.permute(0, 2, 3, 1)):
        with exact_tiles(run := Run(rows), 3), pytest.raises(NotExactError, match="matmul"):
            run(random(2, 4, 6, 7))


SPELLINGS: dict[str, Callable[[Any], Any]] = {
    "axis": lambda x: x.mean(axis=1, keepdims=True),
    "input": lambda x: torch.amax(input=x, dim=(1,), keepdim=True),
    "tensor": lambda x: torch.split(tensor=x, split_size_or_sections=[1, 3], dim=1)[1],
    "split_size": lambda x: x.split(split_size=2, dim=1)[1],
    "chunks": lambda x: torch.cat(x.chunk(chunks=2, dim=-3)[::-1], dim=1),
    "mat2": lambda x: torch.ones(2, 5, 4, dtype=x.dtype).bmm(mat2=x.flatten(2)).view(2, 5, 6, 7),
    "train": lambda x: torch.dropout(x, 0.5, train=False),
    "cudnn_enabled": lambda x: torch.group_norm(x, 2, None, None, 1e-5, True),
    "group_norm": lambda x: torch.group_norm(x, num_groups=2, cudnn_enabled=False),
    "repeats": lambda x: torch.repeat_interleave(x, repeats=2, dim=1, output_size=8),
    "output_size": lambda x: x.repeat_interleave(2, -1, output_size=2 * x.shape[-1]),
    "repeat": lambda x: x.repeat(1, 2, 1, 1) + x.repeat(repeats=(1, 2, 1, 1)),
    "repeat frames": lambda x: x.repeat(3, 1, 1, 1, 1)[1],
    "size": lambda x: x.view(size=(2, 4, -1)).reshape(shape=x.shape),
    "expand": lambda x: x[:, :1].expand(size=(2, 4, 6, 7)),
    "all": lambda x: x[:, :, :6, 0:100] + x[..., -7:],
    "squeeze": lambda x: x[:1, :1].squeeze()[None, None] + x.squeeze(2).squeeze(-1),
    "factor": lambda x: F.pixel_shuffle(input=x, upscale_factor=2),
    "unshuffle": lambda x: F.pixel_unshuffle(F.interpolate(x, scale_factor=2), 2),
    "space to depth": lambda x: (
        F.interpolate(x, scale_factor=2)
        .view(2, 4, 6, 2, 7, 2)
        .permute(0, 1, 3, 5, 2, 4)
        .flatten(1, 3)
    ),
    "depth to space": lambda x: (
        x.view(2, 1, 2, 2, 6, 7).permute(0, 1, 4, 2, 5, 3).reshape(2, 1, 12, 14).cos()
    ),
    "channels to the end": lambda x: (
        x.permute(0, 2, 3, 1).flatten(1).view(2, 6, 7, 4).movedim(3, 1)
    ),
    "relu_": lambda x: F.relu_(input=x * 1),
    "equal to what is no number": lambda x: x * 2 if x == "x" or x is None else x,
    "a constant": lambda x: x + torch.zeros(4, 1, 1, dtype=x.dtype).fill_(3).add_(1),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    for tile_size in ((3, 4), 1, (6, 2)):
        check(SPELLINGS[name], random(2, 4, 6, 7), tile_size=tile_size)


def test_sizes_are_those_of_the_whole_where_they_are_values() -> None:
    def model(x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        y = x / (height * width) + math.sqrt(height) + x.numel() + width % 4
        if width > 5 and divmod(height, 4) == (2, 1):
            y = y * 3
        y = y + math.log(width) + int(height * 0.5)
        y = y.reshape(*y.shape[:2], height * width)
        return y.view(x.shape)

    check(model, random(2, 3, 9, 7))


def test_views_of_the_input() -> None:
    check(lambda x: x.view(2, -1, 7).view(2, 3, 5, 7), random(2, 3, 5, 7))


def test_changes_in_place_come_after_the_neighbours_copies() -> None:
    conv = fill(nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False))

    def model(x: Any) -> Any:
        x = x * 2
        y = conv(x)
        y += conv(x.relu_())
        return y.mul_(x)

    check(Run(model, conv), random(2, 3, 5, 7))


def test_one_dimension_at_a_time() -> None:
    def model(x: Tensor) -> Tensor:
        x = x.softmax(1) + F.layer_norm(x.permute(0, 2, 3, 1), (4,)).movedim(-1, 1)
        x = torch.cat([x[:, 1:], x.mean(1, keepdim=True), F.normalize(x, dim=1)], 1)
        first, second = x.split([3, 5], 1)
        x = torch.stack([first, second[:, None, :3].squeeze(1)], 1).flatten(1, 2)
        return x.repeat_interleave(2, -1) * torch.linspace(0, 1, 6, dtype=x.dtype)[:, None, None]

    check(model, random(2, 4, 5, 7))


def test_gradients_are_those_of_the_whole() -> None:
    decoder = make_decoder()
    x, dy = random(2, 3, 6, 7).requires_grad_(), random(2, 3, 24, 28, seed=1)
    wanted = [x, *decoder.parameters()]
    expected = torch.autograd.grad(decoder(x), wanted, dy)
    with exact_tiles(decoder, 3):
        y = decoder(x)
    for found, exact in zip(torch.autograd.grad(y, wanted, dy), expected, strict=True):
        assert difference(found, exact) < 1e-11


# diffusers


def make_autoencoder(dtype: torch.dtype) -> Any:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    return fill(model.requires_grad_(False), 0.05).to(dtype)


@pytest.mark.parametrize("convert", [False, True], ids=["PyTorch's norms", "converted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autoencoder(dtype: torch.dtype, convert: bool) -> None:
    vae = make_autoencoder(dtype)
    if convert:
        triton_gn.convert(vae)
    bound = 4e-6 if dtype is torch.float32 else 1e-12
    latents = random(2, 4, 9, 7, dtype=dtype)
    expected = vae.decode(latents).sample
    for tile_size in ((4, 3), 5, (9, 2)):
        with exact_tiles(vae.decoder, tile_size):
            assert difference(vae.decode(latents).sample, expected) < bound
    check(vae.encoder, random(1, 3, 18, 14, dtype=dtype), tile_size=8, bound=bound)


def test_naive_tiles_of_the_autoencoder_differ() -> None:
    vae = make_autoencoder(torch.float64)
    latents = random(2, 4, 8, 6)
    naive = torch.cat([vae.decode(part).sample for part in latents.split(4, 2)], 2)
    assert difference(naive, vae.decode(latents).sample) > 1e-2


def test_video_decoder_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    vae: Any = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2
    )
    fill(vae.requires_grad_(False), 0.05)
    latents = random(4, 4, 5, 6)
    expected = vae.decode(latents, num_frames=2).sample
    for _ in range(2):
        with exact_tiles(vae.decoder, 3):
            assert difference(vae.decode(latents, num_frames=2).sample, expected) < 1e-12
        triton_gn.convert(vae)


VIDEO = {"latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}
CACHED = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True],
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}
DECODERS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    # linear attention
    "AutoencoderDC": (
        {
            "latent_channels": 4,
            "attention_head_dim": 4,
            "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "encoder_qkv_multiscales": ((), (5,)),
            "decoder_qkv_multiscales": ((), (5,)),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
        },
        (1, 4, 6, 5),
    ),
    "AutoencoderKLAllegro": (VIDEO | {"block_out_channels": (8,) * 4}, (1, 4, 3, 6, 5)),
    # attention with a mask over frames
    "AutoencoderKLHunyuanVideo": (VIDEO | {"block_out_channels": (8,) * 4}, (1, 4, 3, 6, 5)),
    # a cache of frames in an argument
    "AutoencoderKLWan": (CACHED, (1, 4, 3, 6, 5)),
    "AutoencoderKLQwenImage": (CACHED, (1, 4, 3, 6, 5)),
    "AutoencoderKLCogVideoX": (VIDEO | {"block_out_channels": (8,) * 4}, (1, 4, 5, 6, 5)),
    # blocks of pixels as channels
    "AutoencoderKLHunyuanImage": (
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "spatial_compression_ratio": 2,
            "sample_size": 32,
        },
        (1, 4, 6, 5),
    ),
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_of_diffusers(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    options, shape = DECODERS[name]
    vae: Any = fill(getattr(diffusers, name)(**options).requires_grad_(False), 0.03)

    def decode() -> Tensor:
        latents = random(*shape)
        # Allegro decodes by tiles of its own only
        y: Tensor = vae.decoder(latents) if "Allegro" in name else vae.decode(latents).sample
        return y

    expected = decode()
    # norms of AutoencoderDC compute in float32
    bound = 1e-6 if name == "AutoencoderDC" else 1e-12
    for tile_size in (2, (6, 3)):
        with exact_tiles(vae.decoder, tile_size):
            assert difference(decode(), expected) < bound
    assert difference(decode(), expected) == 0


# Refused


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "sum": lambda x: x.sum(),
    "var": lambda x: x.var(1),
    "amax": lambda x: x.amax(-1),
    "max": lambda x: x.max(),
    "instance_norm": F.instance_norm,
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "softmax": lambda x: x.flatten(2).softmax(-1),
    "normalize": lambda x: F.normalize(x, dim=2),
    "linear": lambda x: F.linear(x, torch.ones(3, 7, dtype=x.dtype)),
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, 1),
    "cumsum": lambda x: x.cumsum(1),
    "cat": lambda x: torch.cat([x, x], 2),
    "chunk": lambda x: x.chunk(2, -1)[0],
    "split": lambda x: x.flatten(2).split(2, 2)[0],
    "__getitem__": lambda x: x[..., 0],
    "unbind": lambda x: x.unbind(-1),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 1),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, torch.ones(4, 4, 2, 2, dtype=x.dtype)),
    "conv2d": lambda x: F.conv2d(x.transpose(1, 2), torch.ones(1, 6, 1, 1, dtype=x.dtype)),
    "group_norm": lambda x: F.group_norm(x.transpose(1, 2), 1),
    "pad": lambda x: F.pad(x, (1, 1), mode="circular"),
    "matmul": lambda x: x.flatten(2).transpose(1, 2) @ x.flatten(2),
    "randn_like": torch.randn_like,
    "randn": lambda x: x + torch.randn(1, dtype=x.dtype),
    "dropout": lambda x: F.dropout(x, 0.5),
    "normal_": lambda x: x.clone().normal_(),
    "item": lambda x: x * x[0, 0].max().item() if x.dim() == 0 else x.item(),
    "numpy": lambda x: x.numpy(),
    "data_ptr": lambda x: x.data_ptr(),
    "add": lambda x: x + torch.arange(x.shape[-1]),
    "sub": lambda x: x - torch.zeros(x.shape[-2:]),
    "where": lambda x: torch.where(x),
    "bmm": lambda x: torch.bmm(x.flatten(0, 1), x.flatten(0, 1)),
    "new_zeros": lambda x: x + x.new_zeros(1),
    "mul": lambda x: x * x.transpose(2, 3),
    "aten.silu": torch.ops.aten.silu,
    "view": lambda x: x.view(2, 4, -1, 2),
    "reshape": lambda x: x.transpose(1, 2).reshape(2, 3, 8, 7),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(F.pad(x, (0, 1)), 2),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "repeat": lambda x: x.repeat(1, 1, 2, 1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_local_is_refused_by_name(name: str) -> None:
    model = Run(REFUSED[name])
    x = random(2, 4, 6, 7)
    with exact_tiles(model, (3, 4)), pytest.raises(NotExactError, match=rf"\b{name}\b"):
        model(x)
    assert "forward" not in vars(model)


def test_gradients_need_all_tiles() -> None:
    conv = fill(nn.Conv2d(4, 4, 3, padding=1))
    x = random(2, 4, 6, 7).requires_grad_()
    reentrant = Run(lambda x: checkpoint(conv, x, use_reentrant=True), conv)
    with exact_tiles(reentrant, 3), pytest.raises(NotExactError, match=r"conv2d .* checkpoint"):
        reentrant(x)
    saving = Run(lambda x: checkpoint(conv, x, use_reentrant=False), conv)
    with exact_tiles(saving, 3), pytest.raises(RuntimeError, match="Turn checkpointing off"):
        saving(x)


def test_compiled_parts_are_refused() -> None:
    conv = torch.compile(nn.Conv2d(3, 3, 3, padding=1), backend="eager")
    with exact_tiles(model := Run(conv), 3), pytest.raises(NotExactError, match="compile no part"):
        model(random(2, 3, 6, 7, dtype=torch.float32))


def test_tensors_from_elsewhere_are_refused() -> None:
    """Plain attributes may hold what another tile has put there; parameters and buffers do not."""
    model = Run(lambda x: x * model.constant)
    model.constant = random(4, 1, 1)
    with exact_tiles(model, 3), pytest.raises(NotExactError, match="register_buffer"):
        model(random(2, 4, 6, 7))
    del model.constant
    model.register_buffer("constant", random(4, 1, 1))
    check(model, random(2, 4, 6, 7))


def test_pixels_as_parameters_are_refused() -> None:
    """The other operand is not cut, so only the parameter shows that pixels are involved."""
    uncut = random(3, 3, 3, 3)

    def masked(x: Tensor, u: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(u, u, u, x > 0)

    for function in (
        masked,
        lambda x, u: F.conv2d(u, x),
        lambda x, u: F.layer_norm(u, (3, 3), x[0, 0], None),
        lambda x, u: F.group_norm(u, 1, x.flatten()),
        lambda x, u: F.linear(u, x[0, 0]),
        lambda x, u: nn.Parameter(x) * u,
    ):
        with exact_tiles(model := Run(function), 3), pytest.raises(NotExactError):
            model(random(3, 3, 6, 3), uncut)


ILLEGAL: dict[str, Callable[[Tensor], Any]] = {
    "divisible by num_groups": lambda x: F.group_norm(x, 3),
    "3 channels": lambda x: F.conv2d(x, torch.ones(3, 3, 1, 1, dtype=x.dtype)),
    "non-empty": lambda x: x + torch.cat([]),
    "out of range": lambda x: x.mean(9),
    "Padding": lambda x: F.pad(x, (1,)),
}


@pytest.mark.parametrize("message", ILLEGAL)
def test_errors_of_the_model_are_those_of_the_whole(message: str) -> None:
    model, x = Run(ILLEGAL[message]), random(2, 4, 6, 7)
    with pytest.raises(Exception, match=message) as expected:
        model(x)
    with exact_tiles(model, 3), pytest.raises(expected.type, match=message) as found:
        model(x)
    assert type(found.value) is expected.type is not NotExactError


UNKNOWN_FORMS: dict[str, Callable[[Tensor], Any]] = {
    "linear": lambda x: F.linear(x.movedim(1, 3), torch.ones(4, dtype=x.dtype)),
    "batch_norm": lambda x: torch.batch_norm(
        x, None, None, torch.ones(4).double(), torch.ones(4).double(), False, 0.1, 1e-5, False
    ),
    "view": lambda x: x.view(torch.int64),
    "cat": lambda x: torch.cat([x, x], 1, out=torch.zeros_like(torch.cat([x, x], 1))),
    "matmul": lambda x: x.movedim(1, 3) @ torch.ones(4, dtype=x.dtype),
}


@pytest.mark.parametrize("name", UNKNOWN_FORMS)
def test_forms_that_no_rule_knows_are_refused_by_name(name: str) -> None:
    model, x = Run(UNKNOWN_FORMS[name]), random(2, 4, 6, 7)
    model(x)
    with exact_tiles(model, 3), pytest.raises(NotExactError, match=rf"\b{name} .*form") as raised:
        model(x)
    assert raised.value.__cause__ is not None


def test_remedies_are_not_in_vain() -> None:
    """Norms without running statistics take those of the pixels in evaluation too."""
    model = nn.BatchNorm2d(4, track_running_stats=False).double().eval()
    with exact_tiles(model, 3), pytest.raises(NotExactError, match=r"batch_norm (?!.*eval)"):
        model(random(2, 4, 6, 7))


class Recurrent(nn.Module):
    """Keeps its state in a dict or a list of the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor, state: dict[str, Any], calls: list[int], *more: Any) -> Any:
        kept = state["h"] if state else x * 0
        state["h"] = h = torch.tanh(self.conv(torch.cat([x, kept], 1)))
        calls.append(len(calls))
        nested = state.setdefault("nested", deque([[None]], maxlen=1))
        nested[0][0] = h * 2 if nested[0][0] is None else nested[0][0] + h
        return F.interpolate(h, scale_factor=2), (h,)


def test_state_in_arguments_is_kept_whole() -> None:
    model = fill(Recurrent())

    def run() -> list[Tensor]:
        state: dict[str, Any] = {}
        calls: list[int] = []
        for seed in range(3):
            y, (h,) = model(random(1, 2, 6, 7, seed=seed), state, calls)
        assert calls == [0, 1, 2]
        grads = torch.autograd.grad(y.square().sum(), list(model.parameters()))
        return [y, h, state["h"], state["nested"][0][0], *grads]

    expected = run()
    for tile_size in (3, (6, 2)):
        with exact_tiles(model, tile_size):
            for found, exact in zip(run(), expected, strict=True):
                assert difference(found, exact) < 1e-12


def test_state_in_attributes_is_named() -> None:
    """Each tile counts on, as the others have not finished."""

    def model(x: Tensor) -> Tensor:
        run.at = 0
        for _ in range(2):
            x = F.group_norm(x, 1) * [1, 2][run.at]
            run.at += 1
        return x

    run: Any = Run(model)
    with exact_tiles(run, 3), pytest.raises(NotExactError, match=r"attribute at ") as raised:
        run(random(2, 4, 6, 7))
    assert isinstance(raised.value.__cause__, IndexError)
    run(random(2, 4, 6, 7))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a view": lambda total: total.view(1).add_(1),
    "by keyword": lambda total: torch.add(total, 1, out=total),
    "in a list": lambda total: torch._foreach_add_([torch.zeros_like(total), total], 1),
    "by assignment": lambda total: operator.setitem(total.view(1), 0, 1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_tiles_share_is_not_changed(name: str) -> None:
    model = Run(lambda x: (CHANGES[name](model.get_buffer("total")), x))
    model.register_buffer("total", torch.zeros((), dtype=torch.float64))
    with exact_tiles(model, 3), pytest.raises(NotExactError, match=r" each tile would change it"):
        model(random(2, 4, 6, 7))
    assert not model.get_buffer("total")


# Hooks that move parameters


def cast_before(module: nn.Module, args: Any) -> None:
    module.to(torch.float64)


def cast_after(module: nn.Module, args: Any, y: Any) -> None:
    module.to(torch.float32)


def hook_with_pytorch(model: nn.Module) -> str:
    for module in model.children():
        module.register_forward_pre_hook(cast_before)
        module.register_forward_hook(cast_after)
    return "cast_before"


def hook_with_accelerate(model: nn.Module) -> str:
    pytest.importorskip("accelerate").cpu_offload(model, execution_device="cpu")
    return "AlignDevicesHook.pre_forward"


def hook_groups_with_diffusers(model: nn.Module) -> str:
    hooks = pytest.importorskip("diffusers.hooks")
    cpu = torch.device("cpu")
    hooks.apply_group_offloading(
        model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level"
    )
    return "GroupOffloadingHook.pre_forward"


def hook_dtypes_with_diffusers(model: nn.Module) -> str:
    hooks = pytest.importorskip("diffusers.hooks")
    hooks.apply_layerwise_casting(model, torch.bfloat16, torch.float64)
    return "LayerwiseCastingHook.pre_forward"


def make_small() -> nn.Module:
    return fill(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU()))


@pytest.mark.parametrize(
    "hook",
    [
        hook_with_pytorch,
        hook_with_accelerate,
        hook_groups_with_diffusers,
        hook_dtypes_with_diffusers,
    ],
)
def test_hooks_that_move_parameters_are_named(hook: Callable[[nn.Module], str]) -> None:
    model = make_small()
    name = hook(model)
    message = rf"the hook {name} .*enable_model_cpu_offload"
    with torch.no_grad(), exact_tiles(model, 3), pytest.raises(NotExactError, match=message):
        model(random(2, 3, 6, 7))


def test_remedies_of_hooks() -> None:
    """The same hooks around the whole, on the model itself or taken away."""
    accelerate = pytest.importorskip("accelerate")
    x = random(2, 3, 6, 7)
    expected = make_small()(x)
    around, _ = accelerate.cpu_offload_with_hook(nn.Sequential(make_small()), "cpu")
    itself, _ = accelerate.cpu_offload_with_hook(make_small(), "cpu")
    removed = make_small()
    hook_with_accelerate(removed)
    accelerate.hooks.remove_hook_from_submodules(removed)
    for outer, tiled in ((around, around[0]), (itself, itself), (removed, removed)):
        with exact_tiles(tiled, 3):
            assert difference(outer(x), expected) < 1e-12
            with pytest.raises(RuntimeError, match="already"), exact_tiles(tiled, 3):
                pass
        assert difference(outer(x), expected) < 1e-12


def test_state_is_refused() -> None:
    model = Run(lambda x: model.get_buffer("total").add_(1) * x)
    model.register_buffer("total", torch.zeros((), dtype=torch.float64))
    with exact_tiles(model, 3), pytest.raises(NotExactError, match=r"add_ .* each tile"):
        model(random(2, 4, 6, 7))
    assert not model.get_buffer("total")


@pytest.mark.parametrize("ends", [False, True], ids=["elsewhere", "at its end"])
def test_tiles_that_part_ways_are_refused(ends: bool) -> None:
    calls: list[int] = []

    def model(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            return x if ends else F.conv2d(x, torch.ones(3, 3, 1, 3, dtype=x.dtype), padding="same")
        return F.group_norm(x, 1)

    with exact_tiles(run := Run(model), 4), pytest.raises(NotExactError, match="must do the same"):
        run(random(2, 3, 6, 7))


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "not spatial": lambda x: x.flatten(2),
    "each tile's own": lambda x: object(),
    "register_buffer": lambda x: torch.utils.dlpack.from_dlpack(torch.ones(2)),
}


@pytest.mark.parametrize("message", OUTPUTS)
def test_outputs_that_cannot_be_put_together(message: str) -> None:
    model = Run(OUTPUTS[message])
    with exact_tiles(model, 3), pytest.raises(NotExactError, match=message):
        model(random(2, 3, 6, 7))


def test_structured_outputs() -> None:
    constant = random(3)
    model = Run(lambda x, c: {"y": (x * 2, [c + 1]), "none": None, "size": x.shape[-1]})
    with exact_tiles(model, 3):
        found = model(random(2, 3, 6, 7), c=constant)
    assert torch.equal(found["y"][0], random(2, 3, 6, 7) * 2)
    assert torch.equal(found["y"][1][0], constant + 1)
    assert (found["none"], found["size"]) == (None, 7)


# The context


def test_model_is_restored() -> None:
    model = make_decoder()
    own = model.forward
    vars(model)["forward"] = replaced = lambda x: own(x) * 2
    x = random(2, 3, 6, 7)
    expected = model(x)
    with exact_tiles(model, 3):
        assert difference(model(x), expected) < 1e-12
    assert vars(model)["forward"] is replaced
    del model.forward
    with pytest.raises(KeyError), exact_tiles(model, 3):
        raise KeyError
    assert "forward" not in vars(model)


def test_nested_use_is_refused() -> None:
    model = make_decoder()
    with (
        exact_tiles(model, 3),
        pytest.raises(RuntimeError, match="already"),
        exact_tiles(model, 2),
    ):
        pass
    inner = model.get_submodule("0")
    with (
        exact_tiles(model, 3),
        exact_tiles(inner, 2),
        pytest.raises(RuntimeError, match="within a tile"),
    ):
        model(random(2, 3, 6, 7))


def test_hooks_see_whole_tensors() -> None:
    model, seen = make_decoder(), []
    model.register_forward_hook(lambda _, args, y: seen.append((args[0].shape, y.shape)))
    with exact_tiles(model, 3):
        model(random(2, 3, 6, 7))
    assert seen == [((2, 3, 6, 7), (2, 3, 24, 28))]


class Fault(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, Fault, KeyboardInterrupt])
@pytest.mark.parametrize("failing", [0, 1, 5])
def test_an_error_in_a_tile_stops_all(error: type[BaseException], failing: int) -> None:
    calls: list[int] = []

    def fail_here(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == failing + 1:
            raise error("at fault")
        return x

    norm = nn.GroupNorm(1, 3)
    model = Run(lambda x: fail_here(norm(x)), norm).double()
    with exact_tiles(model, 3), pytest.raises(error, match="at fault") as raised:
        model(random(2, 3, 6, 7))
    assert raised.traceback[-1].name == "fail_here"
    assert len(calls) == failing + 1


def test_an_interrupted_caller_stops_all() -> None:
    """Ctrl-C is raised in the main thread, while a tile runs."""
    calls: list[int] = []

    def model(x: Tensor) -> Tensor:
        calls.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)  # until the main thread has it
        return F.group_norm(x, 1)

    run = Run(model)
    # a job in the background of a shell is started deaf to it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with exact_tiles(run, 3), pytest.raises(KeyboardInterrupt):
            run(random(2, 3, 6, 7))
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls == [1]


def test_tiles_run_in_the_surroundings_of_the_call() -> None:
    seen = []

    def model(x: Tensor) -> Tensor:
        seen.append(
            (
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
                torch.get_autocast_dtype("cpu"),
                torch.get_default_device().type,
                settings.current(),
                variable.get(),
            )
        )
        return x

    variable = contextvars.ContextVar("variable", default=0)
    run, x = Run(model), random(2, 3, 6, 7)

    def compare() -> None:
        seen.clear()
        run(x)
        with exact_tiles(run, 3):
            run(x)
        assert len(seen) == 7
        assert len(set(seen)) == 1

    compare()
    variable.set(1)
    with torch.no_grad(), triton_gn.backend("torch"), triton_gn.batch_invariant():
        compare()
    with torch.inference_mode(), torch.device("meta"):
        compare()
    with torch.autocast("cpu", torch.float16):
        compare()


def test_autocast_is_as_in_one_piece() -> None:
    decoder, x = make_decoder().float(), random(2, 3, 6, 7, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        check(decoder, x, bound=4e-2)


def test_two_passes_per_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile is read once for its statistics and once to normalise it."""
    calls = []
    for name in ("group_norm_stats", "group_norm_apply"):
        original = getattr(spatial, name)

        def counted(*args: Any, _name: str = name, _of: Any = original, **kwargs: Any) -> Any:
            calls.append(_name)
            return _of(*args, **kwargs)

        monkeypatch.setattr(spatial, name, counted)
    check(make_decoder(), random(2, 3, 6, 7), tile_size=3)
    tiles, norms = 6, 2
    assert calls.count("group_norm_stats") == calls.count("group_norm_apply") == tiles * norms


def test_a_small_input_runs_as_it_is() -> None:
    threads = []

    def flipped(x: Tensor) -> Tensor:
        threads.append(threading.current_thread())
        return x.flip(-1)

    with exact_tiles(model := Run(flipped)):
        y = model(random(2, 3, 64, 64))
    assert torch.equal(y, random(2, 3, 64, 64).flip(-1))
    assert threads == [threading.main_thread()]


def test_tiles_are_of_nearly_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = set()
    stats_of = vars(spatial)["group_norm_stats"]

    def seen(x: Tensor, *args: Any) -> Any:
        shapes.add(tuple(x.shape))
        return stats_of(x, *args)

    monkeypatch.setattr(spatial, "group_norm_stats", seen)
    check(nn.GroupNorm(1, 2).double(), random(1, 2, 9, 13), tile_size=(4, 6))
    assert shapes == {(1, 2, 3, 5), (1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((lambda x: x,), TypeError, "nn.Module; got function"),
        ((nn.Identity(), 0), ValueError, "at least 1; got 0"),
        ((nn.Identity(), ()), ValueError, "a size or several"),
        ((nn.Identity(), 2.0), TypeError, "integers; got 2.0"),
        ((nn.Identity(), (2, True)), TypeError, "integers"),
    ],
)
def test_wrong_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), exact_tiles(*arguments):
        pass


def test_wrong_inputs_and_surroundings() -> None:
    model = nn.Identity()
    with exact_tiles(model, 3):
        for args in ((), (random(2, 3),), ("image",)):
            with pytest.raises(ValueError, match="must be a tensor"):
                model(*args)
        with pytest.raises(RuntimeError, match="eager"):
            torch.func.vmap(model)(random(2, 2, 3, 6, 7))
        with pytest.raises(RuntimeError, match="mode"), FlopCounterMode(display=False):
            model(random(2, 3, 6, 7))
    with exact_tiles(model, (3, 3, 3)), pytest.raises(ValueError, match="3 or more spatial"):
        model(random(2, 3, 6, 7))


# Memory


def live_bytes(monkeypatch: pytest.MonkeyPatch, offload: bool) -> int:
    """The most bytes that the inputs and outputs of norms have had at a time, in all tiles."""
    seen: list[weakref.ref[Tensor]] = []
    most = [0]
    apply = vars(spatial)["group_norm_apply"]

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = apply(x, *args, **kwargs)
        seen.extend([weakref.ref(x), weakref.ref(y)])
        alive = [t.untyped_storage() for ref in seen if (t := ref()) is not None]
        most.append(sum({s.data_ptr(): s.nbytes() for s in alive}.values()))
        return y

    conv, norm = fill(nn.Conv2d(4, 4, 3, padding=1)), nn.GroupNorm(2, 4).double()
    model = Run(lambda x: x + conv(norm(conv(norm(conv(x))))), conv, norm)
    x = random(1, 4, 16, 16)
    expected = model(x)
    with monkeypatch.context() as patch, torch.no_grad(), exact_tiles(model, 4, offload=offload):
        patch.setattr(spatial, "group_norm_apply", counted)
        assert difference(model(x), expected) < 1e-12
    return max(most)


def test_waiting_tiles_are_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = 16 * 16 * 4 * 8
    assert live_bytes(monkeypatch, offload=False) > whole
    assert live_bytes(monkeypatch, offload=True) == 2 * whole // 16


def test_offloaded_autoencoder() -> None:
    """The model has attention, whose keys and values stay, and views of one storage."""
    vae = make_autoencoder(torch.float64)
    latents = random(2, 4, 9, 7)
    expected = vae.decode(latents).sample
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), exact_tiles(vae.decoder, 4, offload=True):
            assert difference(vae.decode(latents).sample, expected) < 1e-12
    with exact_tiles(vae.decoder, 4, offload=True), pytest.raises(RuntimeError, match="no_grad"):
        vae.decode(latents)
