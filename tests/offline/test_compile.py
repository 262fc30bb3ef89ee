"""Compile the kernels for GPUs that need not be present: no spills, 16-byte accesses, no
approximate arithmetic."""

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton

from tests.support.activations import ACTIVATIONS
from tests.support.compiling import launches_of, statistics_launches
from triton_gn.ops.launches import Launch
from triton_gn.tools.compile import Kernel, assembly_of, compile_launch, pointers_of

pytest.importorskip("triton")

OLDER = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# approximate arithmetic, where it would reach the statistics
FORBIDDEN = ("tf32", "sqrt.approx", "rsqrt.approx", "div.full")
TENSORS = ("x_ptr", "dy_ptr", "residual_ptr", "y_ptr", "dx_ptr", "dresidual_ptr")
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# shape, groups, dtype, parameter dtype, channels-last, affine: resident small, odd and as large as
# it gets in both directions; split, as the rule cuts it
PROBLEMS = [
    ((2, 1280, 8, 8), 32, BF16, BF16, False, (True, True)),
    ((2, 1280, 8, 8), 32, F16, F32, True, (True, True)),
    ((2, 320, 16, 16), 32, BF16, F32, True, (True, True)),
    ((2, 320, 16, 16), 32, F32, F32, False, (True, False)),
    ((8, 256, 7, 7), 32, BF16, BF16, False, (True, True)),
    ((8, 256, 7, 7), 32, F32, F32, True, (False, True)),
    ((2, 48, 5, 3, 2), 4, F32, F32, False, (True, True)),
    ((2, 96, 64, 96), 16, BF16, BF16, False, (True, True)),
    ((2, 64, 50, 60), 16, F32, F32, False, (False, False)),
    ((2, 128, 16, 12), 4, BF16, BF16, True, (True, True)),
    ((2, 96, 28, 28), 16, F64, F64, False, (True, True)),
    ((32, 1024), 16, BF16, BF16, True, (True, True)),
    ((1, 128, 512, 512), 32, BF16, F32, False, (True, True)),
    ((1, 128, 512, 512), 32, F16, F16, True, (True, True)),
    ((1, 320, 128, 128), 32, F32, F32, True, (True, True)),
    ((4, 96, 5375), 1, F32, F32, False, (True, True)),
]


# Every problem for every target, in one direction for two of them and in the other for two, as to
# compile takes seconds. Any two of problem, direction and target meet, and any direction, target
# and memory format, or dtype of the input (but float64, which one problem has).
CASES = [
    (*problem, ("forward", "backward")[(i + i // 8 + j) % 2], target)
    for i, problem in enumerate(PROBLEMS)
    for j, target in enumerate(TARGETS)
]


def id_of(value: object) -> str:
    return str(value).replace("torch.", "").replace(" ", "")


@pytest.mark.parametrize(
    (
        "shape", "num_groups", "dtype", "param_dtype", "channels_last", "affine", "direction",
        "target",
    ),
    CASES,
    ids=id_of,
)  # fmt: skip
def test_compiles_to_what_it_should(
    shape: tuple[int, ...],
    num_groups: int,
    dtype: torch.dtype,
    param_dtype: torch.dtype,
    channels_last: bool,
    affine: tuple[bool, bool],
    direction: str,
    target: str,
) -> None:
    launches = launches_of(
        direction, shape, num_groups, dtype, channels_last, param_dtype, affine, target
    )
    assert_compile_well(launches, dtype, target)


def assert_compile_well(launches: list[Launch], dtype: torch.dtype, target: str) -> None:
    for launch in launches:
        kernel = compile_launch(launch, target)
        assert kernel.spill_bytes == 0, kernel
        if "TILE" in launch.arguments:
            # rows that channels_per_row several channels are converted by Triton before 3.9
            is_spanned = launch.arguments["TILE"].channels_per_row.value > 1
            assert kernel.converted_tiles == 0 or (is_spanned and OLDER), kernel
        assembly = assembly_of(launch, target)
        assert not [word for word in FORBIDDEN if word in assembly], kernel
        if "TILE" in launch.arguments:
            assert_wide(launch, kernel)


def assert_wide(launch: Launch, kernel: Kernel) -> None:
    """Assert that all accesses to tensors of the input's size are 16 bytes wide."""
    tensors = [name for name, _ in pointers_of(launch) if name in TENSORS]
    assert tensors
    for name in tensors:
        assert kernel.access_bytes[name] == 16, (name, kernel)


# what networks have around the norm: a residual block, a time embedding, AdaGN, all at once
ALL = ("scale", "shift", "pre_add", "residual")
FUSED = [
    *((activation, ()) for activation in ACTIVATIONS if activation != "none"),
    ("none", ("residual",)),
    ("relu", ("residual",)),
    ("silu", ("pre_add",)),
    ("silu", ("scale", "shift")),
    ("gelu", ALL),
]
FUSED_PROBLEMS = [
    ((2, 320, 64, 64), 32, BF16, BF16, False, (True, True)),
    ((2, 320, 32, 32), 32, F16, F32, True, (True, True)),
    ((1, 128, 512, 512), 32, BF16, F32, True, (True, True)),
    ((8, 256, 7, 7), 32, F32, F32, False, (True, True)),
]
# A problem for sm_80 and the next for sm_90, one forward and the other backward. Any two of what is
# fused, direction and target meet, and any two of problem, direction and target.
FUSED_CASES = [
    (*fused, FUSED_PROBLEMS[(i + j) % 4], ("forward", "backward")[(i // 4 + j) % 2], target)
    for i, fused in enumerate(FUSED)
    for j, target in enumerate(("sm_80", "sm_90"))
]


@pytest.mark.parametrize(
    ("activation", "fused", "problem", "direction", "target"), FUSED_CASES, ids=id_of
)
def test_fused_compiles_to_what_it_should(
    activation: str, fused: tuple[str, ...], problem: tuple[Any, ...], direction: str, target: str
) -> None:
    shape, num_groups, dtype, param_dtype, channels_last, affine = problem
    launches = launches_of(
        direction, shape, num_groups, dtype, channels_last, param_dtype, affine, target,
        activation, fused,
    )  # fmt: skip
    assert_compile_well(launches, dtype, target)


@pytest.mark.parametrize(
    ("channels_last", "dtype", "target"), [(False, BF16, "sm_90"), (True, F32, "gfx942")], ids=id_of
)
def test_statistics_apart_compile_to_what_they_should(
    channels_last: bool, dtype: torch.dtype, target: str
) -> None:
    x = torch.empty(2, 320, 32, 32, dtype=dtype, device="meta")
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    assert_compile_well(statistics_launches(x, 32, "silu", target), dtype, target)


# every size x format x strategy, each pair of them in both directions
SIZES_OF_1 = [
    (shape, groups, channels_last, strategy, ("forward", "backward")[(i + j + k) % 2])
    for i, (shape, groups) in enumerate(
        [((1, 8), 1), ((1, 8, 1, 8), 8), ((2, 8, 3), 1), ((1, 16, 8), 2)]
    )
    for j, channels_last in enumerate((False, True))
    for k, strategy in enumerate(("resident", "split"))
]


@pytest.mark.parametrize(
    ("shape", "num_groups", "channels_last", "strategy", "direction"), SIZES_OF_1, ids=id_of
)
def test_sizes_of_1_compile(
    shape: tuple[int, ...], num_groups: int, channels_last: bool, strategy: str, direction: str
) -> None:
    """Triton makes an argument of 1 a constant: it has no dtype then and no methods."""
    launches = launches_of(direction, shape, num_groups, BF16, channels_last, strategy=strategy)
    for launch in launches:
        assert compile_launch(launch, "sm_90").spill_bytes == 0


@pytest.mark.parametrize(
    ("shape", "dtype", "direction"),
    [
        ((2, 4, 5375), F32, "forward"),
        ((2, 16, 1377), BF16, "forward"),
        ((2, 8, 1501), BF16, "backward"),
    ],
    ids=id_of,
)
def test_long_rows_that_span_channels_do_not_spill(
    shape: tuple[int, ...], dtype: torch.dtype, direction: str
) -> None:
    launches = launches_of(direction, shape, 1, dtype, False, activation="silu")
    assert_compile_well(launches, dtype, "sm_90")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_pipelined_compiles(channels_last: bool, direction: str, target: str) -> None:
    """Pipelined compiles like the others, and orders its messages to other programs."""
    dtype = BF16 if direction == "forward" else F32
    launches = launches_of(
        direction, (2, 64, 60, 60), 16, dtype, channels_last, target=target, strategy="pipelined"
    )
    assert_compile_well(launches, dtype, target)
    if target.startswith("sm"):
        assembly = assembly_of(launches[0], target)
        assert re.search(r"(atom|red)\.global\.gpu\.release\.add", assembly)
        assert re.search(r"(atom|ld)\.global\.gpu\.acquire", assembly)


def test_all_kernels_are_compiled_above() -> None:
    """Both strategies, directions and memory formats compile for each target."""
    compiled = set()
    for shape, num_groups, dtype, _, channels_last, _, direction, target in CASES:
        for launch in launches_of(
            direction, shape, num_groups, dtype, channels_last, target=target
        ):
            strategy = launch.kernel.__name__.split("_")[3]
            compiled.add((strategy, direction, channels_last, target))
    everything = itertools.product(
        ("resident", "split"), ("forward", "backward"), (False, True), TARGETS
    )
    assert set(everything) <= compiled


def test_a_spill_is_seen() -> None:
    """The check above can fail: the same tile in a quarter of the warps does spill."""
    launch, *_ = launches_of("backward", (2, 16, 32, 32), 1, BF16, False, strategy="resident")
    squeezed = replace(launch, num_warps=launch.num_warps // 4)
    assert compile_launch(squeezed, "sm_90").spill_bytes > 0


def test_a_narrow_access_is_seen() -> None:
    """Groups of an odd number of elements start anywhere: one element at a time."""
    launch, *_ = launches_of("forward", (2, 7, 9, 11), 7, BF16, False)
    kernel = compile_launch(launch, "sm_90")
    assert kernel.access_bytes["x_ptr"] < 16
    with pytest.raises(AssertionError):
        assert_wide(launch, kernel)
