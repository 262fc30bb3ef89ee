"""exact_tiles on the CPU: equal to the whole, or refused."""

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import triton_gn
from triton_gn.tiling import NotExactError, exact_tiles


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


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
    """What the model gives tile by tile, which is what it gives in one piece."""
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
    """So that the tests above can fail: neither statistics nor borders are right."""
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


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, 2, 3])
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


# Refused


def causal_attention(x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(tokens, tokens, tokens, is_causal=True)


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
    "reshape": lambda x: x.transpose(1, 2).reshape(2, 4, *x.shape[2:]),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 1),
    "scaled_dot_product_attention": causal_attention,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_local_is_refused_by_name(name: str) -> None:
    model = Run(REFUSED[name])
    x = random(2, 4, 6, 7)
    with exact_tiles(model, (3, 4)), pytest.raises(NotExactError, match=rf"\b{name}\b"):
        model(x)
    assert "forward" not in vars(model)
