"""Replace one GroupNorm and its SiLU by a layer that does both, and keep the weights.

``convert`` does so for whole models. This example does it by hand, for a network of your own.
"""

import sys

import torch
from torch import Tensor, nn

import triton_gn

# Relative to the largest value: a few float32 roundings. Without the SiLU the error would be 9e-1.
LIMIT = 1e-5


def make_old() -> nn.Sequential:
    """Return the network with two layers."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.GroupNorm(8, 32),
        nn.SiLU(),
        nn.Conv2d(32, 4, 3, padding=1),
    )


def make_new() -> nn.Sequential:
    """Return the network with one fused layer; nn.Identity keeps the names of later layers."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        triton_gn.GroupNorm(8, 32, activation="silu"),
        nn.Identity(),
        nn.Conv2d(32, 4, 3, padding=1),
    )


def step(net: nn.Sequential, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Return the output and the gradient of every parameter."""
    y = net(x)
    names, parameters = zip(*net.named_parameters(), strict=True)
    grads = torch.autograd.grad(y, parameters, dy)
    return {"output": y.detach()} | dict(zip(names, grads, strict=True))


def main() -> None:
    """Load the old network's weights into the new one and print the differences of the results."""
    torch.manual_seed(0)
    old, new = make_old(), make_new()
    new.load_state_dict(old.state_dict())
    x, dy = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 16, 16)
    expected, results = step(old, x, dy), step(new, x, dy)
    scale = max(float(value.abs().max()) for value in expected.values())
    worst = 0.0
    for name, value in expected.items():
        gap = float((results[name] - value).abs().max() / scale)
        print(f"{name:<10} {gap:.1e}")
        worst = max(worst, gap)
    print(f"Largest difference: {worst:.1e} (limit {LIMIT:.0e})")
    if not worst <= LIMIT:
        sys.exit("The networks compute different things.")


if __name__ == "__main__":
    main()
