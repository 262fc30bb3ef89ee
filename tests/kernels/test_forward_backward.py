"""Every kernel against float64: formats, dtypes, affine, channels per group, pixels."""

import itertools
import os
from dataclasses import asdict

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import InterpreterError

import triton_gn
from tests.support.memory import GuardedMemory
from tests.support.oracle import check, make_case
from triton_gn.kernels.split import SplitShape
from triton_gn.kernels.tile import Tile, program_tile_of
from triton_gn.plan import Device, Problem, plan

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
AFFINE = ((True, True), (True, False), (False, True), (False, False))
GROUP_CHANNELS = (1, 3, 4, 10, 20, 30, 40)
SPATIAL = ((), (1,), (7, 7), (8, 8), (5, 3, 2), (33,))

# Resident: all formats x dtypes x channels x pixels, while affine goes round, so that each meets
# every other factor. The others: every third, so that any two factors still meet.
CASES = [
    (strategy, *factors, AFFINE[index // 2 % len(AFFINE)])
    for strategy, step in (("resident", 1), ("split", 3), ("pipelined", 3))
    for index, factors in enumerate(
        itertools.product(DTYPES, SPATIAL, GROUP_CHANNELS, (False, True))
    )
    if index % step == 0
]


@pytest.mark.parametrize(
    ("strategy", "dtype", "spatial", "group_channels", "channels_last", "affine"),
    CASES,
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_matches_float64(
    memory: GuardedMemory,
    device: str,
    strategy: str,
    dtype: torch.dtype,
    spatial: tuple[int, ...],
    group_channels: int,
    channels_last: bool,
    affine: tuple[bool, bool],
) -> None:
    case = make_case(
        memory,
        device,
        (2, 2 * group_channels, *spatial),
        2,
        channels_last=channels_last,
        dtype=dtype,
        affine=affine,
    )
    with triton_gn.plan_override(strategy=strategy):
        results = case.through_kernels()
    # in a group of one element dx_hat and its mean cancel, but not what each rounds by, times rstd
    is_one = case.x.numel() == 2 * case.x.shape[0]
    weight = 1.0 if case.weight is None else case.weight.double().abs().max()
    dx_terms = float(case.dy.double().abs().max() * weight) * case.eps**-0.5 if is_one else 0.0
    check(results, case.expected(), dx_terms)
    assert results["y"].stride() == case.x.stride()
    assert results["dx"].stride() == case.x.stride()


PARAM_CASES = [
    (dtype, param_dtype) for dtype in DTYPES for param_dtype in DTYPES if param_dtype is not dtype
]


@pytest.mark.parametrize(("dtype", "param_dtype"), PARAM_CASES, ids=str)
def test_mixes_parameter_dtypes(
    memory: GuardedMemory, device: str, dtype: torch.dtype, param_dtype: torch.dtype
) -> None:
    case = make_case(memory, device, (2, 20, 6, 6), 2, dtype=dtype, param_dtype=param_dtype)
    results = case.through_kernels()
    check(results, case.expected())
    assert results["dweight"].dtype is results["dbias"].dtype is param_dtype


@pytest.mark.parametrize("strategy", ["resident", "pipelined", "split"])
@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [
        ((2, 6, 5, 7), 1),  # one group: LayerNorm over (C, *)
        ((2, 6, 5, 7), 6),  # one channel per group: InstanceNorm
        ((1, 256, 2, 2), 1),  # many channels, few pixels: H*W below the vector
        ((1, 129, 9), 1),  # nothing divides anything
        ((1, 2, 4099), 2),
        ((3, 1, 64), 1),
        ((1, 96, 16, 16), 12),
        ((1, 40, 4, 4, 4), 4),
        ((2, 8, 2, 2, 3, 2), 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_odd_shapes(
    memory: GuardedMemory,
    device: str,
    strategy: str,
    shape: tuple[int, ...],
    num_groups: int,
    channels_last: bool,
) -> None:
    case = make_case(memory, device, shape, num_groups, channels_last=channels_last)
    with triton_gn.plan_override(strategy=strategy):
        results = case.through_kernels()
    check(results, case.expected())


def test_more_groups_than_a_grid_axis_of_65535(memory: GuardedMemory, device: str) -> None:
    # channels-last, so that few programs hold them all
    case = make_case(memory, device, (1, 65_792, 2), 65_792, channels_last=True)
    with torch.no_grad(), triton_gn.backend("triton"), triton_gn.plan_override(groups=256):
        y = triton_gn.group_norm(case.x, case.num_groups, case.weight, case.bias)
    check({"y": y}, {"y": case.expected()["y"]})


@triton.jit
def _offset_kernel(
    offset_ptr, pid, groups, pixels, row_vecs, splits, split_vecs, TILE: tl.constexpr
):
    shape = SplitShape(groups, pixels, row_vecs, splits, split_vecs, None)
    region = program_tile_of(pid, shape, splits, split_vecs, TILE)
    tl.store(offset_ptr, region.block.offset)


@pytest.mark.parametrize("strategy", ["resident", "pipelined", "split"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_offsets_beyond_2_to_the_31(device: str, strategy: str, channels_last: bool) -> None:
    """The last program of 2**33 elements starts at the right offset; no memory is allocated."""
    pixels = 2**11 if strategy == "resident" else 2**22
    problem = Problem("forward", 2**33 // (16 * pixels), 16, 8, pixels, "float16", channels_last)
    config = plan(problem, Device(), override=(("strategy", strategy),))
    last = config.programs(problem) - 1
    offset = torch.zeros(1, dtype=torch.int64, device=device)
    _offset_kernel[(1,)](
        offset, last, 8, pixels, problem.row_vecs, config.splits, config.split_vecs,
        TILE=Tile(**asdict(config.tile), threads=32 * config.num_warps, nvidia=False),
    )  # fmt: skip
    sample = (problem.n - 1) * 16 * pixels
    first = (config.splits - 1) * config.split_vecs  # pixel, or vector, of the last split
    if channels_last:
        first_channel = 16 - config.tile.groups * 2
        assert offset.item() == sample + first * 16 + first_channel
    else:
        assert (
            config.num_partials == config.splits * 2 // config.tile.rows or strategy == "resident"
        )
        first_row = 14 if strategy == "resident" else 16 - config.tile.rows
        assert offset.item() == sample + first_row * pixels + first * problem.vec


@triton.jit
def _product_kernel(product_ptr, a, b):
    tl.store(product_ptr, a * b)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="GPUs do not say it")
def test_an_overflow_is_seen() -> None:
    """A 32-bit overflow in any test raises an error."""
    product = torch.zeros(1, dtype=torch.int64)
    _product_kernel[(1,)](product, 2**15, 2**15)
    assert product.item() == 2**30
    with pytest.raises(InterpreterError, match="mul of int32"):
        _product_kernel[(1,)](product, 2**16, 2**15)


def test_first_values_of_a_range(device: str) -> None:
    x = torch.arange(1470.0, device=device).reshape(5, 6, 7, 7)
    with triton_gn.backend("triton"):
        y = triton_gn.group_norm(x, 2)
    assert [round(value, 4) for value in y.flatten()[:3].tolist()] == [-1.7203, -1.6967, -1.6732]


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, ::2],
        lambda x: x[:, 2:],
        lambda x: x.flip(0)[:1],
        lambda x: x.transpose(0, 2),
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1)[:, :4],
    ],
    ids=["pixels", "channels", "flip", "batch", "image", "expand", "channels_last"],
)
def test_other_strides(memory: GuardedMemory, device: str, view: object) -> None:
    case = make_case(memory, device, (2, 6, 8, 5), 1)
    case.x, case.dy = view(case.x), view(case.dy)
    channels = case.x.shape[1]
    case.weight, case.bias = case.weight[:1].repeat(channels), case.bias[:1].repeat(channels)
    check(case.through_kernels(), case.expected())


def test_dy_in_another_format_than_x(memory: GuardedMemory, device: str) -> None:
    case = make_case(memory, device, (2, 6, 4, 5), 3, channels_last=True)
    case.dy = case.dy.contiguous()
    results = case.through_kernels()
    check(results, case.expected())
    assert results["dx"].stride() == case.x.stride()
