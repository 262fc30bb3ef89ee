"""Public models in tiny configurations with random weights: nothing is downloaded."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

GROUPS = partial(nn.GroupNorm, 8)


class Case(NamedTuple):
    """A model, the arguments of a call, and the dtype to run both in."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype = torch.float64


def timm(name: str, **options: Any) -> Case:
    import timm

    if options.pop("group_norm_act", False):
        from timm.layers import GroupNormAct

        options["norm_layer"] = partial(GroupNormAct, num_groups=8)
    return Case(timm.create_model(name, **options), (torch.randn(2, 3, 64, 64),), {})


def regnet() -> Case:
    from timm.layers import GroupNormAct
    from timm.models.regnet import RegNet, RegNetCfg

    act = partial(GroupNormAct, num_groups=8)
    sizes: dict[str, Any] = {"w0": 24, "wa": 36.44, "wm": 2.49, "depth": 13, "group_size": 8}
    config = RegNetCfg(**sizes, se_ratio=0.25, norm_layer=act)
    return Case(RegNet(config, num_classes=10), (torch.randn(2, 3, 64, 64),), {})


def torchvision_resnet(name: str) -> Case:
    import torchvision

    model = getattr(torchvision.models, name)(norm_layer=GROUPS)
    return Case(model, (torch.randn(2, 3, 64, 64),), {})


def raft() -> Case:
    from torchvision.models.optical_flow import raft as module

    encoders = {
        f"{part}_encoder_{name}": value
        for part in ("feature", "context")
        for name, value in {
            "layers": (64, 64, 96, 128, 256),
            "block": module.ResidualBlock,
            "norm_layer": GROUPS,
        }.items()
    }
    model = module._raft(
        **encoders,
        corr_block_num_levels=4,
        corr_block_radius=4,
        motion_encoder_corr_layers=(256, 192),
        motion_encoder_flow_layers=(128, 64),
        motion_encoder_out_channels=128,
        recurrent_block_hidden_state_size=128,
        recurrent_block_kernel_size=((1, 5), (5, 1)),
        recurrent_block_padding=((0, 2), (2, 0)),
        flow_head_hidden_size=256,
        use_mask_predictor=True,
    )
    images = torch.randn(2, 1, 3, 128, 128)
    options = {"num_flow_updates": 2}
    return Case(model, (images[0], images[1]), options, torch.float32)  # makes float32 tensors


def monai(name: str, shape: tuple[int, ...], *others: Any, **options: Any) -> Case:
    from monai.networks import nets

    model = getattr(nets, name)(spatial_dims=len(shape) - 2, **options)
    return Case(model, (torch.randn(shape), *others), {})


def diffusers(name: str, shape: tuple[int, ...], *others: Any, **options: Any) -> Case:
    import diffusers

    model = getattr(diffusers, name)(**options)
    return Case(model, (torch.randn(shape), *others), {})


def transformers(name: str, shape: tuple[int, ...], **options: Any) -> Case:
    import transformers

    config = getattr(transformers, f"{name}Config")(**options)
    return Case(getattr(transformers, f"{name}Model")(config), (torch.randn(shape),), {})


_GROUP = ("group", {"num_groups": 4})
_WIDTHS: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": 1}
_TEXT = torch.randn(2, 4, 32)
_TIME = torch.tensor([1, 700])
# name: the package that it comes from, and how it is made
MODELS: dict[str, tuple[str, Callable[[], Case]]] = {
    "timm resnet50_gn": ("timm", partial(timm, "resnet50_gn")),
    "timm RegNet GN+act": ("timm", regnet),
    "timm efficientnet GN+act": (
        "timm",
        partial(timm, "efficientnet_b0", group_norm_act=True),
    ),
    "timm resnetv2 BiT": ("timm", partial(timm, "resnetv2_50x1_bit")),
    "torchvision resnet18": ("torchvision", partial(torchvision_resnet, "resnet18")),
    "torchvision RAFT": ("torchvision", raft),
    "MONAI UNet": (
        "monai",
        partial(
            monai, "UNet", (2, 1, 32, 32), in_channels=1, out_channels=4, channels=(8, 16, 32),
            strides=(2, 2), num_res_units=2, norm=_GROUP, act="relu",
        ),
    ),
    "MONAI SegResNet": ("monai", partial(monai, "SegResNet", (2, 1, 16, 16, 16), init_filters=8)),
    "MONAI DynUNet": (
        "monai",
        partial(
            monai, "DynUNet", (2, 1, 32, 32), in_channels=1, out_channels=2, kernel_size=[3] * 3,
            strides=[1, 2, 2], upsample_kernel_size=[2, 2], filters=[8, 16, 32], norm_name=_GROUP,
            res_block=True,
        ),
    ),
    "MONAI DiffusionModelUNet": (
        "monai",
        partial(
            monai, "DiffusionModelUNet", (2, 1, 16, 16), _TIME, in_channels=1, out_channels=1,
            channels=(8, 8, 16), attention_levels=(False, True, True), num_res_blocks=1,
            num_head_channels=4, norm_num_groups=4,
        ),
    ),
    "UNet2DCondition": (
        "diffusers",
        partial(
            diffusers, "UNet2DConditionModel", (2, 4, 16, 16), _TIME, _TEXT, sample_size=16,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=8,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32, **_WIDTHS,
        ),
    ),
    "UNet2D scale_shift": (
        "diffusers",
        partial(
            diffusers, "UNet2DModel", (2, 3, 16, 16), _TIME, sample_size=16, norm_num_groups=8,
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            resnet_time_scale_shift="scale_shift", **_WIDTHS,
        ),
    ),
    "Kandinsky3UNet": (
        "diffusers",
        partial(
            diffusers, "Kandinsky3UNet", (2, 4, 32, 32), _TIME, _TEXT, torch.ones(2, 4), groups=8,
            time_embedding_dim=64, attention_head_dim=8, layers_per_block=3,
            block_out_channels=(32, 64, 64, 64), cross_attention_dim=32, encoder_hid_dim=32,
        ),
    ),
    "AutoencoderKL": (
        "diffusers",
        partial(
            diffusers, "AutoencoderKL", (2, 3, 32, 32), norm_num_groups=8, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            **_WIDTHS,
        ),
    ),
    "AutoencoderKLCogVideoX": (
        "diffusers",
        partial(
            diffusers, "AutoencoderKLCogVideoX", (1, 3, 8, 16, 16), latent_channels=4,
            block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2,
        ),
    ),
    "AutoencoderKLMagvit": (
        "diffusers",
        partial(
            diffusers, "AutoencoderKLMagvit", (1, 3, 5, 16, 16), latent_channels=4,
            block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2,
        ),
    ),
    "transformers Wav2Vec2": (
        "transformers",
        partial(
            transformers, "Wav2Vec2", (2, 1600), hidden_size=16, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=16, conv_dim=(32,) * 3, conv_stride=(5, 2, 2),
            conv_kernel=(10, 3, 3), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
        ),
    ),
    "transformers BiT": (
        "transformers",
        partial(
            transformers, "Bit", (2, 3, 64, 64), embedding_size=32, hidden_sizes=[32, 64],
            depths=[2, 2], num_groups=8,
        ),
    ),
}  # fmt: skip
