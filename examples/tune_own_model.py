"""Tune the layers of your own model: write a factory and pass it to ``python -m triton_gn tune``.

On a GPU, this file tunes the model of its ``make`` and shows the plans before and after. Without a
GPU, it shows the heuristic's plans for an H100; only a GPU can time them.
"""

import sys

import torch
from torch import Tensor, nn

import triton_gn
from triton_gn.__main__ import main as triton_gn_main

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Block(nn.Module):
    """A residual block of a small UNet."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.GroupNorm(32, channels), nn.SiLU()),
            nn.Conv2d(channels, out_channels, 3, padding=1, stride=2),
            *(nn.GroupNorm(32, out_channels), nn.SiLU()),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip = nn.Conv2d(channels, out_channels, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_channels, H / 2, W / 2) from x (N, channels, H, W)."""
        y: Tensor = self.body(x) + self.skip(x)
        return y


def make() -> tuple[nn.Module, tuple[Tensor]]:
    """Return the model, converted and on its device, and the arguments of one call."""
    model = nn.Sequential(Block(64, 128), Block(128, 320))
    triton_gn.convert(model)
    x = torch.randn(2, 64, 64, 64, device=DEVICE, dtype=torch.bfloat16)
    return model.to(x), (x.to(memory_format=torch.channels_last),)


def show_plans() -> None:
    """Print the plan of each GroupNorm of the model, and the reason for it."""
    model, arguments = make()

    def show(name: str, layer: triton_gn.GroupNorm, x: Tensor) -> None:
        print(f"\n{name}, {tuple(x.shape)}, {layer.activation}")
        for direction in ("forward", "backward"):
            explanation = triton_gn.explain(
                x, layer.num_groups, direction=direction, activation=layer.activation
            )
            print(explanation)

    for name, layer in model.named_modules():
        if isinstance(layer, triton_gn.GroupNorm):
            layer.register_forward_pre_hook(lambda layer, xs, name=name: show(name, layer, xs[0]))
    with torch.no_grad():
        model(*arguments)


def main() -> None:
    """Show the plans. On a GPU, tune them and show the new plans."""
    show_plans()
    if DEVICE == "cpu":
        print("\nOn a GPU: python -m triton_gn tune --model examples.tune_own_model:make")
        return
    if status := triton_gn_main(["tune", "--model", f"{__name__}:make"]):
        sys.exit(status)
    show_plans()


if __name__ == "__main__":
    main()
