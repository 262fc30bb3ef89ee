"""Pipelined: the order of tickets, and that results do not depend on which program takes which.

The interpreter runs one program after the other, so the first takes all tickets. Only
tests/gpu/test_gpu.py, on a GPU, tests programs that run at the same time.
"""

import itertools

import pytest
import torch
import triton
import triton.language as tl

import triton_gn
from tests.support.memory import GuardedMemory
from tests.support.oracle import check, make_case
from triton_gn.kernels.pipelined import Pipeline, _program_of, _stage_of
from triton_gn.kernels.tile import Tile
from triton_gn.ops import launcher, layout
from triton_gn.ops.call import Call
from triton_gn.ops.settings import Settings

FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "innermost"])


@triton.jit
def list_tickets(out_ptr, pipeline, splits, TILE: tl.constexpr):
    for ticket in range(0, 2 * pipeline.stages * pipeline.work_items):
        stage, is_first = _stage_of(ticket, pipeline)
        program = _program_of(stage, ticket % pipeline.work_items, pipeline, splits, TILE)
        tl.store(out_ptr + 3 * ticket, stage)
        tl.store(out_ptr + 3 * ticket + 1, is_first.to(tl.int32))
        tl.store(out_ptr + 3 * ticket + 2, program)


def tickets(
    device: str,
    stages: int,
    stages_per_sample: int,
    work_items: int,
    prefetch_distance: int,
    splits: int,
    channels_last: bool,
) -> list[tuple[int, bool, int]]:
    """Return of each ticket: stage, whether it is the first pass, and the program's number."""
    out = torch.full((2 * stages * work_items, 3), -1, dtype=torch.int32, device=device)
    pipeline = Pipeline(None, stages, stages_per_sample, work_items, prefetch_distance)
    list_tickets[(1,)](out, pipeline, splits, Tile(channels_last=channels_last))
    return [(stage, bool(first), program) for stage, first, program in out.tolist()]


@FORMATS
@pytest.mark.parametrize(
    ("stages", "prefetch_distance"), [(1, 1), (2, 1), (2, 2), (6, 1), (6, 4), (6, 6)]
)
def test_tickets_are_in_order(
    device: str, stages: int, prefetch_distance: int, channels_last: bool
) -> None:
    splits = 3
    work_items = 2 * splits
    stages_per_sample = 2 if stages % 2 == 0 else 1
    listed = tickets(
        device, stages, stages_per_sample, work_items, prefetch_distance, splits, channels_last
    )
    for is_first in (True, False):
        of_pass = [ticket for ticket in listed if ticket[1] is is_first]
        assert [stage for stage, *_ in of_pass] == [
            i // work_items for i in range(stages * work_items)
        ]
        assert sorted(program for *_, program in of_pass) == list(range(stages * work_items))
    phases = [next(phase)[:2] for _, phase in itertools.groupby(listed, lambda ticket: ticket[:2])]
    assert len(phases) == 2 * stages
    for stage in range(stages):
        first, second = phases.index((stage, True)), phases.index((stage, False))
        # prefetch_distance - 1 pairs and one first pass lie between, as far as there are any
        assert first < second <= first + 2 * prefetch_distance
    # a program that waits, waits for earlier tickets only
    assert [stage for stage, is_first in phases if is_first][:prefetch_distance] == list(
        range(prefetch_distance)
    )


def test_stages_are_adjacent_groups_of_a_sample(device: str) -> None:
    """Channels-last, 6 blocks of groups in stages of 2, 3 splits.

    Programs are numbered as split's: blocks innermost, then splits, then samples.
    """
    listed = tickets(device, 6, 3, 6, 1, 3, channels_last=True)
    for stage, is_first, program in listed:
        if is_first:
            sample, block = program // 18, program % 6
            assert (sample, block // 2) == divmod(stage, 3)


@FORMATS
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_bits_do_not_depend_on_the_pipeline(
    memory: GuardedMemory, device: str, channels_last: bool, activation: str
) -> None:
    """The bits are those of split, whatever the pipeline."""
    case = make_case(
        memory, device, (3, 16, 12, 16), 4, channels_last=channels_last, activation=activation,
        fused=("pre_add", "residual"),
    )  # fmt: skip
    splitting = {"pixel_tiles": 1, "splits": 2}
    with triton_gn.plan_override(strategy="split", **splitting):
        expected = case.through_kernels()
    check(expected, case.expected())
    for fields in (
        {"persistent_programs": 1},
        {"persistent_programs": 5},
        {"persistent_programs": 64, "blocks": 1},
    ):
        with triton_gn.plan_override(strategy="pipelined", **splitting, **fields):
            for name, value in case.through_kernels().items():
                assert torch.equal(value, expected[name]), name


def test_counters_start_at_zero_in_each_call(memory: GuardedMemory, device: str) -> None:
    case = make_case(memory, device, (2, 8, 6, 6), 2)
    options = Settings(plan_override=(("strategy", "pipelined"), ("persistent_programs", 2)))
    expected = case.expected()["y"]
    call = Call(2, 1e-5, "none", case.x.dtype, options)
    with launcher.recording() as calls:
        for _ in range(3):
            y = layout.empty_like(case.x).fill_(float("nan"))
            launcher.forward(case.operands, call, y, None)
            check({"y": y}, {"y": expected})
    assert calls[0] is calls[1] is calls[2]


def test_parameter_gradients_alone_take_one_pass(memory: GuardedMemory, device: str) -> None:
    case = make_case(memory, device, (2, 8, 6, 6), 2)
    weight = case.weight.requires_grad_()
    with triton_gn.plan_override(strategy="pipelined"), triton_gn.backend("triton"):
        y = triton_gn.group_norm(case.x, 2, weight, case.bias)
        with launcher.recording() as calls:
            y.backward(case.dy)
    check({"dweight": weight.grad}, {"dweight": case.expected()["dweight"]})
    assert not [one for one in calls[0].launches if "pipelined" in one.kernel.__name__]
