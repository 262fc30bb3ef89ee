"""Triton's interpreter, as the suite patches it, computes what the unpatched one computes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import triton_gn
from tests.support.memory import GuardedMemory
from tests.support.oracle import make_case

ROOT = Path(__file__).parents[2]
# shape, groups, channels-last, strategy; 7x7 is no multiple of a vector, (5, 8) has one pixel
CASES = [
    ((2, 8, 4, 6), 2, True, "resident"),
    ((2, 8, 4, 6), 2, False, "split"),
    ((1, 8, 7, 7), 4, False, "resident"),
    ((5, 8), 2, False, "resident"),
]


def results() -> list[dict[str, Tensor]]:
    """Compute y and all gradients of small float32 cases with everything fused."""
    memory = GuardedMemory()
    steps = []
    for shape, num_groups, channels_last, strategy in CASES:
        case = make_case(
            memory, "cpu", shape, num_groups, channels_last=channels_last, activation="silu",
            fused=("scale", "shift", "pre_add", "residual"),
        )  # fmt: skip
        with triton_gn.plan_override(strategy=strategy):
            steps.append(case.through_kernels())
    return steps


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the interpreter")
def test_patches_change_no_bit(tmp_path: Path) -> None:
    path = tmp_path / "unpatched.pt"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, __file__, str(path)], cwd=ROOT, env=environment, check=True)
    unpatched = torch.load(path)
    assert unpatched
    for expected, actual in zip(unpatched, results(), strict=True):
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            assert torch.equal(value, actual[name]), name


if __name__ == "__main__":
    torch.save(results(), sys.argv[1])
