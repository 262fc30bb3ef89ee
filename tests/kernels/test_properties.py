"""The kernels on random problems: shapes, strides, formats, dtypes, strategies,
and what is fused."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import triton_gn
from tests.support.activations import ACTIVATIONS
from tests.support.memory import GuardedMemory
from tests.support.oracle import check, make_case

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # an example takes a second: shrinking one would take minutes
    # the guarded memory only collects tensors, so the examples of a test may share it
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    n=st.integers(1, 2),
    num_groups=st.integers(1, 3),
    group_channels=st.integers(1, 13),
    spatial=st.lists(st.integers(1, 9), max_size=2),
    dtype=st.sampled_from(DTYPES),
    channels_last=st.booleans(),
    permuted=st.booleans(),
    strategy=st.sampled_from(("resident", "pipelined", "split")),
    mean=st.sampled_from((0.0, -7.0)),
    activation=st.sampled_from(list(ACTIVATIONS)),
    fused=st.sets(st.sampled_from(("scale", "shift", "pre_add", "residual"))),
    per_sample=st.booleans(),
)
# the series of a tanh, of large values, for which something else is taken
@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")
def test_random_problems_match_float64(
    memory: GuardedMemory,
    device: str,
    n: int,
    num_groups: int,
    group_channels: int,
    spatial: list[int],
    dtype: torch.dtype,
    channels_last: bool,
    permuted: bool,
    strategy: str,
    mean: float,
    activation: str,
    fused: set[str],
    per_sample: bool,
) -> None:
    shape = (n, num_groups * group_channels, *spatial)
    # in groups of two or three elements, dx is nothing but what cancellation leaves over
    assume(group_channels * torch.Size(spatial).numel() >= 8)
    case = make_case(
        memory,
        device,
        shape,
        num_groups,
        channels_last=channels_last,
        dtype=dtype,
        mean=mean,
        activation=activation,
        fused=tuple(sorted(fused)),
        per_sample=per_sample,
    )
    if permuted:
        order = (0, 1, *range(len(shape) - 1, 1, -1))
        case.x, case.dy = case.x.permute(order), case.dy.permute(order)
        if case.residual is not None:
            case.residual = case.residual.permute(order)
    with triton_gn.plan_override(strategy=strategy):
        results = case.through_kernels()
    check(results, case.expected())
