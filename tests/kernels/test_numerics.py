"""Means far from 0, large groups, 16-bit statistics: where other libraries lose their digits."""

import pytest
import torch
from torch.nn import functional as F

import triton_gn
from tests.support.memory import GuardedMemory
from tests.support.oracle import Case, check, make_case, relative_error

# groups of 4,096 elements, which are resident, and one of 262,144, which is split and takes seconds
SHAPES = [((2, 16, 16, 32), 2), ((1, 4, 256, 256), 1)]
FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "innermost"])


def errors(case: Case, results: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: relative_error(results[name], value) for name, value in case.expected().items()}


@FORMATS
@pytest.mark.parametrize(("shape", "num_groups"), SHAPES)
def test_mean_far_from_zero(
    memory: GuardedMemory,
    device: str,
    shape: tuple[int, ...],
    num_groups: int,
    channels_last: bool,
) -> None:
    case = make_case(
        memory, device, shape, num_groups, channels_last=channels_last, mean=1e4, std=0.1
    )
    relative = errors(case, case.through_kernels())
    assert relative.pop("y") <= 1e-6
    assert all(error <= 2e-6 for error in relative.values()), relative


@FORMATS
@pytest.mark.parametrize(("shape", "num_groups"), SHAPES)
def test_mean_zero_is_as_exact_as_pytorch(
    memory: GuardedMemory,
    device: str,
    shape: tuple[int, ...],
    num_groups: int,
    channels_last: bool,
) -> None:
    case = make_case(memory, device, shape, num_groups, channels_last=channels_last)
    ours = errors(case, case.through_kernels())
    theirs = errors(case, case.through(F.group_norm))
    # 1e-7: one rounding of float32
    assert all(ours[name] <= 1.5 * theirs[name] + 1e-7 for name in ours), (ours, theirs)


@FORMATS
def test_group_of_131072_halves(memory: GuardedMemory, device: str, channels_last: bool) -> None:
    case = make_case(
        memory, device, (1, 2, 256, 256), 1, channels_last=channels_last, dtype=torch.float16
    )
    check(case.through_kernels(), case.expected())


@pytest.mark.parametrize("strategy", ["resident", "pipelined", "split"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@FORMATS
def test_16_bits_around_30(
    memory: GuardedMemory, device: str, strategy: str, dtype: torch.dtype, channels_last: bool
) -> None:
    case = make_case(
        memory, device, (2, 8, 16, 16), 2, channels_last=channels_last, dtype=dtype, mean=30.0
    )
    with triton_gn.plan_override(strategy=strategy):
        results = case.through_kernels()
    check(results, case.expected())


@pytest.mark.parametrize("strategy", ["resident", "pipelined", "split"])
@FORMATS
def test_mean_that_drifts_within_a_group(
    memory: GuardedMemory, device: str, strategy: str, channels_last: bool
) -> None:
    """Half of each image is padding: the parts that are merged have far-apart means."""
    case = make_case(
        memory, device, (1, 4, 64, 64), 1, channels_last=channels_last, mean=1e4, std=0.1
    )
    case.x[:, :, :32] = 0.0
    with triton_gn.plan_override(strategy=strategy):
        results = case.through_kernels()
    check(results, case.expected())


@FORMATS
@pytest.mark.parametrize("splits", [1, 2])
def test_first_block_far_from_the_others(
    memory: GuardedMemory, device: str, channels_last: bool, splits: int
) -> None:
    """Worst case for deviations from the mean of the first of 16 blocks."""
    case = make_case(
        memory, device, (1, 4, 512, 128), 1, channels_last=channels_last, mean=1e4, std=0.1
    )
    case.x[:, :, :16] = 0.0
    with triton_gn.plan_override(strategy="split", splits=splits):
        relative = errors(case, case.through_kernels())
    # m2 keeps 20 of its 24 bits: 1e-6, and what its sums round by
    assert relative["y"] <= 2e-6
    assert relative["dx"] <= 2e-6


@pytest.mark.parametrize("strategy", ["resident", "pipelined", "split"])
def test_constant_group(memory: GuardedMemory, device: str, strategy: str) -> None:
    case = make_case(memory, device, (1, 4, 8, 8), 2, affine=(False, False))
    case.x.fill_(0.1)
    with triton_gn.plan_override(strategy=strategy):
        results = case.through_kernels()
    assert (results["y"].abs() < 1e-5).all()  # the rounding of 0.1, times rstd of 316


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_eps_keeps_its_own_precision(
    memory: GuardedMemory, device: str, dtype: torch.dtype, eps: float
) -> None:
    # float16 would round 1e-8 to 0, float32 would change a float64 result in the 8th digit
    case = make_case(memory, device, (1, 4, 6, 6), 2, dtype=dtype, std=1e-3)
    case.eps = eps
    check(case.through_kernels(), case.expected())
