"""Compile the plans of random problems for a GPU that need not be present and print what spills.

    python -m tests.support.sweep_compile sm_90 --count 60 --seed 1

The bounds in triton_gn/plan/limits.py come from here. Too long for every run of the tests.
"""

import argparse
import random
from concurrent.futures import ProcessPoolExecutor

import torch

from tests.support.activations import ACTIVATIONS
from tests.support.compiling import launches_of
from triton_gn.ops.launches import Launch
from triton_gn.tools.compile import Kernel, compile_launch

_GROUP_CHANNELS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 30, 40, 60, 64, 96, 127, 129, 384, 1000)
_PIXELS = (1, 2, 4, 9, 30, 33, 49, 64, 100, 101, 196, 225, 256, 784, 1000, 1024, 3600, 4096, 5375)
_LARGEST = {torch.bfloat16: 90_000, torch.float32: 60_000, torch.float64: 10_000}  # of a group

_FUSED = ("scale", "shift", "pre_add", "residual")

Case = tuple[str, tuple[int, int, int], int, torch.dtype, bool, str, str, tuple[str, ...]]


def draw(count: int, target: str) -> list[Case]:
    """Problems with groups of some hundred to some ten thousand elements: around the limits."""
    cases: list[Case] = []
    while len(cases) < count:
        group_channels, pixels = random.choice(_GROUP_CHANNELS), random.choice(_PIXELS)
        dtype = random.choice(list(_LARGEST))
        if not _LARGEST[dtype] // 60 <= group_channels * pixels <= _LARGEST[dtype]:
            continue
        groups = random.choice((1, 4, 16, 32))
        shape = (random.choice((2, 256)), group_channels * groups, pixels)
        direction = random.choice(("forward", "backward"))
        activation = random.choice(list(ACTIVATIONS))
        fused = tuple(name for name in _FUSED if random.random() < 0.4)
        channels_last = random.random() < 0.5
        cases.append((direction, shape, groups, dtype, channels_last, target, activation, fused))
    return cases


def launches(case: Case) -> list[Launch]:
    direction, shape, groups, dtype, channels_last, target, activation, fused = case
    return launches_of(
        direction,
        shape,
        groups,
        dtype,
        channels_last,
        target=target,
        activation=activation,
        fused=fused,
    )


def compile_case(case: Case) -> list[Kernel]:
    return [compile_launch(launch, case[5]) for launch in launches(case)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    random.seed(options.seed)
    cases = draw(options.count, options.target)
    kernels = spilling = 0
    with ProcessPoolExecutor() as pool:
        for case, compiled in zip(cases, pool.map(compile_case, cases), strict=True):
            kernels += len(compiled)
            for kernel in compiled:
                if kernel.spill_bytes:
                    spilling += 1
                    print(case, kernel, flush=True)
    print(f"{options.target}: {kernels} kernels of {options.count} problems, {spilling} spill")


if __name__ == "__main__":
    main()
