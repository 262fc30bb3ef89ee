"""Count the Python calls that a warm call of group_norm makes in this package, without a GPU.

Kernels go to a stand-in for the driver that launches nothing. PyTorch's own Python, such as that of
autograd.Function, is not counted.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch

import triton_gn
from perf import standin
from triton_gn.ops import dispatch

GOALS = {"forward": 30, "recorded forward": 36, "backward": 30}
_PACKAGE = str(Path(triton_gn.__file__).parent)
_GENERATED = "<string>"  # where bound arguments and constructors of named tuples come from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no flags."""


def run(options: argparse.Namespace) -> int:
    """Print the counts beside the most that is allowed; return 1 if one is larger."""
    counts = counted()
    for name, count in counts.items():
        print(f"{count:3d} of at most {GOALS[name]}: {name}")
    return int(any(counts[name] > GOALS[name] for name in counts))


def counted() -> dict[str, int]:
    """Count the calls of a forward, a recorded forward and a backward, each after a first one."""
    x = torch.randn(2, 320, 16, 16, dtype=torch.bfloat16)
    weight, bias = torch.randn(2, 320, dtype=torch.bfloat16).unbind()
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]

    def forward(x: Any, weight: Any, bias: Any) -> torch.Tensor:
        return triton_gn.group_norm(x, 32, weight, bias, activation="silu")

    with standin.active(), mock.patch.object(dispatch, "why_not_kernels", return_value=None):
        for _ in range(2):
            forward(x, weight, bias)
            torch.autograd.grad(forward(*leaves), leaves, x)
        y = forward(*leaves)
        return {
            "forward": calls_of(lambda: forward(x, weight, bias)),
            "recorded forward": calls_of(lambda: forward(*leaves)),
            "backward": calls_of(lambda: torch.autograd.grad(y, leaves, x)),
        }


def calls_of(run: Callable[[], object]) -> int:
    """Count the calls of functions of this package."""
    count = 0

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        file = frame.f_code.co_filename
        count += event == "call" and (file.startswith(_PACKAGE) or file == _GENERATED)

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count
