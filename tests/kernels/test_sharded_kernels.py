"""Kernels of sharded GroupNorm in several processes, and their bytes."""

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

import triton_gn
from tests.support.ranks import Ranks
from tests.support.sharding import ALL, Step, check_step
from triton_gn.distributed import sharded_group_norm
from triton_gn.ops import launcher

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    three = Ranks(3)
    yield three
    three.stop()


@pytest.mark.parametrize(
    "step",
    [
        Step((2, 12, 6, 5), (1, 5), fused=ALL, activation="silu"),
        Step((2, 12, 6, 5), (0, 4, 2), channels_last=True, dtype=HALF, fused=ALL),
        Step((2, 20, 7, 3), (2, 5, 0), dtype=BRAIN, param_dtype=SINGLE, activation="gelu"),
        Step((1, 6, 40), (3, 37), dtype=DOUBLE, fused=("residual", "pre_add"), activation="relu"),
        Step((3, 8, 2), (1, 1), groups=4, channels_last=True, fused=("scale", "shift")),
        Step((2, 6, 30, 4), (0, 29, 1), mean=1e4, std=0.1),
        Step((2, 6, 30, 4), (13, 17), mean=1e4, std=0.1, channels_last=True),
        Step((1, 4, 48, 20), (24, 24), offsets=(0, 2)),
    ],
    ids=str,
)
def test_sharded_is_unsharded(ranks: Ranks, step: Step) -> None:
    check_step(ranks, Step(**vars(step) | {"backend": "triton"}))


def traffic(rank: int, group: dist.ProcessGroup, channels_last: bool) -> None:
    """A process reads its x, and its dy, as often as split does, and writes y and dx once."""
    from tests.support.interpreter import Traffic

    n, groups = 2, 3
    x = torch.randn(n, 12, 5, 8, dtype=BRAIN)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    dy, weight = torch.randn_like(x), torch.ones(12, requires_grad=True)
    x.requires_grad_()
    with triton_gn.backend("triton"), launcher.recording() as calls:
        with Traffic(x=x) as forward:
            y = sharded_group_norm(x, groups, weight, activation="silu", process_group=group)
        with Traffic(x=x, dy=dy) as backward:
            torch.autograd.grad(y, (x, weight), dy)
    num_partials = [one.config.num_partials for one in calls]
    assert forward.loaded["x"] == 2 * x.nbytes
    # partial and merged moments, and what backward needs
    assert forward.stored["other"] == y.nbytes + 4 * n * groups * (4 * num_partials[0] + 4 + 3)
    assert backward.loaded["x"] == backward.loaded["dy"] == 2 * x.nbytes
    parts = n * calls[2].config.splits
    of_weight = 4 * 12 * (parts + 1) if parts > 1 else 4 * 12
    assert backward.stored["other"] == x.nbytes + 4 * 2 * n * groups * num_partials[2] + of_weight


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts in the interpreter")
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "innermost"])
def test_bytes(ranks: Ranks, channels_last: bool) -> None:
    ranks.run(traffic, 2, channels_last)
