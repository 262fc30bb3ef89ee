"""exact_tiles on the CPU: the values and gradients of one piece."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import triton_gn
from tests.support.pairs import each_pair
from tests.support.tensors import random
from tests.support.tiles import Run, check, difference, fill, make_decoder
from triton_gn.tiling import NotExactError, exact_tiles


@pytest.mark.parametrize("tile_size", [2, 5, (3, 4), (9, 2), (2, 9), 64], ids=str)
def test_sequential_decoder(tile_size: int | tuple[int, ...]) -> None:
    check(make_decoder(), random(2, 3, 9, 7).requires_grad_(), tile_size=tile_size)


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

    check(attend, random(2, 8, 3, 5, 7).requires_grad_(), MASKS[name], tile_size=tile_size)


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

    check(attend, random(2, 4, 5, 7).requires_grad_())
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
    "rows as channels": lambda x: x.view(2, -1, 7).view(2, 4, 6, 7),
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
