"""Convert a small UNet of diffusers in one line, and compare its results before and after.

The weights are random: nothing is downloaded.
"""

import sys

import torch
from torch import Tensor, nn

from triton_gn import convert

# Relative to the largest value. The float32 error is 1e-6 here; one SiLU too few or too many moves
# the output by 2e-1.
LIMIT = 1e-5


def make_unet() -> nn.Module:
    """Return a UNet2DConditionModel of two resolutions, with all parameters away from 0."""
    try:
        from diffusers import UNet2DConditionModel
    except ImportError:
        sys.exit(
            "This example converts a model of diffusers, which is not installed. "
            "Remedy: pip install diffusers"
        )
    torch.manual_seed(0)
    unet: nn.Module = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
    )
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return unet


def step(unet: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the predicted noise, and the weight gradient of the first convolution."""
    torch.manual_seed(1)
    noisy, text, dy = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 16), torch.randn(2, 4, 16, 16)
    noise: Tensor = unet(noisy, torch.tensor([10, 900]), text, return_dict=False)[0]
    (grad,) = torch.autograd.grad(noise, unet.get_parameter("conv_in.weight"), dy)
    return noise.detach(), grad


def main() -> None:
    """Print the report of the conversion and the largest differences."""
    unet = make_unet()
    before = step(unet)
    print(convert(unet))
    after = step(unet)
    gaps = [
        float((new - old).abs().max() / old.abs().max())
        for old, new in zip(before, after, strict=True)
    ]
    print(f"\nLargest difference: output {gaps[0]:.1e}, gradient {gaps[1]:.1e} (limit {LIMIT:.0e})")
    if not max(gaps) <= LIMIT:
        sys.exit("The converted model computes something else.")


if __name__ == "__main__":
    main()
