"""What a call on a small CPU tensor costs the host, as a ratio to PyTorch's in the same run."""

import statistics
import timeit
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

import triton_gn

CALLS, ROUNDS = 10_000, 9


def cost(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float]:
    """Return the median microseconds of theirs and the median ratio; rounds alternate."""
    rounds = []
    for _ in range(ROUNDS):
        seconds = [timeit.timeit(call, number=CALLS) for call in (theirs, ours)]
        rounds.append((seconds[0] / CALLS * 1e6, seconds[1] / seconds[0]))
    return statistics.median(us for us, _ in rounds), statistics.median(r for _, r in rounds)


def main() -> None:
    """Print the function and the layer, without and with a gradient to record, and one fused."""
    torch.set_num_threads(1)
    for title, x in (
        ("no gradient", torch.randn(2, 6, 2, 2)),
        ("recording", torch.randn(2, 6, 2, 2, requires_grad=True)),
    ):
        weight, bias = torch.ones(6), torch.zeros(6)
        mine, torchs = triton_gn.GroupNorm(2, 6), nn.GroupNorm(2, 6)
        fused = triton_gn.GroupNorm(2, 6, activation="silu")
        pairs = {
            "group_norm": (
                partial(triton_gn.group_norm, x, 2, weight, bias),
                partial(F.group_norm, x, 2, weight, bias),
            ),
            "GroupNorm": (partial(mine, x), partial(torchs, x)),
            "GroupNorm with SiLU": (
                partial(fused, x),
                partial(nn.Sequential(torchs, nn.SiLU()), x),
            ),
        }
        for name, (ours, theirs) in pairs.items():
            us, ratio = cost(ours, theirs)
            print(f"{name}, {title}: PyTorch {us:.1f} us, triton_gn {ratio:.2f} times that")


if __name__ == "__main__":
    main()
