"""exact_tiles on the autoencoders of diffusers."""

from typing import Any

import pytest
import torch
from torch import Tensor

import triton_gn
from tests.support.tensors import random
from tests.support.tiles import check, difference, fill, make_autoencoder
from triton_gn.tiling import exact_tiles


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
